"""Runs the decoding step of M2RNN in Triton's interpreter and compares it with the recurrence and the convolution written out in float64.
Its own process: the interpreter is chosen when Triton is imported. `python -m tests.kernels.interpreted_m2rnn_step`"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402

from kernels.m2rnn_step import m2rnn_step  # noqa: E402
from kernels.m2rnn_step.op import step_op  # noqa: E402
from tests.kernels.decoding_steps import check_step  # noqa: E402
from tests.kernels.interpreter import patch_once  # noqa: E402
from tests.kernels.m2rnn_step_cases import CASES, Sizes, problem, written_out  # noqa: E402


def check(sizes: Sizes, dtype: torch.dtype, resets: bool) -> None:
    arguments = problem(*sizes, dtype=dtype, resets=resets)
    check_step(m2rnn_step, arguments, written_out(*arguments), 7, ("o", "past", "state"), 3e-6, (sizes, dtype))


def forgotten() -> None:
    """A document that starts forgets a state and a past that are not finite; what is not finite stays in its row and head."""
    arguments = problem(3, 2, 5, 4, 1, 4, torch.float32, True)
    starts = torch.tensor([True, False, True])
    arguments = (*arguments[:8], starts, 1)
    wanted = m2rnn_step(*arguments)
    arguments[1][[0, 2]], arguments[7][[0, 2]] = torch.nan, torch.inf
    assert all(torch.equal(a, b) for a, b in zip(m2rnn_step(*arguments), wanted))
    arguments[0][1, -1] = torch.nan  # the last head's gate
    o, _, state = m2rnn_step(*arguments)
    assert o.view(3, 2, 4)[1, 1].isnan().all() and state[1, 1].isnan().all()
    assert state[1, 0].isfinite().all() and o[[0, 2]].isfinite().all()


if __name__ == "__main__":
    patch_once()
    torch.manual_seed(0)
    for case in CASES:
        check(*case)
    forgotten()
    given = problem(2, 4, 3, 5, 2, 4, torch.float32, True)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(step_op, (*given[:9], torch.empty_like(given[7]), given[9]), test_utils=tests)
    print("ok")
