"""Four ranks with a quarter of the time each against one rank with all of it, in float64: outputs, gradients, bytes exchanged. Every file of
configs/mixer is tried, as it stands but smaller, and some others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from models import attend, mixers, parallel, slices
from tests.conftest import ROOT, run_ranks
from tests.mixers import mixer_configs, with_new_mixer

N, D = 4, 16
SMALLER = {"mamba2": {"d_state": 4, "head_dim": 8, "chunk": 5}, "swa": {"window": 6}}
CONFIGS: dict[str, dict[str, Any]] = {name: {**mapping, **SMALLER.get(name, {})} for name, mapping in mixer_configs().items()}
CONFIGS |= {
    "paragru-bare": {"type": "rnn", "cell": "paragru", "gate": False, "norm": False, "d_conv": 0, "n_heads": 2},
    "mamba2-groups": {"type": "mamba2", "d_state": 4, "head_dim": 8, "n_groups": 2, "chunk": 5},
    "dense-gru-before": {"type": "rnn", "cell": "dense_gru_before", "head_size": 8},
    "delta-groups": {"type": "delta", "n_heads": 4, "n_k_heads": 2, "expand_v": 1.5, "updates": 3, "negative": True},
    "attention-few-keys": {"type": "attention", "n_heads": 4, "n_kv_heads": 2, "qk_norm": True},  # sent to two ranks each
    "attention-gathered": {"type": "attention", "n_heads": 2},  # heads that four ranks cannot share
    "window-gathered": {"type": "attention", "n_heads": 2, "window": 12},  # reaches over more than a slice
    "window-swapped": {"type": "attention", "n_heads": 4, "window": 12},
}
GROWS = ("attention", "window-swapped", "window-gathered")  # bytes grow with T: the rest must not


def from_first(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """What the first rank computed, on all: each computing the same would take the test's time."""
    held = [tensors]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def check_mixer(name: str, T: int, packed: bool, rank: int) -> int:
    """Compares one mixer with itself on one rank; returns the bytes this rank received."""
    torch.manual_seed(0)
    mixer = mixers.build(CONFIGS[name], D, 0)
    mixer.init_weights(0.4, 0)
    mixer.double()
    x, weight = torch.randn(2, N * T, D).double().requires_grad_(), torch.randn(2, N * T, D).double()
    # Documents that end on a border, just after one, and one that spans three ranks.
    cuts = torch.tensor([[2, T, T + 1], [T - 1, 3 * T + 2, 3 * T + 3]])
    segments = (torch.arange(N * T) >= cuts[..., None]).sum(1).int() if packed else None
    found: list[torch.Tensor] = []
    if rank == 0:
        y = mixer(x, segment_ids=segments)[0]
        found = [y.detach(), *torch.autograd.grad((y * weight).sum(), [x, *mixer.parameters()])]
    whole, dx, *exact = from_first(found)
    mine = slice(rank * T, (rank + 1) * T)
    part = x.detach()[:, mine].clone().requires_grad_()
    parallel.traffic.clear()
    with parallel.split(mixer):
        y = mixer(part, None, None if segments is None else segments[:, mine].contiguous())[0]
        (y * weight[:, mine]).sum().backward()
    received = {purpose: n for purpose, n in parallel.traffic.received.items() if purpose != "segments"}

    def close(a: torch.Tensor, b: torch.Tensor, what: str) -> None:
        assert (a - b).norm() <= 1e-8 * b.norm().clamp(min=1e-3), (name, T, packed, what, float((a - b).norm()), float(b.norm()))

    close(y, whole[:, mine], "y")
    close(part.grad, dx[:, mine], "dx")
    for (n, p), whole_gradient in zip(mixer.named_parameters(), exact, strict=True):
        total = p.grad if p.grad is not None else torch.zeros_like(p)
        dist.all_reduce(total)
        close(total, whole_gradient, n)
    solves, corrections = parallel.traffic.solves, parallel.traffic.corrections
    if solves:  # how many depends on the numbers; the bytes of each do not grow with T
        S = len(mixer.cell.state)
        assert received.pop("checks") == min(solves, N - 1) * 2 * (2 + S) * S * D * 8 * (N - 1) and solves == corrections + 1
    if adjoints := parallel.traffic.adjoints:  # of dense heads, corrected as their states are
        S = len(mixer.cell.state)
        assert received.pop("checks of adjoints") == min(adjoints, N - 1) * 2 * (2 + S) * S * D * 8 * (N - 1)
    return sum(received.values())


def check_isolation(name: str, T: int, rank: int) -> None:
    """NaN in the document before the one that starts at a border, or just after it: the slices behind see none of it."""
    torch.manual_seed(0)
    mixer = mixers.build(CONFIGS[name], D, 0)
    mixer.init_weights(0.4, 0)
    mixer.double()
    x = torch.randn(2, N * T, D).double()
    segments = (torch.arange(N * T) >= torch.tensor([[2 * T], [2 * T - 1]])).int()
    (whole,) = from_first([mixer(x, segment_ids=segments)[0].detach()] if rank == 0 else [])
    x[:, 2 * T - 3 : 2 * T - 1] = torch.nan
    mine = slice(rank * T, (rank + 1) * T)
    part = x[:, mine].clone().requires_grad_()
    with parallel.split(mixer):
        y = mixer(part, None, segments[:, mine].contiguous())[0]
        y.sum().backward()
    if rank >= 2:
        torch.testing.assert_close(y.detach(), whole[:, mine])
        assert part.grad is not None and part.grad.isfinite().all()


def check_rank() -> None:
    """What each process of the launcher runs."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    with with_new_mixer() as CONFIGS["new"]:
        check_all(rank)
    dist.destroy_process_group()


def refused(name: str) -> bool:
    """Whether the mixer says in a sentence why its time cannot be cut; `split` then says so and changes nothing."""
    mixer = mixers.build(CONFIGS[name], D, 0)
    reason = mixer.why_not_split()
    if reason:
        assert " " in reason and "has no form" not in reason, f"{name} does not say why: {reason}"
        with pytest.raises(ValueError, match="Time cannot be split over ranks"), parallel.split(mixer):
            pass
        assert mixer.slice is None
    return bool(reason)


def check_all(rank: int) -> None:
    for name in CONFIGS:
        if refused(name):
            continue
        check_mixer(name, 7, False, rank)
        short, long = (check_mixer(name, T, True, rank) for T in (7, 13))
        if not name.startswith(GROWS):
            assert short == long, (name, short, long)
    slices.SMALL = 0  # halos from neighbour to neighbour, as if they were large
    for name in ("mamba2", "swa"):
        check_mixer(name, 7, True, rank)
    attend.MASK_ELEMENTS = 0  # documents one by one
    for name in ("attention", "attention-gathered"):
        check_mixer(name, 7, True, rank)
    slices.SMALL, attend.MASK_ELEMENTS = 1 << 20, 1 << 27
    for name in (
        "mamba2",
        "mamba2-groups",
        "delta-groups",
        "attention",
        "attention-few-keys",
        "window-gathered",
        "swa",
        "new",
        "dense_lstm",
        "slstm",
        "m2rnn",
    ):
        check_isolation(name, 7, rank)


def test_slices_on_four_ranks_equal_one_rank() -> None:
    done = run_ranks(N, [__file__], PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("equal") == N


if __name__ == "__main__":
    check_rank()
    print("equal")
