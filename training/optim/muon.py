"""Muon for the hidden matrices and AdamW for the rest, the matrices' work and momentum divided over the ranks.

Muon (Jordan 2024) follows the momentum of the gradient with all its singular values set to 1. Matrices that lie side by side in one parameter are
orthogonalised each by itself, as the roles of the parameter say (`splits`, models/init.py): an update of two that are taken for one favours the
larger. Gradients are clipped before any of this, by the norm of them all.

Matrices of one shape are a `Stack`: their momentum is one tensor, and each product of Newton and Schulz one launch. Of every stack each rank has a
share; it computes the updates of its share, the ranks gather them (in fp16 on a GPU, 2 bytes a parameter), and all take the same step. The
gather of one stack runs while the next is computed. Gradients have to be whole on every rank: DeepSpeed averages them as plain data parallelism
does, no ZeRO stage is in play. Its own Muon was read and left (releases to 0.19.8): it clips the update instead of the gradient, which divides the
step by 4 to 86 (issue 8439), at ZeRO-3 takes a step of momentum for every micro-batch (8443), and takes a fused projection for one matrix.

Legend: k matrices' slabs in this rank's share, r rows, c columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels.tensor_lists import momentum_and_update, muon_kernels_take, take_step
from models.init import is_hidden_matrix, roles
from training.optim.adamw import SkippableAdamW, parameter_groups
from training.optim.newton_schulz import STEPS, orthogonalized

SCALES = ("adamw", "spectral")
CHUNK = 3 << 26  # numbers that are orthogonalised at once: their copies are 0.38 GiB each in 16 bits


@dataclass(frozen=True)
class Slab:
    """Elements first .. first + rows * columns - 1 of the flattened parameter `name`: a matrix of outputs times inputs, or, in a batch, `side` matrices
    of inputs times outputs side by side."""

    name: str
    first: int
    rows: int
    columns: int
    side: int = 1
    batch: bool = False

    @property
    def shape(self) -> tuple[int, int, int, bool]:
        return self.rows, self.columns, self.side, self.batch


def slabs(name: str, parameter: nn.Parameter) -> list[Slab]:
    """The slabs of a hidden matrix; over them every element comes once. Raises ValueError where its splits do not add up."""
    splits = roles(parameter).get("splits")
    if parameter.ndim == 2:
        rows, columns = parameter.shape
        made, first = [], 0
        for outputs in splits or [rows]:
            made.append(Slab(name, first * columns, outputs, columns))
            first += outputs
        if first != rows:
            raise ValueError(f"The splits of {name} are {splits}, which are not its {rows} rows.")
        return made
    number, rows, columns = parameter.shape
    if not splits or sum(splits) != columns or len(set(splits)) > 1:
        raise ValueError(
            f"The splits of {name} are {splits}; a batch of matrices has to be split into equal parts of its {columns} columns."
        )
    return [Slab(name, i * rows * columns, rows, columns, len(splits), True) for i in range(number)]


def shapes_of(model: nn.Module) -> dict[tuple[int, int, int, bool], list[Slab]]:
    """The slabs of all hidden matrices of `model` by their shape, in the order of its parameters."""
    stacks: dict[tuple[int, int, int, bool], list[Slab]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and is_hidden_matrix(parameter):
            for slab in slabs(name, parameter):
                stacks.setdefault(slab.shape, []).append(slab)
    return stacks


class Stack:
    """Slabs of one shape. owner: the rank that has the first share, the next rank the second, and so on around; they differ from stack to stack, so
    that stacks of few slabs do not all fall to the same. momentum (k, r, c): of this rank's share, fp32."""

    def __init__(self, every: list[Slab], owner: int, rank: int, size: int, device: torch.device) -> None:
        self.slabs, self.owner, self.rank, self.size = every, owner, rank, size
        self.share = -(-len(every) // size)
        self.own = self._share_of(rank)
        self.rows, self.columns, self.side, batch = every[0].shape
        self.fan_out, self.fan_in = (self.columns // self.side, self.rows) if batch else (self.rows, self.columns)
        self.momentum = torch.zeros(len(self.own), self.rows, self.columns, device=device)

    def _share_of(self, rank: int) -> list[Slab]:
        place = (rank - self.owner) % self.size
        return self.slabs[place * self.share : (place + 1) * self.share]

    def updates(
        self, gradients: dict[str, Tensor], beta: float, nesterov: bool, steps: int, dtype: torch.dtype, divisor: Tensor | None
    ) -> Tensor:
        """(share side, r, c / side): takes the gradients into the momentum and returns it orthogonalised, as `momentum_and_update` lays it out; where
        this rank has less than a share, zeros follow."""
        size, whole = (self.share * self.side, self.rows, self.columns // self.side), len(self.own) == self.share
        at_once = max(1, CHUNK // (self.rows * self.columns))
        if whole and self.share <= at_once:
            return self._orthogonalized(0, self.share, gradients, beta, nesterov, steps, dtype, divisor)
        out = torch.zeros(size, dtype=dtype, device=self.momentum.device)
        for i in range(0, len(self.own), at_once):
            end = min(i + at_once, len(self.own))
            out[i * self.side : end * self.side] = self._orthogonalized(i, end, gradients, beta, nesterov, steps, dtype, divisor)
        return out

    def _orthogonalized(
        self,
        first: int,
        end: int,
        gradients: dict[str, Tensor],
        beta: float,
        nesterov: bool,
        steps: int,
        dtype: torch.dtype,
        divisor: Tensor | None,
    ) -> Tensor:
        mine = self.own[first:end]
        raw = torch.bfloat16 if dtype == torch.float16 else dtype  # before it is divided by its norm, fp16 may be too narrow for it
        x, norms = momentum_and_update(
            [gradients[slab.name] for slab in mine],
            [slab.first for slab in mine],
            self.momentum[first:end],
            beta,
            nesterov,
            self.side,
            raw,
            divisor,
        )
        handed = [x]  # handed over: its memory is free once it is scaled
        del x
        return orthogonalized(handed.pop(), steps, dtype, norms)

    def gathered(self, own: Tensor) -> tuple[Tensor, Any]:
        """(updates of all ranks' shares one behind the other, what to wait for)."""
        if self.size == 1:
            return own, None
        every = own.new_empty(self.size * own.shape[0], *own.shape[1:])
        return every, dist.all_gather_into_tensor(every, own.contiguous(), async_op=True)

    def take(self, parameters: dict[str, nn.Parameter], updates: Tensor, keep: float, step: float, divisor: Tensor | None) -> None:
        """weights = keep weights - step update, for the slabs of all ranks. divisor: that of the gradients."""
        each = self.share * self.side
        for rank in range(self.size):
            mine = self._share_of(rank)
            if mine:
                weights, firsts = [parameters[slab.name] for slab in mine], [slab.first for slab in mine]
                update = updates[rank * each : rank * each + len(mine) * self.side]
                take_step(weights, firsts, (self.rows, self.columns), update, keep, step, self.side, divisor)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for what `is_hidden_matrix`, AdamW for all else. As SkippableAdamW: the next `step` does nothing, momentum and moments included, when
    `skip_next` is set, and divides gradients by `grad_scale` if that is given.

    lr, betas, eps: AdamW's. muon_lr: the matrices' rate, weight_decay is that of both, times the rate of each. scale: 'adamw' multiplies an update
    by 0.2 sqrt(max(outputs, inputs)), the size that AdamW's have (Liu et al. 2025, arXiv 2502.16982), 'spectral' by sqrt(max(1, outputs / inputs)).
    rank, size: of the default process group, where there is one. replay: of one rank alone, what may run the updates as a CUDA graph
    (training/graph.py).
    """

    skip_next: bool = False
    grad_scale: Tensor | None = None
    before_step: Callable[[], None] | None = None
    replay: Callable[[Hashable, Sequence[Callable[[Tensor | None], Tensor]], Tensor | None], Iterator[Tensor] | None] | None = None
    _kernels_take: bool = False  # both ends of the next step, of all matrices

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        muon_lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        momentum: float = 0.95,
        nesterov: bool = True,
        steps: int = STEPS,
        scale: str = "adamw",
        rank: int = 0,
        size: int = 1,
    ) -> None:
        if scale not in SCALES:
            raise ValueError(f"The scale of an update is {scale!r}; choose one of {', '.join(SCALES)}.")
        self.matrices = {n: p for n, p in model.named_parameters() if p.requires_grad and is_hidden_matrix(p)}
        self.momentum, self.nesterov, self.steps, self.scale, self.rank = momentum, nesterov, steps, scale, rank
        rest = parameter_groups(model, weight_decay, without=is_hidden_matrix)
        for group in rest:
            group.pop("names")
        hidden = {"params": list(self.matrices.values()), "lr": muon_lr, "lr_ratio": muon_lr / lr, "weight_decay": weight_decay}
        super().__init__([*rest, hidden] if self.matrices else rest, {"lr": lr})
        self.adamw = SkippableAdamW(rest, lr=lr, betas=betas, eps=eps, fused=True)
        for own, inner in zip(self.param_groups, self.adamw.param_groups):
            own.update(inner)
        self.adamw.param_groups = self.param_groups[: len(rest)]  # the same groups, so that rates set here are AdamW's
        self.adamw.state = self.state
        self.stacks: list[Stack] = []
        owner = 0
        for every in shapes_of(model).values():
            self.stacks.append(Stack(every, owner % size, rank, size, self.matrices[every[0].name].device))
            owner += -(-len(every) // self.stacks[-1].share)

    def prepare(self) -> None:
        """Of AdamW's part, see there."""
        self.adamw.prepare()
        tensors = [t for p in self.matrices.values() if p.grad is not None for t in (p.detach(), p.grad)]
        firsts = [slab.first for stack in self.stacks for slab in stack.slabs]
        alone = all(stack.size == 1 for stack in self.stacks) and len(tensors) == 2 * len(self.matrices)
        self._kernels_take = alone and muon_kernels_take([*tensors, *(stack.momentum for stack in self.stacks)], firsts)

    @property
    def leaves_out(self) -> bool:
        """As AdamW's: whether the next step, prepared, is left out where grad_scale is not finite."""
        self.adamw.grad_scale = self.grad_scale
        return self._kernels_take and self.before_step is None and self.adamw.leaves_out

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
        if self.skip_next:
            self.adamw.forget()
            return None
        if self.before_step is not None:
            self.before_step()
        self.adamw.grad_scale = self.grad_scale
        if not self.matrices:
            return self.adamw.step(closure)
        group = self.param_groups[-1]
        gradients = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in self.matrices.items()}
        replayed = self._replayed(gradients)
        self.adamw.step(closure)
        if replayed is not None:  # one after another on one stream: with a second one Memsets of the recorded pass wait longer
            for stack, update in zip(self.stacks, replayed):
                self._take(group, stack, update, None)
            return None
        waiting: list[tuple[Stack, Tensor, Any]] = []
        for stack in self.stacks:
            own = self._updates(stack, gradients, self.grad_scale)
            waiting.append((stack, *stack.gathered(own)))
            if len(waiting) > 1:
                self._take(group, *waiting.pop(0))
        for last in waiting:
            self._take(group, *last)
        return None

    def _updates(self, stack: Stack, gradients: dict[str, Tensor], divisor: Tensor | None) -> Tensor:
        dtype = torch.float16 if stack.momentum.device.type == "cuda" else torch.float32
        return stack.updates(gradients, self.momentum, self.nesterov, self.steps, dtype, divisor)

    def _replayed(self, gradients: dict[str, Tensor]) -> Iterator[Tensor] | None:
        """The updates of the stacks one after another, their momentum moved on, if these are replayed."""
        if self.replay is None or any(stack.size > 1 for stack in self.stacks):
            return None
        memory = tuple(t.data_ptr() for t in (*gradients.values(), *(stack.momentum for stack in self.stacks)))
        return self.replay(memory, [partial(self._updates, stack, gradients) for stack in self.stacks], self.grad_scale)

    def _take(self, group: dict[str, Any], stack: Stack, updates: Tensor, arriving: Any) -> None:
        if arriving is not None:
            arriving.wait()
        lr = float(group["lr"])
        factor = self.factor(stack.fan_out, stack.fan_in)
        stack.take(self.matrices, updates, 1 - lr * group["weight_decay"], lr * factor, self.grad_scale)

    def factor(self, outputs: int, inputs: int) -> float:
        """By what an update of a matrix of `outputs` times `inputs` is multiplied."""
        return 0.2 * math.sqrt(max(outputs, inputs)) if self.scale == "adamw" else math.sqrt(max(1.0, outputs / inputs))

    def momenta(self) -> Iterator[tuple[Slab, Tensor]]:
        """(slab, its momentum (r, c)) of this rank's shares, views of live memory; over the ranks every slab comes once."""
        for stack in self.stacks:
            yield from zip(stack.own, stack.momentum)


def plan(model: nn.Module, size: int, on_gpu: bool = True) -> tuple[int, int, int]:
    """(parameters that are hidden matrices, those whose momentum the fullest rank of `size` has, bytes of its update beyond weights, gradients and
    momentum, at most). `model` may lie on the meta device."""
    stacks, owner, width = shapes_of(model), 0, 2 if on_gpu else 4
    held, update, before = [0] * size, 0, 0
    for (rows, columns, _, _), every in stacks.items():
        share, each = -(-len(every) // size), rows * columns
        chunk = each * min(share, max(1, CHUNK // each))
        small = chunk // max(rows, columns) * min(rows, columns)
        # the gathered updates of this stack and the one before, x before and after a product, and small matrices; on a CPU the gradients in a row
        there = width * share * each * (size + 1 if size > 1 else 1)
        update = max(update, before + there + 2 * width * chunk + 5 * width * small + (0 if on_gpu else 4 * chunk))
        before = there
        for place in range(-(-len(every) // share)):
            held[(owner + place) % size] += each * len(every[place * share : (place + 1) * share])
        owner += -(-len(every) // share)
    return sum(len(every) * shape[0] * shape[1] for shape, every in stacks.items()), max(held), update
