"""Chunked SSD against the recurrence in float64."""

from __future__ import annotations

import pytest
import torch

from kernels.ssd import ssd
from kernels.ssd.reference import ssd_sequential


@pytest.mark.parametrize("T,chunk", [(1, 4), (7, 3), (33, 8), (64, 64), (65, 16)])
@pytest.mark.parametrize("with_starts", [False, True])
def test_values_and_gradients(T: int, chunk: int, with_starts: bool) -> None:
    B, H, P, G, N = 2, 4, 3, 2, 5
    generator = torch.Generator().manual_seed(T)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = [draw(B, T, H, P), draw(B, T, H).exp() * 0.3, -draw(H).exp(), draw(B, T, G, N), draw(B, T, G, N), draw(B, H, P, N)]
    starts = torch.rand(B, T, generator=generator) < 0.15 if with_starts else None
    results = []
    for op in (ssd_sequential, lambda *a: ssd(*a, chunk=chunk)):
        leaves = [t.clone().requires_grad_() for t in tensors]
        y, final = op(*(*leaves, starts))
        loss = (y * torch.sin(torch.arange(y.numel()).view_as(y))).sum() + final.square().sum()
        results.append((y, final, torch.autograd.grad(loss, leaves)))
    for a, b in ((results[1][0], results[0][0]), (results[1][1], results[0][1]), *zip(results[1][2], results[0][2])):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_large_steps_do_not_overflow() -> None:
    x = torch.randn(1, 40, 2, 3)
    y, h = ssd(x, torch.full((1, 40, 2), 50.0), torch.tensor([-16.0, -16.0]), torch.randn(1, 40, 1, 4), torch.randn(1, 40, 1, 4), chunk=16)
    assert torch.isfinite(y).all() and torch.isfinite(h).all()
