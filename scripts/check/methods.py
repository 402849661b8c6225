"""Takes the files of a method away from a copy of the project, one method at a time, and runs what is left: nothing else may miss them.

    python -m scripts.check.methods                       every page of docs/methods, with the quick tests and those of the other methods
    python -m scripts.check.methods only=mup              one
    python -m scripts.check.methods tests=all             with the whole suite (long), or tests=tests/models,tests/evals
    python -m scripts.check.methods tests=affected        with the test files that can reach what was taken away by imports
    python -m scripts.check.methods tests=all at_once=true     all methods (or those of only=) away together: the whole suite once
    python -m scripts.check.methods list=true             which files each would take away
    more keys: out=runs/methods.json (results), again=true (what was shown before is run again)

What a method consists of its page says, in a paragraph that begins with `Files:` and holds paths in backticks; the page itself goes too. In the copy
all modules are imported, then the tests run, a few files at a time. `out` is written after each of these, and the same command goes on from there as
long as the code is the same. Exit status: 0 all was green without each method, 1 something was not.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from data.files import write_json
from scripts.check.changed import changed_modules, distances, graph, modules
from scripts.check.faults import copy_of_the_project, state_of_the_code
from training.config.arguments import parse_arguments, program
from training.errors import UserError
from training.watch.metrics import environment

ROOT = Path(__file__).resolve().parents[2]
PAGES = "docs/methods"
QUICK = (
    "tests/test_floors.py", "tests/models/test_channel.py", "tests/models/test_param.py", "tests/models/test_contract.py",
    "tests/training/test_config.py", "tests/test_golden.py", "tests/test_readme.py", "tests/test_changed_tests.py",
)  # fmt: skip
DESELECTED = ("tests/test_readme.py::test_extending_works_as_pasted",)  # runs the program for long, and is about no method
TOGETHER = 6  # test files of one call of pytest
DEFAULTS: dict[str, Any] = {
    "only": "",
    "tests": "quick",
    "list": False,
    "at_once": False,
    "again": False,
    "out": "runs/methods.json",
}
IMPORT_ALL = """
import importlib, pathlib
for top in ("data", "evals", "kernels", "models", "scripts", "training"):
    for file in sorted(pathlib.Path(top).rglob("*.py")):
        if "triton" not in file.name and file.name not in ("template.py", "check_folder.py"):
            importlib.import_module(".".join(file.with_suffix("").parts).removesuffix(".__init__"))
"""


def files_of(page: Path) -> list[str]:
    """The paths that a page's paragraph of files names, and the page. Raises UserError where it has none, or one is not there."""
    found = re.search(r"^Files:(.*?)(?:\n\s*\n|\Z)", page.read_text(), re.S | re.M)
    names = re.findall(r"`([^`]+)`", found.group(1)) if found else []
    if not names:
        raise UserError(f"{page.relative_to(ROOT)} has no paragraph 'Files: `path`, `path`' that says what its method consists of.")
    missing = [name for name in names if not (ROOT / name).exists()]
    if missing:
        raise UserError(f"{page.relative_to(ROOT)} names {missing[0]}, which is not there.")
    return [*names, str(page.relative_to(ROOT))]


def test_files(tests: list[str], taken: list[str]) -> list[str]:
    """The test files that `tests` (files and folders) mean, without those taken away."""
    files = [file for test in tests for file in ((ROOT / test).rglob("test_*.py") if (ROOT / test).is_dir() else [ROOT / test])]
    names = dict.fromkeys(str(file.relative_to(ROOT)) for file in sorted(files))
    return [name for name in names if not any(name == path or name.startswith(path.rstrip("/") + "/") for path in taken)]


def affected(taken: list[str]) -> list[str]:
    """The test files from which a chain of imports leads to something taken away."""
    known = modules()
    away = distances(changed_modules(taken, known), graph())
    return sorted(str(known[name].relative_to(ROOT)) for name in away if known[name].name.startswith("test_"))


def without(row: dict[str, Any], tests: list[str], save: Callable[[], None]) -> None:
    """Runs `tests` in a copy of the project without row["files"], and notes in the row which files were green (`shown`) and what failed."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "project"
        folder.mkdir()
        copy_of_the_project(folder)
        shutil.copytree(ROOT / "docs" / "results", folder / "docs" / "results", dirs_exist_ok=True)
        for name in row["files"]:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        _commit(folder)
        if failed := _failures(folder, [sys.executable, "-c", IMPORT_ALL]):
            row["failed"] = [f"imports: {failed[-1]}"]
            return
        left = [test for test in tests if test not in row["shown"]]
        skipped = [word for test in DESELECTED for word in ("--deselect", test)]
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "--tb=line", "--maxfail=20", *skipped]
        for i in range(0, len(left), TOGETHER):
            group = left[i : i + TOGETHER]
            if failed := _failures(folder, [*command, *group]):
                row["failed"] += failed
            row["shown"] += [file for file in group if not failed or not any(file in words for words in failed)] if len(failed) < 20 else []
            save()


def _failures(folder: Path, command: list[str]) -> list[str]:
    """What a program in the copy says that is wrong; nothing if it ends well (or pytest found all of its tests skipped: 5)."""
    done = subprocess.run(command, cwd=folder, env=_environment(folder), capture_output=True, text=True, check=False)
    if done.returncode in (0, 5):
        return []
    told = (done.stdout + done.stderr).strip().splitlines()
    return [line for line in told if line.startswith(("FAILED", "ERROR"))][:20] or told[-1:]


def _commit(folder: Path) -> None:
    """Some tests ask git which files there are."""
    git = ["git", "-c", "user.name=check", "-c", "user.email=check@localhost"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "copy"]):
        subprocess.run([*git, *words], cwd=folder, check=True, capture_output=True)


def _environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}


def main(words: list[str]) -> int:
    options = parse_arguments(words, DEFAULTS)
    pages = {page.stem: page for page in sorted((ROOT / PAGES).glob("*.md"))}
    chosen = options["only"].split(",") if options["only"] else list(pages)
    if unknown := [name for name in chosen if name not in pages]:
        raise UserError(f"There is no page {PAGES}/{unknown[0]}.md; there are {', '.join(pages)}.")
    taken = {name: files_of(pages[name]) for name in chosen}
    if options["list"]:
        print("\n".join(f"{name:<16} {', '.join(files)}" for name, files in taken.items()))
        return 0
    methods_tests = [file for page in pages.values() for file in files_of(page) if Path(file).name.startswith("test_")]
    if options["at_once"]:
        taken = {"at once": sorted({file for files in taken.values() for file in files})}
    out, state, commit = ROOT / options["out"], state_of_the_code(), environment(torch.device("cpu"))["commit"]
    results = json.loads(out.read_text()) if out.exists() and not options["again"] else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    for name, files in taken.items():
        wanted = {"quick": [*QUICK, *methods_tests], "all": ["tests"], "affected": []}.get(options["tests"], options["tests"].split(","))
        tests = test_files(affected(files) if options["tests"] == "affected" else wanted, files)
        before = results.get(name, {})
        shown = [file for file in before.get("shown", []) if file in tests] if before.get("code") == state else []
        row = results[name] = {
            "green": False,
            "failed": [],
            "shown": shown,
            "files": files,
            "tests": options["tests"],
            "code": state,
            "commit": commit,
        }
        without(row, tests, lambda: write_json(out, results))
        row["green"] = not row["failed"]
        write_json(out, results)
        told = " / ".join(row["failed"]) or f"{len(row['shown'])} test files"
        print(f"{name:<16} {'green' if row['green'] else 'NOT GREEN'}: {told}", flush=True)
    return int(not all(results[name]["green"] for name in taken))


if __name__ == "__main__":
    sys.exit(program(__doc__, main))
