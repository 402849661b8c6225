"""Composed maps chosen by a layer's plan on a GPU: the walk's bits on exact trackers, as called and in a CUDA graph."""

from __future__ import annotations

import pytest
import torch

from kernels.dense_rnn import dense_rnn, launch
from models.cells import load_cell
from scripts.bench.trackers import size, tracker
from tests.kernels.maps_cases import Walked

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)


@pytest.mark.parametrize("name", ["parity", "mod-5", "S3", "S4", "A5"])
def test_trackers_by_a_plan_and_in_a_graph(name: str) -> None:
    T, K = 32768, size(name)[0]
    run = Walked(load_cell("dense_gru"), 1, device="cuda")
    run.maps.status = "looking"

    def solve(given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        return dense_rnn(run.cell, *given, learner=run.layer.number)

    solve(tracker(name, run.cell, 1, T, 1, torch.bfloat16, "cuda", seed=1))
    run.decide()
    assert run.maps.status == "tried"
    given = tracker(name, run.cell, 1, T, 1, torch.bfloat16, "cuda")
    walk = launch.forward(run.cell, *given, None, launch.Plan.of(given[0], K, 1))
    got = solve(given)
    assert torch.equal(got[0], walk[0]) and torch.equal(got[1], walk[2])
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        solve(given)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            replayed = solve(given)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(replayed[0], walk[0]) and torch.equal(replayed[1], walk[2])
    torch.cuda.synchronize()
    counted = run.layer.counters[2:5].tolist()
    assert counted[1] == 0 and counted[2] > counted[0] > 0, counted
    run.decide()
    assert run.maps.status == "on"
