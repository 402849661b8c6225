"""Runs the Triton kernels of dense heads in its interpreter and compares them with the float64 loop. Its own process: the interpreter is chosen
when Triton is imported. `python -m tests.kernels.interpreted_dense_rnn`"""

from __future__ import annotations

import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402

from kernels.dense_rnn import launch, marks, op, ranks, reference, source  # noqa: E402
from kernels.dense_rnn.launch import Plan  # noqa: E402
from kernels.parallel_rnn import with_bias  # noqa: E402
from kernels.parallel_rnn.cell import biased  # noqa: E402
from kernels.parallel_rnn.op import joined  # noqa: E402
from tests.kernels.dense_rnn_cases import check_gradient_of_matrices, check_walked, cotangents, distance, known_cells, problem, wanted  # noqa: E402
from tests.kernels.interpreter import patch_once  # noqa: E402

NAMES = ("emitted", "final", "pre", "rec", "mat", "h0")


def compare(
    label: str, problem_: Any, slices: int, burn_in: int, dtype: torch.dtype = torch.float32, bias: bool = True, blocks: int = 0
) -> dict[str, float]:
    """blocks: in how many inputs lie, as a block-diagonal projection makes them."""
    cell, tensors, starts = problem_
    if bias:
        cell, tensors[1] = biased(cell), with_bias(tensors[1], torch.randn(len(cell.pre), tensors[0].shape[3], dtype=torch.float64))
    d_emitted, d_final = cotangents(tensors)
    given = [t.to(dtype if i in (0, 2) else torch.float32) for i, t in enumerate(tensors)]
    low, flat = d_emitted.to(dtype), given[0]
    if blocks:
        given[0] = flat.unflatten(3, (blocks, -1)).permute(3, 0, 1, 2, 4).contiguous().permute(1, 2, 3, 0, 4)
    plan = Plan.of(given[0], given[2].shape[1], slices, burn_in)
    launch.last_report()
    emitted, kept, final = launch.forward(cell, *(*given, starts, plan))
    gradients = list(launch.backward(cell, *(*given, starts, emitted, kept, low, None, d_final.float(), plan)))
    given[0], gradients[0] = flat, gradients[0].flatten(3) if blocks else gradients[0]
    report = launch.last_report()
    limits = (1e-5, 1e-4) if dtype == torch.float32 else (3e-3, 5e-3) if dtype == torch.float16 else (1e-2, 2e-2)
    for i, (name, a, b) in enumerate(zip(NAMES, (emitted, final, *gradients), wanted(cell, given, starts, low, d_final.float()))):
        error = distance(a, b)
        print(label, name, f"{error:.1e}")
        assert a.shape == b.shape and error < limits[i > 1], f"{label}: {name} is off by {error:.1e}"
    return report


def halves() -> None:
    """States and adjoints of fp16 in two halves are those of fp32, of matrices of fp16; what is stored in fp16 is rounded once."""
    for name in ("dense_lstm", "dense_gru_before"):
        cell, tensors, starts = problem(name, 1, 24, 1, 16, starts=0.05)
        given = [t.half() if i in (0, 2) else t.float() for i, t in enumerate(tensors)]
        d_emitted, d_final = (t.float() for t in cotangents(tensors))
        plan = Plan.of(given[0], 16, 3, 4)
        emitted, kept, final = launch.forward(cell, *(*given, starts, plan, None, True))
        gradients = launch.backward(cell, *(*given, starts, emitted, kept, d_emitted, None, d_final, plan, None, True))
        exact = wanted(cell, given, starts, d_emitted, d_final)
        assert emitted.dtype == torch.float32 and gradients[0].dtype == torch.float16
        for label, limit, a, b in zip(NAMES, (2e-6, 2e-6, 4e-4, 1e-3, 4e-4, 1e-5), (emitted, final, *gradients), exact):
            print("halves", name, label, f"{distance(a, b):.1e}")
            assert distance(a, b) < limit, (name, label, distance(a, b))


def either_tile() -> None:
    """Programs of eight rows and of sixteen, whose values lie the other way round, give the same bits."""
    for name, dtype in (("dense_lstm", torch.float32), ("slstm", torch.float16), ("dense_gru_before", torch.float16)):
        cell, tensors, starts = problem(name, 3, 20, 1, 16, starts=0.05)
        given = [t.to(dtype) if i in (0, 2) else t.float() for i, t in enumerate(tensors)]
        d_emitted, d_final = (t.float() for t in cotangents(tensors))
        found = []
        for rows in (launch.FEW_ROWS, launch.ROWS):
            plan = Plan.of(given[0], 16, 2, 4, rows, 2)
            emitted, kept, final = launch.forward(cell, *(*given, starts, plan))
            found.append(
                [emitted, kept, final, *launch.backward(cell, *(*given, starts, emitted, kept, d_emitted.to(dtype), None, d_final, plan))]
            )
        assert all(torch.equal(a, b) for a, b in zip(*found)), name


def halves_through_the_op() -> None:
    cell, tensors, starts = problem("dense_lstm", 1, 12, 1, 16)
    given = [(t.half() if i in (0, 2) else t.float()).requires_grad_() for i, t in enumerate(tensors)]
    d_emitted, d_final = (t.float() for t in cotangents(tensors))
    emitted, _, final = op.solve(*given, starts, cell.key, "triton", 0, True, False)
    d_h0 = torch.autograd.grad((emitted * d_emitted).sum() + (final * d_final).sum(), given[3])[0]
    exact = wanted(cell, given, starts, d_emitted, d_final)
    assert distance(emitted.detach(), exact[0]) < 2e-6 and distance(d_h0, exact[5]) < 1e-5


def restored() -> None:
    """Kept states made again from the borders are those that were there, bit for bit, where slices stand and where they were walked in order."""
    before, shortest, launch.CORRECTIONS, launch.SHORTEST = launch.CORRECTIONS, launch.SHORTEST, {2: 1, 4: 1}, 7
    for gain in (1.0, 12.0):
        cell, tensors, starts = problem("dense_lstm", 2, 28, 1, 16, gain=gain, starts=0.02, seed=3)
        tensors[0][:, :, 0] += 4 * (gain > 1)
        given = [t.float() for t in tensors]
        for n in (1, 4):
            plan = Plan.of(given[0], 16, n, 4)
            emitted, kept, final = launch.forward(cell, *(*given, starts, plan))
            same, saved, last = marks.forward_with_marks(cell, *(*given, starts, plan))
            again = marks.restore(cell, *(*given, starts, saved, plan))
            assert torch.equal(emitted, same) and torch.equal(final, last) and torch.equal(kept, again), (gain, n)
            assert gain == 1.0 or n == 1 or (saved[:, -1] < n).any()
    launch.CORRECTIONS, launch.SHORTEST = before, shortest
    launch.last_report()


def borders() -> None:
    """What ranks exchange, of one slice and of several, as plain torch finds it."""
    for name, T, counts in (("dense_lstm", 48, (1, 3)), ("dense_elman", 7, (1,)), ("slstm", 9, (1,))):
        cell, tensors, starts = problem(name, 2, T, 1, 16, starts=0.05, seed=2)
        given, (d_emitted, d_final) = [t.float() for t in tensors], [t.float() for t in cotangents(tensors)]
        for n in counts:
            plan = Plan.of(given[0], 16, n, 4)
            emitted, kept, _, P, size = launch.forward_with_border(cell, *(*given, starts, plan))
            states = joined(emitted, kept)
            *_, near = launch.backward_with_border(cell, *(*given, starts, emitted, kept, d_emitted, None, d_final, plan))
            d_states = joined(d_emitted, torch.zeros_like(kept))
            wanted_ = (
                *ranks.border(cell, *(*given, starts, states)),
                reference.backward_with_border(cell, *(*given, starts, states, d_states, d_final))[4],
            )
            assert all(torch.allclose(a, b, rtol=2e-3, atol=1e-5) for a, b in zip((P, size, near), wanted_)), (name, n)


def joined_again() -> None:
    """Walks of corrected slices end where they have come back to the ones before, forwards and backwards; not where they shall be made again bit for
    bit, nor where every bit counts; and a slice that joined is walked again where a head is walked in order."""
    cell, tensors, starts = problem("slstm", 1, 56, 1, 16)
    given, joins, before = [t.half() if i in (0, 2) else t.float() for i, t in enumerate(tensors)], launch.Problem.joins, source.LOOK
    found: list[torch.Tensor] = []

    def noting(self: launch.Problem, todo: torch.Tensor, wanted: bool) -> Any:
        made = joins(self, todo, wanted)
        found.append(made[0][1])
        return made

    source.LOOK, launch.Problem.joins = 4, noting  # type: ignore[method-assign]
    compare("joined", (cell, tensors, starts), 2, 0, torch.float16, bias=False)
    assert [int(where.sum()) > 0 for where in found] == [True, True], found
    marks.forward_with_marks(cell, *(*given, starts, Plan.of(given[0], 16, 2, 0)))
    assert not found[-1].any()
    one = launch.forward(cell, *(*given, starts, Plan.of(given[0], 16, 1)))
    kept, reference.TOLERANCE[torch.float16] = reference.TOLERANCE[torch.float16], 2.0**-30
    several = launch.forward(cell, *(*given, starts, Plan.of(given[0], 16, 2, 0)))
    reference.TOLERANCE[torch.float16] = kept
    assert all(torch.equal(a, b) for a, b in zip(one, several))
    source.LOOK, launch.Problem.joins = before, joins  # type: ignore[method-assign]
    launch.last_report()


def measured() -> None:
    """Sizes near the ends of slices, of which the last piece is shorter than what is measured, are those of the states that were stored; near the first
    step, of the adjoint, those that plain torch finds."""
    before, source.LOOK, launch.NEAR, reference.NEAR = (source.LOOK, launch.NEAR), 4, 3, 3
    cell, tensors, starts = problem("slstm", 2, 26, 1, 16, starts=0.1, seed=4)
    assert starts is not None
    given = [t.float() for t in tensors]
    emitted, kept, _, _, nearby, *_ = launch.solved(cell, *(*given, starts, Plan.of(given[0], 16, 3, 0), None))
    states = joined(emitted, kept).abs()
    for s in range(2):
        whole = torch.zeros_like(states[:, 0])
        for t in range(9 * s + 6, 9 * s + 9):
            whole = torch.maximum(whole.masked_fill(starts[:, t, None, None], 0), states[:, t])
        assert torch.equal(nearby[:, s], whole), s
    d_emitted, d_final = (t.float() for t in cotangents(tensors))
    for n in (1, 3):
        *_, near = launch.backward_with_border(
            cell, *(*given, starts, emitted, kept, d_emitted, None, d_final, Plan.of(given[0], 16, n, 0))
        )
        d_states = joined(d_emitted, torch.zeros_like(kept))
        exact = reference.backward_with_border(cell, *(*given, starts, joined(emitted, kept), d_states, d_final))[4]
        assert torch.allclose(near, exact, rtol=2e-3, atol=1e-5), n
    (source.LOOK, launch.NEAR), reference.NEAR = before, before[1]
    launch.last_report()


def walked() -> None:
    check_walked(launch, (2, 28, 1, 16), lambda cell, pre: [Plan.of(pre, 16, n, 4) for n in (1, 4)])


def through_the_op() -> None:
    """Inputs laid out as a block-diagonal projection makes them, a gradient of the kept states, and results that repeat bit for bit."""
    cell, tensors, starts = problem("dense_lstm", 1, 20, 2, 16, starts=0.1)
    pre, rec, mat, h0 = (t.float() for t in tensors)
    blocks = pre.unflatten(3, (4, 8)).permute(3, 0, 1, 2, 4).contiguous().permute(1, 2, 3, 0, 4)
    made = []
    for x, method in ((blocks, "triton"), (blocks, "triton"), (pre, "sliced")):
        given = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, rec, mat, h0)]
        emitted, kept, final = op.solve(*given, starts, cell.key, method, 0, False, False)
        gradients = torch.autograd.grad((emitted**2).sum() + kept.cos().sum() + final.sum(), given)
        made.append([emitted, kept, final, *(g.flatten(3) if g.dim() == 5 else g for g in gradients)])
    assert all(torch.equal(a, b) for a, b in zip(made[0], made[1]))
    assert all(distance(a, b) < 1e-5 for a, b in zip(made[0], made[2]))


def gradients_of_matrices() -> None:
    """Several pieces, the last one short, of steps and heads that fill no tile; and a matrix that multiplies two operands, each in the order of all
    matrices, whose gradient is the sum of both."""
    cases = [("slstm", (3, 67, 2, 24), 2), ("dense_gru", (1, 130, 2, 16), 0), ("dense_gru_before", (2, 70, 1, 16), 1)]
    for name, sizes, blocks in (*cases, ("shared_matrix", (1, 9, 1, 16), 0)):
        check_gradient_of_matrices(name, sizes, torch.float16, blocks, "cpu", 1e-5)


def main() -> None:
    patch_once()
    compare("filled up", problem("dense_lstm", 2, 12, 2, 16, starts=0.1), 1, 0)
    launch.NARROWEST = 16  # for the interpreter's speed alone
    compare("heads of 24", problem("dense_lstm", 1, 22, 1, 24, starts=0.08), 3, 3)
    report = compare("bf16", problem("dense_lstm", 2, 24, 1, 16), 2, 8, torch.bfloat16)
    assert report["heads"] == 2 and report["walked"] == 0, report
    compare("fp16", problem("dense_lstm", 1, 24, 1, 16, starts=0.05), 2, 4, torch.float16)
    for name in known_cells():  # two levels of products, no diagonal at all, one matrix for two operands
        if name != "dense_lstm":
            compare(name, problem(name, 1, 21, 1, 16, starts=0.08), 2, 6, bias=name != "dense_elman")
    for name, E, blocks in (("slstm", 4, 2), ("dense_gru_before", 2, 2)):  # cotangents of products that lie as gradients of inputs
        compare(f"{name} in blocks", problem(name, 1, 9, E, 16, starts=0.08), 2, 4, torch.float16, blocks=blocks)
    either_tile()
    before, launch.TWICE = launch.TWICE, 16  # as of heads whose matrices fit once only
    for name in ("dense_lstm", "dense_gru_before"):
        compare(f"{name} from products", problem(name, 1, 13, 1, 16, starts=0.08), 2, 4)
    launch.TWICE = before
    gradients_of_matrices()
    borders()
    restored()
    joined_again()
    measured()
    halves()
    halves_through_the_op()
    walked()
    through_the_op()
    print("ok")


if __name__ == "__main__":
    main()
