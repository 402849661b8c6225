"""Checkpoint folders for the tests of export and import."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from data.tokenizer import byte_tokenizer
from models.config import ModelConfig
from models.lm import LanguageModel


def checkpoint(folder: Path, settings: ModelConfig) -> Path:
    """A checkpoint whose predictions differ from token to token."""
    torch.manual_seed(0)
    model = LanguageModel(settings)
    model.init_weights(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(0.15 * torch.randn_like(p)) if "A_log" not in name else None
    folder.mkdir(parents=True)
    tensors = {k: v for k, v in model.state_dict().items() if not (settings.tie_embeddings and k == "head.weight")}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(settings.to_dict()))
    (folder / "tokenizer.json").write_text(byte_tokenizer().to_str())
    return folder
