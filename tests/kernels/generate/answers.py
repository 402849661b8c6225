"""From functions to answers: outputs and gradients of what is tested, of float64 and of fp32, for the same inputs and cotangents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.kernels.generate.case import Answers, Draw

Function = Callable[..., Any]
RANGE = {torch.float32: (-8.0, 8.0), torch.bfloat16: (-8.0, 8.0), torch.float16: (-1.0, 1.0)}  # powers of ten that values are scaled by


def widened(tensors: Sequence[Any], dtype: torch.dtype) -> list[Any]:
    return [t.detach().to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in tensors]


def outputs(made: Any) -> tuple[Tensor, ...]:
    return made if isinstance(made, tuple) else (made,)


def differentiated(
    draw: Draw, ours: Function, exact: Function, leaves: dict[str, Tensor | None], names: Sequence[str], description: str, coarse: float = 1.0,
    dtype: torch.dtype = torch.float32, products: bool = False,
) -> Answers:  # fmt: skip
    """Outputs and gradients of all leaves, under random cotangents. `exact` is written out for tensors of any dtype and run in fp64 and in fp32."""
    device = draw.device
    given = [None if t is None else draw.laid(t.to(device)).detach().requires_grad_() for t in leaves.values()]
    size = draw.magnitude(-3, 3)

    def run(f: Function, tensors: list[Any], cotangents: list[Tensor] | None) -> tuple[list[Tensor], list[Tensor]]:
        leaves_ = [None if t is None else t.requires_grad_() for t in tensors]
        made = outputs(f(*leaves_))
        if cotangents is None:
            cotangents = [(size * draw.randn(*y.shape)).to(device, y.dtype) for y in made]
        wanted = [t for t in leaves_ if t is not None]
        found = torch.autograd.grad(made, wanted, [c.to(y.dtype) for c, y in zip(cotangents, made)], allow_unused=True)
        return [*(y.detach() for y in made), *(torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found))], cotangents

    labels = [*names, *(f"d {name}" for name, t in leaves.items() if t is not None)]
    found, cotangents = run(ours, given, None)
    wanted = run(exact, widened(given, torch.float64), cotangents)[0]
    loop = run(exact, widened(given, torch.float32), cotangents)[0]
    return compared(labels, found, wanted, loop, description, coarse, draw.within(dtype, products))


def compared(
    labels: Sequence[str], found: Sequence[Tensor], wanted: Sequence[Tensor], loop: Sequence[Tensor], description: str, coarse: float = 1.0,
    within: torch.dtype = torch.float32,
) -> Answers:  # fmt: skip
    return Answers(dict(zip(labels, found)), dict(zip(labels, wanted)), dict(zip(labels, loop)), description, coarse, within)


def products(draw: Draw, dtype: torch.dtype) -> float:
    """How coarse matrix products are: those of fp32 are three of tf32 on a GPU."""
    return 4.0 if dtype != torch.float32 else 2.0 if draw.small else 8.0
