"""Structured channel mixers: what they save, how the dense helper fades, and that an export is a plain model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from data.errors import UserError
from models import channel
from models.config import ModelConfig
from models.hub.export import export
from models.lm import LanguageModel
from tests.hub.folders import checkpoint
from training.config.cli import checked, compose_config
from training.optim.adamw import parameter_groups

D, F = 32, 64
STRUCTURES = ("lowrank", "blockdense", "blockshuffle")


def settings(structure: str, **more: float) -> dict[str, object]:
    return {"type": "structured", "structure": structure, "blocks": 4, "rank": 0.25, **more}


@pytest.mark.parametrize(
    "structure,right,left", [("lowrank", D * 8, 8 * F), ("blockdense", D * 8 // 4, 8 * F), ("blockshuffle", D * D // 4, D * F // 4)]
)
def test_parameters_are_those_of_the_paper(structure: str, right: int, left: int) -> None:
    built = channel.build(settings(structure), D, F)
    assert sum(p.numel() for p in built.gate.parameters()) == right + left
    built.eval()
    assert built.flops_per_token() == 2 * sum(p.numel() for p in built.parameters())


@pytest.mark.parametrize("m", [1, 2])
def test_factors_have_rates_by_their_own_inputs(m: int) -> None:
    """blockdense: right's blocks have D / 4 inputs, left the 8 in between. Under muP, times its 1 / m."""
    if m > 1:
        pytest.importorskip("models.param.mup")
    param = {"type": "mup", "base_width": D // m} if m > 1 else {"type": "standard"}
    attention = {"a": {"type": "attention", "n_heads": 2}}
    more = settings("blockdense", guide=0.5, rate_power=1.0)
    model = LanguageModel(ModelConfig(64, D, 1, ["a"], attention, d_ff=F, channel=more, param=param))
    ratios = {n: g.get("lr_ratio", 1.0) for g in parameter_groups(model, 0.1) for n in g["names"]}
    wanted = {"up.right": 4, "up.left": D / 8, "up.dense": 1, "down.right": 4, "down.left": F / 8}
    assert {name: m * ratios[f"blocks.0.mlp.{name}.weight"] for name in wanted} == wanted


@pytest.mark.parametrize("power", [1e4, -1e4])
def test_a_power_whose_rates_have_no_value_is_a_sentence(power: float) -> None:
    with pytest.raises(UserError, match="rate_power is a power from -2 to 2"):
        channel.build(settings("lowrank", rate_power=power), D, F)


@pytest.mark.parametrize("blocks", [7, 1])
def test_a_small_rank_has_a_number_for_each_block(blocks: int) -> None:
    built = channel.build({"type": "structured", "structure": "blockdense", "rank": 0.3, "blocks": blocks}, 7, 14)
    built.init_weights(0.02, 0)
    x = torch.randn(3, 7)
    torch.testing.assert_close(built.gate(x, None), x @ built.gate.merged().T)


def test_muon_has_no_rates_of_factors() -> None:
    with pytest.raises(UserError, match="take optim=adamw, or set it to 0"):
        checked(compose_config(["optim=muon", "channel=lowrank", "model.channel.rate_power=1", "data.path=nowhere"]))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_helper_changes_nothing_at_first_and_is_gone_after_its_share(structure: str) -> None:
    x = torch.randn(3, 5, D, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    guided = channel.build(settings(structure, guide=0.5), D, F)
    guided.init_weights(0.3, 0)
    alone = guided.eval()(x)
    guided.train()
    for share in (0.0, 0.25):
        assert not guided.follow(share)
        torch.testing.assert_close(guided(x), alone, atol=1e-5, rtol=1e-4)
    assert abs(float(guided.mixed) - 0.5) < 1e-6
    with torch.no_grad():
        guided.gate.dense.weight.add_(0.1)
    helped = guided(x)
    assert (helped - alone).abs().max() > 1e-3
    gate = 0.5 * guided.gate.dense(x) + 0.5 * x @ guided.gate.merged().T
    torch.testing.assert_close(helped, guided.out(torch.nn.functional.silu(gate) * guided.gate_and_up(x)[1]), atol=1e-5, rtol=1e-4)
    assert torch.equal(guided.eval()(x), alone), "evaluation sees the structured maps alone"
    guided.train()
    assert guided.follow(0.5) and not guided.follow(0.75)
    assert torch.equal(guided(x), alone)


def test_lowrank_begins_as_the_nearest_map() -> None:
    built = channel.build({"type": "structured", "rank": 1.0}, D, F)
    built.init_weights(0.02, 0)
    assert abs(float(built.gate.merged().std()) / 0.02 - 1) < 0.1  # of full rank: the map itself
    few = channel.build(settings("lowrank"), D, F)
    few.init_weights(0.02, 0)
    values = torch.linalg.svdvals(few.gate.merged())
    assert (values[8:] < 1e-6).all() and values[7] > 0.02 * (F**0.5 - D**0.5)
    assert values[7] > 0.7 * values[0], "the largest values of a normal map lie close together"
    torch.testing.assert_close(few.gate.left.weight.norm(dim=0), few.gate.right.weight.norm(dim=1))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_all_structures_begin_at_the_size_of_a_dense_map(structure: str) -> None:
    """A nearest map as small as it comes has half of it, and lags by some 0.1 nats more, guided or not."""
    built = channel.build(settings(structure), D, F)
    built.init_weights(0.02, 0)
    assert abs(float(built.gate.merged().pow(2).mean()) ** 0.5 / 0.02 - 1) < 0.1


@pytest.mark.parametrize(
    "values,word", [({"rank": 0.001}, "rank"), ({"structure": "blockdense", "blocks": 5}, "blocks"), ({"guide": 2.0}, "guide")]
)
def test_mistakes_are_sentences(values: dict[str, object], word: str) -> None:
    with pytest.raises(UserError, match=f"model.channel.{word}"):
        LanguageModel(ModelConfig(31, D, 1, channel={"type": "structured", **values}))


def test_a_kind_of_no_width_and_an_unknown_one_are_refused() -> None:
    with pytest.raises(UserError, match="d_ff=0"):
        LanguageModel(ModelConfig(31, D, 1, d_ff=0, channel={"type": "structured"}))
    with pytest.raises(UserError, match="structured"):
        LanguageModel(ModelConfig(31, D, 1, channel={"type": "structurd"}))


def test_an_export_is_a_plain_llama(tmp_path: Path) -> None:
    mixers = {"attention": {"type": "attention", "n_heads": 4}}
    kind = settings("blockshuffle", guide=0.5)
    source = checkpoint(tmp_path / "run", ModelConfig(269, D, 2, mixers=mixers, d_ff=F, channel=kind))
    export(source, tmp_path / "out")  # transformers alone loads it, and its logits are compared with the checkpoint's
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLM"] and written["intermediate_size"] == F
