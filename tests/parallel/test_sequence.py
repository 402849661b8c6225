"""Four ranks with a quarter of the time each against one rank with all of it, in float64: outputs, gradients, bytes exchanged."""

from __future__ import annotations

import torch
import torch.distributed as dist

from models import mixers, parallel
from tests.conftest import ROOT, free_port, run_program

N, D = 4, 16
CONFIGS = {cell: {"type": "rnn", "cell": cell, "n_heads": 2} for cell in ("paragru", "paralstm", "gru", "lstm", "mingru", "elman")}
CONFIGS |= {
    "bare": {"type": "rnn", "cell": "paragru", "gate": False, "norm": False, "d_conv": 0},
    "mamba2": {"type": "mamba2", "d_state": 4, "head_dim": 8, "n_groups": 2, "chunk": 5},
    "attention": {"type": "attention", "n_heads": 4, "n_kv_heads": 2, "qk_norm": True},
    "window": {"type": "attention", "n_heads": 4, "window": 6},
}


def check_rank() -> None:
    """What each process of the launcher runs."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for name, mapping in CONFIGS.items():
        counted = []
        for T, packed in ((7, False), (7, True), (13, True)):
            torch.manual_seed(0)
            mixer = mixers.build(mapping, D, 0)
            mixer.init_weights(0.4, 0)
            mixer.double()
            x, weight = torch.randn(2, N * T, D).double().requires_grad_(), torch.randn(2, N * T, D).double()
            # Documents that end on a border, just after one, and one that spans three ranks.
            cuts = torch.tensor([[2, T, T + 1], [T - 1, 3 * T + 2, 3 * T + 3]])
            segments = (torch.arange(N * T) >= cuts[..., None]).sum(1).int() if packed else None
            whole = mixer(x, segment_ids=segments)[0]
            (whole * weight).sum().backward()
            exact = {n: p.grad.clone() for n, p in mixer.named_parameters()}
            mixer.zero_grad()
            own = slice(rank * T, (rank + 1) * T)
            part = x.detach()[:, own].clone().requires_grad_()
            parallel.traffic["bytes"] = 0
            with parallel.split(mixer):
                y = mixer(part, None, None if segments is None else segments[:, own])[0]
                (y * weight[:, own]).sum().backward()
            counted.append((packed, parallel.traffic["bytes"]))

            def close(a: torch.Tensor, b: torch.Tensor, what: str, name: str = name) -> None:
                assert (a - b).norm() <= 1e-8 * b.norm().clamp(min=1e-3), (name, what, float((a - b).norm()), float(b.norm()))

            close(y, whole[:, own], "y")
            close(part.grad, x.grad[:, own], "dx")
            for n, p in mixer.named_parameters():
                total = p.grad if p.grad is not None else torch.zeros_like(p)
                dist.all_reduce(total)
                close(total, exact[n], n)
        if name in ("mingru", "mamba2"):  # one exchange each: bytes do not depend on T
            assert counted[1] == counted[2], (name, counted)
    dist.destroy_process_group()


def test_slices_on_four_ranks_equal_one_rank() -> None:
    done = run_program(["-m", "torch.distributed.run", "--master_port", free_port(), "--nproc_per_node", str(N), __file__], PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("equal") == N


if __name__ == "__main__":
    check_rank()
    print("equal")
