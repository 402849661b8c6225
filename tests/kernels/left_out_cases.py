"""Steps of training whose update leaves itself out, on any device: run in Triton's interpreter and on a GPU."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from models.init import tag
from training.optim import SkippableAdamW
from training.optim.clip import norm_ahead
from training.optim.muon import MuonWithAdamW

KINDS = ("adamw", "muon")
LIMIT = 1e-35  # so small that norms of 1e4 are above it by more than fp32 holds


def _made(kind: str, device: str) -> tuple[nn.ParameterDict, SkippableAdamW | MuonWithAdamW]:
    torch.manual_seed(3)
    model = nn.ParameterDict({"a": nn.Parameter(torch.randn(16, 12)), "b": nn.Parameter(torch.randn(16, 12))})
    model["c"] = tag(nn.Parameter(torch.randn(24, 12)), splits=[16, 8])
    model["d"] = tag(nn.Parameter(torch.randn(7)), "no_decay")
    model.to(device)
    rates: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    if kind == "adamw":
        return model, SkippableAdamW(model.parameters(), fused=True, **rates)
    return model, MuonWithAdamW(model, muon_lr=2e-2, **rates)


def _state(model: nn.ParameterDict, optimizer: SkippableAdamW | MuonWithAdamW) -> list[Tensor]:
    """Copies of weights, moments, counts of steps and momenta."""
    momenta = [stack.momentum for stack in optimizer.stacks] if isinstance(optimizer, MuonWithAdamW) else []
    beside = [t for p in model.parameters() for t in (p.detach(), *optimizer.state.get(p, {}).values())]
    return [t.clone() for t in (*beside, *momenta)]


def _step(
    model: nn.ParameterDict, optimizer: SkippableAdamW | MuonWithAdamW, seed: int, loss: float, limit: float, size: float = 1.0
) -> float:
    """A step as training/engine.py makes it where the device decides; returns the norm that the host reads."""
    draws = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = (size * torch.randn(p.shape, generator=draws)).to(p.device)
    told = torch.tensor(loss, dtype=torch.float64, device=model["a"].device)
    norm = norm_ahead(model.parameters(), optimizer, limit, told)
    assert norm is not None, "no kernel takes them"
    optimizer.prepare()
    assert optimizer.leaves_out or not seed
    optimizer.step()
    return float(norm)


BAD = ((math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf))  # (loss, factor of the gradients)


def a_step_leaves_itself_out(kind: str, device: str, limits: tuple[float, ...] = (0.0, 0.5), bad: Any = BAD) -> None:
    """Of a loss or gradients that are not finite: weights, moments and counts stay bit for bit, and the next steps are those of a run without it."""
    for limit in limits:
        for loss, size in bad:
            (one, ours), (two, other) = _made(kind, device), _made(kind, device)
            for seed in range(4):
                if seed == 2:
                    before = _state(one, ours)
                    norm = _step(one, ours, 9, loss, limit, size)
                    assert math.isfinite(norm) == math.isfinite(size)
                    assert all(torch.equal(a, b) for a, b in zip(before, _state(one, ours), strict=True)), (kind, limit, loss, size)
                _step(one, ours, seed, 2.0, limit)
                _step(two, other, seed, 2.0, limit)
            states = _state(one, ours), _state(two, other)
            assert all(torch.equal(a, b) for a, b in zip(*states, strict=True)), (kind, limit, loss, size)
            assert not all(torch.equal(a, b) for a, b in zip(before, states[0]))


def a_step_is_made_whose_divisor_would_overflow(kind: str, device: str) -> None:
    """Where loss and norm are finite the host counts a step as made: above fp32's range too."""
    for loss, limit, size in ((2.0, LIMIT, 1e4), (1e300, 0.0, 1.0), (1e300, 0.5, 1.0)):
        model, optimizer = _made(kind, device)
        for seed in range(3):
            before = _state(model, optimizer)
            assert math.isfinite(_step(model, optimizer, seed, loss, limit, size))
        counts = [float(s["step"]) for s in optimizer.state.values()]
        assert counts and set(counts) == {3.0}, (kind, loss, limit, counts)
        after = _state(model, optimizer)
        assert all(bool(t.isfinite().all()) for t in after) and not torch.equal(before[0], after[0])
