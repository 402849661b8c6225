"""Runs the decoding step of the delta rule in Triton's interpreter and compares it with the recurrence and the convolution written out in float64.
Its own process: the interpreter is chosen when Triton is imported. `python -m tests.kernels.interpreted_delta_step`"""

from __future__ import annotations

import os
from functools import partial

os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402

from kernels.delta_step import delta_step  # noqa: E402
from kernels.delta_step.op import step_op  # noqa: E402
from tests.kernels.decoding_steps import check_step  # noqa: E402
from tests.kernels.delta_step_cases import CASES, Sizes, problem, written_out  # noqa: E402
from tests.kernels.interpreter import patch_once  # noqa: E402


def check(sizes: Sizes, dtype: torch.dtype, resets: bool, gated: bool, strength: float) -> None:
    arguments, scale = problem(*sizes, dtype=dtype, resets=resets, gated=gated), sizes[3] ** -0.5
    wanted = written_out(*arguments, strength, scale)
    check_step(partial(delta_step, strength=strength, scale=scale), arguments, wanted, 5, ("o", "past", "delta"), 3e-6, (sizes, dtype))


def forgotten() -> None:
    """A document that starts forgets a state and a past that are not finite; a gate of zero takes all; one that is NaN stays one."""
    given = problem(3, 4, 5, 6, 2, 1, 4, torch.float32, True, True)
    arguments = (*given[:6], torch.tensor([True, False, True]), *given[7:])
    wanted = delta_step(*arguments, 1.0, 1.0)
    arguments[1][[0, 2]], arguments[5][[0, 2]] = torch.nan, torch.inf
    assert all(torch.equal(a, b) for a, b in zip(delta_step(*arguments, 1.0, 1.0), wanted))
    arguments = (*given[:6], None, *given[7:])
    arguments[0][1, -1], arguments[5][1, 3] = torch.inf, torch.inf  # the last head's gate is exp(-inf)
    assert delta_step(*arguments, 1.0, 1.0)[2][1].isfinite().all()
    arguments[0][1, -1] = torch.nan
    o, _, delta = delta_step(*arguments, 1.0, 1.0)
    assert o.view(3, 4, 5)[1, 3].isnan().all() and delta[1, 3].isnan().all() and delta[1, :3].isfinite().all()


if __name__ == "__main__":
    patch_once()
    torch.manual_seed(0)
    for case in CASES:
        check(*case)
    forgotten()
    given = problem(2, 4, 3, 5, 2, 2, 4, dtype=torch.float32, resets=True, gated=True)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(step_op, (*given[:7], torch.empty_like(given[5]), *given[7:], 2.0, 1.0), test_utils=tests)
    print("ok")
