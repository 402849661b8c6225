"""A recurrent cell is its step function; the annotations of its arguments say what each one is.

    def step(z: Pre, c: Pre, a: Rec, h: State): ...; return (h,)

Pre: an input projection of the layer, one value per token and channel. Rec: a learned weight per channel. State: carried over time.
The step returns its new states in the order of its State arguments; the last one is what the layer emits. It works on tensors of any
(broadcast) shape, element by element; one that does anything else is solved as a loop.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:  # to a type checker all three are tensors
    Pre = Rec = State = Tensor
else:

    class Pre:
        """Annotation: receives an input projection."""

    class Rec:
        """Annotation: a learned per-channel weight."""

    class State:
        """Annotation: carried from step to step."""


ROLES = {"Pre": "pre", "Rec": "rec", "State": "state"}


REGISTRY: dict[str, Cell] = {}  # cells by key: custom ops take strings


@dataclass(frozen=True)
class Cell:
    """A step function and the names of its arguments by role. `key` is its name, made unique among the cells of this process;
    `lowered`: whether kernels and derivatives can be written from its step, else `why_loop` says why it runs as a loop. Raises ValueError
    for a step that no solver can run."""

    name: str
    step: Callable[..., tuple[Tensor, ...]]
    pre: tuple[str, ...]
    rec: tuple[str, ...]
    state: tuple[str, ...]
    key: str = field(init=False, default="", compare=False)
    why_loop: str = field(init=False, default="", compare=False)
    with_bias: Cell | None = field(init=False, default=None, compare=False, repr=False)  # see `biased`

    def __post_init__(self) -> None:
        from kernels.parallel_rnn.expressions import check  # it needs Cell
        from kernels.parallel_rnn.operations import NotLowered

        try:
            with _apart():
                check(self)
        except NotLowered as reason:
            object.__setattr__(self, "why_loop", str(reason))
        numbered = (f"{self.name}#{i}" for i in itertools.count(2))
        key = next(k for k in itertools.chain([self.name], numbered) if REGISTRY.get(k) in (None, self))
        object.__setattr__(self, "key", key)
        REGISTRY[key] = self

    @property
    def lowered(self) -> bool:
        return not self.why_loop

    @staticmethod
    @functools.cache
    def from_step(step: Callable[..., Any], name: str | None = None) -> Cell:
        """Reads the annotations of `step`. Raises ValueError for an argument without a role or that is not an ordinary one, for no Pre or no
        State at all, and for a step that does not return a tuple of its states."""
        if not inspect.isfunction(step):
            raise ValueError(f"Cell {name or step!r}: its step must be a function, not a {type(step).__name__}.")
        found: dict[str, list[str]] = {"pre": [], "rec": [], "state": []}
        title = name or step.__name__
        for argument, parameter in inspect.signature(step).parameters.items():
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise ValueError(f"Cell {title}: write the argument {argument!r} as an ordinary one, with no *, ** or / in the signature.")
            if parameter.default is not parameter.empty:
                raise ValueError(
                    f"Cell {title}: the argument {argument!r} has a default value; take it out, the layer gives every argument."
                )
            annotation = parameter.annotation if isinstance(parameter.annotation, str) else getattr(parameter.annotation, "__name__", "")
            role = ROLES.get(annotation.strip("'\"").rsplit(".", 1)[-1])
            if role is None:
                raise ValueError(f"Cell {title}: annotate the argument {argument!r} with Pre, Rec or State.")
            found[role].append(argument)
        if not found["state"] or not found["pre"]:
            raise ValueError(f"Cell {title}: a step needs at least one Pre and one State argument.")
        cell = Cell(title, step, tuple(found["pre"]), tuple(found["rec"]), tuple(found["state"]))
        object.__setattr__(cell, "with_bias", _with_bias(cell))  # now: torch.compile can look it up, not make it
        return cell

    def call(self, pre: Sequence[Any], rec: Sequence[Any], state: Sequence[Any]) -> Any:
        """What the step returns, whatever it is."""
        return self.step(**dict(zip(self.pre, pre)), **dict(zip(self.rec, rec)), **dict(zip(self.state, state)))

    def __call__(self, pre: Sequence[Tensor], rec: Sequence[Tensor], state: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """One step on tensors given in the order of the names. Raises ValueError if it returns something else than its states."""
        new, like = returned(self, self.call(pre, rec, state)), state[0]
        return tuple(n if n.dim() >= like.dim() else n.expand_as(like) for n in new)  # one of weights alone

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


def returned(cell: Cell, found: Any) -> tuple[Any, ...]:
    """The new states a step returned, as many as the cell has."""
    n = len(cell.state)
    if isinstance(found, (tuple, list)) and len(found) == n:
        return tuple(found)
    what = f"{len(found)} values" if isinstance(found, (tuple, list)) else "None" if found is None else "a bare tensor"
    raise ValueError(
        f"Cell {cell.name}: its step must return a tuple of its {n} new state{'s' * (n > 1)}, ({', '.join(cell.state)}{',' * (n == 1)}), not {what}."
    )


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
        versions = [(name, t, t._version) for name, t in zip((*cell.pre, *cell.rec, *cell.state), (*pre, *rec, *state))]
        try:
            new = cell(pre, rec, state)
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
def _kept(cell: Cell) -> int:
    """How many values a channel and step of the loop keeps for its backward pass; 8 where a step cannot be tried on two channels."""
    kept: list[Tensor] = []
    with _apart():
        given = [[torch.rand(2, requires_grad=True) for _ in names] for names in (cell.pre, cell.rec, cell.state)]
        try:
            with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t), lambda t: t):
                cell(*given)
        except Exception:
            return 8
    return len({t.data_ptr() for t in kept if t.numel() > 1})


def planned_loop(cell: Cell, pre: Tensor, rec: Tensor, h0: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Stands for the loop where tensors have no storage (training/cost/memory.py): shapes, gradients and what is kept are the loop's, values are not."""
    states = pre.sum(2) + rec.sum(0)
    for _ in range(_kept(cell)):
        states = states.exp()
    final = h0 + states[:, -1:]
    return states[:, :, None].expand(-1, -1, len(cell.state), -1).clone(), final


def biased(cell: Cell) -> Cell:
    """The cell with a bias for each input projection, after its own weights: added where the projection is read, so that neither the sum nor
    the bias's gradient costs a pass over memory."""
    return _with_bias(cell) if cell.with_bias is None else cell.with_bias


@functools.cache
def _with_bias(cell: Cell) -> Cell:
    taken, names = {*cell.pre, *cell.rec, *cell.state}, dict[str, str]()
    for name in cell.pre:
        bias = f"bias_{name}"
        while bias in taken:
            bias += "_"
        taken.add(bias)
        names[name] = bias

    def step(**given: Tensor) -> tuple[Tensor, ...]:
        biases = {name: given.pop(bias) for name, bias in names.items()}
        return cell.step(**{name: value + biases[name] if name in biases else value for name, value in given.items()})

    made = Cell(f"{cell.name}_biased", step, cell.pre, (*cell.rec, *names.values()), cell.state)
    object.__setattr__(made, "why_loop", cell.why_loop or made.why_loop)  # under the name its author knows
    return made
