"""symmetric: products that are symmetric, of which one half is computed and stored twice. Most of Newton and Schulz's iteration are such.

Legend: k matrices, m rows, n columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dispatch import no_triton
from kernels.symmetric.sizes import DEPTH, TILE


def use_triton(x_kmn: Tensor) -> bool:
    """Whether the kernel takes this: 16 bits, whole tiles, and enough of them that half is less."""
    m, n = x_kmn.shape[1:]
    whole = m % TILE == 0 and n % DEPTH == 0 and m > TILE
    return whole and x_kmn.dtype in (torch.bfloat16, torch.float16) and x_kmn.numel() > 0 and not no_triton(x_kmn.device)


def symmetric(
    x_kmn: Tensor,
    y_kmn: Tensor | None = None,
    add_kmm: Tensor | None = None,
    alpha: float | Tensor = 1.0,
    beta: float | Tensor = 0.0,
    diagonal: float | Tensor = 0.0,
) -> Tensor:
    """(k, m, m): alpha x y^T + beta add + diagonal I, which has to be symmetric, as with y = x (None) or for two symmetric matrices that commute. Sums
    in fp32 (fp64), the result in x's dtype; x and y may be transposed views of one layout. Each of the three numbers may be one for each matrix, (k,)."""
    y_kmn = x_kmn if y_kmn is None else y_kmn
    if use_triton(x_kmn):
        from kernels.symmetric import triton

        with torch.cuda.device_of(x_kmn):
            return triton.symmetric(x_kmn, y_kmn, add_kmm, alpha, beta, diagonal)
    wide = torch.promote_types(x_kmn.dtype, torch.float32)
    if any(isinstance(number, Tensor) for number in (alpha, beta, diagonal)):
        each = [n.to(wide)[:, None, None] if isinstance(n, Tensor) else n for n in (alpha, beta, diagonal)]
        product = torch.bmm(x_kmn, y_kmn.mT).to(wide) * each[0]
        if add_kmm is not None:
            product += add_kmm * each[1]
        product.diagonal(dim1=1, dim2=2).add_(each[2][:, :, 0] if isinstance(each[2], Tensor) else each[2])
        return product.to(x_kmn.dtype)
    if add_kmm is None:
        product = torch.bmm(x_kmn, y_kmn.mT)
        product = product if alpha == 1.0 else product.mul_(alpha)
    else:
        product = torch.baddbmm(add_kmm, x_kmn, y_kmn.mT, beta=beta, alpha=alpha)
    if diagonal:
        product.diagonal(dim1=1, dim2=2).add_(diagonal)
    return product
