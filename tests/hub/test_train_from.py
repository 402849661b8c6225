"""train.py model=hf:FOLDER: the folder's architecture and weights, the data's tokenizer checked, mistakes in a sentence."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from models.checkpoint import load_model
from models.config import ModelConfig
from models.hub.export import write_folder
from models.hub.importing import load_into
from models.lm import LanguageModel
from scripts.import_checkpoint import main as import_program
from tests.hub.test_custom_export import FAMILIES as CUSTOM
from tests.hub.test_native_export import FAMILIES, checkpoint
from training.config.checks import split_problems
from training.config.cli import checked, compose_config
from training.errors import UserError
from training.setup import model_config


@pytest.mark.parametrize("name", ["llama", "mamba2", "hybrid"])
def test_the_config_and_weights_are_the_folders(name: str, tmp_path: Path) -> None:
    settings = {**FAMILIES, **CUSTOM}[name]
    source, folder = checkpoint(tmp_path / "c", settings), tmp_path / "it's = here"
    folder.mkdir()
    write_folder(source, folder, "fp32", 10**9, "mit")
    config = checked(compose_config([f"model=hf:{folder}", "model.z_loss=0.5", "model.verify=false", "data.path=nowhere"]))
    config.parallel.sequence = 2
    assert split_problems(config) == []
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


def test_data_that_begin_documents_with_another_token_are_told_of(tmp_path: Path) -> None:
    from data.prepare import main as prepare
    from data.shards import ShardSet
    from data.tokenizer import byte_tokenizer
    from training.setup import _other_start

    folder = tmp_path / "hf"
    folder.mkdir()
    (tmp_path / "a.txt").write_text("some text " * 50)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "<|endoftext|>"}))
    (tmp_path / "copied").mkdir()
    tokenizer.save(str(tmp_path / "copied" / "tokenizer.json"))  # without what names its tokens
    told = []
    for source in (folder, tmp_path / "copied" / "tokenizer.json"):
        assert prepare([f"input={tmp_path / 'a.txt'}", f"out={tmp_path / source.stem}-shards", f"tokenizer={source}"]) == 0
        told.append(_other_start(folder, ShardSet(tmp_path / f"{source.stem}-shards", "train")))
    assert told[0] == "" and "begin with '<|endoftext|>'" in told[1] and f"tokenizer={folder}" in told[1]


def test_a_disk_that_is_full_ends_an_import_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """safetensors has an error of its own for it. A limit on the size of a file stands for the disk."""
    folder = tmp_path / "hf"
    folder.mkdir()
    write_folder(checkpoint(tmp_path / "c", FAMILIES["llama"]), folder, "fp32", 10**9, "mit")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        status = import_program([str(folder), str(tmp_path / "out"), "verify=false"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 2 and f"{tmp_path / 'out'} cannot be written: File too large" in capsys.readouterr().err
    assert not [path for path in tmp_path.iterdir() if path.name not in ("hf", "c")]


@pytest.mark.slow
def test_a_run_starts_from_an_exported_run(train: Callable[..., object], tmp_path: Path) -> None:
    first = train("one", "model=transformer", "train.steps=2")
    assert first.returncode == 0, first.stderr  # type: ignore[attr-defined]
    from models.checkpoint import find

    folder = tmp_path / "hf"
    folder.mkdir()
    write_folder(find(tmp_path / "one"), folder, "fp32", 10**9, "mit")
    second = train("two", f"model=hf:{folder}", "train.steps=1")
    assert second.returncode == 0, second.stderr  # type: ignore[attr-defined]
    assert "from the weights of" in second.stdout + second.stderr  # type: ignore[attr-defined]


def test_what_a_run_that_started_from_a_folder_keeps_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    write_folder(checkpoint(tmp_path / "c", FAMILIES["llama"]), folder, "fp32", 10**9, "mit")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "max_position_embeddings": 5000}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    source = checkpoint(tmp_path / "d", FAMILIES["llama"])
    (source / "run.json").write_text(json.dumps({"model": {"init_from": str(folder)}, "train": {"seq_len": 64}}))
    for out, length in (("e", 5000), ("f", 64)):
        (tmp_path / out).mkdir()
        write_folder(source, tmp_path / out, None, 10**9, "mit")
        assert json.loads((tmp_path / out / "config.json").read_text())["max_position_embeddings"] == length
        assert (tmp_path / out / "chat_template.jinja").exists() == (length == 5000)
        (folder / "config.json").unlink(missing_ok=True)  # gone when the second is written
