"""The peak learning rate that goes with a size and a model, from published recipes: what a run takes when optim.lr is not given.

Every configs/size/*.yaml holds `lr`, a rate for each kind of mixer (a cell's name goes before the type of its mixer), and `lr_source`, where they
were published. A model of several kinds takes the lowest of theirs.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

from training.config.schema import Config

SIZES = Path(__file__).resolve().parents[2] / "configs" / "size"
FALLBACK = 1e-3  # for a size that says nothing


@functools.cache
def _published() -> list[dict[str, Any]]:
    from omegaconf import OmegaConf

    sizes: list[Any] = [OmegaConf.to_container(OmegaConf.load(path)) for path in sorted(SIZES.glob("*.yaml"))]
    return [size for size in sizes if size.get("lr") and size["n_layers"] > 1]


def _size(config: Config, model: dict[str, Any]) -> dict[str, Any]:
    """The size whose rates hold: the one chosen, or the one nearest in width to a model that comes from a folder."""
    if not config.model.get("init_from"):
        return config.size
    return min(_published(), key=lambda size: abs(math.log(size["d_model"] / model["d_model"])), default={})


def rate(config: Config) -> tuple[float, str]:
    """(peak learning rate, where it comes from) for the size and the mixers of `config`."""
    model = config.model
    if model.get("init_from"):
        from models.hub.importing import resolved

        model = resolved(model)
    size = _size(config, model)
    rates = size.get("lr") or {}
    if not isinstance(rates, dict) or not rates:
        return FALLBACK, "no size says another"
    mixers = [model["mixers"][name] for name in dict.fromkeys(model["pattern"])]
    names = [next((str(mixer[key]) for key in ("cell", "type") if mixer.get(key) in rates), "") for mixer in mixers]
    lowest = min(float(rates[name]) if name else min(map(float, rates.values())) for name in names)
    return lowest, f"size={size.get('name', '?')}, {size.get('lr_source', 'its own')}"
