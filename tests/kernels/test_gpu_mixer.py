"""The operations of whole layers but the recurrence on a GPU against float64, in the sizes and ways the interpreter is too slow for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.add_norm import add_norm
from kernels.add_norm import reference as add_norm_reference
from kernels.embedding import embedding
from kernels.gated_norm import gated_norm
from kernels.gated_norm import op as norm_op
from kernels.gated_norm import reference as norm_reference
from kernels.residual import reference as residual_reference
from kernels.residual import residual
from kernels.rotary import reference as rotary_reference
from kernels.rotary import rotary
from kernels.short_conv import joint_gradient, short_conv, short_conv_columns
from kernels.short_conv import op as conv_op
from kernels.short_conv import reference as conv_reference
from kernels.swiglu import reference as swiglu_reference
from kernels.swiglu import swiglu
from models import mixers

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
LIMITS = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def leaves(*sizes: tuple[int, ...], dtypes: list[torch.dtype]) -> list[Tensor]:
    return [torch.randn(s, device="cuda").to(d).requires_grad_() for s, d in zip(sizes, dtypes)]


def compare(y: Tensor, oracle: Tensor, given: list[Tensor], fine: list[Tensor], dtype: torch.dtype, roundings: float = 1.5) -> None:
    rounded = (oracle.to(dtype) - oracle).abs().max().item()
    assert (y - oracle).abs().max() <= (1e-5 * (1 + oracle.abs().max()) if dtype == torch.float32 else roundings * rounded)
    d = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, given, d), torch.autograd.grad(oracle, fine, d.double())):
        # a norm over one channel has gradients that are differences of equal numbers
        assert (a - b).norm() <= LIMITS[dtype] * (1e-3 + b.norm()) + 1e-6 * d.norm()


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("B", "T", "D", "W"), [(2, 1, 1, 4), (2, 2, 5, 4), (3, 131, 33, 3), (1, 515, 2048, 4), (2, 300, 384, 7)])
def test_convolution(dtype: torch.dtype, B: int, T: int, D: int, W: int) -> None:
    wide, history, weight, bias = leaves((B, T, 2 * D), (B, W - 1, D), (D, W), (D,), dtypes=[dtype, dtype, torch.float32, torch.float32])
    starts = torch.rand(B, T, device="cuda") < 0.1
    for reset, past, silu in ((starts, history, True), (None, None, True), (None, history, False), (starts, None, True)):
        given = [t for t in (wide, past, weight, bias) if t is not None]
        fine = [t.detach().double().requires_grad_() for t in given]
        x, *rest = fine if past is not None else [fine[0], None, *fine[1:]]
        compare(
            short_conv(wide[..., D:], past, weight, bias, reset, silu),
            conv_reference.short_conv(x[..., D:], *(*rest, reset, silu)),
            given,
            fine,
            dtype,
        )


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(
    ("shape", "groups"), [((2, 3, 1), 1), ((2, 77, 33), 1), ((5, 2048), 1), ((2, 9, 6144), 2), ((2, 3, 5, 64), 1), ((1, 3, 16384), 1)]
)
def test_norm(dtype: torch.dtype, shape: tuple[int, ...], groups: int) -> None:
    D = shape[-1]
    for gated, first in ((True, True), (True, False), (False, False)):
        h, wide, weight = leaves(shape, (*shape[:-1], 2 * D), (D,), dtypes=[dtype, dtype, torch.float32])
        given = [h, wide, weight] if gated else [h, weight]
        fine = [t.detach().double().requires_grad_() for t in given]
        z = fine[1][..., D:] if gated else None
        y = gated_norm(h, wide[..., D:] if gated else None, weight, 1e-5, groups, first)
        compare(y, norm_reference.gated_norm(fine[0], z, fine[-1], 1e-5, groups, first), given, fine, dtype)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shape", [(1,), (3, 77, 33), (2, 2048), (5, 100, 2816)])
def test_swiglu(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    given = leaves(shape, shape, dtypes=[dtype, dtype])
    fine = [t.detach().double().requires_grad_() for t in given]
    compare(swiglu(*given), swiglu_reference.swiglu(*fine), given, fine, dtype)


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("shape", [(1, 1), (2, 77, 33), (5, 2048), (3, 1500, 768)])
def test_residual(dtypes: tuple[torch.dtype, torch.dtype], shape: tuple[int, ...]) -> None:
    given = leaves(shape, shape, (shape[-1],), dtypes=[*dtypes, torch.float32])
    fine = [t.detach().double().requires_grad_() for t in given]
    y, oracle = residual(*given), residual_reference.residual(*fine)
    compare(y, oracle, given, fine, dtypes[1])
    assert y.dtype == dtypes[0]
    if y.dtype == torch.float32:  # which `compare` lets be as far off as the rounding of the sublayer's dtype
        assert (y - oracle).abs().max() <= 1e-6 * (1 + oracle.abs().max())
    d = torch.randn_like(y)
    one, two = (torch.autograd.grad(residual(*given), given, d) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two)), "not repeatable"


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("shape", [(1, 3), (2, 77, 33), (5, 2048), (3, 1500, 768)])
def test_add_norm(scaled: bool, dtypes: tuple[torch.dtype, torch.dtype], shape: tuple[int, ...]) -> None:
    D, other = shape[-1], dtypes[1]
    given = leaves(shape, shape, (D,), (D,), dtypes=[*dtypes, torch.float32, torch.float32])
    if not scaled:
        del given[2]
    fine = [t.detach().double().requires_grad_() for t in given]

    def whole(op: Any, x: torch.Tensor, y: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return torch.cat(op(x, y, rest[0] if scaled else None, rest[-1], 1e-5))

    roundings = 2.5 if dtypes[0] != torch.float32 else 1.5  # the norm is that of a rounded stream, and rounded itself
    y = whole(add_norm, *given)
    compare(y, whole(add_norm_reference.add_norm, *fine), given, fine, other, roundings)
    d = torch.randn_like(y)
    one, two = (torch.autograd.grad(whole(add_norm, *given), given, d) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two)), "not repeatable"


@pytest.mark.parametrize("shape", [(3, 77, 33), (2, 2048), (5, 100, 2816)])
def test_swiglu_of_halves(shape: tuple[int, ...]) -> None:
    whole = torch.randn(*shape[:-1], 2 * shape[-1], device="cuda", dtype=torch.bfloat16).requires_grad_()
    apart = [t.detach().contiguous().requires_grad_() for t in whole.chunk(2, -1)]
    y, wanted = swiglu(*whole.chunk(2, -1)), swiglu(*apart)
    assert torch.equal(y, wanted)
    d = torch.randn_like(y)
    assert torch.equal(torch.autograd.grad(y, whole, d)[0], torch.cat(torch.autograd.grad(wanted, apart, d), -1))


@pytest.mark.slow
def test_swiglu_past_the_range_of_32_bits() -> None:
    gate, up = (torch.zeros(2**31 + 100, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    gate[-50:], up[-50:] = 1.0, 2.0
    y = swiglu(gate, up)
    assert (y[-50:] == torch.tensor(2 * 0.7310586, dtype=torch.bfloat16)).all() and not y[:-50].any()


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(
    ("B", "T", "H", "G", "K"), [(1, 1, 1, 1, 2), (2, 77, 8, 2, 64), (3, 130, 9, 3, 80), (1, 2048, 8, 8, 128), (2, 5, 33, 1, 256)]
)
def test_rotary(dtype: torch.dtype, B: int, T: int, H: int, G: int, K: int) -> None:
    """Queries as columns of a projection, keys within a wider tensor. Angles are fp32's, the oracle's else exact."""
    given = leaves((B, T, H * K), (B, G, T, 2 * K), dtypes=[dtype, dtype])
    fine = [t.detach().double().requires_grad_() for t in given]
    positions = torch.arange(7, 7 + T, device="cuda")
    angle = (positions.float()[:, None] * rotary_reference.frequencies(K, 10000.0, positions.device)).double()

    def exactly(q: Tensor, k: Tensor, positions: Tensor, theta: float) -> list[Tensor]:
        (qa, qb), (ka, kb) = q.chunk(2, -1), k.chunk(2, -1)
        return [torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1) for a, b in ((qa, qb), (ka, kb))]

    def turned(turn: Any, tensors: list[Tensor]) -> Tensor:
        q, k = tensors[0].view(B, T, H, K).transpose(1, 2), tensors[1][..., :K]
        return torch.cat([x.flatten() for x in turn(q, k, positions, 10000.0)])

    compare(turned(rotary, given), turned(exactly, fine), given, fine, dtype)


def test_rotary_far_out_turns_as_plain_torch_does() -> None:
    """At positions of a million fp32's angle is a tenth of a radian off; the kernel's must be the one that the model was trained with."""
    q, k = (torch.randn(1, 2, 3, 128, device="cuda") for _ in range(2))
    positions = torch.tensor([1_000_003, 524_287, 100_001], device="cuda")
    for a, b in zip(rotary(q, k, positions, 10000.0), rotary_reference.rotary(q, k, positions, 10000.0)):
        torch.testing.assert_close(a, b, atol=3e-6, rtol=1e-5)


def test_split_projection_and_no_copy_of_the_gates_gradient() -> None:
    B, T, I = 2, 65, 48
    given = leaves((B, T, 2 * I), (I, 4), (I,), (I,), dtypes=[torch.float32] * 4)
    starts = torch.rand(B, T, device="cuda") < 0.1

    def chain(conv: Any, norm: Any, projected: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        joint = joint_gradient(projected)
        _, u, gate = conv(projected, 0, None, weight, bias, starts, True, joint)
        return norm(2 * u, gate, scale, 1e-5, norm_first=True, columns=(I, joint))

    fine = [t.detach().double().requires_grad_() for t in given]
    y = chain(short_conv_columns, gated_norm, *given)
    compare(y, chain(conv_reference.short_conv_columns, norm_reference.gated_norm, *fine), given, fine, torch.float32)
    d = torch.randn_like(y)
    with torch.profiler.profile(record_shapes=True) as record:
        torch.autograd.grad(chain(short_conv_columns, gated_norm, *given), given, d)
    assert not [e.key for e in record.key_averages(True) if e.key in ("aten::cat", "aten::copy_") and [B, T, I] in e.input_shapes]


@pytest.mark.parametrize("mapping", [{"type": "rnn"}, {"type": "rnn", "cell": "paralstm", "gate": False}, {"type": "mamba2"}], ids=str)
@pytest.mark.parametrize("low", [False, True])
def test_mixers_as_in_plain_torch(mapping: dict[str, Any], low: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    mixer = mixers.build(mapping, 128, 0)
    mixer.init_weights(0.1, 0)
    mixer.cuda()
    x = torch.randn(2, 70, 128, device="cuda", requires_grad=True)
    segments = (torch.rand(2, 70, device="cuda") < 0.05).cumsum(1)

    def step() -> list[Tensor]:
        with torch.autocast("cuda", torch.bfloat16, enabled=low):
            y = mixer(x, segment_ids=segments)[0]
        parts, state = [], mixer.init_state(2, "cuda")
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=low):
            for a, b in ((0, 1), (1, 3), (3, 40), (40, 70)):
                part, state = mixer(x[:, a:b], state, segments[:, a:b])
                parts.append(part)
        assert (torch.cat(parts, 1) - y).norm() <= (2e-2 if low else 1e-5) * y.norm()
        return [y, *torch.autograd.grad(y.float().square().sum(), (x, *mixer.parameters()))]

    ours = step()
    monkeypatch.setattr(conv_op, "use_triton", lambda x: False)
    monkeypatch.setattr(norm_op, "use_triton", lambda h, groups: False)
    for a, b in zip(ours, step()):
        assert (a.float() - b.float()).norm() <= (4e-2 if low else 2e-3) * (1e-3 + b.float().norm())


def test_repeatable_graph_capturable_and_compiled() -> None:
    given = leaves((2, 600, 512), (256, 4), (256,), (256,), dtypes=[torch.bfloat16, *[torch.float32] * 3])

    def chain(projected: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        joint = joint_gradient(projected)
        _, u, gate = short_conv_columns(projected, 0, None, weight, bias, None, True, joint)
        return gated_norm(u, gate, scale, 1e-5, norm_first=True, columns=(256, joint))

    first = [chain(*given), *torch.autograd.grad(chain(*given).sum(), given)]
    assert all(torch.equal(a, b) for a, b in zip(first, [chain(*given), *torch.autograd.grad(chain(*given).sum(), given)]))
    compiled = torch.compile(chain, fullgraph=True)
    for a, b in zip([compiled(*given), *torch.autograd.grad(compiled(*given).sum(), given)], first):
        assert torch.equal(a, b)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = chain(*given)
    graph.replay()
    assert torch.equal(captured, first[0])


def test_beyond_int32_elements(most_of_a_gpu: None) -> None:
    T, D = (1 << 20) + 64, 2112  # 2.2e9 elements
    x = torch.zeros(1, T, D, device="cuda", dtype=torch.bfloat16)
    x[:, -100:].normal_()
    weight, bias = torch.randn(D, 4, device="cuda"), torch.randn(D, device="cuda")
    tail = x[:, -100:].double()
    y = short_conv(x, None, weight, bias, None, True)[:, -90:]
    wanted = conv_reference.short_conv(tail, None, weight.double(), bias.double(), None, True)[:, -90:]
    assert ((y - wanted).abs() / (1 + wanted.abs())).max() < 1e-2
    y, wanted = gated_norm(x, x, bias, 1e-5, 1, True)[:, -90:], norm_reference.gated_norm(tail, tail, bias.double(), 1e-5, 1, True)[:, -90:]
    assert ((y - wanted).abs() / (1 + wanted.abs())).max() < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("V", "D", "often"), [(50432, 1024, 0.0), (50432, 1000, 0.05), (300, 2048, 0.9), (7, 64, 1.0)])
def test_the_gradient_of_an_embedding(V: int, D: int, often: float, dtype: torch.dtype) -> None:
    """Ids that come never, once, and in most places; the same bits each time."""
    weight = torch.randn(V, D, device="cuda", requires_grad=True)
    ids = torch.randint(0, V, (16, 2048), device="cuda")
    ids[torch.rand(16, 2048, device="cuda") < often] = 5
    y = embedding(weight, ids).to(dtype)
    assert torch.equal(y, weight[ids].to(dtype))
    d = torch.randn(y.shape, device="cuda").to(dtype)
    found, again = (torch.autograd.grad(y, weight, d, retain_graph=True)[0] for _ in range(2))
    wanted = torch.zeros(V, D, device="cuda", dtype=torch.float64).index_add_(0, ids.flatten(), d.flatten(0, 1).double())
    assert torch.equal(found, again) and (found - wanted).norm() <= 1e-6 * wanted.norm()
