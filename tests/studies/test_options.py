"""Studies that argparse reads: what cannot be run is refused in a sentence, and no file is made."""

import importlib
import sys
from pathlib import Path

import pytest

from scripts.studies import dense_init, m2rnn
from tests.conftest import ROOT

COUNTED = [
    file.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    for file in sorted((ROOT / "scripts/studies").rglob("*.py"))
    if "def main" in (text := file.read_text())
    and any(words in text for words in ('add_argument("--seeds", type=int', "arguments(__doc__", "parser_of(__doc__"))
]


@pytest.mark.parametrize(
    "study, words, said",
    [
        (dense_init, ["--steps", "-1"], "--steps must be above zero, not -1"),
        (m2rnn, ["--parts", "trackin"], "did you mean 'tracking'?"),
        (m2rnn, ["--seeds", "0"], "--seeds must be above zero"),
        (m2rnn, ["--parts", "nope"], "there is no 'nope'"),
        (m2rnn, ["--parts", "corrections", "--data", "nowhere"], "holds no token shards"),
    ],
)
def test_what_a_study_cannot_run_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], study: object, words: list[str], said: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["study", "--out", str(tmp_path / "out.json"), *words])
    with pytest.raises(SystemExit) as ended:
        study.main()  # type: ignore[attr-defined]
    assert ended.value.code == 2 and said in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("study", COUNTED)
def test_no_seeds_are_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], study: str) -> None:
    text = (ROOT / study.replace(".", "/")).with_suffix(".py").read_text()
    words = ["rates"] if 'add_argument("what"' in text else []
    words += [word for name in ("data", "teacher") if f'add_argument("--{name}"' in text for word in (f"--{name}", str(tmp_path))]
    monkeypatch.setattr(sys, "argv", ["study", *words, "--out", str(tmp_path / "out.json"), "--seeds", "0"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(study).main()
    assert ended.value.code == 2 and "--seeds must be above zero" in capsys.readouterr().err and not list(tmp_path.iterdir())
