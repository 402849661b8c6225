"""Several runs side by side: loss, held-out bits per byte and speed in one table and one plot.

    python -m training.compare RUN RUN ... [out=runs/compare.png] [against=tokens]

RUN: a run folder, or the folder of a sweep for all of its runs. against: what the plot's curves run over: tokens | steps | hours.
The best run comes first: by held-out bits per byte, for generated tasks by accuracy, where a run has neither by loss (a mean of its last twentieth).
Runs that still train are shown as far as they are. Without matplotlib there is the table alone.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from training.config.arguments import parse_arguments, program
from training.errors import UserError

DEFAULTS: dict[str, Any] = {"out": "runs/compare.png", "against": "tokens"}
AGAINST = {"tokens": "tokens", "steps": "optimizer steps", "hours": "hours"}
LATE = 20  # the loss of a run is the mean over the last step in so many, at least one
SMOOTH = 50  # points a loss curve is averaged down to


@dataclass
class Run:
    """What a run folder says. steps and evaluations: rows of metrics.jsonl in order; hours: seconds of its steps, summed."""

    folder: Path
    label: str
    settings: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    status: str = ""
    said: str = ""

    @property
    def loss(self) -> float | None:
        late = [row["loss"] for row in self.steps[-max(1, len(self.steps) // LATE) :]]
        return sum(late) / len(late) if late else None

    @property
    def held_out(self) -> float | None:
        """Bits per byte of the last evaluation."""
        return next((row["bits_per_byte"] for row in reversed(self.evaluations) if "bits_per_byte" in row), None)

    @property
    def accuracy(self) -> float | None:
        return next((row["accuracy"] for row in reversed(self.evaluations) if "accuracy" in row), None)

    @property
    def speed(self) -> float | None:
        """Tokens per second, the median over the run's steps."""
        rates = [row["tokens_per_second"] for row in self.steps if row.get("tokens_per_second")]
        return median(rates) if rates else None

    @property
    def hours(self) -> float:
        return sum((row.get("seconds") or 0.0) + (row.get("data_wait") or 0.0) for row in self.steps) / 3600

    def rank(self) -> tuple[int, float]:
        """Sorts the best first."""
        keys = (self.held_out, None if self.accuracy is None else -self.accuracy, self.loss)
        return next(((i, value) for i, value in enumerate(keys) if value is not None and math.isfinite(value)), (len(keys), 0.0))


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a torn line, as of a run that writes right now, is passed over."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def read_run(folder: Path, label: str | None = None) -> Run:
    """Reads a run folder; files that are missing or torn leave their part of the Run empty."""
    run, taken = Run(folder, label or folder.name), 0.0
    if (folder / "config.yaml").is_file():
        try:
            settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
            run.settings = settings if isinstance(settings, dict) else {}
        except (yaml.YAMLError, UnicodeDecodeError):
            pass
    for row in rows_of(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else ():
        if _number(row.get("loss")) is not None:
            taken += (_number(row.get("seconds")) or 0.0) + (_number(row.get("data_wait")) or 0.0)
            run.steps.append({**row, "hours": taken / 3600, "steps": row["step"]})
        elif "bits_per_byte" in row or "accuracy" in row:
            run.evaluations.append({**row, "steps": row["step"]})
    places = {row["step"]: row for row in run.steps}
    for row in run.evaluations:
        at = places.get(row["step"]) or (run.steps[-1] if run.steps else {})
        row |= {key: at[key] for key in ("tokens", "hours") if key in at}
    return run


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def find(paths: list[str]) -> list[Run]:
    """The runs that `paths` name; labels are the shortest ends of their paths that tell them apart. Raises UserError with all problems."""
    folders: list[Path] = []
    problems = []
    beside = any(Path(text).is_dir() for text in paths)
    for text in paths:
        path = Path(text)
        if beside and path.is_file():  # what the shell's SWEEP/* names beside the runs
            continue
        inside = sorted(p.parent for p in path.glob("*/metrics.jsonl")) if path.is_dir() else []
        if (path / "metrics.jsonl").is_file():
            folders.append(path)
        elif inside:
            folders += inside
        elif path.is_dir():
            problems.append(
                f"{text} holds no metrics.jsonl, so that it is no run folder, and no run folders; give those that train.py wrote."
            )
        else:
            problems.append(f"There is no folder {text}; give the folders of runs, such as runs/dev.")
    if problems:
        raise UserError(problems)
    folders = list(dict.fromkeys(f.resolve() for f in folders))
    depth = 1
    while depth < 5 and len({f.parts[-depth:] for f in folders}) < len(folders):
        depth += 1
    return [read_run(f, "/".join(f.parts[-depth:])) for f in folders]


def table(runs: list[Run]) -> list[str]:
    """Lines of a table, the best run first."""
    runs = sorted(runs, key=Run.rank)
    tasks = any(run.accuracy is not None for run in runs)
    heads = ["", "run", "bits per byte", *(["accuracy"] if tasks else []), "loss", "step", "tokens", "tokens/s", "time"]
    rows = [heads]
    for place, run in enumerate(runs, start=1):
        last = run.steps[-1] if run.steps else {}
        rows.append(
            [
                str(place), run.label, _shown(run.held_out, ".4f"), *([_shown(run.accuracy, ".2%")] if tasks else []), _shown(run.loss, ".4f"),
                _shown(last.get("step"), ","), _shown(last.get("tokens"), ","), _shown(run.speed, ",.0f"), _time(run.hours),
            ]
        )  # fmt: skip
    if any(run.status for run in runs):
        for row, word in zip(rows, ["", *(run.status for run in runs)]):
            row.append(word)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    left = {1, len(heads)}
    lines = [
        "  ".join(f"{cell:<{w}}" if i in left else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths))).rstrip() for row in rows
    ]
    reasons = dict.fromkeys(run.said for run in runs if run.said)
    return lines + [f"{', '.join(run.label for run in runs if run.said == said)}: {said}" for said in reasons]


def _shown(value: Any, how: str) -> str:
    return "-" if value is None else format(value, how)


def _time(hours: float) -> str:
    seconds = round(hours * 3600)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def remarks(runs: list[Run]) -> list[str]:
    """Sentences that warn where the numbers of the runs cannot be compared as they are."""
    sentences = []
    measured = [run for run in runs if run.held_out is not None]
    sources = {json.dumps((run.settings.get("data") or {}).get("path"), sort_keys=True) for run in measured}
    if len(sources) > 1:
        sentences.append(
            f"The runs' held-out texts come from {len(sources)} different data.path, so that their bits per byte are of different texts."
        )
    sizes = {(run.settings.get("eval") or {}).get("tokens") for run in measured}
    if len(sizes) > 1:
        sentences.append(
            f"eval.tokens differs ({', '.join(map(str, sorted(sizes, key=str)))}): the runs scored more or less of their held-out text."
        )
    token_counts = {run.steps[-1]["tokens"] for run in runs if run.steps and "tokens" in run.steps[-1]}
    if len(token_counts) > 1:
        sentences.append("The runs have seen different numbers of tokens; the plot shows them at equal ones.")
    return sentences


def plot(runs: list[Run], out: Path, against: str = "tokens") -> str:
    """Draws loss, held-out bits per byte (or accuracy) and speed into the picture `out`; '' or the sentence why there is none."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return "matplotlib is not installed, so that there is no plot; pip install 'everywhen[eval]' brings it."
    runs = sorted((run for run in runs if run.steps), key=Run.rank)
    if not runs:
        return "No run has taken a step, so that there is no plot."
    measure = "bits_per_byte" if any(run.held_out is not None for run in runs) else "accuracy"
    figure, axes = plt.subplots(1, 3, figsize=(16, 5))
    for i, run in enumerate(runs):
        style: dict[str, Any] = {"color": f"C{i % 10}", "linestyle": ("-", "--", ":")[i // 10 % 3]}
        axes[0].plot(*_averaged(run.steps, against, "loss"), label=run.label, **style)
        points = [(row[against], row[measure]) for row in run.evaluations if against in row and _number(row.get(measure)) is not None]
        axes[1].plot([x for x, _ in points], [y for _, y in points], marker=".", **style)
        axes[2].plot(*_averaged(run.steps, against, "tokens_per_second"), **style)
    titles = ("training loss, nats a token", {"bits_per_byte": "held-out bits per byte"}.get(measure, measure), "tokens per second")
    for axis, title in zip(axes, titles):
        axis.set(title=title, xlabel=AGAINST[against])
        axis.grid(alpha=0.3)
    axes[2].set_ylim(bottom=0)
    figure.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), fontsize=8, ncols=max(1, min(3, len(runs))))
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.tmp")
    figure.savefig(temporary, format=out.suffix.removeprefix(".") or "png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    temporary.replace(out)
    return ""


def _averaged(rows: list[dict[str, Any]], against: str, key: str) -> tuple[list[float], list[float]]:
    """Means over SMOOTH stretches of the run, at the end of each."""
    rows = [row for row in rows if against in row and _number(row.get(key)) is not None]
    size = max(1, len(rows) // SMOOTH)
    groups = [rows[i : i + size] for i in range(0, len(rows), size)]
    return [g[-1][against] for g in groups], [sum(row[key] for row in g) / len(g) for g in groups]


def _problems(values: dict[str, Any]) -> list[str]:
    problems = []
    if values["against"] not in AGAINST:
        problems.append(f"against is {values['against']!r}; choose one of {', '.join(AGAINST)}.")
    if Path(values["out"]).suffix not in (".png", ".pdf", ".svg"):
        problems.append(f"out={values['out']} must be a picture: a name that ends in .png, .pdf or .svg.")
    return problems


def _main(words: list[str]) -> None:
    # the runs of a sweep have '=' in their names
    paths = [w for w in words if Path(w).exists() or "=" not in w or "/" in w.partition("=")[0]]
    keys = [w for w in words if w not in paths]
    values = parse_arguments(keys, DEFAULTS, _problems)
    if not paths:
        raise UserError("Say which runs to compare: python -m training.compare runs/a runs/b")
    runs = find(paths)
    print("\n".join([*table(runs), *remarks(runs)]))
    print(plot(runs, Path(values["out"]), values["against"]) or f"written: {values['out']}")


def main(arguments: list[str] | None = None) -> int:
    """The command line of this module; returns the exit status."""
    return program(__doc__, _main, arguments)


if __name__ == "__main__":
    sys.exit(main())
