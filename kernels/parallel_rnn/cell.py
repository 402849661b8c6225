"""A recurrent cell is its step function; the annotations of its arguments say what each one is.

    def step(z: Pre, c: Pre, a: Rec, h: State): ...; return (h,)

Pre: an input projection of the layer, one value per token and channel. Rec: a learned weight per channel. State: carried over time.
The step returns its new states in the order of its State arguments; the last one is what the layer emits. It works on tensors of any
(broadcast) shape, element by element.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

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
    `lowered`: whether kernels and derivatives can be written from its step."""

    name: str
    step: Callable[..., tuple[Tensor, ...]]
    pre: tuple[str, ...]
    rec: tuple[str, ...]
    state: tuple[str, ...]
    key: str = field(init=False, default="", compare=False)
    lowered: bool = field(init=False, default=False, compare=False)
    with_bias: Cell | None = field(init=False, default=None, compare=False, repr=False)  # see `biased`

    def __post_init__(self) -> None:
        numbered = (f"{self.name}#{i}" for i in itertools.count(2))
        key = next(k for k in itertools.chain([self.name], numbered) if REGISTRY.get(k) in (None, self))
        object.__setattr__(self, "key", key)
        REGISTRY[key] = self
        from kernels.parallel_rnn.trace import NotLowered, trace  # it needs Cell

        try:
            object.__setattr__(self, "lowered", trace(self) is not None)
        except NotLowered:
            pass  # trace(cell) says why

    @staticmethod
    @functools.cache
    def from_step(step: Callable[..., Any], name: str | None = None) -> Cell:
        """Reads the annotations of `step`. Raises ValueError for an argument without a role, or no Pre or no State at all."""
        found: dict[str, list[str]] = {"pre": [], "rec": [], "state": []}
        title = name or step.__name__
        for argument, parameter in inspect.signature(step).parameters.items():
            annotation = parameter.annotation if isinstance(parameter.annotation, str) else getattr(parameter.annotation, "__name__", "")
            role = ROLES.get(annotation.rsplit(".", 1)[-1])
            if role is None:
                raise ValueError(f"Cell {title}: annotate the argument {argument!r} with Pre, Rec or State.")
            found[role].append(argument)
        if not found["state"] or not found["pre"]:
            raise ValueError(f"Cell {title}: a step needs at least one Pre and one State argument.")
        cell = Cell(title, step, tuple(found["pre"]), tuple(found["rec"]), tuple(found["state"]))
        object.__setattr__(cell, "with_bias", _with_bias(cell))  # now: torch.compile can look it up, not make it
        return cell

    def __call__(self, pre: Sequence[Tensor], rec: Sequence[Tensor], state: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """One step on tensors given in the order of the names."""
        return self.step(**dict(zip(self.pre, pre)), **dict(zip(self.rec, rec)), **dict(zip(self.state, state)))


def biased(cell: Cell) -> Cell:
    """The cell with a bias for each input projection, after its own weights: added where the projection is read, so that neither the sum nor
    the bias's gradient costs a pass over memory."""
    return _with_bias(cell) if cell.with_bias is None else cell.with_bias


@functools.cache
def _with_bias(cell: Cell) -> Cell:
    names = {name: f"bias_{name}" for name in cell.pre}

    def step(**given: Tensor) -> tuple[Tensor, ...]:
        biases = {name: given.pop(bias) for name, bias in names.items()}
        return cell.step(**{name: value + biases[name] if name in biases else value for name, value in given.items()})

    return Cell(f"{cell.name}_biased", step, cell.pre, (*cell.rec, *names.values()), cell.state)
