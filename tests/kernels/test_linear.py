"""Joined matrix products against torch's own under autocast and against float64; what may be joined and what may not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kernels.linear import joins, linears, op, reference


def projections(widths: tuple[int, ...], bias: bool, D: int = 24) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(D, n, bias=bias) for n in widths]


def joined(x: Tensor, layers: list[nn.Linear], apart: int = 0) -> tuple[Tensor, ...]:
    biases = [layer.bias for layer in layers if layer.bias is not None]
    made = op.Joined.apply(x, torch.bfloat16, len(layers), apart, *(layer.weight for layer in layers), *biases)
    return made if isinstance(made, tuple) else (made,)


@pytest.mark.parametrize(
    "widths,bias,apart",
    [((16, 8, 8), True, 0), ((16, 8, 8), True, 1), ((16, 8, 8), False, 2), ((5,), False, 0), ((7, 7), False, 0), ((3, 9), True, 0)],
)
def test_outputs_are_autocasts_and_weight_gradients_nearer_to_the_truth(widths: tuple[int, ...], bias: bool, apart: int) -> None:
    layers = projections(widths, bias)
    x = torch.randn(3, 11, 24, requires_grad=True)
    leaves = [x, *(p for layer in layers for p in layer.parameters())]
    ours = joined(x, layers, apart)
    assert len({y.untyped_storage().data_ptr() for y in ours}) == 1 + bool(apart)
    with torch.autocast("cpu", torch.bfloat16):
        torchs = reference.linears(x, *layers)
    assert all(torch.equal(a, b) for a, b in zip(ours, torchs))
    cotangents = [torch.randn_like(y) for y in torchs]
    found, autocasts = (torch.autograd.grad(y, leaves, cotangents) for y in (ours, torchs))
    exact = torch.autograd.grad([y.double() for y in reference.linears(x, *layers)], leaves, [c.double() for c in cotangents])
    for one, other, truth in zip(found, autocasts, exact):
        assert one.dtype == truth.dtype and (one - truth).norm() <= 1.1 * (other - truth).norm() + 1e-6 * truth.norm()


def test_neighbouring_gradients_are_one_product_and_others_are_added() -> None:
    layers, x = projections((16, 8, 8), False), torch.randn(5, 24, requires_grad=True)
    whole = torch.randn(5, 32, dtype=torch.bfloat16)
    beside = list(whole.split([16, 8, 8], -1))
    assert [(a, b, tuple(t.shape)) for a, b, t in op.runs(beside)] == [(0, 3, (5, 32))]
    assert [(a, b) for a, b, _ in op.runs([beside[0], beside[1].clone(), beside[2]])] == [(0, 1), (1, 2), (2, 3)]
    assert [(a, b) for a, b, _ in op.runs([beside[1], beside[0], beside[2]])] == [(0, 1), (1, 2), (2, 3)]
    tall = torch.randn(10, 16, dtype=torch.bfloat16)
    assert len(op.runs([tall[:5], tall[5:]])) == 2  # rows of one tensor, one after the other, are no columns
    weights = [layer.weight for layer in layers]
    one = torch.autograd.grad(joined(x, layers), [x, *weights], beside)
    other = torch.autograd.grad(joined(x, layers), [x, *weights], [b.clone() for b in beside])
    for a, b in zip(one, other):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_heads_of_a_product_have_its_gradients_and_that_of_the_input_lies_as_the_input() -> None:
    x, weight = (
        torch.randn(7, 3, 4, dtype=torch.bfloat16, requires_grad=True),
        torch.randn(3, 4, 6, dtype=torch.bfloat16, requires_grad=True),
    )
    ours, torchs = op.OfHeads.apply(x, weight), torch.bmm(x.transpose(0, 1), weight)
    assert torch.equal(ours, torchs)
    d = torch.randn_like(torchs)
    found, wanted = (torch.autograd.grad(y, (x, weight), d) for y in (ours, torchs))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted)) and found[0].is_contiguous()


def test_an_output_without_a_gradient_adds_none() -> None:
    layers, x = projections((4, 6), False), torch.randn(5, 24, requires_grad=True)
    d = torch.randn(5, 6, dtype=torch.bfloat16)
    d_x, first, second = torch.autograd.grad(joined(x, layers)[1], [x, *(layer.weight for layer in layers)], d)
    assert not first.any() and second.any()
    torch.testing.assert_close(d_x, (d @ layers[1].weight.bfloat16()).float())


def test_differentiating_twice_is_refused() -> None:
    layers, x = projections((4,), False), torch.randn(5, 24, requires_grad=True)
    (d_x,) = torch.autograd.grad(joined(x, layers)[0].float().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        d_x.sum().backward()


def test_sums_over_chunks_are_the_products_own() -> None:
    total, d, x = torch.randn(6, 24), torch.randn(5, 6), torch.randn(5, 24)
    wanted = total + d.T @ x
    assert op.add_product(total, d, x) is total
    torch.testing.assert_close(total, wanted)


def test_on_a_cpu_each_layer_is_torchs_own() -> None:
    layers, x = projections((4, 6), True), torch.randn(5, 24)
    assert not joins(x, layers)
    for y, layer in zip(linears(x, *layers), layers):
        assert torch.equal(y, layer(x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("widths,bias", [((1024, 1024), False), ((40, 24), True), ((2816, 2816), False)])
def test_on_a_gpu(widths: tuple[int, ...], bias: bool) -> None:
    layers = [layer.cuda() for layer in projections(widths, bias, 256)]
    x = torch.randn(2, 333, 256, device="cuda", requires_grad=True)
    leaves = [x, *(p for layer in layers for p in layer.parameters())]
    with torch.autocast("cuda", torch.bfloat16):
        assert joins(x, layers)
        ours, torchs = linears(x, *layers), reference.linears(x, *layers)
    cotangents = [torch.randn_like(y) for y in torchs]
    found, autocasts = (torch.autograd.grad(y, leaves, cotangents) for y in (ours, torchs))
    for one, other in zip(found, autocasts):
        assert (one - other).norm() <= 1e-2 * other.norm()
    d = cotangents[0].double().flatten(0, -2)
    truth = d.T @ x.detach().bfloat16().double().flatten(0, -2)
    assert (found[1].double() - truth).norm() <= 1e-4 * truth.norm()
