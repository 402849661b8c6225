"""AdamW over role-based parameter groups, with the one addition training needs: a step that can be skipped.

Weight decay goes to matrices only: a parameter tagged `no_decay` (norms, biases, recurrent weights) is never decayed, whatever its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kernels.tensor_lists import AdamWLists, adamw, use_triton
from models.init import roles


class SkippableAdamW(torch.optim.AdamW):
    """torch.optim.AdamW whose next `step` does nothing, moments included, when `skip_next` is set. grad_scale: None, or what gradients are divided by as
    they are read (one number on the GPU). Where kernels of ours take the tensors they take the step (kernels/tensor_lists), else torch's fused one; and
    leave it out where grad_scale is not finite, which the device knows before the host."""

    skip_next: bool = False
    grad_scale: Tensor | None = None
    before_step: Callable[[], None] | None = None  # called before each step that is not skipped (training/wrappers)
    _ready: list[AdamWLists] | None = None  # of each group, for the next step

    def prepare(self) -> None:
        """Looks up what the next step reads and writes, its gradients being in place: to be called while the device is busy, as the step, which some
        hundred small tensors cost the host milliseconds, then begins at once."""
        self._ready = None
        if len(self.state) >= sum(len(group["params"]) for group in self.param_groups) and self._kernels_take():
            self._ready = [self._lists_of(group) for group in self.param_groups]

    @property
    def leaves_out(self) -> bool:
        """Whether the next step, prepared, is left out where grad_scale is not finite."""
        return self._ready is not None and self.before_step is None and self.grad_scale is not None

    def forget(self) -> None:
        """Drops what was looked up: the step is left out."""
        self._ready = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        ready, self._ready = self._ready, None
        if self.skip_next:
            return None
        if self.before_step is not None:
            self.before_step()
        if ready is None or closure is not None or not all(r.is_of(g) for r, g in zip(ready, self.param_groups)):
            if closure is not None or not self._kernels_take():
                return super().step(closure)
            ready = [self._lists_of(group) for group in self.param_groups]
        taken = None if self.grad_scale is None else (self.grad_scale < math.inf).to(torch.float32)
        for lists, group in zip(ready, self.param_groups):
            if lists.weights:
                # a number for each: one tensor for all of them would be read by the host
                torch._foreach_add_(lists.steps, 1 if taken is None else [taken] * len(lists.steps))
                adamw(
                    lists,
                    lr=group["lr"],
                    betas=group["betas"],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    divisor=self.grad_scale,
                )
        return None

    def _kernels_take(self) -> bool:
        """Whether all that a step reads and writes is what the kernel of ours takes: moments are like their weights, and counts of steps lie beside them
        where the optimizer is a fused one."""
        weights = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        plain = all(group["fused"] for group in self.param_groups)
        plain = plain and not any(group["amsgrad"] or group["maximize"] or isinstance(group["lr"], Tensor) for group in self.param_groups)
        return plain and use_triton([*weights, *(p.grad for p in weights if p.grad is not None)])

    def _lists_of(self, group: dict[str, Any]) -> AdamWLists:
        lists: list[list[Tensor]] = [[], [], [], [], [], []]
        self._init_group(group, *lists)
        weights, gradients, moments, squares, _, steps = lists
        return AdamWLists(weights, gradients, moments, squares, steps)


def parameter_groups(
    model: nn.Module, weight_decay: float, without: Callable[[nn.Parameter], bool] = lambda parameter: False
) -> list[dict[str, Any]]:
    """Two groups, decayed and not, in the order of `model.named_parameters()`, and more where parameters have rates of their own (`rate`), whose decay
    is that of the others; each carries its parameters' names. without: which to leave out."""
    groups: dict[tuple[bool, float], list[tuple[str, nn.Parameter]]] = {(True, 1.0): [], (False, 1.0): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not without(parameter):
            key = ("no_decay" not in roles(parameter) and parameter.ndim >= 2, float(roles(parameter).get("rate", 1.0)))
            groups.setdefault(key, []).append((name, parameter))
    return [
        {"params": [p for _, p in rows], "names": [n for n, _ in rows], "weight_decay": weight_decay / rate if decayed else 0.0}
        | ({"lr_ratio": rate} if rate != 1 else {})
        for (decayed, rate), rows in groups.items()
        if rows
    ]


def build_optimizer(model: nn.Module, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> SkippableAdamW:
    """AdamW on the groups of `parameter_groups`, fused (one kernel for all tensors) on both CPU and GPU."""
    groups = parameter_groups(model, weight_decay)
    for group in groups:
        group.pop("names")
        group["lr"] = lr * group.get("lr_ratio", 1.0)
    return SkippableAdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
