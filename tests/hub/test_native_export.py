"""Stock exports: the same numbers in a process that has only transformers, and one sentence for everything that cannot be exported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from models.config import ModelConfig
from models.hub.export import export, verify, write_folder
from models.hub.native import stock
from models.hub.native_delta import too_old
from models.hub.weights import Weights, parse_size
from scripts.export import main
from tests.conftest import run_program
from tests.hub.folders import checkpoint
from training.errors import UserError

ATTENTION = {"type": "attention", "n_heads": 6, "n_kv_heads": 2}
MAMBA = {"type": "mamba2", "d_state": 7, "head_dim": 12, "n_groups": 2, "chunk": 5}


def config(mixer: dict[str, Any], **values: Any) -> ModelConfig:
    return ModelConfig(**{"vocab_size": 269, "d_model": 48, "n_layers": 3, "d_ff": 72, "pattern": ["x"], "mixers": {"x": mixer}, **values})


FAMILIES = {
    "llama": config(ATTENTION),
    "llama_tied": config({**ATTENTION, "rope_theta": 500.0, "head_dim": 10}, tie_embeddings=True, norm_eps=1e-6),
    "mistral": config({**ATTENTION, "window": 9}),
    "qwen3": config({**ATTENTION, "qk_norm": True}),
    "mamba2": config(MAMBA, d_ff=0, tie_embeddings=True),
    "bamba": ModelConfig(
        vocab_size=269,
        d_model=48,
        n_layers=5,
        d_ff=72,
        pattern=["m", "m", "a"],
        mixers={"m": {**MAMBA, "n_groups": 1}, "a": {**ATTENTION, "rope_theta": 700.0}},
    ),
}
GDN = ModelConfig(
    vocab_size=269,
    d_model=48,
    n_layers=4,
    d_ff=72,
    pattern=["g", "g", "a"],
    mixers={
        "g": {"type": "delta", "n_heads": 4, "n_k_heads": 2, "head_dim": 10, "expand_v": 1.4},
        "a": {**ATTENTION, "head_dim": 10, "rope_fraction": 0.4, "qk_norm": True, "qk_norm_centred": True, "output_gate": True},
    },
    centred_norms=True,
)
OLMO = ModelConfig(
    vocab_size=269,
    d_model=48,
    n_layers=4,
    d_ff=72,
    pattern=["g", "g", "a"],
    mixers={
        "g": {"type": "delta", "n_heads": 4, "expand_v": 2.0, "head_dim": 9, "negative": True},
        "a": {**ATTENTION, "qk_norm": True, "qk_norm_over": "heads", "rope": False},
    },
    norm_after=["a"],
)
if not too_old("Qwen3_5ForCausalLM"):
    FAMILIES |= {
        "qwen3": GDN,
        "qwen3_attention": replace(GDN, pattern=["a"]),
        "olmo": OLMO,
        "olmo_rope": replace(OLMO, mixers={"g": {**OLMO.mixers["g"], "negative": False}, "a": {**OLMO.mixers["a"], "rope": True}}),
    }


def within(settings: ModelConfig, mixer: str = "", **values: Any) -> ModelConfig:
    """The config with other values, of one of its mixers if that is named."""
    if not mixer:
        return replace(settings, **values)
    return replace(settings, mixers={**settings.mixers, mixer: {**settings.mixers[mixer], **values}})


@pytest.mark.usefixtures("forked_checker")
def test_stock_classes_give_the_checkpoints_numbers(tmp_path: Path) -> None:
    pairs: list[tuple[Path, Path]] = []
    for name, settings in FAMILIES.items():
        source, out = checkpoint(tmp_path / "runs" / name, settings), tmp_path / "out" / name
        out.mkdir(parents=True)
        if not pairs:  # of sequences of letters: no text but those is read
            Tokenizer(models.WordLevel({"</s>": 0, "A": 1, "C": 2, "G": 3})).save(str(source / "tokenizer.json"))
        target = write_folder(source, out, "fp32", 50_000, "apache-2.0")
        assert target.architecture.lower().startswith(name.split("_")[0])
        assert (out / "model.safetensors.index.json").exists()
        pairs.append((source, out))
    verify(pairs)
    out = pairs[0][1]
    weights, own = Weights(out), load_file(pairs[0][0] / "model.safetensors")
    assert all(torch.equal(weights.tensor("model.layers.1.mlp.up_proj.weight"), own["blocks.1.mlp.up.weight"]) for _ in range(1))
    first = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]["model.layers.2.self_attn.q_proj.weight"]
    changed = load_file(out / first)
    changed["model.layers.2.self_attn.q_proj.weight"] = changed["model.layers.2.self_attn.q_proj.weight"].roll(1, 0)
    save_file(changed, out / first, metadata={"format": "pt"})
    with pytest.raises(UserError, match="logits differ"):
        verify(pairs[:1])


@pytest.mark.parametrize(
    "settings,reason",
    [
        (config(ATTENTION, d_ff=0), "no MLP"),
        (config(ATTENTION, learnable_residual=True), "learned scales"),
        (config({**ATTENTION, "rope": False}), "rotary"),
        (config({**ATTENTION, "qk_norm": True}, norm_eps=1e-6), "epsilon"),
        (config({**MAMBA, "norm_eps": 1e-6}, d_ff=0), "epsilon"),
        (config(MAMBA), "MLP beside"),
        (config({**MAMBA, "dt_limit_max": 0.1}, d_ff=0), "limited"),
        (config({"type": "rnn", "n_heads": 4}), "rnn"),
        (ModelConfig(vocab_size=9, d_model=48, pattern=["a", "m"], mixers={"a": ATTENTION, "m": MAMBA}), "groups"),
        (ModelConfig(vocab_size=9, d_model=48, pattern=["a", "m"], mixers={"a": {**ATTENTION, "window": 3}, "m": MAMBA}), "window"),
        (ModelConfig(vocab_size=9, d_model=48, pattern=["a", "m"], mixers={"a": ATTENTION, "m": {"type": "rnn"}}), "different mixers"),
        (config(ATTENTION, centred_norms=True), "above 1"),
        (config(ATTENTION, norm_after=["x"]), "behind the sublayers"),
        (config({**ATTENTION, "qk_norm": True, "qk_norm_over": "heads"}), "over all heads"),
        (config({"type": "delta"}), "no layer of attention"),
        (within(GDN, d_ff=0), "no MLP"),
        (within(GDN, centred_norms=False), "centred_norms"),
        (within(GDN, norm_eps=1e-6), "several epsilons"),
        (within(GDN, "g", norm_eps=1e-6), "another epsilon"),
        (within(GDN, "g", updates=2), "several times"),
        (within(GDN, "g", negative=True), "strengths to 2"),
        (within(GDN, "g", gate=False), "no gate"),
        (within(GDN, "a", qk_norm=False), "does not normalise"),
        (within(GDN, "a", qk_norm_centred=False), "qk_norm_centred"),
        (within(GDN, "a", output_gate=False), "no output gate"),
        (within(GDN, "a", qkv_bias=True), "biases"),
        (within(GDN, "a", window=5), "window"),
        (within(GDN, "a", rope=False), "no rotary"),
        (within(OLMO, norm_after=["g"]), "and of these alone"),
        (within(OLMO, "g", norm_eps=1e-6), "other than 1e-05"),
        (within(OLMO, "a", qk_norm_over="head"), "head by head"),
        (within(OLMO, "a", head_dim=10), "wide"),
        (within(OLMO, "a", rope=True, rope_fraction=0.5), "part of the heads"),
    ],
)
def test_a_near_miss_is_no_stock_class(settings: ModelConfig, reason: str) -> None:
    found, why = stock(settings)
    assert found is None and reason in why


def test_bad_input_is_a_sentence_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = checkpoint(tmp_path / "c", FAMILIES["llama"])
    (tmp_path / "taken").mkdir()
    assert main([str(source), str(tmp_path / "taken")]) == 2 and "exists already" in capsys.readouterr().err
    for size in ("many", "0", "-3GB"):
        with pytest.raises(UserError, match="shard size"):
            parse_size(size)
    with pytest.raises(UserError, match="dtype"):
        export(source, tmp_path / "o", dtype="fp8")
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, "norm.weight": torch.ones(47)}, source / "model.safetensors")
    with pytest.raises(UserError, match="another shape, the first is norm.weight"):
        export(source, tmp_path / "o")
    (source / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot be read"):
        export(source, tmp_path / "o")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "taken"]


@pytest.mark.usefixtures("forked_checker")
def test_a_relative_folder_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint(tmp_path / "c", FAMILIES["llama"])
    monkeypatch.chdir(tmp_path)
    assert main(["c", "out/o"]) == 0, capsys.readouterr().err
    assert (tmp_path / "out/o/config.json").is_file() and [p.name for p in (tmp_path / "out").iterdir()] == ["o"]


def test_unsafe_folders_are_refused(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "c", FAMILIES["llama"])
    for file in ("../c2.safetensors", "/etc/passwd", "sub/x.safetensors"):
        folder = tmp_path / "escape"
        folder.mkdir(exist_ok=True)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"norm.weight": file}}))
        with pytest.raises(UserError, match="outside its folder"):
            Weights(folder)
    link = tmp_path / "link"
    link.mkdir()
    (link / "a.safetensors").symlink_to(source / "model.safetensors")
    (link / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"norm.weight": "a.safetensors"}}))
    with pytest.raises(UserError, match="outside its folder"):
        Weights(link)
    (source / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(UserError, match="holds a pickle"):
        export(source, tmp_path / "o")
    for command in (["-m", "scripts.generate", f"checkpoint={source}"], ["-m", "evals.run", f"checkpoint={source}", "suite=quick"]):
        done = run_program(command)
        assert done.returncode == 2 and "holds a pickle" in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_evaluation_refuses_what_would_have_to_be_unpickled_or_leads_away(kind: str, tmp_path: Path) -> None:
    from evals.adapters.load import load_adapter

    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"wte.weight": "../../secret.safetensors"}}))
    with pytest.raises(UserError, match="outside its folder"):
        load_adapter(str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(UserError, match="holds a pickle"):
        load_adapter(str(tmp_path))
