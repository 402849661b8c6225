"""Accuracy, then speed, of the parallel RNN kernels on one GPU; JSON to --out. Ratios are to the byte limit at the copy bandwidth measured
in the same run.

    python -m scripts.bench.parallel_rnn --out docs/results/parallel_rnn/gpu.json            # everything, some minutes
    python -m scripts.bench.parallel_rnn --out sweep.json --sweep                            # launch sizes only
    python -m scripts.bench.parallel_rnn --out part.json --only accuracy gates               # some parts
    python -m scripts.bench.parallel_rnn --corrections docs/results/parallel_rnn/corrections.json    # on the CPU, seconds
    python -m scripts.bench.parallel_rnn --plot docs/results/parallel_rnn/gpu.json           # draws the JSON
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from models.cells import diagonal
from scripts.bench.parallel_rnn_peers import against_loop, cudnn_row, layer_row, newton_row, peer_row
from scripts.bench.parallel_rnn_plots import corrections, plot
from scripts.bench.parallel_rnn_solve import (
    SHAPES,
    accuracy,
    decode_row,
    gate_row,
    graph_row,
    kernel_row,
    memory_row,
    past_int32,
    sweep,
    time_row,
)  # fmt: skip
from scripts.bench.timing import Results, attempted, copy_bandwidth, unmeasured


def parts(copy: float) -> list[tuple[str, Callable[[], Any]]]:
    """(key of the JSON, what makes one of its rows), the most telling first."""
    pair = ("paragru", "paralstm")
    out: list[tuple[str, Callable[[], Any]]] = []

    def add(key: str, make: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        out.append((key, functools.partial(make, *arguments, **named)))

    for name in pair:
        add("accuracy", accuracy, name)
        for shape in SHAPES:
            add("kernels", kernel_row, name, *shape, copy)
        for shape in SHAPES[:3]:
            add("corrected", kernel_row, name, *shape, copy, memory=-5.0)
    for shape, bias, name in itertools.product((SHAPES[2], SHAPES[0]), ("as initialised", *BIASES, "as initialised -6"), pair):
        add("gates", gate_row, name, *shape, copy, bias)
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
    for name in diagonal():
        if name not in pair:
            add("accuracy", accuracy, name)
            add("kernels", kernel_row, name, *SHAPES[2], copy)
    return out


BIASES = (-6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)  # of the gate that lets the state change
COMPILED = (
    "accuracy",
    "kernels",
    "corrected",
    "gates",
    "layers",
    "graph",
    "memory",
    "decode",
)  # keys whose kernels are compiled beforehand


def warm(share: int, of: int, only: list[str] | None) -> None:
    """Runs every of-th part that compiles kernels once, unmeasured: Triton keeps what it compiled on disk."""
    compiled_parts = [make for key, make in parts(1.0) if key in COMPILED and (not only or key in only)]
    with unmeasured():
        for make in compiled_parts[share::of]:
            row = attempted(make)
            if isinstance(row, dict) and "error" in row:  # the measured run says it
                print(f"warm: {row['error']}"[:300], flush=True)


def warm_up(processes: int, only: list[str] | None) -> None:
    command = [sys.executable, "-m", "scripts.bench.parallel_rnn", *(["--only", *only] if only else []), "--warm"]
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
        return warm(int(share), int(of), options.only)
    results = Results(options.out, torch.device("cuda"), copy_bytes_per_ms=copy_bandwidth())
    copy = results.values["copy_bytes_per_ms"]

    def late(*_: Any) -> None:
        raise TimeoutError(f"more than {options.part} s")

    signal.signal(signal.SIGALRM, late)
    if options.sweep:
        return sweep(copy, functools.partial(results.append, "sweep"))
    if options.processes > 1:
        warm_up(options.processes, options.only)
        print(f"{results.elapsed():.1f} s: kernels compiled", flush=True)
    for key, make in parts(copy):
        if options.only and key not in options.only:
            continue
        if results.elapsed() > options.total:
            results.append(key, {"skipped": f"after {options.total} s"})
            continue
        signal.alarm(options.part)
        row = attempted(make)
        signal.alarm(0)
        torch.cuda.empty_cache()
        results.append(key, row)


if __name__ == "__main__":
    main()
