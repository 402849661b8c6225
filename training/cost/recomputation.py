"""train.activation_checkpointing=auto: the least recomputation with which a run fits its device, by the estimate of training/cost/memory.py.

Of every kind of layer each part is measured once: the bytes that it frees, and what it costs to make them again, in FLOPs, a byte that is written
and read once more counting as the FLOPs of the time it takes. From keeping everything on, the parts that cost least for a byte come first, and of
layers of one kind the first ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from models.config import ModelConfig
from models.lm import LanguageModel
from models.remade import NONE, Parts, keeps_states, setting
from training.config.schema import Config
from training.cost.device import device_memory
from training.cost.memory import GIB, Estimate, Measured, estimate

ROOM = 0.9  # share of a device that auto fills: the rest is for the estimate's error, fragmentation and evaluation
FLOPS_A_BYTE = 300.0  # FLOPs in the time in which a byte is moved (H100: 989e12 / 3.35e12)
UNKNOWN = 79.0 * GIB  # a device of 80 GB, where dry_run=true is asked on a machine without one


@dataclass
class Chosen:
    """parts: what each layer computes again; fits: whether the estimate lies within what was given."""

    parts: list[Parts]
    estimate: Estimate
    fits: bool


@dataclass
class Rung:
    """One more thing that layers of a kind compute again. price: FLOPs for each byte that it frees."""

    price: float
    kind: str
    parts: Parts


def budget(config: Config, device: torch.device) -> float:
    """Bytes that auto may fill on this device: train.memory_budget, or most of what the device has."""
    return config.train.memory_budget * GIB if config.train.memory_budget else ROOM * device_memory(device)


def dry_budget(config: Config) -> tuple[float, str]:
    """(bytes, of what) for dry_run=true, which may be asked on a machine without the device."""
    if config.train.memory_budget:
        return config.train.memory_budget * GIB, "train.memory_budget"
    if torch.cuda.is_available() and config.train.device != "cpu":
        return budget(config, torch.device("cuda")), "this machine's GPU"
    return ROOM * UNKNOWN, "a device of 80 GB; train.memory_budget says another"


def choose(config: Config, settings: ModelConfig, model: LanguageModel, world: int, room: float) -> Chosen:
    """The first rung of the ladder at which a rank among `world` needs at most `room` bytes; where none does, that which needs least."""
    measured = Measured(config, settings)
    kinds = [settings.mixer_name(layer) for layer in range(settings.n_layers)]
    parts = [NONE] * len(kinds)
    best = Chosen(list(parts), estimate(config, model, measured.of(parts), world), False)
    best.fits = best.estimate.peak <= room
    if best.fits:
        return best
    for rung in _ladder(measured, model, settings):
        for layer in (i for i, kind in enumerate(kinds) if kind == rung.kind):
            parts[layer] = rung.parts
            need = estimate(config, model, measured.of(parts), world)
            if need.peak < best.estimate.peak:
                best = Chosen(list(parts), need, need.peak <= room)
            if best.fits:
                return best
    return best


def _ladder(measured: Measured, model: LanguageModel, settings: ModelConfig) -> list[Rung]:
    """The rungs of all kinds of layers, the cheapest for a byte first."""
    rungs: list[Rung] = []
    alone = measured.config.parallel.sequence == 1  # ranks that share a sequence keep all states
    for name in dict.fromkeys(settings.pattern[: settings.n_layers]):
        layer = next(i for i in range(settings.n_layers) if settings.mixer_name(i) == name)
        choices = _choices(bool(settings.mlp_width), alone and keeps_states(settings, name))
        points = {parts: _freed_and_price(measured, model, layer, parts) for parts in choices}
        at, last = (0.0, 0.0), 0.0
        while True:  # along the lower edge of all points
            steps = {parts: (p[1] - at[1]) / (p[0] - at[0]) for parts, p in points.items() if p[0] > at[0]}
            if not steps:
                break
            parts = min(steps, key=lambda choice: (steps[choice], -points[choice][0]))
            last = max(last, steps[parts])
            rungs.append(Rung(last, name, parts))
            at = points[parts]
    return sorted(rungs, key=lambda rung: rung.price)


def _choices(has_mlp: bool, has_states: bool) -> list[Parts]:
    words = ("swiglu", "mlp", "mixer", "swiglu mixer", "mlp mixer", "layer") if has_mlp else ("mixer", "layer")
    with_states = (("states", "swiglu states", "mlp states") if has_mlp else ("states",)) if has_states else ()
    return [frozenset(text.split()) for text in (*words, *with_states)]


def _freed_and_price(measured: Measured, model: LanguageModel, layer: int, parts: Parts) -> tuple[float, float]:
    """(bytes that a layer frees by computing these parts again, what this costs in FLOPs)."""
    B, T, _ = measured.shape
    freed = float(measured.layer(layer, NONE, True).saved - measured.layer(layer, parts, True).saved)
    flops = model.blocks[layer].recomputed_flops_per_token(T, parts)
    return freed, B * T * flops + 2 * FLOPS_A_BYTE * freed


def told(chosen: Chosen, room: float) -> str:
    """What auto has settled, as a sentence."""
    need, words = f"{chosen.estimate.peak / GIB:.1f} GiB of {room / GIB:.1f}", setting(chosen.parts)
    if words == "none":
        return f"activation checkpointing: auto keeps all activations, {need}"
    least = "" if chosen.fits else " too few, but nothing needs less;"
    return f"activation checkpointing: auto settles on {need};{least} 'train.activation_checkpointing={words}' asks for the same"
