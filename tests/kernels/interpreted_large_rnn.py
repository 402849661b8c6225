"""Runs the Triton kernels of large dense heads in its interpreter, phase by phase, and compares them with the float64 loop. Its own process: the
interpreter is chosen when Triton is imported. `python -m tests.kernels.interpreted_large_rnn --all`"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from kernels.dense_rnn import dense_rnn, large, launch, op, ranks, reference  # noqa: E402
from kernels.dense_rnn.large import Plan, Tiles  # noqa: E402
from kernels.parallel_rnn import with_bias  # noqa: E402
from kernels.parallel_rnn.cell import biased  # noqa: E402
from models.cells import load_cell  # noqa: E402
from tests.kernels.dense_rnn_cases import check_walked, cotangents, distance, known_cells, problem, wanted  # noqa: E402
from tests.kernels.interpreter import far_apart, patch_once  # noqa: E402

NAMES = ("emitted", "final", "pre", "rec", "mat", "h0")
TEAMS = 1  # side by side: of as many programs as have cores to run on
LIMITS = {torch.float32: (1e-5, 1e-4), torch.float16: (3e-3, 5e-3), torch.bfloat16: (1e-2, 2e-2)}


def compare(
    label: str,
    problem_: Any,
    slices: int,
    burn_in: int,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    held: bool = False,
) -> dict[str, float]:
    """held: by matrices that stay on chip."""
    cell, tensors, starts = problem_
    if bias:
        cell, tensors[1] = biased(cell), with_bias(tensors[1], torch.randn(len(cell.pre), tensors[0].shape[3], dtype=torch.float64))
    d_emitted, d_final = cotangents(tensors)
    given = [t.to(dtype if i in (0, 2) else torch.float32) for i, t in enumerate(tensors)]
    low = d_emitted.to(dtype)
    K = given[2].shape[1]
    tiles = Tiles.on_chip(cell, given[0], K) if held else None
    assert tiles is None or tiles.held and tiles.held_back == (dtype == torch.bfloat16)
    plan = Plan.of(cell, given[0], K, slices, burn_in, tiles)
    launch.last_report()
    emitted, kept, final = large.forward(cell, *(*given, starts, plan))
    gradients = large.backward(cell, *(*given, starts, emitted, kept, low, None, d_final.float(), plan))
    report = launch.last_report()
    for i, (name, a, b) in enumerate(zip(NAMES, (emitted, final, *gradients), wanted(cell, given, starts, low, d_final.float()))):
        error = distance(a, b)
        print(label, name, f"{error:.1e}")
        assert a.shape == b.shape and error < LIMITS[dtype][i > 1], f"{label}: {name} is off by {error:.1e}"
    return report


def walked() -> None:
    check_walked(large, (1, 8, 1, 24), lambda cell, pre: [Plan.of(cell, pre, 24, n, 1) for n in (1, 3)])


def held_walks_in_order() -> None:
    """Matrices that expand, in bf16: what is walked in order has the bits of one slice, forwards and backwards."""
    before, launch.CORRECTIONS = launch.CORRECTIONS, {2: 1, 4: 1}
    cell, tensors, starts = problem("dense_lstm", 1, 8, 1, 24, gain=12.0, starts=0.02, seed=3)
    d_emitted, d_final = cotangents(tensors)
    given = [t.to(torch.bfloat16 if i in (0, 2) else torch.float32) for i, t in enumerate(tensors)]
    tiles, made = Tiles.on_chip(cell, given[0], 24), []
    launch.last_report()
    for slices in (1, 4):
        plan = Plan.of(cell, given[0], 24, slices, 1, tiles)
        emitted, kept, final = large.forward(cell, *(*given, starts, plan))
        ends = (emitted, kept, d_emitted.bfloat16(), None, d_final.float())
        made.append([emitted, kept, final, *large.backward(cell, *(*given, starts, *ends, plan))])
    assert all(torch.equal(a, b) for a, b in zip(made[0][:4], made[1][:4])), "not walked alike"
    assert all(distance(a, b) < 1e-5 for a, b in zip(*made)), [distance(a, b) for a, b in zip(*made)]
    report = launch.last_report()
    assert report["walked"] > 0.1 and report["walked_backward"] > 0.1, report
    launch.CORRECTIONS = before


def as_program(program: int, programs: int) -> None:
    """This process runs that program of a launch alone."""
    builder = interpreter.interpreter_builder
    place, grid = builder.set_grid_idx, builder.set_grid_dim
    builder.set_grid_idx, builder.set_grid_dim = lambda *_: place(program, 0, 0), lambda *_: grid(programs, 1, 1)
    interpreter.GridExecutor._restore_args_dev = lambda *_: None  # they are what the others write to


def side_by_side(self: Any, name: str, tensors: tuple[Any, ...], first: bool = False, finish: bool = False) -> None:
    """`_Problem.walk` as on a GPU: a whole pass in one launch, each program in a process of its own, in memory that all of them share."""
    kernel, at, plan = getattr(self.module, f"{name}_held"), self.at, self.plan
    counter, groups = self.counters[self.passes], self.groups_finish if finish else self.groups
    self.passes += 1
    for t in (*tensors, counter):
        if isinstance(t, torch.Tensor):
            t.share_memory_()
    sizes = (self.T, plan.length, plan.slices, self.B, self.RT, at.batch, at.time, at.projection, at.se, plan.burn_in)
    constants = {**self.constants, "FIRST": first, "FINISH": finish, "MODE": -2}
    teams = min(groups, TEAMS)
    given, children = (*tensors, counter, -plan.burn_in if first else 0, teams, *sizes), []
    for program in range(teams * self.programs):
        children.append(os.fork())
        if children[-1] == 0:
            as_program(program, teams * self.programs)
            kernel[(1,)](*given, **constants)
            os._exit(0)
    for _ in children:
        if os.wait()[1]:  # the others would wait for it
            for child in children:
                os.kill(child, signal.SIGKILL)
            raise RuntimeError(f"A program of {name} failed.")


def held_side_by_side(name: str = "dense_lstm", seed: int = 4) -> None:
    """Programs that meet at barriers have the bits of those that come one after the other, in every pass of a solve."""
    cell, tensors, starts = problem(name, 7, 6, 1, 24, starts=0.2, seed=seed)
    d_emitted, d_final = cotangents(tensors)
    given, made, before = [t.to(torch.bfloat16 if i in (0, 2) else torch.float32) for i, t in enumerate(tensors)], [], large._Problem.walk
    solve: Any = large._Problem
    plan = Plan.of(cell, given[0], 24, 3, 1, Tiles.on_chip(cell, given[0], 24))
    for walk in (before, side_by_side):
        solve.walk = walk
        emitted, kept, final = large.forward(cell, *(*given, starts, plan))
        ends = (emitted, kept, d_emitted.bfloat16(), None, d_final.float())
        made.append([emitted, kept, final, *large.backward(cell, *(*given, starts, *ends, plan))])
    solve.walk = before
    assert all(torch.equal(a, b) for a, b in zip(*made))


def through_the_op() -> None:
    """The op takes them where a head is too large for the other kernels: inputs laid out as a block-diagonal projection makes them, a gradient of
    the kept states, and results that repeat bit for bit, also of states that are made again."""
    before, launch.LARGEST = launch.LARGEST, {2: 16, 4: 16}
    cell, tensors, starts = problem("dense_lstm", 1, 3, 1, 32, starts=0.1)
    pre, rec, mat, h0 = (t.float() for t in tensors)
    assert op.use_triton(cell, pre, 32, "triton") and not op.use_triton(cell, pre, 32, "auto", halves=True)
    try:
        op.use_triton(cell, pre, 32, "triton", halves=True)
    except ValueError as refused:
        assert "two halves" in str(refused)
    else:
        raise AssertionError("Large heads were said to have all kernels that small ones have.")
    blocks = pre.unflatten(3, (4, 8)).permute(3, 0, 1, 2, 4).contiguous().permute(1, 2, 3, 0, 4)
    made = []
    for x, method in ((blocks, "triton"), (blocks, "triton"), (pre, "sliced")):
        given = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, rec, mat, h0)]
        emitted, kept, final = op.solve(*given, starts, cell.key, method, 0, False, False)
        gradients = torch.autograd.grad((emitted**2).sum() + kept.cos().sum() + final.sum(), given)
        made.append([emitted, kept, final, *(g.flatten(3) if g.dim() == 5 else g for g in gradients)])
    assert all(torch.equal(a, b) for a, b in zip(made[0], made[1]))
    assert all(distance(a, b) < 1e-5 for a, b in zip(made[0], made[2]))
    again = []
    for save in ("states", "borders"):
        given = [t.detach().requires_grad_() for t in (pre, rec, mat, h0)]
        emitted, final = dense_rnn(cell, *(*given, starts), method="triton", save=save)
        again.append([emitted, final, *torch.autograd.grad((emitted**2).sum() + final.sum(), given)])
    assert all(torch.equal(a, b) for a, b in zip(*again))
    launch.LARGEST = before


def solved(held: bool, dtype: torch.dtype, given: list[Any], starts: Any, d_emitted: Any, d_final: Any) -> list[Any]:
    """Emitted and final states and all gradients of an LSTM over two slices."""
    cell, K = load_cell("dense_lstm"), given[2].shape[1]
    given = [t.to(dtype if i in (0, 2) else torch.float32) for i, t in enumerate(given)]
    plan = Plan.of(cell, given[0], K, 2, 1, Tiles.on_chip(cell, given[0], K) if held else None)
    emitted, kept, final = large.forward(cell, *(*given, starts, plan))
    return [emitted, final, *large.backward(cell, *(*given, starts, emitted, kept, d_emitted.to(dtype), None, d_final.float(), plan))]


def border() -> None:
    """What ranks exchange of the adjoint, of one slice and of several, as plain torch finds it; and ranks ask for it."""
    cell, tensors, starts = problem("dense_gru", 2, 5, 1, 16, starts=0.1, seed=2)
    given, (d_emitted, d_final) = [t.float() for t in tensors], [t.float() for t in cotangents(tensors)]
    before, large.NEAR, reference.NEAR = (large.NEAR, launch.LARGEST, op.use_triton), 2, 2
    launch.LARGEST = {4: 8}
    for n in (2, 1):
        plan = Plan.of(cell, given[0], 16, n, 1)
        emitted, kept, _ = large.forward(cell, *(*given, starts, plan))
        made = large.backward_with_border(cell, *(*given, starts, emitted, kept, d_emitted, None, d_final, plan))
        wanted_ = reference.backward_with_border(cell, *(*given, starts, emitted[:, :, None], d_emitted[:, :, None], d_final))[4]
        assert torch.allclose(made[4], wanted_, rtol=1e-4, atol=1e-5), n
    vars(op)["use_triton"] = lambda *_: True
    found = ranks._back(cell, *(*given, starts, emitted, kept, d_emitted, d_final, 0))
    assert len(found) == len(made) and all(torch.equal(a, b) for a, b in zip(found, made))
    large.NEAR, launch.LARGEST, vars(op)["use_triton"] = before
    reference.NEAR = before[0]
    launch.last_report()


def not_finite() -> None:
    """A document that is not finite leaves the results and the gradients of the others as they are, to the bit."""
    cell, tensors, _ = problem("dense_lstm", 2, 4, 1, 16)
    starts = torch.zeros(2, 4, dtype=torch.bool)
    starts[:, [1, 3]] = True
    cotangent, before, launch.CORRECTIONS = cotangents(tensors), launch.CORRECTIONS, {2: 1, 4: 1}
    for held, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        clean = solved(held, dtype, tensors, starts, *cotangent)
        spoilt = [tensors[0].clone(), *tensors[1:]]
        spoilt[0][0, 2, 1, 3] = torch.nan
        found = solved(held, dtype, spoilt, starts, *cotangent)
        for i in (0, 2):
            assert torch.equal(found[i][:, [0, 3]], clean[i][:, [0, 3]]) and torch.equal(found[i][1], clean[i][1]), (held, NAMES[i])
            assert found[i][0, 2].isnan().any(), (held, NAMES[i])
        assert torch.equal(found[1], clean[1]) and torch.equal(found[5], clean[5]), held
    launch.CORRECTIONS = before
    launch.last_report()


def small_losses() -> None:
    """Gradients of a loss of 1e-8, at the final states alone or over all steps, are as right as of any. In fp16 those that are stored in it hold less
    than that, and adjoints that enter products are scaled first: what reaches the first states is right all the same."""
    for held, dtype, scales in (
        (False, torch.float32, (1e-8, 1e-8)),
        (False, torch.float16, (0.0, 1e-8)),
        (True, torch.bfloat16, (0.0, 1e-8)),
    ):
        cell, tensors, starts = problem("dense_lstm", 1, 6, 1, 16, starts=0.1, seed=7)
        d_emitted, d_final = (scale * t for scale, t in zip(scales, cotangents(tensors)))
        given = [t.to(dtype).double() if i in (0, 2) else t for i, t in enumerate(tensors)]
        found = solved(held, dtype, tensors, starts, d_emitted, d_final)
        exact = wanted(cell, given, starts, d_emitted.to(dtype), d_final.float())
        for i, (name, a, b) in enumerate(zip(NAMES, found, exact)):
            if dtype != torch.float16 or name == "h0":
                assert distance(a, b) < LIMITS[dtype][i > 1], f"{dtype}, {scales}: {name} is off by {distance(a, b):.1e}"
    launch.last_report()


def long_rows() -> None:
    """Inputs whose steps lie far apart, as those of a wide layer and many tokens do."""
    cell, tensors, _ = problem("dense_gru", 1, 3, 1, 16)
    emitted = torch.zeros(1, 3, 16, dtype=torch.float16)
    given = [tensors[0].half(), *(t.float() for t in tensors[1:])]
    for tiles in (None, Tiles.on_chip(cell, given[0], 16)):
        plan, made = Plan.of(cell, given[0], 16, 1, tiles=tiles), []
        for pre in (given[0], far_apart(given[0])):
            ends = (emitted, torch.zeros(1, 3, 0, 16), emitted + 1, None, given[3])
            states = large.forward(cell, *(pre, *given[1:], None, plan))
            made.append([*states, *large.backward(cell, *(pre, *given[1:], None, *ends, plan))])
        assert all(torch.equal(a, b) for a, b in zip(*made)), tiles


def registered() -> None:
    """The op with these kernels under opcheck, which traces it too; autocast and activation checkpointing give the bits of the plain call."""
    before, launch.LARGEST = launch.LARGEST, {2: 8, 4: 8}
    cell, tensors, starts = problem("dense_elman", 1, 2, 1, 16, starts=0.4)
    given = [t.float().requires_grad_() for t in tensors]
    torch.library.opcheck(op.solve_op, (*given, starts, cell.key, "triton", 0, False, False))

    def run(*tensors_: Any) -> Any:
        return dense_rnn(cell, *(*tensors_, starts), method="triton")

    def answers(function: Any) -> list[Any]:
        emitted, final = function(*given)
        return [emitted, final, *torch.autograd.grad(emitted.square().sum() + final.sum(), given)]

    with torch.autocast("cpu", torch.bfloat16):
        cast = answers(run)
    again = answers(lambda *tensors_: checkpoint(run, *tensors_, use_reentrant=False))
    plain = answers(run)
    assert all(torch.equal(a, b) for found in (cast, again) for a, b in zip(found, plain))
    launch.LARGEST = before


def main() -> None:
    patch_once()
    compare("one slice", problem("dense_lstm", 1, 3, 2, 16, starts=0.3), 1, 0)
    report = compare("heads of 24", problem("dense_lstm", 1, 8, 1, 24, starts=0.15), 3, 2)
    assert report["heads"] == 1 and report["heads_backward"] == 1, report
    report = compare("bf16", problem("dense_lstm", 2, 10, 1, 16), 2, 5, torch.bfloat16)
    assert report["walked"] == 0, report
    compare("fp16", problem("dense_lstm", 1, 4, 1, 24, starts=0.2), 2, 1, torch.float16)
    compare("held", problem("dense_lstm", 2, 6, 2, 16, starts=0.3), 3, 1, torch.bfloat16, held=True)
    compare("held, in two tiles", problem("dense_gru", 1, 4, 1, 72, starts=0.2), 2, 1, torch.bfloat16, held=True)
    held_walks_in_order()
    held_side_by_side()
    # two levels of products; with --all also one matrix for two operands, no diagonal at all, a weight beside the product, four states
    for name in known_cells() if "--all" in sys.argv else ("dense_gru_before",):
        if name != "dense_lstm":
            compare(name, problem(name, 1, 6, 1, 24, starts=0.2), 2, 2, bias=name != "dense_elman")
        if "--all" in sys.argv and name in ("dense_lstm", "slstm"):
            compare(f"{name}, held", problem(name, 1, 6, 1, 24, starts=0.2), 2, 2, torch.bfloat16, held=True)
            compare(f"{name}, held", problem(name, 1, 6, 1, 24, starts=0.2), 2, 2, torch.float16, held=True)
            held_side_by_side(name, seed=5)
    walked()
    border()
    not_finite()
    small_losses()
    long_rows()
    through_the_op()
    registered()
    print("ok")


if __name__ == "__main__":
    main()
