"""Structured channel mixers against dense ones, with and without the dense helper: held-out loss of short runs on text; JSON to --out.

python -m scripts.studies.structured --data runs/data/demo --out docs/results/methods/structured.json

Arms: dense, and for each structure alone and guided over half of the run. All arms of a seed read the same windows in the same order. Also measured:
parameters and forward FLOPs of the channel mixers, and the time of a training step beside that of the dense model.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from data.errors import UserError
from data.files import write_json
from models.channel.structured import STRUCTURES
from models.config import ModelConfig
from models.lm import LanguageModel
from scripts.studies.options import refuse
from scripts.studies.text import Text, device_of
from training.watch.metrics import environment


def arms(structures: list[str], rank: float, blocks: int, guide: float = 0.5, rate_power: float = 0.0) -> dict[str, dict[str, Any]]:
    made: dict[str, dict[str, Any]] = {"dense": {"type": "swiglu"}}
    for structure in structures:
        shared = {"type": "structured", "structure": structure, "rank": rank, "blocks": blocks, "rate_power": rate_power}
        made |= {structure: {**shared, "guide": 0.0}, f"{structure} guided": {**shared, "guide": guide}}
    return made


def model_of(channel: dict[str, Any], given: argparse.Namespace, vocab_size: int) -> LanguageModel:
    mixers = {"attention": {"type": "attention", "n_heads": given.width // 32}}
    return LanguageModel(ModelConfig(vocab_size, given.width, given.layers, mixers=mixers, d_ff=4 * given.width, channel=channel))


def run(channel: dict[str, Any], given: argparse.Namespace, text: Text, seed: int) -> dict[str, Any]:
    """One arm and seed: loss by step, held-out loss, cost."""
    model = model_of(channel, given, text.vocab_size)
    model.init_weights(seed)
    mlps: list[Any] = [block.mlp for block in model.blocks]
    parameters = sum(p.numel() for mlp in mlps for n, p in mlp.named_parameters() if "dense" not in n)
    guided = sum(mlp.flops_per_token() for mlp in mlps)
    began, times = time.monotonic(), list[float]()

    def each(step: int, loss: float) -> bool:
        times.append(time.monotonic() - began)
        return False

    losses = text.train(model, steps=given.steps, rows=given.rows, rate=given.rate, seed=seed, bf16=True, each=each)
    model.eval()
    apart = [b - a for a, b in zip(times, times[1:])]
    half = len(apart) // 2
    return {
        "seed": seed,
        "held_out": round(text.held_out(model, 128), 4),
        "parameters": parameters,
        "flops": sum(mlp.flops_per_token() for mlp in mlps),
        "flops_guided": guided,
        "seconds_a_step": [round(statistics.median(part), 5) for part in (apart[:half], apart[half:])],  # first half (guided), second half
        "worst_rise": round(max(b - min(losses[: i + 1]) for i, b in enumerate(losses[1:])), 3),  # above the lowest so far
        "losses": [round(sum(losses[i : i + 20]) / len(losses[i : i + 20]), 4) for i in range(0, len(losses), 20)],
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("runs/data/demo"))
    parser.add_argument("--structures", default="lowrank,blockdense,blockshuffle")
    parser.add_argument("--rank", type=float, default=0.25, help="r / width")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--guide", type=float, default=0.5, help="share of the run that is guided")
    parser.add_argument("--rate-power", type=float, default=0.0, help="of the rates of factors, see models/channel/structured.py")
    parser.add_argument("--only-guided", action="store_true", help="leaves out the structures alone")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0, help="seeds are counted from here")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    given = parser.parse_args(arguments)
    refuse(parser, given, ["rank", "blocks", "width", "layers", "steps", "rows", "length", "rate", "seeds"], {"structures": STRUCTURES})
    if given.steps < 3:
        parser.error(f"--steps must be three or more, as times are those between steps; not {given.steps}.")
    try:
        device = device_of(given.device)
        text = Text(given.data, given.length, device)
    except UserError as error:
        sys.exit(str(error))
    settings = {key: value for key, value in vars(given).items() if key not in ("out", "data", "device")}
    results: dict[str, Any] = {"settings": settings, "environment": environment(device), "arms": {}}
    results["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    given.out.parent.mkdir(parents=True, exist_ok=True)
    for seed in range(given.first_seed, given.first_seed + given.seeds):
        for name, channel in arms(given.structures.split(","), given.rank, given.blocks, given.guide, given.rate_power).items():
            if given.only_guided and channel.get("guide") == 0:
                continue
            row = run(channel, given, text, seed)
            results["arms"].setdefault(name, []).append(row)
            print(
                f"seed {seed} {name:22} held out {row['held_out']:.4f}  worst rise {row['worst_rise']:.2f}  {row['seconds_a_step']} s",
                flush=True,
            )
            write_json(given.out, results)
    for name, rows in results["arms"].items():
        mean = statistics.mean(row["held_out"] for row in rows)
        print(f"{name:22} {mean:.4f} ({mean - statistics.mean(r['held_out'] for r in results['arms']['dense']):+.4f} against dense)")


if __name__ == "__main__":
    main()
