"""Prints the test files that a change concerns, for daily work: `scripts/test.sh --changed [REV]` runs them.

    python -m scripts.check.changed [REV] [seconds=90]        REV: what the working tree is compared with (default HEAD)

Tests are found by imports: a test file is as far from a changed module as the shortest chain of imports between them, lazy ones and modules that
are named in strings (`"-m", "data.prepare"`, `"train.py"`) included. A package that finds its members by name (mixers, cells, tasks) imports all
of them, and a config belongs to the package of its group. A chain through everything that builds a model says little: tests that nowhere name
what was changed (mamba2, rotary) count as FARTHER. Nearest files come first, until they would take more than `seconds` of one core by
tests/durations.json; what was left out is named on stderr, and the whole suite remains what decides.
"""

from __future__ import annotations

import ast
import functools
import json
import re
import subprocess
import sys
from collections import deque
from pathlib import Path

from training.config.arguments import program
from training.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("data", "evals", "kernels", "models", "scripts", "tests", "training")
BY_NAME = (
    "models.mixers",
    "models.cells",
    "models.channel",
    "models.param",
    "training.wrappers",
    "evals.suites.extra",
    "data.synthetic",
)  # packages that import a member which a config names
CONFIGS = {
    "configs/mixer": "models.mixers",
    "configs/channel": "models.channel",
    "configs/param": "models.param",
    "configs/wrapper": "training.wrappers",
    "configs/": "training.config.cli",
}
FARTHER = 3  # imports, of a test that does not name what was changed
USUAL = 1.0  # seconds of a test file that durations.json does not know


def modules() -> dict[str, Path]:
    """Every module of the project by its name."""
    file_of = {"train": ROOT / "train.py"}
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            file_of[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return file_of


def imported(name: str, file: Path, tree: ast.Module, known: dict[str, Path]) -> set[str]:
    """The project's modules that a file imports or names in a string."""
    mentioned: set[str] = set()
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            mentioned |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            mentioned |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            mentioned.add(node.value.removesuffix(".py").replace("/", "."))
    if name.startswith("tests."):
        beside = name.rpartition(".")[0]
        mentioned |= {f"{beside}.{other}" for other in set(mentioned)}  # pytest puts a test's own folder on the path
    if name in BY_NAME:
        mentioned |= {other for other in known if other.startswith(f"{name}.")}
    return (mentioned & known.keys()) - {name}


def uses_runs(tree: ast.Module) -> bool:
    """Whether tests of this file take the fixture that runs train.py."""
    return any(a.arg == "train" for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for a in node.args.args)


@functools.cache
def graph() -> dict[str, set[str]]:
    """Which modules import each module."""
    known = modules()
    importers: dict[str, set[str]] = {name: set() for name in known}
    for name, file in known.items():
        tree = ast.parse(file.read_text())
        imports = imported(name, file, tree, known)
        if file.name == "conftest.py":
            imports.discard("train")  # `uses_runs` below adds it to the tests that use the fixture
        if file.name.startswith("test_") and uses_runs(tree):
            imports.add("train")
        for other in imports:
            importers[other].add(name)
    return importers


def distances(changed: set[str], importers: dict[str, set[str]]) -> dict[str, int]:
    """How many imports each module is away from the nearest changed one; those that cannot be reached are left out."""
    distance_of, waiting = dict.fromkeys(changed, 0), deque(changed)
    while waiting:
        name = waiting.popleft()
        for other in importers[name] - distance_of.keys():
            distance_of[other] = distance_of[name] + 1
            waiting.append(other)
    return distance_of


def changed_modules(files: list[str], known: dict[str, Path]) -> set[str]:
    """The modules that the changed files are or belong to."""
    names = {str(file.relative_to(ROOT)): name for name, file in known.items()}
    changed = {names[file] for file in files if file in names}
    for file in files:
        if file.endswith(".yaml"):
            changed |= (
                {next(module for folder, module in CONFIGS.items() if file.startswith(folder))} if file.startswith("configs/") else set()
            )
    return changed & known.keys()


def word_for(module: str) -> str:
    """By which word a test names a module: its own, and an op's, whose files are called as those of every op, by its folder."""
    parts = module.split(".")
    return parts[1] if parts[0] == "kernels" and len(parts) > 1 else parts[-1]


def names(file: Path, changed: set[str]) -> bool:
    """Whether a test's file name or text has a word for one of the changed modules, or goes over all members of a package that has one."""
    words = "|".join(sorted(re.escape(word_for(module)) for module in changed))
    text = f"{file.stem} {file.read_text()}"
    by_name = any(module.startswith(f"{package}.") for module in changed for package in BY_NAME)
    return bool(re.search(rf"(?<![a-z0-9])({words})(?![a-z0-9])", text)) or (by_name and bool(re.search(r"\bmixers\.available\(", text)))


def chosen(files: list[str], seconds: float) -> tuple[list[str], list[str]]:
    """(test files to run, nearest first; test files that the change reaches too but for which there is no time)."""
    known = modules()
    changed = changed_modules(files, known)
    away = distances(changed, graph())
    tests = {name: known[name] for name in away if known[name].name.startswith("test_")}
    rank = {name: away[name] + (0 if away[name] < 2 or names(file, changed) else FARTHER) for name, file in tests.items()}
    recorded = json.loads((ROOT / "tests/durations.json").read_text())
    cost = {name: recorded.get(str(file.relative_to(ROOT)), USUAL) for name, file in tests.items()}
    taken, left = [], []
    for name in sorted(tests, key=lambda n: (rank[n], cost[n])):
        path = str(tests[name].relative_to(ROOT))
        if away[name] == 0 or cost[name] <= seconds:
            seconds -= cost[name]
            taken.append(path)
        else:
            left.append(path)
    return taken, left


def main(words: list[str]) -> int:
    limits = [word.partition("=")[2] for word in words if word.startswith("seconds=")]
    revisions = [word for word in words if not word.startswith("seconds=")]
    if len(revisions) > 1 or not all(limit.isdigit() for limit in limits):
        raise UserError("Give one commit and seconds=NUMBER, or neither: scripts/test.sh --changed main")
    difference = subprocess.run(
        ["git", "diff", "--name-only", *(revisions or ["HEAD"]), "--"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if difference.returncode:
        raise UserError(f"git knows no commit {revisions[0]!r}." if revisions else difference.stderr.strip())
    new = subprocess.run(["git", "ls-files", "-o", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
    taken, left = chosen([*difference.stdout.splitlines(), *new.stdout.splitlines()], float((limits or ["90"])[-1]))
    print("\n".join(taken))
    if left:
        print(f"not run, though the change reaches them: {' '.join(left)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(program(__doc__, main))
