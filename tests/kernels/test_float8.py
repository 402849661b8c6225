"""Products in 8-bit floats against float64, within what their rounding may lose; what is kept, for how long; and which products are taken so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels.float8 import E4M3, E5M2, quantised
from kernels.float8.reference import quantised as of_torch
from kernels.linear import float8, linears, reference


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    yield
    float8.wanted, float8.step = False, 0


def layers_of(widths: tuple[int, ...], D: int, bias: bool, device: str = "cpu") -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(D, n, bias=bias, device=device) for n in widths]


def joined(x: Tensor, layers: list[nn.Linear], dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    biases = [layer.bias for layer in layers if layer.bias is not None]
    made = float8.Joined8.apply(x, dtype, len(layers), *(layer.weight for layer in layers), *biases)
    return made if isinstance(made, tuple) else (made,)


def watch_casts(monkeypatch: pytest.MonkeyPatch, see: Callable[[Tensor], None]) -> None:
    """Shows the first piece of every cast from now on to `see`."""
    run = float8.quantised

    def watched(pieces: Sequence[Tensor], *arguments: Any, **options: Any) -> Any:
        see(pieces[0])
        return run(pieces, *arguments, **options)

    monkeypatch.setattr(float8, "quantised", watched)


def may_lose(x: Tensor, dtype: torch.dtype) -> Tensor:
    """At most what rounding to the nearest number of `dtype` takes from each element, fp64: half of a last digit, or of the smallest number."""
    info = torch.finfo(dtype)
    step = float(x.abs().max()) / info.max
    return torch.maximum(x.double().abs() * info.eps / 2, torch.tensor(step * info.smallest_normal * info.eps / 2)) * (1 + 1e-5)


def may_be_off(a: Tensor, b: Tensor, kinds: tuple[torch.dtype, torch.dtype], eps: float) -> Tensor:
    """The bound of a b^T (M, N) with a and b rounded, and the product rounded once more."""
    lost_a, lost_b, a, b = may_lose(a, kinds[0]), may_lose(b, kinds[1]), a.double(), b.double()
    off = a.abs() @ lost_b.T + lost_a @ b.abs().T + lost_a @ lost_b.T
    return off + eps * ((a @ b.T).abs() + off) + 1e-5 * (a.abs() @ b.abs().T)


@pytest.mark.parametrize("widths,bias", [((32, 16), False), ((48,), True)])
@pytest.mark.parametrize("size", [1.0, 1e-6, 1e4])
def test_products_are_within_what_rounding_may_lose(widths: tuple[int, ...], bias: bool, size: float) -> None:
    layers = layers_of(widths, 64, bias)
    x = (size * torch.randn(2, 16, 64) * 10 ** torch.randn(64)).requires_grad_()
    made = joined(x, layers)
    d = [0.01 * torch.randn_like(y) for y in made]
    d_x, *d_weights = torch.autograd.grad(made, [x, *(layer.weight for layer in layers)], d)
    flat, d_MN, weight = x.detach().flatten(0, 1), torch.cat(d, -1).flatten(0, 1), torch.cat([layer.weight.detach() for layer in layers])
    bias_N = torch.cat([layer.bias.detach() for layer in layers]) if bias else torch.zeros(sum(widths))
    half = torch.finfo(torch.bfloat16).eps
    y, exact = torch.cat(made, -1).flatten(0, 1), flat.double() @ weight.double().T + bias_N
    assert y.dtype == torch.bfloat16 and ((y - exact).abs() <= may_be_off(flat, weight, (E4M3, E4M3), half) + 2 * half * bias_N.abs()).all()
    off = (d_x.flatten(0, 1) - d_MN.double() @ weight.double()).abs()
    assert d_x.dtype == torch.float32 and (off <= may_be_off(d_MN, weight.T, (E5M2, E4M3), half)).all()
    off = (torch.cat(d_weights) - d_MN.T.double() @ flat.double()).abs()
    assert d_weights[0].dtype == torch.float32 and (off <= may_be_off(d_MN.T, flat.T, (E5M2, E4M3), 1e-6)).all()
    assert float(off.max()) > 0, "it is rounded"


def test_gradients_of_biases_and_of_outputs_that_nobody_reads() -> None:
    layers, x = layers_of((16, 32), 64, True), torch.randn(16, 64, requires_grad=True)
    d = torch.randn(16, 32, dtype=torch.bfloat16)
    leaves = [layers[0].weight, layers[1].weight, layers[0].bias, layers[1].bias]
    first, second, first_bias, second_bias = torch.autograd.grad(joined(x, layers)[1], leaves, d)
    assert not first.any() and not first_bias.any() and second.any()
    torch.testing.assert_close(second_bias, d.float().sum(0))


def test_one_scale_for_all_pieces_and_what_is_not_finite_does_not_count() -> None:
    pieces = [torch.tensor([[1.0, -2.0]]), torch.tensor([[896.0, torch.inf], [torch.nan, 0.0]])]
    made = quantised(pieces, E4M3)
    assert made.step == 2.0 and made.rows.float()[:2, 0].tolist() == [0.5, 448.0] and made.rows.float()[2, 1] == 0
    assert made.rows.float().isnan().tolist() == [[False, False], [False, True], [True, False]]
    assert torch.equal(made.columns.float().nan_to_num(7.0), made.rows.float().T.nan_to_num(7.0)) and made.columns.is_contiguous()
    beside = quantised([torch.ones(2, 3), 2 * torch.ones(2, 1)], E5M2, beside=True)
    assert beside.rows.shape == (2, 4) and (beside.rows.float() * beside.step)[0].tolist() == [1, 1, 1, 2]
    assert not quantised([torch.zeros(2, 2)], E4M3).rows.float().any()


def test_weights_are_cast_once_a_step_into_the_same_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    (layer,), x = layers_of((16,), 64, False), torch.randn(16, 64)
    calls: list[tuple[int, ...]] = []
    watch_casts(monkeypatch, lambda piece: calls.append(tuple(piece.shape)))
    joined(x, [layer]), joined(x.clone(), [layer])
    assert calls.count((16, 64)) == 4, "without a step, at every use: two of x, two of the weight"
    calls.clear()
    float8.begin_step(1)
    first = joined(x, [layer])[0]
    kept = layer.weight._float8[1].rows
    assert torch.equal(joined(x, [layer])[0], first) and len(calls) == 1, "x, kept from above, and once the weight"
    with torch.no_grad():
        layer.weight.data.mul_(-2)  # as optimizers do: torch counts no version
    float8.begin_step(2)
    assert torch.equal(joined(x, [layer])[0], -2 * first) and layer.weight._float8[1].rows is kept
    x += 1
    assert not torch.equal(joined(x, [layer])[0], -2 * first), "an input that was written over is cast again"


def test_small_and_odd_products_stay_as_they_were() -> None:
    big, small, odd = layers_of((512,), 512, False), layers_of((256, 128), 512, False), layers_of((520,), 512, False)
    x = torch.randn(2, 16, 512)
    assert not float8.suits(x, big)
    float8.wanted = True
    assert float8.suits(x, big) and float8.suits(x, layers_of((256, 256), 512, False))
    assert not float8.suits(x, small) and not float8.suits(x, odd) and not float8.suits(x[:, :5], big) and not float8.suits(x[:0], big)
    assert "need a GPU" in float8.why_not(torch.device("cpu"))
    assert torch.equal(linears(x, *big)[0], big[0](x)), "on a CPU torch's own"


@pytest.mark.parametrize("remade", [(), ("mlp", "mixer"), ("layer",)])
def test_a_whole_model_has_the_gradients_of_bf16_up_to_rounding(remade: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where layers are computed again, and over two micro-batches of a step."""
    import kernels.linear
    from models.config import ModelConfig
    from models.lm import LanguageModel

    monkeypatch.setattr(kernels.linear, "joins", lambda x, layers: torch.is_grad_enabled())
    monkeypatch.setattr(float8, "SMALLEST", 32)
    mixers = {"a": {"type": "attention", "n_heads": 2}, "m": {"type": "mamba2", "head_dim": 16, "d_state": 16}}
    model = LanguageModel(ModelConfig(vocab_size=64, d_model=64, n_layers=2, pattern=["a", "m"], mixers=mixers, d_ff=96))
    model.init_weights(0)
    for block in model.blocks:
        block.remade = frozenset(remade)
    calls: list[Tensor] = []
    watch_casts(monkeypatch, calls.append)
    ids, found = torch.randint(64, (2, 16)), []
    for wanted in (False, True):
        float8.wanted, float8.step = wanted, int(wanted)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(2):
                model(ids, labels=ids).loss_sum.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    weights = {p.data_ptr() for p in model.parameters()}
    cast = [t.data_ptr() for t in calls if t.data_ptr() in weights]
    assert len(cast) == len(set(cast)) >= 4, "each once, and most of them"
    for a, b in zip(*found):
        assert (a - b).norm() < 0.2 * a.norm() + 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("widths,bias,rows", [((1024, 1024), False, 512), ((512,), True, 333 * 16), ((2816, 2816), False, 2048)])
def test_on_a_gpu(widths: tuple[int, ...], bias: bool, rows: int) -> None:
    if float8.why_not(torch.device("cuda")):
        pytest.skip("needs a GPU with 8-bit floats")
    float8.wanted = True
    layers, x = layers_of(widths, 1024, bias, "cuda"), torch.randn(rows, 1024, device="cuda", requires_grad=True)
    for dtype in (E4M3, E5M2):
        for pieces, beside in (
            ([x.detach()], False),
            ([x.detach()[:, 1:300], x.detach().half()], True),
            ([layers[0].weight, 3 * x.detach()], False),
            ([x.detach().bfloat16()[:, 8:264], x.detach().bfloat16()[:, 264:]], True),
            ([x.detach() * 10 ** (2 * torch.randn(1024, device="cuda"))], False),
        ):
            found = quantised([p.detach() for p in pieces], dtype, beside)
            torchs8 = of_torch([p.detach().cpu() for p in pieces], dtype, beside)
            for own, exact in zip(found[:2], (torchs8[0], torchs8[0].T)):
                assert torch.equal(own.cpu().view(torch.uint8), exact.contiguous().view(torch.uint8)), "to the bit what torch makes of it"
            x8, step = torch.cat([p.detach().float() for p in pieces], 1 if beside else 0), found.step
            torch.testing.assert_close(step, x8.abs().max() / torch.finfo(dtype).max)
            assert ((found.rows.float() * step - x8).abs() <= may_lose(x8, dtype)).all()
            assert torch.equal(found.columns.float(), found.rows.float().T)
    bad = x.detach().clone()
    bad[3, 5] = torch.nan
    assert quantised([bad], E4M3).rows.float().isnan().nonzero().tolist() == [[3, 5]]
    with torch.autocast("cuda", torch.bfloat16):
        ours, torchs = linears(x, *layers), reference.linears(x, *layers)
    assert ours[0].dtype == torch.bfloat16 and "Joined8" in type(ours[0].grad_fn).__name__
    d = [torch.randn_like(y) for y in torchs]
    leaves = [x, *(p for layer in layers for p in layer.parameters())]
    found, wanted = torch.autograd.grad(ours, leaves, d), torch.autograd.grad(torchs, leaves, d)
    for a, b in zip((*ours, *found), (*torchs, *wanted)):
        assert a.shape == b.shape and (a - b).norm() < 0.12 * b.norm()
