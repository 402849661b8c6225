"""Golden losses: 50 steps of every tiny model on the CPU, to show that a change leaves training as it was.

    python -m scripts.check.golden                            the working tree against its base commit, bit for bit on this machine
    python -m scripts.check.golden against=REV                against another commit, tag or branch
    python -m scripts.check.golden against=FILE out=FILE      against losses that `out=` wrote; keeps those of the working tree
    python -m scripts.check.golden against=stored             against tests/golden/losses.json to 1e-5, all steps where the processor, release of
                                                              torch and threads are those it names, else the first four
    python -m scripts.check.golden renew="why they change"    writes tests/golden/losses.json and commits it with this reason
    more keys: only=hybrid,mamba2 (these models)   steps=50 (5 or more)   threads=1   jobs=2 (runs at a time)   tree=DIR (instead of this working tree)

The base commit is HEAD where the working tree has changes, otherwise the commit at which this branch left main (on main itself: HEAD~1).
A commit is unpacked into a temporary folder and trained there by its own train.py on shards its own data.prepare wrote, so a change in any part
that training passes through shows. Compared are losses, gradient norms and the held-out bits per byte, of every model in configs/model and of
one that has all other mixers of configs/mixer, a layer each. Losses that a change is meant to move are renewed, in a commit that says why.
Exit status: 0 equal, 1 different, 2 mistake.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from data.files import write_json
from training.config.arguments import parse_arguments, program
from training.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
STORED = "tests/golden/losses.json"
OTHERS = "other mixers"
STEPS = 50
ELSEWHERE, ELSEWHERE_STEPS = 1e-5, 4  # relative; on another processor rounding differs, and grows from step to step
DEFAULTS: dict[str, Any] = {
    "against": None,
    "renew": None,
    "only": None,
    "out": None,
    "tree": None,
    "steps": STEPS,
    "threads": 1,
    "jobs": 2,
}
SETTINGS = [
    "size=tiny",
    "name=golden",
    "schedule=constant",  # so that the first steps of a short run are those of a long one
    "schedule.warmup=5",
    "train.device=cpu",
    "train.seq_len=128",
    "train.global_batch=4",
    "train.micro_batch=2",
    "train.log_every=50",
    "checkpoint.at_end=false",
    "eval.tokens=1024",
    "eval.sample_tokens=4",
    "logging.wandb=disabled",
]

Losses = dict[str, dict[str, Any]]


def cases(trees: list[Path]) -> dict[str, list[str]]:
    """Overrides of train.py by case name, for configs that all `trees` have: one case for each model, and one for the mixers that no model
    uses and no other mixer's config starts from."""
    models = sorted(set.intersection(*({file.stem for file in tree.glob("configs/model/*.yaml")} for tree in trees)))
    mixers = set.intersection(*({file.stem for file in tree.glob("configs/mixer/*.yaml")} for tree in trees))
    named = "".join(file.read_text() for file in trees[0].glob("configs/model/*.yaml"))
    begun_from = "".join(file.read_text() for tree in trees for file in tree.glob("configs/mixer/*.yaml"))
    rest = sorted(mixer for mixer in mixers if f"mixers.{mixer}:" not in named and f"  - {mixer}\n" not in begun_from)
    overrides_of = {model: [f"model={model}"] for model in models}
    if rest:
        pattern = f"model.pattern=[{','.join(rest)}]"
        layers = [f"model.n_layers={len(rest)}", "size.d_model=64", "optim.lr=3e-3"]
        overrides_of[OTHERS] = ["model=hybrid", *(f"+mixer@model.mixers.{mixer}={mixer}" for mixer in rest), pattern, *layers]
    return overrides_of


def base_commit(tree: Path) -> str:
    """The commit that `tree` is compared with unless another is named."""
    if git(tree, "status", "--porcelain", "--untracked-files=no"):
        return "HEAD"
    head = git(tree, "rev-parse", "HEAD")
    for main in ("origin/main", "main"):
        if git(tree, "rev-parse", "--verify", "--quiet", main, may_fail=True):
            left = git(tree, "merge-base", "HEAD", main)
            return left if left != head else "HEAD~1"
    return "HEAD~1"


def git(tree: Path, *words: str, may_fail: bool = False) -> str:
    done = subprocess.run(["git", "-C", str(tree), *words], capture_output=True, text=True, check=False)
    if done.returncode and not may_fail:
        raise UserError(f"git {' '.join(words)} failed in {tree}: {done.stderr.strip()}")
    return done.stdout.strip()


def unpack(tree: Path, commit: str, folder: Path) -> str:
    """Writes the files of `commit` into `folder`; returns its full name. Raises UserError where there is no such commit."""
    name = git(tree, "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}", may_fail=True)
    if not name:
        raise UserError(f"There is no commit and no file {commit!r}; give against=REV, against=FILE or against=stored.")
    folder.mkdir()
    archive = folder.with_suffix(".tar")
    git(tree, "archive", "--output", str(archive), name)
    subprocess.run(["tar", "-xf", str(archive), "-C", str(folder)], check=True)
    return name


def where(threads: int) -> str:
    """What losses depend on besides the code, as the key of the stored file."""
    import platform

    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor() or "unknown")
    return f"{model} {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, threads {threads}"


def differences(ours: Losses, theirs: Losses, steps: int | None = None, tolerance: float = 0.0) -> list[str]:
    """A sentence for each case whose figures differ by more than `tolerance` (relative) within `steps`; 0 asks for the same bits."""
    sentences = []
    for name in [n for n in theirs if n in ours]:
        whole = len(ours[name]["loss"]) == len(theirs[name]["loss"])
        for key in ("loss", "grad_norm", "held_out") if whole and steps is None else ("loss", "grad_norm"):
            pairs = list(zip(ours[name][key], theirs[name][key]))[:steps]
            apart = [(i, a, b) for i, (a, b) in enumerate(pairs, 1) if not (a == b or abs(a - b) <= tolerance * abs(b))]
            if apart:
                step, a, b = apart[0]
                worst = max(abs(x - y) / abs(y) for _, x, y in apart)
                sentences.append(f"{name}: {key} differs from step {step} on: {a!r} instead of {b!r} (at most {worst:.1e} relative)")
    return sentences


def reference(against: str, tree: Path, work: Path) -> tuple[Losses | Path, str]:
    """(losses read from a file, or the folder of a source tree that has yet to be trained; how messages call it)."""
    if against == "stored":
        stored = json.loads((tree / STORED).read_text())
        return stored["losses"], f"the stored losses ({stored['why']})"
    if Path(against).is_file():
        return json.loads(Path(against).read_text())["losses"], against
    name = unpack(tree, against, work / "base")
    return work / "base", f"{against} ({name[:12]})"


def main(words: list[str]) -> int:
    from scripts.check import golden_runs

    options = parse_arguments(words, DEFAULTS)
    if options["renew"] and (options["only"] or options["against"] or options["steps"] != STEPS):
        raise UserError(f"renew stores all models with {STEPS} steps; leave out only=, against= and steps=.")
    tree, threads = Path(options["tree"] or ROOT).resolve(), options["threads"]
    with tempfile.TemporaryDirectory(prefix="golden_") as folder:
        work = Path(folder)
        other: Losses | Path | None = None
        if not options["renew"]:
            other, called = reference(options["against"] or base_commit(tree), tree, work)
        trees = [tree] + ([other] if isinstance(other, Path) else [])
        chosen = cases(trees)
        if options["only"]:
            unknown = set(options["only"].split(",")) - chosen.keys()
            if unknown:
                raise UserError(f"There is no model {', '.join(sorted(unknown))}; there are {', '.join(chosen)}.")
            chosen = {name: chosen[name] for name in options["only"].split(",")}
        runs = [(name, [*SETTINGS, f"train.steps={options['steps']}", *words]) for name, words in chosen.items()]
        measured = golden_runs.measure(trees, runs, work, threads, options["jobs"])
    ours = measured[0]
    document = {"commit": git(tree, "rev-parse", "HEAD"), "where": where(threads), "losses": ours}
    if options["out"]:
        write_json(Path(options["out"]), document)
    if options["renew"]:
        return renew(tree, ours, options["renew"], where(threads))
    theirs = measured[1] if isinstance(other, Path) else other
    assert theirs is not None and not isinstance(theirs, Path)
    if options["against"] == "stored":
        same_place = json.loads((tree / STORED).read_text())["where"] == where(threads)
        sentences = differences(ours, theirs, None if same_place else ELSEWHERE_STEPS, ELSEWHERE)
    else:
        sentences = differences(ours, theirs)
    missing = sorted(set(theirs) - set(ours)) if not options["only"] else []
    sentences += [f"{name} is in {called} but not in the working tree" for name in missing]
    print("\n".join(sentences) or f"equal to {called}: {', '.join(n for n in ours if n in theirs)}")
    return int(bool(sentences))


def renew(tree: Path, losses: Losses, why: str, here: str) -> int:
    """Replaces the stored file and commits it alone, with the reason."""
    file = tree / STORED
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"why": why, "where": here, "losses": losses})
    git(tree, "add", STORED)
    git(tree, "commit", "--only", STORED, "-m", f"Golden losses renewed: {why}")
    print(f"committed {STORED}: {why}")
    return 0


if __name__ == "__main__":
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    sys.exit(program(__doc__, main))
