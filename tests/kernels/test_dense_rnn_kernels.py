"""The Triton kernels of dense heads without a GPU: their values in the interpreter, and that every one compiles for sm_90."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
from test_triton import run  # noqa: E402


@pytest.mark.slow
def test_every_kernel_in_the_interpreter() -> None:
    assert run("interpreted_dense_rnn.py") == "ok"
