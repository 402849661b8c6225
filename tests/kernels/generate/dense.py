"""Random problems for recurrences that are dense in their heads.

Legend: B batch, T tokens, E heads of K channels.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from kernels.dense_rnn import dense_rnn, reference
from kernels.dispatch import interpreted
from kernels.parallel_rnn.cell import Cell, Mat, Pre, Rec, State, biased
from tests.kernels.dense_rnn_cases import known_cells
from tests.kernels.generate.answers import differentiated
from tests.kernels.generate.case import Answers, Draw


def dense(draw: Draw) -> Answers:
    return _solved(draw, draw.choice(list(known_cells().values())))


def dense_step(draw: Draw) -> Answers:
    """A cell of a step that nobody has written: matrices that multiply several operands, operands that are no states, products of products."""
    source = step_of(draw)
    names: dict[str, Any] = {"torch": torch, "Mat": Mat, "Pre": Pre, "Rec": Rec, "State": State}
    exec(source, names)
    answers = _solved(draw, Cell.from_step(names["step"], "generated"))
    return dataclasses.replace(answers, description=f"{answers.description}\n{source}")


def step_of(draw: Draw) -> str:
    """The text of a step function, every argument of which is used; new states are small whatever the inputs are."""
    pre, rec, mat, states = ([f"{letter}{i}" for i in range(draw.choice(counts))] for letter, counts in zip("xaRh", ((1, 2, 3), (0, 1, 2), (1, 2, 3), (1, 2, 3))))  # fmt: skip
    values, lines, products = [*states, *pre, *rec], [], list[str]()

    def expression(depth: int) -> str:
        if not depth or draw.chance(0.2):
            return draw.choice(values)
        form = draw.choice(
            ["torch.tanh({})", "torch.sigmoid({})", "({} + {})", "({} * {})", "({} - {})", "torch.where({} > 0.1, {}, {})", "(1.0 - {})"]
        )
        return form.format(*(expression(depth - 1) for _ in range(form.count("{}"))))

    for R in [*mat, *(draw.choice(mat) for _ in range(draw.choice([0, 0, 1, 2])))]:
        h = draw.choice([states[-1], draw.choice(states)])
        operand = draw.choice([h, h, f"({h} * torch.sigmoid({draw.choice(values)}))", f"torch.tanh({draw.choice(values)} + {h})"])
        products.append(f"p{len(products)}")
        lines.append(f"{products[-1]} = {R} @ {operand}")
        values.append(products[-1])
    new = []
    for i in range(len(states)):
        inner = " + ".join([draw.choice(pre), *products[i :: len(states)], *(v for v in (*pre, *rec) if not i)])
        gate = f" * torch.sigmoid({expression(2)})" if draw.chance(0.7) else ""
        kept = f" + 0.5 * torch.tanh({expression(2)})" if draw.chance(0.5) else f" + torch.sigmoid({expression(1)}) * {states[i]}"
        new.append(f"torch.tanh({inner}){gate}{kept}")
    roles = [(pre, "Pre"), (rec, "Rec"), (mat, "Mat"), (states, "State")]
    head = ", ".join(f"{name}: {role}" for names, role in roles for name in names)
    return f"def step({head}):\n" + "".join(f"    {line}\n" for line in [*lines, f"return ({', '.join(new)},)"])


def _solved(draw: Draw, cell: Cell) -> Answers:
    """Weights that do not expand: a solve is certified by its gaps, and of a chaotic one every rounding grows."""
    B, E, K = draw.choice([1, 2, 3]), draw.choice([1, 2]), draw.size(24, 32, 64, small=(5, 16))
    T, D, dtype = draw.size(64, 257, 400, small=(1, 2, 7, 16)), E * K, draw.dtype()
    pre, mat = draw.randn(B, T, len(cell.pre), D), draw.choice([0.1, 0.5]) * K**-0.5 * draw.randn(E, K, len(cell.mat), K)
    h0 = draw.randn(B, len(cell.state), D)
    leaves: dict[str, Tensor | None] = {"pre": pre.to(dtype), "rec": 0.3 * draw.randn(len(cell.rec), D), "mat": mat.to(dtype), "h0": h0}
    bias = draw.randn(len(cell.pre), D).to(draw.device)
    starts = draw.starts(B, T)
    starts = None if starts is None else starts.to(draw.device)

    def exact(pre: Tensor, rec: Tensor, mat: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
        states, final = reference.sequential(biased(cell), pre, torch.cat([rec, bias.to(rec.dtype)]), mat, h0, starts)
        return states[:, :, -1], final

    method = "triton" if interpreted() or pre.to(draw.device).is_cuda else "auto"  # the kernels, where they can run at all
    answers = differentiated(
        draw, lambda pre, rec, mat, h0: dense_rnn(cell, pre, rec, mat, h0, starts, bias_PD=bias, method=method), exact, leaves, ("emitted", "final"),
        f"{cell.name}, B {B}, T {T}, E {E}, K {K}, {dtype}", 2.0 if dtype != torch.float32 else 16.0,
    )  # fmt: skip
    # what is multiplied is rounded to the dtype, states and adjoints alike, whatever the dtype of the answers (that of h0 is fp32)
    return dataclasses.replace(answers, within=dtype)
