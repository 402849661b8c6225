"""How a model uses its depth: what the loss is when a layer is left out, run twice, or run after the next one.

    python -m evals.layer_paths checkpoint=runs/quickstart [length=256] [rows=16] [budget=0.1] [text=FILE] [data=DIR] [seed=0] [device=auto] [out=FILE.json]

The weights stay as they are; each row of the report is the model along another path through its layers. `budget`: nats per token that the last
part of the report may lose, where layers are left out one after the other, each time the one that costs least. Writes JSON, and beside it a
page (.md). docs/methods/layer_paths.md says how to read it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.errors import UserError
from evals.adapters.base import Adapter, ItemError
from evals.adapters.own import OwnAdapter
from evals.progress import Progress
from evals.suites.prose import problems_of_text, report_on_prose
from models.lm import LanguageModel
from training.config.arguments import parse_arguments, program

DEFAULTS: dict[str, Any] = {
    "checkpoint": None,
    "length": 256,
    "rows": 16,
    "budget": 0.1,
    "text": None,
    "data": None,
    "seed": 0,
    "device": "auto",
    "out": None,
}


@contextmanager
def along(model: LanguageModel, path: Sequence[int]) -> Iterator[None]:
    """Inside, `model` runs its layers in the order of `path`, which may leave some out and name others several times; every place of the path has a
    state of its own, so that decoding and streaming work as before. Raises ValueError for a layer that there is not, UserError for a looped model."""
    layers = model.blocks
    if model.depth is not None:
        raise UserError(
            f"model.depth={model.config.depth['type']} says itself how often layers are visited; paths are of models without it."
        )
    if wrong := [i for i in path if not 0 <= i < len(layers)]:
        raise ValueError(f"The path names layer {wrong[0]}, but the layers are 0 to {len(layers) - 1}.")
    model.blocks = nn.ModuleList(layers[i] for i in path)
    try:
        yield
    finally:
        model.blocks = layers


def single_edits(n: int) -> dict[tuple[str, int], list[int]]:
    """{(edit, layer): path} of every path that leaves one layer out, runs one twice, or swaps one with the next."""
    whole = list(range(n))
    edits: dict[tuple[str, int], list[int]] = {}
    for i in whole:
        edits["skip", i] = whole[:i] + whole[i + 1 :]
        edits["repeat", i] = [*whole[: i + 1], i, *whole[i + 1 :]]
        if i + 1 < n:
            edits["swap", i] = [*whole[:i], i + 1, i, *whole[i + 2 :]]
    return edits


def losses_along(adapter: OwnAdapter, ids_RT: Tensor, path: Sequence[int]) -> np.ndarray:
    """(R,) nats per token of each row (R, T + 1) along a path."""
    rows: list[Tensor] = []
    model: Any = adapter.model
    with along(model, path):
        for row in ids_RT.split(8):
            adapter.stream(row, ids_RT.shape[1], lambda first, nll, state: rows.append(nll.double().mean(1).cpu()))
    return torch.cat(rows).numpy()


def layer_paths(
    adapter: Adapter, ids_RT: Tensor, budget: float = 0.1, on_progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """{'nats_per_token', 'layers': [{layer, mixer, skip, repeat, swap}], 'shortened': [{left_out, path, nats_per_token}]} on ids (R, T + 1).

    Each edit is [nats per token more than the whole model, half of a 95 % interval over the rows]. Raises ItemError for a model of others.
    """
    if not isinstance(adapter, OwnAdapter):
        raise ItemError(
            f"Layer paths are walked in models of this program, and {adapter.folder} is {adapter.kind}; import it first (docs/hub.md)."
        )
    config: Any = adapter.model.config
    n, edits = config.n_layers, single_edits(config.n_layers)
    whole = losses_along(adapter, ids_RT, range(n))
    rows: list[dict[str, Any]] = [{"layer": i, "mixer": config.mixer_name(i)} for i in range(n)]
    for done, ((edit, layer), path) in enumerate(edits.items(), 1):
        more = losses_along(adapter, ids_RT, path) - whole
        half = 1.96 * float(more.std(ddof=1)) / len(more) ** 0.5 if len(more) > 1 else float("nan")
        rows[layer][edit] = [float(more.mean()), half]
        if on_progress:
            on_progress(done, len(edits))
    base = float(whole.mean())
    return {"nats_per_token": base, "layers": rows, "shortened": shortened(adapter, ids_RT, base, budget)}


def shortened(adapter: OwnAdapter, ids_RT: Tensor, base: float, budget: float) -> list[dict[str, Any]]:
    """The model without one layer more each time, that which costs least, as long as it loses at most `budget` nats per token."""
    config: Any = adapter.model.config
    path, steps = list(range(config.n_layers)), []
    while len(path) > 1:
        nats = {i: float(losses_along(adapter, ids_RT, [j for j in path if j != i]).mean()) for i in path}
        least = min(nats, key=lambda i: nats[i])
        if nats[least] - base > budget:
            break
        path = [j for j in path if j != least]
        steps.append({"left_out": least, "path": path, "nats_per_token": nats[least]})
    return steps


def page(report: dict[str, Any]) -> str:
    """The report as one page of Markdown."""
    base, most = report["nats_per_token"], max(row["skip"][0] for row in report["layers"])
    lines = [
        f"# How {report['model']['name']} uses its depth",
        "",
        f"{base:.4f} nats per token with all layers, over {report['rows']} row{'s' * (report['rows'] != 1)} of {report['length']} tokens of {report['text']}. The columns say "
        "what is lost (+) or gained (-) when one layer is left out, run twice, or run after the one behind it, with 95 % intervals over the rows.",
        "",
        "| layer | mixer | left out | run twice | swapped with the next | what leaving it out costs |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["layers"]:
        shown = ["" if edit not in row else f"{row[edit][0]:+.4f} ± {row[edit][1]:.4f}" for edit in ("skip", "repeat", "swap")]
        bar = "█" * max(0, round(20 * row["skip"][0] / max(most, 1e-9)))
        lines.append(f"| {row['layer']} | {row['mixer']} | {' | '.join(shown)} | {bar} |")
    steps = report["shortened"]
    lines += [
        "",
        f"Left out one after the other, each time the one that costs least, for at most {report['arguments']['budget']} nats:",
        "",
    ]
    lines += [
        f"- without {', '.join(str(s['left_out']) for s in steps[: i + 1])}: {step['nats_per_token'] - base:+.4f}"
        for i, step in enumerate(steps)
    ]
    lines += [] if steps else ["- none: every layer costs more"]
    return "\n".join(lines) + "\n"


def problems_of(values: dict[str, Any]) -> list[str]:
    """What cannot be run, a sentence each."""
    return problems_of_text(values) + ([] if values["length"] >= 2 else ["length must be 2 tokens or more."])


def run(values: dict[str, Any]) -> dict[str, Any]:
    """Walks the paths of one model, writes the JSON and the page, prints the page and returns the report. Raises UserError."""

    def measure(adapter: Adapter, ids: Tensor) -> dict[str, Any]:
        with Progress("layer paths", "paths") as progress:
            return layer_paths(adapter, ids, values["budget"], progress)

    return report_on_prose("layer_paths", values, measure, page, labels=1)


def main(arguments: list[str] | None = None) -> int:
    """The command line of this module; returns the exit status."""
    return program(__doc__, lambda words: run(parse_arguments(words, DEFAULTS, problems_of)) and None, arguments)


if __name__ == "__main__":
    sys.exit(main())
