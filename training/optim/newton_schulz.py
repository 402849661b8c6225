"""Orthogonalises matrices: U V^T of the singular value decomposition U S V^T, nearly, by matrix products alone.

A step of Newton and Schulz maps every singular value s to a s + b s^3 + c s^5. Jordan's coefficients (Muon, 2024, kellerjordan.github.io/posts/muon)
have the largest slope at zero: after five steps values from 0.01 to 1 lie between about 0.7 and 1.2, which serves an update as well as 1 does.

A step is x <- (a + b R + c R^2) x with R = x x^T. Of a matrix that is far from square the small R alone can be iterated, the factors gathered in one
matrix Q, and x multiplied at the end: R <- Z R Z with Z = a + b R + c R^2. All of these commute and are symmetric, which halves their products. In
16 bits the smallest values of R drown after a few steps, and can come out below zero and grow: so x is multiplied and R made afresh every third.

Legend: k matrices, r rows, c columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.symmetric import symmetric

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
LEAST = 1e-30  # a norm below this is that of a matrix of zeros, which stays one
FAR_FROM_SQUARE = 1.25  # from this ratio of the sides on, R is iterated instead of x: fewer operations
AFRESH = 3  # steps of R


def orthogonalized(x_krc: Tensor, steps: int, dtype: torch.dtype | None = None) -> Tensor:
    """(k, r, c): x with all singular values near 1, computed and given back in `dtype` (None: its own); every product is one launch for all k.
    Multiples of x give the same."""
    norm = torch.linalg.vector_norm(x_krc, dim=(1, 2), keepdim=True, dtype=torch.promote_types(x_krc.dtype, torch.float32))
    x = torch.empty_like(x_krc, dtype=dtype or x_krc.dtype)  # no singular value is above the root of the sum of their squares
    torch.mul(x_krc, norm.clamp(min=LEAST).reciprocal(), out=x)
    wide, (small, large) = x.shape[1] <= x.shape[2], sorted(x.shape[1:])
    return _through_gram(x, steps, wide) if large >= FAR_FROM_SQUARE * small else _plain(x, steps, wide)


def _plain(x: Tensor, steps: int, wide: bool) -> Tensor:
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = symmetric(x if wide else x.mT)  # the smaller of x x^T and x^T x
        near = symmetric(gram, None, gram, c, b)
        x = torch.baddbmm(x, near, x, beta=a) if wide else torch.baddbmm(x, x, near, beta=a)
    return x


def _through_gram(x: Tensor, steps: int, wide: bool) -> Tensor:
    a, b, c = COEFFICIENTS
    gram, factor = None, None
    for i in range(steps):
        if gram is None:
            gram = symmetric(x if wide else x.mT)
        near = symmetric(gram, None, gram, c, b)  # Z without a
        if factor is None:
            factor = near.clone()
            factor.diagonal(dim1=1, dim2=2).add_(a)
        else:
            factor = symmetric(factor, near, factor, 1.0, a)
        if i == steps - 1 or (i + 1) % AFRESH == 0:
            x = torch.bmm(factor, x) if wide else torch.bmm(x, factor)
            gram, factor = None, None
        else:
            once = symmetric(gram, near, gram, 1.0, a)
            gram = symmetric(once, near, once, 1.0, a)
    return x


def flops(rows: int, columns: int, steps: int) -> int:
    """Floating-point operations of `orthogonalized` for one matrix, of symmetric products one half."""
    small, large = sorted((rows, columns))
    ends, cube = 3 * small * small * large, small**3  # x x^T and a product with x
    if large < FAR_FROM_SQUARE * small:
        return steps * (ends + cube)
    fresh = -(-steps // AFRESH)
    return fresh * ends + cube * (steps + (steps - fresh) + 2 * (steps - fresh))
