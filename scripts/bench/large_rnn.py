"""Accuracy, then speed, of LSTMs with one large dense head on one GPU, with cuDNN's LSTM in the same run; JSON to --out, written after every part.

python -m scripts.bench.large_rnn --out docs/results/dense_rnn/large.json       # a minute and a half
python -m scripts.bench.large_rnn --held 768 --held-back 768 --shapes 0 --parts accuracy,times --widest 768     # matrices that stay on chip

Every case is a process of its own with a limit of time: programs of these kernels wait for one another, so that a fault in them may hang.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.dense_rnn import large, launch, reference
from kernels.dense_rnn.large import Plan, Tiles
from kernels.parallel_rnn.cell import Cell, biased
from models.cells import bias_init, load_cell
from scripts.bench.timing import Results, attempted, milliseconds

ACCURACY = [("dense_lstm", dtype, K) for K in (256, 768, 2048) for dtype in ("bfloat16", "float16", "float32")]
ACCURACY += [(cell, "bfloat16", 256) for cell in ("dense_gru", "dense_gru_before", "dense_elman", "slstm")]
SHAPES = [(16, 1024, 1, 768), (16, 1024, 1, 2048), (16, 1024, 3, 256)]  # B, T, heads, channels of a head
# of tiles tried beside those that are reckoned
TILES: list[dict[str, Any]] = [
    {"depth": 64}, {"depth": 64, "warps_back": 16}, {"depth": 64, "depth_back": 128}, {"depth": 64, "depth_back": 128, "warps_back": 16},
    {"rows_back": 64, "columns_back": 64, "depth_back": 128, "warps_back": 16}, {"warps": 16},
]  # fmt: skip
NAMES = ("emitted", "final", "d pre", "d rec", "d mat", "d h0")
OPTIONS: dict[str, Any] = {
    "held": large.HELD,
    "dtype": "bfloat16",
    "burn_in": None,
}  # as said to this program, for those that it starts too


def problem(name: str, B: int, T: int, E: int, K: int, gain: float = 1.0) -> tuple[Cell, list[Tensor]]:
    """(cell with biases as models start with, [pre, rec, mat, h0] in fp32)."""
    g, plain, D = torch.Generator("cuda").manual_seed(0), load_cell(name), E * K
    bias = torch.zeros(len(plain.pre), D, device="cuda")
    for argument, (low, high) in bias_init(name).items():
        bias[plain.pre.index(argument)] = torch.linspace(low, high, D, device="cuda")
    rec = torch.cat([torch.zeros(len(plain.rec), D, device="cuda"), bias])
    pre = torch.randn(B, T, len(plain.pre), D, device="cuda", generator=g)
    mat = torch.randn(E, K, len(plain.mat), K, device="cuda", generator=g) * gain * K**-0.5
    return biased(plain), [pre, rec, mat, torch.zeros(B, len(plain.state), D, device="cuda")]


def solved(
    cell: Cell, given: list[Tensor], starts: Tensor | None, d_emitted: Tensor, d_final: Tensor, plan: Plan | None, back: Plan | None
) -> list[Tensor]:
    emitted, kept, final = large.forward(cell, *(*given, starts, plan))
    return [emitted, final, *large.backward(cell, *(*given, starts, emitted, kept, d_emitted, None, d_final, back))]


def accuracy(name: str, kind: str, K: int) -> list[dict[str, Any]]:
    """Relative distances from the float64 loop in shares of the dtype's rounding (fp32: themselves), walked in order and over slices; whether
    results repeat bit for bit, and whether weights that expand are walked bit for bit."""
    dtype, rows = getattr(torch, kind), []
    cell, (pre, rec, mat, h0) = problem(name, 3, 133, 1, K)
    given = [pre.to(dtype), rec, mat.to(dtype), h0]
    g = torch.Generator("cuda").manual_seed(1)
    starts = torch.rand(3, 133, device="cuda", generator=g) < 0.01
    d_emitted, d_final = torch.randn(3, 133, K, device="cuda", generator=g).to(dtype), torch.randn(h0.shape, device="cuda", generator=g)
    exact = [t.double().requires_grad_() for t in given]
    states, final = reference.sequential(cell, *(*exact, starts))
    loss = (states[:, :, -1] * d_emitted).sum() + (final * d_final).sum()
    wanted = [states[:, :, -1].detach(), final.detach(), *torch.autograd.grad(loss, exact)]
    scale = 1.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    for slices in (1, 4):
        plan = Plan.of(cell, given[0], K, slices)
        launch.last_report()
        found, again = (solved(cell, given, starts, d_emitted, d_final, plan, plan) for _ in range(2))
        row: dict[str, Any] = {"cell": name, "dtype": kind, "K": K, "slices": slices, **launch.last_report()}
        row["repeats"] = all(torch.equal(a, b) for a, b in zip(found, again))
        row |= {label: float((a.double() - b).norm() / b.norm() / scale) for label, a, b in zip(NAMES, found, wanted)}
        rows.append(row)
    wild = [pre.to(dtype), rec, (8 * mat).to(dtype), h0]
    one, several = (large.forward(cell, *(*wild, starts, Plan.of(cell, wild[0], K, n))) for n in (1, 4))
    rows[-1]["walked alike"] = all(torch.equal(a, b) for a, b in zip(one, several))
    return rows


def replayed(f: Callable[[], Any]) -> Callable[[], Any]:
    """`f` as a CUDA graph: of solves this short the launches would be timed else."""
    f()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        f()
    return graph.replay


def timed(
    shape: tuple[int, ...], tiles: Tiles | None, walk: bool, warm: bool, dtype: torch.dtype = torch.bfloat16, burn_in: int | None = None
) -> list[dict[str, Any]]:
    """Milliseconds of forward, and of forward and backward with all gradients; corrections, residual and share walked. warm: builds the kernels and
    measures nothing."""
    B, T, E, K = shape
    cell, (pre, rec, mat, h0) = problem("dense_lstm", B, T, E, K)
    given = [pre.to(dtype), rec, mat, h0]
    d_emitted, d_final = torch.randn(B, T, E * K, device="cuda").to(dtype), torch.zeros_like(h0)
    rows = []
    for slices in (None, 1) if walk else (None,):
        plan, back = (Plan.of(cell, given[0], K, slices, burn_in, tiles, back) for back in (False, True))
        launch.last_report()
        solved(cell, given, None, d_emitted, d_final, plan, back)
        report, repeats = launch.last_report(), 5
        if warm:
            continue
        forward = milliseconds(replayed(functools.partial(large.forward, cell, *(*given, None, plan))), repeats)
        both = milliseconds(replayed(functools.partial(solved, cell, given, None, d_emitted, d_final, plan, back)), repeats)
        rows.append(
            {"shape": shape, "dtype": str(dtype), "tiles": str(plan.tiles), "burn_in": plan.burn_in, "slices": plan.slices, "slices_backward": back.slices, "forward_ms": forward,
             "forward_backward_ms": both, **report}
        )  # fmt: skip
    return rows


def cudnn(shape: tuple[int, ...]) -> list[dict[str, Any]]:
    """torch.nn.LSTM of one dense head of the same width, its input product included."""
    B, T, E, K = shape
    rows = []
    for dtype in (torch.float16, torch.bfloat16):
        model = torch.nn.LSTM(E * K, E * K, batch_first=True, device="cuda", dtype=dtype)
        x = torch.randn(B, T, E * K, device="cuda", dtype=dtype, requires_grad=True)
        dy = torch.randn_like(x)

        def both(model: Any = model, x: Tensor = x, dy: Tensor = dy) -> None:
            model.zero_grad()
            model(x)[0].backward(dy)

        forward = milliseconds(functools.partial(model, x), 3)
        rows.append({"cudnn": str(dtype), "shape": shape, "forward_ms": forward, "forward_backward_ms": milliseconds(both, 3)})
    return rows


def call_by_call(kind: str, K: int, rows: int) -> list[dict[str, Any]]:
    """Seconds of one call after the other, said as they end, so that a process that hangs or compiles for long says where; rows: of a tile forwards."""
    began, dtype = time.monotonic(), getattr(torch, kind)
    cell, (pre, rec, mat, h0) = problem("dense_lstm", 3, 133, 1, K)
    given, d_final = [pre.to(dtype), rec, mat.to(dtype), h0], torch.zeros_like(h0)
    tiles = Tiles.of(cell, given[0], K)
    tiles = replace(tiles, rows=rows or tiles.rows)
    said: list[dict[str, Any]] = []

    def say(what: str) -> None:
        torch.cuda.synchronize()
        said.append({"stage": what, "rows": tiles.rows, "seconds": round(time.monotonic() - began, 2)})
        print(json.dumps(said[-1]), flush=True)

    say("problem")
    for slices in (1, 4):
        plan = Plan.of(cell, given[0], K, slices, tiles=tiles)
        emitted, kept, _ = large.forward(cell, *(*given, None, plan))
        say(f"forward, {slices}")
        large.forward(cell, *(*given, None, plan))
        say(f"forward, {slices}, again")
        large.backward(cell, *(*given, None, emitted, kept, torch.randn_like(emitted), None, d_final, plan))
        say(f"backward, {slices}")
    return said


def job(words: list[str]) -> list[dict[str, Any]]:
    if words[0] == "stages":
        return call_by_call(words[1], int(words[2]), int(words[3]))
    if words[0] == "accuracy":
        return accuracy(words[1], words[2], int(words[3]))
    shape = SHAPES[int(words[1])]
    if words[0] == "cudnn":
        return cudnn(shape)
    dtype = getattr(torch, OPTIONS["dtype"])
    cell, given = load_cell("dense_lstm"), torch.empty(1, 1, 4, shape[3], dtype=dtype)
    tiles = Tiles.of(cell, given, shape[3])
    if len(words) > 2:
        tiles = replace(tiles, **TILES[int(words[2])])
    burn_in = OPTIONS["burn_in"]
    return timed(shape, tiles, len(words) == 2 and burn_in is None, words[0] == "warm", dtype, burn_in)


def apart(*words: object, seconds: float = 70) -> list[dict[str, Any]]:
    """`job` in a process of its own. Raises RuntimeError with the end of what it said, if it failed or took too long."""
    command = [sys.executable, "-m", "scripts.bench.large_rnn", "--job", *map(str, words)]
    command += [word for name, value in OPTIONS.items() if value is not None for word in (f"--{name.replace('_', '-')}", str(value))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired as late:
        said = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        raise RuntimeError(f"{words}: longer than {seconds} s, after {said[-300:]!r}") from None
    if done.returncode:
        raise RuntimeError(f"{words}: {done.stderr[-400:]}")
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--parts", default="accuracy,times,tiles")
    parser.add_argument("--seconds", type=float, default=95, help="after which no further case is begun")
    parser.add_argument("--shapes", type=int, nargs="*", default=list(range(len(SHAPES))), help="which of the shapes, by number")
    parser.add_argument("--widest", type=int, default=2048, help="channels of a head up to which accuracy is measured")
    parser.add_argument("--stages", type=int, default=0, help="a head of so many channels, call by call, in 16 bits; nothing else")
    parser.add_argument("--held", type=int, default=large.HELD, help="channels up to which matrices stay on chip forwards, where they can")
    parser.add_argument("--held-back", type=int, default=large.HELD_BACK, help="the same backwards")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"], help="in which times are taken")
    parser.add_argument("--burn-in", type=int, help="steps, of the times over slices")
    parser.add_argument("--job", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    OPTIONS.update(held=arguments.held, held_back=arguments.held_back, dtype=arguments.dtype, burn_in=arguments.burn_in)
    large.HELD, large.HELD_BACK = arguments.held, arguments.held_back
    if not torch.cuda.is_available():
        sys.exit("This measures a GPU, and there is none here.")
    if arguments.job:
        print(json.dumps(job(arguments.job)))
        return
    began, parts, results = time.monotonic(), arguments.parts.split(","), Results(arguments.out, torch.device("cuda"))

    def keep(part: str, words: tuple[object, ...], seconds: float) -> None:
        if time.monotonic() - began > arguments.seconds:
            return
        rows: Any = attempted(functools.partial(apart, *words, seconds=seconds))
        for row in rows if isinstance(rows, list) else [rows]:
            results.append(part, row)

    if arguments.stages:
        cases_ = [("stages", kind, arguments.stages, rows) for kind, rows in (("bfloat16", 0), ("bfloat16", 64), ("float16", 64))]
        with ThreadPoolExecutor(3) as pool:
            for case in [pool.submit(keep, "stages", words, arguments.seconds) for words in cases_]:
                case.result()
        return
    measured: list[tuple[Any, ...]] = [("times", i) for i in arguments.shapes] if "times" in parts else []
    tried: list[tuple[Any, ...]] = [("times", 0, which) for which in range(len(TILES))] if "tiles" in parts else []
    with ThreadPoolExecutor(14) as pool:
        cases = [
            pool.submit(keep, "accuracy", ("accuracy", *case), 70)
            for case in ACCURACY
            if "accuracy" in parts and case[2] <= arguments.widest
        ]
        cases += [pool.submit(attempted, functools.partial(apart, "warm", *words[1:])) for words in (*measured, *tried)]
        for case in cases:
            case.result()
    for words in measured:
        keep("times", words, 30)
        keep("cudnn", ("cudnn", words[1]), 20)
    for words in tried:
        keep("tiles", words, 20)


if __name__ == "__main__":
    main()
