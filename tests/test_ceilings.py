"""What a step's parts are set beside: bytes and products are those that were launched."""

from __future__ import annotations

import pytest
import torch

from scripts.bench.ceilings import Calls, counted, table
from scripts.bench.spans import covered, exposed
from scripts.bench.step_worker import learnt, ours, part_of, peer

CPU = torch.device("cpu")


def test_bytes_and_products_are_counted_once() -> None:
    x, w, y = torch.ones(64, 32), torch.ones(32, 16), torch.empty(64, 32)

    def step() -> None:
        x @ w
        x @ w
        x.view(-1) + 1  # a view moves nothing
        y.copy_(x)
        y.add_(x)

    calls = counted(step)
    assert list(calls.products.values()) == [2]
    size = 64 * 32 * 4
    assert calls.bytes == {"add": 2 * size, "copy_": 2 * size, "add_": 3 * size}


def test_what_is_written_over_is_counted_of_every_tensor() -> None:
    """Fused AdamW reads four tensors and writes three of them, and the gradient too where it divides it."""
    lists = [[torch.ones(100), torch.ones(60)] for _ in range(4)]
    settings = {"lr": 0.1, "beta1": 0.9, "beta2": 0.9, "weight_decay": 0.1, "eps": 1e-8, "amsgrad": False, "maximize": False}
    steps = [torch.ones(()) for _ in range(2)]
    calls = counted(lambda: torch._fused_adamw_(*lists, [], steps, **settings))
    assert calls.bytes == {"_fused_adamw_": 7 * 4 * 160 + 8}
    calls = Calls()
    calls.launched("muon_momentum", {"M": torch.ones(50), "X": torch.ones(50).bfloat16(), "EACH": 50})
    calls.launched("total_squares", {"SIZES": torch.tensor([30, 20]), "OUT": torch.ones(1)})
    x = torch.ones(50)
    calls.launched(
        "backward", {"STREAM": x, "X": x, "SCALE": x, "DX": torch.ones(50)}
    )  # a kernel that has no scale is given another tensor for it
    assert calls.bytes == {"muon_momentum": 50 * (4 + 8 + 2), "total_squares": 16 + 4 + 200, "backward": 400}


def test_a_table_of_a_small_step() -> None:
    model, _, written, _ = ours("transformer-toy", 2, 64, False, False, CPU)
    rows = table(written, {"products": 3.0, "attention": 2.0, "copies and adds": 1.0, "none such": 0.5}, part_of, CPU)["parts"]
    assert [row["part"] for row in rows] == ["products", "attention", "copies and adds", "none such"]
    assert all(row["ceiling_ms"] > 0 for row in rows[:3]) and rows[3]["over"] is None


def test_the_peer_does_the_same_with_and_without_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda model: model)
    losses = []
    for causal in (False, True):
        torch.manual_seed(0)
        losses.append(float(peer("transformer-toy", 2, 64, CPU, causal)[1]()))
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_time_of_nccl_alone_and_of_nothing() -> None:
    spans = [(0.0, 2000.0, "gemm"), (1000.0, 3000.0, "ncclDevKernel_ReduceScatter(x)"), (4000.0, 5000.0, "gemm")]
    made = exposed(spans)
    assert covered(spans) == 4000.0
    assert (made["span_ms"], made["kernels_alone_ms"], made["nccl_ms"], made["nccl_alone_ms"], made["idle_ms"]) == (5.0, 3.0, 2.0, 1.0, 1.0)
    assert made["gaps"] == [(1.0, "ncclDevKernel_ReduceScatter(x)", "gemm")] and made["nccl"] == {"ncclDevKernel_ReduceScatter": 2.0}


def test_a_time_of_steps_that_do_not_learn_is_none() -> None:
    assert learnt([11.0303, 10.6871, 10.44, 10.2231]) == [11.0303, 10.2231]
    for losses in ([11.0303, 10.687, 10.8284, 10.8284], [11.0, 10.7, float("nan"), 10.2], [11.0, 11.0, 11.0, 11.0]):
        with pytest.raises(RuntimeError, match=r"The losses do not fall \(11\.0"):
            learnt(losses)
