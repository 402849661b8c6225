"""Accuracy, then speed, of LSTMs with dense heads on one GPU, with cuDNN's LSTM in the same run; JSON to --out, written after every part.

python -m scripts.bench.dense_rnn --out docs/results/dense_rnn/gpu.json                    # accuracy, solves, cuDNN: three minutes
python -m scripts.bench.dense_rnn --out sweep.json --parts sweep                           # slices, burn-in, rows and warps; builds many kernels

Run it before the kernels are trusted (PROVEN in kernels/dense_rnn/launch.py): every case of the accuracy is a process of its own, so that a wrong
access to memory ends that one alone.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
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
SHAPES = [(16, 1024, 12, 64), (16, 2048, 16, 64), (1, 16384, 12, 64), (16, 1024, 6, 128), (16, 1024, 24, 32)]
CASES = [
    (cell, dtype, K, slices)
    for cell, dtype, K, slices in itertools.product(("dense_lstm",), ("bfloat16", "float16", "float32"), (16, 32, 48, 64, 128), (1, 4))
    if K <= launch.LARGEST[getattr(torch, dtype).itemsize]
] + [(cell, "bfloat16", 64, 4) for cell in ("dense_gru", "dense_gru_before", "dense_elman", "slstm")]
NAMES = ("emitted", "final", "d pre", "d rec", "d mat", "d h0")
TILES = {32: ((16, 8), (32, 8)), 64: ((16, 4), (16, 8), (32, 8)), 128: ((16, 8), (16, 16))}  # rows and warps of a program


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


def apart(index: int) -> dict[str, Any]:
    """`accuracy` of a case in a process of its own. Raises RuntimeError with the end of what it said, if it failed."""
    command = [sys.executable, "-m", "scripts.bench.dense_rnn", "--case", str(index)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        raise RuntimeError(f"{CASES[index]}: {done.stderr[-300:]}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def replayed(f: Callable[[], Any]) -> Callable[[], Any]:
    """`f` as a CUDA graph: of solves this short the launches would be timed else."""
    f()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        f()
    return graph.replay


def timed(shape: tuple[int, ...], kind: str, plan: Plan | None = None, slices: int | None = None) -> dict[str, Any]:
    """Milliseconds of forward, and of forward and backward with all gradients, in bf16; corrections, residual and share walked."""
    B, T, E, K = shape
    cell, (pre, rec, mat, h0) = problem("dense_lstm", B, T, E, K, kind)
    given = [pre.bfloat16(), rec, mat, h0]
    plan = plan or Plan.of(given[0], K, slices)
    d_emitted, d_final = torch.randn(B, T, E * K, device="cuda").bfloat16(), torch.zeros_like(h0)
    launch.last_report()
    solved(cell, given, None, plan, d_emitted, d_final)
    report = launch.last_report()
    forward = milliseconds(replayed(lambda: launch.forward(cell, *(*given, None, plan))))
    both = milliseconds(replayed(lambda: solved(cell, given, None, plan, d_emitted, d_final)))
    return {"shape": shape, "set": kind, "plan": str(plan), "forward_ms": forward, "forward_backward_ms": both, **report}


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


def sweep(results: Results) -> None:
    for shape in SHAPES:
        B, T, E, K = shape
        for (rows, warps), n, burn_in in itertools.product(TILES[K], (1, 8, 16, 32, 64, 128, 256), (0, 32)):
            if T // n < 32 or n == 1 and burn_in or B * n > 2048:
                continue
            length = -(-T // n)
            plan = Plan(-(-T // length), length, burn_in, rows, warps)
            results.append("sweep", attempted(functools.partial(timed, shape, "init", plan)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--parts", default="accuracy,solves,cudnn")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("This measures a GPU, and there is none here.")
    if arguments.case is not None:
        print(json.dumps(accuracy(*CASES[arguments.case])))
        return
    wanted, results = arguments.parts.split(","), Results(arguments.out, torch.device("cuda"))
    if "accuracy" in wanted:
        for index in range(len(CASES)):
            results.append("accuracy", attempted(functools.partial(apart, index)))
    for shape in SHAPES:
        for kind in ("init", "sketch") if "solves" in wanted else ():
            results.append("solves", attempted(functools.partial(timed, shape, kind)))
        if "solves" in wanted:
            results.append("walks", attempted(functools.partial(timed, shape, "init", slices=1)))
        for dtype in (torch.float16, torch.bfloat16) if "cudnn" in wanted else ():
            results.append("cudnn", attempted(functools.partial(cudnn, shape, dtype)))
    if "sweep" in wanted:
        sweep(results)


if __name__ == "__main__":
    main()
