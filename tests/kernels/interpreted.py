"""Runs every kernel of one cell in Triton's interpreter and compares it with the float64 loop. Its own process: the interpreter is
chosen when Triton is imported. `python -m tests.kernels.interpreted shared paragru` (shared: what does not depend on a cell, too)"""

from __future__ import annotations

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402

from kernels.parallel_rnn import launch, op, reference  # noqa: E402
from kernels.parallel_rnn import trace as trace_module  # noqa: E402
from kernels.parallel_rnn.cell import Cell, Pre, State, biased  # noqa: E402
from kernels.parallel_rnn.trace import trace  # noqa: E402
from tests.kernels.interpreter import patch_once  # noqa: E402
from tests.kernels.test_parallel_rnn import cells, problem  # noqa: E402

# one, two and three states; the other cells differ in their step alone, which generated cells try in more ways
CURVED = {"paragru": (-3.0, 0.4), "paralstm": (3.0, 0.1)}  # gate and recurrent weights of memories longer than a slice
EVERY_SIZE = ("paragru", "paralstm", "three")


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b).abs().max() / (1 + b.abs().max())).item() if a.numel() else 0.0


def check(name: str) -> None:
    torch.manual_seed(0)
    cell = next(c for c in cells() if c.name == name)
    sizes = (
        (13, 5, 3, 0.5, 0.15, torch.float32, 3),
        (18, 17, 4, 8.0, 0.0, torch.float32, 0),  # not converged: must be walked in order
        (1, 5, 1, 0.5, 0.0, torch.float32, 3),
        (32, 16, 4, 0.5, 0.1, torch.float32, 3),  # whole groups and tiles: no masks
        (18, 5, 4, 0.5, 0.0, torch.float32, 4),
        (10, 5, 2, 0.5, 0.0, torch.float16, 3),
    )
    for T, D, slices, weight, resets, dtype, corrections in sizes if name in EVERY_SIZE else sizes[:2]:
        launch.CORRECTIONS = launch.CORRECTIONS_FINE = corrections
        torch.manual_seed(T)
        pre, rec, h0, starts = problem(cell, 1 if weight > 1 else 2, T, D, weight, resets=resets)
        pre = pre.to(dtype).double()
        leaves = [x.float().double().requires_grad_() for x in (pre, rec, h0)]
        states, final = reference.sequential(cell, *(*leaves, starts))
        d_states, d_final = torch.randn_like(states), torch.randn_like(final)
        wanted = torch.autograd.grad((states * d_states).sum() + (final * d_final).sum(), leaves, allow_unused=True)
        rounding = [0.0] * 3
        if weight > 1:  # an unstable recurrence amplifies the rounding of its states: the loop in fp32 then says how much
            rough = [x.detach().float().requires_grad_() for x in leaves]
            loop, end = reference.sequential(cell, *(*rough, starts))
            rough_gradients = torch.autograd.grad((loop * d_states.float()).sum() + (end * d_final.float()).sum(), rough, allow_unused=True)
            rounding = [0.0 if b is None else gap(a, b) for a, b in zip(rough_gradients, wanted)]
        inputs = [
            leaves[0].detach().to(dtype).transpose(1, 2).contiguous().transpose(1, 2),
            *(x.detach().float() for x in leaves[1:]),
            starts,
        ]
        launch.last_report()
        emitted, kept, end, marks = launch.forward(cell, *inputs, slices=slices, borders=True)
        report, got = launch.last_report(), op.joined(emitted, kept)
        d_emitted, d_kept = op.parts(d_states.to(dtype))
        gradients = launch.backward(cell, *(*inputs, emitted, kept, d_emitted, d_kept, d_final.float()), slices=slices)
        low = dtype != torch.float32
        case = f"{name} T={T} slices={slices} weight={weight} {dtype}"
        assert got.dtype == dtype and gap(got, states) < (1e-3 if low else 1e-5), f"{case}: states {gap(got, states):.1e}"
        assert gap(end, final) < (1e-3 if low else 1e-5), f"{case}: final {gap(end, final):.1e}"
        for label, a, b, error in zip(("pre", "rec", "h0"), gradients, wanted, rounding):
            if b is not None:
                assert gap(a, b) < (1e-2 if low else 1e-4) + 4 * error, f"{case}: d {label} {gap(a, b):.1e}, loop {error:.1e}"
        again = op.joined(*launch.restore(cell, *(*inputs, marks)))
        assert gap(again, got.double()) < (1e-4 if low else 1e-5), f"{case}: states from marks {gap(again, got.double()):.1e}"
        start, total, left = launch.adjoint(cell, *(*inputs, emitted, kept, *op.parts(d_states.to(dtype))))
        (wanted_start,) = torch.autograd.grad((reference.sequential(cell, *(*leaves, starts))[0] * d_states).sum(), leaves[2:])
        assert gap(start, wanted_start) < (1e-2 if low else 1e-3 if weight > 1 else 1e-4), (
            f"{case}: adjoint of the states alone {gap(start, wanted_start):.1e}"
        )
        before = reference.previous(got.double(), leaves[2], starts).detach()
        J = reference.jacobian(cell, inputs[0].double(), leaves[1].detach(), before, starts)
        if len(cell.state) == 1:  # else a bound that is not the same in slices
            assert gap(left, reference.remainder(J[:, None], before[:, None])[:, 0]) < 1e-4, f"{case}: what is left of earlier states"
        assert gap(total, reference.product(J[:, None])[:, 0]) < 1e-4, f"{case}: product of Jacobians"
        if corrections == 0 and not trace(cell).linear:
            assert report["sequential"] > 0, report
        if corrections == 4:
            assert report["sequential"] == 0 and report["residual"] < 1e-6, report
        print(case, report)
    one = launch.step(cell, inputs[0][:, 0], inputs[1], inputs[2])
    assert gap(one, states[:, 0]) < 1e-3
    heads(cell)


def at_once(cell: Cell) -> None:
    """Small problems in one launch: odd sizes, resets, marks, and no Newton steps at all."""
    for T, D, weight, resets, dtype, shots in (
        (1, 5, 0.5, 0.0, torch.float32, 8),
        (16, 16, 0.5, 0.0, torch.float32, 8),  # whole rows and tiles: no masks
        (33, 5, 0.5, 0.1, torch.float32, 8),
        (18, 17, 8.0, 0.0, torch.float32, 0),  # each slice from the end of the one before it, in turn
        (10, 5, 0.5, 0.0, torch.float16, 8),
    ):
        launch.SHOTS = shots
        torch.manual_seed(T)
        pre, rec, h0, starts = problem(cell, 2, T, D, weight, resets=resets)
        pre = pre.to(dtype)
        states, final = reference.sequential(cell, pre.double(), rec, h0, starts)
        inputs = pre[:, :, :, None], rec.float(), h0.float(), starts
        launch.last_report()
        emitted, kept, end, marks = launch.shoot(cell, launch.ShootPlan(inputs[0], len(cell.state), True), *inputs, borders=True)
        report, allowed, case = (
            launch.last_report(),
            1e-3 if dtype == torch.float16 else 1e-5,
            f"{cell.name} at once T={T} weight={weight} {dtype}",
        )
        assert gap(op.joined(emitted, kept), states) < allowed and gap(end, final) < allowed, case
        again = op.joined(*launch.restore(cell, pre, *inputs[1:], marks))
        assert gap(again, op.joined(emitted, kept).double()) < allowed, f"{case}: states from marks"
        assert (
            all(
                torch.equal(a, b)
                for a, b in zip(launch.shoot(cell, launch.ShootPlan(inputs[0], len(cell.state), False), *inputs)[:3], (emitted, kept, end))
            )
            or T > 16
        ), f"{case}: without marks"
        assert report["residual"] <= 1e-5 and (report["sequential"] > 0) == (shots == 0), (case, report)
        assert not trace(cell).linear or shots == 0 or report["corrections"] <= 2, (case, report)
    launch.SHOTS = 8
    long = inputs[0].repeat(1, 13, 1, 1, 1)  # as many steps as a problem needs to be solved so by itself
    assert torch.equal(
        launch.forward(cell, long, *inputs[1:])[2], launch.shoot(cell, launch.ShootPlan(long, len(cell.state), False), long, *inputs[1:])[2]
    )


def heads(cell: Cell) -> None:
    """Inputs in the layout of a block-diagonal projection, with a bias inside, one gradient for the emitted states alone."""
    cell = biased(cell)
    P, (B, T, E, K) = len(cell.pre), (1, 8, 3, 16)
    g = torch.Generator().manual_seed(3)
    pre = torch.randn(E, B, T, P, K, generator=g).permute(1, 2, 3, 0, 4)
    rec, h0 = (torch.rand(n, E * K, generator=g) - 0.5 for n in (len(cell.rec), len(cell.state)))
    leaves = [x.double().requires_grad_() for x in (pre.flatten(3), rec, h0[None])]
    states, _ = reference.sequential(cell, *(*leaves, None))
    d = torch.randn(B, T, E * K, generator=g)
    wanted = torch.autograd.grad((states[:, :, -1] * d).sum(), leaves)
    emitted, kept, final, _ = launch.forward(cell, pre, rec, h0[None], None, slices=2)
    gradients = launch.backward(cell, pre, rec, h0[None], None, emitted, kept, d, None, torch.zeros_like(final), slices=2)
    assert gap(emitted, states[:, :, -1]) < 1e-5 and gradients[0].stride() == pre.stride()
    for a, b in zip((gradients[0].flatten(3), *gradients[1:]), wanted):
        assert gap(a, b) < 1e-4


def curved(name: str, gate: float, weight: float) -> None:
    """Memories longer than a slice: with the second order the first correction leaves a fraction of what Newton's leaves, and what is returned is right
    either way. gate: added to the first input projection, which keeps the state."""
    cell, left = next(c for c in cells() if c.name == name), []
    pre, rec, h0, _ = problem(cell, 1, 32, 16, weight)
    pre[:, :, 0] += gate
    pre, rec, h0 = pre.float(), rec.float(), 0.1 * torch.sign(h0).float()
    states, _ = reference.sequential(cell, pre.double(), rec.double(), h0.double(), None)
    trace_module.MOST_CURVED = 2
    trace.cache_clear()
    launch.kernels.cache_clear()
    launch.CORRECTIONS_FINE = 1
    for launch.CURVED in (False, True):
        launch.last_report()
        emitted, kept, _, _ = launch.forward(cell, pre, rec, h0, None, slices=4)
        assert gap(op.joined(emitted, kept), states) < 1e-6
        left.append(launch.last_report()["residual"])
    trace_module.MOST_CURVED = 1
    trace.cache_clear()
    launch.kernels.cache_clear()
    assert left[1] < 0.3 * left[0], left


def longer_groups() -> None:
    """Tiles of four and eight steps, as on a GPU, with and without masks."""
    cell = next(c for c in cells() if c.name == "paragru")
    for ahead, T, D in ((8, 27, 5), (4, 32, 16)):
        launch.AHEAD_SMALL = launch.MARK_SMALL = ahead
        pre, rec, h0, starts = problem(cell, 2, T, D, 0.5, resets=0.1)
        exact = [x.float().double() for x in (pre, rec, h0)]
        states, _ = reference.sequential(cell, *(*exact, starts))
        emitted, kept, _, _ = launch.forward(cell, pre.float(), rec.float(), h0.float(), starts, slices=2)
        assert gap(op.joined(emitted, kept), states) < 1e-5
    launch.AHEAD_SMALL, launch.MARK_SMALL = 2, 4


def scaled(a: Pre, x: Pre, h: State) -> tuple[torch.Tensor, ...]:
    return (a * h + x,)


def adjoints_that_return() -> None:
    """An adjoint from a later slice dies to 1e-9 within a slice, far below the tolerance, and grows again."""
    cell = Cell.from_step(scaled)
    T, D, slices = 48, 5, 3
    pre = torch.randn(1, T, 2, D, generator=torch.Generator().manual_seed(1))
    pre[:, :, 0] = 1.0
    pre[:, 20:23, 0], pre[:, 17:20, 0] = 1e-3, 1e3  # backwards: first the small ones
    rec, h0 = torch.zeros(0, D), torch.zeros(1, 1, D)
    leaves = [x.double().requires_grad_() for x in (pre, h0)]
    states, final = reference.sequential(cell, leaves[0], rec.double(), leaves[1], None)
    wanted = torch.autograd.grad(final.sum(), leaves)
    emitted, kept = op.parts(states.detach().float())
    got = launch.backward(cell, pre, rec, h0, None, emitted, kept, torch.zeros(1, T, D), None, torch.ones(1, 1, D), slices=slices)
    assert ((got[0] - wanted[0]).abs() <= 1e-5 * wanted[0].abs()).all(), (got[0] / wanted[0])[0, :, 1]
    assert gap(got[2], wanted[1]) < 1e-5


def beside(pre: torch.Tensor, d: torch.Tensor, starts: torch.Tensor | None = None, last: float = 1.0) -> None:
    """Gradients of h = a h + x, of cotangents d of the states and `last` of the last one, over three slices: each within 1e-5 of itself, and
    finite where it is in the fp32 loop."""
    cell, (_, _, _, D) = Cell.from_step(scaled), pre.shape
    rec, h0 = torch.zeros(0, D), torch.ones(1, 1, D)

    def by_loop(dtype: torch.dtype) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        leaves = [x.to(dtype).requires_grad_() for x in (pre, h0)]
        states, final = reference.sequential(cell, leaves[0], rec.to(dtype), leaves[1], starts)
        return states.detach().float(), torch.autograd.grad((states[:, :, 0] * d).sum() + last * final.sum(), leaves)

    (states, wanted), (_, rough) = by_loop(torch.float64), by_loop(torch.float32)
    got = launch.backward(cell, pre, rec, h0, starts, *op.parts(states), d, None, torch.full((1, 1, D), last), slices=3)
    for a, b, loop in zip((got[0], got[2]), wanted, rough):
        assert torch.equal(torch.isfinite(a), torch.isfinite(loop))
        assert ((a - b).abs() <= 1e-5 * b.abs())[torch.isfinite(loop)].all(), (a, b)


def adjoints_beside_large_ones() -> None:
    """What a later slice passes down is 1e-9 of an adjoint that begins below it: small beside that one, and all there is above it, where the
    states are as much larger, and so are the gates' gradients."""
    pre, d = torch.zeros(1, 48, 2, 5), torch.zeros(1, 48, 5)
    pre[:, :, 0], pre[:, 29:32, 0], pre[:, 18, 1], d[:, 17] = 1.0, 1e-3, 1e9, 1.0
    beside(pre, d)
    beside(torch.ones(1, 48, 2, 5), 0.0 * d, last=1e-32)


def adjoints_that_overflow() -> None:
    """Nothing is small beside an adjoint that overflows: what a later slice passes down is there above it, whether or not a document begins."""
    pre, d, starts = torch.ones(1, 48, 2, 5), torch.zeros(1, 48, 5), torch.zeros(1, 48, dtype=torch.bool)
    pre[:, 17, 0], d[:, 17], starts[:, 15] = 1e3, 1e37, True
    beside(pre, d)
    beside(pre, d, starts)


def walks_that_meet() -> None:
    """A forgetful recurrence: each slice is mended for a few stretches only, and keeps the rest of its first walk; of small states as of large."""
    cell = Cell.from_step(scaled)
    for decay, size in ((0.01, 1.0), (0.6, 1.0), (0.6, 1e-9)):
        pre = size * torch.randn(2, 93, 2, 6, generator=torch.Generator().manual_seed(2))
        pre[:, :, 0] = decay
        rec, h0 = torch.zeros(0, 6), torch.full((2, 1, 6), size)
        states, final = reference.sequential(cell, pre.double(), rec.double(), h0.double(), None)
        emitted, _, end, _ = launch.forward(cell, pre, rec, h0, None, slices=3)
        assert (
            gap(emitted / size, states[:, :, -1] / size) < 1e-5
            and gap(end / size, final / size) < 1e-5
            and launch.last_report()["sequential"] == 0
        )


def rectified(a: Pre, x: Pre, h: State) -> tuple[torch.Tensor, ...]:
    return (torch.relu(a * h) + x,)


def walks_at_a_kink() -> None:
    """The first walk of the second slice stays at zero, where relu has no slope; the true state, 1e-8 at its start, grows to 0.05 there."""
    cell = Cell.from_step(rectified)
    pre = torch.zeros(1, 64, 2, 5)
    pre[:, :32, 0], pre[:, 32:, 0], pre[:, 60:, 1] = 1.0, 1.6, 1.0
    rec, h0 = torch.zeros(0, 5), torch.full((1, 1, 5), 1e-8)
    states, _ = reference.sequential(cell, pre.double(), rec.double(), h0.double(), None)
    emitted, *_ = launch.forward(cell, pre, rec, h0, None, slices=2)
    assert ((emitted - states[:, :, -1]).abs() <= 1e-5 * states[:, :, -1].abs()).all()


def not_a_number_is_passed_on() -> None:
    """A gradient that is not a number reaches every earlier step, the weights and h0, as in the loop; one of zero changes nothing."""
    cell = next(c for c in cells() if c.name == "paragru")
    pre, rec, h0, _ = (None if x is None else x.float() for x in problem(cell, 1, 24, 5, 0.5))
    emitted, kept, final, _ = launch.forward(cell, pre, rec, h0, None, slices=3)
    d, d_final = torch.zeros(1, 24, 5), torch.zeros_like(final)
    d[0, -1, 2] = float("nan")
    d_pre, d_rec, d_h0 = launch.backward(cell, pre, rec, h0, None, emitted, kept, d, None, d_final, slices=3)
    assert d_pre[..., 2].isnan().all() and d_rec[:, 2].isnan().all() and d_h0[..., 2].isnan().all()
    others = [0, 1, 3, 4]
    assert not d_pre[..., others].any() and not d_rec[:, others].any() and not d_h0[..., others].any()


def layouts_and_sizes() -> None:
    """Odd layouts get gradients in the layout of torch.empty_like; more stretches between marks than a launch may have; no d_emitted."""
    cell = next(c for c in cells() if c.name == "three")
    pre, rec, h0 = (x.float() for x in problem(cell, 2, 21, 6, 0.5)[:3])
    plain = launch.forward(cell, pre, rec, h0, None, slices=2, borders=True)
    d, d_kept = torch.randn_like(plain[0]), torch.randn_like(plain[1])
    wanted = launch.backward(cell, pre, rec, h0, None, *plain[:2], d, d_kept, torch.zeros_like(plain[2]), slices=2)
    strided = pre.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)  # channels are not neighbours
    for odd in (strided, pre[:1].expand(2, -1, -1, -1)):
        same = launch.forward(cell, odd.contiguous(), rec, h0, None, slices=2)
        got = launch.forward(cell, odd, rec, h0, None, slices=2)
        assert all(torch.equal(a, b) for a, b in zip(got[:3], same[:3]))
        g = launch.backward(cell, odd, rec, h0, None, *got[:2], d, d_kept, torch.zeros_like(got[2]), slices=2)[0]
        assert g.stride() == torch.empty_like(odd).stride()
        if odd is strided:
            assert torch.equal(g, wanted[0])
    launch.MOST_SLICES = 4
    assert all(gap(a, b.double()) < 1e-5 for a, b in zip(launch.restore(cell, pre, rec, h0, None, plain[3]), plain[:2]))
    start, *_ = launch.adjoint(cell, pre, rec, h0, None, *plain[:2], None, d_kept)
    assert gap(start, launch.adjoint(cell, pre, rec, h0, None, *plain[:2], torch.zeros_like(d), d_kept)[0].double()) == 0 and start.any()
    with torch.inference_mode():
        launch._stats.clear()
        launch.forward(cell, pre, rec, h0, None, slices=2)
    assert launch.last_report()["tiles"] == 2


def patched_as_plain() -> None:
    """What tests/kernels/interpreter.py leaves out changes no bit: a walk, corrections, a scan over slices, and the backward pass."""
    cell = next(c for c in cells() if c.name == "paralstm")
    pre, rec, h0, starts = problem(cell, 1, 10, 5, resets=0.1)
    inputs = pre.float(), rec.float(), h0.float(), starts

    def run() -> tuple[torch.Tensor, ...]:
        emitted, kept, final, _ = solved = launch.forward(cell, *inputs, slices=2)
        gradients = launch.backward(cell, *inputs, emitted, kept, emitted, kept, final, slices=2)
        plan = launch.ShootPlan(inputs[0][:, :, :, None], len(cell.state), False)
        return *solved, *gradients, *launch.shoot(cell, plan, inputs[0][:, :, :, None], *inputs[1:])

    plain = run()
    patch_once()
    assert all(torch.equal(a, b) for a, b in zip(run(), plain))


if __name__ == "__main__":
    words = sys.argv[1:]
    if "shared" not in words:
        patch_once()
    else:  # what does not depend on the cell, once
        words.remove("shared")
        patched_as_plain()
        adjoints_that_return()
        adjoints_beside_large_ones()
        adjoints_that_overflow()
        walks_that_meet()
        walks_at_a_kink()
        not_a_number_is_passed_on()
        layouts_and_sizes()
    for cell_name in words:
        check(cell_name)
        at_once(next(c for c in cells() if c.name == cell_name))
        if cell_name == "paragru":
            longer_groups()
        if cell_name in CURVED:
            curved(cell_name, *CURVED[cell_name])
    print("ok")
