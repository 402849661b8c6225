"""Import: transformers' own folders give their own logits, a round trip gives back every bit, and what does not fit is one sentence."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.tokenizer import byte_tokenizer
from models.checkpoint import load_model, read_config
from models.generate import generate
from models.hub.export import write_folder
from models.hub.importing import end_ids, import_folder, read_stock
from scripts.export import main as export
from scripts.import_checkpoint import main
from tests.hub.stock_folders import stock_folder
from tests.hub.test_custom_export import FAMILIES as CUSTOM
from tests.hub.test_native_export import FAMILIES, checkpoint
from training.errors import UserError


def test_a_published_kind_of_llama_is_taken_over_whole(tmp_path: Path) -> None:
    """Tied embeddings, grouped queries, a large rotary base, its own end of text: logits far out, greedy text, and the way back."""
    import transformers as t

    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 100_000.0}
    theirs = t.LlamaForCausalLM(
        t.LlamaConfig(
            vocab_size=269, hidden_size=72, num_hidden_layers=3, intermediate_size=100, num_attention_heads=9, num_key_value_heads=3, head_dim=8,
            initializer_range=0.3, rms_norm_eps=1e-5, tie_word_embeddings=True, max_position_embeddings=4096, rope_parameters=rope,
            bos_token_id=1, eos_token_id=2, pad_token_id=2,
        )
    ).eval()  # fmt: skip
    folder, back = tmp_path / "hf", tmp_path / "back"
    theirs.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7], "bos_token_id": 1}))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "\x02"}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    ours = load_model(folder)[0]
    ids = torch.randint(0, 269, (1, 1500))
    with torch.no_grad():
        found, wanted = ours(ids).logits, theirs(ids).logits
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()  # with frequencies rounded in another way: 5e-5
    prompt = ids[:, :9]
    text = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=64, min_new_tokens=64, eos_token_id=None
    )
    assert torch.equal(generate(ours, prompt, 64, temperature=0), text)
    assert end_ids(import_folder(folder, back)) == [2, 7]
    (tmp_path / "out").mkdir()
    write_folder(back, tmp_path / "out", "fp32", 10**9, "apache-2.0")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert before.keys() == after.keys() and all(before[k].numpy().tobytes() == after[k].numpy().tobytes() for k in before)
    one, two = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "out"))
    assert not [(key, value, one.get(key)) for key, value in two.items() if one.get(key) != value]
    for name in ("generation_config.json", "tokenizer_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (folder / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    card = (tmp_path / "out/README.md").read_text()
    assert "imported" in card and "end-of-text" not in card and "base model" not in card


@pytest.mark.parametrize("name", [*FAMILIES, *CUSTOM])
def test_the_round_trip_is_exact(name: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "c", {**FAMILIES, **CUSTOM}[name])
    (tmp_path / "hf").mkdir()
    write_folder(source, tmp_path / "hf", "fp32", 40_000, "mit")
    back = import_folder(tmp_path / "hf", tmp_path / "back")
    before, after = load_file(source / "model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    (tmp_path / "again").mkdir()
    write_folder(back, tmp_path / "again", "fp32", 40_000, "mit")
    one, two = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("hf", "again"))
    assert {k: v for k, v in one.items() if not k.startswith(("time_step", "initializer"))}.items() <= two.items()
    model, _, _ = load_model(back)
    ids = torch.randint(0, read_config(source).vocab_size, (1, 19))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, load_model(source)[0](ids).logits)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_written_nowhere(bad: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By import and export alike, before anything is compared; and weights that only fp16 cannot hold by an export in fp16."""
    source = checkpoint(tmp_path / "c", FAMILIES["llama"])
    (tmp_path / "hf").mkdir()
    write_folder(source, tmp_path / "hf", "fp32", 10**9, "mit")
    said = {
        "bad": r"The tensor \S+ would hold values that are not finite, so nothing is written; take another checkpoint",
        "wide": "than fp16",
    }
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, "norm.weight": tensors["norm.weight"] + 1e6}, source / "model.safetensors")
    assert export([str(source), str(tmp_path / "out"), "--dtype=fp16"]) == 2
    assert re.search(f"{said['bad']}, or a dtype of a wider range {said['wide']}", capsys.readouterr().err)
    for folder in (source, tmp_path / "hf"):
        tensors = load_file(folder / "model.safetensors")
        next(iter(tensors.values())).view(-1)[-1] = bad
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for program, words in (
        (main, [str(tmp_path / "hf"), str(tmp_path / "out"), "verify=false"]),
        (export, [str(source), str(tmp_path / "out")]),
    ):
        assert program(words) == 2
        assert re.fullmatch(rf"error: {said['bad']}\.\n", capsys.readouterr().err), program.__module__
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "hf"]


def test_what_does_not_fit_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "hf"
    stock_folder("llama", folder)
    good, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")

    def refused(part: str, **changes: Any) -> None:
        capsys.readouterr()
        (folder / "config.json").write_text(json.dumps({**good, **changes}))
        assert main([str(folder), str(tmp_path / "o")]) == 2
        error = capsys.readouterr().err
        assert part in error and error.count("\n") == 1, error
        assert not (tmp_path / "o").exists()

    refused("hidden_act", hidden_act="gelu")
    refused("q_proj.bias", attention_bias=True)
    refused("mlp_bias", mlp_bias=True)
    refused("low_freq_factor", rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0})
    refused("longrope", rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0], "long_factor": [1.0]})
    refused("partial", rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5})
    refused("quantised", quantization_config={"quant_method": "fp8"})
    refused("rms_norm_eps", rms_norm_eps="small")
    refused("num_hidden_layers is -1", num_hidden_layers=-1)
    refused("is a ['llama'] model", model_type=["llama"])
    refused("is a gpt2 model", model_type="gpt2")
    refused("has shape", intermediate_size=49)
    refused("lacks the tensor", num_hidden_layers=4)
    refused("no place for", num_hidden_layers=2)
    (folder / "config.json").write_text(json.dumps(good))
    save_file({k: v * float("nan") if "q_proj" in k else v for k, v in tensors.items()}, folder / "model.safetensors")
    refused("not finite")
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({k: v for k, v in good.items() if k != "vocab_size"}))
    with pytest.raises(UserError, match="vocab_size"):
        read_stock(folder)
    save_file({k: v for k, v in tensors.items() if k != "model.norm.weight"}, folder / "model.safetensors")
    refused("lacks the tensor model.norm.weight")
    (folder / "x.pkl").write_bytes(b"")
    refused("pickle")
