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
from tests.conftest import ROOT, SMALL, environment, run_program
from training.config.arguments import parse_arguments
from training.config.cli import checked, compose_config
from training.sweep import Sweep

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
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


def commands() -> list[tuple[str, str]]:
    """(page, command) of every line of a bash block, of every `python ...` in the README's sentences, and of train.py's docstring."""
    usage = ast.get_docstring(ast.parse((ROOT / "train.py").read_text())) or ""
    found = [("train.py", line.strip()) for line in usage.splitlines() if line.startswith("    ")]
    for page in PAGES:
        text = page.read_text()
        lines = [line for block in re.findall(r"^```bash\n(.*?)^```", text, re.S | re.M) for line in block.splitlines()]
        inline = re.findall(r"`((?:python|scripts/)[^`\n]*[ =][^`\n]*)`", text) if page.name == "README.md" else []
        found += [(page.name, line) for line in [*lines, *inline] if shlex.split(line, comments=True)]
    return found


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
    assert len(commands()) > 40 and {page for page, _ in commands()} >= {"README.md", "data.md", "hub.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = [t for t in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()) if "://" not in t]
    assert not [t for t in targets if not (page.parent / t).exists()]


def test_paths_in_the_readme_exist() -> None:
    """Those in `code` that begin with a folder of the project."""
    new = re.findall(r"`((?:models|configs)/[a-z_/]+\.(?:py|yaml))`[^`]*?\n```", PAGES[0].read_text())  # to be written by the reader
    folders = {p.name for p in ROOT.iterdir() if p.is_dir()}
    paths = [w for code in re.findall(r"`([^`\n]+)`", PAGES[0].read_text()) for w in code.split() if "/" in w and "NAME" not in w]
    paths = [w for w in paths if w.split("/")[0] in folders - {"runs", "out"}]
    assert len(paths) > 10 and not [w for w in paths if not (ROOT / w).exists() and w not in new]


def blocks(page: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", page, re.S | re.M)


@pytest.mark.slow
def test_extending_works_as_pasted(tmp_path: Path, demo_shards: Path) -> None:
    """The files of the README's section, in a copy of the project: the contract tests find them and a model of them trains."""
    section = PAGES[0].read_text().partition("## Extending")[2].partition("\n## ")[0]
    files = dict(re.findall(r"`((?:models|configs)/[a-z_/]+\.(?:py|yaml))`.*?\n```(?:python|yaml)\n(.*?)```", section, re.S))
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


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    assert [p.name for p in (ROOT / "docs").glob("*.md") if p.name != "README.md" and f"]({p.name})" not in index] == []
