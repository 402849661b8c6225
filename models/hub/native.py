"""Which stock class of transformers a model is, exactly, and the names its weights have there.

A model that differs in anything from every stock class is none of them: then `stock` says why, and export writes the project's own class.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from models import mixers
from models.config import ModelConfig

QK_NORM_EPS = 1e-5  # of models/mixers/attention.py; the stock classes take their model's


@dataclass
class Stock:
    """A stock class: its config.json and how a name of ours reads there."""

    architecture: str
    config: dict[str, Any]
    rules: list[tuple[str, str]]

    def name(self, ours: str) -> str:
        """The name of one of our parameters in the stock class."""
        for pattern, replacement in self.rules:
            if re.fullmatch(pattern, ours):
                return re.sub(pattern, replacement, ours)
        raise KeyError(ours)


LLAMA_RULES = [
    (r"embedding\.weight", "model.embed_tokens.weight"),
    (r"norm\.weight", "model.norm.weight"),
    (r"head\.weight", "lm_head.weight"),
    (r"blocks\.(\d+)\.mixer_norm\.weight", r"model.layers.\1.input_layernorm.weight"),
    (r"blocks\.(\d+)\.mlp_norm\.weight", r"model.layers.\1.post_attention_layernorm.weight"),
    (r"blocks\.(\d+)\.mixer\.([qkvo]_proj|[qk]_norm)\.weight", r"model.layers.\1.self_attn.\2.weight"),
    (r"blocks\.(\d+)\.mlp\.(gate|up|down)\.weight", r"model.layers.\1.mlp.\2_proj.weight"),
]
MAMBA2_RULES = [
    (r"embedding\.weight", "backbone.embeddings.weight"),
    (r"norm\.weight", "backbone.norm_f.weight"),
    (r"head\.weight", "lm_head.weight"),
    (r"blocks\.(\d+)\.mixer_norm\.weight", r"backbone.layers.\1.norm.weight"),
    (r"blocks\.(\d+)\.mixer\.conv\.(weight|bias)", r"backbone.layers.\1.mixer.conv1d.\2"),
    (r"blocks\.(\d+)\.mixer\.(.*)", r"backbone.layers.\1.mixer.\2"),
]
BAMBA_RULES = [
    (r"embedding\.weight", "model.embed_tokens.weight"),
    (r"norm\.weight", "model.final_layernorm.weight"),
    (r"head\.weight", "lm_head.weight"),
    (r"blocks\.(\d+)\.mixer_norm\.weight", r"model.layers.\1.input_layernorm.weight"),
    (r"blocks\.(\d+)\.mlp_norm\.weight", r"model.layers.\1.pre_ff_layernorm.weight"),
    (r"blocks\.(\d+)\.mlp\.(gate|up|down)\.weight", r"model.layers.\1.feed_forward.\2_proj.weight"),
    (r"blocks\.(\d+)\.mixer\.([qkvo]_proj)\.weight", r"model.layers.\1.self_attn.\2.weight"),
    (r"blocks\.(\d+)\.mixer\.conv\.(weight|bias)", r"model.layers.\1.mamba.conv1d.\2"),
    (r"blocks\.(\d+)\.mixer\.(.*)", r"model.layers.\1.mamba.\2"),
]


def stock(config: ModelConfig, max_positions: int = 2048) -> tuple[Stock | None, str]:
    """(the stock class that is this model, or None; why none is, in a few words). max_positions: of config.json, the training length."""
    used = sorted({config.mixer_name(layer) for layer in range(config.n_layers)})
    if config.learnable_residual:
        return None, "its residual stream has learned scales"
    if len(used) > 1:
        return _bamba(config, used, max_positions)
    mapping = config.mixers[used[0]]
    mixer, problems = mixers.parse(used[0], mapping, config.d_model)
    assert mixer is not None, problems
    if mapping["type"] == "attention":
        return _attention(config, mixer, max_positions)
    if mapping["type"] == "mamba2":
        return _mamba2(config, mixer)
    return None, f"its mixer is {mapping['type']}"


def _attention(config: ModelConfig, mixer: Any, max_positions: int) -> tuple[Stock | None, str]:
    if not config.mlp_width:
        return None, "it has no MLP"
    if not mixer.rope:
        return None, "it has no rotary positions"
    if mixer.qk_norm and config.norm_eps != QK_NORM_EPS:
        return None, f"its QK-norm has another epsilon ({QK_NORM_EPS:g}) than its other norms ({config.norm_eps:g})"
    if mixer.window and mixer.qk_norm:
        return None, "it has both a window and QK-norm"
    kind, architecture = ("llama", "LlamaForCausalLM")
    if mixer.qk_norm:
        kind, architecture = ("qwen3", "Qwen3ForCausalLM")
    elif mixer.window:
        kind, architecture = ("mistral", "MistralForCausalLM")
    values: dict[str, Any] = {
        "model_type": kind,
        "architectures": [architecture],
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": mixer.n_heads,
        "num_key_value_heads": mixer.n_kv_heads or mixer.n_heads,
        "head_dim": mixer.head_dim or config.d_model // mixer.n_heads,
        "hidden_act": "silu",
        "max_position_embeddings": max_positions,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": mixer.rope_theta},
        "attention_bias": False,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
    }
    if mixer.window:
        values["sliding_window"] = mixer.window
    return Stock(architecture, values, LLAMA_RULES), ""


def _bamba(config: ModelConfig, used: list[str], max_positions: int) -> tuple[Stock | None, str]:
    """Layers of Mamba-2 and of attention, each with SwiGLU: transformers' Bamba."""
    types = {name: str(config.mixers[name]["type"]) for name in used}
    if sorted(types.values()) != ["attention", "mamba2"]:
        return None, "its layers have different mixers, and not one kind of Mamba-2 and one of attention"
    parsed = {types[name]: mixers.parse(name, config.mixers[name], config.d_model)[0] for name in used}
    attention, mamba = parsed["attention"], parsed["mamba2"]
    wants = [
        ("it has no MLP", not config.mlp_width),
        ("its attention has no rotary positions", not attention.rope),
        ("its attention has a window", attention.window),
        ("its attention has QK-norm", attention.qk_norm),
        ("its attention heads are not d_model / n_heads wide", attention.head_dim not in (0, config.d_model / attention.n_heads)),
        ("its Mamba-2 shares B and C in several groups, which its norm follows in newer releases of the stock class only", mamba.n_groups > 1),
        ("the norm inside its Mamba-2 has another epsilon than its other norms", mamba.norm_eps != config.norm_eps),
        ("its step sizes are limited", mamba.dt_limit_min or mamba.dt_limit_max),
    ]
    for reason, so in wants:
        if so:
            return None, reason
    values: dict[str, Any] = {
        "model_type": "bamba",
        "architectures": ["BambaForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.n_layers,
        "attn_layer_indices": [i for i in range(config.n_layers) if types[config.mixer_name(i)] == "attention"],
        "num_attention_heads": attention.n_heads,
        "num_key_value_heads": attention.n_kv_heads or attention.n_heads,
        "rope_parameters": {"rope_type": "default", "rope_theta": attention.rope_theta, "partial_rotary_factor": 1.0},
        "attention_bias": False,
        "mlp_bias": False,
        "mamba_expand": mamba.expand,
        "mamba_n_heads": mamba.expand * config.d_model // mamba.head_dim,
        "mamba_d_head": mamba.head_dim,
        "mamba_d_state": mamba.d_state,
        "mamba_n_groups": mamba.n_groups,
        "mamba_d_conv": mamba.d_conv,
        "mamba_chunk_size": mamba.chunk,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "hidden_act": "silu",
        "max_position_embeddings": max_positions,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
    }
    return Stock("BambaForCausalLM", values, BAMBA_RULES), ""


def _mamba2(config: ModelConfig, mixer: Any) -> tuple[Stock | None, str]:
    if config.mlp_width:
        return None, "it has an MLP beside Mamba-2"
    if mixer.norm_eps != config.norm_eps:
        return None, f"the norm inside its mixer has another epsilon ({mixer.norm_eps:g}) than its other norms ({config.norm_eps:g})"
    if mixer.dt_limit_min or mixer.dt_limit_max:
        return None, "its step sizes are limited"
    values = {
        "model_type": "mamba2",
        "architectures": ["Mamba2ForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "expand": mixer.expand,
        "num_heads": mixer.expand * config.d_model // mixer.head_dim,
        "head_dim": mixer.head_dim,
        "state_size": mixer.d_state,
        "n_groups": mixer.n_groups,
        "conv_kernel": mixer.d_conv,
        "chunk_size": mixer.chunk,
        "time_step_min": mixer.dt_min,
        "time_step_max": mixer.dt_max,
        "time_step_floor": mixer.dt_floor,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.init_std,
        "hidden_act": "silu",
        "use_bias": False,
        "use_conv_bias": True,
        "residual_in_fp32": False,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
    }
    return Stock("Mamba2ForCausalLM", values, MAMBA2_RULES), ""
