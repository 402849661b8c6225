"""Roles of parameters: tags that optimizer groups, initialisation and precision read, so that nothing matches on names.

no_decay: weight decay leaves it alone. keep_fp32: stays fp32 whatever the precision (recurrence parameters). residual: writes into the
residual stream, so its initial scale shrinks with depth. fan_in: inputs of one output, where the shape does not tell. log_decay_rate: the
logarithm of the rate at which a head forgets. vocabulary: a row for each token, in the embedding and the head. splits: the outputs of each of the
matrices that lie side by side in one parameter, a linear map's (outputs, inputs) or a batch's (number, inputs, outputs). What the tensors of a state are, a mixer says in `state_roles` (models/contract.py).
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn


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
    draw = torch.empty(parameter.shape, dtype=torch.float32)
    nn.init.trunc_normal_(draw, std=std, a=-3 * std, b=3 * std)
    with torch.no_grad():
        parameter.copy_(draw)


def init_matrix(parameter: nn.Parameter, std: float, n_layers: int) -> None:
    """std, divided by sqrt(2 n_layers) for what writes into the residual stream (GPT-2's rule; n_layers = 0 switches it off)."""
    scale = 1 / math.sqrt(2 * n_layers) if n_layers and roles(parameter).get("residual") else 1.0
    normal_(parameter, std * scale)
