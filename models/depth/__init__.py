"""Ways through the depth of a model that are not once through each block, one file each: a dataclass Config and a class Way (models/walk.py).

A model's config says which: depth {type: recurrent, loops: 8}; without it every block is visited once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from models.registry import Registry

if TYPE_CHECKING:
    from models.walk import Depth

KINDS = Registry("models.depth", "model.depth", ("Way",))


def build(mapping: dict[str, Any], d_model: int, n_layers: int) -> Depth | None:
    """The Way of a mapping; None for an empty one. Raises UserError."""
    if not mapping:
        return None
    module, config = KINDS.settled(mapping, n_layers)
    way: Depth = module.Way(config, d_model, n_layers)
    return way
