"""Accuracy, then speed, of LSTMs with dense heads on one GPU, with cuDNN's LSTM in the same run; JSON to --out, written after every part.

python -m scripts.bench.dense_rnn --out docs/results/dense_rnn/gpu.json                    # accuracy, solves, cuDNN: two minutes
python -m scripts.bench.dense_rnn --out final.json --parts final                           # a minute: every shape by the reckoned plan
python -m scripts.bench.dense_rnn --out near.json --parts few,solves,near --seconds 120    # heads of 64: three shapes, plans near to the reckoned
python -m scripts.bench.dense_rnn --out sweep.json --parts sweep                           # slices, burn-in, rows and warps; builds many kernels

Run it before the kernels are trusted (PROVEN in kernels/dense_rnn/large.py): accuracy runs in several processes, so that a wrong access to memory
ends one alone.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.dense_rnn import launch, reference
from kernels.dense_rnn.launch import Plan
from kernels.parallel_rnn.cell import Cell, biased
from models.cells import bias_init, load_cell
from scripts.bench.timing import Results, attempted, milliseconds

# B, T, heads, channels of a head
SHAPES: list[tuple[int, ...]] = [(16, 1024, 12, 64), (16, 2048, 16, 64), (1, 16384, 12, 64), (16, 1024, 6, 128), (16, 1024, 24, 32)]
CASES = [
    (cell, dtype, K, slices)
    for cell, dtype, K, slices in itertools.product(("dense_lstm",), ("bfloat16", "float16", "float32"), (16, 32, 48, 64, 128), (1, 4))
    if K <= launch.LARGEST[getattr(torch, dtype).itemsize]
] + [
    (cell, dtype, 64, 4)
    for cell, dtype in itertools.product(("dense_gru", "dense_gru_before", "dense_elman", "slstm"), ("bfloat16", "float16", "float32"))
]
# a group is a process: one cell in one dtype, of LSTMs one size
GROUPS = [list(cases) for _, cases in itertools.groupby(CASES, key=lambda case: case[:3])]
NAMES = ("emitted", "final", "d pre", "d rec", "d mat", "d h0")
TILES = {32: ((8, 4), (16, 8)), 64: ((8, 4), (16, 4), (16, 8), (32, 8)), 128: ((16, 8), (16, 16))}  # rows and warps of a program


def problem(name: str, B: int, T: int, E: int, K: int, kind: str = "init") -> tuple[Cell, list[Tensor]]:
    """(cell with biases, [pre, rec, mat, h0] in fp32). kind: "init", biases as models start with; "sketch", slightly remembering."""
    g, plain, D = torch.Generator("cuda").manual_seed(0), load_cell(name), E * K
    pre = torch.randn(B, T, len(plain.pre), D, device="cuda", generator=g) * (0.7 if kind == "sketch" else 1.0)
    bias = torch.zeros(len(plain.pre), D, device="cuda")
    if kind == "sketch":
        bias[plain.pre.index("f")] = 1.0
    else:
        for argument, (low, high) in bias_init(name).items():
            bias[plain.pre.index(argument)] = torch.linspace(low, high, D, device="cuda")
    rec = torch.cat([torch.zeros(len(plain.rec), D, device="cuda"), bias])
    mat = torch.randn(E, K, len(plain.mat), K, device="cuda", generator=g) * K**-0.5
    return biased(plain), [pre, rec, mat, torch.zeros(B, len(plain.state), D, device="cuda")]


def solved(cell: Cell, given: list[Tensor], starts: Tensor | None, plan: Plan, d_emitted: Tensor, d_final: Tensor) -> list[Tensor]:
    emitted, kept, final = launch.forward(cell, *(*given, starts, plan))
    return [emitted, final, *launch.backward(cell, *(*given, starts, emitted, kept, d_emitted, None, d_final, plan))]


def accuracy(name: str, kind: str, K: int, slices: int) -> dict[str, Any]:
    """Relative distances from the float64 loop, and of its answers rounded to the dtype; whether results repeat bit for bit."""
    dtype = getattr(torch, kind)
    cell, (pre, rec, mat, h0) = problem(name, 3, 261, 2, K)
    given = [pre.to(dtype), rec, mat.to(dtype), h0]
    starts = torch.rand(3, 261, device="cuda") < 0.01
    d_emitted, d_final = torch.randn(3, 261, 2 * K, device="cuda").to(dtype), torch.randn_like(h0)
    plan = Plan.of(given[0], K, slices)
    found, again = (solved(cell, given, starts, plan, d_emitted, d_final) for _ in range(2))
    exact = [t.double().requires_grad_() for t in given]
    states, final = reference.sequential(cell, *(*exact, starts))
    loss = (states[:, :, -1] * d_emitted).sum() + (final * d_final).sum()
    wanted = [states[:, :, -1], final, *torch.autograd.grad(loss, exact)]
    row: dict[str, Any] = {"cell": name, "dtype": kind, "K": K, "slices": slices, **launch.last_report()}
    row["repeats"] = all(torch.equal(a, b) for a, b in zip(found, again))
    for label, a, b in zip(NAMES, found, wanted):
        rounded = (b.to(dtype).double() - b).norm() / b.norm()
        row[label] = {"error": float((a.double() - b).norm() / b.norm()), "of rounding": float(rounded)}
    return row


def group(index: int) -> list[dict[str, Any]]:
    """`accuracy` of a group's cases."""
    return [{"case": case, **attempted(functools.partial(accuracy, *case))} for case in GROUPS[index]]


def warm(cell_name: str, D: int, K: int, rows: int, warps: int) -> list[dict[str, Any]]:
    """Compiles what solves of this width launch with this tile, side by side in several processes."""
    cell, (pre, rec, mat, h0) = problem(cell_name, 2, 512, D // K, K)
    given = [pre.bfloat16(), rec, mat, h0]
    for n in (1, 8):
        solved(cell, given, None, Plan.of(given[0], K, n, None, rows, warps), given[0][:, :, 0].contiguous(), torch.zeros_like(h0))
    torch.cuda.synchronize()
    return []


def apart(*words: object) -> list[dict[str, Any]]:
    """What this program prints with these words, in a process of its own: a wrong access to memory ends that one alone."""
    command = [sys.executable, "-m", "scripts.bench.dense_rnn", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    if done.returncode:
        return [{"words": words, "error": done.stderr[-300:]}]
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return rows


def errors(row: dict[str, Any]) -> str:
    """An accuracy in a line: errors as multiples of what rounding alone loses, in fp32 errors themselves."""
    if "error" in row:
        return str(row)
    lost = [row[name]["error"] / (row[name]["of rounding"] if row["dtype"] != "float32" else 1.0) for name in NAMES if name != "d rec"]
    words = [str(row[key]) for key in ("cell", "dtype", "K", "slices", "repeats")] + [f"{v:.2g}" for v in lost]
    return " ".join(words + [f"{row[f'{key}{side}']:.2g}" for side in ("", "_backward") for key in ("corrections", "residual", "walked")])


def side_by_side(results: Results, groups: list[int], tiles: list[tuple[str, int, int, int, int]]) -> None:
    """Accuracy, and kernels of later parts compiled, in as many processes as there are cores."""
    words: list[tuple[object, ...]] = [("--warm", *tile) for tile in tiles] + [("--group", i) for i in groups]
    with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as pool:
        for rows in pool.map(lambda w: apart(*w), words):
            results.quiet("accuracy", rows)
            for row in rows:
                print(errors(row), flush=True)
    print(f"{results.elapsed():.1f} s")


def replayed(f: Callable[[], Any]) -> Callable[[], Any]:
    """`f` as a CUDA graph: of solves this short the launches would be timed else."""
    f()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        f()
    return graph.replay


def timed(
    shape: tuple[int, ...], kind: str, plan: Plan | None = None, slices: int | None = None, repeats: int = 10, name: str = "dense_lstm"
) -> dict[str, Any]:  # fmt: skip
    """Milliseconds of forward, and of forward and backward with all gradients, in bf16; corrections, residual and share walked."""
    B, T, E, K = shape
    cell, (pre, rec, mat, h0) = problem(name, B, T, E, K, kind)
    given = [pre.bfloat16(), rec, mat, h0]
    plan = plan or Plan.of(given[0], K, slices, 0)
    d_emitted, d_final = torch.randn(B, T, E * K, device="cuda").bfloat16(), torch.zeros_like(h0)
    launch.last_report()
    solved(cell, given, None, plan, d_emitted, d_final)
    report = launch.last_report()
    forward = milliseconds(replayed(lambda: launch.forward(cell, *(*given, None, plan))), repeats)
    both = milliseconds(replayed(lambda: solved(cell, given, None, plan, d_emitted, d_final)), repeats)
    return {"shape": shape, "cell": name, "set": kind, "plan": str(plan), "forward_ms": forward, "forward_backward_ms": both, **report}


def cudnn(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    """torch.nn.LSTM of one dense head of the same width, its input product included."""
    B, T, E, K = shape
    model = torch.nn.LSTM(E * K, E * K, batch_first=True, device="cuda", dtype=dtype)
    x = torch.randn(B, T, E * K, device="cuda", dtype=dtype, requires_grad=True)
    dy = torch.randn_like(x)

    def both() -> None:
        model.zero_grad()
        model(x)[0].backward(dy)

    repeats = 2 if T > 4096 else 5
    return {
        "shape": shape, "dtype": str(dtype), "forward_ms": milliseconds(lambda: model(x)[0], repeats),
        "forward_backward_ms": milliseconds(both, repeats),
    }  # fmt: skip


def plans(shape: tuple[int, ...], wide: bool) -> list[Plan]:
    """Those of a sweep, `wide`, or near to what is reckoned."""
    B, T, E, K = shape
    reckoned = Plan.of(torch.empty(B, T, 1, E, K, device="cuda", dtype=torch.bfloat16), K)
    counts = (1, 8, 16, 32, 64, 128, 256) if wide else [round(reckoned.slices * f) for f in (0.7, 1, 1.5, 2)]
    made = []
    for (rows, warps), n, burn_in in itertools.product(TILES[K], counts, (0, 32) if wide else (0, 32, 64)):
        length = -(-T // n)
        if length < 32 or n == 1 and burn_in or B * n > 4096:
            continue
        made.append(Plan(-(-T // length), length, min(burn_in, length), rows, warps))
    return list(dict.fromkeys(made))


def short(row: dict[str, Any]) -> str:
    """A timing in a line."""
    if "error" in row:
        return f"{row['plan']} {row['error']}"
    words = [f"{row[key]:.3f}" for key in ("forward_ms", "forward_backward_ms")]
    words += [f"{row[f'{key}{side}']:.2g}" for side in ("", "_backward") for key in ("corrections", "residual", "walked")]
    return f"{row['set']} {row['plan'][5:-1]}: " + " ".join(words)


def sweep(results: Results, shapes: list[tuple[int, ...]], kinds: tuple[str, ...], wide: bool, seconds: float) -> None:
    """All plans; the best forward and the best of both ways are printed at the end of each shape."""
    for index, (shape, kind) in enumerate(itertools.product(shapes, kinds)):
        rows = []
        end = results.elapsed() + (seconds - results.elapsed()) / (len(shapes) * len(kinds) - index)
        for plan in plans(shape, wide):
            if results.elapsed() > end:
                print(f"no time for more plans of {shape}", flush=True)
                break
            rows.append({"plan": str(plan), **attempted(functools.partial(timed, shape, kind, plan, repeats=5))})
        results.quiet("sweep", rows)
        right = [row for row in rows if "error" not in row]
        for key in ("forward_ms", "forward_backward_ms"):
            print(shape, f"by {key}", *(short(row) for row in sorted(right, key=lambda row: float(row[key]))[:4]), sep="\n  ", flush=True)
        for row in rows:
            if "error" in row:
                print(" ", short(row), flush=True)


def final(results: Results) -> None:
    """All shapes by the reckoned plan with every tile, and other cells beside the LSTM; a line each."""
    first = TILES[64][0]
    wanted = {("dense_lstm", E * K, K, *tile) for _, _, E, K in SHAPES for tile in TILES[K]}
    wanted |= {(name, 768, 64, *first) for name in ("dense_gru", "dense_gru_before", "slstm")}
    few = [
        i
        for i, ((name, dtype, K, _), *_) in enumerate(GROUPS)
        if K == 64 and (name == "dense_lstm" or name == "slstm" and dtype == "bfloat16")
    ]
    side_by_side(results, few, sorted(wanted))
    cases: list[tuple[str, tuple[int, ...], str, tuple[int, int], int | None]] = [("dense_lstm", SHAPES[0], "init", first, 1)]
    cases += [("dense_lstm", shape, kind, tile, None) for shape in SHAPES for kind in ("init", "sketch") for tile in TILES[shape[3]]]
    cases += [("dense_lstm", shape, kind, first, 2) for shape in SHAPES[:3] for kind in ("init", "sketch")]  # twice as many slices
    cases += [(name, SHAPES[0], "init", first, None) for name in ("dense_gru", "dense_gru_before", "slstm")]
    for name, shape, kind, tile, slices in cases:
        B, T, E, K = shape
        like = torch.empty(B, T, 1, E, K, device="cuda", dtype=torch.bfloat16)
        slices = 2 * Plan.of(like, K).slices if slices == 2 else slices
        plan = Plan.of(like, K, slices, 0, *tile)
        row = {"plan": str(plan), **attempted(functools.partial(timed, shape, kind, plan, repeats=5, name=name))}
        results.quiet("final", [row])
        print(name, shape, short(row), flush=True)
    attempted(functools.partial(profile, results, SHAPES[0]))


def profile(results: Results, shape: tuple[int, ...]) -> None:
    """Microseconds of every kernel of one solve, forwards and backwards."""
    B, T, E, K = shape
    cell, (pre, rec, mat, h0) = problem("dense_lstm", B, T, E, K)
    given = [pre.bfloat16(), rec, mat, h0]
    plan, d_emitted = Plan.of(given[0], K, None, 0), torch.randn(B, T, E * K, device="cuda").bfloat16()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        solved(cell, given, None, plan, d_emitted, torch.zeros_like(h0))
        torch.cuda.synchronize()
    found = [(e.name[:24], round(e.device_time, 1)) for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    began = time.perf_counter()
    for _ in range(10):
        launch.forward(cell, *(*given, None, plan))
    host = 100 * (time.perf_counter() - began)
    results.append("profile", {"shape": shape, "host_ms_of_a_forward": host, "kernels": found})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--parts", default="accuracy,solves,cudnn")
    parser.add_argument("--seconds", type=float, default=1e9, help="after which a sweep begins no further plan")
    parser.add_argument("--group", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--warm", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("This measures a GPU, and there is none here.")
    if arguments.group is not None or arguments.warm:
        print(json.dumps(warm(arguments.warm[0], *map(int, arguments.warm[1:])) if arguments.warm else group(arguments.group)))
        return
    wanted, results = arguments.parts.split(","), Results(arguments.out, torch.device("cuda"))
    if "final" in wanted:
        final(results)
        return
    near = "near" in wanted
    shapes = SHAPES[:3] if near else SHAPES
    widths = sorted({(E * K, K) for _, _, E, K in shapes}) if {"near", "sweep", "solves"} & {*wanted} else []
    groups = [i for i, cases in enumerate(GROUPS) if "accuracy" in wanted or "few" in wanted and cases[0][2] == 64]
    side_by_side(results, groups, [("dense_lstm", *width, *tile) for width in widths for tile in TILES[width[1]]])
    for shape in shapes:
        for kind in ("init", "sketch") if "solves" in wanted else ():
            results.append("solves", attempted(functools.partial(timed, shape, kind)))
        if "solves" in wanted:
            results.append("walks", attempted(functools.partial(timed, shape, "init", slices=1)))
        for dtype in (torch.float16, torch.bfloat16) if "cudnn" in wanted else ():
            if not near or dtype == torch.float16 or shape[1] < 4096:
                results.append("cudnn", attempted(functools.partial(cudnn, shape, dtype)))
    if near:
        attempted(functools.partial(profile, results, shapes[0]))
    if near or "sweep" in wanted:
        sweep(results, shapes, ("init", "sketch") if near else ("init",), not near, arguments.seconds)


if __name__ == "__main__":
    main()
