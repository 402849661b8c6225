"""Studies that argparse reads: what cannot be run is refused in a sentence, and no file is made."""

import sys
from pathlib import Path

import pytest

from scripts.studies import dense_init, m2rnn


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
