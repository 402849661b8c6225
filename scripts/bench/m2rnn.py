"""Accuracy, then speed, of M2RNN on one GPU, beside the gated delta rule of the same sizes and plain torch; JSON to --out.

python -m scripts.bench.m2rnn --out docs/results/m2rnn/gpu.json                            # accuracy, times: two minutes
python -m scripts.bench.m2rnn --out sweep.json --parts sweep                               # rows and warps of a program; builds many kernels

Every case of the accuracy is a process of its own, so that a wrong access
to memory ends that one alone.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from kernels.delta_rule import delta_rule
from kernels.m2rnn import launch, m2rnn, reference
from scripts.bench.timing import Results, attempted, milliseconds, unmeasured

# B, T, heads, V, groups, K
# The last is what is published: 84 heads of 16 columns that share one query and key of 64.
SHAPES = [
    (4, 2048, 16, 64, 16, 64), (16, 1024, 12, 64, 12, 64), (1, 16384, 12, 64, 12, 64), (4, 2048, 8, 128, 8, 64), (4, 2048, 16, 64, 16, 128),
    (4, 2048, 84, 16, 1, 64),
]  # fmt: skip
CASES = [
    (kind, sizes, decay)
    for kind, sizes, decay in itertools.product(
        ("bfloat16", "float32", "float16"),
        ((3, 261, 2, 64, 2, 64), (2, 150, 4, 40, 2, 24), (2, 130, 2, 16, 1, 128), (1, 70, 2, 128, 2, 64), (2, 200, 6, 16, 1, 64)),
        (0.5, 0.01),
    )
    if sizes[3] <= launch.WIDEST_OF_FOUR_BYTES or kind == "bfloat16"
]
NAMES = ("o", "final", "dq", "dk", "dv", "dg", "dw", "dh0")


def problem(sizes: tuple[int, ...], dtype: torch.dtype, decay: float) -> list[torch.Tensor]:
    B, T, H, V, G, K = sizes
    r = torch.Generator("cuda").manual_seed(T)
    q, k = (torch.randn(B, T, G, K, device="cuda", generator=r) for _ in range(2))
    v, g = torch.randn(B, T, H, V, device="cuda", generator=r), -decay * torch.rand(B, T, H, device="cuda", generator=r)
    w = 0.5 * torch.eye(V, device="cuda") + 0.3 * torch.randn(H, V, V, device="cuda", generator=r) * V**-0.5
    return [(q * K**-0.5).to(dtype), k.to(dtype), v.to(dtype), g, w, torch.zeros(B, H, K, V, device="cuda")]


def answers(
    rule: Any, given: list[torch.Tensor], starts: torch.Tensor | None, do: torch.Tensor, d_final: torch.Tensor
) -> list[torch.Tensor]:
    leaves = [t.detach().requires_grad_() for t in given]
    o, final = rule(*leaves, starts)
    return [o.detach(), final.detach(), *torch.autograd.grad((o, final), leaves, (do.to(o.dtype), d_final.to(final.dtype)))]


def accuracy(kind: str, sizes: tuple[int, ...], decay: float) -> dict[str, Any]:
    """Relative distances from the float64 loop with the inputs of the dtype; of its answers rounded to the dtype; whether results repeat."""
    dtype = getattr(torch, kind)
    given = problem(sizes, dtype, decay)
    if dtype == torch.bfloat16:
        given[4] = given[4].bfloat16().float()  # enters the product so
    torch.manual_seed(sizes[1])
    given[5] = 0.5 * torch.randn_like(given[5])
    starts = torch.rand(given[0].shape[:2], device="cuda") < 0.01
    do, d_final = torch.randn_like(given[2]), torch.randn_like(given[5])
    found, again = (answers(m2rnn, given, starts, do, d_final) for _ in range(2))
    wanted = answers(reference.m2rnn_sequential, [t.double() for t in given], starts, do.double(), d_final.double())
    row: dict[str, Any] = {"dtype": kind, "sizes": sizes, "decay": decay, "repeats": all(torch.equal(a, b) for a, b in zip(found, again))}
    for label, a, b in zip(NAMES, found, wanted):
        size = b.norm() if b.any() else 1.0  # dh0 is nothing where all rows begin with a document
        row[label] = {"error": float((a.double() - b).norm() / size), "of rounding": float((b.to(dtype).double() - b).norm() / size)}
    return row


def apart(index: int) -> dict[str, Any]:
    """`accuracy` of a case in a process of its own. Raises RuntimeError with the end of what it said, if it failed."""
    command = [sys.executable, "-m", "scripts.bench.m2rnn", "--case", str(index)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        raise RuntimeError(f"{CASES[index]}: {done.stderr[-300:]}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    figures = " ".join(f"{n} {row[n]['error'] / (row[n]['of rounding'] or 1 if row['dtype'] == 'bfloat16' else 1):.1e}" for n in NAMES)
    print(row["dtype"], *row["sizes"], row["decay"], "repeats" if row["repeats"] else "DIFFERS", figures, flush=True)
    return row


def timed(rule: Any, given: list[torch.Tensor], repeats: int = 10) -> dict[str, float]:
    """Milliseconds of forward without and with what the backward pass needs, and of both passes with all gradients."""
    leaves = [t.detach().requires_grad_() for t in given]
    do = torch.randn_like(given[2])

    def both() -> None:
        torch.autograd.grad(rule(*leaves)[0], leaves, do, allow_unused=True)

    with torch.no_grad():
        forward = milliseconds(lambda: rule(*given), repeats)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    peak = (torch.cuda.max_memory_allocated() - before) / 1e6
    return {"forward_ms": forward, "forward_backward_ms": milliseconds(both, repeats), "peak_mb": round(peak)}


def times(sizes: tuple[int, ...], plain: bool) -> dict[str, Any]:
    given = problem(sizes, torch.bfloat16, 0.1)
    row: dict[str, Any] = {"sizes": sizes, "kernels": timed(m2rnn, given)}
    q, k, v, g, w, h0 = given
    beta, first = torch.sigmoid(torch.randn_like(g)), torch.zeros_like(h0.mT)
    rule = functools.partial(delta_rule, normalize=True)
    row["gated delta rule"] = attempted(lambda: timed(rule, [q, k, v, beta, g, first.contiguous()]))
    if plain:
        row["plain torch"] = timed(reference.m2rnn_sequential, given, 1)
    print(json.dumps(row), flush=True)
    return row


def tile(columns: int, number: int) -> dict[str, Any]:
    """Milliseconds of each kernel with the tile of this number, both passes of a shape of so many columns; distance from float64."""
    tiles = {name: choices[number % len(choices)] for name, choices in TILES[columns].items()}
    launch.TILES[columns] = tiles
    sizes = next((sizes for sizes in SHAPES if sizes[3] == columns), (4, 2048, 32, 32, 32, 32))
    given, spans = problem(sizes, torch.bfloat16, 0.1), dict[str, list[float]]()
    launch.WALKS.clear()
    run = launch.Problem.run

    def watched(self: launch.Problem, kernel: str, *arguments: Any, **constants: Any) -> None:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run(self, kernel, *arguments, **constants)
        end.record()
        torch.cuda.synchronize()
        spans.setdefault(kernel, []).append(begin.elapsed_time(end))

    small = problem((2, 100, 2, columns, 2, 64), torch.bfloat16, 0.1)
    do, d_final = torch.randn_like(small[2]), torch.randn_like(small[5])
    found = answers(m2rnn, small, None, do, d_final)
    wanted = answers(reference.m2rnn_sequential, [t.double() for t in small], None, do.double(), d_final.double())
    worst = max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, wanted))
    do, d_final = torch.randn_like(given[2]), torch.zeros_like(given[5])
    launch.Problem.run = watched  # type: ignore[method-assign]
    try:
        for _ in range(3):
            spans.clear()
            answers(m2rnn, given, None, do, d_final)
    finally:
        launch.Problem.run = run  # type: ignore[method-assign]
    row = {"columns": columns, "tiles": tiles, "ms": {kernel: round(sum(times), 4) for kernel, times in spans.items()}, "worst": worst}
    print(json.dumps(row), flush=True)
    return row


# (rows, warps) of programs by columns: each kernel is timed by itself, so that a number may stand for one of each.
TILES: dict[int, dict[str, list[tuple[int, int]]]] = {
    64: {
        "walk": [(16, 4), (16, 2), (32, 4), (16, 8), (64, 4), (64, 8)],
        "slopes": [(16, 1), (64, 4), (16, 2)],
        "adjoint": [(16, 4), (16, 2), (32, 4), (16, 8), (64, 4), (64, 8)],
        "gradients": [(64, 4), (32, 4), (16, 4)],
    },
    16: {
        "walk": [(32, 1), (16, 1), (64, 2), (16, 2)],
        "slopes": [(64, 2), (16, 1), (32, 1)],
        "adjoint": [(16, 1), (16, 2), (32, 1)],
        "gradients": [(32, 1), (16, 1), (64, 2)],
    },
    32: {
        "walk": [(16, 2), (16, 1), (32, 2)],
        "slopes": [(16, 1), (64, 2), (32, 1)],
        "adjoint": [(16, 2), (16, 1), (32, 2)],
        "gradients": [(16, 2), (64, 2), (32, 1)],
    },
    128: {"walk": [(16, 8), (16, 4)], "slopes": [(64, 8), (16, 4)], "adjoint": [(16, 8), (16, 4)], "gradients": [(32, 8), (16, 8)]},
}
SWEEP = [(columns, number) for columns, choices in TILES.items() for number in range(max(map(len, choices.values())))]


def warm(part: str, count: int) -> None:
    """Compiles what a part will run, in processes side by side."""
    commands = [[sys.executable, "-m", "scripts.bench.m2rnn", "--warm", f"{part}:{index}"] for index in range(count)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda command: subprocess.run(command, capture_output=True, check=False, timeout=200), commands))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--parts", default="accuracy,times")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--warm", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("This measures a GPU, and there is none here.")
    if arguments.case is not None:
        print(json.dumps(accuracy(*CASES[arguments.case])))
        return
    if arguments.warm:
        part, index = arguments.warm.split(":")
        with unmeasured():
            times(SHAPES[int(index)], False) if part == "times" else tile(*SWEEP[int(index)])
        return
    wanted, results = arguments.parts.split(","), Results(arguments.out, torch.device("cuda"))
    if "accuracy" in wanted:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for row in pool.map(lambda index: attempted(functools.partial(apart, index)), range(len(CASES))):
                results.append("accuracy", row)
    if "times" in wanted:
        warm("times", len(SHAPES))
    for n, sizes in enumerate(SHAPES) if "times" in wanted else ():
        results.append("times", attempted(functools.partial(times, sizes, n == 0)))
    if "sweep" in wanted:
        warm("sweep", len(SWEEP))
    for one in SWEEP if "sweep" in wanted else ():
        results.append("sweep", attempted(functools.partial(tile, *one)))


if __name__ == "__main__":
    main()
