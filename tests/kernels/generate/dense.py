"""Random problems for recurrences that are dense in their heads.

Legend: B batch, T tokens, E heads of K channels.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from kernels.dense_rnn import dense_rnn, reference
from kernels.dispatch import interpreted
from kernels.parallel_rnn.cell import biased
from tests.kernels.dense_rnn_cases import known_cells
from tests.kernels.generate.answers import differentiated
from tests.kernels.generate.case import Answers, Draw


def dense(draw: Draw) -> Answers:
    """Weights that do not expand: a solve is certified by its gaps, and of a chaotic one every rounding grows."""
    cell = draw.choice(list(known_cells().values()))
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
