"""Small folders of transformers' own classes, from their published default configs, for the tests of import."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from models.hub.native_delta import too_old

SMALL: dict[str, Any] = {"vocab_size": 101, "hidden_size": 36, "num_hidden_layers": 3}
ATTENTION = {**SMALL, "intermediate_size": 50, "num_attention_heads": 6, "num_key_value_heads": 3, "initializer_range": 0.2}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
BAMBA = {**ATTENTION, "hidden_size": 48, "attn_layer_indices": [1], "mamba_n_heads": 6, "mamba_d_state": 7, "mamba_chunk_size": 5}
DELTA = {
    **ATTENTION,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 12,
}

# name: (class, its settings; everything else is the default of its config)
STOCK: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**ATTENTION, "rope_parameters": {"rope_type": "default", "rope_theta": 777.0}}),
    "llama3": ("Llama", {**ATTENTION, "head_dim": 16, "rope_parameters": LLAMA3, "max_position_embeddings": 512}),
    "llama_linear": ("Llama", {**ATTENTION, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama_dynamic": (
        "Llama",
        {**ATTENTION, "max_position_embeddings": 80, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "llama_yarn": ("Llama", {**ATTENTION, "head_dim": 16, "max_position_embeddings": 256, "rope_parameters": YARN}),
    "llama_yarn_scaled": (
        "Llama",
        {**ATTENTION, "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0, "beta_fast": 8, "truncate": False}},
    ),
    "llama_biased": ("Llama", {**ATTENTION, "attention_bias": True, "hidden_act": "swish"}),
    "mistral": ("Mistral", {**ATTENTION, "sliding_window": 9}),
    "mistral_full": ("Mistral", {**ATTENTION, "sliding_window": None}),
    "ministral": (
        "Ministral",
        {**ATTENTION, "head_dim": 8, "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "qwen2": ("Qwen2", {**ATTENTION, "tie_word_embeddings": True}),
    "qwen2_window": ("Qwen2", {**ATTENTION, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {**ATTENTION, "tie_word_embeddings": True}),
    "qwen3_window": (
        "Qwen3",
        {**ATTENTION, "attention_bias": True, "head_dim": 10, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
    ),
    "qwen3_yarn": ("Qwen3", {**ATTENTION, "head_dim": 16, "rope_parameters": YARN}),
    "smollm3": ("SmolLM3", {**ATTENTION, "num_hidden_layers": 4, "pad_token_id": 2}),
    "smollm3_window": (
        "SmolLM3",
        {**ATTENTION, "num_hidden_layers": 4, "pad_token_id": 2, "use_sliding_window": True, "sliding_window": 9, "attention_bias": True},
    ),
    "mamba2": (
        "Mamba2",
        {**SMALL, "num_heads": 6, "head_dim": 12, "state_size": 7, "n_groups": 2, "chunk_size": 5, "time_step_limit": (0.0, 0.3)},
    ),
    "bamba": ("Bamba", {**BAMBA, "rope_parameters": {"rope_type": "default", "rope_theta": 777.0}}),
    "bamba_scaled": ("Bamba", {**BAMBA, "attention_bias": True, "rope_parameters": {**LLAMA3, "partial_rotary_factor": 0.75}}),
}
if not too_old("Qwen3_5ForCausalLM"):
    STOCK |= {
        "qwen3_5": ("Qwen3_5", {**DELTA, "head_dim": 16, "num_hidden_layers": 4}),
        "qwen3_5_scaled": (
            "Qwen3_5",
            {
                **DELTA,
                "head_dim": 16,
                "linear_conv_kernel_dim": 3,
                "layer_types": ["full_attention", "linear_attention", "full_attention"],
                "rope_parameters": {**LLAMA3, "partial_rotary_factor": 0.5},
                "tie_word_embeddings": True,
            },
        ),
        "olmo_hybrid": ("OlmoHybrid", {**DELTA, "linear_value_head_dim": 8, "num_hidden_layers": 4, "pad_token_id": 0, "eos_token_id": 1}),
        "olmo_hybrid_bare": (  # without positions, as published
            "OlmoHybrid",
            {
                **DELTA,
                "layer_types": ["linear_attention", "full_attention", "linear_attention"],
                "attention_bias": True,
                "linear_allow_neg_eigval": False,
                "rope_parameters": {"rope_type": "default", "rope_theta": None},
                "pad_token_id": 0,
                "eos_token_id": 1,
            },
        ),
    }


def stock_model(name: str) -> Any:
    """The model of that name with weights that differ from token to token."""
    import transformers

    torch.manual_seed(0)
    kind, settings = STOCK[name]
    text = "Text" if kind == "Qwen3_5" else ""  # its config is that of a model of pictures and text
    config = getattr(transformers, f"{kind}{text}Config")(**settings)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            if kind == "Qwen3_5" and parameter_name.endswith(
                "dt_bias"
            ):  # as trained: with gates as strong as its first ones few digits of fp32 are left
                parameter.sub_(4)
    return model.eval()


def stock_folder(name: str, folder: Path) -> Path:
    """The folder that transformers writes for it."""
    stock_model(name).save_pretrained(folder)
    return folder
