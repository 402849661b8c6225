"""Composed maps by the Triton kernels in its interpreter. Its own process: the interpreter is chosen when Triton is imported.
`python -m tests.kernels.interpreted_automata`"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402

from kernels.dense_rnn import launch  # noqa: E402
from kernels.dense_rnn.automata import forward  # noqa: E402
from kernels.dense_rnn.dictionary import Dictionary  # noqa: E402
from models.cells import load_cell  # noqa: E402
from scripts.bench.trackers import size, tracker  # noqa: E402
from tests.kernels.dense_rnn_cases import problem  # noqa: E402
from tests.kernels.interpreter import patch_once  # noqa: E402


def main() -> None:
    patch_once()
    for name, cell_name, dtype, heads, with_starts in (
        ("S3", "dense_gru", torch.bfloat16, 2, False),
        ("S3", "dense_elman", torch.float32, 1, True),
        ("mod-5", "dense_elman", torch.float16, 1, False),
    ):
        cell, K = load_cell(cell_name), size(name)[0]
        T = 28
        pre, rec, mat, h0 = tracker(name, cell, 2, T, heads, dtype)
        starts = (torch.arange(T) == 13).expand(2, T) if with_starts else None
        walk = launch.forward(cell, pre, rec, mat, h0, starts, launch.Plan.of(pre, K, 1))
        dictionary = Dictionary(heads, K, 1, K)
        seen, *_ = launch.forward(cell, *tracker(name, cell, 1, 8 * K, heads, dtype, seed=3), None)
        seen = torch.cat([seen[0, 4:, None].float(), walk[0][0, :, None].float()])
        dictionary.learn(seen)
        *solved, bad = forward(cell, pre, rec, mat, h0, starts, dictionary.states, 4, settle=2, repeats=1)
        assert all(torch.equal(a, b) for a, b in zip(solved, walk)), (name, cell_name)
        assert (bad == 4).all(), (name, bad)
    # no automaton: what is not certified is walked in order
    cell, tensors, _ = problem("dense_lstm", 1, 28, 1, 16, gain=12.0, seed=3)
    pre, rec, mat, h0 = (t.float() for t in tensors)
    walk = launch.forward(cell, pre, rec, mat, h0, None, launch.Plan.of(pre, 16, 1))
    dictionary = Dictionary(1, 3, 2, 16)
    dictionary.learn(torch.randn(9, 2, 16))
    *solved, bad = forward(cell, pre, rec, mat, h0, None, dictionary.states, 4, settle=2, repeats=1)
    assert all(torch.equal(a, b) for a, b in zip(solved, walk)) and (bad < 4).all()


if __name__ == "__main__":
    main()
