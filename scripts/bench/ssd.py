"""Accuracy, then speed, of Mamba-2's scan on one GPU, and a whole training step; JSON to --out, written after every part.

python -m scripts.bench.ssd --out docs/results/ssd/gpu.json                # accuracy, kernels, training step: two minutes
python -m scripts.bench.ssd --out sweep.json --parts sweep                 # block sizes, warps and stages; builds many kernels
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.ssd import launch, reference, ssd
from models.config import ModelConfig
from models.lm import LanguageModel
from scripts.bench.timing import Results, attempted, copy_bandwidth, milliseconds, seconds

# (B, T), H, P, N: the shape of the published figures, then our tiny, 35m and 400m models.
SHAPES = [
    (16, 2048, 64, 64, 128),
    (1, 32768, 64, 64, 128),
    (16, 2048, 6, 64, 32),
    (16, 2048, 12, 64, 64),
    (16, 2048, 32, 64, 64),
    (1, 32768, 32, 64, 64),
]
PUBLISHED = {(16, 2048, 64, 64, 128): (1.29, 6.04), (1, 32768, 64, 64, 128): (1.32, 6.09)}  # mamba_ssm on an H100, forward and both
TFLOPS = 745e9  # operations a millisecond of a large bf16 product on an H100, measured


def inputs(B: int, T: int, H: int, P: int, N: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """As a fresh model sees them: step sizes log-uniform in [0.001, 0.1], A in -[1, 16]; x, B and C parts of one tensor."""
    g = torch.Generator("cuda").manual_seed(0)
    joint = torch.empty(B, T, H * P + 2 * N, device="cuda", dtype=dtype).normal_(generator=g)
    x, b, c = joint.split([H * P, N, N], -1)
    dt = torch.exp(torch.rand(B, T, H, device="cuda", generator=g) * 4.6 - 6.9)
    A, D = -1 - 15 * torch.rand(H, device="cuda", generator=g), torch.ones(H, device="cuda")
    return [x.unflatten(-1, (H, P)), dt, A, b.unflatten(-1, (1, N)), c.unflatten(-1, (1, N)), D]


def both(tensors: list[Tensor], dy: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    y, _ = ssd(*leaves[:5], D_H=leaves[5])
    return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def accuracy() -> dict[str, Any]:
    """Relative distances from the float64 loop at (2, 700): of the kernels, and of the loop's own answer rounded to the dtype."""
    out: dict[str, Any] = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        tensors = inputs(2, 700, 8, 64, 128, dtype)
        dy = torch.randn(tensors[0].shape, device="cuda").to(dtype)
        leaves = [t.double().requires_grad_() for t in tensors]
        y, _ = reference.ssd_sequential(*leaves[:5], D=leaves[5])
        exact = [y, *torch.autograd.grad(y, leaves, dy.double())]
        for name, a, b in zip(("y", "dx", "ddt", "dA", "dB", "dC", "dD"), both(tensors, dy), exact):
            rounded = ((b.to(a.dtype).double() - b).norm() / b.norm()).item()
            out[f"{str(dtype)[6:]} {name}"] = {"error": ((a.double() - b).norm() / b.norm()).item(), "of rounding": rounded}
    return out


def parts(shape: tuple[int, ...]) -> dict[str, float]:
    """Device time of each kernel, forward and backward, in milliseconds."""
    tensors = inputs(*shape)
    dy = torch.randn(tensors[0].shape, device="cuda", dtype=torch.bfloat16)
    both(tensors, dy)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(3):
            both(tensors, dy)
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda e: -e.device_time_total)
    return {f"{e.key[:60]} x{e.count // 3}": round(e.device_time_total / 3e3, 4) for e in events[:14]}


def kernel_row(shape: tuple[int, ...], copy: float, repeats: int = 10) -> dict[str, Any]:
    B, T, H, P, N = shape
    tensors = inputs(*shape)
    dy = torch.randn(tensors[0].shape, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        forward = milliseconds(lambda: ssd(*tensors[:5], D_H=tensors[5]), repeats)
    total = milliseconds(lambda: both(tensors, dy), repeats)
    x, rest = 2 * B * T * H * P, B * T * (4 * H + 4 * N)
    Q = launch.FORWARD.Q
    operations = 2 * B * T * H * (Q * P / 2 + 2 * N * P)
    row = {
        "shape": list(shape), "forward_ms": forward, "forward_backward_ms": total, "forward_byte_limit_ms": (2 * x + rest) / copy,
        "forward_backward_byte_limit_ms": (5 * x + 3 * rest) / copy, "forward_flop_limit_ms": operations / TFLOPS,
        "saved_for_backward_bytes": x + rest,
    }  # fmt: skip
    if shape in PUBLISHED:
        row["mamba_ssm_forward_ms"], row["mamba_ssm_forward_backward_ms"] = PUBLISHED[shape]
    return row


def training(compiled: bool, rows: int = 8, at_most: float = 20.0) -> dict[str, Any]:
    """Tokens a second of a 400M Mamba-2's whole step (B=16 as micro-batches of `rows`, T=2048, bf16 autocast, fused AdamW)."""
    mixer = {"type": "mamba2", "d_state": 64, "chunk": 64}
    config = ModelConfig(vocab_size=50432, d_model=1024, n_layers=48, pattern=["mamba2"], mixers={"mamba2": mixer}, d_ff=0)
    torch.manual_seed(0)
    model = LanguageModel(config)
    model.init_weights(0)
    model = model.cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, 50432, (16, 2048), device="cuda")
    run = torch.compile(model) if compiled else model

    def step() -> Tensor:
        total = torch.zeros((), device="cuda")
        for part in tokens.split(rows):
            with torch.autocast("cuda", torch.bfloat16):
                loss = run(part, labels=part).loss_sum / tokens.numel()
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    torch.cuda.reset_peak_memory_stats()
    device, losses, times = torch.device("cuda"), list[float](), list[float]()

    def run_step() -> None:
        losses.append(step().item())

    warm = sum(seconds(run_step, device) for _ in range(3))
    while len(times) < 8 and sum(times) < at_most:
        times.append(seconds(run_step, device))
    ms = 1e3 * statistics.median(times)
    row = {
        "compiled": compiled, "micro_batch": rows, "step_ms": ms, "tokens_per_s": 16 * 2048 / ms * 1e3, "warm_up_s": warm, "losses": losses,
        "peak_bytes": torch.cuda.max_memory_allocated(), "parameters": sum(p.numel() for p in model.parameters()),
    }  # fmt: skip
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda e: -e.device_time_total)[:25]
    row["kernels"] = [{"name": e.key[:90], "calls": e.count, "ms": round(e.device_time_total / 1e3, 3)} for e in events]
    return row


CHANGES: list[tuple[str, dict[str, int]]] = [
    ("", {}),
    *(
        ("FORWARD", c)
        for c in ({"heads": 16}, {"heads": 4}, {"stages": 1}, {"stages": 3}, {"Q": 64}, {"Q": 64, "warps": 4}, {"columns": 32})
    ),
    *(("FORWARD", c) for c in ({"walk_stages": 2}, {"walk_stages": 4}, {"columns": 128, "walk_warps": 8}, {"walk_warps": 8})),
    *(
        ("BACKWARD", c)
        for c in ({"heads": 16}, {"heads": 4}, {"stages": 1}, {"stages": 3}, {"warps": 4}, {"warps": 4, "stages": 1}, {"columns": 32})
    ),
    *(("BACKWARD", c) for c in ({"walk_stages": 2}, {"walk_stages": 4}, {"columns": 128, "walk_warps": 8}, {"Q": 128}, {"Q": 32})),
]


def sweep(copy: float, worker: str) -> list[dict[str, Any]]:
    """One size at a time away from the constants. worker "i/n" only builds the kernels of every n-th row, from the i-th, on a short shape."""
    rows, usual = [], {name: getattr(launch, name) for name in ("FORWARD", "BACKWARD")}
    first, count = map(int, worker.split("/")) if worker else (0, 1)
    for name, changes in CHANGES[first::count]:
        for k, sizes in usual.items():
            setattr(launch, k, dataclasses.replace(sizes, **changes) if k == name else sizes)
        row: dict[str, Any] = {"pass": name, "changes": changes}
        for label, shape in (("wide", SHAPES[0]), ("long", SHAPES[1]), ("400m", SHAPES[4])):
            try:
                times = kernel_row((1, 2048, *shape[2:]) if worker else shape, copy, 1 if worker else 5)
                row[label] = [round(times[k], 3) for k in ("forward_ms", "forward_backward_ms")]
            except Exception as problem:  # too much shared memory, say: the sweep goes on
                row[label] = f"{type(problem).__name__}: {str(problem)[:80]}"
        rows.append(row)
        print(json.dumps(row), flush=True)
    for k, sizes in usual.items():
        setattr(launch, k, sizes)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", default="accuracy,kernels,split,training")
    parser.add_argument("--worker", default="", help="i/n: only build this share of the sweep's kernels")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("This measures a GPU, and there is none here.")
    chosen_parts = arguments.parts.split(",")
    copy = 1.0 if arguments.worker else copy_bandwidth()
    sizes = [str(launch.FORWARD), str(launch.BACKWARD)]
    results = Results(arguments.out, torch.device("cuda"), sizes=sizes, copy_bytes_per_ms=copy)
    if "accuracy" in chosen_parts:
        results.keep("accuracy", attempted(accuracy))
    if "kernels" in chosen_parts:
        for shape in SHAPES:
            results.keep(f"kernels {shape}", attempted(functools.partial(kernel_row, shape, copy)))
    if "split" in chosen_parts:
        for shape in (SHAPES[0], SHAPES[1], SHAPES[4]):
            results.keep(f"split {shape}", attempted(functools.partial(parts, shape)))
    if "training" in chosen_parts:
        results.keep("training eager", attempted(lambda: training(False)))
    if "compiled" in chosen_parts:
        results.keep("training compiled", attempted(lambda: training(True)))
    if "sweep" in chosen_parts:
        results.keep("sweep", attempted(lambda: sweep(copy, arguments.worker)))


if __name__ == "__main__":
    main()
