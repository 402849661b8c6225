"""The commands of the README and of docs/: what they name is there, and their settings are accepted. What is to be pasted is run; scripts/quickstart.sh is run by .ci/run."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from data.prepare import parse
from scripts.check.methods import files_of
from tests.conftest import ROOT, SMALL, environment, run_program
from training.config.arguments import parse_arguments
from training.config.cli import checked, compose_config
from training.sweep import Sweep

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "results").glob("*.md")),
    *sorted((ROOT / "docs" / "methods").glob("*.md")),
]
STANDS_FOR = {
    "experiment=NAME": "experiment=smoke",
    "model=hf:path/to/llama": "model=transformer",
    "model=hf:out/quickstart": "model=transformer",
}
STANDS_FOR |= {
    "model.mixers.paragru.cell=leaky": "model.mixers.paragru.cell=gru",
    "+mixer@model.mixers.shift=shift": "+mixer@model.mixers.shift=swa",
}
CELL = "model.mixers.paragru.cell=NAME"


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", page, re.S | re.M)


def to_write(page: str) -> dict[str, str]:
    """The files whose text a page gives, by name: a block of code after the name."""
    return dict(re.findall(r"`((?:models|configs)/[a-z_/]+\.(?:py|yaml))`.*?\n```(?:python|yaml)\n(.*?)```", page, re.S))


def commands() -> list[tuple[str, str]]:
    """(page, command) of every line of a bash block, of every `python ...` in a README's sentences, and of train.py's docstring."""
    usage = ast.get_docstring(ast.parse((ROOT / "train.py").read_text())) or ""
    typed = [("train.py", line.strip()) for line in usage.splitlines() if line.startswith("    ")]
    for page in PAGES:
        text = page.read_text()
        lines = [line for block in blocks(text, "bash") for line in block.replace("\\\n", "").splitlines()]
        inline = re.findall(r"`((?:python|scripts/)[^`\n]*[ =][^`\n]*)`", text) if page.name == "README.md" else []
        typed += [(name_of(page), line) for line in [*lines, *inline] if shlex.split(line, comments=True)]
    return typed


def module_of(words: list[str]) -> ModuleType | None:
    """The program that `words` start: a module of ours, or a script. Asserts that it is there; None for a program of others."""
    if words[0] in ("source", "bash") and words[1].endswith("activate"):
        return None
    if words[0] == "mkdir" or words[:2] == ["python", "-c"]:
        return None
    start = next((i for i, w in enumerate(words) if w.endswith((".py", ".sh")) or w == "-m"), None)
    assert start is not None, "no program of this project"
    if words[start] == "-m":
        assert importlib.util.find_spec(words[start + 1]) is not None, words[start + 1]
        return importlib.import_module(words[start + 1])
    path = ROOT / words[start]
    assert path.is_file(), f"there is no {words[start]}"
    if path.suffix == ".sh":
        assert start > 0 or os.access(path, os.X_OK), f"{words[start]} is started but cannot be"
        assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
        return None
    spec = importlib.util.spec_from_file_location(f"readme_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page,command", commands(), ids=lambda text: text.split(" #")[0].strip())
def test_a_command_names_what_exists_and_its_settings_are_accepted(page: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(command.split("   ")[0] if page == "train.py" else command, comments=True)
    ranks = [words[i + 1] for i, w in enumerate(words) if w in ("--nproc_per_node", "--num_gpus")]
    monkeypatch.setenv("WORLD_SIZE", ranks[0] if ranks else "1")
    module = module_of([w for w in words if not re.match(r"[A-Z_]+=", w)])
    settings = [w for w in words if "=" in w and not w.startswith("-") and not re.match(r"[A-Z_]+=", w)]
    if "train.py" in words or "scripts/train_multinode.sh" in words:
        settings = [STANDS_FOR.get(w, w.replace(CELL, CELL.replace("NAME", "gru"))) for w in settings]
        if "-m" in words:
            assert Sweep(settings, ["-m"], compose_config, checked).jobs
        else:
            checked(compose_config(settings))
    elif module is not None and module.__name__ == "data.prepare":
        assert not settings or parse(settings).out
    elif module is not None and isinstance(getattr(module, "DEFAULTS", None), dict):
        parse_arguments(settings, module.DEFAULTS)


def test_there_are_commands() -> None:
    assert len(commands()) > 40 and {page for page, _ in commands()} >= {"README.md", "docs/data.md", "docs/hub.md"}


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, made as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    """To a file that is there, and to a heading that the page has."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        assert not anchor or anchor in headings(there), target


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=name_of)
def test_lines_can_be_read(page: Path) -> None:
    """Prose is wrapped; a row of a table and a line of code are as long as they are."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    assert not [line for line in text.splitlines() if len(line) > 120 and not line.startswith(("|", "    ", "!["))]


def test_the_readme_stays_an_overview() -> None:
    assert len(PAGES[0].read_text().splitlines()) <= 130


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_exist(page: Path) -> None:
    """Those in `code` that begin with a folder of the project, but for what the reader is to write or a command will."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    new = set(to_write(page.read_text()))
    folders = {p.name for p in ROOT.iterdir() if p.is_dir()} - {"runs", "out"}
    codes = [code for code in re.findall(r"`([^`\n]+)`", text) if not code.startswith("python ")]
    paths = {w for code in codes for w in code.split() if w.split("/")[0] in folders and "/" in w and "NAME" not in w}
    assert not [w for w in paths - new if not (ROOT / w).exists() and not ("*" in w and any(ROOT.glob(w)))]
    assert len(paths) > 10 or page.name != "README.md" or page.parent != ROOT


def test_no_page_but_a_methods_own_leads_to_its_files() -> None:
    """So that a method can be taken away (scripts/check/methods.py): other pages name it in words, or the figures in docs/results."""
    taken = {name for page in (ROOT / "docs" / "methods").glob("*.md") for name in files_of(page)}
    led = {
        (name_of(page), name)
        for page in PAGES
        if page.parent.name != "methods"
        for name in taken
        if f"`{name}`" in (text := page.read_text()) or f"]({name.removeprefix('docs/')})" in text
    }
    assert not led


@pytest.mark.slow
def test_extending_works_as_pasted(tmp_path: Path, demo_shards: Path) -> None:
    """The files of docs/extending.md, in a copy of the project: the contract tests find them and a model of them trains."""
    section = (ROOT / "docs" / "extending.md").read_text()
    files = to_write(section)
    assert len(files) == 3
    for name in ("configs", "data", "evals", "kernels", "models", "tests", "training", "train.py", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    for name, text in files.items():
        assert not (ROOT / name).exists()
        (tmp_path / name).write_text(text)
    env = environment(PYTHONPATH=str(tmp_path))
    lines = [line for block in blocks(section, "bash") for line in block.splitlines()]
    tests = [shlex.split(line, comments=True) for line in lines if "pytest" in line]
    assert len(tests) == 2 and all(words[:5] == ["python", *tests[0][1:4], "-k"] for words in tests)
    command = [sys.executable, *tests[0][1:4], "-q", "-n", "0", "-k", " or ".join(words[5] for words in tests)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed and int(passed[1]) >= 36, done.stdout[-3000:]
    words = [w for line in lines if "train.py" in line for w in shlex.split(line, comments=True)[2:]]
    words += [*SMALL, "train.steps=2", f"data.path={demo_shards}", f"run_dir={tmp_path / 'run'}"]
    done = subprocess.run(
        [sys.executable, "train.py", *dict.fromkeys(words)], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "step 2/2" in done.stdout, done.stderr


@pytest.mark.slow
def test_the_page_on_the_python_api_runs(demo_shards: Path, train: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    assert train("quick", "train.steps=1").returncode == 0
    code = "\n".join(blocks((ROOT / "docs" / "python_api.md").read_text(), "python"))
    code = code.replace("runs/data/demo", str(demo_shards)).replace("runs/quickstart", str(tmp_path / "quick"))
    done = run_program(["-c", code])
    assert done.returncode == 0 and len(done.stdout.splitlines()) >= 4, done.stderr


def test_the_page_on_the_parallel_solve_runs(capsys: pytest.CaptureFixture[str]) -> None:
    exec("\n".join(blocks((ROOT / "docs" / "parallel_solve.md").read_text(), "python")), {})
    assert float(re.sub(r"[^0-9.e-]", "", capsys.readouterr().out.replace("tensor", ""))) < 1e-5


def test_the_readme_shows_the_cell_of_the_page_on_extending() -> None:
    extending = blocks(PAGES[0].read_text().partition("## Extending")[2], "python")
    assert extending == blocks((ROOT / "docs" / "extending.md").read_text(), "python")[:1]


@pytest.mark.parametrize("folder", ["docs", "docs/results"])
def test_the_index_names_every_page(folder: str) -> None:
    index = (ROOT / folder / "README.md").read_text()
    assert [p.name for p in (ROOT / folder).glob("*.md") if p.name != "README.md" and f"]({p.name})" not in index] == []


def test_every_file_of_results_is_listed() -> None:
    index = (ROOT / "docs" / "results" / "README.md").read_text()
    assert [p.name for p in (ROOT / "docs" / "results").iterdir() if p.is_dir() and f"]({p.name})" not in index] == []
    pages = "".join(page.read_text() for page in PAGES if page.parent.name in ("results", "docs"))
    pictures = [p for p in (ROOT / "docs" / "results").rglob("*.png")]
    assert [p.name for p in pictures if p.relative_to(ROOT / "docs" / "results").as_posix() not in pages] == []
    board = ROOT / "docs" / "board"  # its plots lie beside its page
    assert [p.name for p in board.glob("*.png") if f"]({p.name})" not in (board / "README.md").read_text()] == []


def test_every_finding_names_where_its_figures_are() -> None:
    findings = re.split(r"\n\n", (ROOT / "docs" / "LOG.md").read_text().partition("\n## ")[2])
    findings = [text for text in findings if text.strip().startswith("**")]
    assert len(findings) > 40
    assert [text[:60] for text in findings if not re.search(r"\]\(\S+\)|(commit|docs at) [0-9a-f]{7}", " ".join(text.split()))] == []
