"""muP checked: how activations and their changes follow the width, and where the best learning rate lies at each width; JSON, and a plot beside it.

python -m scripts.studies.mup coordinates --out docs/results/methods/mup_coordinates.json     # widths 128 to 1,024, two minutes on one core
python -m scripts.studies.mup rates --data runs/data/demo --out docs/results/methods/mup_rates.json

coordinates: at each width a model of two blocks takes three steps of AdamW at one rate on a fixed batch. The mean change of what a mixer, an MLP and
the head put out is fitted by a power of the width: near zero is flat. rates: short runs on text at each width and rate, and the rate that ends lowest.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.errors import UserError
from data.files import write_json
from evals.report.figures import pyplot
from models.cells import available
from models.config import ModelConfig
from models.lm import LanguageModel
from scripts.studies.options import refuse
from scripts.studies.text import Text, device_of
from training.optim import build_optimizer
from training.watch.metrics import environment

LAYERS, STEPS, RATE = 2, 3, 3e-3
PARTS = ("mixer", "mlp", "logits")
Rows = list[dict[str, Any]]


def mixer_of(name: str, width: int, base: int) -> dict[str, Any]:
    """Its settings with heads of one size at all widths. Raises UserError for an unknown one."""
    head = min(64, base // 2)
    known: dict[str, dict[str, Any]] = {
        "attention": {"type": "attention", "n_heads": width // head, "head_dim": head},
        "mamba2": {"type": "mamba2", "d_state": 16, "head_dim": head, "chunk": 16},
        "gated_deltanet": {"type": "delta", "n_heads": width // head, "head_dim": head},
    }
    if name in available():
        return {"type": "rnn", "cell": name, "n_heads": 4}
    if name not in known:
        raise UserError(f"there is no mixer {name!r} here; choose from {', '.join([*known, *available()])}.")
    return known[name]


def model_of(mixer: str, param: str, width: int, base: int, vocab_size: int, layers: int = LAYERS) -> LanguageModel:
    mup = {"type": "mup", "base_width": base, "zero_head": param == "mup-zero"}
    kind: dict[str, Any] = mup if param.startswith("mup") else {"type": param}
    return LanguageModel(ModelConfig(vocab_size, width, layers, [mixer], {mixer: mixer_of(mixer, width, base)}, d_ff=2 * width, param=kind))


def _outputs(model: LanguageModel, ids: Tensor) -> dict[str, Tensor]:
    """What the last block's mixer and MLP and the head put out."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: kept.update({name: (output[0] if isinstance(output, tuple) else output).detach().clone()})

    last: Any = model.blocks[-1]
    hooks = [last.mixer.register_forward_hook(keep("mixer")), last.mlp.register_forward_hook(keep("mlp"))]
    with torch.no_grad():
        kept["logits"] = model(ids).logits
    for hook in hooks:
        hook.remove()
    return kept


def coordinates(mixer: str, param: str, widths: list[int], seeds: int, base: int, device: str = "cpu") -> Rows:
    """A row for each width and seed: the mean size of each part at the start, and of its change by the steps."""
    rows: Rows = []
    ids = torch.randint(64, (4, 33), generator=torch.Generator().manual_seed(1)).to(device)
    for width in widths:
        for seed in range(seeds):
            model = model_of(mixer, param, width, base, 64)
            model.init_weights(seed)
            model.to(device)
            optimizer = build_optimizer(model, lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
            before = _outputs(model, ids[:, :-1])
            for _ in range(STEPS):
                optimizer.zero_grad()
                loss = model(ids[:, :-1], labels=ids[:, 1:]).loss_sum
                assert loss is not None
                (loss / ids[:, 1:].numel()).backward()
                optimizer.step()
            after = _outputs(model, ids[:, :-1])
            row: dict[str, Any] = {"mixer": mixer, "param": param, "width": width, "seed": seed}
            row["start"] = {part: float(before[part].abs().mean()) for part in PARTS}
            row["change"] = {part: float((after[part] - before[part]).abs().mean()) for part in PARTS}
            rows.append(row)
    return rows


def slopes(rows: Rows) -> dict[str, float]:
    """The power of the width that each part's change follows, by least squares."""
    made = {}
    for part in PARTS:
        x = torch.tensor([math.log(row["width"]) for row in rows], dtype=torch.float64)
        y = torch.tensor([math.log(max(row["change"][part], 1e-30)) for row in rows], dtype=torch.float64)
        made[part] = round(float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()), 3)
    return made


def check_coordinates(given: argparse.Namespace) -> dict[str, Any]:
    rows: Rows = []
    fits: dict[str, dict[str, dict[str, float]]] = {}
    for mixer in given.mixers.split(","):
        for param in given.params.split(","):
            new = coordinates(mixer, param, given.widths, given.seeds, given.base or given.widths[0], str(device_of(given.device)))
            fits.setdefault(mixer, {})[param] = slopes(new)
            rows += new
            print(f"{mixer:16} {param:9} change by the width to the power of {fits[mixer][param]}", flush=True)
    settings = {"rate": RATE, "steps": STEPS, "layers": LAYERS, "widths": given.widths, "seeds": given.seeds}
    return {**settings, "environment": environment(device_of(given.device)), "slopes": fits, "rows": rows}


def check_rates(given: argparse.Namespace) -> dict[str, Any]:
    """Last losses (mean of a tenth of the run) by parametrisation, width, rate and seed; best: the rate whose mean over seeds is lowest.
    --out is written after every width."""
    device = device_of(given.device)
    text, base = Text(given.data, given.length, device), given.base or given.widths[0]
    keys = ("widths", "powers", "first_seed", "seeds", "steps", "rows", "length", "layers")
    settings = {**{key: getattr(given, key) for key in keys}, "base": base, "device": _name(device), "environment": environment(device)}
    rows, results = list[dict[str, Any]](), dict[str, Any]()
    for mixer in given.mixers.split(","):
        for param in given.params.split(","):
            for width in given.widths:
                for power in given.powers:
                    for seed in range(given.first_seed, given.first_seed + given.seeds):
                        model = model_of(mixer, param, width, base, text.vocab_size, given.layers)
                        model.init_weights(seed)
                        losses = text.train(model, steps=given.steps, rows=given.rows, rate=2.0**power, seed=seed, bf16=True)
                        end = _mean(losses[-max(1, given.steps // 10) :])
                        rows.append({"mixer": mixer, "param": param, "width": width, "power": power, "seed": seed, "loss": round(end, 4)})
                means = by_power(rows, mixer, param, width)
                power = min(means, key=lambda p: means[p])
                print(f"{mixer} {param:9} width {width:4}: best rate 2^{power} ({means[power]:.3f}); {_told(means)}", flush=True)
                results = {**settings, "best": best_rates(rows), "results": rows}
                given.out.parent.mkdir(parents=True, exist_ok=True)
                write_json(given.out, {"what": given.what, **results})
    return results


def by_power(rows: Rows, mixer: str, param: str, width: int, seed: int | None = None) -> dict[int, float]:
    """The mean loss over seeds (or that of one) at each power of two; a run that diverged makes it infinite."""
    losses: dict[int, list[float]] = {}
    for row in rows:
        if (row["mixer"], row["param"], row["width"]) == (mixer, param, width) and seed in (None, row["seed"]):
            losses.setdefault(row["power"], []).append(row["loss"])
    return {power: _mean(ends) if all(map(math.isfinite, ends)) else math.inf for power, ends in losses.items()}


def best_rates(rows: Rows) -> dict[str, dict[str, dict[str, Any]]]:
    """{mixer: {param: {width: {mean: the power whose mean is lowest, seeds: that of each seed}}}}."""
    best: dict[str, dict[str, dict[str, Any]]] = {}
    for mixer, param, width in dict.fromkeys((row["mixer"], row["param"], row["width"]) for row in rows):
        seeds = sorted({row["seed"] for row in rows if (row["mixer"], row["param"], row["width"]) == (mixer, param, width)})
        lowest = [min(means, key=lambda p: means[p]) for means in (by_power(rows, mixer, param, width, seed) for seed in (None, *seeds))]
        best.setdefault(mixer, {}).setdefault(param, {})[str(width)] = {"mean": lowest[0], "seeds": lowest[1:]}
    return best


def _told(means: dict[int, float]) -> str:
    return "  ".join(f"2^{power} {loss:.3f}" for power, loss in means.items())


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def draw(results: dict[str, Any], what: str, path: Path) -> None:
    plt = pyplot()
    if plt is None:
        return
    mixers = list(results["slopes"] if what == "coordinates" else results["best"])
    params = list(results["slopes" if what == "coordinates" else "best"][mixers[0]])
    figure, axes = plt.subplots(
        len(mixers), len(params), figsize=(4 * len(params), 2.6 * len(mixers)), squeeze=False, sharex=True, sharey="row"
    )
    for i, mixer in enumerate(mixers):
        for j, param in enumerate(params):
            axis = axes[i][j]
            if what == "coordinates":
                for part in PARTS:
                    means = [
                        _mean(r["change"][part] for r in results["rows"] if (r["mixer"], r["param"], r["width"]) == (mixer, param, w))
                        for w in results["widths"]
                    ]
                    axis.loglog(results["widths"], means, "o-", label=f"{part} {results['slopes'][mixer][param][part]:+.2f}", base=2)
            else:
                for width in results["widths"]:
                    ends = by_power(results["results"], mixer, param, width)
                    axis.plot(list(ends), list(ends.values()), "o-", label=f"width {width}")
            axis.set_title(f"{mixer}, {'muP' if param == 'mup' else param}", fontsize=9)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7)
    for axis in axes[-1]:
        axis.set_xlabel("width" if what == "coordinates" else "log2 of the learning rate")
    for row in axes:
        row[0].set_ylabel("mean change" if what == "coordinates" else "nats a token")
    figure.savefig(path.with_suffix(".svg"), bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def _mean(values: Any) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["coordinates", "rates"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--mixers", default="attention,paragru,gru,dense_gru,mamba2,gated_deltanet", help="mixers or cells, comma-separated"
    )
    parser.add_argument("--params", default="mup,standard", help="also mup-zero, whose head starts at zero")
    parser.add_argument("--widths", type=_numbers, default=[128, 256, 512, 1024])
    parser.add_argument("--base", type=int, default=0, help="width at which muP is the plain model; 0: the first")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0, help="rates: seeds are counted from here")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--data", type=Path, default=Path("runs/data/demo"), help="rates: folder of shards")
    parser.add_argument("--powers", type=_numbers, default=[-11, -10, -9, -8, -7, -6], help="rates: powers of two to try")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--layers", type=int, default=LAYERS)
    given, began = parser.parse_args(arguments), time.monotonic()
    refuse(parser, given, ["seeds", "steps", "rows", "length", "layers"], {"params": ("mup", "mup-zero", "standard")})
    if given.what == "coordinates" and len(set(given.widths)) < 2:
        parser.error("--widths: a power of the width is fitted to two widths or more.")
    try:
        results = check_coordinates(given) if given.what == "coordinates" else check_rates(given)
    except UserError as error:
        sys.exit(str(error))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(given.out, {"what": given.what, "seconds": round(time.monotonic() - began, 1), **results})
    draw(results, given.what, given.out)


if __name__ == "__main__":
    main()
