"""Takes the files of a method away from a copy of the project, one method at a time, and runs what is left: nothing else may miss them.

    python -m scripts.check.methods                       every page of docs/methods, with the quick tests
    python -m scripts.check.methods only=mup              one
    python -m scripts.check.methods tests=all             with the whole suite (long), or tests=tests/models,tests/evals
    python -m scripts.check.methods tests=all at_once=true     all methods (or those of only=) away together: the whole suite once
    python -m scripts.check.methods list=true             which files each would take away
    more key: out=runs/methods.json (results)

What a method consists of its page says, in a paragraph that begins with `Files:` and holds paths in backticks; the page itself goes too. In the copy
all modules are imported, then the tests run. Exit status: 0 all was green without each method, 1 something was not.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from data.files import write_json
from scripts.check.faults import copy_of_the_project
from training.config.arguments import parse_arguments, program
from training.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
PAGES = "docs/methods"
QUICK = (
    "tests/test_floors.py", "tests/models/test_channel.py", "tests/models/test_param.py", "tests/models/test_contract.py",
    "tests/training/test_config.py", "tests/test_golden.py", "tests/test_readme.py", "tests/test_changed_tests.py",
)  # fmt: skip
DESELECTED = ("tests/test_readme.py::test_extending_works_as_pasted",)  # runs the program for long, and is about no method
DEFAULTS: dict[str, Any] = {"only": "", "tests": "quick", "list": False, "at_once": False, "out": "runs/methods.json"}
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


def without(names: list[str], tests: list[str]) -> tuple[bool, str]:
    """(whether all is green, the last words) of a copy of the project without these files."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "project"
        folder.mkdir()
        copy_of_the_project(folder)
        shutil.copytree(ROOT / "docs" / "results", folder / "docs" / "results", dirs_exist_ok=True)
        for name in names:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        _commit(folder)
        left = [test for test in tests if (folder / test.split("::")[0]).exists()]
        skipped = [word for test in DESELECTED for word in ("--deselect", test)]
        commands = {
            "imports": [sys.executable, "-c", IMPORT_ALL],
            "tests": [sys.executable, "-m", "pytest", "-q", "-n", "0", "--tb=line", "--maxfail=20", *skipped, *left],
        }
        for what, command in commands.items():
            done = subprocess.run(command, cwd=folder, env=_environment(folder), capture_output=True, text=True, check=False)
            if done.returncode:
                words = [line for line in (done.stdout + done.stderr).strip().splitlines() if line.startswith(("E  ", "FAILED", "ERROR"))]
                return False, f"{what}: {' / '.join(words[:20]) or (done.stderr or done.stdout).strip().splitlines()[-1]}"
        return True, (done.stdout.strip().splitlines() or ["no tests"])[-1]


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
    tests = {"quick": list(QUICK), "all": ["tests"]}.get(options["tests"], options["tests"].split(","))
    taken = {name: files_of(pages[name]) for name in chosen}
    if options["list"]:
        print("\n".join(f"{name:<16} {', '.join(files)}" for name, files in taken.items()))
        return 0
    if options["at_once"]:
        taken = {"at once": sorted({file for files in taken.values() for file in files})}
    out, results = ROOT / options["out"], {}
    for name, files in taken.items():
        green, words_of_it = without(files, tests)
        print(f"{name:<16} {'green' if green else 'NOT GREEN'}: {words_of_it}", flush=True)
        results[name] = {"green": green, "told": words_of_it, "files": files, "tests": options["tests"]}
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, results)
    return int(not all(row["green"] for row in results.values()))


if __name__ == "__main__":
    sys.exit(program(__doc__, main))
