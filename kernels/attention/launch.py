"""Runs the kernels of `triton.py`; imports Triton only when a kernel is first wanted.

Legend: B batch, T queries, L keys, H heads, G heads of keys and values, K head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from kernels.dispatch import interpreted

WIDTHS = (64, 128, 256)  # of heads; others are filled up: products of 16 bits with blocks of 16 and 32 were wrong on an H100
RUN = 16  # elements; strides are multiples of it, so that loads are wide and asynchronous


@dataclass(frozen=True)
class Blocks:
    """Queries and keys of a block, warps of a program, and how many blocks are on their way at once."""

    M: int
    N: int
    warps: int
    stages: int


# the fastest of a sweep on an H100, by packed rows of 2,048 tokens in bf16; 256 was not swept
FORWARD = {64: Blocks(128, 64, 8, 3), 128: Blocks(64, 64, 4, 3), 256: Blocks(128, 64, 8, 2)}
QUERIES = {64: Blocks(64, 64, 4, 2), 128: Blocks(64, 64, 4, 2), 256: Blocks(64, 64, 8, 2)}
KEYS = {64: Blocks(64, 64, 4, 3), 128: Blocks(64, 64, 4, 2), 256: Blocks(64, 64, 8, 1)}
MEND = Blocks(64, 64, 4, 1)  # of programs that run when something is not finite
SMALL = Blocks(16, 16, 4, 1)


def kernels() -> ModuleType:
    from kernels.attention import triton

    return triton


def blocks_of(table: dict[int, Blocks], width: int) -> Blocks:
    return SMALL if interpreted() else table[width]


def strides_of(x: Tensor) -> tuple[int, ...]:
    """Those of batch, heads and time; of a single one 0, which is a multiple of whatever is asked."""
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape[:3], x.stride()[:3]))


def ready(x: Tensor) -> Tensor:
    """A head's elements beside each other, rows at multiples of 16 bytes."""
    dense = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and not any(stride % RUN for stride in strides_of(x))
    return x if dense else x.clone(memory_format=torch.contiguous_format)


def time_first(size: tuple[int, ...], like: Tensor) -> Tensor:
    """(B, H, T, K), the heads of a token beside each other in memory: what projections make and take."""
    B, H, T, K = size
    return like.new_empty(B, T, H, K).transpose(1, 2)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def forward(q: Tensor, k: Tensor, v: Tensor, first_BL: Tensor | None, window: int, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = ready(q), ready(k), ready(v)
    (B, H, T, K), (_, G, L, _) = q.shape, k.shape
    size, mend, module = blocks_of(FORWARD, K), blocks_of({K: MEND}, K), kernels()
    y, lse = time_first(q.shape, q), torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    blocks = _cdiv(T, size.M)
    marks = torch.empty(B * H, blocks, dtype=torch.int32, device=q.device)
    arguments = (
        q, k, v, lse if first_BL is None else first_BL, y, lse, marks, scale * math.log2(math.e), T, L, H, blocks, window,
        *strides_of(q), *strides_of(k), *strides_of(v),
    )  # fmt: skip
    options = {"R": H // G, "W": K, "DOCUMENTS": first_BL is not None, "WINDOW": window > 0}
    module.attention_forward[(blocks * B * H,)](*arguments, M=size.M, N=size.N, num_warps=size.warps, num_stages=size.stages, **options)
    module.attention_forward_mend[(B * H,)](*arguments, M=mend.M, N=mend.N, num_warps=mend.warps, num_stages=mend.stages, **options)
    return y, lse


def backward(
    d: Tensor, q: Tensor, k: Tensor, v: Tensor, first_BL: Tensor | None, last_BL: Tensor | None, y: Tensor, lse: Tensor, window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    d, q, k, v = ready(d), ready(q), ready(k), ready(v)
    (B, H, T, K), (_, G, L, _) = q.shape, k.shape
    size, keys, mend, module = blocks_of(QUERIES, K), blocks_of(KEYS, K), blocks_of({K: MEND}, K), kernels()
    delta, blocks = torch.empty_like(lse), _cdiv(T, size.M)
    marks = torch.empty(B * H, blocks, dtype=torch.int32, device=q.device)
    dq, dk, dv = time_first(q.shape, q), time_first(k.shape, k), time_first(v.shape, v)
    strides = (*strides_of(q), *strides_of(k), *strides_of(v), *strides_of(d))
    c, documents = scale * math.log2(math.e), first_BL is not None
    options = {"R": H // G, "W": K, "DOCUMENTS": documents, "WINDOW": window > 0}
    slow = {"M": mend.M, "N": mend.N, "num_warps": mend.warps, "num_stages": mend.stages, **options}
    begin, end = first_BL if documents else lse, last_BL if documents else lse
    of_queries = (q, k, v, begin, y, d, lse, delta, dq, marks, c, scale, T, L, H, blocks, window, *strides)
    module.attention_query_gradients[(blocks * B * H,)](
        *of_queries, M=size.M, N=size.N, num_warps=size.warps, num_stages=size.stages, **options
    )
    of_keys = (q, k, v, end, d, lse, delta, dk, dv)
    module.attention_key_gradients[(_cdiv(L, keys.N) * B * G,)](
        *of_keys, c, scale, T, L, H, window, *strides, M=keys.M, N=keys.N, num_warps=keys.warps, num_stages=keys.stages, **options
    )
    module.attention_query_mend[(B * H,)](*of_queries, **slow)
    module.attention_key_mend[(B * G,)](*of_keys, marks, c, scale, T, L, H, blocks, window, *strides, **slow)
    return dq, dk, dv
