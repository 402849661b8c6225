"""Times of dense heads on three sets of weights: random ones that remember a little (sketch), as models here start (init), and layers of language
models that were trained for it, with the inputs that they get on text (trained). By the reckoned plan, and by the one that a layer learns.

python -m scripts.bench.dense_sets --out docs/results/dense_rnn/sets.json --train 60 --seconds 95     # one GPU, alone: a minute of training first

Each row says corrections, residual and the share of slices walked in order, forwards then backwards. Beside them: the walk in order, the other
cells, cuDNN's LSTM, time against T, and corrections against memory and gain.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.shards import ShardSet
from kernels.dense_rnn import launch, reference
from kernels.dense_rnn.launch import Plan
from kernels.parallel_rnn import with_bias
from kernels.parallel_rnn.cell import Cell, biased
from models.cells import load_cell
from models.checkpoint import load_model
from models.mixers import rnn
from scripts.bench.dense_plans import learnt
from scripts.bench.dense_plots import draw
from scripts.bench.dense_rnn import SHAPES, cudnn, problem, replayed
from scripts.bench.timing import Results, attempted, milliseconds

LENGTH, BATCH = 4096, 8  # tokens of a sequence in training, sequences of a step
LAYERS, STEPS = 2, 300
DATA = Path("runs/data/dense_sets")
Given = list[Tensor]  # pre, rec, mat, h0


def run_of(D: int, K: int) -> Path:
    return Path(f"runs/dense_sets/{D}x{K}")


def command(D: int, K: int, *more: str) -> list[str]:
    """Trains a model of two layers of this width and head size."""
    sizes = ["model=dense_lstm", "size=125m", f"size.d_model={D}", f"size.n_layers={LAYERS}", f"model.mixers.dense_lstm.head_size={K}"]
    sizes += [f"train.seq_len={LENGTH}", f"train.global_batch={BATCH}", f"train.micro_batch={BATCH}", "train.precision=bf16"]
    rest = [f"train.steps={STEPS}", "schedule=cosine", "optim.lr=2e-3", "eval=end", "eval.tokens=8192", "eval.sample_tokens=1"]
    return [sys.executable, "train.py", *sizes, *rest, f"data.path={DATA}", f"run_dir={run_of(D, K)}", *more]


def train(widths: list[tuple[int, int]], seconds: float) -> list[subprocess.Popen[bytes]]:
    """Begins all trainings side by side, after the text was turned into shards."""
    if not DATA.exists():
        prepare = [sys.executable, "-m", "data.prepare", "input=demo", f"out={DATA}", "tokenizer=bpe:2048", "valid_docs=[2]"]
        subprocess.run(prepare, check=True, stdout=subprocess.DEVNULL)
    running = []
    for D, K in widths:
        run_of(D, K).mkdir(parents=True, exist_ok=True)
        with (run_of(D, K) / "said.txt").open("wb") as said:
            running.append(subprocess.Popen(command(D, K), stdout=said, stderr=subprocess.STDOUT))
    return running


def stop(running: list[subprocess.Popen[bytes]]) -> None:
    for process in running:
        process.send_signal(signal.SIGTERM)
    for process in running:
        try:
            process.wait(25)
        except subprocess.TimeoutExpired:
            process.kill()


def history(D: int, K: int) -> list[dict[str, Any]]:
    """Losses and what the dense solves needed, over the steps of a training."""
    lines = (run_of(D, K) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if k in ("step", "loss") or k.startswith("dense_")} for row in rows if "dense_corrections" in row]


@torch.no_grad()
def layers(D: int, K: int, B: int, T: int, device: str = "cuda") -> Iterator[tuple[str, Cell, Given]]:
    """(name, cell, [pre, rec, mat, h0]) of the layers of a trained model, on B rows of T tokens of its text."""
    model, _, _ = load_model(run_of(D, K), device)
    ids = torch.from_numpy(ShardSet(DATA, "valid").read(0, B * T).astype("int64")).view(B, T).to(device)
    seen: list[tuple[Cell, Given]] = []
    solve = rnn.dense_rnn

    def noted(cell: Cell, pre: Tensor, rec: Tensor, mat: Tensor, *more: Any, bias_PD: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        h0 = torch.zeros(B, len(cell.state), D, device=pre.device)
        seen.append((biased(cell), [pre.flatten(3).contiguous(), with_bias(rec, bias_PD).float(), mat.float().contiguous(), h0]))
        return solve(cell, pre, rec, mat, *more, bias_PD=bias_PD, **options)

    rnn.dense_rnn = noted  # type: ignore[assignment]
    try:
        with torch.autocast(device, torch.bfloat16):
            model(ids, last_only=True)
    finally:
        rnn.dense_rnn = solve
    for i, (cell, given) in enumerate(seen):
        yield f"trained, layer {i}", cell, given


def timed(cell: Cell, given: Given, forward: Plan, back: Plan, d_emitted: Tensor, repeats: int = 5) -> dict[str, Any]:
    """Milliseconds in bf16 of forward, and of forward and backward with all gradients; corrections, residual and share walked."""
    d_final = torch.zeros_like(given[3])

    def both() -> None:
        emitted, kept, _ = launch.forward(cell, *(*given, None, forward))
        launch.backward(cell, *(*given, None, emitted, kept, d_emitted, None, d_final, back))

    launch.last_report()
    both()
    report = launch.last_report()
    forward_ms = milliseconds(replayed(lambda: launch.forward(cell, *(*given, None, forward))), repeats)
    shown = [[plan.slices, plan.length, plan.burn_in] for plan in (forward, back)]
    return {"plans": shown, "forward_ms": forward_ms, "forward_backward_ms": milliseconds(replayed(both), repeats), **report}


def line(row: dict[str, Any]) -> str:
    """A row for the screen: slices/burn-in, milliseconds, then corrections, residual and share walked of both ways."""
    if "error" in row:
        return f"{row['set']} {row['error']}"
    plans = " ".join(f"{n}/{W}" for n, _, W in row["plans"])
    found = " ".join(f"{row[f'{key}{side}']:.2g}" for side in ("", "_backward") for key in ("corrections", "residual", "walked"))
    return (
        f"{row['cell']} {row['shape']} {row['set']} {row['by']} {plans}: {row['forward_ms']:.3f} {row['forward_backward_ms']:.3f} | {found}"
    )


def rows_of(results: Results, name: str, shape: tuple[int, ...], kind: str, cell: Cell, given: Given, walk: bool = False) -> None:
    """Times of one problem by all plans that it may have."""
    d_emitted = torch.randn(given[0].shape[0], shape[1], given[3].shape[2], device="cuda").bfloat16()
    choices: list[tuple[str, Any]] = [
        ("reckoned", lambda: (launch.in_force(cell, given[0], shape[3], None, False),) * 2),
        ("learnt", lambda: learnt(cell, given, d_emitted)),
    ]
    if walk:
        choices.append(("in order", lambda: (Plan.of(given[0], shape[3], 1),) * 2))
    for by, plans in choices:

        def row(plans: Any = plans) -> dict[str, Any]:
            forward, back = plans()
            return timed(cell, given, forward, back, d_emitted)

        found = {"cell": name, "shape": shape, "set": kind, "by": by, **attempted(row)}
        results.quiet("times", [found])
        print(line(found), flush=True)


def made(shape: tuple[int, ...], kind: str, name: str = "dense_lstm") -> tuple[Cell, Given]:
    B, T, E, K = shape
    return problem(name, B, T, E, K, kind)


def seen(shape: tuple[int, ...]) -> list[tuple[str, Cell, Given]]:
    B, T, E, K = shape
    return list(layers(E * K, K, B, T))


def lower(given: Given) -> Given:
    """In bf16, the inputs in blocks of up to 256 channels, as a model's block-diagonal projection leaves them."""
    pre, rec, mat, h0 = given
    D, K = h0.shape[2], mat.shape[1]
    block = max(width for width in range(K, max(K, 256) + 1, K) if D % width == 0)
    pre = pre.bfloat16().unflatten(3, (D // block, block)).permute(3, 0, 1, 2, 4).contiguous().permute(1, 2, 3, 0, 4)
    return [pre, rec, mat, h0]


def times(results: Results, trained: bool) -> None:
    """Every shape and set; the other cells beside the LSTM; cuDNN."""
    for name in ("dense_gru", "dense_gru_before", "slstm", "dense_elman"):
        cell, given = made(SHAPES[0], "init", name)
        rows_of(results, name, SHAPES[0], "init", cell, lower(given))
    for shape in SHAPES:
        for kind in ("init", "sketch"):
            cell, given = made(shape, kind)
            rows_of(results, "dense_lstm", shape, kind, cell, lower(given), walk=kind == "init" and shape == SHAPES[0])
        if trained:
            found = attempted(functools.partial(seen, shape))
            if isinstance(found, dict):
                print(shape, found["error"], flush=True)
                continue
            for kind, cell, given in found:
                rows_of(results, "dense_lstm", shape, kind, cell, lower(given))
    for shape in SHAPES[:2]:
        results.append("cudnn", attempted(functools.partial(cudnn, shape, torch.float16)))


def over_length(results: Results) -> None:
    """Four rows of 512 to 16,384 steps: the solve, the walk in order, cuDNN."""
    for T in (512, 1024, 2048, 4096, 8192, 16384):
        shape = (4, T, 12, 64)
        cell, given = made(shape, "init")
        given, d_emitted = lower(given), torch.randn(4, T, 768, device="cuda").bfloat16()

        def ours(cell: Cell = cell, given: Given = given, d_emitted: Tensor = d_emitted) -> dict[str, Any]:
            forward, back = learnt(cell, given, d_emitted)
            return timed(cell, given, forward, back, d_emitted)

        walk = Plan.of(given[0], 64, 1)
        row: dict[str, Any] = {"T": T, "ours": attempted(ours)}
        row["in order"] = attempted(functools.partial(timed, cell, given, walk, walk, d_emitted, repeats=3))
        row["cudnn"] = attempted(functools.partial(cudnn, shape, torch.float16))
        results.append("over T", row)


def difficulty(results: Results) -> None:
    """Corrections of eight and sixteen slices against the bias of the forget gates and the gain of the matrices."""
    shape = SHAPES[0]
    for bias, gain, n in itertools.product((0.0, 2.0, 4.0, 6.0), (0.5, 1.0, 2.0, 4.0, 8.0), (8, 16)):
        cell, (pre, rec, mat, h0) = made(shape, "sketch")
        rec[-4:] = 0
        rec[-3] = bias  # of i, f, g, o
        rec[-4] = -bias
        given = lower([pre, rec, mat * gain, h0])
        plan = Plan.of(given[0], shape[3], n, 0)
        launch.last_report()
        emitted, kept, _ = launch.forward(cell, *(*given, None, plan))
        launch.backward(cell, *(*given, None, emitted, kept, torch.randn_like(emitted), None, torch.zeros_like(h0), plan))
        report = launch.last_report()
        results.quiet("difficulty", [{"forget bias": bias, "gain": gain, "slices": n, **report}])
    print(
        "difficulty:",
        *(f"{r['forget bias']:g}/{r['gain']:g}/{r['slices']}:{r['corrections']:g}/{r['walked']:.2g}" for r in results.values["difficulty"]),
    )


def difficulty_in_torch(results: Results) -> None:
    """`difficulty` in plain torch on any device, of one head in fp32, certified as bf16 is; where all corrections are made it is the walk in order."""
    plain, B, T, K, n = load_cell("dense_lstm"), 4, 1024, 64, 16
    draws, cell = torch.Generator().manual_seed(0), biased(load_cell("dense_lstm"))
    pre = 0.7 * torch.randn(B, T, 4, K, generator=draws)
    mat, d_emitted = torch.randn(1, K, 4, K, generator=draws) * K**-0.5, torch.randn(B, T, K, generator=draws)
    bias = torch.zeros(4, K)
    tolerance = reference.TOLERANCE[torch.float32]
    try:
        reference.TOLERANCE[torch.float32] = reference.TOLERANCE[torch.bfloat16]
        for forget, gain in itertools.product((0.0, 2.0, 4.0, 6.0), (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0)):
            bias[plain.pre.index("f")], bias[plain.pre.index("i")] = forget, -forget
            h0 = torch.zeros(B, 2, K)
            states = reference.solve(cell, pre, bias, gain * mat, h0, None, n, 0)
            d_states = torch.stack([torch.zeros_like(d_emitted), d_emitted], 2)
            reference.backward(cell, pre, bias, gain * mat, h0, None, states, d_states, torch.zeros_like(h0), n, 0)
            made = reference.last_report.corrections, reference.last_backward.corrections
            row = {"forget bias": forget, "gain": gain, "slices": n, "corrections": made[0], "corrections_backward": made[1]}
            results.append("difficulty", {**row, "walked": float(made[0] == n - 1), "walked_backward": float(made[1] == n - 1)})
    finally:
        reference.TOLERANCE[torch.float32] = tolerance


def warm(words: list[str]) -> None:
    """Compiles what solves of a cell, width and head size launch."""
    name, D, K = words[0], int(words[1]), int(words[2])
    cell, given = problem(name, 2, 512, D // K, K)
    given = lower(given)
    for n in (8, 1):
        plan = Plan.of(given[0], K, n, None)
        emitted, kept, _ = launch.forward(cell, *(*given, None, plan))
        launch.backward(cell, *(*given, None, emitted, kept, torch.randn_like(emitted), None, torch.zeros_like(given[3]), plan))
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--train", type=float, default=0.0, help="seconds of training before the times; 0: no trained sets")
    parser.add_argument("--seconds", type=float, default=1e9, help="after which no further part is begun")
    parser.add_argument("--plot", type=Path, help="draws what sets.json and init.json of this folder hold; nothing else")
    parser.add_argument(
        "--difficulty", action="store_true", help="corrections against memory and gain in plain torch, which needs no GPU; nothing else"
    )
    parser.add_argument("--warm", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plot:
        return draw(arguments.plot)
    if arguments.difficulty:
        return difficulty_in_torch(Results(arguments.out, torch.device("cpu")))
    if not torch.cuda.is_available():
        sys.exit("This measures a GPU, and there is none here.")
    if arguments.warm:
        return warm(arguments.warm)
    results = Results(arguments.out, torch.device("cuda"))
    widths = sorted({(E * K, K) for _, _, E, K in SHAPES})
    running = train(widths, arguments.train) if arguments.train else []
    wanted = [("dense_lstm", *width) for width in widths]
    wanted += [(name, 768, 64) for name in ("dense_gru", "dense_gru_before", "slstm", "dense_elman")]
    command = [sys.executable, "-m", "scripts.bench.dense_sets", "--warm"]
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 4)) as pool:
        for words, done in zip(
            wanted, pool.map(lambda w: subprocess.run([*command, *map(str, w)], capture_output=True, text=True), wanted)
        ):
            if done.returncode:
                print(words, done.stderr[-400:], flush=True)
    print(f"{results.elapsed():.0f} s: compiled", flush=True)
    if running:
        while any(process.poll() is None for process in running) and results.elapsed() < arguments.train:
            time.sleep(0.5)
        stop(running)
        for D, K in widths:
            results.item("training", f"{D}x{K}", attempted(functools.partial(history, D, K)))
    times(results, bool(running))
    for part in (difficulty, over_length):
        if results.elapsed() < arguments.seconds:
            attempted(functools.partial(part, results))
    print(f"{results.elapsed():.0f} s", flush=True)


if __name__ == "__main__":
    main()
