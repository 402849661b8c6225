"""Runs the decoding step of Mamba-2 in Triton's interpreter and compares it with the recurrence and the convolution written out in float64.
Its own process: the interpreter is chosen when Triton is imported. `python -m tests.kernels.interpreted_mamba2_step`"""

from __future__ import annotations

import math
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402

from kernels.mamba2_step import mamba2_step  # noqa: E402
from kernels.mamba2_step.op import step_op  # noqa: E402
from tests.kernels.decoding_steps import check_step  # noqa: E402
from tests.kernels.interpreter import patch_once  # noqa: E402
from tests.kernels.mamba2_step_cases import CASES, Sizes, problem, written_out  # noqa: E402


def check(sizes: Sizes, dtype: torch.dtype, resets: bool, low: float, high: float) -> None:
    arguments = problem(sizes, dtype, resets, low, high)
    check_step(mamba2_step, arguments, written_out(*arguments), 7, ("y", "past", "ssm"), 2e-6, (sizes, dtype))


def forgotten() -> None:
    """A document that starts forgets a state and a past that are not finite; a step size that is NaN stays one, limits or not."""
    arguments = problem((3, 4, 5, 6, 2, 4), torch.float32, True, 0.1, 10.0)
    arguments[8] = torch.tensor([True, False, True])
    wanted = mamba2_step(*arguments)
    arguments[1][[0, 2]], arguments[7][[0, 2]] = torch.nan, torch.inf
    assert all(torch.equal(a, b) for a, b in zip(mamba2_step(*arguments), wanted))
    arguments[0][1, -1] = torch.nan  # the last head's step size
    y, _, ssm = mamba2_step(*arguments)
    assert y.view(3, 4, 5)[1, 3].isnan().all() and ssm[1, 3].isnan().all() and ssm[1, :3].isfinite().all()


if __name__ == "__main__":
    patch_once()
    torch.manual_seed(0)
    for case in CASES:
        check(*case)
    forgotten()
    given = problem((2, 4, 3, 5, 2, 4), torch.float32, True)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(step_op, (*given[:9], torch.empty_like(given[7]), given[9], 0.0, math.inf), test_utils=tests)
    print("ok")
