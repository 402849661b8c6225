"""key=value command lines, and files written whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data import prepare
from data.files import write_json
from data.program import Parser
from training.config.arguments import parse_arguments, program
from training.errors import UserError

DEFAULTS: dict[str, Any] = {"path": None, "name": "a", "rows": 3, "seed": 0, "lr": 0.5, "toy": False, "lengths": [], "limit": int}


def test_a_default_says_what_its_key_takes() -> None:
    assert parse_arguments([], DEFAULTS) == {**DEFAULTS, "limit": None}
    words = ["path=x=y", "name=", "rows=7", "--seed", "0", "--lr=2e-3", "toy=True", "lengths=[1, 20]", "limit=5"]
    assert parse_arguments(words, DEFAULTS) == {
        "path": "x=y", "name": "", "rows": 7, "seed": 0, "lr": 2e-3, "toy": True, "lengths": [1, 20], "limit": 5,
    }  # fmt: skip


@pytest.mark.parametrize(
    "word",
    [
        "rows=0",
        "rows=-1",
        "rows=1.5",
        "seed=x",
        "lr=fast",
        "lr=nan",
        "lr=-inf",
        "toy=maybe",
        "lengths=1,,2",
        "lengths=0",
        "limit=0",
        "rwos=1",
        "path",
    ],
)
def test_every_mistake_is_a_sentence_and_all_are_told(word: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_arguments([word, "nothing=1"], DEFAULTS, lambda values: ["And one more."])
    assert len(caught.value.problems) == 3 and word.partition("=")[0] in caught.value.problems[0]


def test_a_key_that_comes_twice_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_arguments(["path=a", "rows=2", "--path", "b"], DEFAULTS)["path"] == "b"
    assert capsys.readouterr().err == "note: path=a does not hold, as path=b comes behind it.\n"
    with pytest.raises(UserError, match="^input is given twice; the first would be lost"):  # no text is to be left out by a note alone
        prepare.parse(["input=a.txt", "input=b.txt", "out=x", "tokenizer=bytes"])


def test_a_leading_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """zsh and dash leave it alone inside a word, bash behind a comma: a folder of that name would be made."""
    monkeypatch.setenv("HOME", "/home/me")
    defaults = {"out": None, "checkpoint": None, "prompt": None, "name": "a"}
    words = ["out=~/x", "checkpoint=~/a,b/~/c,~/d", "prompt=~/.profile is", "name=~x"]
    assert parse_arguments(words, defaults) == {
        "out": "/home/me/x", "checkpoint": "/home/me/a,b/~/c,/home/me/d", "prompt": "~/.profile is", "name": "~x",
    }  # fmt: skip


def test_a_program_ends_in_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    def run(words: list[str]) -> None:
        raise UserError(["One.", "Two."])

    assert program("How to.", run, ["--help"]) == 0 and capsys.readouterr().out == "How to.\n"
    assert program("How to.", run, []) == 2 and capsys.readouterr().err == "error: One.\nerror: Two.\n"
    assert program("", lambda words: 3, []) == 3


def test_json_is_whole_and_is_json(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.json"
    write_json(path, {"a": [float("nan"), 1.5, float("inf")], 2: (path,)})
    assert json.loads(path.read_text()) == {"a": [None, 1.5, None], "2": [str(path)]}
    with pytest.raises(RecursionError):
        circle: list[object] = []
        circle.append(circle)
        write_json(path, circle)
    assert json.loads(path.read_text())["2"] and [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_a_parser_of_flags_complains_in_a_sentence() -> None:
    parser = Parser("x")
    parser.add_argument("out")
    parser.add_argument("--shard-size")
    for words, said in (
        (["a", "shard_size=1GB"], "^Unknown argument 'shard_size=1GB'; write --shard-size=1GB; --help"),
        (["a", "--nosuch"], "^Unknown argument '--nosuch'; known are "),
        ([], "^The following arguments are required: out; --help"),
    ):
        with pytest.raises(UserError, match=said):
            parser.parse_args(words)
