"""Channel mixers, what a block does within each token: one file each, a dataclass Config and a class Channel, which is a SwiGLU in its shape.

A kind takes another map for `gate`, `up` and `down` (models/layers.py, SwiGLU), and so overrides `gate_and_up` and `out`; what else a block, a
training step or an export asks of it stands there with its defaults. The config is model.channel, the group configs/channel.
"""

from __future__ import annotations

from typing import Any

from models.layers import SwiGLU
from models.registry import Registry

PLAIN = "swiglu"
KINDS = Registry("models.channel", "model.channel", ("Channel",))


def build(mapping: dict[str, Any], d_model: int, d_ff: int) -> SwiGLU:
    """The channel mixer of a mapping. Raises UserError."""
    module, config = KINDS.settled(mapping, d_model, d_ff)
    channel = module.Channel(config, d_model, d_ff)
    assert isinstance(channel, SwiGLU), f"the Channel of {module.__name__} is no SwiGLU"
    return channel
