"""A cell: a step function (kernels/parallel_rnn/step.py), what solves it, and the same step with a bias."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kernels.parallel_rnn import products
from kernels.parallel_rnn.expressions import check
from kernels.parallel_rnn.operations import NotLowered
from kernels.parallel_rnn.step import HeadMatrix, LogState, Mat, Pre, Rec, State, StepFunction

__all__ = ["REGISTRY", "Cell", "LogState", "Mat", "Pre", "Rec", "State", "biased", "planned_loop"]
REGISTRY: dict[str, Cell] = {}  # cells by key: ops take strings


@dataclass(frozen=True, eq=False)
class Cell(StepFunction):
    """A step function that the solvers take; made by `from_step` or `of`. `key` is its name, made unique among the cells of this process;
    `why_loop`: empty, or why kernels and derivatives cannot be written from its step, so that it runs as a loop; `with_bias`: see `biased`."""

    key: str
    why_loop: str
    with_bias: Cell | None = field(repr=False)

    @property
    def lowered(self) -> bool:
        """Whether kernels and derivatives are written from its step."""
        return not self.why_loop

    @staticmethod
    @functools.cache
    def from_step(step: Callable[..., Any], name: str | None = None) -> Cell:
        """The cell of a step function, by the annotations of its arguments. Raises ValueError for an argument without a role or that is not an
        ordinary one, for no Pre or no State at all, and for a step that does not return a tuple of its states."""
        return Cell.of(StepFunction.read(step, name))

    @staticmethod
    def of(step: StepFunction) -> Cell:
        """Raises ValueError for a step that no solver can run."""
        why_loop = _why_loop(step)
        return _registered(step, why_loop, _with_bias(step, why_loop))  # with a bias now: torch.compile can look it up, not make it

    def problem(self, width: int) -> str:
        """One sentence if a step on tensors of `width` channels, or its gradient, fails, else empty. It is tried, once."""
        return _tried(self, width)


@contextmanager
def _apart() -> Iterator[None]:
    """Inside, tensors are real and on the CPU, whatever the mode outside, and random numbers leave no trace."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        yield


def _why_loop(step: StepFunction) -> str:
    """Empty if kernels and derivatives can be written from the step, else a sentence."""
    try:
        with _apart():
            (products.check if step.mat else check)(step)
    except NotLowered as reason:
        return str(reason)
    return ""


def _registered(step: StepFunction, why_loop: str, with_bias: Cell | None) -> Cell:
    numbered = (f"{step.name}#{i}" for i in itertools.count(2))
    key = next(k for k in itertools.chain([step.name], numbered) if REGISTRY.get(k) in (None, step))
    REGISTRY[key] = Cell(step.name, step.step, step.pre, step.rec, step.state, key, why_loop, with_bias, mat=step.mat, logs=step.logs)
    return REGISTRY[key]


def _failed(cell: Cell, what: str, reason: Exception) -> str:
    text = (str(reason).splitlines() or [""])[0].rstrip(".")
    return text + "." if text.startswith(f"Cell {cell.name}") else f"Cell {cell.name}: {what} with {type(reason).__name__}: {text}."


@functools.cache
def _tried(cell: Cell, width: int) -> str:
    with _apart():
        pre, rec, state = (
            [torch.rand(*shape, requires_grad=True) * 1.0 for _ in names]
            for names, shape in ((cell.pre, (2, width)), (cell.rec, (width,)), (cell.state, (2, width)))
        )
        heads = width // 64 if width % 64 == 0 else 1
        mat = [HeadMatrix(torch.rand(heads, width // heads, width // heads, requires_grad=True) * 1.0) for _ in cell.mat]
        versions = [(name, t, t._version) for name, t in zip((*cell.pre, *cell.rec, *cell.state), (*pre, *rec, *state))]
        try:
            new = cell(pre, rec, state, mat)
        except Exception as reason:  # whatever a step can do wrong
            return _failed(cell, "its step fails", reason)
        for name, t, version in versions:
            if t._version != version:
                return f"Cell {cell.name}: its step changes its argument {name!r} in place; write {name} = {name} + ... instead of {name} += ..."
        for name, n in zip(cell.state, new):
            if not n.is_floating_point():
                return f"Cell {cell.name}: its new state {name!r} must be a tensor of floating point numbers, not {n.dtype}."
        differentiable = [n.sum() for n in new if n.requires_grad]
        try:
            torch.autograd.backward(differentiable)
        except RuntimeError as reason:  # as a rule an operation in place on what the backward pass needs
            return _failed(cell, "its step cannot be differentiated, it fails", reason)
    return ""


@functools.cache
def _saved_values(cell: Cell) -> int:
    """How many values a channel and step of the loop keeps for its backward pass; 8 where a step cannot be tried on two channels."""
    saved: list[Tensor] = []
    with _apart():
        given: list[list[Any]] = [[torch.rand(2, requires_grad=True) for _ in names] for names in (cell.pre, cell.rec, cell.state)]
        given.append([HeadMatrix(torch.rand(1, 2, 2)) for _ in cell.mat])
        try:
            with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t), lambda t: t):
                cell(*given)
        except Exception:
            return 8
    return len({t.data_ptr() for t in saved if t.numel() > 1})


def planned_loop(cell: Cell, pre: Tensor, rec: Tensor, h0: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Stands for the loop where tensors have no storage (training/cost/memory.py): shapes, gradients and what is kept are the loop's, values are not."""
    states = pre.sum(2) + rec.sum(0)
    for _ in range(_saved_values(cell)):
        states = states.exp()
    final = h0 + states[:, -1:]
    return states[:, :, None].expand(-1, -1, len(cell.state), -1).clone(), final


def biased(cell: Cell) -> Cell:
    """The cell with a bias for each input projection, after its own weights: added where the projection is read, so that neither the sum nor
    the bias's gradient costs a pass over memory."""
    return _with_bias(cell, cell.why_loop) if cell.with_bias is None else cell.with_bias


@functools.cache
def _with_bias(cell: StepFunction, why_loop: str) -> Cell:
    """why_loop: why the cell itself runs as a loop, under the name that its author knows, or ''."""
    taken, names = {*cell.pre, *cell.rec, *cell.mat, *cell.state}, dict[str, str]()
    for name in cell.pre:
        bias = f"bias_{name}"
        while bias in taken:
            bias += "_"
        taken.add(bias)
        names[name] = bias

    def step(**given: Tensor) -> tuple[Tensor, ...]:
        biases = {name: given.pop(bias) for name, bias in names.items()}
        return cell.step(**{name: value + biases[name] if name in biases else value for name, value in given.items()})

    made = StepFunction(f"{cell.name}_biased", step, cell.pre, (*cell.rec, *names.values()), cell.state, mat=cell.mat, logs=cell.logs)
    return _registered(made, why_loop or _why_loop(made), None)
