#!/usr/bin/env python
"""Accuracy, then speed, of the parallel RNN kernels on one GPU; JSON to --out. Ratios are to the byte limit at the copy bandwidth measured
in the same run.

    python scripts/bench_parallel_rnn.py --out docs/results/parallel_rnn/gpu.json            # everything, some minutes
    python scripts/bench_parallel_rnn.py --out sweep.json --sweep                            # launch sizes only
    python scripts/bench_parallel_rnn.py --plot docs/results/parallel_rnn/gpu.json           # draws the JSON
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from kernels.parallel_rnn import launch, parallel_rnn, parallel_rnn_step, reference
from models.cells import available, cell_module, load_cell

SHAPES = [(16, 2048, 2048), (4, 8192, 2048), (1, 32768, 2048), (1, 2048, 2048), (1, 512, 2048)]
BARS = {"paragru": (1.6, 2.0), "paralstm": (2.0, 2.5)}  # forward, backward: times their byte limits


def milliseconds(f: Callable[[], Any], repeats: int = 20) -> float:
    """Median device time, each run after the level-2 cache was overwritten."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    for _ in range(3):
        f()
    times = []
    for _ in range(repeats):
        flush.zero_()
        torch.cuda._sleep(4_000_000)  # two milliseconds, so that the host is ahead of the device
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        f()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def bandwidth() -> float:
    """Copy bandwidth in bytes a millisecond (read + write)."""
    a = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.numel() / milliseconds(lambda: b.copy_(a))


def inputs(name: str, B: int, T: int, D: int, dtype: torch.dtype, device: str = "cuda") -> tuple[Any, Tensor, Tensor, Tensor]:
    """As a fresh model sees them: unit normal projections, the cell's own biases, small recurrent weights."""
    cell = load_cell(name)
    g = torch.Generator(device).manual_seed(0)
    pre = torch.empty(B, T, len(cell.pre), D, device=device, dtype=dtype).normal_(generator=g)
    for gate, value in getattr(cell_module(name), "BIAS_INIT", {}).items():
        low, high = value if isinstance(value, tuple) else (value, value)
        pre[:, :, cell.pre.index(gate)] += torch.linspace(low, high, D, device=device, dtype=dtype)
    rec = torch.randn(len(cell.rec), D, device=device, generator=g) * D**-0.5
    return cell, pre, rec, torch.zeros(B, len(cell.state), D, device=device)


def accuracy(name: str) -> dict[str, float]:
    """Largest errors against the float64 loop at (2, 1500, 96), slices forced."""
    out: dict[str, float] = {}
    for dtype, scale in itertools.product((torch.float32, torch.bfloat16), (1.0, 40.0)):
        cell, pre, rec, h0 = inputs(name, 2, 1500, 96, dtype)
        rec = rec * scale
        leaves = [x.double().requires_grad_() for x in (pre, rec, h0)]
        states, final = reference.sequential(cell, *leaves, None)
        d = torch.randn(states.shape, device="cuda").to(dtype)
        wanted = torch.autograd.grad((states * d).sum(), leaves, allow_unused=True)
        got, _ = launch.forward(cell, pre, rec, h0, None)
        tag = f"{str(dtype)[6:]} weights x{scale:g}"
        out[f"{tag}: forward abs"] = (got - states).abs().max().item()
        out[f"{tag}: forward abs of the rounded oracle"] = (states.to(dtype) - states).abs().max().item()
        for label, a, b in zip(("pre", "rec", "h0"), launch.backward(cell, pre, rec, h0, None, got, d, torch.zeros_like(h0)), wanted):
            if b is not None and b.numel():
                out[f"{tag}: d {label} rel"] = ((a - b).norm() / b.norm()).item()
        out.update({f"{tag}: {k}": v for k, v in launch.last_report().items()})
    return out


def kernel_row(name: str, B: int, T: int, D: int, copy: float) -> dict[str, Any]:
    cell, pre, rec, h0 = inputs(name, B, T, D, torch.bfloat16)
    P, S = len(cell.pre), len(cell.state)
    states, final = launch.forward(cell, pre, rec, h0, None)
    report = launch.last_report()
    d_states, d_final = torch.randn_like(states), torch.zeros_like(final)
    unit = B * T * D * 2 / copy
    row = {
        "cell": name, "B": B, "T": T, "D": D, **report,
        "forward_ms": milliseconds(lambda: launch.forward(cell, pre, rec, h0, None)), "forward_limit_ms": unit * (P + S),
        "backward_ms": milliseconds(lambda: launch.backward(cell, pre, rec, h0, None, states, d_states, d_final)),
        "backward_limit_ms": unit * (2 * P + 2 * S),
    }  # fmt: skip
    for way in ("forward", "backward"):
        row[f"{way}_over_limit"] = row[f"{way}_ms"] / row[f"{way}_limit_ms"]
    row["tokens_per_s_fwd_bwd"] = B * T / (row["forward_ms"] + row["backward_ms"]) * 1e3
    return row


def layer_row(name: str, B: int, T: int, D: int) -> dict[str, Any]:
    """Input projection in four heads and the solve, then the whole published mixer; forward and backward with every gradient."""
    from models.mixers.rnn import Config, Mixer

    mixer = Mixer(Config(cell=name), D, 0).cuda()
    mixer.init_weights(0.02, 24)
    mixer = mixer.to(torch.bfloat16)
    cell, P = load_cell(name), len(load_cell(name).pre)
    x = torch.randn(B, T, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(4, D // 4, P * D // 4, device="cuda", dtype=torch.bfloat16) * (D / 4) ** -0.5).requires_grad_()
    rec = (torch.randn(len(cell.rec), D, device="cuda") * D**-0.5).requires_grad_()
    dy = torch.randn(B, T, D, device="cuda", dtype=torch.bfloat16)

    def layer() -> None:
        pre = torch.einsum("btei,eio->bteo", x.unflatten(-1, (4, -1)), weight).unflatten(-1, (P, -1)).transpose(2, 3).reshape(B, T, P, D)
        torch.autograd.grad(parallel_rnn(cell, pre, rec)[0][:, :, -1], (x, weight, rec), dy)

    def block() -> None:
        torch.autograd.grad(mixer(x)[0], (x, *mixer.parameters()), dy)

    return {"cell": name, "B": B, "T": T, "D": D, "layer_fwd_bwd_ms": milliseconds(layer, 10), "mixer_fwd_bwd_ms": milliseconds(block, 10)}


def against_loop(name: str) -> list[dict[str, Any]]:
    """Forward of the naive torch loop (one run) and of the kernels; cuDNN's LSTM at equal width for scale."""
    rows = []
    for T in (512, 4096):
        cell, pre, rec, h0 = inputs(name, 1, T, 2048, torch.bfloat16)
        with torch.no_grad():
            loop = milliseconds(lambda: reference.sequential(cell, pre, rec, h0, None), 2)  # noqa: B023
            ours = milliseconds(lambda: launch.forward(cell, pre, rec, h0, None))  # noqa: B023
        rows.append({"cell": name, "T": T, "loop_ms": loop, "ours_ms": ours, "times": loop / ours})
    return rows


def sweep(copy: float) -> list[dict[str, Any]]:
    """Launch sizes: one at a time away from the defaults, GRU and LSTM, two shapes."""
    from kernels.parallel_rnn import codegen

    defaults = {"BLOCK": launch.BLOCK, "BURN_IN": launch.BURN_IN, "PROGRAMS": launch.PROGRAMS, "UNROLL": codegen.UNROLL}
    tried = {"BLOCK": (32, 128), "BURN_IN": (0, 256), "PROGRAMS": (512, 2048), "UNROLL": (4, 16)}
    rows = []
    for key, value in [("", 0), *((k, v) for k, values in tried.items() for v in values)]:
        for name, value_ in {**defaults, **({key: value} if key else {})}.items():
            setattr(codegen if name == "UNROLL" else launch, name, value_)
        for cell, shape in itertools.product(("paragru", "paralstm"), ((16, 2048, 2048), (1, 32768, 2048), (1, 2048, 2048))):
            rows.append({"changed": f"{key}={value}" if key else "defaults", **kernel_row(cell, *shape, copy)})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def plot(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = json.loads(path.read_text())["kernels"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5))
    for axis, way in zip(axes, ("forward", "backward")):
        for name in sorted({r["cell"] for r in rows}):
            mine = sorted((r["B"] * r["T"], r[f"{way}_ms"], r[f"{way}_limit_ms"]) for r in rows if r["cell"] == name and r["D"] == 2048)
            (line,) = axis.loglog([m[0] for m in mine], [m[1] for m in mine], "o", label=name)
            axis.loglog([m[0] for m in mine], [m[2] for m in mine], "--", color=line.get_color())
        axis.set(title=f"{way} (dashed: byte limit)", xlabel="tokens", ylabel="ms")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path.with_suffix(".svg"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if options.plot:
        return plot(options.plot)
    if not torch.cuda.is_available():
        sys.exit("This measures a GPU, and there is none here.")
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}

    def keep(key: str, make: Callable[[], Any]) -> None:
        try:
            result[key] = make()
        except Exception as problem:  # one failing part must not lose the others
            result[key] = {"error": f"{type(problem).__name__}: {problem}"[:500]}
        print(key, json.dumps(result[key]), flush=True)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(result, indent=1) + "\n")

    if not options.sweep:
        keep("accuracy", lambda: {name: accuracy(name) for name in available()})
    keep("copy_bytes_per_ms", bandwidth)
    copy = result["copy_bytes_per_ms"]
    if options.sweep:
        return keep("sweep", lambda: sweep(copy))
    keep("kernels", lambda: [kernel_row(name, *shape, copy) for name in ("paragru", "paralstm", "mingru", "lstm") for shape in SHAPES])
    keep("bars", lambda: {n: dict(zip(("forward_over_limit", "backward_over_limit"), BARS[n])) for n in BARS})
    keep("layers", lambda: [layer_row(name, *shape) for name in ("paragru", "paralstm") for shape in SHAPES[:3:2]])
    keep("long", lambda: [kernel_row("paragru", 1, T, 1024, copy) for T in (32768, 1 << 20)])
    keep("loop", lambda: against_loop("paragru") + against_loop("paralstm"))
    cell, pre, rec, h0 = inputs("paragru", 8, 1, 2048, torch.bfloat16)
    with torch.no_grad():
        keep("decode_ms", lambda: milliseconds(lambda: parallel_rnn_step(cell, pre[:, 0], rec, h0)))


if __name__ == "__main__":
    main()
