"""Runs the kernels of whole layers but the recurrence (convolution, norm, SwiGLU, residual, rotary positions, loss) in Triton's interpreter and compares them with torch's own gradients in float64.
Its own process: the interpreter is chosen when Triton is imported. `python -m tests.kernels.interpreted_mixer`"""

from __future__ import annotations

import math
import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from kernels import cross_entropy  # noqa: E402
from kernels.add_norm import add_norm, norm_beside  # noqa: E402
from kernels.add_norm import op as add_norm_op  # noqa: E402
from kernels.add_norm import reference as add_norm_reference  # noqa: E402
from kernels.cross_entropy import reference as cross_reference  # noqa: E402
from kernels.embedding import table_gradient  # noqa: E402
from kernels.gated_norm import gated_norm  # noqa: E402
from kernels.gated_norm import op as norm_op  # noqa: E402
from kernels.gated_norm import reference as norm_reference  # noqa: E402
from kernels.linear import triton as linear_kernels  # noqa: E402
from kernels.linear.ahead import Casts  # noqa: E402
from kernels.linear.op import cast, runs  # noqa: E402
from kernels.residual import op as residual_op  # noqa: E402
from kernels.residual import reference as residual_reference  # noqa: E402
from kernels.residual import residual  # noqa: E402
from kernels.rotary import op as rotary_op  # noqa: E402
from kernels.rotary import reference as rotary_reference  # noqa: E402
from kernels.rotary import rotary  # noqa: E402
from kernels.short_conv import joint_gradient, short_conv, short_conv_columns  # noqa: E402
from kernels.short_conv import op as conv_op  # noqa: E402
from kernels.short_conv import reference as conv_reference  # noqa: E402
from kernels.step_sizes import op as steps_op  # noqa: E402
from kernels.step_sizes import reference as steps_reference  # noqa: E402
from kernels.step_sizes import step_sizes  # noqa: E402
from kernels.swiglu import op as swiglu_op  # noqa: E402
from kernels.swiglu import reference as swiglu_reference  # noqa: E402
from kernels.swiglu import swiglu  # noqa: E402
from tests.kernels.interpreter import patch_once  # noqa: E402

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def agree(y: Tensor, oracle: Tensor, given: list[Tensor], fine: list[Tensor], case: str) -> None:
    """Values and gradients; 1.5 times the rounding of the output where that is half precision."""
    low = y.dtype != torch.float32
    oracle_y = oracle.detach()
    error, rounding = (y.detach() - oracle_y).abs().max().item(), (oracle_y.to(y.dtype) - oracle_y).abs().max().item()
    assert error <= (1.5 * rounding if low else 1e-5 * (1 + oracle_y.abs().max().item())), f"{case}: y {error:.1e}"
    d = torch.randn(y.shape).to(y.dtype)
    for i, (a, b) in enumerate(zip(torch.autograd.grad(y, given, d), torch.autograd.grad(oracle, fine, d.double()))):
        gap = ((a - b).norm() / (1e-3 + b.norm())).item()
        assert gap < (2e-3 if low or a.dtype != torch.float32 else 1e-4) and a.dtype == given[i].dtype, f"{case}: gradient {i} {gap:.1e}"
    print(case)


def leaves(*tensors: Tensor | None) -> tuple[list[Any], list[Any]]:
    given = [None if t is None else t.requires_grad_() for t in tensors]
    return given, [None if t is None else t.detach().double().requires_grad_() for t in given]


def cross_entropies() -> None:
    """Vocabularies below, at and above a block, ignored rows, a row of -inf but for its label, and a NaN, which must stay one."""
    for V, dtype in ((3, torch.float32), (64, torch.float32), (130, torch.bfloat16), (257, torch.float16)):
        logits, labels = (4 * torch.randn(6, V)).to(dtype), torch.randint(0, V, (6,))
        labels[1] = -100
        logits[2, torch.arange(V) != labels[2]] = -torch.inf
        fine = logits.double().requires_grad_()
        nll, log_z = cross_entropy.losses(logits, labels)
        wanted = cross_reference.losses(fine, labels)
        torch.testing.assert_close([nll.double(), log_z.double()], [w.detach() for w in wanted], atol=2e-6, rtol=2e-6)
        g_nll, g_log_z = torch.randn(6), torch.randn(6)
        (d_oracle,) = torch.autograd.grad((wanted[0] * g_nll).sum() + (wanted[1] * g_log_z).sum(), fine)
        d = cross_entropy.gradient_(logits.clone(), labels, log_z, g_nll, g_log_z)
        ulp = torch.finfo(dtype).eps  # the interpreter cuts off what it does not store
        assert d.dtype == dtype and ((d - d_oracle).abs() <= ulp * d_oracle.abs() + 1e-6).all(), f"cross entropy {V} {dtype}"
        d = cross_entropy.gradient_(logits.clone(), labels, log_z, torch.ones(6), torch.zeros(6))
        both = cross_entropy.losses_and_gradient_(logits.clone(), labels)
        assert all(torch.equal(a, b) for a, b in zip(both, (nll, log_z, d))), f"losses and gradient at once {V} {dtype}"
        logits[3, 1] = torch.nan
        nll, log_z = cross_entropy.losses(logits, labels)
        assert nll[3].isnan() and log_z[3].isnan() and nll.isfinite().sum() == 5
        print(f"cross entropy {V} {dtype}")


def labels_that_are_no_logits() -> None:
    """NaN for their rows, in the loss and in its gradient, and nothing of the rows beside them; labels of 32 bits; a row that does not count."""
    logits, labels = torch.randn(5, 70), torch.tensor([3, 70, -1, -100, 69], dtype=torch.int32)
    logits[3] = torch.nan
    nll, log_z = cross_entropy.losses(logits, labels)
    assert nll.isnan().tolist() == [False, True, True, False, False] and log_z.isfinite().all()
    torch.testing.assert_close(nll[[0, 4]], torch.nn.functional.cross_entropy(logits[[0, 4]], labels[[0, 4]].long(), reduction="none"))
    d = cross_entropy.gradient_(logits.clone(), labels, log_z, torch.ones(5), torch.ones(5))
    at_once = cross_entropy.losses_and_gradient_(logits.clone(), labels)
    assert at_once[0].isnan().tolist() == nll.isnan().tolist()
    for one in (d, at_once[2]):
        assert one[[1, 2]].isnan().all() and one[[0, 4]].isfinite().all() and not one[3].any()


def documents_that_are_not_finite() -> None:
    """The convolution's kernels leave the documents beside one as they are."""
    x, past, weight, bias = torch.randn(2, 19, 3), torch.full((2, 3, 3), torch.nan), torch.randn(3, 4), torch.randn(3)
    starts = torch.zeros(2, 19, dtype=torch.bool)
    starts[:, [0, 7, 10, 16]] = True
    others = torch.ones(19, dtype=torch.bool)
    others[7:10] = False
    bad, results = x.clone(), []
    bad[:, 8] = torch.inf
    for inputs in (x, bad):
        leaves = [t.clone().requires_grad_() for t in (inputs, past)]
        y = short_conv(*(*leaves, weight, bias, starts, True))
        results.append(
            [y[:, others], *(g[:, others] if g.shape[1] == 19 else g for g in torch.autograd.grad(y[:, others].square().sum(), leaves))]
        )
    for a, b in zip(*results):
        assert torch.equal(a, b) and a.isfinite().all()


def present(tensors: list[Tensor | None]) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def convolutions() -> None:
    for B, T, D, W, past, resets, silu, dtype in (
        (2, 13, 5, 4, True, 0.3, True, torch.float32),
        (1, 1, 1, 4, True, 0.0, True, torch.float32),
        (2, 2, 3, 4, True, 0.4, True, torch.float32),  # T < W
        (2, 3, 17, 4, False, 0.0, False, torch.float32),
        (1, 19, 17, 3, False, 0.2, True, torch.float32),
        (1, 21, 3, 6, True, 0.2, True, torch.float32),
        (1, 9, 4, 2, True, 0.2, True, torch.float16),
        (1, 21, 3, 12, True, 0.2, True, torch.float32),  # a history longer than a slice
        (2, 5, 3, 12, True, 0.0, True, torch.float32),
    ):
        history = torch.randn(B, W - 1, D).to(dtype) if past else None
        given, fine = leaves(torch.randn(B, T, 3 * D).to(dtype), history, torch.randn(D, W), torch.randn(D))
        starts = torch.rand(B, T) < resets if resets else None
        assert given[0] is not None and fine[0] is not None
        y = short_conv(given[0][..., D : 2 * D], *(*given[1:], starts, silu))
        oracle = conv_reference.short_conv(fine[0][..., D : 2 * D], *(*fine[1:], starts, silu))
        agree(y, oracle, present(given), present(fine), f"convolution {(B, T, D, W)} {dtype}")
    x, weight, bias = (t.requires_grad_() for t in (torch.randn(2, 5, 3), torch.randn(3, 4), torch.randn(3)))
    history, starts = torch.randn(2, 3, 3, requires_grad=True), torch.rand(2, 5) < 0.3
    torch.library.opcheck(conv_op.convolve_op, (x, history, weight, bias, starts, True), test_utils=CHECKS)
    torch.library.opcheck(conv_op.convolve_op, (x, None, weight, bias, None, False), test_utils=CHECKS)


def norms() -> None:
    for shape, groups, gated, first, dtype in (
        ((2, 5, 6), 1, True, True, torch.float32),
        ((2, 5, 6), 2, True, False, torch.float32),
        ((7, 1), 1, False, False, torch.float32),
        ((3, 2, 3, 10), 1, False, False, torch.float32),
        ((2, 3, 34), 2, True, True, torch.float32),
        ((2, 3, 33), 1, True, True, torch.float16),
    ):
        D = shape[-1]
        wide = torch.randn(*shape[:-1], 3 * D).to(dtype) if gated else None
        given, fine = leaves(torch.randn(shape).to(dtype), wide, torch.randn(D))
        y, oracle = (
            norm(t[0], None if t[1] is None else t[1][..., D : 2 * D], t[2], 1e-5, groups, first)
            for norm, t in ((gated_norm, given), (norm_reference.gated_norm, fine))
        )
        agree(y, oracle, present(given), present(fine), f"norm {shape} {groups} {dtype}")
    h, gate, weight = (t.requires_grad_() for t in (torch.randn(2, 3, 6), torch.randn(2, 3, 6), torch.randn(6)))
    torch.library.opcheck(norm_op.norm_op, (h, gate, weight, 1e-5, 1, True, torch.float32), test_utils=CHECKS)
    torch.library.opcheck(norm_op.norm_op, (gate, None, weight, 1e-5, 2, False, torch.bfloat16), test_utils=CHECKS)


def gated_products() -> None:
    """Sizes below, at and above a block, and tensors that are not contiguous."""
    for shape, dtype in (((1,), torch.float32), ((4, 16), torch.float32), ((2, 3, 11), torch.float32), ((3, 43), torch.float16)):
        given, fine = leaves(*(2 * torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype) for _ in range(2)))
        parts = [[t[..., ::2] for t in present(tensors)] for tensors in (given, fine)]
        agree(swiglu(*parts[0]), swiglu_reference.swiglu(*parts[1]), present(given), present(fine), f"swiglu {shape} {dtype}")
    for shape, apart in (((2, 3, 11), 0), ((7, 40), 0), ((7, 40), 1)):  # the halves of one tensor, or columns of it that are not
        given, fine = leaves(torch.randn(*shape[:-1], 2 * shape[-1] + apart))
        halves = [(t[0][..., : shape[-1]], t[0][..., shape[-1] + apart :]) for t in (present(given), present(fine))]
        agree(swiglu(*halves[0]), swiglu_reference.swiglu(*halves[1]), present(given), present(fine), f"swiglu halves {shape} {apart}")
    gate, up = (torch.randn(2, 5, requires_grad=True) for _ in range(2))
    torch.library.opcheck(swiglu_op.product_op, (gate, up), test_utils=CHECKS)


def sizes_of_steps() -> None:
    """Columns of a wider tensor, heads below, at and above a power of two, limits that hold for some and none; what is not a number stays so."""
    for shape, dtype, low, high in (
        ((1, 1, 1), torch.float32, 0.0, math.inf),
        ((2, 3, 5), torch.float32, 0.5, 1.5),
        ((1, 9, 8), torch.float16, 0.0, math.inf),
        ((2, 5, 33), torch.float16, 0.3, 2.0),
    ):
        wide, bias = 4 * torch.randn(*shape[:2], shape[2] + 7), torch.randn(shape[2])
        given, fine = leaves(wide.to(dtype), bias)
        y = step_sizes(given[0][..., 3 : 3 + shape[2]], given[1], low, high)
        oracle = steps_reference.step_sizes(fine[0][..., 3 : 3 + shape[2]], fine[1], low, high)
        agree(y, oracle, present(given), present(fine), f"step sizes {shape} {dtype}")
    dt, bias = torch.tensor([[[1.0, math.nan, -math.inf, 300.0]]], requires_grad=True), torch.zeros(4, requires_grad=True)
    y = step_sizes(dt, bias, 0.0, math.inf)
    assert y[0, 0, 1].isnan() and y[0, 0, 2] == 0 and y[0, 0, 3] == 300
    d_dt, _ = torch.autograd.grad(y.sum(), (dt, bias))
    assert d_dt[0, 0].isnan().tolist() == [False, True, False, False] and d_dt[0, 0, 3] == 1
    torch.library.opcheck(steps_op.make_op, (torch.randn(1, 2, 4, requires_grad=True), bias, 0.0, 1.0), test_utils=CHECKS)


def residuals() -> None:
    """Rows and widths below, at and above a tile; the dtypes of stream and sublayer alike and not."""
    for shape, dtype, other in (
        ((1, 1), torch.float32, torch.float32),
        ((2, 3, 5), torch.float32, torch.float32),
        ((7, 521), torch.float32, torch.float32),
        ((2, 5, 33), torch.float32, torch.float16),
        ((3, 34), torch.float16, torch.float16),
    ):
        given, fine = leaves(torch.randn(shape).to(dtype), torch.randn(shape).to(other), torch.randn(shape[-1]))
        y, oracle = residual(*present(given)), residual_reference.residual(*present(fine))
        agree(y, oracle, present(given), present(fine), f"residual {shape} {dtype} {other}")
    x, y, scale = (torch.randn(s, requires_grad=True) for s in ((2, 3, 4), (2, 3, 4), (4,)))
    torch.library.opcheck(residual_op.add_op, (x, y, scale), test_utils=CHECKS)
    torch.library.opcheck(residual_op.add_op, (x, y.detach().half().requires_grad_(), scale), test_utils=CHECKS)


def narrow_streams(shape: tuple[int, ...], dtype: torch.dtype, scaled: bool) -> None:
    """A stream of 16 bits is rounded once, its norm is that of what it then holds, and so are the gradients, of which two may be one tensor."""
    scale = torch.randn(shape[-1]) if scaled else None
    given, fine = leaves(torch.randn(shape).half(), torch.randn(shape).half(), scale, 1 + 0.1 * torch.randn(shape[-1]))
    (r, n), (oracle_r, _) = add_norm(*(*given, 1e-5, dtype)), add_norm_reference.add_norm(*(*fine, 1e-5))
    assert r.dtype == torch.float16 and n.dtype == dtype
    error, rounding = (r.detach() - oracle_r.detach()).abs(), (oracle_r.detach().half() - oracle_r.detach()).abs()
    assert (error <= 1.001 * rounding + 1e-6).all()
    inner = r.detach().double().requires_grad_()
    oracle_n = norm_reference.gated_norm(inner, None, fine[3], 1e-5)
    limit = 1e-3 if dtype == torch.float16 else 1e-5
    assert (n.detach() - oracle_n.detach()).abs().max() <= limit * (1 + oracle_n.detach().abs().max())
    d_r, d_n = torch.randn(shape).half(), torch.randn(shape).to(dtype)
    wanted_r, wanted_weight = torch.autograd.grad([inner, oracle_n], [inner, fine[3]], [d_r.double(), d_n.double()])
    wanted = [wanted_r if scale is None else wanted_r * fine[2].detach(), wanted_r]
    wanted += [] if scale is None else [(wanted_r * fine[0].detach()).flatten(0, -2).sum(0)]
    for got, exact in zip(torch.autograd.grad([r, n], present(given), [d_r, d_n]), [*wanted, wanted_weight]):
        assert (got - exact).norm() <= (1e-3 if got.dtype == torch.float16 else 1e-4) * (1e-3 + exact.norm()), (shape, dtype, scaled)
    print(f"narrow stream {shape} {dtype} {scaled}")


def streams() -> None:
    """Rows and widths below, at and above a tile, with and without a scale, the dtypes of stream, sublayer and norm alike and not."""
    for shape, other, dtype, scaled in (
        ((1, 2), torch.float32, torch.float32, True),
        ((2, 3, 5), torch.float32, torch.float32, False),
        ((7, 521), torch.float16, torch.float32, True),
        ((2, 5, 33), torch.float16, torch.float16, False),
        ((3, 34), torch.float16, torch.float16, True),
    ):
        narrow_streams(shape, dtype, scaled)
        scale = torch.randn(shape[-1]) if scaled else None
        given, fine = leaves(torch.randn(shape), torch.randn(shape).to(other), scale, torch.randn(shape[-1]))
        (r, n), (oracle_r, oracle_n) = add_norm(*(*given, 1e-5, dtype)), add_norm_reference.add_norm(*(*fine, 1e-5))
        assert r.dtype == torch.float32 and n.dtype == dtype
        assert (r.detach() - oracle_r.detach()).abs().max() <= 1e-6 * (1 + oracle_r.detach().abs().max())
        agree(n, oracle_n, present(given), present(fine), f"norm of the stream {shape} {other} {dtype} {scaled}")
        both, oracles = add_norm(*(*given, 1e-5, torch.float32)), add_norm_reference.add_norm(*(*fine, 1e-5))
        agree(torch.cat(both), torch.cat(oracles), present(given), present(fine), f"stream and norm {shape} {other} {scaled}")
        alone, oracle = add_norm(*(*given, 1e-5, torch.float32))[0], add_norm_reference.add_norm(*(*fine, 1e-5))[0]
        agree(alone, oracle, present(given)[:-1], present(fine)[:-1], f"stream alone {shape} {other} {scaled}")
        one, fine_one = leaves(torch.randn(shape).to(other), torch.randn(shape[-1]))
        for alone in (False, True):
            r, n = norm_beside(*(*one, 1e-5, torch.float32))
            oracle_n = norm_reference.gated_norm(fine_one[0], None, fine_one[1], 1e-5)
            assert torch.equal(r, one[0]) and r.grad_fn is not None
            y, oracle = (n, oracle_n) if alone else (torch.cat([r.float(), n]), torch.cat([fine_one[0], oracle_n]))
            agree(y, oracle, one, fine_one, f"norm beside {shape} {other} {alone}")
    x, y, scale, weight = (torch.randn(s, requires_grad=True) for s in ((2, 3, 4), (2, 3, 4), (4,), (4,)))
    torch.library.opcheck(add_norm_op.add_norm_op, (x, y, scale, weight, 1e-5, torch.float32), test_utils=CHECKS)
    torch.library.opcheck(add_norm_op.add_norm_op, (x, y, None, weight, 1e-5, torch.bfloat16), test_utils=CHECKS)
    low = [t.detach().half().requires_grad_() for t in (x, y)]
    torch.library.opcheck(add_norm_op.add_norm_op, (*low, None, weight, 1e-5, torch.float16), test_utils=CHECKS)


def turned(turn: Any, tensors: list[Tensor], H: int, positions: Tensor, *more: Any) -> Tensor:
    """Queries as columns of a projection and keys within a wider tensor, both turned, in one vector."""
    (B, T, _), K = tensors[0].shape, tensors[1].shape[-1] // 2
    q, k = tensors[0].view(B, T, H, K).transpose(1, 2), tensors[1][..., :K]
    return torch.cat([x.flatten() for x in turn(q, k, positions, 10000.0, *more)])


def rotations() -> None:
    """Odd times, head widths that are no power of two, more heads than a program takes, fewer keys than queries, strided and far positions."""
    for B, T, H, G, K, first, dtype in (
        (1, 1, 1, 1, 2, 0, torch.float32),
        (2, 7, 4, 2, 6, 3, torch.float32),
        (1, 5, 9, 3, 16, 4000, torch.float32),
        (2, 3, 2, 1, 10, 0, torch.float16),
    ):
        given, fine = leaves(torch.randn(B, T, H * K).to(dtype), torch.randn(B, G, T, 2 * K).to(dtype))
        positions = torch.arange(first, first + T)
        y, oracle = (turned(turn, present(t), H, positions) for turn, t in ((rotary, given), (rotary_reference.rotary, fine)))
        if first > 1000:  # the oracle's angles are exact, fp32's are not: the plain rotation has the same
            oracle = turned(rotary_reference.rotary, [t.float() for t in present(fine)], H, positions).double()
        agree(y, oracle, present(given), present(fine), f"rotary {(B, T, H, G, K)} {dtype}")
        if 2 < K < 16:  # some of the columns, by frequencies of their own, made larger
            more = torch.tensor([0.7, 0.01]), 1.3
            y, oracle = (turned(turn, present(t), H, positions, *more) for turn, t in ((rotary, given), (rotary_reference.rotary, fine)))
            agree(y, oracle, present(given), present(fine), f"partial rotary {(B, T, H, G, K)} {dtype}")
    q, k = torch.randn(2, 3, 5, 4, requires_grad=True), torch.randn(2, 1, 5, 4, requires_grad=True)
    turned_q, turned_k = rotary(q, k, torch.arange(5), 100.0)
    gradients = [g.transpose(1, 2).reshape(10, -1) for g in torch.autograd.grad(turned_q.sum() + turned_k.sum(), (q, k))]
    assert len(runs(gradients)) == 1, "gradients of queries and keys are one for the products that made both"
    torch.library.opcheck(rotary_op.turn_op, (q, k, torch.arange(5), 100.0, False), test_utils=CHECKS)
    torch.library.opcheck(rotary_op.turn_op, (q, k, torch.arange(5), 100.0, False, torch.tensor([0.5]), 1.1), test_utils=CHECKS)


def casts() -> None:
    """Weights of one to seven projections side by side, of whole and odd sizes, each to the bit as torch casts what 16 bits hold."""
    for shapes in ([(3, 5)], [(64, 70), (1, 70)], [(128, 64), (65, 64), (7, 64)], [(5, 16)] * 4, [(2, 16)] * 7):
        weights = [torch.randn(shape).bfloat16().float() for shape in shapes]
        out = torch.full((sum(rows for rows, _ in shapes), shapes[0][1]), torch.nan, dtype=torch.bfloat16)
        linear_kernels.cast(weights, out.split([rows for rows, _ in shapes]))
        assert torch.equal(out, torch.cat(weights).bfloat16()), f"casts of {shapes}"
    casts_ahead()


def casts_ahead() -> None:
    """As a recorded pass finds them: made anew at every run, each where it was found first, none over another or past the room."""
    casts, given = Casts(), [torch.randn(s).bfloat16().float() for s in ((3, 5), (160, 128), (8, 128), (1, 128), (1, 7), (2400, 7))]
    taken = [given[:1], given[1:4], given[4:], given[1:2]]
    with casts.recording(64 + 169 * 128 + 16832 + 160 * 128, torch.bfloat16, torch.device("cpu")):
        assert casts.memory is not None and not casts.made, "memory is asked for before anything of the pass is"
        made = [cast(weights, torch.bfloat16) for weights in taken]
        assert all(joined.untyped_storage().data_ptr() == casts.memory.untyped_storage().data_ptr() for joined in made)
        assert cast(taken[1], torch.bfloat16) is made[1] and len(casts.made) == 4
        others = [cast(given[2:3], torch.float16), cast(given[1:2], torch.float16), cast(given[3:4], torch.bfloat16)]
        others.append(cast([given[0].view(5, 3)], torch.bfloat16))
        assert len(casts.made) == 4, "of another dtype, one too many, and one that is known in another shape"
    assert cast(taken[0], torch.bfloat16) is not made[0], "outside of a recording"
    for joined, weight in zip(others, (given[2], given[1], given[3], given[0].view(5, 3))):
        assert torch.equal(joined, weight.to(joined.dtype)), "cast where they are read"
    for _ in range(2):
        casts.run()
        for weights, joined in zip(taken, made):
            assert joined.dtype == torch.bfloat16 and torch.equal(joined, torch.cat(list(weights)).bfloat16()), "weights as they are"
        for weight in given:
            weight.copy_(torch.randn(weight.shape).bfloat16().float())


def tables() -> None:
    """Gradients of a table: ids that never come, come once and fill pieces, tables above and below the ids, widths of one program and of two."""
    for N, V, D, dtype, kind in (
        (1, 3, 5, torch.float32, "any"), (63, 40, 8, torch.float32, "any"), (300, 9, 24, torch.float32, "any"), (257, 5, 33, torch.bfloat16, "one"),
        (320, 7, 4, torch.float32, "often"), (130, 300, 1030, torch.float32, "any"), (64, 2, 16, torch.float16, "one"),
    ):  # fmt: skip
        ids = torch.randint(0, V, (N,))
        if kind != "any":
            ids[torch.rand(N) < (1.0 if kind == "one" else 0.9)] = V - 1
        d = torch.randn(N, D).to(dtype)
        given = d.T.contiguous().T if kind == "often" else d
        made = table_gradient(given, ids, V)
        wanted = torch.zeros(V, D, dtype=torch.float64).index_add_(0, ids, d.double())
        assert made.dtype == torch.float32 and made.shape == (V, D) and torch.equal(made, table_gradient(given, ids, V)), "not repeatable"
        torch.testing.assert_close(made.double(), wanted, atol=2e-5, rtol=2e-6)
        never = torch.bincount(ids, minlength=V) == 0
        assert (made[never] == 0).all()
        print(f"table {(N, V, D, dtype, kind)}")
    assert table_gradient(torch.randn(0, 4), torch.zeros(0, dtype=torch.long), 3).eq(0).all()
    d = torch.tensor([[torch.nan, 1.0], [2.0, 3.0]])
    assert torch.equal(table_gradient(d, torch.tensor([1, 0]), 2)[0], torch.tensor([2.0, 3.0])), "what is no number stays in its row"


def chains() -> None:
    """A projection split, convolved, and gated: values, gradients made in one piece, the same again, and under torch.compile's autograd."""
    B, T, I, before = 2, 9, 6, 3
    given, fine = leaves(*(torch.randn(s) for s in ((B, T, before + 2 * I), (B, 3, I), (I, 4), (I,), (I,))))
    starts = torch.rand(B, T) < 0.3

    def chain(conv: Any, norm: Any, projected: Tensor, history: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        joint = joint_gradient(projected)
        _, u, gate = conv(projected, before, history, weight, bias, starts, True, joint)
        return norm(2 * u, gate, scale, 1e-5, norm_first=True, columns=(before + I, joint))

    y = chain(short_conv_columns, gated_norm, *present(given))
    oracle = chain(conv_reference.short_conv_columns, norm_reference.gated_norm, *present(fine))
    agree(y, oracle, present(given), present(fine), "chain")
    d = torch.randn(B, T, I)
    with torch.profiler.profile(record_shapes=True) as record:
        one = torch.autograd.grad(chain(short_conv_columns, gated_norm, *present(given)), present(given), d)
    moved = [e.key for e in record.key_averages(True) if e.key in ("aten::cat", "aten::copy_") and [B, T, I] in e.input_shapes]
    assert not moved, f"the projection's gradient was put together from parts: {moved}"
    two = torch.autograd.grad(chain(short_conv_columns, gated_norm, *present(given)), present(given), d)
    assert all(torch.equal(a, b) for a, b in zip(one, two)), "not repeatable"
    again = checkpoint(lambda *a: chain(short_conv_columns, gated_norm, *a), *present(given), use_reentrant=False)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(again, present(given), d), one)), "not under checkpointing"
    compiled = torch.compile(lambda *a: chain(short_conv_columns, gated_norm, *a), backend="aot_eager", fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(*present(given)), present(given), d), one):
        torch.testing.assert_close(a, b)


if __name__ == "__main__":
    patch_once()
    for part in (
        cross_entropies, labels_that_are_no_logits, documents_that_are_not_finite, convolutions, norms, gated_products, sizes_of_steps, residuals, streams, rotations, casts, tables, chains,
    ):  # fmt: skip
        torch.manual_seed(0)
        part()
    print("ok")
