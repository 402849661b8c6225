"""Inputs that once came out silently wrong in the operations around the recurrence, on a CPU: NaN beside documents, no steps, labels that are
no logits, steps of very uneven size, narrow biases, and derivatives of derivatives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import cross_entropy
from kernels.mamba2_step import mamba2_step
from kernels.mamba2_step import reference as step_reference
from kernels.parallel_rnn import parallel_rnn, parallel_rnn_step
from kernels.parallel_rnn.cell import Cell, Pre, Rec, State
from kernels.short_conv import last_inputs, short_conv
from kernels.ssd import border, ssd
from kernels.ssd.reference import ssd_sequential
from models.config import ModelConfig
from models.decode import cast
from models.head import Head
from models.init import roles
from models.lm import LanguageModel
from tests.kernels.mamba2_step_cases import problem


def leaky(a: Pre, w: Rec, h: State) -> tuple[Tensor, ...]:
    return (torch.tanh(a + w * h),)


def unlowered(a: Pre, w: Rec, h: State) -> tuple[Tensor, ...]:
    return (torch.erfc(w * h) + a,)


def scan_problem(T: int = 24, bad: slice | None = None) -> tuple[list[Tensor], Tensor]:
    """x, dt, A, B, C, h0 and the starts of three documents; x, dt, B and C not finite at some steps of the second."""
    g = torch.Generator().manual_seed(1)
    H, P, G, N = 4, 3, 2, 5
    x, dt = torch.randn(2, T, H, P, generator=g), torch.rand(2, T, H, generator=g)
    B, C = torch.randn(2, T, G, N, generator=g), torch.randn(2, T, G, N, generator=g)
    starts = torch.zeros(2, T, dtype=torch.bool)
    starts[:, [t for t in (7, 16) if t < T]] = True
    if bad is not None:
        for i, t in enumerate((x, dt, B, C)):
            t[:, bad] = (torch.nan, torch.inf)[i % 2]
    return [x, dt, -torch.rand(H, generator=g), B, C, torch.randn(2, H, P, N, generator=g)], starts


@pytest.mark.parametrize("chunk", [5, 64])
def test_a_document_that_is_not_finite_leaves_the_scan_of_the_others_as_it_is(chunk: int) -> None:
    others = torch.ones(24, dtype=torch.bool)
    others[7:16] = False
    runs = []
    for bad in (None, slice(9, 11)):
        tensors, starts = scan_problem(bad=bad)
        leaves = [t.requires_grad_() for t in tensors]
        y, final = ssd(*(*leaves, starts), chunk=chunk)
        loss = y[:, others].square().sum() + final.square().sum()
        gradients = torch.autograd.grad(loss, leaves)
        runs.append([y[:, others], final, *(g[:, others] for g in (gradients[0], gradients[1], *gradients[3:5])), gradients[5]])
        assert bad is None or y[:, 11:16].isnan().any()
    for a, b in zip(*runs):
        torch.testing.assert_close(a, b)


def test_what_slices_tell_each_other_is_of_their_own_document() -> None:
    (x, dt, A, B, C, _), starts = scan_problem(bad=slice(9, 11))
    clean, _ = scan_problem()
    x_, dt_, A_, B_, C_, _ = clean
    state, through = border.end_state(x, dt, A, B, starts)
    assert not through.any()
    torch.testing.assert_close(state, border.end_state(x_, dt_, A_, B_, starts)[0])
    start, through = border.start_adjoint(x, dt, A, C, starts)
    assert not through.any()
    torch.testing.assert_close(start, border.start_adjoint(x_, dt_, A_, C_, starts)[0])
    fast = dt_ * 1e3, A_ - 1  # a decay that leaves nothing is no document's start
    assert (border.end_state(x_, *fast, B_, None)[1] > 0).all() and (border.start_adjoint(x_, *fast, C_, None)[1] > 0).all()


@pytest.mark.parametrize("history", [True, False])
def test_the_convolution_and_its_history_keep_documents_apart(history: bool) -> None:
    x, past, weight, bias = torch.randn(2, 12, 3), torch.randn(2, 3, 3), torch.randn(3, 4), torch.randn(3)
    starts = torch.zeros(2, 12, dtype=torch.bool)
    starts[:, [4, 7, 11]] = True
    others = torch.ones(12, dtype=torch.bool)
    others[4:7] = False
    bad, lost = x.clone(), past.clone()
    bad[:, 5] = torch.nan
    runs = []
    for inputs in (x, bad):
        leaves = [t.clone().requires_grad_() for t in (inputs, past, weight, bias)]
        y = short_conv(leaves[0], leaves[1] if history else None, leaves[2], leaves[3], starts, True)
        gradients = torch.autograd.grad(y[:, others].square().sum(), leaves, allow_unused=True)
        runs.append([y[:, others], gradients[0][:, others], *([gradients[1]] if history else [])])
    for a, b in zip(*runs):
        torch.testing.assert_close(a, b)
    lost[:] = torch.nan
    starts[:, 0] = True
    assert short_conv(x, lost, weight, bias, starts).isfinite().all()
    assert last_inputs(bad, lost, 4, starts).isfinite().all()


def test_a_token_that_starts_a_document_forgets_a_state_that_is_not_finite() -> None:
    arguments = problem((3, 4, 5, 6, 2, 4), torch.float32, True, 0.0, 10.0)
    arguments[8] = torch.tensor([True, False, True])
    wanted = mamba2_step(*arguments)
    arguments[1], arguments[7] = (t.clone() for t in (arguments[1], arguments[7]))
    arguments[1][[0, 2]], arguments[7][[0, 2]] = torch.nan, torch.inf
    for a, b in zip(mamba2_step(*arguments), wanted):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("case", ["every seventh step is large", "fast decay"])
@pytest.mark.parametrize("chunk", [32, 256])
def test_gradients_of_decays_lose_no_digits_to_large_steps(case: str, chunk: int) -> None:
    g = torch.Generator().manual_seed(0)
    T, H, P, N = 200, 2, 4, 5
    x, B, C = torch.randn(1, T, H, P, generator=g), torch.randn(1, T, 1, N, generator=g), torch.randn(1, T, 1, N, generator=g)
    dt, A = torch.full((1, T, H), 1e-4), -torch.tensor([1.0, 0.5])
    dt[:, ::7] = 20.0
    if case == "fast decay":
        dt, A = 0.1 * torch.rand(1, T, H, generator=g), A * 1e3
    d = torch.randn(1, T, H, P, generator=g)

    def gradients(scan: Callable[..., Any], tensors: list[Tensor]) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        y, final = scan(*leaves)
        return torch.autograd.grad((y * d.to(y.dtype)).sum() + final.sum(), leaves)

    wanted = gradients(ssd_sequential, [t.double() for t in (x, dt, A, B, C)])
    for a, b in zip(gradients(lambda *t: ssd(*t, chunk=chunk), [x, dt, A, B, C]), wanted):
        assert (a - b).norm() <= 5e-6 * b.norm()


def test_no_steps() -> None:
    tensors, starts = scan_problem(0)
    leaves = [t.requires_grad_() for t in tensors]
    for new in (None, starts[:, :0]):
        y, final = ssd(*(*leaves, new))
        assert y.shape == (2, 0, 4, 3) and torch.equal(final, leaves[5])
        *gradients, d_h0 = torch.autograd.grad(y.sum() + final.sum(), leaves)
        assert not any(g.any() for g in gradients) and (d_h0 == 1).all()
    assert ssd(*tensors[:5])[1].shape == (2, 4, 3, 5)
    x, past, weight, bias = conv = [torch.randn(s, requires_grad=True) for s in ((2, 0, 3), (2, 3, 3), (3, 4), (3,))]
    for new in (None, torch.zeros(2, 0, dtype=torch.bool)):
        y = short_conv(x, past, weight, bias, new, True)
        assert y.shape == (2, 0, 3) and not any(g.any() for g in torch.autograd.grad(y.sum(), conv))
    head, h = Head(4, 7), torch.randn(0, 4, requires_grad=True)
    for recompute in (True, False):
        nll, log_z = head(h, torch.zeros(0, dtype=torch.long), recompute=recompute)
        assert nll.shape == log_z.shape == (0,) and not torch.autograd.grad(nll.sum(), head.weight)[0].any()


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_labels(recompute: bool, dtype: torch.dtype) -> None:
    """A label that is no logit is told; a row that does not count may hold anything."""
    torch.manual_seed(0)
    head, h, labels = Head(4, 7), torch.randn(6, 4), torch.tensor([0, 6, -100, 3, -100, 2], dtype=dtype)
    for wrong in (7, -1, -101):
        with pytest.raises(ValueError, match=f"A label is {wrong}, but there are logits 0 to 6; -100 marks"):
            head(h, labels.clone().index_fill_(0, torch.tensor([3]), wrong), recompute=recompute)
    h[2] = torch.nan
    h.requires_grad_()
    nll, log_z = head(h, labels, recompute=recompute, chunk=2)
    counted = labels != -100
    logits = h.detach()[counted] @ head.weight.T
    torch.testing.assert_close(nll[counted], torch.nn.functional.cross_entropy(logits, labels[counted].long(), reduction="none"))
    assert not nll[~counted].any() and not log_z[~counted].any()
    d_h, d_weight = torch.autograd.grad(nll.sum() + log_z.square().sum(), (h, head.weight))
    assert d_weight.isfinite().all() and not d_h[~counted].any() and d_h[counted].any(1).all()


def test_a_label_that_is_no_logit_is_nan_where_raising_would_wait() -> None:
    """Traced, as on a GPU: nobody can raise."""
    loss = torch.compile(cross_entropy.reference.losses, backend="aot_eager", fullgraph=True)
    logits = torch.randn(4, 5, requires_grad=True)
    nll, _ = loss(logits, torch.tensor([1, 5, -3, -100]))
    assert nll.isnan().tolist() == [False, True, True, False]


def twice(y: Tensor, leaf: Tensor) -> None:
    (g,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
    g.square().sum().backward()


def test_derivatives_of_derivatives_are_right_or_refused() -> None:
    torch.manual_seed(0)
    h, head, labels = torch.randn(5, 4, dtype=torch.float64, requires_grad=True), Head(4, 6).double(), torch.tensor([0, 1, 2, -100, 4])
    with pytest.raises(RuntimeError, match="once_differentiable"):
        twice(head(h, labels)[0], h)
    assert torch.autograd.gradgradcheck(lambda h: head(h, labels, recompute=False), h)
    pre, rec = torch.randn(1, 200, 1, 3, requires_grad=True), torch.rand(1, 3)
    for method in ("parallel", "auto"):
        with pytest.raises(RuntimeError, match="once_differentiable"):
            twice(parallel_rnn(Cell.from_step(leaky), pre, rec, method=method)[0], pre)
    cell = Cell.from_step(unlowered)
    assert not cell.lowered
    assert torch.autograd.gradgradcheck(lambda pre: parallel_rnn(cell, pre, rec.double())[0], pre[:, :5].detach().double().requires_grad_())
    tensors, starts = scan_problem()
    with pytest.raises(RuntimeError, match="once_differentiable"):
        twice(ssd(tensors[0].requires_grad_(), *(*tensors[1:], starts))[0], tensors[0])
    x = torch.randn(2, 5, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        twice(short_conv(x, None, torch.randn(3, 4), torch.randn(3), torch.rand(2, 5) < 0.5), x)


def test_a_narrow_bias_does_not_round_the_recurrent_weights() -> None:
    """As after a cast to bf16, which leaves what must stay fp32."""
    torch.manual_seed(0)
    for step in (unlowered, None):
        from models.cells import load_cell

        cell = load_cell("paragru") if step is None else Cell.from_step(step)
        P, R, S = len(cell.pre), len(cell.rec), len(cell.state)
        pre, rec, bias, h0 = torch.randn(1, 9, P, 5), torch.rand(R, 5) - 0.5, torch.randn(P, 5).bfloat16(), torch.randn(1, S, 5)
        wanted = parallel_rnn(cell, pre, rec, h0, bias_PD=bias.float())[0]
        torch.testing.assert_close(parallel_rnn(cell, pre, rec, h0, bias_PD=bias)[0], wanted, rtol=0, atol=0)
        one = parallel_rnn_step(cell, pre[:, 0], rec, h0, bias.float())
        torch.testing.assert_close(parallel_rnn_step(cell, pre[:, 0], rec, h0, bias), one, rtol=0, atol=0)


def test_copies_keep_the_roles_of_parameters() -> None:
    mixers: dict[str, dict[str, Any]] = {
        "g": {"type": "rnn"},
        "m": {"type": "mamba2", "head_dim": 8, "d_state": 8},
        "a": {"type": "attention"},
    }
    model = LanguageModel(ModelConfig(64, 32, 3, ["g", "m", "a"], mixers, learnable_residual=True, tie_embeddings=True))
    model.init_weights(0)
    copies = [copy.deepcopy({"inner": [model]})["inner"][0], copy.deepcopy(model), copy.deepcopy(copy.deepcopy(model))]
    for other in copies:
        assert other.head.weight is other.embedding.weight is not model.head.weight
        for (name, a), (same, b) in zip(model.named_parameters(), other.named_parameters()):
            assert name == same and roles(a) == roles(b) and roles(a) is not roles(b) and torch.equal(a, b)
    ids = torch.zeros(1, 3, dtype=torch.long)
    torch.testing.assert_close(copies[1](ids).logits, model(ids).logits, rtol=0, atol=0)
    in_fp32 = {n for n, p in cast(copies[1], torch.bfloat16).named_parameters() if p.dtype == torch.float32}
    assert in_fp32 and in_fp32 == {n for n, p in model.named_parameters() if "keep_fp32" in roles(p)}
    block = copy.deepcopy(model.blocks[1].mixer)
    assert [roles(p) for p in block.parameters()] == [roles(p) for p in model.blocks[1].mixer.parameters()]


def test_the_step_in_place_takes_a_state_of_any_strides() -> None:
    arguments = problem((2, 4, 3, 5, 2, 4), torch.float32, True, 0.0, 10.0)
    wanted = step_reference.mamba2_step(*arguments)
    arguments[7] = arguments[7].permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    for in_place in (False, True):
        computed = mamba2_step(*arguments, in_place=in_place)
        assert all(torch.equal(a, b) for a, b in zip(computed, wanted)) and (computed[2] is arguments[7]) == in_place
