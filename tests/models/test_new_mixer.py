"""Who adds a mixer writes one file and one config: tests/models/new_mixer, written as CONTRIBUTING.md says, keeps the contract and joins
decoding, evaluation, initial states, the plan of memory and the export, and nothing else is told of it. (tests/parallel cuts it over ranks.)"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from evals.adapters.own import OwnAdapter
from evals.measures.position import position_curve
from models import mixers
from models.config import ModelConfig
from models.decode import Decoder, cast
from models.hub.export import write_folder
from models.lm import LanguageModel
from tests.hub.folders import checkpoint
from tests.mixers import NEW_MIXER, with_new_mixer
from tests.models import test_contract
from training.config.cli import checked, compose_config
from training.initial_state import InitialStates

# The contract's tests, whose `mixer` is the one below.
globals().update({name: test for name, test in vars(test_contract).items() if name.startswith("test_")})


@pytest.fixture(scope="module")
def mapping() -> Iterator[dict[str, Any]]:
    with with_new_mixer() as mapping:
        yield mapping


@pytest.fixture
def mixer(mapping: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    built = mixers.build(mapping, test_contract.D, 0)
    built.init_weights(0.2, 0)
    return built.eval()


def settings(mapping: dict[str, Any]) -> ModelConfig:
    both = {"new": mapping, "attention": {"type": "attention", "n_heads": 2}}
    return ModelConfig(vocab_size=269, d_model=32, n_layers=3, pattern=["new", "new", "attention"], mixers=both)


@pytest.fixture
def model(mapping: dict[str, Any]) -> LanguageModel:
    built = LanguageModel(settings(mapping))
    built.init_weights(0)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return built.eval()


def test_the_contract_is_tested_here_too() -> None:
    assert sum(name.startswith("test_") for name in globals()) > 15


def test_it_decodes(model: LanguageModel) -> None:
    ids = torch.randint(269, (2, 12))
    whole = model(ids).logits[:, 5:]
    decoder = Decoder(model, model(ids[:, :5], state=model.init_state(2)).state, 12)
    torch.testing.assert_close(torch.stack([decoder.step(token).clone() for token in ids[:, 5:].unbind(1)], 1), whole, atol=1e-5, rtol=1e-4)
    following = model(ids[:, :1], state=decoder.release()).logits
    torch.testing.assert_close(following, model(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1:], atol=1e-5, rtol=1e-4)
    in_fp32 = {name for name, parameter in cast(model, torch.bfloat16).named_parameters() if parameter.dtype == torch.float32}
    assert in_fp32 == {f"blocks.{layer}.mixer.gate_bias" for layer in (0, 1)}


def test_it_is_evaluated(model: LanguageModel) -> None:
    adapter, rows = OwnAdapter(model, None, "new", ""), torch.randint(269, (3, 40)).numpy()
    pieces, whole = (position_curve(adapter, rows, chunk=chunk)["nats_per_token"] for chunk in (7, 64))
    assert pieces == pytest.approx(whole, rel=1e-4)
    _, state = adapter.prefill(torch.from_numpy(rows), 16)
    memories = adapter.layer_states(state)
    assert [(s.layer, s.name, tuple(s.entries.shape)) for s in memories] == [(0, "h", (3, 1, 32)), (1, "h", (3, 1, 32))]
    emptied = adapter.replace_states(state, lambda layer, name, tensor: torch.zeros_like(tensor))
    assert all(not s.entries.any() for s in adapter.layer_states(emptied)) and emptied.layers[2] is state.layers[2]


@pytest.mark.parametrize("rows", [1, 4])
def test_its_sequences_start_from_other_states(model: LanguageModel, rows: int) -> None:
    ids = torch.randint(269, (rows, 9))
    for mode in ("pass", "random", "fitted"):
        initial = InitialStates(mode, drop=0.0)
        for _ in range(2):
            state = initial.before(model, 0, rows)
            initial.after(0, model(ids, state=state).state)
        state = initial.before(model, 0, rows, torch.full((rows, 9), 5))
        assert (
            state.layers[0].h_BD.any()
            and state.layers[0].h_BD.isfinite().all()
            and (state.layers[0].segment_B == 5).all()
            and state.layers[2].seen == 0
        )


def test_its_memory_is_planned(mapping: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    from train import train

    words = ["model=paragru", "+mixer@model.mixers.new=moving_average", "model.pattern=[new]", "model.mixers.new.gate_bias=2.0"]
    words += [
        "train.seq_len=64",
        "train.micro_batch=2",
        "train.global_batch=2",
        "model.vocab_size=512",
        "data.path=nowhere",
        "dry_run=true",
    ]
    assert train(checked(compose_config(words, extra=NEW_MIXER / "configs")), "") is None
    assert "memory of a rank" in capsys.readouterr().out


def test_it_is_exported(mapping: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = checkpoint(tmp_path / "run", settings(mapping)), tmp_path / "new_export"
    out.mkdir()
    assert write_folder(source, out, "fp32", 10**9, "apache-2.0").architecture == "EverywhenForCausalLM"
    code = (out / "modeling_everywhen.py").read_text()
    assert not any(word in code for word in ("from models", "def over_ranks", "def state_roles", "def tensors_of", "efficient_attention"))
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        exported = importlib.import_module("new_export.modeling_everywhen").EverywhenForCausalLM.from_pretrained(out).eval()
    finally:
        for name in [n for n in sys.modules if n.startswith("new_export")]:
            del sys.modules[name]
    ours = LanguageModel(settings(mapping))
    ours.load_state_dict({**load_file(source / "model.safetensors")})
    ids = torch.randint(1, 269, (2, 17))
    with torch.no_grad():
        torch.testing.assert_close(exported(ids).logits, ours(ids).logits, atol=1e-5, rtol=1e-4)
        written = exported.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert torch.equal(written, exported.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0, use_cache=False))


CONFIG = "from dataclasses import dataclass\n@dataclass\nclass Config:\n    def problems(self, d_model): return []\n"


@pytest.mark.parametrize(
    "name,text,words",
    [
        ("broken_syntax", "class Config\n", "models/mixers/broken_syntax.py is not Python: expected ':' in line 1."),
        (
            "broken_import",
            "import nowhere_to_be_found\n",
            "cannot be imported: ModuleNotFoundError: No module named 'nowhere_to_be_found'.",
        ),
        ("no_config", "class Mixer: ...\n", "must define a dataclass Config with a method problems(d_model)"),
        ("no_mixer", CONFIG, "must define a class Mixer(SequenceMixer)"),
        ("my-mixer", CONFIG, "rename models/mixers/my-mixer.py to letters, digits and underscores."),
    ],
)
def test_a_file_that_is_no_mixer_is_a_sentence(name: str, text: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(mixers, "__path__", [*mixers.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    config, problems = mixers.parse("a", {"type": name}, 32)
    sys.modules.pop(f"models.mixers.{name}", None)
    assert config is None and len(problems) == 1 and words in problems[0] and "\n" not in problems[0]
