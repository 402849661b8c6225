"""Which initialisation of a dense LSTM is cheap to solve, and learns as well as the others? Trains three with the same seeds and data on the
bundled books; losses over training, held-out loss, and what the solves needed go to --out.

python -m scripts.studies.dense_init --out docs/results/dense_rnn/init.json --seconds 90       # one GPU, six runs side by side

here: forget biases 0 to 4 over the channels, input biases 0 to -4, matrices of deviation 1/sqrt(head). published: forget bias 1 (Jozefowicz et al.
2015), no other bias, matrices uniform within 1/sqrt(head), as torch.nn.LSTM has them. bounded: as here, the matrices half as large.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from scripts.bench.timing import Results, attempted
from scripts.studies.options import refuse

HEAD = 64
RUNS = Path("runs/dense_init")
DATA = Path("runs/data/dense_sets")
# biases in place of the cell's; deviation of the matrices as a multiple of 1 / sqrt(head)
KINDS: dict[str, tuple[str, float]] = {"here": ("null", 1.0), "published": ("{f: 1, i: 0}", 3**-0.5), "bounded": ("null", 0.5)}


def command(kind: str, seed: int, settings: list[str]) -> list[str]:
    """Trains one model."""
    biases, gain = KINDS[kind]
    mixer = [f"model.mixers.dense_lstm.bias_init={biases}", f"model.mixers.dense_lstm.recurrent_init={gain * HEAD**-0.5}"]
    return [
        sys.executable,
        "train.py",
        "model=dense_lstm",
        *mixer,
        f"seed={seed}",
        f"data.path={DATA}",
        f"run_dir={RUNS / f'{kind}-{seed}'}",
        *settings,
    ]


def sizes(steps: int) -> list[str]:
    words = ["size=125m", "size.d_model=512", "size.n_layers=4", "train.seq_len=1024", "train.global_batch=16", "train.micro_batch=16"]
    words += ["train.precision=bf16", f"train.steps={steps}", "train.log_every=10", f"eval.every={max(1, steps // 3)}", "eval.tokens=65536"]
    words += ["eval.sample_tokens=1"]
    words += ["eval.long_length=16384", "eval.long_rows=8"]  # state collapse: the loss by position, far beyond the training length
    return words


def read(kind: str, seed: int) -> dict[str, Any]:
    """Losses by step, the held-out loss if the run got there, and what the solves needed."""
    rows = [json.loads(line) for line in (RUNS / f"{kind}-{seed}" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "dense_corrections" in row]
    kept = ("step", "loss", "dense_corrections", "dense_corrections_backward", "dense_walked", "dense_slices", "dense_burn_in")
    held_out = [[row["step"], row["held_out_loss"]] for row in rows if "held_out_loss" in row]
    return {
        "kind": kind,
        "seed": seed,
        "held_out": [loss for _, loss in held_out[-1:]],
        "held_out_by_step": held_out,
        "far": [row for row in rows if "long_loss" in row][-1:],
        "steps": [{key: row[key] for key in kept if key in row} for row in steps],
    }


def train(arguments: argparse.Namespace, results: Results) -> None:
    """All runs, seed after seed, so many at a time, each kept as soon as it is over. Those that the time cuts are kept as far as they came."""
    waiting = [(kind, seed) for seed in range(arguments.seeds) for kind in arguments.kinds.split(",")]
    running: list[tuple[str, int, subprocess.Popen[str]]] = []
    late = False
    while running or waiting and not late:
        while waiting and not late and len(running) < arguments.together:
            kind, seed = waiting.pop(0)
            shutil.rmtree(RUNS / f"{kind}-{seed}", ignore_errors=True)  # of an earlier call, whose metrics would be read as this one's
            RUNS.mkdir(parents=True, exist_ok=True)
            with open(RUNS / f"{kind}-{seed}.txt", "w") as said:
                words = command(kind, seed, [*sizes(arguments.steps), *arguments.settings])
                running.append((kind, seed, subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=said, text=True)))
        time.sleep(0.5)
        if not late and results.elapsed() > arguments.seconds - 10:
            late = True
            for *_, process in running:
                process.send_signal(signal.SIGTERM)
        for entry in [entry for entry in running if entry[2].poll() is not None]:
            running.remove(entry)
            kind, seed, _ = entry
            row = attempted(functools.partial(read, kind, seed))
            results.quiet("runs", [row])
            last = row["steps"][-1:] if "steps" in row else (row, (RUNS / f"{kind}-{seed}.txt").read_text()[-300:])
            print(kind, seed, "held out", row.get("held_out"), "last", last, flush=True)
    if waiting:
        print("not begun:", ", ".join(f"{kind} {seed}" for kind, seed in waiting), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--kinds", default=",".join(KINDS), help="initialisations")
    parser.add_argument("--together", type=int, default=6, help="runs side by side")
    parser.add_argument("settings", nargs="*", help="more settings of train.py")
    arguments = parser.parse_args()
    refuse(parser, arguments, ["seconds", "steps", "seeds", "together"], {"kinds": KINDS})
    results = Results(arguments.out, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if not DATA.exists():
        prepare = [sys.executable, "-m", "data.prepare", "input=demo", f"out={DATA}", "tokenizer=bpe:2048", "valid_docs=[2]"]
        subprocess.run(prepare, check=True, stdout=subprocess.DEVNULL)
    train(arguments, results)
    if not any(row.get("steps") for row in results.values["runs"]):
        print("No run took a step: see what they said above; a step is written every 10, and --seconds may be too few.", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
