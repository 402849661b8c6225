"""Roles of parameters: tags that optimizer groups, initialisation and precision read, so that nothing matches on names.

no_decay: weight decay leaves it alone. keep_fp32: stays fp32 whatever the precision (recurrence parameters). residual: writes into the
residual stream, so its initial scale shrinks with depth. fan_in: inputs of one output, where the shape does not tell; fixed_fan_in: they do not grow
in number with the width. falls_with_width: acts channel by channel, yet is drawn with a spread of 1 / sqrt(width). scores_of_width: makes the queries
of heads that grow with the width. rate: the multiple of the learning rate (models/param). log_decay_rate: the logarithm of the rate at which a head
forgets. vocabulary: a row for each token, in the embedding and the head. splits: the outputs of each of the matrices that lie side by side in one
parameter, a linear map's (outputs, inputs) or a batch's (number, inputs, outputs). What the tensors of a state are, a mixer says in `state_roles`
(models/contract.py).
"""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

PIECE = 1 << 20  # numbers that are looked at at once, so that they are in a cache


def tag(parameter: nn.Parameter, *names: str, **values: Any) -> nn.Parameter:
    """Adds roles to `parameter` and returns it."""
    parameter.roles = {**roles(parameter), **dict.fromkeys(names, True), **values}  # type: ignore[attr-defined]
    return parameter


def roles(parameter: nn.Parameter) -> dict[str, Any]:
    """The roles of `parameter` (empty for an untagged one)."""
    return getattr(parameter, "roles", {})


def is_hidden_matrix(parameter: nn.Parameter) -> bool:
    """Whether `parameter` maps hidden vectors to hidden vectors, by matrices as `splits` says: not embedding and head, nor what acts channel by
    channel (norms, biases, convolutions, recurrent vectors, all tagged no_decay). A batch of matrices has to be declared by `splits`."""
    tags = roles(parameter)
    maps = parameter.ndim == 2 or parameter.ndim == 3 and "splits" in tags
    return maps and not {"no_decay", "keep_fp32", "vocabulary"} & set(tags)


class Module(nn.Module):
    """A module whose copies keep the roles of all parameters in it, which torch's own copy of a parameter leaves behind."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        for old, parameter in zip(self.parameters(), new.parameters()):
            if roles(old):
                parameter.roles = dict(roles(old))  # type: ignore[attr-defined]
        return new


def normal_(parameter: torch.Tensor, std: float) -> None:
    """Truncated normal (three standard deviations), drawn on the CPU so that a seed means the same weights on every device."""
    with torch.no_grad():
        if (
            parameter.device.type == "cpu"
            and parameter.dtype == torch.float32
            and parameter.is_contiguous()
            and type(parameter.data) is torch.Tensor
        ):
            _truncated_(parameter.data, std)
            return
        draw = torch.empty(parameter.shape, dtype=torch.float32)
        _truncated_(draw, std)
        parameter.copy_(draw)


def _truncated_(draw: torch.Tensor, std: float) -> None:
    if _draws_as_torch():
        _redrawn_(draw, std)
    else:
        nn.init.trunc_normal_(draw, std=std, a=-3 * std, b=3 * std)


def _redrawn_(draw: torch.Tensor, std: float, generator: torch.Generator | None = None) -> None:
    """The numbers of torch's own trunc_normal_ in a third of the time: it draws the whole tensor anew as long as one number lies outside, and looks
    at all of them each time. Here only those outside are looked at again, and memory is taken once."""
    limit = torch.tensor(3 * std, dtype=torch.float32).item()
    flat = draw.normal_(0.0, std, generator=generator).view(-1)
    pieces = enumerate(flat.split(PIECE))
    outside = torch.cat([torch.zeros(0, dtype=torch.int64), *((p.abs() > limit).nonzero().view(-1) + i * PIECE for i, p in pieces)])
    again = torch.empty_like(flat) if outside.numel() else flat
    while outside.numel():
        values = again.normal_(0.0, std, generator=generator)[outside]
        flat[outside] = values
        outside = outside[values.abs() > limit]


@functools.cache
def _draws_as_torch() -> bool:
    """Whether this torch's trunc_normal_ is the one that `_redrawn_` follows; earlier ones drew otherwise, and their numbers stay theirs."""
    one, other = torch.empty(5000), torch.empty(5000)
    _redrawn_(one, 0.5, torch.Generator().manual_seed(0))
    nn.init.trunc_normal_(other, std=0.5, a=-1.5, b=1.5, generator=torch.Generator().manual_seed(0))
    return torch.equal(one, other)


class Unset(TorchFunctionMode):
    """Inside, functions of torch.nn.init do nothing: what layers of torch draw when they are made is drawn over by `init_weights`."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        keywords = keywords or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return keywords["tensor"] if "tensor" in keywords else arguments[0]
        return function(*arguments, **keywords)


def step_size_problems(low: float, high: float, floor: float | None = None) -> list[str]:
    """What is wrong with the range of a mixer's initial step sizes, a sentence or none. floor: None where the mixer has none."""
    if 0 < low < high < math.inf and (floor is None or 0 < floor < math.inf):
        return []
    also = "" if floor is None else " and dt_floor above 0,"
    return [f"dt_min {low} must lie between 0 and dt_max {high},{also} all of them finite."]


def norm_eps_problems(eps: float) -> list[str]:
    """What is wrong with what a norm adds to the mean square, a sentence or none."""
    return [] if 0 < eps <= 1 else [f"norm_eps must be above zero and at most 1, not {eps}."]


def value_width_problems(expand_v: float, key_width: int) -> list[str]:
    """What is wrong with the width of a head's values as a multiple of its keys', a sentence or none."""
    width = expand_v * key_width
    if 1 <= width < math.inf and abs(width - round(width)) <= 1e-6 * width:
        return []
    return [f"expand_v {expand_v} times the width of a key must be a whole number, not {width}."]


def draw_step_sizes_(bias: torch.Tensor, low: float, high: float, floor: float) -> None:
    """Draws step sizes log-uniform in [low, high], at least `floor`, and puts into `bias` what softplus takes to them (Mamba's rule)."""
    first, last = math.log(low), math.log(high)
    with torch.no_grad():
        dt = torch.exp(torch.rand(bias.shape[0]) * (last - first) + first).clamp(min=floor)
        bias.copy_(dt + torch.log(-torch.expm1(-dt)))


def init_matrix(parameter: nn.Parameter, std: float, n_layers: int) -> None:
    """std, divided by sqrt(2 n_layers) for what writes into the residual stream (GPT-2's rule; n_layers = 0 switches it off)."""
    scale = 1 / math.sqrt(2 * n_layers) if n_layers and roles(parameter).get("residual") else 1.0
    normal_(parameter, std * scale)
