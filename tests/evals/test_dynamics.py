"""Recurrences as dynamical systems: outputs rebuilt from (Lambda, B, C), and memories that were planted are found."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.tokenizer import byte_tokenizer
from evals import dynamics as program
from evals.adapters.own import OwnAdapter
from evals.dynamics import dynamics
from evals.measures.dynamics import memory_length, probed
from models import mixers
from models.config import ModelConfig
from models.lm import LanguageModel
from tests.evals.conftest import own
from tests.mixers import mixer_configs

D = 32
CONFIGS = mixer_configs()
LINEAR = (
    "attention", "swa", "mamba2", "gated_deltanet", "deltanet", "deltaproduct", "mingru", "minlstm", "aaren", "jrt", "s4d", "s5", "lssl", "plstm",
    "miras",
)  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "mamba2": {"type": "mamba2", "d_state": 8, "head_dim": 16, "n_groups": 2},
    "delta": {"type": "delta", "n_heads": 2},
    "product": {"type": "delta", "n_heads": 2, "n_k_heads": 1, "updates": 2, "negative": True},
    "gru": {"type": "rnn", "n_heads": 2},
    "lstm": {"type": "rnn", "cell": "paralstm", "n_heads": 2},
    "mingru": {"type": "rnn", "cell": "mingru", "n_heads": 2},
    "attention": {"type": "attention", "n_heads": 4, "n_kv_heads": 2},
    "window": {"type": "attention", "n_heads": 2, "window": 5},
}


def model_of(*kinds: str) -> OwnAdapter:
    model = LanguageModel(
        ModelConfig(vocab_size=64, d_model=D, n_layers=len(kinds), pattern=list(kinds), mixers={k: KINDS[k] for k in kinds})
    )
    model.init_weights(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2 and min(p.shape) > 4:
                p.normal_(0, 0.2)
    return OwnAdapter(model, None, "own", "own")


def planted(kind: str, memory: float) -> Any:
    """A mixer whose state is forgotten at the rate 1/e in `memory` steps, whatever it reads: its gates are constants."""
    config, _ = mixers.parse("m", KINDS[kind], D)
    mixer = mixers.load(KINDS[kind]["type"]).Mixer(config, D, 0)
    mixer.init_weights(0.2, 0)
    with torch.no_grad():
        if kind in ("mamba2", "delta"):  # exp(-softplus(dt_bias) exp(A_log)) a step
            mixer.in_proj.weight[-mixer.H :] = 0
            mixer.dt_bias.fill_(math.log(math.expm1(1 / memory)))
            mixer.A_log.zero_()
        if kind == "delta":  # and next to nothing is taken out by the updates: inputs have a constant first channel
            mixer.in_proj.weight[-2 * mixer.H : -mixer.H] = 0
            mixer.in_proj.weight[-2 * mixer.H : -mixer.H, 0] = -30
        if kind == "mingru":
            mixer.cell_weight.zero_()
            kept = math.exp(-1 / memory)
            mixer.cell_bias[mixer.cell.pre.index("z")] = math.log((1 - kept) / kept)
    return mixer


def inputs(T: int = 96) -> torch.Tensor:
    x = torch.randn(2, T, D, generator=torch.Generator().manual_seed(1))
    x[..., 0] = 1
    return x


def test_outputs_are_rebuilt_from_lambda_b_and_c() -> None:
    ids = torch.randint(64, (2, 48), generator=torch.Generator().manual_seed(0))
    rows = dynamics(model_of("mamba2", "delta", "product", "attention", "window", "gru", "lstm"), ids)
    assert [row["layer"] for row in rows] == list(range(7))
    for row in rows[:5]:
        assert 0 < row["rebuild_error"] < 1e-4, row
    assert [row["expansion"] for row in rows[:3]] == [8, 16, 16]
    assert all(0 < row["radius"][-1] <= 1 + 1e-6 for row in rows if "radius" in row)
    assert rows[4]["first_token"] == 0, "a window of 5 sees nothing of the first token in the second half"


@pytest.mark.parametrize("name", CONFIGS)
def test_every_mixer_gets_a_row(name: str) -> None:
    config = ModelConfig(vocab_size=64, d_model=64, n_layers=1, pattern=["m"], mixers={"m": CONFIGS[name]})
    model = LanguageModel(config)
    model.init_weights(0)
    (row,) = dynamics(OwnAdapter(model, None, "own", "own"), torch.randint(64, (2, 24)))
    assert row["heads"] > 0 and ("memory" in row or row["kind"] == "attention")
    assert name not in LINEAR or 0 < row["rebuild_error"] < 1e-4, row


@pytest.mark.parametrize("kind", ["mamba2", "delta", "mingru"])
@pytest.mark.parametrize("memory", [7.0, 200.0])
def test_a_planted_memory_is_found(kind: str, memory: float) -> None:
    adapter = model_of(kind)
    mixer = planted(kind, memory)
    adapter.model.blocks[0].mixer = mixer
    with torch.no_grad():  # the norm before the mixer passes on a constant first channel
        adapter.model.embedding.weight[:, 0] = 3
    (row,) = dynamics(adapter, torch.randint(64, (2, 96)))
    assert row["memory"] == pytest.approx([memory] * 5, rel=0.02), row
    assert row["radius"] == pytest.approx([math.exp(-1 / memory)] * 5, rel=1e-3)


@pytest.mark.parametrize("kind", ["mamba2", "delta", "mingru"])
def test_probes_through_the_contract_find_it_too(kind: str) -> None:
    row = probed(planted(kind, 7.0), inputs())
    assert row["memory"][2] == pytest.approx(7.0, rel=0.02) and row["radius"][2] == pytest.approx(math.exp(-1 / 7), rel=1e-3)
    assert row["linear"]


def test_a_cell_whose_state_enters_its_gates_is_not_linear() -> None:
    config, _ = mixers.parse("m", {"type": "rnn", "n_heads": 2, "recurrent_init": 1.0, "recurrent_bound": "none"}, D)
    mixer = mixers.load("rnn").Mixer(config, D, 0)
    mixer.init_weights(1.0, 0)
    row = probed(mixer, inputs(32))
    assert not row["linear"] and "rebuild_error" not in row


def test_memory_between_the_steps_of_a_curve() -> None:
    assert memory_length(torch.tensor([math.exp(-t / 3.5) for t in range(1, 9)])) == pytest.approx(3.5)
    assert memory_length(torch.tensor([math.exp(-t / 50) for t in range(1, 9)])) == pytest.approx(50)
    assert memory_length(torch.ones(8)) is None


def test_program_writes_a_page(ours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main([f"checkpoint={ours}", "length=32", "device=cpu"]) == 0
    report = json.loads((ours / "dynamics.json").read_text())
    assert report["layers"][0]["kind"] == "cell paragru" and len(report["layers"][0]["memory"]) == 5
    assert "| 0 | cell paragru |" in (ours / "dynamics.md").read_text()
    assert program.main([f"checkpoint={ours}", "length=4"]) == 2 and "length must be" in capsys.readouterr().err
    (ours / "dynamics.json").unlink()
    broken = load_file(ours / "model.safetensors")
    save_file({**broken, "norm.weight": torch.full_like(broken["norm.weight"], math.nan)}, ours / "model.safetensors")
    assert program.main([f"checkpoint={ours}", "length=32", "device=cpu"]) == 2 and "logits are not finite" in capsys.readouterr().err
    assert not (ours / "dynamics.json").exists()


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    model = own("g", n_layers=1)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return tmp_path
