"""tensor_lists: what an optimizer does with many tensors, each in one launch and one pass over memory.

`total_norm` of gradients, which torch's own launches take seven times longer for on an H100 at 400M parameters; `adamw`; and the two ends of a step
of Muon for matrices of one shape (training/optim/muon.py): `momentum_and_update` and `take_step`. Kernels read the addresses of their tensors from a table.
Sums are made in a fixed order: the same gradients give the same bits. Without Triton, and for anything but fp32, all of it is plain torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kernels.dispatch import no_triton
from kernels.tensor_lists import reference


def use_triton(tensors: list[Tensor]) -> bool:
    """Whether the kernels take these tensors: fp32 in memory without gaps, beginning at a multiple of 16 bytes."""
    if not tensors or no_triton(tensors[0].device):
        return False
    return all(t.dtype == torch.float32 and t.is_contiguous() and t.data_ptr() % 16 == 0 and t.device == tensors[0].device for t in tensors)


def total_norm(tensors: list[Tensor]) -> Tensor:
    """The root of the sum of all squares, fp32, on their device: partial sums of 65,536 squares in fp32, added up in fp64."""
    if not use_triton(tensors):
        return nn.utils.get_total_norm(tensors)
    from kernels.tensor_lists import triton

    with torch.cuda.device_of(tensors[0]):
        return triton.total_norm(tensors)


def momentum_and_update(
    gradients: list[Tensor],
    firsts: list[int],
    momentum_krc: Tensor,
    beta: float,
    nesterov: bool,
    side: int,
    dtype: torch.dtype,
    divisor: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Takes gradients (k of (r, c), each from element `first` of a tensor on; all of them divided by `divisor`) into their momentum:
    m <- m + (1 - beta) (g - m). Returns what is to be orthogonalised, m, or with nesterov g + beta (m - g): (k side, r, c / side) in `dtype`, the
    matrices that lie side by side in each one behind the other; and their norms (k side,), where they cost nothing."""
    if not muon_kernels_take([*gradients, momentum_krc], firsts):
        return reference.momentum_and_update(gradients, firsts, momentum_krc, beta, nesterov, side, dtype, divisor), None
    from kernels.tensor_lists import triton

    with torch.cuda.device_of(momentum_krc):
        return triton.momentum_and_update(gradients, firsts, momentum_krc, beta, nesterov, side, dtype, divisor)


def scaled(x_krc: Tensor, scale_k: Tensor, dtype: torch.dtype) -> Tensor:
    """Each matrix times its number, in another dtype. torch's product of two dtypes over matrices takes five times as long as its bytes."""
    if no_triton(x_krc.device) or not x_krc.is_contiguous() or x_krc.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return torch.mul(x_krc, scale_k[:, None, None], out=torch.empty_like(x_krc, dtype=dtype))
    from kernels.tensor_lists import triton

    with torch.cuda.device_of(x_krc):
        return triton.scaled(x_krc, scale_k.float(), dtype)


def muon_kernels_take(tensors: list[Tensor], firsts: list[int]) -> bool:
    """Whether kernels take both ends of a step of Muon; they leave momentum and weights as they are where the divisor is not finite."""
    return use_triton(tensors) and not any(first % 4 for first in firsts)


def take_step(
    weights: list[Tensor],
    firsts: list[int],
    shape: tuple[int, int],
    updates: Tensor,
    keep: float,
    step: float,
    side: int,
    divisor: Tensor | None = None,
) -> None:
    """weights (k of shape (r, c), each from element `first` of a tensor on) <- keep weights - step updates, these (k side, r, c / side) as
    `momentum_and_update` lays them out. divisor: that of the gradients, see `muon_kernels_take`."""
    if not muon_kernels_take(weights, firsts):
        return reference.take_step(weights, firsts, shape, updates, keep, step, side)
    from kernels.tensor_lists import triton

    with torch.cuda.device_of(updates):
        triton.take_step(weights, firsts, shape, updates, keep, step, side, divisor)


class AdamWLists:
    """What a step of AdamW reads and writes, a list of tensors each: weights, gradients, moments, squares, and steps, of each tensor a number on its
    device. Where Triton's kernel takes it, its table of addresses is made at once."""

    def __init__(
        self, weights: list[Tensor], gradients: list[Tensor], moments: list[Tensor], squares: list[Tensor], steps: list[Tensor]
    ) -> None:
        self.weights, self.gradients, self.moments, self.squares, self.steps = weights, gradients, moments, squares, steps
        self.table: tuple[Tensor, ...] | None = None
        if weights:
            from kernels.tensor_lists import triton

            with torch.cuda.device_of(weights[0]):
                self.table = triton.adamw_table(self)

    def is_of(self, group: dict[str, Any]) -> bool:
        """Whether these are the gradients of a group of parameters, in its order."""
        there = [p.grad for p in group["params"] if p.grad is not None]
        return len(there) == len(self.gradients) and all(a is b for a, b in zip(there, self.gradients))


def adamw(lists: AdamWLists, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, divisor: Tensor | None) -> None:
    """A step of AdamW (Loshchilov and Hutter 2019) for tensors that `use_triton` takes, all of them: gradients are read, divided by `divisor`, and left
    as they are, and so is everything where the divisor is not finite. torch's fused step writes what it has divided back, 4 bytes a parameter of 32.
    The counts of steps have this step among them."""
    from kernels.tensor_lists import triton

    with torch.cuda.device_of(lists.weights[0]):
        triton.adamw(lists, lr, betas, eps, weight_decay, divisor)
