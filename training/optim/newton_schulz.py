"""Orthogonalises matrices: U V^T of the singular value decomposition U S V^T, nearly, by matrix products alone.

A step of Newton and Schulz maps every singular value s to a s + b s^3 + c s^5. With one polynomial for all steps (Jordan's of Muon, 2024) five are
customary; the best one for each step (Amsel et al. 2025, Polar Express, arXiv 2505.16932) does in four what that does in five: it is the one that
brings the interval which the steps before have left nearest to 1. Values of 0.0025 to 1 come out between 0.7 and 1.26.

The largest value has to be 1 at most. The root of the sum of all squares is a bound far above it where many values are alike; the fourth root of
the sum of all s^4 is nearer, and it is known once R = x x^T is. So x is divided by the first, and R by the second as it is read.

A step is x <- (a + b R + c R^2) x. Of a matrix that is far from square the small R alone can be iterated, the factors gathered in one matrix Q, and
x multiplied at the end: R <- Z R Z with Z = a + b R + c R^2. All of these commute and are symmetric, which halves their products. In 16 bits the
smallest values of R drown after a few steps, and can come out below zero and grow: so x is multiplied and R made afresh every second step. Of three
steps in all none is made afresh: in fp16 that is off by 0.7 to 5 % over spectra that fall as 1 / root of k to 1 / k^3, four steps by 0.3 to 12 %.

Legend: k matrices, r rows, c columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.symmetric import symmetric
from kernels.tensor_lists import scaled

# (a, b, c) of each step: the odd polynomial of degree 5 nearest to 1 on the interval that the ones before make of 0.0025 to 1, from the second on
# of s / 1.02: beyond their intervals they grow fast, and rounding may take a value there
COEFFICIENTS = (
    (8.40518, -24.85081, 18.42462),
    (3.99723, -2.85999, 0.51827),
    (3.53509, -2.54393, 0.48367),
    (2.5664, -1.82932, 0.40635),
)
OF_THREE = (  # likewise of 0.01 to 1, where there are three steps in all: values of it come out between 0.7 and 1.27, smaller ones below
    (8.09337, -23.62043, 17.44615),
    (3.56528, -2.56493, 0.48597),
    (2.60912, -1.86312, 0.40995),
)
OF_TWO = (  # of degree 9, of 1/80 to 1, where there are two steps in all: values of it come out between 0.7 and 1.29
    (13.61669, -128.93859, 424.81054, -543.41457, 235.75598),
    (4.39196, -9.11296, 7.85597, -2.753, 0.33332),
)
WHOLE = {2: OF_TWO, 3: OF_THREE}  # by how many steps there are in all: made for one another, and of one R
LATER = (1.875, -1.25, 0.375)  # of all further ones: it takes values near 1 to 1
STEPS = 4
LEAST = 1e-18  # a norm below this is that of a matrix of zeros, which stays one: squares of 1e-20 are none in fp32
ABOVE = 1.01  # the bound of the largest value is taken so much higher, for what rounding adds
SPREAD = 8.0  # norm of x: 16 bits hold x, R and its square, none of them is above 4,096 and few of their entries are below 1e-4
FAR_FROM_SQUARE = 1.25  # from this ratio of the sides on, R is iterated instead of x: fewer operations
AFRESH = 2  # steps of R; three where there are no more: values below 0.01 are left behind there, so that drowned ones do not grow


def coefficients(step: int, steps: int = STEPS) -> tuple[float, ...]:
    """Of s, s^3, s^5 and so on: the polynomial of a step, counted from 0, of so many."""
    if steps in WHOLE:
        return WHOLE[steps][step]
    return COEFFICIENTS[step] if step < len(COEFFICIENTS) else LATER


def orthogonalized(x_krc: Tensor, steps: int = STEPS, dtype: torch.dtype | None = None, norm_k: Tensor | None = None) -> Tensor:
    """(k, r, c): x with all singular values near 1, computed and given back in `dtype` (None: its own); every product is one launch for all k.
    Multiples of x give the same. norm_k: of each matrix, where it is known."""
    if norm_k is None:
        norm_k = torch.linalg.vector_norm(x_krc, dim=(1, 2), dtype=torch.promote_types(x_krc.dtype, torch.float32))
    x = scaled(x_krc, SPREAD / norm_k.clamp(min=LEAST), dtype or x_krc.dtype)
    del x_krc
    wide, (small, large) = x.shape[1] <= x.shape[2], sorted(x.shape[1:])
    scale = None
    again = (steps if steps in WHOLE else AFRESH) if large >= FAR_FROM_SQUARE * small else 1
    for first in range(0, steps, again):
        gram = symmetric(x if wide else x.mT)  # the smaller of x x^T and x^T x
        if not first:
            wider = torch.promote_types(gram.dtype, torch.float32)  # the norm of zeros is 0, any other SPREAD^2 / root of r at least
            scale = 1 / (ABOVE**2 * torch.linalg.vector_norm(gram, dim=(1, 2), dtype=wider).clamp(min=1e-3))
        factor = _factor(gram, [coefficients(i, steps) for i in range(first, min(first + again, steps))], None if first else scale)
        x = torch.bmm(factor, x) if wide else torch.bmm(x, factor)
    return x


def _factor(gram: Tensor, steps: list[tuple[float, ...]], scale: Tensor | None) -> Tensor:
    """What x is multiplied with for these steps, R = x x^T being `gram`. scale (k,): what R and the square of x have to be multiplied with before, if it
    is not 1."""
    root = 1.0 if scale is None else scale.sqrt()
    if len(steps) == 1:
        return _polynomial(gram, steps[0], scale, root)
    first, *more = steps
    # the constant of a steep polynomial, rounded with the rest, would come back in R as often as two of them do not commute
    aside = first[0] if len(first) == 5 else 0.0
    near, factor = _polynomial(gram, first, scale, aside=aside), None
    for i, step in enumerate(more):
        gram = _times(_times(gram, near, aside, 1.0 if scale is None or i else scale), near, aside, 1.0)
        after = _polynomial(gram, step, None)
        if factor is None:
            factor = symmetric(near, after, after if aside else None, root, aside * root)
        else:
            factor = symmetric(factor, after)
        near, aside = after, 0.0
    return factor


def _times(x: Tensor, near: Tensor, aside: float, times: float | Tensor) -> Tensor:
    """times x (near + aside I)."""
    return symmetric(x, near, x if aside else None, times, aside * times)


def _polynomial(gram: Tensor, step: tuple[float, ...], scale: Tensor | None, times: float | Tensor = 1.0, aside: float = 0.0) -> Tensor:
    """`times` the polynomial of a step over s, with R = scale `gram` in the place of s^2, less `aside` times I."""
    s = 1.0 if scale is None else scale
    if len(step) == 3:
        a, b, c = step
        return symmetric(gram, None, gram, c * s * s * times, b * s * times, (a - aside) * times)
    last, half = step[4], step[3] / (2 * step[4])
    square = step[2] - last * half * half  # of R^2, beside what H^2 has of it
    if not aside:  # a constant in H brings it, too
        constant = square / (2 * last)
        squared = symmetric(gram, None, gram, s * s, half * s, constant)
        linear, rest = step[1] - half * square, step[0] - constant * constant * last
        return symmetric(squared, None, gram, last * times, linear * s * times, rest * times)
    squared = symmetric(gram, None, gram, s * s, half * s)
    linear = (step[1] - half * square) * s
    beside = gram * (linear[:, None, None].to(gram.dtype) if isinstance(linear, Tensor) else linear) + square * squared
    return symmetric(squared, None, beside, last, 1.0, step[0] - aside)
