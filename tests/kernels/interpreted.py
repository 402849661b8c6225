"""Runs every kernel of one cell in Triton's interpreter and compares it with the float64 loop. Its own process: the interpreter is
chosen when Triton is imported. `python tests/kernels/interpreted.py paragru`"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import torch  # noqa: E402
from test_parallel_rnn import cells, problem  # noqa: E402

from kernels.parallel_rnn import launch, reference  # noqa: E402
from kernels.parallel_rnn.trace import trace  # noqa: E402


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b).abs().max() / (1 + b.abs().max())).item() if a.numel() else 0.0


def check(name: str) -> None:
    cell = next(c for c in cells() if c.name == name)
    for T, slices, weight, resets, dtype, burn, corrections in (
        (1, 1, 0.5, 0.0, torch.float32, 64, 2),
        (13, 3, 0.5, 0.15, torch.float32, 2, 2),
        (9, 4, 8.0, 0.0, torch.float32, 0, 0),  # not converged: must be walked in order
        (9, 4, 0.5, 0.0, torch.float32, 0, 3),
        (6, 2, 0.5, 0.0, torch.float16, 0, 2),
    ):
        launch.BURN_IN, launch.CORRECTIONS = burn, corrections
        D = 17 if weight > 1 else 5
        pre, rec, h0, starts = problem(cell, 1 if weight > 1 else 2, T, D, weight, resets=resets)
        pre = pre.to(dtype).double()
        leaves = [x.float().double().requires_grad_() for x in (pre, rec, h0)]
        states, final = reference.sequential(cell, *leaves, starts)
        d_states, d_final = torch.randn_like(states), torch.randn_like(final)
        wanted = torch.autograd.grad((states * d_states).sum() + (final * d_final).sum(), leaves, allow_unused=True)
        inputs = [leaves[0].detach().to(dtype).transpose(1, 2).contiguous().transpose(1, 2), *(x.detach().float() for x in leaves[1:]), starts]
        got, end = launch.forward(cell, *inputs, slices=slices)
        gradients = launch.backward(cell, *inputs, got, d_states.to(dtype), d_final.float(), slices=slices)
        low = dtype != torch.float32
        case = f"{name} T={T} slices={slices} weight={weight} {dtype}"
        assert got.dtype == dtype and gap(got, states) < (1e-3 if low else 1e-5), f"{case}: states {gap(got, states):.1e}"
        assert gap(end, final) < (1e-3 if low else 1e-5), f"{case}: final {gap(end, final):.1e}"
        for label, a, b in zip(("pre", "rec", "h0"), gradients, wanted):
            if b is not None:
                assert gap(a, b) < (1e-2 if low else 1e-4), f"{case}: d {label} {gap(a, b):.1e}"
        report = launch.last_report()
        if corrections == 0 and not trace(cell).linear:
            assert report["sequential"] > 0, report
        if corrections == 3:
            assert report["sequential"] == 0 and report["residual"] < 1e-6, report
        print(case, report)
    one = launch.step(cell, inputs[0][:, 0], inputs[1], inputs[2])
    assert gap(one, states[:, 0]) < 1e-3


if __name__ == "__main__":
    for cell_name in sys.argv[1:]:
        check(cell_name)
    print("ok")
