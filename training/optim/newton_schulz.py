"""Orthogonalises matrices: U V^T of the singular value decomposition U S V^T, nearly, by matrix products alone.

A step of Newton and Schulz maps every singular value s to a s + b s^3 + c s^5. Jordan's coefficients (Muon, 2024, kellerjordan.github.io/posts/muon)
have the largest slope at zero: after five steps values from 0.01 to 1 lie between about 0.7 and 1.2, which serves an update as well as 1 does.

Legend: k matrices, r rows, c columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.symmetric import symmetric

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
LEAST = 1e-30  # a norm below this is that of a matrix of zeros, which stays one


def orthogonalized(x_krc: Tensor, steps: int) -> Tensor:
    """(k, r, c): x with all singular values near 1, in its dtype; every product is one launch for all k. Multiples of x give the same."""
    a, b, c = COEFFICIENTS
    norm = torch.linalg.vector_norm(x_krc, dim=(1, 2), keepdim=True, dtype=torch.promote_types(x_krc.dtype, torch.float32))
    x = x_krc * norm.clamp(min=LEAST).reciprocal().to(x_krc.dtype)  # no singular value is above the root of the sum of their squares
    wide = x.shape[1] <= x.shape[2]
    for _ in range(steps):
        gram = symmetric(x if wide else x.mT)  # the smaller of x x^T and x^T x
        near = symmetric(gram, gram, c, b)
        x = torch.baddbmm(x, near, x, beta=a) if wide else torch.baddbmm(x, x, near, beta=a)
    return x


def flops(rows: int, columns: int, steps: int) -> int:
    """Floating-point operations of `orthogonalized` for one matrix, symmetric products counted whole."""
    small, large = sorted((rows, columns))
    return steps * (4 * small * small * large + 2 * small**3)
