"""Ways through the depth: what a loop is, a state for each, halting, and what more loops are good for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from data.errors import UserError
from models import depth
from models.config import ModelConfig
from models.decode import Decoder
from models.lm import LanguageModel
from scripts.studies import looped as study
from tests.mixers import mixer_configs

MIXERS = mixer_configs()
WAYS: dict[str, dict[str, Any]] = {
    "universal": {"type": "universal", "loops": 3},
    "halting": {"type": "universal", "loops": 4, "halting": True},
    "recurrent": {"type": "recurrent", "loops": 3, "spread": 0.0, "backprop": 2},
    "drawn": {"type": "recurrent", "loops": 5, "prelude": 0, "coda": 1, "backprop": 1},
}
IDS = torch.randint(64, (2, 14), generator=torch.Generator().manual_seed(0))
SEGMENTS = torch.tensor([[0] * 5 + [1] * 9, [0] * 14])


def model_of(way: dict[str, Any], mixer: str = "attention", n_layers: int = 3, std: float = 0.2, **more: Any) -> LanguageModel:
    config = ModelConfig(
        vocab_size=64, d_model=64, n_layers=n_layers, pattern=["m"], mixers={"m": MIXERS[mixer]}, depth=way, init_std=std, d_ff=64, **more
    )
    model = LanguageModel(ModelConfig.from_dict(config.to_dict()))
    model.init_weights(0)
    return model.eval()


def test_every_way_on_disk_is_tried() -> None:
    assert {way["type"] for way in WAYS.values()} == set(depth.KINDS.available())


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_no_tokens_change_nothing(way: str) -> None:
    model = model_of(WAYS[way], "mamba2")
    before = model(IDS[:, :5], state=model.init_state(2)).state
    after = model(IDS[:, :0], state=before).state
    torch.testing.assert_close(model(IDS[:, 5:], state=after).logits, model(IDS[:, 5:], state=before).logits, rtol=0, atol=0)


def test_one_step_is_the_model_of_one_layer() -> None:
    plain = model_of({}, n_layers=1)
    for way in ({"type": "universal", "loops": 1}, {"type": "universal", "loops": 1, "halting": True}):
        one = model_of(way, n_layers=1)
        one.load_state_dict(plain.state_dict(), strict=False)
        torch.testing.assert_close(one(IDS, segment_ids=SEGMENTS).logits, plain(IDS, segment_ids=SEGMENTS).logits, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("loops", [0, -2, 1001])
def test_a_number_of_loops_that_is_none_is_refused(loops: int) -> None:
    for way in ("universal", "recurrent"):
        with pytest.raises(UserError, match="loops must be from 1 to 1000"):
            model_of(WAYS[way], n_layers=3).depth.loops = loops  # type: ignore[union-attr]


def test_loops_are_the_layers_written_out() -> None:
    looped = model_of({"type": "universal", "loops": 3, "step_embedding": False}, n_layers=2)
    plain = model_of({}, n_layers=6)
    shared = {k: v for k, v in looped.state_dict().items() if not k.startswith("blocks")}
    plain.load_state_dict(shared, strict=False)
    for i, block in enumerate(plain.blocks):
        block.load_state_dict(looped.blocks[i % 2].state_dict())
    torch.testing.assert_close(looped(IDS).logits, plain(IDS).logits, atol=1e-5, rtol=1e-4)
    assert looped.flops_per_token(14) == plain.flops_per_token(14) and looped.state_bytes(14) == plain.state_bytes(14)


@torch.no_grad()
@pytest.mark.parametrize("way,mixer", [*(("recurrent", m) for m in MIXERS), *((w, m) for w in WAYS for m in ("swa", "mamba2"))])
def test_decoding_with_a_state_a_loop_equals_the_whole(way: str, mixer: str) -> None:
    model = model_of(WAYS[way], mixer).double()  # loops multiply what chunks of a mixer round
    whole, state, parts = model(IDS, segment_ids=SEGMENTS).logits, model.init_state(2, dtype=torch.float64), []
    assert len(state.layers) == len(model.visits()) > 3
    for a, b in ((0, 6), *((t, t + 1) for t in range(6, 14))):
        output = model(IDS[:, a:b], state=state, segment_ids=SEGMENTS[:, a:b])
        state = output.state
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-4, rtol=1e-3)
    _, state = model.hidden(IDS[:, :6], model.init_state(2, dtype=torch.float64))
    decoder, plain = Decoder(model, state, capacity=14), model(IDS).logits
    for t in range(6, 14):
        torch.testing.assert_close(decoder.step(IDS[:, t]), plain[:, t], atol=2e-4, rtol=1e-3)


def test_gradients_come_through_the_last_loops_only() -> None:
    model = model_of({"type": "recurrent", "loops": 6, "spread": 0.0, "backprop": 2}).train()
    count = {"all": 0, "learning": 0}

    def seen(*_: Any) -> None:
        count["all"] += 1
        count["learning"] += torch.is_grad_enabled()

    model.blocks[1].mixer.register_forward_pre_hook(seen)
    model(IDS, labels=IDS).loss_sum.backward()
    assert count == {"all": 6, "learning": 2}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert model.config.learnt_visits() == [0, 1, 1, 2]
    cheaper = model_of({"type": "recurrent", "loops": 6, "spread": 0.0, "backprop": 6})
    assert model.training_flops_per_token(14) < cheaper.training_flops_per_token(14) == 3 * cheaper.flops_per_token(14)


def test_loops_are_drawn_from_seed_and_step_alone_around_their_mean() -> None:
    model = model_of({"type": "recurrent", "loops": 8})
    way: Any = model.depth
    drawn: dict[int, list[int]] = {}
    for seed in (0, 1):
        for step in range(400):
            model.begin_step(seed, step)
            drawn.setdefault(seed, []).append(way.drawn)
    model.begin_step(0, 7)
    assert way.drawn == drawn[0][7] and drawn[0] != drawn[1]
    assert abs(sum(drawn[0]) / 400 - 8) < 0.8 and min(drawn[0]) >= 1 and max(drawn[0]) <= 32 and len(set(drawn[0])) > 10
    assert len(model.visits()) == 2 + 8, "what is drawn is for training only"


def test_halting_weighs_every_token_once_and_ponders_what_it_took() -> None:
    model = model_of({"type": "universal", "loops": 6, "halting": True, "ponder": 0.5}).train()
    way: Any = model.depth
    with torch.no_grad():
        way.halt.normal_(0, 0.3)
        way.halt_bias.fill_(-1.0)
    output = model(IDS, labels=IDS)
    steps = way.steps_BT
    assert len(steps.unique()) > 2 and 1 <= steps.min() and steps.max() <= 6
    left = output.z_loss_sum.detach() / 0.5 - steps.sum()
    assert 0 < left < steps.numel(), "remainders lie between 0 and 1 a token"
    output.z_loss_sum.backward()
    assert way.halt.grad.abs().sum() > 0
    with torch.no_grad():
        way.halt_bias.fill_(20.0)
        way.steps.zero_()
    seen: list[torch.Tensor] = []
    model.blocks[0].mixer.register_forward_pre_hook(lambda mixer, x: seen.append(x[0].detach()))
    model(IDS, labels=IDS)
    assert (way.steps_BT == 1).all()
    assert not torch.equal(seen[1], seen[0]) and all(torch.equal(x, seen[1]) for x in seen[2:]), "what has halted keeps its stream"


def chain(rows: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A symbol, then blanks behind each of which it is asked for."""
    ids = torch.full((rows, length), 8)
    ids[:, 0] = torch.randint(8, (rows,), generator=generator)
    return ids, ids[:, :1].expand(-1, length)


def test_loss_falls_with_loops_and_saturates() -> None:
    """A window of two tokens carries a symbol one place further in every loop: six places take five loops."""
    mixer = {"type": "attention", "n_heads": 2, "window": 2}
    way = {"type": "recurrent", "prelude": 0, "coda": 0, "loops": 8, "backprop": 4}
    config = ModelConfig(vocab_size=16, d_model=32, n_layers=1, pattern=["m"], mixers={"m": mixer}, depth=way, d_ff=32, init_std=0.1)
    model = LanguageModel(config)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    model.train()
    for step in range(150):
        model.begin_step(0, step)
        ids, labels = chain(32, 6, generator)
        output = model(ids, labels=labels)
        optimizer.zero_grad()
        (output.loss_sum / output.token_count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    looped: Any = model.depth

    @torch.no_grad()
    def loss(loops: int) -> float:
        looped.loops = loops
        ids, labels = chain(64, 6, generator)
        output = model(ids, labels=labels)
        return float(output.loss_sum / output.token_count)

    assert loss(1) > 1.5 and loss(4) < loss(1) - 0.5 and loss(8) < 0.3 < loss(4) and abs(loss(16) - loss(8)) < 0.2


@pytest.mark.parametrize("words", [["--tasks", "copy,revers"], ["--pattern", "nope"], ["--length", "0"], ["--seeds", ""], ["--grow", "2"]])
def test_a_study_of_another_task_is_refused(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["looped", "--out", str(tmp_path / "out.json"), *words])
    with pytest.raises(SystemExit) as ended:
        study.main()
    assert ended.value.code == 2 and words[0] in capsys.readouterr().err and not list(tmp_path.iterdir())
