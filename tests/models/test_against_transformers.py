"""Logits of stock models with copied weights: Llama and Mamba-2."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Mamba2Config, Mamba2ForCausalLM

from models.config import ModelConfig
from models.lm import LanguageModel

V, D, LAYERS = 97, 48, 3


def test_transformer_gives_llamas_logits() -> None:
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V,
            hidden_size=D,
            intermediate_size=112,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            initializer_range=0.1,
        )
    ).eval()
    ours = LanguageModel(
        ModelConfig(
            vocab_size=V, d_model=D, n_layers=LAYERS, d_ff=112, mixers={"attention": {"type": "attention", "n_heads": 4, "n_kv_heads": 2}}
        )
    ).eval()
    names = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "head.weight": "lm_head.weight"}
    for i in range(LAYERS):
        a, b = f"blocks.{i}.", f"model.layers.{i}."
        names |= {a + "mixer_norm.weight": b + "input_layernorm.weight", a + "mlp_norm.weight": b + "post_attention_layernorm.weight"}
        names |= {a + f"mixer.{p}_proj.weight": b + f"self_attn.{p}_proj.weight" for p in "qkvo"}
        names |= {a + f"mlp.{p}.weight": b + f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")}
    state = theirs.state_dict()
    ours.load_state_dict({mine: state[other] for mine, other in names.items()})
    ids = torch.randint(0, V, (2, 37))
    with torch.no_grad():
        assert (ours(ids).logits - theirs(ids).logits).abs().max() < 1e-4


def test_mamba2_gives_transformers_logits() -> None:
    torch.manual_seed(0)
    groups = 2
    theirs = Mamba2ForCausalLM(
        Mamba2Config(
            vocab_size=V,
            hidden_size=D,
            num_hidden_layers=LAYERS,
            expand=2,
            num_heads=6,
            head_dim=16,
            state_size=8,
            n_groups=groups,
            chunk_size=8,
            tie_word_embeddings=False,
            layer_norm_epsilon=1e-5,
            use_conv_bias=True,
            residual_in_fp32=False,
        )
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    mixer = {"type": "mamba2", "d_state": 8, "head_dim": 16, "n_groups": groups, "chunk": 8}
    ours = LanguageModel(ModelConfig(vocab_size=V, d_model=D, n_layers=LAYERS, d_ff=0, pattern=["m"], mixers={"m": mixer})).eval()
    state = theirs.state_dict()
    copied = {
        "embedding.weight": state["backbone.embeddings.weight"],
        "norm.weight": state["backbone.norm_f.weight"],
        "head.weight": state["lm_head.weight"],
    }
    for i in range(LAYERS):
        a, b = f"blocks.{i}.", f"backbone.layers.{i}."
        copied[a + "mixer_norm.weight"] = state[b + "norm.weight"]
        for name in ("in_proj.weight", "out_proj.weight", "dt_bias", "A_log", "D", "norm.weight"):
            copied[a + "mixer." + name] = state[b + "mixer." + name]
        copied[a + "mixer.conv.weight"] = state[b + "mixer.conv1d.weight"][:, 0]
        copied[a + "mixer.conv.bias"] = state[b + "mixer.conv1d.bias"]
    ours.load_state_dict(copied)
    ids = torch.randint(0, V, (2, 37))
    with torch.no_grad():
        difference = (ours(ids).logits - theirs(ids).logits).abs().max()
    assert difference < 1e-4, float(difference)
