"""The rows of the board: one model of each architecture at a size, all of nearly equal parameters, and the one way they are counted.

Everything outside the mixers is the same: blocks, norms, tied embedding and head, initial weights. Models with an MLP get equal parameters by its
width, Mamba-2, which is published without one, by its depth. Parameters are counted without the embedding, which the head shares; FLOPs are the
layers' own formulae (`LanguageModel.flops_per_token`): matrix products, attention over half of the square, a recurrence as a recurrence.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from dataclasses import dataclass
from typing import Any

from models.config import ModelConfig
from models.lm import LanguageModel
from training.cost.flops import meta_model, training_flops_per_token
from training.optim import newton_schulz

VOCABULARY = 16_384
WITHIN = 0.02  # of the size's parameters


@dataclass(frozen=True)
class Size:
    """d_model: width. layers: of models with an MLP. heads: of attention and the delta rule. parameters: aimed at, without the embedding. multiple:
    that an MLP's width is rounded to."""

    d_model: int
    layers: int
    heads: int
    cell_heads: int
    d_state: int
    head_dim: int
    parameters: int
    multiple: int = 8


SIZES = {
    "25m": Size(512, 8, 8, 4, 64, 64, 25_000_000),
    "125m": Size(768, 12, 12, 4, 64, 64, 85_000_000),
    "tiny": Size(32, 4, 2, 2, 8, 16, 51_000, 1),
    "probe": Size(128, 4, 2, 4, 64, 64, 700_000),  # of the models that are trained on MQAR and state tracking
    "tiny_probe": Size(32, 4, 2, 2, 8, 16, 51_000, 1),
}


@dataclass(frozen=True)
class Architecture:
    """A row. layers: the mixers' names, repeated over the depth. instead: the mixer of the one layer in the middle that is another one. optimizer
    and initial: what rows to start from and what updates the weights, where that differs from AdamW and an empty state."""

    name: str
    label: str
    layers: tuple[str, ...]
    instead: str = ""
    bare: bool = False  # no MLP
    optimizer: str = "adamw"
    initial: str = "zero"
    of: str = ""  # the row that this one is compared with


RECURRENT = {
    "mamba2": "Mamba-2",
    "gdn": "Gated DeltaNet",
    "deltaproduct": "DeltaProduct",
    "paragru": "ParaGRU",
    "paralstm": "ParaLSTM",
}
# In the plan from the start; their rows, hybrids and single layers exist where the file that names the mixer does.
DENSE = {
    "dense_lstm": ("LSTM, dense heads", "models.cells.dense_lstm"),
    "slstm": ("sLSTM, dense heads", "models.cells.slstm"),
    "m2rnn": ("M2RNN", "models.mixers.m2rnn"),
}
WAITING = {name: label for name, (label, module) in DENSE.items() if importlib.util.find_spec(module) is None}


def _rows() -> list[Architecture]:
    kinds = RECURRENT | {name: label for name, (label, _) in DENSE.items() if name not in WAITING}
    rows = [Architecture("transformer", "Transformer", ("attention",))]
    rows += [Architecture(name, label, (name,), bare=name == "mamba2") for name, label in kinds.items()]
    short = kinds | {"gdn": "GDN"}
    rows += [Architecture(f"{name}_hybrid", f"{label} hybrid", (name,) * 3 + ("attention",)) for name, label in short.items()]
    for base in ("mamba2", "gdn"):
        for one in ("paragru", *(name for name in ("dense_lstm", "m2rnn") if name in kinds)):
            layers, label = (base,) * 3 + ("attention",), f"{short[base]} hybrid, one {kinds[one]}"
            rows.append(Architecture(f"{base}_hybrid_{one}", label, layers, one, of=f"{base}_hybrid"))
    named = {row.name: row for row in rows}
    for name in ("transformer", "mamba2", "gdn", "paragru"):
        plain = named[name]
        rows.append(Architecture(f"{name}_muon", f"{plain.label}, Muon", plain.layers, bare=plain.bare, optimizer="muon", of=name))
    for name in ("mamba2", "gdn", "paragru"):
        plain = named[name]
        rows.append(Architecture(f"{name}_pass", f"{plain.label}, state passing", plain.layers, bare=plain.bare, initial="pass", of=name))
    # The one layer once more, where seeds lie nearer together: the hybrid and those with one other layer, all under Muon.
    for plain in [row for row in named.values() if row.name == "gdn_hybrid" or row.of == "gdn_hybrid"]:
        of = f"{plain.of}_muon" if plain.instead else plain.name
        rows.append(Architecture(f"{plain.name}_muon", f"{plain.label}, Muon", plain.layers, plain.instead, optimizer="muon", of=of))
    return rows


ARCHITECTURES = {row.name: row for row in _rows()}


def _mixer(name: str, size: Size) -> dict[str, Any]:
    mixers: dict[str, dict[str, Any]] = {
        "attention": {"type": "attention", "n_heads": size.heads},
        "mamba2": {"type": "mamba2", "d_state": size.d_state, "head_dim": size.head_dim, "chunk": 64},
        "gdn": {"type": "delta", "n_heads": size.heads},
        "deltaproduct": {"type": "delta", "n_heads": size.heads, "updates": 2, "negative": True},
        "paragru": {"type": "rnn", "cell": "paragru", "n_heads": size.cell_heads},
        "paralstm": {"type": "rnn", "cell": "paralstm", "n_heads": size.cell_heads},
        "dense_lstm": {"type": "rnn", "cell": "dense_lstm", "n_heads": size.cell_heads, "recurrent_bound": "none"},
        "slstm": {"type": "rnn", "cell": "slstm", "n_heads": size.cell_heads, "recurrent_bound": "none"},
        "m2rnn": {"type": "m2rnn"},
    }
    return mixers[name]


@functools.cache
def model_config(name: str, size_name: str, vocabulary: int = VOCABULARY) -> ModelConfig:
    """The model of a row at a size. Raises ValueError where no width or depth comes within WITHIN of the size's parameters."""
    row, size = ARCHITECTURES[name], SIZES[size_name]

    def config(layers: int, d_ff: int) -> ModelConfig:
        pattern = [row.layers[i % len(row.layers)] for i in range(layers)]
        if row.instead:
            pattern[layers // 2] = row.instead
        return ModelConfig(
            vocab_size=vocabulary,
            d_model=size.d_model,
            n_layers=layers,
            pattern=pattern,
            mixers={mixer: _mixer(mixer, size) for mixer in dict.fromkeys(pattern)},
            d_ff=d_ff,
            tie_embeddings=True,
            head_chunk=8192,
            recompute_head=False,
        )

    if row.bare:
        each = parameters(config(2, 0)) - parameters(config(1, 0))
        chosen = config(max(1, round(size.parameters / each)), 0)
    else:
        width = size.multiple
        each = (parameters(config(size.layers, 2 * width)) - parameters(config(size.layers, width))) // width
        left = size.parameters - parameters(config(size.layers, width)) + each * width
        chosen = config(size.layers, max(1, round(left / each / width)) * width)
    if abs(parameters(chosen) / size.parameters - 1) > WITHIN:
        raise ValueError(f"{name} has {parameters(chosen):,} parameters at size {size_name}, not {size.parameters:,}.")
    return chosen


def update_of(optimizer: str) -> dict[str, Any]:
    """What settings say of an optimizer whose update is ours: of Muon, the polynomials that orthogonalise and how many steps of them. Empty of AdamW."""
    if optimizer != "muon":
        return {}
    return {"orthogonalised": {"steps": newton_schulz.STEPS, "coefficients": json.loads(json.dumps(newton_schulz.COEFFICIENTS))}}


def parameters(config: ModelConfig) -> int:
    """Without the embedding, which is the head as well."""
    return counted(meta_model(config))


def counted(model: LanguageModel) -> int:
    """`parameters` of a model."""
    return sum(model.parameter_counts().values()) - model.parameter_counts()["embedding"]


def counts(name: str, size: str, T: int, vocabulary: int = VOCABULARY) -> dict[str, Any]:
    """What the table prints of a model: parameters without and with the embedding, training FLOPs of a token, layers and the MLP's width."""
    config = model_config(name, size, vocabulary)
    model = meta_model(config)
    return {
        "parameters": counted(model),
        "parameters_with_embedding": sum(model.parameter_counts().values()),
        "training_flops_per_token": training_flops_per_token(model, T),
        "n_layers": config.n_layers,
        "d_ff": config.d_ff,
        "state_bytes_1k": model.state_bytes(1024),
        "state_bytes_128k": model.state_bytes(131_072),
    }
