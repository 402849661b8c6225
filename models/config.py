"""What a model is made of: one JSON-serialisable tree, the content of a checkpoint's config.json."""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass, field
from typing import Any

from data.errors import UserError
from data.fields import read
from models import channel, depth, mixers, param

RANGES = {  # (lowest, highest) value of every number; a lowest of 0 is itself excluded unless the key is in ZERO_IS_OFF
    "vocab_size": (1, 2**31 - 1),
    "d_model": (1, 2**20),
    "n_layers": (1, 10**4),
    "d_ff": (-1, 2**24),
    "norm_eps": (0, 1),
    "z_loss": (0, 1),
    "init_std": (0, 1000),
    "head_chunk": (1, 2**31 - 1),
}
ZERO_IS_OFF = ("z_loss",)


@dataclass
class ModelConfig:
    """`pattern` names the mixer of each layer and repeats over the depth; `mixers` holds the config of each name."""

    vocab_size: int
    d_model: int = 256
    n_layers: int = 4
    pattern: list[str] = field(default_factory=lambda: ["attention"])
    mixers: dict[str, dict[str, Any]] = field(default_factory=lambda: {"attention": {"type": "attention"}})
    d_ff: int = -1  # width of the channel mixer; -1: 8/3 d_model rounded up to a multiple of 256 (64 below d_model 512); 0: no MLP
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    learnable_residual: bool = False  # a learned scale on the residual input of each sublayer
    centred_norms: bool = False  # norms of the residual stream hold what their gains are above 1
    norm_after: list[str] = field(default_factory=list)  # mixers whose blocks normalise what a sublayer gives, not what it takes
    z_loss: float = 0.0  # weight of the squared log-partition
    init_std: float = 0.02
    residual_init: str = "depth"  # depth: what writes into the residual stream starts 1/sqrt(2 n_layers) smaller | none
    head_chunk: int = 2048  # rows of logits alive at once in the loss
    recompute_head: bool = True  # no more than head_chunk rows of logits are alive, in the backward pass too; false: all are kept
    channel: dict[str, Any] = field(default_factory=lambda: {"type": channel.PLAIN})  # what mixes within a token, d_ff wide
    param: dict[str, Any] = field(default_factory=lambda: {"type": param.PLAIN})  # how starting values and rates follow the width
    depth: dict[str, Any] = field(default_factory=dict)  # a way of models/depth through the layers; empty: once through each

    @property
    def mlp_width(self) -> int:
        if self.d_ff >= 0:
            return self.d_ff
        multiple = 256 if self.d_model >= 512 else 64
        return -(-8 * self.d_model // (3 * multiple)) * multiple

    def mixer_name(self, layer: int) -> str:
        return self.pattern[layer % len(self.pattern)]

    def learnt_visits(self) -> list[int]:
        """The layers that the tokens of a training step go through with a gradient, in order."""
        way = depth.KINDS.parse(self.depth, self.n_layers)[0] if self.depth else None
        return list(range(self.n_layers)) if way is None else way.learnt(self.n_layers)

    def problems(self) -> list[str]:
        """What is wrong with this config, one sentence for each problem; empty for one that a model can be built from."""
        problems = []
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            above = low == 0 and name not in ZERO_IS_OFF
            if math.isfinite(value) and (value > low if above else value >= low) and value <= high:
                continue
            if name == "d_ff" and value < low:
                problems.append(f"model.d_ff must be a width, 0 (no MLP) or -1 (derived), not {value}.")
            elif value > high:
                problems.append(f"model.{name} must be at most {high:,}, not {value:,}.")
            else:
                problems.append(f"model.{name} must be {'above zero' if above or low == 1 else 'zero or more'}, not {value}.")
        if self.residual_init not in ("depth", "none"):
            problems.append(f"model.residual_init is {self.residual_init!r}; choose depth or none.")
        if not self.pattern:
            problems.append("model.pattern is empty; name at least one mixer.")
        for name in dict.fromkeys(map(str, self.pattern)):
            if name not in self.mixers:
                configured = ", ".join(self.mixers) or "nothing"
                problems.append(
                    f"model.pattern names {name!r}, which is not configured; model.mixers holds {configured} "
                    f"(add one with +mixer@model.mixers.{name}=OPTION)."
                )
        for name in map(str, self.norm_after):
            if name not in self.pattern:
                problems.append(f"model.norm_after names {name!r}, which is no mixer of the pattern {list(self.pattern)}.")
        for name, mapping in self.mixers.items():
            if isinstance(mapping, dict):
                problems += mixers.parse(name, mapping, self.d_model)[1]
            else:
                problems.append(f"model.mixers.{name} must be a group of keys, not {mapping!r}.")
        if self.mlp_width:
            problems += channel.KINDS.parse(self.channel, self.d_model, self.mlp_width)[1]
        elif self.channel.get("type") != channel.PLAIN:
            problems.append(
                f"model.channel is {self.channel.get('type')}, but model.d_ff=0 leaves it out of every layer; give a width, or -1."
            )
        if self.depth and self.n_layers > 0:
            problems += depth.KINDS.parse(self.depth, self.n_layers)[1]
        return problems + param.KINDS.parse(self.param, self)[1]

    @staticmethod
    def from_dict(mapping: dict[str, Any]) -> ModelConfig:
        """Reads a mapping. Raises UserError with one line for every problem."""
        problems: list[str] = []
        values = read(mapping, typing.get_type_hints(ModelConfig), "model.", problems)
        if "vocab_size" not in mapping:
            problems.append("model.vocab_size is missing.")
        # The rest is judged with defaults for what could not be read; a default's own consequences are no problem of the user's.
        config = ModelConfig(**{"vocab_size": 1, **values})
        unread = [key for key in ("d_model", "mixers", "pattern") if key in mapping and key not in values]
        if not unread:
            problems += config.problems()
        if problems:
            raise UserError(problems)
        return config

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds; without `depth` where it is empty, as models were written before there was any."""
        values = dataclasses.asdict(self)
        return values if self.depth else {key: value for key, value in values.items() if key != "depth"}
