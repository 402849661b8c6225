"""Maximal update parametrisation: activations and their changes by a training step are as large at every width, so that a learning rate found at a
small width holds at a large one.

Source: Yang and Hu 2021 (arXiv 2011.14522), Yang et al. 2022 (arXiv 2203.03466, table 3, for Adam). With m = d_model / base_width, by the roles of
parameters (models/init.py):

    hidden matrices               spread init_std / sqrt(m), rate 1 / m     (d_ff, inner widths and blocks of cells grow as d_model does)
    head                          spread init_std / m, or zero; rate 1 / m  (as logits divided by m under Adam, with nothing to do in forward)
    tied head                     the last norm's weight starts at 1 / m, rate 1 / m, which divides the logits just so
    embedding, norms, biases, convolutions, recurrent vectors, matrices over heads of one size (`fixed_fan_in`)    as at the base width

At base_width this is the plain parametrisation, to the bit. What was drawn with a spread that falls with the width though it acts channel
by channel (`falls_with_width`) gets that of the base width. AdamW's decay is a rate times weight_decay: the optimizer keeps that product. Where heads
of attention grow with the width (head_dim: 0), scores have to be divided by their size and not its root: what makes queries (`scores_of_width`) is
1 / sqrt(m) smaller, start and rate. With a head_dim heads keep their size, and their number grows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from models.init import is_hidden_matrix, roles, tag


@dataclass
class Config:
    base_width: int = 256  # d_model at which rates were found, and at which this is the plain parametrisation
    zero_head: bool = False  # a head of its own starts at zero, as the paper advises; slower in short runs here

    def problems(self, model: Any) -> list[str]:
        if self.base_width < 1:
            return [f"base_width must be a d_model, not {self.base_width}."]
        centred = [name for name, mixer in model.mixers.items() if mixer.get("qk_norm_centred")]
        if model.centred_norms or centred:
            return ["type mup scales gains of norms, and centred ones hold 1 + weight: set centred_norms=false and qk_norm_centred=false."]
        return []


def hidden_std(model: Any, config: Config) -> float:
    return model.init_std * (config.base_width / model.d_model) ** 0.5


@torch.no_grad()
def prepare(model: Any, config: Config, drawn: bool) -> None:
    m, tied = model.config.d_model / config.base_width, model.config.tie_embeddings
    divides = model.norm.weight if tied else model.head.weight
    if not drawn:
        growing = [p for p in model.parameters() if is_hidden_matrix(p) and "fixed_fan_in" not in roles(p)]
        for parameter in [divides, *growing]:
            tag(parameter, rate=1 / m * roles(parameter).get("rate", 1.0))
        for parameter in _queries(model):
            tag(parameter, rate=roles(parameter).get("rate", 1.0) / m**0.5)
        return
    divides.mul_(0.0 if config.zero_head and not tied else 1 / m)
    for parameter in _queries(model):
        parameter.mul_(m**-0.5)
    for parameter in model.parameters():
        if "falls_with_width" in roles(parameter):
            parameter.mul_(m**0.5)


def _queries(model: Any) -> list[Any]:
    return [parameter for parameter in model.parameters() if "scores_of_width" in roles(parameter)]
