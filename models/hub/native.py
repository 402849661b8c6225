"""Which stock class of transformers a model is, exactly, and the names its weights have there.

A model that differs in anything from every stock class is none of them: then `stock` says why, and export writes the project's own class.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from models import mixers
from models.config import ModelConfig
from models.hub.native_delta import stock_delta
from models.hub.stock import Stock, positions, rope_parameters

__all__ = ["Stock", "stock"]


LLAMA_RULES = [
    (r"embedding\.weight", "model.embed_tokens.weight"),
    (r"norm\.weight", "model.norm.weight"),
    (r"head\.weight", "lm_head.weight"),
    (r"blocks\.(\d+)\.mixer_norm\.weight", r"model.layers.\1.input_layernorm.weight"),
    (r"blocks\.(\d+)\.mlp_norm\.weight", r"model.layers.\1.post_attention_layernorm.weight"),
    (r"blocks\.(\d+)\.mixer\.([qkvo]_proj|[qk]_norm)\.(weight|bias)", r"model.layers.\1.self_attn.\2.\3"),
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
    (r"blocks\.(\d+)\.mixer\.([qkvo]_proj)\.(weight|bias)", r"model.layers.\1.self_attn.\2.\3"),
    (r"blocks\.(\d+)\.mixer\.conv\.(weight|bias)", r"model.layers.\1.mamba.conv1d.\2"),
    (r"blocks\.(\d+)\.mixer\.(.*)", r"model.layers.\1.mamba.\2"),
]


def stock(config: ModelConfig, max_positions: int = 2048) -> tuple[Stock | None, str]:
    """(the stock class that is this model, or None; why none is, in a few words). max_positions: of config.json, the training length."""
    used = sorted({config.mixer_name(layer) for layer in range(config.n_layers)})
    if config.learnable_residual:
        return None, "its residual stream has learned scales"
    if config.depth:
        return None, "tokens go through its layers several times"
    types = {str(config.mixers[name]["type"]) for name in used}
    if "delta" in types or types == {"attention"} and all(config.mixers[name].get("output_gate") for name in used):
        return stock_delta(config, max_positions)
    if config.centred_norms:
        return None, "its norms hold what their gains are above 1"
    if set(used) & set(config.norm_after):
        return None, "its norms lie behind the sublayers of some blocks"
    if types == {"attention"}:
        return _attention(config, max_positions)
    if len(used) > 1:
        return _bamba(config, used, max_positions)
    mapping = config.mixers[used[0]]
    mixer, problems = mixers.parse(used[0], mapping, config.d_model)
    assert mixer is not None, problems
    if mapping["type"] == "mamba2":
        return _mamba2(config, mixer)
    return None, f"its mixer is {mapping['type']}"


def _shared(layers: list[Any]) -> str:
    """Why layers of attention are no layers of one stock class, or ''. Only windows and whether there are positions may differ."""
    first = replace(layers[0], window=0, rope=True)
    if any(replace(layer, window=0, rope=True) != first for layer in layers):
        return "its attention layers differ in more than windows and positions"
    if len({layer.window for layer in layers} - {0}) > 1:
        return "its attention layers have windows of several lengths"
    if first.rope_fraction != 1:
        return "its rotary positions are on a part of the heads"
    if first.output_gate:
        return "its attention has an output gate"
    if first.qk_norm and (first.qk_norm_over != "head" or first.qk_norm_centred):
        return "its QK-norm is over all heads, or holds what its gains are above 1"
    return "" if any(layer.rope for layer in layers) else "it has no rotary positions"


def _family(config: ModelConfig, layers: list[Any]) -> tuple[str, str, str]:
    """(model type, class, '') of layers of attention, or ('', '', why there is none)."""
    mixer, windows = layers[0], {layer.window for layer in layers}
    biases, bare = (mixer.qkv_bias, mixer.o_bias), not all(layer.rope for layer in layers)
    if why := _shared(layers):
        return "", "", why
    if mixer.qk_norm and config.norm_eps != mixer.qk_norm_eps:
        return "", "", f"its QK-norm has another epsilon ({mixer.qk_norm_eps:g}) than its other norms ({config.norm_eps:g})"
    if biases == (False, True) or (biases == (True, False) and (mixer.qk_norm or bare)):
        return "", "", "no stock class has biases in these projections only"
    if mixer.qk_norm:
        return ("", "", "it has both QK-norm and layers without positions") if bare else ("qwen3", "Qwen3ForCausalLM", "")
    if biases == (True, False):
        return "qwen2", "Qwen2ForCausalLM", ""
    if bare or (biases == (True, True) and windows != {0}):
        return "smollm3", "SmolLM3ForCausalLM", ""
    if windows == {0}:
        return "llama", "LlamaForCausalLM", ""
    return ("mistral", "MistralForCausalLM", "") if len(windows) == 1 else ("ministral", "MinistralForCausalLM", "")


def _attention(config: ModelConfig, max_positions: int) -> tuple[Stock | None, str]:
    if not config.mlp_width:
        return None, "it has no MLP"
    layers = [mixers.parse("?", config.mixers[config.mixer_name(i)], config.d_model)[0] for i in range(config.n_layers)]
    mixer, window = layers[0], max(layer.window for layer in layers)
    kind, architecture, why = _family(config, layers)
    if why:
        return None, why
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
        "max_position_embeddings": positions(mixer, max_positions),
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope_parameters(mixer),
        "attention_bias": mixer.o_bias,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
    }
    if kind in ("mistral", "ministral") or window:
        values["sliding_window"] = window
    if kind in ("qwen2", "qwen3", "smollm3"):
        values["use_sliding_window"] = window > 0
    if kind == "ministral" or (window and kind != "mistral"):
        values["layer_types"] = ["sliding_attention" if layer.window else "full_attention" for layer in layers]
    if kind == "smollm3":
        values["no_rope_layers"] = [int(layer.rope) for layer in layers]
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
        ("its attention has biases in some projections only", attention.qkv_bias != attention.o_bias),
        ("its attention has a window", attention.window),
        ("its attention has QK-norm", attention.qk_norm),
        ("its attention has an output gate", attention.output_gate),
        ("its attention heads are not d_model / n_heads wide", attention.head_dim not in (0, config.d_model / attention.n_heads)),
        (
            "its Mamba-2 shares B and C in several groups, which its norm follows in newer releases of the stock class only",
            mamba.n_groups > 1,
        ),
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
        "rope_parameters": {**rope_parameters(attention), "partial_rotary_factor": attention.rope_fraction},
        "attention_bias": attention.o_bias,
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
        "max_position_embeddings": positions(attention, max_positions),
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
