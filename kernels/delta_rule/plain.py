"""The delta rule in plain torch, of which the backward pass keeps the inputs only: the (chunk, chunk) matrices of all heads are larger.

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
from kernels.delta_rule import reference

LARGEST = 1e18  # of a query or key: squares of larger ones may leave fp32


def _run(
    tensors: tuple[Tensor | None, ...], starts: Tensor | None, normalize: bool, scale: float, gradients: tuple[Tensor, ...] = ()
) -> tuple[Tensor, Tensor]:
    q, k, v, beta, g, h0 = tensors
    assert q is not None and k is not None and v is not None and beta is not None
    if starts is not None and dispatch.is_eager(q) and not q.is_meta:
        others = (t for t in (v, beta, h0, *gradients) if t is not None)
        gates = g is None or bool((g < torch.inf).all())  # minus infinity is a gate; NaN is not
        products = all(bool((t.abs() < LARGEST).all()) for t in (q, k))
        if not (gates and products and all(bool(torch.isfinite(t).all()) for t in others)):
            return reference.delta_rule_loop(q, k, v, beta, g, h0, starts, normalize, scale)
    return reference.delta_rule_chunked(q, k, v, beta, g, h0, starts, normalize, scale)


class _Rule(torch.autograd.Function):
    """q, k, v, beta, g, h0 and the starts as of `kernels.delta_rule.delta_rule`."""

    @staticmethod
    def forward(ctx: Any, normalize: bool, scale: float, starts: Tensor | None, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(starts, *tensors)
        ctx.settings = (normalize, scale)
        return _run(tensors, starts, normalize, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        starts, *saved = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3:]
        leaves = tuple(None if t is None else t.detach().requires_grad_(want) for t, want in zip(saved, wanted))
        with torch.enable_grad(), torch.autocast(saved[0].device.type, enabled=False):
            normalize, scale = ctx.settings
            results = _run(leaves, starts, normalize, scale, gradients)
            inputs = [t for t, want in zip(leaves, wanted) if t is not None and want]
            count = 1 + results[1].requires_grad  # a state knows nothing of queries
            made = iter(torch.autograd.grad(results[:count], inputs, gradients[:count], allow_unused=True))
        return None, None, None, *(next(made) if want else None for want in wanted)


def rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, h0: Tensor | None, starts: Tensor | None, normalize: bool, scale: float
) -> tuple[Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        if not torch.is_grad_enabled():
            return _run((q, k, v, beta, g, h0), starts, normalize, scale)
        if dispatch.is_eager(q):
            return _Rule.apply(normalize, scale, starts, q, k, v, beta, g, h0)
        arguments = (q, k, v, beta, g, h0, starts, normalize, scale)  # what traces cannot read a backward pass that calls autograd
        return checkpoint(reference.delta_rule_chunked, *arguments, use_reentrant=False, preserve_rng_state=False)
