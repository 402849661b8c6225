"""A recurrent cell is its step function; the annotations of its arguments say what each one is.

    def step(z: Pre, c: Pre, a: Rec, h: State): ...; return (h,)

Pre: an input projection of the layer, one value per token and channel. Rec: a learned weight per channel. State: carried over time. LogState: a
State that is a logarithm, of which a difference counts whatever its size (kernels/dense_rnn certifies it so).
Mat: a learned matrix over each head's channels, used as `R @ h`; it makes the cell dense in its heads (kernels/dense_rnn).
The step returns its new states in the order of its State arguments; the last one is what the layer emits. Beside products with a Mat it
works on tensors of any (broadcast) shape, element by element; one that does anything else is solved as a loop.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:  # to a type checker all five are tensors
    Pre = Rec = Mat = State = LogState = Tensor
else:

    class Pre:
        """Annotation: receives an input projection."""

    class Rec:
        """Annotation: a learned per-channel weight."""

    class Mat:
        """Annotation: a learned matrix over the channels of a head."""

    class State:
        """Annotation: carried from step to step."""

    class LogState:
        """Annotation: carried from step to step, a logarithm."""


ROLES = {"Pre": "pre", "Rec": "rec", "Mat": "mat", "State": "state", "LogState": "state"}


class HeadMatrix:
    """A matrix for each head, R (E, K, J) of K inputs and J = K outputs, that a step multiplies as `R @ h` with values (..., E K)."""

    def __init__(self, R_EKJ: Tensor) -> None:
        self.R_EKJ = R_EKJ

    def __matmul__(self, x: Tensor) -> Tensor:
        return torch.einsum("...ek,ekj->...ej", x.unflatten(-1, self.R_EKJ.shape[:2]), self.R_EKJ).flatten(-2)


@dataclass(frozen=True, eq=False)
class StepFunction:
    """A step function and the names of its arguments by role. Equal to one, or to a `Cell`, of the same function and names."""

    name: str
    step: Callable[..., tuple[Tensor, ...]]
    pre: tuple[str, ...]
    rec: tuple[str, ...]
    state: tuple[str, ...]
    mat: tuple[str, ...] = field(default=(), kw_only=True)
    logs: tuple[int, ...] = field(default=(), kw_only=True)  # places of states that are logarithms

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StepFunction) and self._parts() == other._parts()

    def __hash__(self) -> int:
        return hash(self._parts())

    def _parts(self) -> tuple[Any, ...]:
        return self.name, self.step, self.pre, self.rec, self.state, self.mat, self.logs

    @staticmethod
    def read(step: Callable[..., Any], name: str | None = None) -> StepFunction:
        """Reads the annotations of `step`. Raises ValueError for an argument without a role or that is not an ordinary one, and for no Pre or no
        State at all."""
        if not inspect.isfunction(step):
            raise ValueError(f"Cell {name or step!r}: its step must be a function, not a {type(step).__name__}.")
        names: dict[str, list[str]] = {"pre": [], "rec": [], "mat": [], "state": []}
        logs = list[int]()
        title = name or step.__name__
        for argument, parameter in inspect.signature(step).parameters.items():
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise ValueError(f"Cell {title}: write the argument {argument!r} as an ordinary one, with no *, ** or / in the signature.")
            if parameter.default is not parameter.empty:
                raise ValueError(
                    f"Cell {title}: the argument {argument!r} has a default value; take it out, the layer gives every argument."
                )
            annotation = parameter.annotation if isinstance(parameter.annotation, str) else getattr(parameter.annotation, "__name__", "")
            annotation = annotation.strip("'\"").rsplit(".", 1)[-1]
            role = ROLES.get(annotation)
            if role is None:
                raise ValueError(f"Cell {title}: annotate the argument {argument!r} with Pre, Rec, Mat or State.")
            logs += [len(names["state"])] if annotation == "LogState" else []
            names[role].append(argument)
        if not names["state"] or not names["pre"]:
            raise ValueError(f"Cell {title}: a step needs at least one Pre and one State argument.")
        made = (tuple(names["pre"]), tuple(names["rec"]), tuple(names["state"]))
        return StepFunction(title, step, *made, mat=tuple(names["mat"]), logs=tuple(logs))

    def call(self, pre: Sequence[Any], rec: Sequence[Any], state: Sequence[Any], mat: Sequence[Any] = ()) -> Any:
        """What the step returns, whatever it is."""
        return self.step(**dict(zip(self.pre, pre)), **dict(zip(self.rec, rec)), **dict(zip(self.mat, mat)), **dict(zip(self.state, state)))

    def __call__(
        self, pre: Sequence[Tensor], rec: Sequence[Tensor], state: Sequence[Tensor], mat: Sequence[HeadMatrix] = ()
    ) -> tuple[Tensor, ...]:
        """One step on tensors given in the order of the names. Raises ValueError if it returns something else than its states."""
        new, like = returned(self, self.call(pre, rec, state, mat)), state[0]
        return tuple(n if n.dim() >= like.dim() else n.expand_as(like) for n in new)  # one of weights alone


def returned(step: StepFunction, made: Any) -> tuple[Any, ...]:
    """The new states a step returned, as many as the cell has."""
    n = len(step.state)
    if isinstance(made, (tuple, list)) and len(made) == n:
        return tuple(made)
    what = f"{len(made)} values" if isinstance(made, (tuple, list)) else "None" if made is None else "a bare tensor"
    raise ValueError(
        f"Cell {step.name}: its step must return a tuple of its {n} new state{'s' * (n > 1)}, ({', '.join(step.state)}{',' * (n == 1)}), not {what}."
    )
