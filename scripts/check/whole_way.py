"""Takes tiny models of the methods in docs/methods the whole way: two ranks with ZeRO-1 against one process, evaluation, text, export, and the export
again as transformers loads it. What a mixer's tests promise is here done by the programs.

    python -m scripts.check.whole_way                     all mixers of the pages in one model, and the cases below; some minutes
    python -m scripts.check.whole_way only=aaren,depth    a model of one page's mixers each, or cases whose names begin so
    more key: out=runs/whole_way.json (results)

The pages' own `Files:` say which mixers there are. Exit status: 0 all went the whole way, 1 something did not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from data.files import write_json
from scripts.check.methods import PAGES, files_of
from training.config.arguments import parse_arguments, program
from training.errors import UserError
from training.watch.metrics import environment

ROOT = Path(__file__).resolve().parents[2]
DEFAULTS: dict[str, Any] = {"only": "", "out": "runs/whole_way.json"}
TINY = ["experiment=smoke", "train.device=cpu", "train.global_batch=4", "train.micro_batch=2", "optim.lr=3e-3"]
CASES = {
    "jrt prompt": ["model=paragru", "+mixer@model.mixers.jrt=jrt", "model.pattern=[jrt]", "model.mixers.jrt.prompt=12", "train.seq_len=64"],
    "depth universal": ["model.n_layers=1", "+model.depth.type=universal", "+model.depth.loops=3", "+model.depth.halting=true"],
    "depth recurrent": ["model.n_layers=3", "+model.depth.type=recurrent", "+model.depth.loops=3", "+model.depth.backprop=2"],
    "structured": ["model=transformer", "channel=blockshuffle", "model.channel.guide=0.5", "model.channel.rate_power=0.5"],
}


def of_mixers(names: list[str]) -> list[str]:
    """Overrides for a model with a layer of each."""
    mixers = [f"+mixer@model.mixers.{name}={name}" for name in names]
    return ["model=paragru", *mixers, f"model.pattern=[{','.join(names)}]", f"model.n_layers={len(names)}"]


def cases(only: str) -> dict[str, list[str]]:
    """Overrides of train.py by the names of cases. Raises UserError."""
    pages = {page.stem: files_of(page) for page in sorted((ROOT / PAGES).glob("*.md"))}
    mixers = {page: [Path(file).stem for file in files if file.startswith("configs/mixer/")] for page, files in pages.items()}
    there = {name: words for name, words in CASES.items() if any(page.startswith(name.split()[0]) for page in pages)}
    if not only:
        return {"all mixers": of_mixers([name for names in mixers.values() for name in names]), **there}
    chosen: dict[str, list[str]] = {}
    for word in only.split(","):
        own = {word: of_mixers(mixers[word])} if mixers.get(word) else {}
        own |= {name: words for name, words in there.items() if name.startswith(word)}
        if not own:
            raise UserError(f"{word!r} is no page of {PAGES} with mixers and begins no case; cases are {', '.join(there)}.")
        chosen |= own
    return chosen


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def way(words: list[str], data: Path, folder: Path) -> dict[str, Any]:
    """What became of a model on its way; a step that failed is the last."""
    shared = [*TINY, *words]
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    exported, small = str(folder / "exported"), ["length=64", "chunk=16", "max_tokens=512"]
    steps = {
        "one rank": ["train.py", *shared, f"data.path={data}", f"run_dir={folder / 'one'}"],
        "two ranks, ZeRO-1": [*ranks, "train.py", *shared, "deepspeed=zero1", f"data.path={data}", f"run_dir={folder / 'two'}"],
        "perplexity": ["-m", "evals.run", f"checkpoint={folder / 'two'}", "suite=perplexity", *small, f"out={folder / 'nats.json'}"],
        "passkey and collapse": ["-m", "evals.run", f"checkpoint={folder / 'two'}", "suite=quick", "max_length=128", "train_length=64",
                                 "samples=2", "rows=2", "max_tokens=512", "cures=none", f"out={folder / 'evals'}"],
        "decoding": ["-m", "scripts.generate", f"checkpoint={folder / 'two'}", "prompt=It was", "max_new_tokens=8", "temperature=0"],
        "export": ["-m", "scripts.export", str(folder / "two"), exported],
        "export evaluated": ["-m", "evals.run", f"checkpoint={exported}", "suite=perplexity", f"data={data}", *small, f"out={folder / 'again.json'}"],
    }  # fmt: skip
    told: dict[str, Any] = {}
    for name, step in steps.items():
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run([sys.executable, *step], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            return {**told, name: f"FAILED: {' / '.join((done.stderr or done.stdout).strip().splitlines()[-3:])}"}
        told[name] = "done"
    one, two = losses(folder / "one"), losses(folder / "two")
    told["most that losses of ranks differ"] = max(abs(a - b) for a, b in zip(one, two, strict=True))
    nats = [json.loads((folder / name).read_text()) for name in ("nats.json", "again.json")]
    told["held-out figures"] = [report.get("bits_per_byte", report.get("nll")) for report in nats]
    return told


def main(words: list[str]) -> int:
    options = parse_arguments(words, DEFAULTS)
    chosen, results, failed = cases(options["only"]), {}, False
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data"
        prepare = ["-m", "data.prepare", "input=demo", f"out={data}", "tokenizer=bytes", "valid_docs=[2]"]
        subprocess.run([sys.executable, *prepare], cwd=ROOT, check=True, capture_output=True)
        for name, overrides in chosen.items():
            folder = Path(scratch) / name.replace(" ", "_")
            folder.mkdir()
            results[name] = {"overrides": overrides, **way(overrides, data, folder)}
            apart = results[name].get("most that losses of ranks differ", 1.0)
            figures = results[name].get("held-out figures") or [0.0, 1.0]
            good = apart < 1e-4 and None not in figures and abs(figures[0] - figures[1]) < 1e-4
            failed |= not good
            results[name]["good"] = good
            print(
                f"{name:<16} {'good' if good else 'NOT GOOD'}: { {k: v for k, v in results[name].items() if k not in ('overrides', 'good')} }",
                flush=True,
            )
            out = ROOT / options["out"]
            out.parent.mkdir(parents=True, exist_ok=True)
            write_json(out, {**results, "environment": environment(torch.device("cpu"))})
    return int(failed)


if __name__ == "__main__":
    sys.exit(program(__doc__, main))
