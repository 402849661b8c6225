"""Trains cases of golden losses in processes forked from one that has loaded the libraries, each in the source tree it is told.

A fork knows nothing of this tree's own modules: it drops them and takes those of its tree, so that trees of different commits can be trained side
by side. What runs is their train.py from its first line.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import lzma
import multiprocessing
import os
import runpy
import sys
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from training.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ("deepspeed", "hydra", "safetensors.torch", "tokenizers", "torch._dynamo", "transformers")
OURS = ("data", "evals", "kernels", "models", "scripts", "training")
CHARACTERS = 400_000  # of the demo corpus

Words = list[str]


def measure(trees: list[Path], runs: list[tuple[str, Words]], work: Path, threads: int, jobs: int) -> list[dict[str, dict[str, Any]]]:
    """For each tree the figures of each run (its name, overrides of train.py): {name: {loss, grad_norm, held_out: list of float}}."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    corpus = work / "corpus.jsonl"
    write_corpus(corpus)
    for library in LIBRARIES:
        importlib.import_module(library)
    prepare = ["-m", "data.prepare", f"input={corpus}", "tokenizer=bytes", "valid_fraction=0.1"]
    in_forks([(tree, [*prepare, f"out={work}/{i}/shards"], work / f"{i}.shards.log", threads) for i, tree in enumerate(trees)], jobs)
    tasks = []
    for name, words in runs:
        for i, tree in enumerate(trees):
            run = [f"data.path={work}/{i}/shards", f"run_dir={work}/{i}/{name}"]
            tasks.append((tree, ["train.py", *run, *words], work / f"{i}.{name}.log", threads))
    in_forks(tasks, jobs)
    return [{name: figures(work / str(i) / name) for name, _ in runs} for i in range(len(trees))]


def write_corpus(file: Path) -> None:
    """Many short documents and some long ones, cut from the demo corpus, so that most sequences hold a document's start."""
    with lzma.open(ROOT / "data/demo/demo_corpus.jsonl.xz", "rt", encoding="utf-8") as lines:
        text = json.loads(next(lines))["text"][:CHARACTERS]
    with file.open("w", encoding="utf-8") as out:
        at = 0
        for i in range(CHARACTERS):
            length = 20 + i * 7919 % 380 + (2000 if i % 50 == 0 else 0)
            if at + length > len(text):
                break
            out.write(json.dumps({"text": text[at : at + length]}) + "\n")
            at += length


def figures(run: Path) -> dict[str, list[float]]:
    """Losses, gradient norms and held-out figures of a run folder, unrounded."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    held_out = [value for row in rows for key, value in row.items() if "bits_per_byte" in key]
    if not steps or not held_out:
        raise UserError(f"{run} holds no losses or no held-out figure; its metrics.jsonl has another form than this program knows.")
    return {"loss": [row["loss"] for row in steps], "grad_norm": [row["grad_norm"] for row in steps], "held_out": held_out}


def in_forks(tasks: list[tuple[Path, Words, Path, int]], jobs: int) -> None:
    """Runs every task in a process of its own, `jobs` at a time. Raises UserError with the end of the log of the first that fails."""
    context = multiprocessing.get_context("fork")
    waiting = list(tasks)
    running: dict[Any, Any] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            task = waiting.pop(0)
            process = context.Process(target=run_in, args=task)
            process.start()
            running[process.sentinel] = process, task
        for sentinel in wait(list(running)):
            process, (tree, words, log, _) = running.pop(sentinel)
            process.join()
            if process.exitcode:
                for other, _ in running.values():
                    other.kill()
                raise UserError(f"`python {' '.join(words)}` failed in {tree}: {log.read_text()[-2000:]}")


def run_in(tree: Path, words: Words, log: Path, threads: int) -> None:
    """`python WORDS` in `tree`, with that tree's modules; what it prints goes to `log`."""
    import torch

    for name in [n for n in sys.modules if n.split(".")[0] in OURS]:
        del sys.modules[name]
    os.chdir(tree)
    sys.path[:] = [str(tree)] + [p for p in sys.path if Path(p or ".").resolve() not in (ROOT, tree)]
    importlib.invalidate_caches()
    source = importlib.util.find_spec("training")
    assert source is not None and source.origin is not None and Path(source.origin).is_relative_to(tree), source
    with log.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    torch.set_num_threads(threads)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
