"""Runs the scan's Triton kernels in its interpreter and compares them with the float64 loop. Its own process: the interpreter is chosen when
Triton is imported. `python -m tests.kernels.interpreted_ssd`"""

from __future__ import annotations

import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402

from kernels.joint import columns  # noqa: E402
from kernels.ssd import launch, op, ssd  # noqa: E402
from tests.kernels.interpreter import patch_once  # noqa: E402
from tests.kernels.ssd_cases import NAMES, answers, distance, gap, oracle, problem  # noqa: E402

CASES: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((2, 37, 6, 24, 2, 40), {"starts": 0.1}),
    ((1, 1, 2, 16, 1, 16), {}),
    ((1, 7, 3, 8, 1, 5), {"starts": 0.3}),
    ((1, 48, 2, 16, 2, 16), {"decay": 50.0}),
    ((1, 40, 5, 70, 1, 20), {"decay": 0.01}),
    ((2, 37, 3, 16, 1, 72), {"starts": 0.1}),  # wider ones run other kernels
    ((1, 33, 2, 16, 1, 16), {"dtype": torch.bfloat16}),
    ((2, 37, 4, 17, 2, 33), {"dtype": torch.bfloat16, "starts": 0.1}),  # widths that are filled up
    ((1, 33, 2, 16, 1, 16), {"dtype": torch.float16, "starts": 0.1}),
]


def scan(*arguments: Any, D: Any) -> Any:
    return ssd(*arguments, D_H=D)


def check(sizes: tuple[int, ...], options: dict[str, Any], borders: bool = False) -> None:
    tensors, starts = problem(*sizes, **options)
    if borders:  # at the first step, at the border of chunks, just before one, and the last step
        starts = torch.zeros(sizes[:2], dtype=torch.bool)
        starts[0, [0, 16, 31, sizes[1] - 1]] = True
    low = options.get("dtype", torch.float32) != torch.float32
    dy, d_final = torch.randn(tensors[0].shape).to(tensors[0].dtype), torch.randn(tensors[5].shape)
    wanted, computed = oracle(tensors, starts, dy, d_final), answers(scan, tensors, starts, dy, d_final)
    for name, a, b in zip(("y", "final", *(f"d{n}" for n in NAMES)), computed, wanted):
        limit = 1e-2 if low else 1e-5 if name in ("y", "final") else 1e-4
        error = gap(a, b) if name in ("y", "final") or low else distance(a, b)
        print(sizes, options, name, f"{error:.1e}")
        assert a.shape == b.shape and error < limit, f"{sizes} {options}: {name} is off by {error:.1e}"
    again = answers(scan, tensors, starts, dy, d_final)
    assert all(torch.equal(a, b) for a, b in zip(computed, again))


def uneven() -> None:
    """Steps of very different sizes, and fast decays: no gradient loses digits to a large step."""
    for steps, decay in ((20.0, 1.0), (0.1, 1e3)):
        tensors, starts = problem(1, 50, 2, 5, 1, 6, starts=0.05)
        tensors[1] = torch.full_like(tensors[1], 1e-4) if steps > 1 else steps * torch.rand_like(tensors[1])
        tensors[1][:, ::7] = steps
        tensors[2] = -decay * torch.tensor([1.0, 0.5])
        dy, d_final = torch.randn(tensors[0].shape), torch.randn(tensors[5].shape)
        for name, a, b in zip(("y", "final", *NAMES), answers(scan, tensors, starts, dy, d_final), oracle(tensors, starts, dy, d_final)):
            assert distance(a, b) < 5e-6, f"steps of {steps}, decay {decay}: {name} is off by {distance(a, b):.1e}"


def not_finite() -> None:
    """A document leaves the results of the others as they are, in whichever input it is not finite, in a chunk of several and across chunks."""
    for bad, place, cuts in ((0, 20, (18, 22)), (1, 9, (5, 35)), (3, 31, (31, 32)), (4, 20, (18, 22))):
        tensors, _ = problem(2, 40, 2, 5, 1, 6)
        starts = torch.zeros(2, 40, dtype=torch.bool)
        starts[:, list(cuts)] = True
        others = torch.ones(40, dtype=torch.bool)
        others[slice(*cuts)] = False
        wanted = scan(*tensors[:6], starts, D=tensors[6])
        tensors[bad][0, place] = torch.nan if bad % 2 else torch.inf  # the other row as it was
        y, final = scan(*tensors[:6], starts, D=tensors[6])
        torch.testing.assert_close(y[:, others], wanted[0][:, others])
        torch.testing.assert_close(final, wanted[1])
        assert torch.equal(y[1], wanted[0][1]) and not y[0].isfinite().all()
    tensors, _ = problem(1, 40, 2, 5, 1, 6)
    tensors[5][:] = torch.nan  # a carried state, where a document starts at once
    starts = torch.zeros(1, 40, dtype=torch.bool)
    starts[:, 0] = True
    assert all(t.isfinite().all() for t in scan(*tensors[:6], starts, D=tensors[6]))


def without_options() -> None:
    """No h0, no skip; equal to both given as zeros."""
    tensors, _ = problem(1, 20, 2, 16, 1, 16)
    y, final = ssd(*tensors[:5])
    same, end = ssd(*(*tensors[:5], torch.zeros_like(tensors[5]), torch.zeros(1, 20, dtype=torch.bool)), D_H=torch.zeros(2))
    assert torch.equal(y, same) and torch.equal(final, end)


def in_columns() -> None:
    """x, B and C as columns of one tensor, with gradients that come back so: equal to those of tensors of their own, bit for bit, and not copied."""
    tensors, starts = problem(2, 37, 6, 16, 2, 16, starts=0.1)
    x, dt, A, Bm, Cm, h0, D = tensors
    dy, whole = torch.randn(x.shape), torch.cat([x.flatten(2), Bm.flatten(2), Cm.flatten(2)], 2).requires_grad_()
    leaves = [t.clone().requires_grad_() for t in (x, Bm, Cm)]
    wanted = torch.autograd.grad(scan(leaves[0], dt, A, leaves[1], leaves[2], h0, starts, D=D)[0], leaves, dy)
    x, Bm, Cm = (t.unflatten(2, (-1, 16)) for t in columns(whole, [96, 32, 32]))
    copied: list[int] = []
    cat = torch.cat

    def counted(*arguments: Any, **options: Any) -> torch.Tensor:
        copied.append(0)
        return cat(*arguments, **options)

    torch.cat = counted
    (found,) = torch.autograd.grad(scan(x, dt, A, Bm, Cm, h0, starts, D=D)[0], whole, dy)
    torch.cat = cat
    assert not copied and torch.equal(found, torch.cat([t.flatten(2) for t in wanted], 2))


def registered() -> None:
    tensors, starts = problem(1, 19, 2, 16, 1, 16, starts=0.2)
    x, dt, A, Bm, Cm, h0, D = (t.requires_grad_() for t in tensors)
    for skip, begin, new in ((D, h0, starts), (None, None, None)):
        torch.library.opcheck(op.scan_op, (x, dt, A, Bm, Cm, skip, begin, new))
    beside = torch.randn(1, 19, 64, requires_grad=True).split([32, 16, 16], 2)
    parts = (t.unflatten(2, (-1, 16)).detach() for t in beside)
    x, Bm, Cm = (t.as_strided(t.size(), t.stride(), t.storage_offset()) for t in parts)
    with torch.no_grad():
        lies = (torch.randn(x.shape), torch.randn(h0.shape), None, x, dt, A, Bm, Cm, D, h0, starts, x.new_empty(0))
        torch.library.opcheck(torch.ops.everywhen.ssd_backward.default, lies, test_utils=("test_schema", "test_faketensor"))
    with torch.no_grad():
        dy, d_final = torch.randn(x.shape), torch.randn(h0.shape)
        backward_op = torch.ops.everywhen.ssd_backward.default
        given = (dy, d_final, None, x, dt, A, Bm, Cm, D, h0, starts, x.new_empty(0))
        torch.library.opcheck(backward_op, given, test_utils=("test_schema", "test_faketensor"))
    kept_states()


def kept_states() -> None:
    """Gradients with the states that the forward pass has kept, and with those that the backward pass makes again."""
    tensors, starts = problem(2, 35, 4, 16, 1, 16, starts=0.1)
    x, dt, A, Bm, Cm, h0, D = (t.requires_grad_() for t in tensors)
    dy, d_final, found = torch.randn(x.shape), torch.randn(h0.shape), []
    for keep in (True, False):
        y, final, kept = op.scan(x, dt, A, Bm, Cm, D, h0, starts, keep)
        assert kept.shape == (launch.keeps(x, Bm) if keep else (0,))
        found.append((y, final, *torch.autograd.grad((y, final), (x, dt, A, Bm, Cm, D, h0), (dy, d_final))))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert starts is not None
    short = (t[:, :17].detach().requires_grad_() for t in (x, dt, Bm, Cm))
    x, dt, Bm, Cm = short
    torch.library.opcheck(op.scan_op, (x, dt, A, Bm, Cm, D, h0, starts[:, :17], True), test_utils=("test_schema", "test_faketensor"))


if __name__ == "__main__":
    patch_once()
    torch.manual_seed(0)  # a gradient of A is two sums with cancellation: with some draws fp32 is off by more than the limit
    for case in CASES:
        check(*case)
    check((1, 35, 2, 16, 1, 16), {}, borders=True)
    uneven()
    not_finite()
    without_options()
    in_columns()
    registered()
    print("ok")
