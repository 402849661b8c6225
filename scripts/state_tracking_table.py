"""Trains small models on generated tasks, task by mixer by seed, and draws the table of what they learn and how far it reaches.

    python scripts/state_tracking_table.py                                    the main tasks on one GPU (or the CPU) in six minutes
    python scripts/state_tracking_table.py tasks=S3,A5,mod-5 minutes=5        other tasks into the same folder; tasks=all mixers=all: all
    python scripts/state_tracking_table.py tasks=parity,mqar mixers=paragru,mamba2 seeds=1 minutes=2 workers=8 out=runs/state_tracking
    python scripts/state_tracking_table.py minutes=0                          only the table and the plot of what is there

Several worker processes share the device, as one such model does not fill it. Each result is a file in OUT/cells, written when it is
known; the same command goes on where it stopped. Needs torch, numpy and this repository (no launcher, no DeepSpeed, no Hydra).
Cells end when the task is solved (after a short fall of the learning rate), after `steps`, or when their share of the time is used up.
Published settings (arXiv 2510.21450, table 6): one layer, width and state 64, 4 heads, convolution 4, no MLP, length 100. Instead of 3000
passes over 10,000 samples with batch 16 and a rate of 5e-4, data here are fresh for every batch, batches and rate are larger, and lengths
rise from an eighth to the whole.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from evals.report import pyplot  # noqa: E402
from training.arguments import parse_arguments, program  # noqa: E402
from training.config import nearest  # noqa: E402
from training.errors import UserError  # noqa: E402
from training.files import write_json  # noqa: E402

DEFAULTS: dict[str, Any] = {
    "out": "runs/state_tracking",
    "tasks": "parity,mqar,1-hop,2-hop,2-hop-2L,S3",  # in order of importance, or all
    "mixers": "paragru,paralstm,mamba2,attention,dense_gru,hybrid",  # or all
    "seeds": 3,
    "minutes": 6.0,
    "workers": 0,  # 0: one a core less two, at most 14; one on a CPU
    "steps": 0,  # 0: those of the task
    "batch": 0,  # 0: 128 on a GPU, 64 on a CPU; MQAR takes twice as many
    "length": 100,
    "layers": 1,  # of all but the hybrid and the tasks that say otherwise
    "device": "auto",
    "sequences": 1000,  # scored at each length in the end
    "again": False,  # train what is there already once more
}

# Task settings, in order of importance. bound: of the diagonal cells' recurrent weights (published: none for parity, 0.9 elsewhere;
# none for the other automata too, since a bound keeps a channel from flipping). 2L: two layers, where one cannot hand a token on.
TASKS: dict[str, dict[str, Any]] = {
    "parity": {"task": {"name": "parity"}, "bound": None, "steps": 6000},
    "mqar": {"task": {"name": "mqar", "pairs": 2, "symbols": 128}, "bound": 0.9, "steps": 10000, "lr": 2e-2, "batches": 2},
    "1-hop": {"task": {"name": "khop", "hops": 1, "symbols": 10}, "bound": 0.9, "steps": 8000},
    "2-hop": {"task": {"name": "khop", "hops": 2, "symbols": 5}, "bound": 0.9, "steps": 12000},
    "2-hop-2L": {"task": {"name": "khop", "hops": 2, "symbols": 5}, "bound": 0.9, "steps": 6000, "layers": 2},
    "S3": {"task": {"name": "word_problem", "group": "s3"}, "bound": None, "steps": 8000},
    "A5": {"task": {"name": "word_problem", "group": "a5"}, "bound": None, "steps": 8000},
    "mod-5": {"task": {"name": "modular_arithmetic", "modulus": 5}, "bound": None, "steps": 8000},
    "cycle-5": {"task": {"name": "cycle_navigation", "modulus": 5}, "bound": None, "steps": 6000},
    "keep-5th": {"task": {"name": "keep_nth", "n": 5, "symbols": 128}, "bound": 0.9, "steps": 6000},
    "copying": {"task": {"name": "copying", "tokens": 8, "symbols": 14}, "bound": 0.9, "steps": 8000},
    "mqar-8": {"task": {"name": "mqar", "pairs": 8, "symbols": 128}, "bound": 0.9, "steps": 10000, "lr": 2e-2, "batches": 2},
    "S5": {"task": {"name": "word_problem", "group": "s5"}, "bound": None, "steps": 8000},
}
# Mixers of the layers. dense_*: torch.nn's cells with full recurrent matrices; gru and lstm: the project's diagonal ones.
MIXERS: dict[str, list[dict[str, Any]]] = {
    "paragru": [{"type": "rnn", "cell": "paragru"}],
    "mamba2": [{"type": "mamba2", "d_state": 64, "head_dim": 32}],
    "attention": [{"type": "attention", "n_heads": 4}],
    "paralstm": [{"type": "rnn", "cell": "paralstm"}],
    "dense_gru": [{"dense": "GRU"}],
    "dense_lstm": [{"dense": "LSTM"}],
    "hybrid": [{"type": "rnn", "cell": "paragru"}, {"type": "attention", "n_heads": 4}],
    "gru": [{"type": "rnn", "cell": "gru"}],
    "lstm": [{"type": "rnn", "cell": "lstm"}],
}
WIDTH, LR, WARMUP, BLOCK, INIT_STD = 64, 1e-2, 100, 10, 0.125
SPREAD = 1.0  # of the initial recurrent weights of unbounded diagonal LSTM cells: all seeds then learn parity; with 1/sqrt(width) a third
CURRICULUM = 0.6  # of the run at most for sequences of 1/8, 1/4 and 1/2 of the length; 98 % right answers end a stage sooner
SOLVED = 0.9995
LENGTHS = (0.5, 1, 2, 4, 8)
LEAST_SECONDS = 4.0


def arguments(given: list[str]) -> dict[str, Any]:
    """key=value arguments over DEFAULTS, tasks and mixers as lists. Raises UserError with all problems."""

    def chosen(values: dict[str, Any]) -> list[str]:
        problems = []
        for key, known in (("tasks", TASKS), ("mixers", MIXERS)):
            names = [name.strip() for name in values[key].split(",") if name.strip() not in ("", "all")] or list(known)
            problems += [f"{key}: {nearest(name, list(known))} (there is no {name!r})" for name in names if name not in known]
            values[key] = names
        return problems

    return parse_arguments(given, DEFAULTS, chosen)


def build_model(layers: list[dict[str, Any]], vocabulary: int, bound: float | None) -> Any:
    """A LanguageModel without MLPs; 'dense' layers are torch.nn's LSTM or GRU inside the same block."""
    from models.config import ModelConfig
    from models.lm import LanguageModel

    mixers: dict[str, dict[str, Any]] = {}
    for i, layer in enumerate(layers):
        mixers[f"m{i}"] = {"type": "attention", "n_heads": 4} if "dense" in layer else dict(layer)
        if layer.get("type") == "rnn":
            if bound is None and layer["cell"] in ("lstm", "paralstm"):
                mixers[f"m{i}"]["recurrent_init"] = SPREAD
            mixers[f"m{i}"] |= {"recurrent_bound": "none"} if bound is None else {"recurrent_bound": "clip", "recurrent_max": bound}
    model = LanguageModel(
        ModelConfig(
            vocab_size=vocabulary,
            d_model=WIDTH,
            n_layers=len(layers),
            pattern=list(mixers),
            mixers=mixers,
            d_ff=0,
            recompute_head=False,
            init_std=INIT_STD,
        )
    )
    for block, layer in zip(model.blocks, layers):
        if "dense" in layer:
            block.mixer = _dense_mixer(layer["dense"])
    return model


def _dense_mixer(kind: str) -> Any:
    import torch
    from torch import nn

    from models.contract import SequenceMixer

    class Dense(SequenceMixer):
        """torch.nn.GRU or LSTM and an output projection."""

        def __init__(self) -> None:
            super().__init__()
            self.rnn = getattr(nn, kind)(WIDTH, WIDTH, batch_first=True)
            self.out = nn.Linear(WIDTH, WIDTH, bias=False)

        def init_weights(self, std: float, n_layers: int) -> None:
            self.rnn.reset_parameters()
            self.out.reset_parameters()

        def forward(self, x_BTD: Any, state: Any = None, segment_ids: Any = None) -> tuple[Any, Any]:
            y, after = self.rnn(x_BTD, state)
            return self.out(y), None if state is None else after

        def init_state(self, batch: int, device: Any = None, dtype: Any = None) -> Any:
            zero = torch.zeros(1, batch, WIDTH, device=device, dtype=dtype)
            return (zero, zero.clone()) if kind == "LSTM" else zero

    return Dense()


def settings_of(task: str, mixer: str, values: dict[str, Any]) -> dict[str, Any]:
    """All that decides a cell's result but its seed and the clock."""
    chosen = TASKS[task]
    layers = MIXERS[mixer] if len(MIXERS[mixer]) > 1 else MIXERS[mixer] * chosen.get("layers", values["layers"])
    return {
        "task": chosen["task"],
        "layers": layers,
        "recurrent_max": chosen["bound"],
        "recurrent_init_unbounded_lstm": SPREAD,
        "width": WIDTH,
        "length": values["length"],
        "batch": values["batch"] * chosen.get("batches", 1),
        "steps": values["steps"] or chosen["steps"],
        "lr": chosen.get("lr", LR),
        "init_std": INIT_STD,
        "curriculum": CURRICULUM,
        "warmup": WARMUP,
        "betas": [0.9, 0.999],
        "weight_decay": 1e-6,
        "grad_clip": 1.0,
    }


def train_cell(settings: dict[str, Any], seed: int, device: Any, seconds: float, sequences: int) -> dict[str, Any]:
    """Trains one model and scores it by length. The learning rate falls as a cosine of steps or time, whichever is further."""
    import numpy as np
    import torch

    from data.synthetic import build_task
    from data.synthetic.source import SyntheticReader
    from evals.state_tracking import evaluate
    from training.optim import build_optimizer
    from training.schedule import lr_factor

    task, T, B, steps = build_task(settings["task"]), settings["length"], settings["batch"], settings["steps"]
    model = build_model(settings["layers"], len(task.vocabulary()), settings["recurrent_max"])
    model.init_weights(seed)
    model = model.to(device)
    betas = (settings["betas"][0], settings["betas"][1])
    optimizer = build_optimizer(model, lr=settings["lr"], betas=betas, eps=1e-8, weight_decay=settings["weight_decay"])
    warmup, every = min(settings["warmup"], steps // 10), max(BLOCK, min(100, steps // 10) // BLOCK * BLOCK)
    stages = [n for n in (T // 8, T // 4, T // 2) if n >= max(4, task.min_length())] + [T]
    stage, taken, step, solved, ended = 0, 0, 0, 0, "steps"
    curve: list[list[float]] = []
    for n in stages:  # kernels are compiled before the clock starts
        tokens = torch.zeros(B * T // n, n, dtype=torch.long, device=device)
        output = model(tokens, labels=tokens)
        output.loss_sum.backward()
        optimizer.zero_grad()
    start = time.perf_counter()
    while step < steps:
        passed = max(step / steps, (time.perf_counter() - start) / seconds)
        if passed >= 1 or solved and step >= solved + max(100, solved // 4):
            ended = "time"
            break
        n = stages[stage]
        rows = B * T // n
        reader = SyntheticReader(task, n, seed)
        drawn = reader.labelled(taken + np.arange(BLOCK * rows))
        taken += BLOCK * rows
        inputs, labels = (torch.from_numpy(part).view(BLOCK, rows, n).to(device) for part in drawn[:2])
        for i in range(BLOCK):
            factor = lr_factor(step if step < warmup else max(warmup, int(passed * steps)), steps, kind="cosine", warmup=warmup)
            if solved:
                factor *= max(0.0, 1 - (step - solved) / max(100, solved // 4))
            for group in optimizer.param_groups:
                group["lr"] = settings["lr"] * factor
            output = model(inputs[i], labels=labels[i])
            loss = output.loss_sum / output.token_count
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings["grad_clip"])
            optimizer.step()
            step += 1
        if step % every == 0 and not solved:
            row = evaluate(model, task, [n], sequences=256, batch=256, seed=seed)["lengths"][0]
            if "error" in row:
                ended = "diverged"
                break
            curve.append([step, n, float(loss.detach()), row["accuracy"]])
            if n == T:
                solved = step if row["accuracy"] >= SOLVED else 0
            elif row["accuracy"] >= 0.98 or passed >= CURRICULUM * (stage + 1) / (len(stages) - 1):
                stage += 1
    trained = time.perf_counter() - start
    lengths = sorted({max(task.min_length(), round(m * T)) for m in LENGTHS})
    result = evaluate(model, task, lengths, train_length=T, sequences=sequences, batch=250, seed=seed)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": step,
        "ended": "solved" if solved else ended,
        "seconds": trained,
        "seconds_allowed": seconds,
        "accuracy": result["accuracy"],
        "lengths": result["lengths"],
        "curve": curve,
    }


def read_cell(out: Path, task: str, mixer: str, seed: int, settings: dict[str, Any]) -> dict[str, Any] | None:
    """A finished cell of the same settings, or None."""
    try:
        found = json.loads((out / "cells" / f"{task}.{mixer}.{seed}.json").read_text())
    except (OSError, ValueError):
        return None
    return found if found.get("settings") == settings and "error" not in found else None


def work(values: dict[str, Any], cells: list[tuple[str, str, int]], taken: Any, deadline: float, device_name: str) -> None:
    """One worker: takes cells until none or no time is left. `taken` counts those given out; `deadline` is of time.time()."""
    import torch

    torch.set_num_threads(1)
    device, out = torch.device(device_name), Path(values["out"])
    if device.type == "cuda":
        torch.zeros(1, device=device)
    while True:
        with taken.get_lock():
            number = taken.value
            taken.value += 1
        if number >= len(cells):
            return
        left = deadline - time.time()
        # Other workers are half through theirs on average; a tenth goes to scoring.
        share = left * values["workers"] / (len(cells) - number + values["workers"] / 2) * 0.9
        seconds = min(max(share, LEAST_SECONDS), left - 2.0)
        if seconds < LEAST_SECONDS * 0.9:
            return
        task, mixer, seed = cells[number]
        settings = settings_of(task, mixer, values)
        cell: dict[str, Any] = {"task": task, "mixer": mixer, "seed": seed, "settings": settings}
        try:
            cell |= train_cell(settings, seed, device, seconds, values["sequences"])
        except Exception as error:  # one cell's failure is its own result; a device that is lost ends the worker
            cell["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            cell["traceback"] = traceback.format_exc()
        write_json(out / "cells" / f"{task}.{mixer}.{seed}.json", cell)
        if "error" in cell:
            print(f"[{number + 1}/{len(cells)}] {task:9} {mixer:10} seed {seed}  {cell['error']}", flush=True)
            if device.type == "cuda" and "CUDA" in cell["error"] and "OutOfMemory" not in cell["error"]:
                return
            continue
        shown = "  ".join(
            f"{row['length']}: {100 * row['accuracy']:.1f}" if "error" not in row else f"{row['length']}: ?" for row in cell["lengths"]
        )
        print(
            f"[{number + 1}/{len(cells)}] {task:9} {mixer:10} seed {seed}  {shown}  ({cell['ended']}, {cell['steps']} steps, {cell['seconds']:.0f} s)",
            flush=True,
        )


def collect(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Every finished cell of these settings, in the table's order."""
    out, found = Path(values["out"]), []
    for task in values["tasks"]:
        for mixer in values["mixers"]:
            for seed in range(values["seeds"]):
                cell = read_cell(out, task, mixer, seed, settings_of(task, mixer, values))
                if cell is not None:
                    found.append(cell)
    return found


def best(cells: list[dict[str, Any]], task: str, mixer: str) -> tuple[dict[str, Any] | None, list[float]]:
    """(the seed with the highest accuracy at the training length, every seed's accuracy)."""
    rows = [c for c in cells if (c["task"], c["mixer"]) == (task, mixer) and c["accuracy"] is not None]
    reach = [max(c["lengths"], key=lambda row: row["length"]).get("accuracy", 0.0) for c in rows]
    order = sorted(range(len(rows)), key=lambda i: (rows[i]["accuracy"], reach[i]))
    return (rows[order[-1]] if rows else None), [c["accuracy"] for c in rows]


def at(cell: dict[str, Any], length: int) -> dict[str, Any]:
    return next((row for row in cell["lengths"] if row["length"] == length and "error" not in row), {})


def table(cells: list[dict[str, Any]], values: dict[str, Any]) -> str:
    """Markdown: best of the seeds at the training length, the median of the seeds where it differs, and the best one at 8x."""
    T = values["length"]
    longest = round(LENGTHS[-1] * T)
    lines = [
        f"Accuracy in per cent over all answers at length {T}, best seed (median of n seeds) and, after the arrow, that seed at length {longest}.",
        "Chance is the share of the commonest answer.",
        "",
        "| mixer | " + " | ".join(values["tasks"]) + " |",
        "|---" * (len(values["tasks"]) + 1) + "|",
    ]
    chance = []
    for task in values["tasks"]:
        rows = [at(c, T) for c in cells if c["task"] == task]
        chance.append(f"{100 * max((r.get('chance', 0.0) for r in rows), default=0.0):.0f}" if rows else "")
    for mixer in values["mixers"]:
        row = []
        for task in values["tasks"]:
            top, seeds = best(cells, task, mixer)
            if top is None:
                row.append("")
                continue
            far = at(top, longest).get("accuracy")
            text = f"{100 * top['accuracy']:.1f} ({100 * statistics.median(seeds):.1f} of {len(seeds)})"
            row.append(text + (f" → {100 * far:.1f}" if far is not None else ""))
        lines.append(f"| {mixer} | " + " | ".join(row) + " |")
    lines.append("| chance | " + " | ".join(chance) + " |")
    return "\n".join(lines)


def plot(cells: list[dict[str, Any]], values: dict[str, Any], path: Path) -> str:
    """Accuracy by length, a panel a task and a line a mixer (best seed). Returns what was done, for people."""
    plt = pyplot()
    if plt is None:
        return "matplotlib is not installed, so there is no plot; minutes=0 draws it elsewhere from the same folder."
    tasks = [t for t in values["tasks"] if any(c["task"] == t for c in cells)]
    if not tasks:
        return "There is nothing to plot yet."
    columns = min(4, len(tasks))
    rows = -(-len(tasks) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.4 * columns, 2.7 * rows + 0.5), squeeze=False, sharey=True)
    colours, marks = dict(zip(MIXERS, plt.get_cmap("tab10").colors)), dict(zip(MIXERS, "o^sDv<>Px"))
    for axis in axes.flat[len(tasks) :]:
        axis.set_visible(False)
    for axis, task in zip(axes.flat, tasks):
        for mixer in values["mixers"]:
            top, _ = best(cells, task, mixer)
            if top is None:
                continue
            points = [(row["length"], 100 * row["accuracy"]) for row in top["lengths"] if "error" not in row]
            axis.plot(*zip(*points), marker=marks[mixer], markersize=4.5, alpha=0.8, linewidth=1.3, label=mixer, color=colours[mixer])
        chances = [at(c, values["length"]).get("chance") for c in cells if c["task"] == task]
        axis.axhline(100 * max((c for c in chances if c is not None), default=0.0), color="grey", linewidth=0.8, linestyle=":")
        axis.axvline(values["length"], color="grey", linewidth=0.8)
        axis.set_xscale("log", base=2)
        ticks = sorted({row["length"] for c in cells if c["task"] == task for row in c["lengths"]})
        axis.set_xticks(ticks, [str(t) for t in ticks])
        axis.minorticks_off()
        axis.set_ylim(0, 103)
        axis.set_title(task, fontsize=10)
    for axis in axes[:, 0]:
        axis.set_ylabel("right answers, %")
    handles = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=min(9, len(handles)), fontsize=8, frameon=False)
    figure.suptitle(f"Best of {values['seeds']} seeds, trained at length {values['length']} (grey line); dotted: chance", fontsize=10)
    figure.tight_layout(rect=(0, 0.06, 1, 0.99))
    temporary = path.with_name("." + path.name)
    figure.savefig(temporary, dpi=130)
    plt.close(figure)
    os.replace(temporary, path)
    return f"plot: {path}"


def report(values: dict[str, Any], device: str, seconds: float) -> None:
    """Writes table.json, table.md and the plot from the cells on disk, and prints the table."""
    import torch

    from training.metrics import environment

    cells, out = collect(values), Path(values["out"])
    text = table(cells, values)
    summary = [{key: cell[key] for key in cell if key != "curve"} for cell in cells]
    write_json(out / "table.json", {"arguments": values, "seconds": seconds, "environment": environment(torch.device(device)), "cells": summary})
    (out / "table.md").write_text(text + "\n")
    print(f"\n{text}\n\n{len(cells)} cells of {len(values['tasks']) * len(values['mixers']) * values['seeds']}: {out / 'table.json'}")
    try:
        print(plot(cells, values, out / "table.png"))
    except Exception as error:  # the numbers are safe; a plot is not worth a run
        print(f"The plot could not be drawn: {type(error).__name__}: {error}")


def main(words: list[str]) -> None:
    """What the command line asks for. Raises UserError."""
    began = time.time()
    values = arguments(words)
    import torch

    device = values["device"] if values["device"] != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch sees no CUDA device; use device=auto.")
    values["batch"] = values["batch"] or (128 if device == "cuda" else 64)
    if not values["workers"]:
        values["workers"] = max(1, min(14, (os.cpu_count() or 1) - 2)) if device == "cuda" else 1
    out = Path(values["out"])
    (out / "cells").mkdir(parents=True, exist_ok=True)
    cells = [(task, mixer, seed) for seed in range(values["seeds"]) for task in values["tasks"] for mixer in values["mixers"]]
    if not values["again"]:
        cells = [(t, m, s) for t, m, s in cells if read_cell(out, t, m, s, settings_of(t, m, values)) is None]
    deadline = began + 60 * values["minutes"]
    if cells and values["minutes"] > 0:
        print(
            f"{len(cells)} cells to train on {device} with {values['workers']} worker(s), {values['minutes']:g} minutes, batch {values['batch']}"
        )
        spawn = multiprocessing.get_context("spawn")
        taken = spawn.Value("i", 0)
        workers = [
            spawn.Process(target=work, args=(values, cells, taken, deadline, device)) for _ in range(min(values["workers"], len(cells)))
        ]
        for process in workers:
            process.start()
        for process in workers:
            process.join(max(1.0, deadline + 60 - time.time()))
            if process.is_alive():
                process.terminate()
    report(values, device, time.time() - began)


if __name__ == "__main__":
    sys.exit(program(__doc__, main))
