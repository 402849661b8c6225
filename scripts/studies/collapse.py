"""A bounded study of state collapse: small models trained on one corpus, looked at far beyond their training length.

    python -m data.prepare input=CORPUS out=runs/data/study tokenizer=bpe:4096 valid_fraction=0.03
    python -m scripts.studies.collapse data=runs/data/study out=runs/study size=gpu seconds=540
    python -m scripts.studies.collapse data=runs/data/study out=runs/study size=cpu together=1        # minutes on one core

Keys (default)
  size            gpu or cpu: lengths, states, models and tokens, as scripts/studies/arms.py lists them (gpu where there is one)
  seconds         this call may take; the arms under way are saved, and the same command goes on with them (0: as long as it takes)
  only            PART,PART: arms whose names contain one of these, or match it where it has a * (all)
  together, gpus  arms at a time on each GPU (6), GPUs used (0: all there are)
  tokens, layers, width, tokens_per_step, lr     instead of those of the size
  cures, seed, device, precision                 true, 0, auto, bf16 (on a GPU)

The arms are in scripts/studies/arms.py: Mamba-2 with two state sizes x two training lengths, with state passing from scratch and at the end, a ladder of
harder settings (longer memories at the start, a shorter training length), a parallel GRU and a hybrid. Each arm is a process that trains,
saves a checkpoint and is evaluated with the suites of evals/ (position curve, states, remembrance, passkey, cures). Every result is JSON as
soon as it is there; table.md, table.json, study.png and evals/report.html at the end. What is there already is not done again.
Exit status: 0 done, 1 an arm failed, 3 the seconds are over and there is more to do.
"""

from __future__ import annotations

import fnmatch
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from data.files import write_json
from data.shards import open_held_out
from evals.report.figures import line, pyplot
from evals.report.page import cell, markdown_table
from evals.report.sections import write_report
from scripts.studies.arms import SIZES, TimeUp, measure, study_arms, train
from training.config.arguments import parse_arguments, program
from training.errors import UserError
from training.watch.metrics import environment

ROOT = Path(__file__).resolve().parents[2]

DEFAULTS: dict[str, Any] = {
    "data": "runs/data/study",
    "out": "runs/study",
    "size": "",
    "seconds": 0.0,
    "only": "",
    "together": 6,
    "gpus": 0,
    "tokens": 0.0,
    "layers": 0,
    "width": 0,
    "tokens_per_step": 0,
    "lr": 0.0,
    "cures": True,
    "seed": 0,
    "device": "auto",
    "precision": "bf16",
    "arm": "",  # of a worker, and the time by which it has to be done
    "until": 0.0,
}
OVER = 3  # exit status when the time is over
GRACE = 20.0  # seconds a worker has to save what it is at


def table(out: Path, names: list[str]) -> str:
    """table.json and table.md from what lies there; the latter's text."""
    rows = []
    for name in names:
        path = out / "arms" / name / "train.json"
        if not path.exists():
            continue
        arm = json.loads(path.read_text())
        row = {k: arm[k] for k in ("arm", "T", "parameters", "state_elements", "tokens", "loss")}
        items = {p.stem: json.loads(p.read_text()) for p in (out / "evals" / arm["arm"] / "items").glob("*.json")}
        if (p := items.get("position-prose", {})).get("status") == "done":
            c = p["result"]["collapse"]
            row |= {
                "inside": c.get("level_inside"),
                "delta": c.get("delta_at_end"),
                "largest": c.get("delta_largest"),
                "longest": c.get("longest"),
            }
            row |= {
                "onset 0.1": c.get("onset_0.1"),
                "onset 0.5": c.get("onset_0.5"),
                "passes 2x": c.get("forgets_2x"),
                "verdict": c.get("verdict"),
            }
        for prompt in ("constant", "random"):
            if (p := items.get(f"position-{prompt}", {})).get("status") == "done":
                row[f"delta, {prompt}"] = p["result"]["collapse"].get("delta_at_end")
        if (s := items.get("states-prose", {})).get("status") == "done" and s["result"]["growth"]:
            ratios = sorted(g["variance_ratio"] for g in s["result"]["growth"])
            row |= {"median growth": ratios[len(ratios) // 2], "largest growth": ratios[-1]}
        if (r := items.get("remembrance", {})).get("status") == "done":
            row["EffRem at 1/8"] = next((x["distance"] for x in r["result"]["curve"] if x["dropped"] * 8 >= r["result"]["length"]), None)
        rows.append(row)
    write_json(out / "table.json", rows)
    columns = list(dict.fromkeys(k for row in rows for k in row))
    text = markdown_table(columns, [[cell(row.get(c)) for c in columns] for row in rows])
    (out / "table.md").write_text(text + "\n")
    return text


def plot(out: Path, names: list[str]) -> None:
    """study.png: rise of the loss over position in training lengths, an arm a line, and how it came about in training."""
    plt = pyplot()
    arms = [json.loads(p.read_text()) for name in names if (p := out / "arms" / name / "train.json").exists()]
    if plt is None or not arms:
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5))
    for i, arm in enumerate(arms):
        style = line(i) | {"label": arm["arm"]}
        path = out / "evals" / arm["arm"] / "items" / "position-prose.json"
        record = json.loads(path.read_text()) if path.exists() else {}
        if record.get("status") == "done":
            result = record["result"]
            x = [(b["from"] * b["to"]) ** 0.5 / arm["T"] for b in result["buckets"] if b["from"] >= arm["T"]]
            left.plot(x, result["collapse"]["delta"], marker=".", markersize=4, **style)
        grown = [(h["tokens"] / 1e6, h["collapse"]["delta_at_end"]) for h in arm["history"] if "delta_at_end" in h.get("collapse", {})]
        if len(grown) > 1:
            right.plot(*zip(*grown), marker=".", **style)
    left.set(xscale="log", xlabel="position / training length", ylabel="nats above the same tokens in windows of T", title="Held-out text")
    right.set(xlabel="million tokens trained on", ylabel="rise at 64 training lengths, nats", title="In the course of training")
    for axes in (left, right):
        axes.axhline(0.1, color="grey", linewidth=0.8, linestyle=":")
        axes.grid(alpha=0.3)
    left.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out / "study.png", dpi=110)
    plt.close(figure)


def start_arm(name: str, values: dict[str, Any], gpu: int) -> subprocess.Popen[bytes]:
    """A worker process for one arm on one GPU."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    visible_gpus = [g for g in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if g]
    if values["device"] == "cuda":
        variables["CUDA_VISIBLE_DEVICES"] = visible_gpus[gpu] if visible_gpus else str(gpu)
    return subprocess.Popen(
        [sys.executable, "-m", "scripts.studies.collapse", *(f"{k}={v}" for k, v in (values | {"arm": name}).items())], env=variables
    )


def run_arms(names: list[str], values: dict[str, Any], gpus: int, start: float) -> tuple[list[str], list[str]]:
    """Trains and measures the arms, so many at a time, until all are done or the time is over; (those that failed, those not done)."""
    out, slots = Path(values["out"]), values["together"] * gpus
    arms, waiting = study_arms(values["size"]), list(names)
    running: dict[str, tuple[int, subprocess.Popen[bytes]]] = {}
    failed: list[str] = []
    late: list[str] = []

    def ready(name: str) -> bool:
        base = arms[name].get("from")
        return base is None or (out / "arms" / base / "train.json").exists()

    while waiting or running:
        over = values["until"] - time.time() if values["until"] else 1.0
        while over > 0 and len(running) < slots and (name := next((n for n in waiting if ready(n)), "")):
            waiting.remove(name)
            used = [gpu for gpu, _ in running.values()]
            gpu = min(range(gpus), key=used.count)
            running[name] = (gpu, start_arm(name, values, gpu))
        if not running:
            if over <= 0:
                late += waiting
            else:  # what is left waits for arms that failed or were not asked for
                failed += waiting
            break
        time.sleep(0.2)
        if over < -GRACE:
            for _, process in running.values():
                process.send_signal(signal.SIGTERM)
        for name in [n for n, (_, p) in running.items() if p.poll() is not None]:
            status = running.pop(name)[1].returncode
            print(f"[{time.perf_counter() - start:.0f} s] {name} ended with status {status}", flush=True)
            late += [name] if status in (OVER, -signal.SIGTERM) else []
            failed += [name] if status not in (0, OVER, -signal.SIGTERM) else []
            table(out, list(arms))
    return failed, late


def work(values: dict[str, Any], device: Any) -> int:
    """One arm, in a process of its own."""
    try:
        if not (Path(values["out"]) / "arms" / values["arm"] / "train.json").exists():
            train(values["arm"], values, device)
    except TimeUp as stop:
        print(stop, flush=True)
        return OVER
    measure(values["arm"], values, device)
    return 0


def chosen_arms(values: dict[str, Any]) -> list[str]:
    """Names of the arms that only= selects: patterns with * or parts of a name, between commas."""
    parts = values["only"].split(",")
    return [n for n in study_arms(values["size"]) if any(fnmatch.fnmatchcase(n, part) if "*" in part else part in n for part in parts)]


def settle(values: dict[str, Any], cuda: bool) -> None:
    """Fills in what the size and the machine decide. Raises UserError."""
    problems = []
    if values["device"] not in ("auto", "cpu", "cuda") or values["device"] == "cuda" and not cuda:
        problems.append(f"device={values['device']}: choose auto, cpu or, where PyTorch sees a GPU, cuda.")
    values["device"] = "cuda" if cuda and values["device"] != "cpu" else "cpu"
    values["size"] = values["size"] or ("gpu" if values["device"] == "cuda" else "cpu")
    if values["size"] not in SIZES:
        raise UserError([*problems, f"size is {values['size']!r}; choose {' or '.join(SIZES)}."])
    for key in ("tokens", "layers", "width", "tokens_per_step", "lr"):
        values[key] = values[key] or SIZES[values["size"]][key]
    if not (Path(values["data"]) / "meta.json").exists():
        problems.append(f"There are no token shards at {values['data']}; make them with python -m data.prepare.")
    elif open_held_out(values["data"]) is None:
        problems.append(f"{values['data']} has no held-out documents to measure on; prepare it with valid_fraction above zero.")
    if not chosen_arms(values):
        problems.append(f"No arm has {values['only']!r} in its name; there are {', '.join(study_arms(values['size']))}.")
    if problems:
        raise UserError(problems)
    if values["seconds"] and not values["until"]:
        values["until"] = time.time() + values["seconds"]


def main(words: list[str]) -> int:
    """What the command line asks for; returns the exit status. Raises UserError."""
    start = time.perf_counter()
    values = parse_arguments(words, DEFAULTS)
    import torch

    settle(values, torch.cuda.is_available())
    device, out = torch.device(values["device"]), Path(values["out"])
    if values["arm"]:
        return work(values, device)
    out.mkdir(parents=True, exist_ok=True)
    gpus = (values["gpus"] or torch.cuda.device_count()) if device.type == "cuda" else 1
    arms = list(study_arms(values["size"]))
    failed, late = run_arms(chosen_arms(values), values, gpus, start)
    write_report(out / "evals")
    print(table(out, arms), flush=True)
    plot(out, arms)
    seconds = time.perf_counter() - start
    write_json(
        out / "study.json",
        {"seconds": seconds, "failed": failed, "not_done": late, "settings": values, "gpus": gpus, "environment": environment(device)},
    )
    print(f"{seconds:.0f} s; failed: {', '.join(failed) or 'none'}; {out}/table.md, {out}/study.png, {out}/evals/report.html")
    if late:
        print(f"The time is over; not done: {', '.join(late)}. The same command goes on with them.")
    return 1 if failed else OVER if late else 0


if __name__ == "__main__":
    sys.exit(program(__doc__, main))
