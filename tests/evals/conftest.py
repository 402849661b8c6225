"""Small random models with large enough weights that their predictions differ from token to token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data.tokenizer import byte_tokenizer, coder_of
from evals.adapters.hf import HFAdapter
from evals.adapters.own import OwnAdapter
from models.config import ModelConfig
from models.lm import LanguageModel

VOCABULARY = 320
HF = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "bos_token_id": None, "eos_token_id": None}


def loud(model: Any, std: float = 0.15) -> Any:
    """Weights large enough for argmaxes to vary."""
    generator = torch.Generator().manual_seed(3)
    for p in model.parameters():
        if p.ndim == 2 and min(p.shape) > 4:
            with torch.no_grad():
                p.copy_(torch.randn(p.shape, generator=generator) * std)
    return model.eval()


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, **HF
    )
    return loud(LlamaForCausalLM(config))


def mamba2() -> Any:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    torch.manual_seed(0)
    config = Mamba2Config(hidden_size=32, head_dim=16, num_heads=4, state_size=8, n_groups=1, chunk_size=16, pad_token_id=0, **HF)
    return loud(Mamba2ForCausalLM(config))


def own(pattern: str = "mga", d_model: int = 32, n_layers: int = 3) -> LanguageModel:
    mixers = {
        "m": {"type": "mamba2", "d_state": 8, "head_dim": 16},
        "g": {"type": "rnn", "n_heads": 2},
        "l": {"type": "rnn", "cell": "paralstm", "n_heads": 2},
        "a": {"type": "attention", "n_heads": 2},
    }
    model = LanguageModel(ModelConfig(vocab_size=VOCABULARY, d_model=d_model, n_layers=n_layers, pattern=list(pattern), mixers=mixers))
    model.init_weights(0)
    return loud(model, 0.25)


def own_adapter(pattern: str = "mga", **options: Any) -> OwnAdapter:
    return OwnAdapter(own(pattern, **options), coder_of(byte_tokenizer()), "own", "own")


@pytest.fixture(scope="session")
def adapters() -> dict[str, Any]:
    coder = coder_of(byte_tokenizer())
    return {
        "llama": HFAdapter(llama(), coder, "llama", "llama"),
        "mamba2": HFAdapter(mamba2(), coder, "mamba2", "mamba2"),
        "own": own_adapter(),
    }


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "llama"
    llama().save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder
