"""Recurrences with dense heads in plain torch: the solve over slices and its adjoint against autograd through the float64 loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kernels.dense_rnn import dense_rnn, dense_rnn_step, launch, op, reference
from kernels.parallel_rnn.cell import Cell, Mat, Pre, State, biased
from kernels.parallel_rnn.expressions import function
from kernels.parallel_rnn.graph import order
from kernels.parallel_rnn.products import apart, trace_dense
from models.cells import load_cell
from tests.kernels.dense_rnn_cases import cotangents, distance, problem, wanted

NAMES = ("emitted", "final", "pre", "rec", "mat", "h0")


def sliced(cell: Cell, tensors: list[Any], starts: Any, d_emitted: Any, d_final: Any, slices: int, burn_in: int) -> list[Any]:
    states = reference.solve(cell, *tensors, starts, slices, burn_in)
    d_states = torch.zeros_like(states)
    d_states[:, :, -1] = d_emitted
    return [states[:, :, -1], states[:, -1], *reference.backward(cell, *tensors, starts, states, d_states, d_final, slices, burn_in)]


@pytest.mark.parametrize(
    "name", ["dense_lstm", "dense_gru", "dense_gru_before", "dense_elman", "slstm", "shared_matrix", "raw_products", "repeated_input"]
)
@pytest.mark.parametrize(("T", "slices", "burn_in", "starts"), [(60, 5, 8, 0.0), (61, 4, 15, 0.04), (20, 1, 0, 0.1), (40, 3, 30, 0.02)])
def test_slices_equal_the_loop(name: str, T: int, slices: int, burn_in: int, starts: float) -> None:
    cell, tensors, new = problem(name, 2, T, 2, 8, starts=starts)
    cotangent = cotangents(tensors)
    found = sliced(cell, tensors, new, *cotangent, slices, burn_in)
    for label, a, b in zip(NAMES, found, wanted(cell, tensors, new, *cotangent)):
        assert distance(a, b) < 1e-10, label


def test_few_corrections_where_memories_are_usual_and_all_where_they_are_chaotic() -> None:
    cell, tensors, _ = problem("dense_lstm", 1, 512, 1, 16)
    single = [t.float() for t in tensors]
    reference.solve(cell, *single, None, 8, 32, reference.TOLERANCE[torch.bfloat16])
    assert 1 <= reference.last_report.corrections <= 4
    reference.solve(cell, *single, None, 8, 32)
    assert reference.last_report.corrections <= 6 and reference.last_report.residual <= 1e-6
    cell, tensors, _ = problem("dense_lstm", 1, 512, 1, 16, gain=12.0)
    tensors[0][:, :, 0] += 4
    reference.solve(cell, *tensors, None, 4, 32)
    assert reference.last_report.corrections == 3 and reference.last_report.residual == 0  # the walk in order


@pytest.mark.parametrize("last_only", [False, True])
def test_small_gradients_are_certified_against_their_own_size(last_only: bool) -> None:
    """The loss scaled by 1e-8, and of the last step alone: every step's gradient is right relative to itself."""
    cell, tensors, _ = problem("dense_lstm", 1, 256, 1, 16)
    d_emitted, d_final = cotangents(tensors)
    d_emitted, d_final = d_emitted * 1e-8, d_final * 0
    if last_only:
        d_emitted[:, :-1] = 0
    exact = wanted(cell, tensors, None, d_emitted, d_final)[2]
    single = [t.float() for t in tensors]
    found = sliced(cell, single, None, d_emitted.float(), d_final.float(), 8, 16)[2]
    for t in range(0, 256, 16):
        assert distance(found[:, t], exact[:, t]) < 2e-4, t


def test_a_document_that_is_not_finite_leaves_the_others_alone() -> None:
    cell, tensors, _ = problem("dense_lstm", 1, 80, 1, 16)
    starts = torch.zeros(1, 80, dtype=torch.bool)
    starts[0, [30, 50]] = True
    d_emitted, d_final = cotangents(tensors)
    clean = sliced(cell, tensors, starts, d_emitted, d_final, 4, 16)
    tensors[0][0, 35] = torch.nan
    found = sliced(cell, tensors, starts, d_emitted, d_final, 4, 16)
    for i in (0, 2):
        assert torch.equal(found[i][:, :30], clean[i][:, :30]) and torch.equal(found[i][:, 50:], clean[i][:, 50:])
        assert found[i][:, 35:50].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_op_and_one_step(dtype: torch.dtype) -> None:
    cell, tensors, starts = problem("dense_lstm", 2, 12, 2, 16, starts=0.1)
    bias = torch.randn(len(cell.pre), 32, dtype=torch.float64)
    given = [t.to(dtype if i == 0 else torch.promote_types(dtype, torch.float32)).requires_grad_() for i, t in enumerate(tensors)]
    emitted, final = dense_rnn(cell, *(*given, starts), bias_PD=bias.to(given[1].dtype))
    loop, loop_final = dense_rnn(cell, *(*given, starts), bias_PD=bias.to(given[1].dtype), method="sequential")
    assert emitted.dtype == dtype and final.dtype == given[1].dtype
    for a, b in zip(*(torch.autograd.grad(e.double().square().sum() + f.sum(), given) for e, f in ((emitted, final), (loop, loop_final)))):
        assert distance(a, b) < (1e-10 if dtype == torch.float64 else 0.02)
    if dtype == torch.float64:
        assert starts is not None
        h = tensors[3]
        for t in range(12):
            h = dense_rnn_step(cell, tensors[0][:, t], tensors[1], tensors[2], torch.where(starts[:, t, None, None], 0.0, h), bias)
        assert distance(h, final) < 1e-12
        whole = (given[0], given[1].new_zeros(0, 32), given[2], given[3], starts, cell.key, "auto", 0, False)
        for borders in (False, True):
            torch.library.opcheck(op.solve_op, (*whole, borders))


def test_saved_borders_give_the_same_gradients() -> None:
    cell, tensors, starts = problem("slstm", 1, 80, 1, 16, starts=0.05)
    given = [t.requires_grad_() for t in tensors]
    found = []
    for save in ("states", "borders"):
        emitted, final = dense_rnn(cell, *(*given, starts), save=save)
        found.append(torch.autograd.grad(emitted.square().sum() + final.sum(), given))
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_nothing_to_solve_has_gradients_of_zero() -> None:
    cell, tensors, _ = problem("dense_lstm", 1, 3, 1, 16)
    given = [t.requires_grad_() for t in (tensors[0][:, :0].clone(), *tensors[1:])]
    emitted, final = dense_rnn(cell, *given)
    assert emitted.shape == (1, 0, 16) and torch.equal(final, given[3])
    emitted.sum().backward()
    assert given[2].grad is not None and torch.equal(given[2].grad, torch.zeros_like(given[2]))


def test_matrices_are_used_in_one_way() -> None:
    def backwards(x: Pre, R: Mat, h: State) -> tuple[State]:
        return (torch.tanh(x + h @ R),)

    def unused(x: Pre, R: Mat, h: State) -> tuple[State]:
        return (torch.tanh(x + h),)

    def summed(x: Pre, R: Mat, h: State) -> tuple[State]:
        return (torch.tanh(x + R.sum() * h),)

    for step, word in ((backwards, "runs as a loop"), (unused, "does not multiply"), (summed, "another way")):
        assert word in Cell.from_step(step).why_loop
    cell, tensors, _ = problem("dense_lstm", 1, 3, 1, 16)
    with pytest.raises(ValueError, match="takes pre"):
        dense_rnn(cell, tensors[0], tensors[1], tensors[2][:, :8], tensors[3])
    with pytest.raises(ValueError, match="choose one of states, borders"):
        dense_rnn(cell, *tensors, save="nothing")
    with pytest.raises(ValueError, match="choose one of once, halves"):
        dense_rnn(cell, *tensors, precision="double")
    with pytest.raises(ValueError, match="not possible"):
        dense_rnn(Cell.from_step(unused), tensors[0][:, :, :1], tensors[1], tensors[2][:, :, :1], tensors[3][:, :1], method="sliced")


def test_what_is_traced() -> None:
    lstm = trace_dense(problem("dense_lstm", 1, 1, 1, 16)[0])
    assert lstm.levels == ((0,),) and lstm.carried == [(0, 0), (1, 0)]  # the forget gate, and what it makes of the output
    assert all(a is b for a, b in zip(lstm.d_pre, lstm.d_product))
    assert trace_dense(problem("dense_gru_before", 1, 1, 1, 16)[0]).levels == ((0,), (1,))


@pytest.mark.parametrize(("E", "K", "m"), [(6, 32, 2), (5, 32, 1), (8, 16, 4), (6, 16, 2), (3, 48, 1), (4, 64, 1)])
def test_small_heads_are_taken_side_by_side(E: int, K: int, m: int) -> None:
    """Several heads as one make the products of each by itself, and their gradient is read back from its blocks."""
    mat, h = torch.randn(E, K, 2, K), torch.randn(3, E, K)
    wide = launch.joined(mat)
    assert launch.beside(E, K) == m and wide.shape == (E // m, m * K, 2, m * K)
    together = torch.einsum("bek,ekgj->begj", h.view(3, E // m, m * K), wide)
    apart = torch.einsum("bek,ekgj->begj", h, mat)
    assert torch.allclose(together.transpose(1, 2).reshape(3, 2, E * K), apart.transpose(1, 2).reshape(3, 2, E * K), atol=1e-6)
    assert torch.equal(launch.parted(wide, E, K), mat)


@pytest.mark.parametrize("name", ["dense_lstm", "dense_gru", "dense_gru_before", "dense_elman", "slstm"])
def test_what_is_known_before_cotangents_makes_the_same_adjoint(name: str) -> None:
    dense = trace_dense(biased(load_cell(name)))
    known, d_product, rest = apart(dense)
    leaves = {node.arguments[0][0] for node in order(known) if node.op == "var"}
    assert leaves <= set("xwhp") and len(known) <= 9
    arguments, draws, made = [*dense.arguments, *dense.cotangents], torch.Generator().manual_seed(0), dict[str, Any]()
    given = [torch.randn(64, generator=draws, dtype=torch.float64) for _ in arguments]
    names = {node: f"k{i}" for i, node in enumerate(known)}
    late = [*(a for a in arguments if a[0] in "wgq"), *names.values()]
    exec("import torch\n" + function("before", arguments, known, "h0", triton=False), made)
    exec(function("after", late, [*d_product, *rest], "g0", triton=False, given=names), made)
    exec(function("whole", arguments, [*dense.d_product, *dense.d_pre, *dense.d_rec, *dense.d_state], "h0", triton=False), made)
    values = made["before"](*given)
    values = values if len(known) > 1 else (values,)
    found = made["after"](*(v for a, v in zip(arguments, given) if a[0] in "wgq"), *values)
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(found, made["whole"](*given), strict=True))


def test_slstm_is_the_papers() -> None:
    """A step of the paper's equations, with its normaliser and stabiliser, from an empty memory on."""
    cell, (pre, _, mat, _), _ = problem("slstm", 2, 40, 2, 16)
    pre[:, :, 0] *= 5
    state = [torch.zeros(2, 32, dtype=pre.dtype) for _ in range(4)]
    emitted, final = dense_rnn(cell, pre, pre.new_zeros(0, 32), mat, method="sequential")
    for t in range(40):
        c, n, m, h = state
        R = reference.matrices(mat)
        i, log_f = pre[:, t, 0] + R[0] @ h, F.logsigmoid(pre[:, t, 1] + R[1] @ h)
        top = torch.maximum(log_f + m, i) if t else i
        write, keep = torch.exp(i - top), torch.exp(log_f + m - top) if t else torch.zeros_like(m)
        c, n = keep * c + write * torch.tanh(pre[:, t, 2] + R[2] @ h), keep * n + write
        state = [c, n, top, torch.sigmoid(pre[:, t, 3] + R[3] @ h) * c / n]
        assert distance(emitted[:, t], state[3]) < 1e-12
    assert distance(final[:, 0], state[1].log() + state[2]) < 1e-12 and distance(final[:, 1], state[0] / state[1]) < 1e-12


def test_logarithms_are_certified_by_their_difference() -> None:
    """Of a logarithm near 200, a share of 2^-8 would be a factor of two in what it stands for."""
    cell, (pre, rec, mat, h0), _ = problem("slstm", 2, 512, 1, 16, gain=0.5)
    pre[:, :, 0] += 200
    pre[:, :, 1] += 5
    h0[:, 0] += 200
    exact = reference.sequential(cell, pre, rec, mat, h0, None)[0]
    solved = reference.solve(cell, pre, rec, mat, h0, None, slices=8, burn_in=0, tolerance=2.0**-8)
    assert reference.last_report.residual <= 2.0**-8
    assert (solved - exact)[:, :, 0].abs().max() < 0.02
    assert reference.certified_size(cell, exact[:, 0], 2.0**-8)[:, 0].eq(1).all()
    assert torch.equal(reference.certified_size(cell, exact[:, 0], 2.0**-18)[:, 0], exact[:, 0, 0])
