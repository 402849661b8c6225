"""Runs side by side: the order of the table, what runs leave behind half-written, and the plot."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from training.compare import find, main, plot, table


def write(folder: Path, losses: list[float], bits: float | None = None, data: str = "d", **more: float) -> Path:
    folder.mkdir(parents=True)
    rows = [
        {"step": i + 1, "loss": x, "tokens": 100 * (i + 1), "tokens_per_second": 50.0, "seconds": 2.0, "data_wait": 0.0}
        for i, x in enumerate(losses)
    ]
    if bits is not None:
        rows.append({"step": len(losses), "bits_per_byte": bits})
    if more:
        rows.append({"step": len(losses), **more})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 99, "lo')
    (folder / "config.yaml").write_text(f"data: {{path: {data}}}\neval: {{tokens: 5}}\n")
    return folder


def test_the_best_comes_first_and_a_torn_line_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a", [3.0, 2.0], bits=1.5)
    write(tmp_path / "b=1", [3.0, math.nan, 1.0], bits=1.6, data="other")
    write(tmp_path / "c", [0.5])
    out = tmp_path / "x" / "plot.png"
    assert main([*(str(tmp_path / name) for name in ("c", "b=1", "a")), f"out={out}"]) == 0
    said = capsys.readouterr().out
    assert [line.split()[1] for line in said.splitlines()[1:4]] == ["a", "b=1", "c"]
    assert "1.5000" in said and "2 different data.path" in said and "different numbers of tokens" in said and "0:00:04" in said
    assert out.read_bytes()[:4] == b"\x89PNG" and [p.name for p in out.parent.iterdir()] == ["plot.png"]


def test_a_folder_of_runs_stands_for_all_of_them_and_tasks_go_by_accuracy(tmp_path: Path) -> None:
    write(tmp_path / "sweep" / "seed=1", [1.0], accuracy=0.5)
    write(tmp_path / "sweep" / "seed=2", [2.0], accuracy=0.75)
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    assert len(find([str(path) for path in (tmp_path / "sweep").iterdir()])) == 2  # SWEEP/* names its files too
    lines = table(find([str(tmp_path / "sweep")]))
    assert lines[1].split()[1:3] == ["seed=2", "-"] and "75.00%" in lines[1] and "seed=1" in lines[2]


def test_without_matplotlib_there_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a", [1.0])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install" in plot(find([str(tmp_path / "a")]), tmp_path / "p.png") and not (tmp_path / "p.png").exists()


@pytest.mark.parametrize(
    "words, part",
    [
        (["nowhere"], "no folder nowhere"),
        (["."], "no metrics.jsonl"),
        ([], "Say which"),
        (["out=x.txt", "."], ".png"),
        (["agianst=steps", "."], "did you mean 'against'"),
    ],
)
def test_mistakes_are_sentences(
    words: list[str], part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2 and part in capsys.readouterr().err
