"""The scan in plain torch, of which the backward pass keeps the inputs only: the (chunk, chunk) matrices of all heads are many times larger.

The chunked form is made of matrix products, in which zero times NaN is NaN. So where documents are packed and something is not finite, the
recurrence is taken step by step, which keeps it in its document.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from kernels import dispatch
from kernels.ssd import reference


def _run(
    tensors: tuple[Tensor | None, ...], starts: Tensor | None, chunk: int, gradients: tuple[Tensor, ...] = ()
) -> tuple[Tensor, Tensor]:
    x, dt, A, Bm, Cm, h0, D = tensors
    assert x is not None and dt is not None and A is not None and Bm is not None and Cm is not None
    if starts is not None and dispatch.is_eager(x) and not x.is_meta:
        if not all(bool(torch.isfinite(t).all()) for t in (*tensors, *gradients) if t is not None):
            return reference.ssd_loop(x, dt, A, Bm, Cm, h0, starts, D)
    return reference.ssd_chunked(x, dt, A, Bm, Cm, h0, starts, chunk, D)


class _Scan(torch.autograd.Function):
    """x, dt, A, B, C, h0, D and the starts as of `kernels.ssd.ssd`."""

    @staticmethod
    def forward(ctx: Any, chunk: int, starts: Tensor | None, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(starts, *tensors)
        ctx.chunk = chunk
        return _run(tensors, starts, chunk)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        starts, *saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:]
        leaves = tuple(None if t is None else t.detach().requires_grad_(want) for t, want in zip(saved, needed))
        with torch.enable_grad(), torch.autocast(saved[0].device.type, enabled=False):
            results = _run(leaves, starts, ctx.chunk, gradients)
            inputs = [t for t, want in zip(leaves, needed) if t is not None and want]
            computed = iter(torch.autograd.grad(results, inputs, gradients, allow_unused=True))
        return None, None, *(next(computed) if want else None for want in needed)


def scan(
    x: Tensor, dt: Tensor, A: Tensor, Bm: Tensor, Cm: Tensor, h0: Tensor | None, starts: Tensor | None, chunk: int, D: Tensor | None
) -> tuple[Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        if not torch.is_grad_enabled():
            return _run((x, dt, A, Bm, Cm, h0, D), starts, chunk)
        if dispatch.is_eager(x):
            return _Scan.apply(chunk, starts, x, dt, A, Bm, Cm, h0, D)
        arguments = (x, dt, A, Bm, Cm, h0, starts, chunk, D)  # torch.compile cannot trace a backward pass that calls autograd itself
        return checkpoint(reference.ssd_chunked, *arguments, use_reentrant=False, preserve_rng_state=False)
