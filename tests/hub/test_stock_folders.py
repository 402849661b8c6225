"""Stock folders of every family that is read, small and otherwise as published: their own logits in whole and in pieces, back as the same
class with the same bytes; and a reading that is wrong is found by the comparison with transformers' own class."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.config import ModelConfig
from models.decode import Decoder
from models.generate import generate
from models.hub import importing, stock_config
from models.hub.compare import compare
from models.hub.export import verify, write_folder
from models.hub.importing import import_folder, read_stock, resolved
from models.hub.native import stock
from models.lm import LanguageModel
from models.mixers import attention
from scripts.import_checkpoint import main
from tests.hub import test_native_export
from tests.hub.stock_folders import STOCK, stock_folder, stock_model
from training.errors import UserError


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    config, tensors = read_stock(folder)
    model = LanguageModel(config).eval()
    model.load_state_dict(tensors, strict=False)
    with torch.no_grad():
        whole = model(ids).logits
        if "dynamic" not in str(config.mixers):  # whose angles follow from what is read at once
            first = model(ids[:, :50], state=model.init_state(ids.shape[0]))
            rest = model(ids[:, 50:], state=first.state)
            torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, atol=1e-4, rtol=1e-4)
    assert whole is not None
    return whole


@pytest.mark.parametrize("name", STOCK)
def test_a_stock_folder_gives_its_own_logits(name: str, tmp_path: Path) -> None:
    theirs = stock_model(name)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    ids = torch.randint(0, 101, (2, 111))
    with torch.no_grad():
        assert (logits(tmp_path, ids) - theirs(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["llama_dynamic", "llama_yarn", "qwen2_window", "qwen3_window", "bamba_scaled"])
def test_greedy_text_is_transformers_beyond_the_borders(name: str, tmp_path: Path) -> None:
    """Token by token, with the cache of a session and with one of fixed size, as graphs of a step have."""
    theirs = stock_model(name)
    theirs.save_pretrained(tmp_path)
    config, tensors = read_stock(tmp_path)
    model = LanguageModel(config).eval()
    model.load_state_dict(tensors, strict=False)
    prompt = torch.randint(0, 101, (1, 60), generator=torch.Generator().manual_seed(1))
    text = theirs.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=30,
        min_new_tokens=30,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert torch.equal(generate(model, prompt, 30, temperature=0), text)
    with torch.no_grad():
        decoder = Decoder(model, model(prompt, state=model.init_state(1)).state, 100, fused=False)
        for token, following in zip(text[0, 60:], text[0, 61:]):
            assert int(decoder.step(token[None]).argmax()) == int(following)


def test_dynamic_positions_are_not_split_over_ranks() -> None:
    settings = {"n_heads": 4, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8}}
    assert "dynamic" in attention.Mixer(attention.Config(**settings), 32, 0).why_not_split()  # type: ignore[arg-type]


@pytest.mark.usefixtures("forked_checker")
def test_every_family_goes_back_as_its_class_with_the_same_bytes(tmp_path: Path) -> None:
    pairs = []
    for name, (kind, _) in STOCK.items():
        if name in ("mamba2", "mistral_full"):  # limited step sizes are no stock class that is written, Mistral without a window is a Llama
            continue
        folder, back, out = (tmp_path / part / name for part in ("hf", "back", "out"))
        stock_model(name).to(torch.bfloat16).save_pretrained(folder)
        if name == "llama3":  # what changes the text that generate writes, and not what the model is
            settings = {"repetition_penalty": 1.7, "num_beams": 2, "eos_token_id": [2, 7], "pad_token_id": 0, "suppress_tokens": [3]}
            (folder / "generation_config.json").write_text(json.dumps(settings))
            (folder / "chat_template.jinja").write_text("{{ messages }}")
        import_folder(folder, back)
        out.mkdir(parents=True)
        assert write_folder(back, out, None, 10**9, "mit").architecture == f"{kind}ForCausalLM"
        one, two = (load_file(f / "model.safetensors") for f in (folder, out))
        if name == "olmo_hybrid_bare":  # transformers cuts its convolutions into thirds, whatever is in them
            one, two = with_convolutions_joined(one), with_convolutions_joined(two)
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) and one[k].dtype == two[k].dtype for k in one), name
        before, after = (json.loads((f / "config.json").read_text()) for f in (folder, out))
        wrong = {
            k: (v, after[k]) for k, v in before.items() if k in after and k not in ("hidden_act", "max_window_layers") and after[k] != v
        }
        wrong.pop("initializer_range", None)
        assert not wrong and after["dtype"] == "bfloat16", (name, wrong)
        assert {stat.S_IMODE(path.stat().st_mode) for path in out.rglob("*")} == {0o644}
        kept = [n for n in ("generation_config.json", "chat_template.jinja") if (folder / n).exists()]
        assert all((folder / n).read_bytes() == (out / n).read_bytes() for n in kept), name
        card = (out / "README.md").read_text()
        assert "torch.tensor([[1, 2, 3]])" in card and "okenizer" not in card
        if name in ("llama3", "ministral", "qwen2_window", "smollm3_window", "bamba_scaled"):
            pairs.append((back, out))  # a few, as transformers takes its time; the rest by their config and bytes
    verify(pairs)


def with_convolutions_joined(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = sorted(n for n in tensors if ".q_conv1d." in n)
    joined = {n: torch.cat([tensors[n.replace("q_conv1d", f"{kind}_conv1d")] for kind in "qkv"]) for n in names}
    return {**{n: t for n, t in tensors.items() if "_conv1d." not in n}, **joined}


WRONG: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "layer types ignored": ("ministral", {"pattern": ["swa"]}, {}),
    "a window ignored": ("mistral", {}, {"window": 0}),
    "a window one token longer": ("mistral", {}, {"window": 10}),
    "scaling ignored": ("llama3", {}, {"rope_scaling": {}}),
    "linear scaling ignored": ("llama_linear", {}, {"rope_scaling": {}}),
    "dynamic scaling ignored": ("llama_dynamic", {}, {"rope_scaling": {}}),
    "a factor of yarn ignored": (
        "llama_yarn_scaled",
        {},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    ),
    "another theta": ("bamba", {}, {"rope_theta": 10000.0}),
    "partial positions ignored": ("bamba", {}, {"rope_fraction": 1.0}),
    "an epsilon of QK-norm": ("qwen3", {}, {"qk_norm_eps": 1e-2}),
    "gains above 1 ignored": ("qwen3_5", {"centred_norms": False}, {}),
    "gains of queries above 1 ignored": ("qwen3_5", {}, {"qk_norm_centred": False}),
    "norms put before their sublayers": ("olmo_hybrid", {"norm_after": []}, {}),
    "layers without positions ignored": ("smollm3", {"pattern": ["attention"]}, {}),
}


@pytest.mark.parametrize("what", [what for what, (name, *_) in WRONG.items() if name in STOCK])
def test_a_wrong_reading_is_refused(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    name, values, mixer = WRONG[what]
    folder = stock_folder(name, tmp_path / "hf")
    read = importing.read_stock_config

    def misread(path: Path) -> ModelConfig:
        right = read(path).to_dict()
        mixers = {n: {**m, **mixer} if m["type"] == "attention" else m for n, m in right["mixers"].items()}
        return ModelConfig.from_dict({**right, **values, "mixers": mixers})

    monkeypatch.setattr(importing, "read_stock_config", misread)
    capsys.readouterr()
    assert main([str(folder), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "our logits differ" in error and error.count("\n") == 1 and [p.name for p in tmp_path.iterdir()] == ["hf"], error
    assert main([str(folder), str(tmp_path / "out"), "verify=false"]) == 0
    assert "NOT COMPARED" in capsys.readouterr().out


def test_windows_and_positions_too_long_to_be_tried_are_made_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.hub.compare.WORK", 0.0)
    for name, wrong in (("mistral", {"window": 0}), ("llama_dynamic", {"rope_scaling": {}})):
        folder = stock_folder(name, tmp_path / name)
        values = json.loads((folder / "config.json").read_text())
        values.update({"sliding_window": 5000} if name == "mistral" else {"max_position_embeddings": 5000})
        (folder / "config.json").write_text(json.dumps(values))
        config, tensors = read_stock(folder)
        mixers = {n: {**m, **wrong} for n, m in config.mixers.items()}
        with pytest.raises(UserError, match="our logits differ"):
            compare(folder, ModelConfig.from_dict({**config.to_dict(), "mixers": mixers}), tensors)


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("name", ["llama_linear", "llama3", "bamba_scaled", "llama_yarn"])
def test_rotary_positions_are_found_in_either_place(name: str, old: bool, tmp_path: Path) -> None:
    """rope_scaling and rope_theta beside each other, as folders of older releases have them, and an empty rope_parameters before them."""
    folder = stock_folder(name, tmp_path / "hf")
    ids = torch.randint(0, 101, (1, 99))
    wanted = logits(folder, ids)
    values = json.loads((folder / "config.json").read_text())
    rope = values.pop("rope_parameters")
    values |= {
        "rope_theta": rope.pop("rope_theta"),
        "rope_scaling": {"type" if old and k == "rope_type" else k: v for k, v in rope.items()},
    }
    if not old:
        values["rope_parameters"] = {"rope_type": "default"}
    (folder / "config.json").write_text(json.dumps(values))
    assert torch.equal(logits(folder, ids), wanted)


def test_an_older_transformers_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from models.hub import native_delta

    (tmp_path / "hf").mkdir()
    sizes = dict.fromkeys(stock_config.KINDS["qwen3_5_text"], 4) | {"model_type": "qwen3_5_text", "layer_types": ["full_attention"] * 4}
    (tmp_path / "hf/config.json").write_text(json.dumps(sizes))
    monkeypatch.setattr(native_delta, "version", lambda package: "5.17.0")
    assert main([str(tmp_path / "hf"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "Qwen3_5ForCausalLM needs transformers 5.24 or later, and 5.17.0 is installed" in error and error.count("\n") == 1
    (tmp_path / "checkpoint").mkdir()
    settings = test_native_export.GDN
    assert stock(settings) == (None, "Qwen3_5ForCausalLM needs transformers 5.24 or later, and 5.17.0 is installed")


@pytest.mark.skipif("olmo_hybrid" not in STOCK, reason="needs transformers 5.24")
def test_files_may_have_the_names_of_olmo_hybrids_parameters(tmp_path: Path) -> None:
    folder = stock_folder("olmo_hybrid", tmp_path / "hf")
    wanted = read_stock(folder, verify=False)[1]
    tensors = {
        n.replace("feedforward_layer_norm", "post_attention_layernorm"): t for n, t in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in read_stock(folder, verify=False)[1].items())


def test_layer_types_of_mistral_are_taken(tmp_path: Path) -> None:
    folder = stock_folder("ministral", tmp_path / "hf")
    ids = torch.randint(0, 101, (1, 99))
    wanted = logits(folder, ids)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "model_type": "mistral", "architectures": ["MistralForCausalLM"]}))
    assert torch.equal(logits(folder, ids), wanted)


def test_buffers_and_heads_in_the_file(tmp_path: Path) -> None:
    folder = stock_folder("qwen3", tmp_path / "hf")
    path, tensors = folder / "model.safetensors", load_file(folder / "model.safetensors")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3), "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file({**tensors, **extra}, path, metadata={"format": "pt"})
    read_stock(folder)
    save_file({**tensors, "lm_head.weight": extra["lm_head.weight"] + 1}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="ties it to the embedding"):
        read_stock(folder)


def test_what_goes_without_saying_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = stock_folder("llama", tmp_path / "hf")
    assert main([str(folder), str(tmp_path / "a")]) == 0
    assert "agree" in (told := capsys.readouterr()).out and "holds no tokenizer.json, so the model takes token ids" in told.err
    (folder / "tokenizer.model").write_bytes(b"sentencepiece")
    assert main([str(folder), str(tmp_path / "b")]) == 0
    assert "holds a tokenizer.model and no tokenizer.json" in capsys.readouterr().err
    assert (tmp_path / "b/tokenizer.model").is_file()
    from models.checkpoint import load_model

    with pytest.raises(UserError, match="AutoTokenizer.from_pretrained"):
        load_model(folder)
    monkeypatch.setattr(
        Path, "read_text", lambda path, *a, **k: "MemAvailable: 1 kB" if str(path) == "/proc/meminfo" else open(path).read()
    )
    assert main([str(folder), str(tmp_path / "c")]) == 2
    assert "verify=false" in capsys.readouterr().err


def test_training_takes_the_comparison_as_a_key(tmp_path: Path) -> None:
    folder = stock_folder("llama", tmp_path / "hf")
    assert resolved({"init_from": str(folder), "verify": False, "z_loss": 0.1})["n_layers"] == 3
    with pytest.raises(UserError, match="true or false"):
        resolved({"init_from": str(folder), "verify": "maybe"})
