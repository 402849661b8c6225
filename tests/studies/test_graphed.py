"""A step captured as a CUDA graph gives what the same step gives when it is called; without a GPU it is called."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from scripts.studies.cells import Cell, settings_of
from scripts.studies.graphed import WARMUP, GraphedStep, Rate
from training.optim import build_optimizer

VALUES = {"layers": 1, "length": 32, "batch": 8, "steps": 100}


def trained(device: torch.device, graphed: bool, calls: int = 12) -> tuple[list[float], list[Tensor], GraphedStep]:
    """Losses and weights of a small network after steps with a falling rate."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).to(device)
    optimizer = build_optimizer(model, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    rate = Rate(optimizer, device)

    def run(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        optimizer.zero_grad(set_to_none=True)
        loss = (model(x) - y).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return (loss.detach(),)

    step = GraphedStep(run, device)
    if not graphed:
        step.why_not = "told so"
    x, losses = torch.randn(calls, 5, 8, device=device), []
    for i in range(calls):
        rate.set(1e-2 / (i + 1))
        losses.append(float(step(x[i], x[i, :, :1])[0]))
    return losses, [p.detach().cpu() for p in model.parameters()], step


def test_on_a_cpu_the_step_is_an_ordinary_call() -> None:
    losses, weights, step = trained(torch.device("cpu"), True)
    plain, expected, _ = trained(torch.device("cpu"), False)
    assert losses == plain and all(torch.equal(a, b) for a, b in zip(weights, expected)) and step.why_not == "there is no GPU"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_gives_what_calls_give() -> None:
    device = torch.device("cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        losses, weights, step = trained(device, True)
        plain, expected, _ = trained(device, False)
    assert step.graph is not None and step.calls > WARMUP
    assert losses == pytest.approx(plain, rel=1e-5)
    for a, b in zip(weights, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="was called with"):
        step(torch.ones(1, 8, device=device), torch.ones(1, 1, device=device))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mixer", ["paragru", "paralstm", "mamba2", "transformer", "delta_2"])
def test_the_tables_steps_are_captured(mixer: str) -> None:
    runs = []
    for graphed in (True, False):
        cell = Cell(settings_of("S3", mixer, VALUES), 0, torch.device("cuda"))
        with cell.trainer.here():
            step = cell.step_of(32)
        step.why_not = "" if graphed else "told so"
        cell.burst(32, 1e-3, 20)
        runs.append(cell.mean_loss(20))
        assert (step.graph is not None) == graphed
    assert runs[0] == pytest.approx(runs[1], rel=1e-3)
