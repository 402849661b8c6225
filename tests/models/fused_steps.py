"""Decodes a few tokens with fused kernels and with the model's forward; `TRITON_INTERPRET=1 python tests/models/fused_steps.py`, or on a GPU."""

from __future__ import annotations

from typing import Any

import torch

from models.config import ModelConfig
from models.decode import Decoder, cast
from models.lm import LanguageModel

GRU: dict[str, Any] = {"type": "rnn", "n_heads": 4}
MAMBA: dict[str, Any] = {"type": "mamba2", "d_state": 6, "head_dim": 12, "chunk": 5}
DELTA: dict[str, Any] = {"type": "delta", "n_heads": 3}
ATTENTION: dict[str, Any] = {"type": "attention", "n_heads": 4, "n_kv_heads": 2}
CASES: dict[str, dict[str, Any]] = {
    "gru": {"mixers": {"a": GRU}, "learnable_residual": True},
    "bare lstm": {"mixers": {"a": {**GRU, "cell": "paralstm", "d_conv": 0, "gate": False, "norm": False, "expand": 1.5}}, "d_ff": 0},
    "mingru": {"mixers": {"a": {**GRU, "cell": "mingru", "recurrent_bound": "tanh"}}},
    "dense": {  # heads of 12 and of a block each, resets before the product
        "mixers": {
            "a": {**GRU, "cell": "dense_lstm", "n_heads": 2, "head_size": 12},
            "b": {**GRU, "cell": "dense_gru_before", "head_size": 12, "expand": 1.0, "d_conv": 0},
        }
    },
    "slstm": {"mixers": {"a": {**GRU, "cell": "slstm", "n_heads": 3, "head_size": 16}}},
    "mamba2": {"mixers": {"a": MAMBA}, "d_ff": 0},
    "limited": {"mixers": {"a": {**MAMBA, "dt_limit_min": 0.3, "dt_limit_max": 0.9}}, "tie_embeddings": True},
    "positions": {  # biases, partial and scaled rotary positions
        "mixers": {
            "a": {**ATTENTION, "qkv_bias": True, "o_bias": True, "rope_fraction": 0.5},
            "b": {**ATTENTION, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}},
        },
        "learnable_residual": True,
    },
    "delta": {
        "mixers": {
            "a": {**DELTA, "n_heads": 2, "n_k_heads": 1, "expand_v": 0.5, "updates": 2, "negative": True, "d_conv": 3},
            "b": {**DELTA, "n_heads": 2, "head_dim": 9, "gate": False, "output_gate": False},
        },
        "learnable_residual": True,
    },
    "gdn hybrid": {
        "mixers": {"a": DELTA, "b": {**ATTENTION, **{f"qk_norm{key}": True for key in ("", "_centred")}, "output_gate": True}},
        "centred_norms": True,
    },
    "over heads": {"mixers": {"a": {**ATTENTION, "qk_norm": True, "qk_norm_over": "heads"}}},
    "hybrid": {
        "mixers": {"a": GRU, "b": MAMBA, "c": ATTENTION, "d": {**ATTENTION, "window": 5, "qk_norm": True}},
        "learnable_residual": True,
    },
}


def places(decoder: Decoder) -> list[int]:
    """Where the matrix states lie, which are written over."""
    states = [getattr(part, name) for part in decoder.state.layers for name in ("ssm_BHPN", "delta_BHVK") if hasattr(part, name)]
    return [state.data_ptr() for state in states]


def check(name: str, device: str, low: bool) -> None:
    torch.manual_seed(0)
    limit = 0.1 if low else 2e-5 if device == "cpu" else 1e-4
    settings = {"d_ff": 60, **CASES[name]}
    names = list(settings["mixers"])
    with torch.device(device):
        model = LanguageModel(ModelConfig(vocab_size=67, d_model=48, n_layers=len(names), pattern=names, **settings)).eval()
    model.init_weights(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.15 * torch.randn_like(p))
    if low:
        cast(model, torch.bfloat16)
    ids = torch.randint(67, (2, 9), device=device)
    with torch.no_grad():
        state = model(ids, state=model.init_state(2)).state
        fused = Decoder(model, state, 30, fused=True)
        plain = Decoder(model, state, 30, fused=False)  # the model's forward, writing over its own states
        addresses = places(plain)
        assert fused.fused and not plain.fused, name
        for token in torch.randint(67, (2, 2), device=device):
            expected = model(token[:, None], state=state)
            state = expected.state
            gap = float((fused.step(token).float() - expected.logits[:, -1].float()).abs().max())
            assert gap < limit, (name, low, gap)
            gap = float((plain.step(token).float() - expected.logits[:, -1].float()).abs().max())
            assert gap < limit, (name, low, "plain", gap)
        assert addresses == places(plain), name
        token = torch.randint(67, (2, 2), device=device)
        for decoder in (plain, fused):
            gap = float((model(token, state=decoder.release()).logits - model(token, state=state).logits).float().abs().max())
            assert gap < limit, (name, low, "released", gap)
    print(name, "bf16" if low else "fp32", f"{gap:.1e}", flush=True)


if __name__ == "__main__":
    where = "cuda" if torch.cuda.is_available() else "cpu"
    if where == "cpu":
        from tests.kernels.interpreter import patch_once

        patch_once()
    for case in CASES:
        check(case, where, False)
    check("gru", where, True)
    check("mamba2", where, True)
    check("delta", where, True)
    check("dense", where, True)
    print("ok")
