"""Composed maps by the Triton kernels in its interpreter. Its own process: the interpreter is chosen when Triton is imported.
`python -m tests.kernels.interpreted_automata`"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402

from kernels.dense_rnn import dense_rnn, dictionary, launch, maps, reference  # noqa: E402
from kernels.dense_rnn.automata import forward  # noqa: E402
from kernels.dense_rnn.dictionary import Dictionary  # noqa: E402
from models.cells import load_cell  # noqa: E402
from scripts.bench.trackers import TRACKERS, size, tracker  # noqa: E402
from tests.kernels.dense_rnn_cases import problem  # noqa: E402
from tests.kernels.interpreter import patch_once  # noqa: E402
from tests.kernels.maps_cases import Walked  # noqa: E402


def by_plan(name: str, dtype: torch.dtype, T: int) -> None:
    """A layer that looked at words that plain torch walked, and then solves by maps, equals the walk in order bit for bit."""
    run, K = Walked(load_cell("dense_elman"), 1), size(name)[0]
    run.maps.status = "looking"
    words = tracker(name, run.cell, 1, 256, 1, torch.float32, seed=1)
    assert run.maps.in_force(words[0], words[2], 1) is None
    states = reference.sequential(run.cell, *words, None)[0]
    run.maps.leave(states[:, :, -1], states[:, :, :-1])
    run.decide()
    assert run.maps.status == "tried", name
    given = tracker(name, run.cell, 1, T, 1, dtype)
    got, final = dense_rnn(run.cell, *given, method="triton", learner=run.layer.number)
    walk = launch.forward(run.cell, *given, None, launch.Plan.of(given[0], K, 1))
    assert torch.equal(got, walk[0]) and torch.equal(final, walk[2]), name
    heads, walked, slices = run.plans.counters[0, 2:5].tolist()
    assert (heads, walked) == (1, 0) and slices > 1, (name, slices)
    run.decide()
    assert run.maps.status == "on", name


def main() -> None:
    patch_once()
    dictionary.OVERHEAD, dictionary.SHORTEST = 0, 8
    maps.multiprocessors = lambda device: 64  # type: ignore[assignment]
    for name in TRACKERS:
        by_plan(name, torch.bfloat16, 36)
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
        few = Dictionary(heads, K, 1, K)
        seen, *_ = launch.forward(cell, *tracker(name, cell, 1, 8 * K, heads, dtype, seed=3), None)
        seen = torch.cat([seen[0, 4:, None].float(), walk[0][0, :, None].float()])
        few.learn(seen)
        *solved, bad = forward(cell, pre, rec, mat, h0, starts, few.states, 4, settle=2, repeats=1)
        assert all(torch.equal(a, b) for a, b in zip(solved, walk)), (name, cell_name)
        assert (bad == 4).all(), (name, bad)
    # no automaton: what is not certified is walked in order
    cell, tensors, _ = problem("dense_lstm", 1, 28, 1, 16, gain=12.0, seed=3)
    pre, rec, mat, h0 = (t.float() for t in tensors)
    walk = launch.forward(cell, pre, rec, mat, h0, None, launch.Plan.of(pre, 16, 1))
    few = Dictionary(1, 3, 2, 16)
    few.learn(torch.randn(9, 2, 16))
    *solved, bad = forward(cell, pre, rec, mat, h0, None, few.states, 4, settle=2, repeats=1)
    assert all(torch.equal(a, b) for a, b in zip(solved, walk)) and (bad < 4).all()


if __name__ == "__main__":
    main()
