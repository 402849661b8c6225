"""muP: at its base width the plain model, and at others starting values, rates and first steps as its table has them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.config import ModelConfig
from models.init import is_hidden_matrix, roles
from models.lm import LanguageModel
from scripts.studies import mup
from tests.models.test_param import model_of

BASE = 32


def kind(**more: object) -> dict[str, object]:
    return {"type": "mup", "base_width": BASE, **more}


@pytest.mark.parametrize("tied", [False, True])
def test_at_the_base_width_it_is_the_plain_model(tied: bool) -> None:
    plain, scaled = model_of({"type": "standard"}, BASE, tie_embeddings=tied), model_of(kind(zero_head=False), BASE, tie_embeddings=tied)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), scaled.parameters(), strict=True))
    assert {roles(p).get("rate", 1.0) for p in scaled.parameters()} == {1.0}


@pytest.mark.parametrize("tied", [False, True])
def test_starting_values_and_rates_at_four_times_the_width(tied: bool) -> None:
    base, wide = (model_of(kind(zero_head=False), width, tie_embeddings=tied) for width in (BASE, 4 * BASE))
    spread = {name: float(p.std()) for name, p in base.named_parameters()}
    for name, p in wide.named_parameters():
        hidden, head = is_hidden_matrix(p), name == ("norm.weight" if tied else "head.weight")
        assert roles(p).get("rate", 1.0) == (0.25 if hidden or head else 1.0), name
        if name == "norm.weight":
            assert (p == (0.25 if tied else 1.0)).all()
        elif spread[name]:
            expected = 0.25 if head else 0.5 if hidden else 1.0
            assert abs(float(p.std()) / spread[name] / expected - 1) < 0.25, name
    assert not model_of(kind(zero_head=True), 4 * BASE).head.weight.any()


def test_coordinates_stay_flat_where_the_plain_ones_grow() -> None:
    """The check of the page, at widths a test can afford: how large changes by three steps are, as a power of the width."""
    slopes = {name: mup.slopes(mup.coordinates("attention", name, [32, 64, 128, 256], seeds=1, base=32)) for name in ("mup", "standard")}
    assert max(abs(slope) for slope in slopes["mup"].values()) < 0.3, slopes["mup"]
    assert slopes["standard"]["logits"] > 0.5, slopes["standard"]


@pytest.mark.parametrize("qk_norm", [False, True])
def test_scores_of_heads_that_grow_are_divided_by_their_size(qk_norm: bool) -> None:
    """With queries and keys that point the same way, scores of a head are as large at each width."""
    scores = {}
    for width in (BASE, 4 * BASE):
        mixers = {"a": {"type": "attention", "n_heads": 2, "rope": False, "qk_norm": qk_norm}}
        model = LanguageModel(ModelConfig(31, width, 1, ["a"], mixers, param=kind()))
        model.init_weights(0)
        mixer = model.blocks[0].mixer
        x = torch.randn(5, width, generator=torch.Generator().manual_seed(0))
        q, k = mixer.q_proj(x), mixer.q_proj(x) * (1 if qk_norm else (width / BASE) ** 0.5)  # keys as muP starts them, along the queries
        if qk_norm:
            q, k = mixer.q_norm(q.unflatten(-1, (2, -1))), mixer.k_norm(k.unflatten(-1, (2, -1)))
        scores[width] = float((q * k).sum() / q[..., 0].numel() / (width / 2) ** 0.5)
        rate = roles(mixer.q_proj.weight if not qk_norm else mixer.q_norm.weight)["rate"]
        assert rate == (width / BASE) ** (-0.5 if qk_norm else -1.5)
    assert abs(scores[4 * BASE] / scores[BASE] - 1) < 0.1, scores


def test_the_command_writes_numbers_and_a_picture(tmp_path: Path) -> None:
    mup.main(["coordinates", "--widths", "32,64", "--mixers", "attention", "--seeds", "1", "--out", str(tmp_path / "c.json")])
    assert (tmp_path / "c.json").stat().st_size > 200 and (tmp_path / "c.svg").stat().st_size > 200
