#!/usr/bin/env python
"""Accuracy, then speed, of the parallel RNN kernels on one GPU; JSON to --out. Ratios are to the byte limit at the copy bandwidth measured
in the same run.

    python -m scripts.bench.parallel_rnn --out docs/results/parallel_rnn/gpu.json            # everything, some minutes
    python -m scripts.bench.parallel_rnn --out sweep.json --sweep                            # launch sizes only
    python -m scripts.bench.parallel_rnn --out part.json --only kernels corrected            # some parts
    python -m scripts.bench.parallel_rnn --corrections docs/results/parallel_rnn/corrections.json    # on the CPU, seconds
    python -m scripts.bench.parallel_rnn --plot docs/results/parallel_rnn/gpu.json           # draws the JSON
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.files import write_json
from kernels.parallel_rnn import launch, op, parallel_rnn, parallel_rnn_step, reference
from models.cells import available, cell_module, load_cell
from training.watch.metrics import environment

SHAPES = [(16, 2048, 2048), (4, 8192, 2048), (1, 32768, 2048), (1, 2048, 2048), (1, 512, 2048)]
BARS = {"paragru": (1.6, 2.0), "paralstm": (2.0, 2.5)}  # forward, backward: times their byte limits


def milliseconds(f: Callable[[], Any], repeats: int = 20) -> float:
    """Median device time, each run after the level-2 cache was overwritten."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    for _ in range(min(3, repeats)):
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


def accuracy(name: str) -> dict[str, Any]:
    """Largest errors against the float64 loop at (2, 700, 64), in one launch (None) and in several slices."""
    out: dict[str, Any] = {"cell": name}
    for dtype, scale, slices in itertools.product((torch.float32, torch.bfloat16), (1.0, 12.0), (None, 11)):
        cell, pre, rec, h0 = inputs(name, 2, 700, 64, dtype)
        rec = rec * (scale * (64 / 2048) ** 0.5)
        fine = [x.double() for x in (pre, rec, h0)]
        with torch.no_grad():
            states, _ = reference.sequential(cell, *fine, None)
        d = torch.randn(states[:, :, -1].shape, device="cuda").to(dtype)
        wanted = reference.linear_backward(
            cell, *fine, None, states, op.joined(d.double(), torch.zeros_like(states[:, :, :-1])), torch.zeros_like(fine[2])
        )
        launch.last_report()
        emitted, kept, final, _ = launch.forward(cell, pre, rec, h0, None, slices=slices)
        tag, exact = f"{str(dtype)[6:]} weights x{scale:g}{', sliced' if slices else ', at once'}", states[:, :, -1]
        out.update({f"{tag}: {k}": v for k, v in launch.last_report().items()})
        out[f"{tag}: forward abs"] = (emitted - exact).abs().max().item()
        out[f"{tag}: forward abs of the rounded oracle"] = (exact.to(dtype) - exact).abs().max().item()
        for label, a, b in zip(
            ("pre", "rec", "h0"), launch.backward(cell, pre, rec, h0, None, emitted, kept, d, None, torch.zeros_like(final), slices=slices), wanted
        ):  # fmt: skip
            if b.numel():
                out[f"{tag}: d {label} rel"] = ((a - b).norm() / b.norm()).item()
    return out


def kernel_row(name: str, B: int, T: int, D: int, copy: float, memory: float = 0.0) -> dict[str, Any]:
    """Times of the solve and of its gradient (of the emitted state's, as in a layer) against the bytes they must move: P + S values a channel
    and step forward, 2 P + S + 1 backward. memory: bias of the gate that lets the state change; at -9 it lives for 8,000 steps."""
    cell, pre, rec, h0 = inputs(name, B, T, D, torch.bfloat16)
    if memory:
        pre[:, :, 0] += memory if name == "paragru" else -memory
    P, S = len(cell.pre), len(cell.state)
    launch.last_report()
    emitted, kept, final, _ = launch.forward(cell, pre, rec, h0, None)
    report = launch.last_report()
    d_emitted, d_final = torch.randn_like(emitted), torch.zeros_like(final)
    unit, plan = B * T * D * 2 / copy, launch.plan_of(pre[:, :, :, None], S)
    row = {
        "cell": name, "B": B, "T": T, "D": D, "memory": memory, "slices": plan.slices, "at_once": isinstance(plan, launch.ShootPlan), **report,
        "forward_ms": milliseconds(lambda: launch.forward(cell, pre, rec, h0, None)), "forward_limit_ms": unit * (P + S),
        "backward_ms": milliseconds(lambda: launch.backward(cell, pre, rec, h0, None, emitted, kept, d_emitted, None, d_final)),
        "backward_limit_ms": unit * (2 * P + S + 1),
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
    bias = torch.zeros(P, D, device="cuda", requires_grad=True)
    dy = torch.randn(B, T, D, device="cuda", dtype=torch.bfloat16)

    def layer() -> None:
        pre = torch.einsum("btei,eio->bteo", x.unflatten(-1, (4, -1)), weight).unflatten(-1, (P, -1)).transpose(2, 3)
        torch.autograd.grad(parallel_rnn(cell, pre, rec, bias_PD=bias, emitted=True)[0], (x, weight, rec, bias), dy)

    def block() -> None:
        torch.autograd.grad(mixer(x)[0], (x, *mixer.parameters()), dy)

    return {"cell": name, "B": B, "T": T, "D": D, "layer_fwd_bwd_ms": milliseconds(layer, 10), "mixer_fwd_bwd_ms": milliseconds(block, 10)}


def against_loop(name: str, T: int) -> dict[str, Any]:
    """Forward of the naive torch loop (one run) and of the kernels."""
    cell, pre, rec, h0 = inputs(name, 1, T, 2048, torch.bfloat16)
    with torch.no_grad():
        loop = milliseconds(lambda: reference.sequential(cell, pre, rec, h0, None), 1)
        ours = milliseconds(lambda: launch.forward(cell, pre, rec, h0, None))
    return {"cell": name, "T": T, "loop_ms": loop, "ours_ms": ours, "times": loop / ours}


def decode_row(name: str, B: int, D: int) -> dict[str, Any]:
    cell, pre, rec, h0 = inputs(name, B, 1, D, torch.bfloat16)
    with torch.no_grad():
        return {"cell": name, "B": B, "D": D, "ms": milliseconds(lambda: parallel_rnn_step(cell, pre[:, 0], rec, h0))}


def sweep(copy: float, keep: Callable[[dict[str, Any]], None]) -> None:
    """Launch sizes: one at a time away from the defaults; GRU and LSTM, large and small problems, short and long memories. Each row goes
    to `keep` as soon as it is there."""
    from kernels.parallel_rnn import backward_source, codegen, forward_source

    tried: list[tuple[str, Any, int]] = [("defaults", None, 0)]
    for place, key, values in (
        (launch, "PROGRAMS", (8, 16)), (launch, "PROGRAMS_BACK", (8, 16)), (launch, "BLOCK", (32,)), (launch, "STRETCH", (64, 256)),
        (launch, "CORRECTIONS", (2, 4)), (codegen, "AHEAD", (4, 16)), (codegen, "AHEAD_BACK", (2, 8)), (forward_source, "STAGES", (3, 6)),
        (backward_source, "STAGES", (3, 6)),
    ):  # fmt: skip
        tried += [(key if place is not backward_source else "STAGES of the backward kernels", (place, key), value) for value in values]
    for label, where, value in tried:
        usual = getattr(*where) if where else 0
        if where:
            setattr(*where, value)
        launch.kernels.cache_clear()
        for cell, shape, memory in itertools.product(("paragru", "paralstm"), (*SHAPES[::2], SHAPES[3]), (0.0, -5.0)):
            if memory == 0.0 or shape[1] == 32768:
                keep({"changed": f"{label}={value}" if where else label, **kernel_row(cell, *shape, copy, memory)})
        if where:
            setattr(*where, usual)
    launch.kernels.cache_clear()


def peer_row(kind: str, B: int, T: int, D: int) -> dict[str, Any]:
    """pararnn-torch, where it is installed: its whole layer (input projection and solve), forward and backward with every gradient."""
    import pararnn

    net = getattr(pararnn, kind)(D, D, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(B, T, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def run() -> Tensor:
        out = pararnn.newton_apply(net, x)
        return out[0] if isinstance(out, tuple) else out

    dy = torch.randn_like(run())  # of an LSTM both states come out, (B, T, 2, D)

    def layer() -> None:
        torch.autograd.grad(run(), (x, *net.parameters()), dy, allow_unused=True)

    return {"peer": f"pararnn-torch {pararnn.__version__} {kind}", "B": B, "T": T, "D": D, "layer_fwd_bwd_ms": milliseconds(layer, 5)}


def cudnn_row(kind: str, B: int, T: int, D: int) -> dict[str, Any]:
    """cuDNN's dense recurrence of equal width: another model (full recurrent matrix), for scale."""
    net = getattr(torch.nn, kind)(D, D, batch_first=True, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(B, T, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(B, T, D, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        forward = milliseconds(lambda: net(x), 3)
    both = milliseconds(lambda: torch.autograd.grad(net(x)[0], (x, *net.parameters()), dy), 3)
    return {"cudnn": kind, "B": B, "T": T, "D": D, "forward_ms": forward, "fwd_bwd_ms": both}


def elementwise_newton(cell: Any, pre: Tensor, rec: Tensor, iterations: int = 3) -> Tensor:
    """The published algorithm (arXiv 2510.21450) in plain torch, one state: Newton on every h_t at once, each linear system solved by a
    doubling scan over time, a fixed number of iterations from zero."""
    h_BTSD = pre.new_zeros(pre.shape[0], pre.shape[1], 1, pre.shape[-1], dtype=torch.float32)
    x = pre.float()
    for _ in range(iterations):
        before = torch.nn.functional.pad(h_BTSD, (0, 0, 0, 0, 1, 0))[:, :-1]
        a = reference.jacobian(cell, x, rec, before).reshape(before[:, :, 0].shape)
        b = cell(x.unbind(2), rec.unbind(0), before.unbind(2))[0] - a * before[:, :, 0]
        shift = 1
        while shift < b.shape[1]:
            b = torch.cat((b[:, :shift], b[:, shift:] + a[:, shift:] * b[:, :-shift]), 1)
            a = torch.cat((a[:, :shift], a[:, shift:] * a[:, :-shift]), 1)
            shift *= 2
        h_BTSD = b[:, :, None]
    return h_BTSD


def newton_row(B: int, T: int, D: int) -> dict[str, Any]:
    cell, pre, rec, h0 = inputs("paragru", B, T, D, torch.bfloat16)
    with torch.no_grad():
        found = elementwise_newton(cell, pre, rec)
        ours = launch.forward(cell, pre, rec, h0, None)[0]
        error = (found[:, :, 0] - ours.float()).abs().max().item()
        return {
            "B": B,
            "T": T,
            "D": D,
            "newton_3_ms": milliseconds(lambda: elementwise_newton(cell, pre, rec), 5),
            "largest_difference_to_ours": error,
        }


def time_row(T: int, copy: float) -> dict[str, Any]:
    """Forward alone against T at (1, T, 2048)."""
    cell, pre, rec, h0 = inputs("paragru", 1, T, 2048, torch.bfloat16)
    forward = milliseconds(lambda: launch.forward(cell, pre, rec, h0, None), 10)
    return {"T": T, "forward_ms": forward, "limit_ms": T * 2048 * 2 * (len(cell.pre) + 1) / copy}


def memory_row(name: str, B: int, T: int, D: int, save: str) -> dict[str, Any]:
    """Peak bytes above the inputs, forward and backward, against the floor: states, the emitted one's gradient and the gradients of the inputs."""
    cell, pre, rec, _ = inputs(name, B, T, D, torch.bfloat16)
    leaves = [pre.requires_grad_(), rec.requires_grad_()] if rec.numel() else [pre.requires_grad_()]
    parallel_rnn(cell, pre, rec, emitted=True, save=save)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    states, _ = parallel_rnn(cell, pre, rec, emitted=True, save=save)
    saved = torch.cuda.memory_allocated() - base
    torch.autograd.grad(states, leaves, torch.ones_like(states))
    floor = 2 * B * T * D * (len(cell.pre) + len(cell.state) + 1)
    peak = torch.cuda.max_memory_allocated() - base
    return {"cell": name, "save": save, "saved_bytes": saved, "peak_bytes": peak, "floor_bytes": floor, "peak_over_floor": peak / floor}


def graph_row(B: int, T: int, D: int) -> dict[str, Any]:
    """Replays of a captured forward against plain launches, and torch.compile (fullgraph) against both, by value."""
    cell, pre, rec, h0 = inputs("paragru", B, T, D, torch.bfloat16)
    with torch.no_grad():
        plain = parallel_rnn(cell, pre, rec, h0)[0]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = parallel_rnn(cell, pre, rec, h0)[0]
        graph.replay()
        same = torch.equal(plain, captured)
        replay = milliseconds(graph.replay)
        compiled = torch.compile(lambda *a: parallel_rnn(cell, *a)[0], fullgraph=True)
        return {
            "B": B,
            "T": T,
            "D": D,
            "replay_equal": same,
            "replay_ms": replay,
            "compiled_equal": torch.equal(compiled(pre, rec, h0), plain),
        }


def past_int32() -> dict[str, Any]:
    cell, T, D = load_cell("mingru"), (1 << 20) + 64, 1088
    pre = torch.zeros(1, T, 2, D, device="cuda", dtype=torch.bfloat16)
    pre[:, -100:].normal_()
    none = torch.zeros(0, D, device="cuda")
    states, _ = parallel_rnn(cell, pre, none)
    tail, _ = reference.sequential(cell, pre[:, -100:].double(), none.double(), torch.zeros(1, 1, D, device="cuda").double(), None)
    return {"elements": pre.numel(), "error": (states[:, -100:] - tail).abs().max().item()}


@torch.no_grad()
def correction_row(name: str, scale: float) -> dict[str, Any]:
    """Largest error of 31 slice starts (64 steps each) after 0, 1, ... corrections, float64, any device; the first guess is the slice before
    walked from zero. Recurrent weights are normal with deviation `scale`."""
    N, L = 32, 64
    cell, pre, rec, h0 = inputs(name, 1, N * L, 64, torch.float64, "cpu")
    rec = (rec * (scale * 64**0.5)).double()
    exact = reference.sequential(cell, pre, rec, h0.double(), None)[0][:, L - 1 : -1 : L]
    sliced = reference.slice_time(pre, N, L)
    start = torch.zeros(1, N, len(cell.state), 64, dtype=torch.float64)
    start[:, 1:] = reference.walk(cell, sliced, rec, start, None)[:, :-1, -1]
    errors = []
    for _ in range(9):
        errors.append(float((start[:, 1:] - exact).abs().max()))
        states = reference.walk(cell, sliced, rec, start, None)
        J = reference.jacobian(cell, sliced, rec, torch.cat([start[:, :, None], states[:, :, :-1]], 2))
        start = reference.corrected(states[:, :, -1], reference.product(J), start)
    return {"cell": name, "deviation": scale, "errors": errors}


def corrections(path: Path) -> None:
    """Writes the errors by correction to `path`; needs no GPU."""
    rows = [correction_row(name, scale) for name in ("paragru", "paralstm") for scale in (2048**-0.5, 0.5, 2.0, 8.0)]
    write_json(path, {"torch": torch.__version__, "device": "cpu", "rows": rows})


def plot(path: Path) -> None:
    """time.png, if it was measured: time by length against limit, Newton, loop and cuDNN; limits.png: times over the byte limit; corrections.png, if
    corrections.json lies beside."""
    from evals.report.figures import pyplot

    plt, result = pyplot(), json.loads(path.read_text())
    if plt is None:
        sys.exit("Plots need matplotlib: pip install matplotlib.")
    if "time" in result:
        _plot_time(plt, result, path)
    rows = [r for r in result["kernels"] if r.get("cell") in BARS and r["D"] == 2048]
    names = sorted({r["cell"] for r in rows})
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, way in zip(axes, ("forward", "backward")):
        for i, name in enumerate(names):
            mine = [r for r in rows if r["cell"] == name]
            at = [k + 0.8 * i / len(names) for k in range(len(mine))]
            axis.bar(at, [r[f"{way}_ms"] / r[f"{way}_limit_ms"] for r in mine], 0.75 / len(names), label=name)
            axis.set_xticks(range(len(mine)), [f"({r['B']}, {r['T']:,})" for r in mine], rotation=30)
        axis.axhline(1, color="k", linestyle="--", linewidth=1)
        axis.set(title=way, xlabel="(sequences, steps)", ylabel="times the byte limit (dashed)")
    axes[1].legend(fontsize=8)
    _save(plt, figure, path.with_name("limits.png"))
    beside = path.with_name("corrections.json")
    if not beside.exists():
        return
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    rows = json.loads(beside.read_text())["rows"]
    for axis, name in zip(axes, ("paragru", "paralstm")):
        for r in (r for r in rows if r["cell"] == name):
            axis.plot([max(e, 1e-17) for e in r["errors"]], "o-", label=f"{r['deviation']:.3g}")
        axis.set(yscale="log", title=name, xlabel="corrections", ylabel="largest error of a slice's start")
        axis.grid(alpha=0.3)
    axes[1].legend(title="deviation of\nthe weights", fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    _save(plt, figure, path.with_name("corrections.png"))


def _plot_time(plt: Any, result: dict[str, Any], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(9.5, 4.5))
    times, newton = result["time"], result["newton"]
    axis.plot([r["T"] for r in times], [r["forward_ms"] for r in times], "o-", label="parallel solve")
    axis.plot([r["T"] for r in times], [r["limit_ms"] for r in times], "k--", label="byte limit")
    axis.plot([r["T"] for r in newton], [r["newton_3_ms"] for r in newton], "s-", label="3 elementwise Newton steps, torch")
    loop = result["loop"]
    axis.plot([r["T"] for r in loop], [r["loop_ms"] for r in loop], "^-", label="torch loop")
    gru = [r for r in result["cudnn"] if r.get("cudnn") == "GRU"]
    axis.plot([r["T"] for r in gru], [r["forward_ms"] for r in gru], "x", markersize=9, label="cuDNN GRU (dense weights)")
    axis.set(xscale="log", yscale="log", xlabel="time steps", ylabel="ms", title=f"ParaGRU forward, width 2048, {result['device']}")
    axis.grid(alpha=0.3)
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    _save(plt, figure, path.with_name("time.png"))


def _save(plt: Any, figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parts(copy: float) -> list[tuple[str, Callable[[], Any]]]:
    """(key of the JSON, what makes one of its rows), the most telling first."""
    pair, out = ("paragru", "paralstm"), []

    def add(key: str, make: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        out.append((key, functools.partial(make, *arguments, **named)))

    for name in pair:
        add("accuracy", accuracy, name)
        for shape in SHAPES:
            add("kernels", kernel_row, name, *shape, copy)
        for shape in SHAPES[:3]:
            add("corrected", kernel_row, name, *shape, copy, memory=-5.0)
    for name, shape in itertools.product(pair, SHAPES[:3:2]):
        add("layers", layer_row, name, *shape)
    for T in (512, 2048):
        add("graph", graph_row, 1, T, 2048)
    for kind in ("ParaGRU", "ParaLSTM"):
        add("peers", peer_row, kind, 16, 2048, 2048)
    for T in (32768, 1 << 20):
        add("long", kernel_row, "paragru", 1, T, 1024, copy)
    for T in (512, 32768):
        add("loop", against_loop, "paragru", T)
    for T in (512, 2048, 8192, 32768, 131072):
        add("time", time_row, T, copy)
    for T in (512, 2048, 8192, 32768):
        add("newton", newton_row, 1, T, 2048)
    for kind in ("GRU", "LSTM"):
        add("cudnn", cudnn_row, kind, 1, 2048, 2048)
    for name, save in itertools.product(pair, ("states", "borders")):
        add("memory", memory_row, name, 1, 32768, 2048, save)
    add("past_int32", past_int32)
    add("decode", decode_row, "paragru", 8, 2048)
    for name in available():
        if name not in pair:
            add("accuracy", accuracy, name)
            add("kernels", kernel_row, name, *SHAPES[2], copy)
    return out


COMPILED = ("accuracy", "kernels", "corrected", "layers", "graph", "memory", "decode")  # keys whose kernels are compiled beforehand


def warm(share: int, of: int) -> None:
    """Runs every of-th part that compiles kernels once, unmeasured: Triton keeps what it compiled on disk."""
    global milliseconds

    def once(f: Callable[[], Any], repeats: int = 0) -> float:
        f()
        return 1.0

    milliseconds = once
    wanted = [make for key, make in parts(1.0) if key in COMPILED]
    for make in wanted[share::of]:
        try:
            make()
        except Exception as problem:  # the measured run says it
            print(f"warm: {type(problem).__name__}: {problem}"[:300], flush=True)


def warm_up(processes: int) -> None:
    command = [sys.executable, "-m", "scripts.bench.parallel_rnn", "--warm"]
    running = [subprocess.Popen([*command, f"{i}/{processes}"]) for i in range(processes)]
    for process in running:
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--corrections", type=Path, help="error by number of corrections, on the CPU, to this file")
    parser.add_argument("--part", type=int, default=60, help="seconds one part may take")
    parser.add_argument("--total", type=int, default=1200, help="seconds after which no part is begun")
    parser.add_argument("--only", nargs="*", help="keys of the JSON to measure; all if not given")
    parser.add_argument(
        "--processes", type=int, default=min(8, max(1, (os.cpu_count() or 2) // 2)), help="that compile kernels first, side by side"
    )
    parser.add_argument("--warm", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plot:
        return plot(options.plot)
    if options.corrections:
        return corrections(options.corrections)
    if not torch.cuda.is_available():
        sys.exit("This measures a GPU, and there is none here.")
    if options.warm:
        share, of = options.warm.split("/")
        return warm(int(share), int(of))
    result: dict[str, Any] = {**environment(torch.device("cuda")), "copy_bytes_per_ms": bandwidth()}
    began = time.monotonic()

    def late(*_: Any) -> None:
        raise TimeoutError(f"more than {options.part} s")

    signal.signal(signal.SIGALRM, late)

    def keep(key: str, row: Any) -> None:
        """Written at once: neither a failure nor a later timeout loses a row."""
        result.setdefault(key, []).append(row)
        print(f"{time.monotonic() - began:.1f} s", key, json.dumps(row), flush=True)
        if options.out:
            write_json(options.out, result)

    if options.sweep:
        return sweep(result["copy_bytes_per_ms"], functools.partial(keep, "sweep"))
    if options.processes > 1:
        warm_up(options.processes)
        print(f"{time.monotonic() - began:.1f} s: kernels compiled", flush=True)
    for key, make in parts(result["copy_bytes_per_ms"]):
        if options.only and key not in options.only:
            continue
        if time.monotonic() - began > options.total:
            keep(key, {"skipped": f"after {options.total} s"})
            continue
        signal.alarm(options.part)
        try:
            row = make()
        except Exception as problem:
            row = {"error": f"{type(problem).__name__}: {problem}"[:500]}
        signal.alarm(0)
        torch.cuda.empty_cache()
        keep(key, row)


if __name__ == "__main__":
    main()
