"""Sizes of Mamba-2's steps: written-out gradients against autograd's, and the kernels on a GPU against float64."""

from __future__ import annotations

import math

import pytest
import torch

from kernels.step_sizes import op, reference, step_sizes


@pytest.mark.parametrize("low,high", [(0.0, math.inf), (0.4, 1.2)])
def test_gradients_are_autograds(low: float, high: float) -> None:
    torch.manual_seed(0)
    dt, bias = torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True), torch.randn(5, dtype=torch.float64, requires_grad=True)
    y, d = reference.step_sizes(dt, bias, low, high), torch.randn(2, 7, 5, dtype=torch.float64)
    for found, wanted in zip(reference.step_sizes_backward(d, dt, bias, low, high), torch.autograd.grad(y, (dt, bias), d)):
        torch.testing.assert_close(found, wanted)
    torch.library.opcheck(op.make_op, (dt, bias, low, high), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 131, 32), (3, 77, 33), (16, 2048, 32), (1, 5000, 300)], ids=str)
@pytest.mark.parametrize("low,high", [(0.0, math.inf), (0.1, 1.5)])
def test_kernels(dtype: torch.dtype, sizes: tuple[int, int, int], low: float, high: float) -> None:
    """Columns of a wider tensor; the bias's gradient, a sum over all rows, too, and the same bits again."""
    torch.manual_seed(0)
    B, T, H = sizes
    wide = (3 * torch.randn(B, T, 2 * H + 5, device="cuda")).to(dtype).requires_grad_()
    bias, d = torch.randn(H, device="cuda", requires_grad=True), torch.randn(B, T, H, device="cuda")
    fine = [wide.detach().double().requires_grad_(), bias.detach().double().requires_grad_()]
    oracle = reference.step_sizes(fine[0][..., 4 : 4 + H], fine[1], low, high)
    y = step_sizes(wide[..., 4 : 4 + H], bias, low, high)
    assert y.dtype == torch.float32 and (y - oracle).abs().max() <= 1e-5 * oracle.abs().max()
    found = torch.autograd.grad(y, (wide, bias), d, retain_graph=True)
    again = torch.autograd.grad(y, (wide, bias), d)
    assert all(torch.equal(a, b) for a, b in zip(found, again))
    for a, b in zip(found, torch.autograd.grad(oracle, fine, d.double())):
        assert (a - b).norm() <= (1e-4 if a.dtype == torch.float32 else 5e-3) * b.norm()
