"""A checkpoint as its export holds it: channel mixers of other kinds than the plain one become SwiGLUs of dense maps that compute the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from models import channel
from models.checkpoint import read_config
from models.config import ModelConfig
from models.hub.weights import Weights
from models.lm import LanguageModel


class Merged(Weights):
    """The tensors of a checkpoint with those of its channel mixers merged, a layer at a time."""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        super().__init__(folder)
        self.config, self.source, self.last = config, Weights(folder), (-1, dict[str, Tensor]())
        with torch.device("meta"):
            self.channel = channel.build(config.channel, config.d_model, config.mlp_width)
        self.parts = [name for name, _ in self.channel.named_parameters()]
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.channel.plain_weights().items()}
        inside = {f"blocks.{i}.mlp.{name}" for i in range(config.n_layers) for name in self.parts}
        self.plain = {f"blocks.{i}.mlp.{name}": (i, name) for i in range(config.n_layers) for name in self.shapes}
        if inside <= self.where.keys():  # else names are left as they are, and the caller finds what is missing
            self.where = {name: file for name, file in self.where.items() if name not in inside} | dict.fromkeys(self.plain, "")

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[self.plain[name][1]] if name in self.plain else super().shape(name)

    def dtype(self, name: str) -> str:
        return "float32" if name in self.plain else super().dtype(name)

    def tensor(self, name: str) -> Tensor:
        if name not in self.plain:
            return super().tensor(name)
        layer, part = self.plain[name]
        if self.last[0] != layer:
            mixer = channel.build(self.config.channel, self.config.d_model, self.config.mlp_width)
            mixer.load_state_dict({key: self.source.tensor(f"blocks.{layer}.mlp.{key}") for key in self.parts})
            self.last = (layer, mixer.plain_weights())
        return self.last[1][part]

    @torch.no_grad()
    def gap(self, plain_model: LanguageModel, ids: Tensor) -> float:
        """By how much the logits of the checkpoint as it is and of `plain_model` with the merged weights differ, both in fp32."""
        source = LanguageModel(self.config).eval()
        source.load_state_dict({name: self.source.tensor(name).float() for name in self.source.names()}, strict=False)
        rounded = {name: tensor.clone() for name, tensor in plain_model.state_dict().items()}
        plain_model.load_state_dict({name: self.tensor(name).float() for name in self.names()}, strict=False)
        gap = float((plain_model(ids).logits - source(ids).logits).abs().max())
        plain_model.load_state_dict(rounded)
        return gap


def plain(source: Path) -> tuple[ModelConfig, Weights]:
    """The config and the weights that an export of this checkpoint holds."""
    config = read_config(source)
    if config.channel["type"] == channel.PLAIN or not config.mlp_width:
        return config, Weights(source)
    return dataclasses.replace(config, channel={"type": channel.PLAIN}), Merged(source, config)
