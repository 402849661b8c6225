"""The export of a model that is no stock class: its config, the names of its weights, and its code."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import torch

from models import depth, mixers
from models.config import ModelConfig
from models.hub.flatten import modeling
from models.hub.stock import Stock
from models.init import roles
from models.lm import LanguageModel

RULES = [
    (r"embedding\.weight", "model.embed_tokens.weight"),
    (r"head\.weight", "lm_head.weight"),
    (r"norm\.weight", "model.norm.weight"),
    (r"blocks\.(.*)", r"model.layers.\1"),
    (r"depth\.(.*)", r"model.depth.\1"),
]


def custom(config: ModelConfig, max_positions: int) -> Stock:
    """The project's own class for this model."""
    used = {n: config.mixers[n] for n in dict.fromkeys(config.mixer_name(i) for i in range(config.n_layers))}
    settings: dict[str, Any] = {n: mixers.to_dict(mixers.parse(n, m, config.d_model)[0], m["type"]) for n, m in used.items()}
    heads = [m["n_heads"] for m in settings.values() if m.get("type") == "attention"]
    values: dict[str, Any] = {
        "model_type": "everywhen",
        "architectures": ["EverywhenForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_everywhen.EverywhenConfig",
            "AutoModel": "modeling_everywhen.EverywhenModel",
            "AutoModelForCausalLM": "modeling_everywhen.EverywhenForCausalLM",
        },
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": heads[0] if heads else 1,
        "intermediate_size": config.mlp_width,
        "rms_norm_eps": config.norm_eps,
        "pattern": list(config.pattern[: config.n_layers]),  # as its mixers, those that are there
        "mixers": settings,
        "learnable_residual": config.learnable_residual,
        "centred_norms": config.centred_norms,
        "norm_after": list(config.norm_after),
        "max_position_embeddings": max_positions,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
    }
    if config.depth:
        values["depth"] = {"type": config.depth["type"], **dataclasses.asdict(depth.KINDS.parse(config.depth, config.n_layers)[0])}
    return Stock("EverywhenForCausalLM", values, RULES)


def write_code(config: ModelConfig, out: Path) -> None:
    """modeling_everywhen.py and configuration_everywhen.py."""
    used = [config.mixers[n] for n in dict.fromkeys(config.mixer_name(i) for i in range(config.n_layers))]
    types = sorted({m["type"] for m in used})
    parsed = [mixers.parse("?", m, config.d_model)[0] for m in used]
    cells = sorted({c.cell for c in parsed if hasattr(c, "cell")})
    with torch.device("meta"):
        model = LanguageModel(config)
    fp32_parameters = sorted({f"mixer.{n.rsplit('.', 1)[-1]}" for n, p in model.named_parameters() if roles(p).get("keep_fp32")})
    code = modeling(types, cells, fp32_parameters, config.depth.get("type"))
    (out / "modeling_everywhen.py").write_text(code)
    # transformers finds the class of a model by that of its config: with another modeling file it must be another one.
    mark = f"# goes with the modeling_everywhen.py of sha256 {hashlib.sha256(code.encode()).hexdigest()[:16]}\n"
    (out / "configuration_everywhen.py").write_text(Path(__file__).with_name("configuration_everywhen.py").read_text() + mark)
