"""The gradient of a table in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def table_gradient(d_ND: Tensor, ids_N: Tensor, rows: int) -> Tensor:
    """(rows, D) in fp32 (fp64): the sum of d over the tokens of each id."""
    wide_ND = d_ND.to(torch.promote_types(d_ND.dtype, torch.float32))
    return wide_ND.new_zeros(rows, d_ND.shape[1]).index_add_(0, ids_N.long(), wide_ND)
