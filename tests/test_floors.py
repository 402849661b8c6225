"""kernels <- data <- models <- training <- evals <- scripts and train.py: nothing names what lies above it, and no two modules need each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.arrows import Arrow, all_arrows, circles, upward
from tests.conftest import ROOT

# (who, whom): why this arrow may stay
EXCEPTIONS = {
    ("training.guard.agreement", "train"): "lists the files whose hash the ranks compare, and loads none of them",
}


def without(arrows: list[Arrow], *pairs: tuple[str, str]) -> list[Arrow]:
    return [arrow for arrow in arrows if (arrow.source, arrow.target) not in pairs]


@pytest.fixture(scope="module")
def project() -> list[Arrow]:
    return all_arrows(ROOT)


def test_nothing_reads_upwards(project: list[Arrow]) -> None:
    arrows = upward(without(project, *EXCEPTIONS))
    assert not arrows, "these read upwards:\n" + "\n".join(map(str, arrows))


def test_no_circles_between_modules(project: list[Arrow]) -> None:
    rounds = circles(without(project, *EXCEPTIONS))
    assert not rounds, "these lie in circles:\n" + "\n\n".join("\n".join(map(str, arrows)) for arrows in rounds)


def test_every_exception_is_needed(project: list[Arrow]) -> None:
    for pair in EXCEPTIONS:
        left = without(project, *(other for other in EXCEPTIONS if other != pair))
        assert upward(left) or circles(left), f"{pair} breaks no rule any more; take it out of EXCEPTIONS"


KINDS = {
    "import evals.run": "evals.run",
    "from evals import run": "evals.run",
    "from evals.run import main": "evals.run",
    "def f():\n    from evals.run import main": "evals.run",
    "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from evals.run import main": "evals.run",
    "import importlib\nimportlib.import_module('evals.run')": "evals.run",
    "def load(name):\n    return importlib.import_module(f'evals.{name}')": "evals.run",
    "setattr('evals.run.main', 3)": "evals.run",
    "WHERE = 'evals.run:main'": "evals.run",
    "COMMAND = [sys.executable, '-m', 'evals.run']": "evals.run",
    "subprocess.run('python -m evals.run checkpoint=x', shell=True)": "evals.run",
    "subprocess.run(f'python3 -m evals.run checkpoint={x}', shell=True)": "evals.run",
    "FILE = ROOT / 'evals/run.py'": "evals.run",
    "FILE = 'train.py'": "train",
    "from train import main": "train",
    "from ..evals.run import main": "evals.run",
}
NONE = [
    '"""Used by `python -m evals.run`."""',
    "raise ValueError('measure it: python -m evals.run checkpoint=DIR')",
    "KEY = 'evals'",
    "KEY = 'evals.tokens'",
    "moved('evals.run')",
]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("train.py", "evals/__init__.py", "evals/run.py", "models/__init__.py", "models/lm.py", "models/block.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    return tmp_path


@pytest.mark.parametrize("line", KINDS)
def test_each_kind_of_arrow_is_seen(line: str, tree: Path) -> None:
    (tree / "models" / "lm.py").write_text("# first\n" + line)
    arrows = upward(all_arrows(tree))
    assert {arrow.target for arrow in arrows} == {KINDS[line]}
    assert str(arrows[0]).startswith(f"models/lm.py:{2 + line.count(chr(10))}: models.lm -> ") or "TYPE_CHECKING" in line


@pytest.mark.parametrize("line", NONE)
def test_what_people_read_is_no_arrow(line: str, tree: Path) -> None:
    (tree / "models" / "lm.py").write_text(line)
    assert all_arrows(tree) == []


def test_circles_are_found_over_several_modules(tree: Path) -> None:
    (tree / "models" / "lm.py").write_text("from models import block")
    (tree / "models" / "block.py").write_text("def f():\n    from models import rope")
    (tree / "models" / "rope.py").write_text("from models.block import f")
    assert circles(all_arrows(tree)) == [[a for a in all_arrows(tree) if a.source != "models.lm"]]
    (tree / "models" / "rope.py").write_text("")
    assert circles(all_arrows(tree)) == []
