"""train.py model=hf:FOLDER: the folder's architecture and weights, the data's tokenizer checked, mistakes in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from models.config import ModelConfig
from models.hub.export import write_folder
from models.hub.importing import load_into
from models.lm import LanguageModel
from tests.hub.test_custom_export import FAMILIES as CUSTOM
from tests.hub.test_native_export import FAMILIES, checkpoint
from training.checkpoint import load_model
from training.cli import checked, compose_config
from training.errors import UserError
from training.setup import model_config


@pytest.mark.parametrize("name", ["llama", "mamba2", "hybrid"])
def test_the_config_and_weights_are_the_folders(name: str, tmp_path: Path) -> None:
    settings = {**FAMILIES, **CUSTOM}[name]
    source, folder = checkpoint(tmp_path / "c", settings), tmp_path / "it's = here"
    folder.mkdir()
    write_folder(source, folder, "fp32", 10**9, "mit")
    config = checked(compose_config([f"model=hf:{folder}", "model.z_loss=0.5", "data.path=nowhere"]))
    found, _ = model_config(config, None)
    assert isinstance(found, ModelConfig) and found.z_loss == 0.5
    assert (found.d_model, found.n_layers, found.mlp_width, found.vocab_size) == (48, settings.n_layers, settings.mlp_width, 269)
    model = LanguageModel(found).eval()
    load_into(folder, model)
    ids = torch.randint(0, 269, (2, 17))
    with torch.no_grad():
        want = load_model(source)[0](ids).logits
        assert torch.equal(model(ids).logits, want) and torch.equal(load_model(folder)[0](ids).logits, want)


def test_mistakes_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no config.json"):
        checked(compose_config([f"model=hf:{tmp_path}/none", "data.path=nowhere"]))
    source, folder = checkpoint(tmp_path / "c", FAMILIES["llama"]), tmp_path / "hf"
    folder.mkdir()
    write_folder(source, folder, "fp32", 10**9, "mit")
    from data.tokenizer import train_bpe

    with pytest.raises(UserError, match="another tokenizer"):
        load_into(folder, LanguageModel(FAMILIES["llama"]), train_bpe(["some text"], 260))


@pytest.mark.slow
def test_a_run_starts_from_an_exported_run(train: Callable[..., object], tmp_path: Path) -> None:
    first = train("one", "model=transformer", "train.steps=2")
    assert first.returncode == 0, first.stderr  # type: ignore[attr-defined]
    from training.checkpoint import find

    folder = tmp_path / "hf"
    folder.mkdir()
    write_folder(find(tmp_path / "one"), folder, "fp32", 10**9, "mit")
    second = train("two", f"model=hf:{folder}", "train.steps=1")
    assert second.returncode == 0, second.stderr  # type: ignore[attr-defined]
    assert "from the weights of" in second.stdout + second.stderr  # type: ignore[attr-defined]
