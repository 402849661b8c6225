"""Drawing weights: the numbers of torch's own truncated normal, and nothing left to what layers of torch would draw."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from models import init
from models.config import ModelConfig
from models.lm import LanguageModel
from tests.mixers import mixer_configs


@pytest.mark.parametrize("shape", [(3,), (5, 3), (64, 257), (1 << 21,)])
def test_numbers_are_those_of_torch(shape: tuple[int, ...]) -> None:
    if not init._draws_as_torch():
        pytest.skip("this torch draws otherwise, and its own function is called")
    ours, theirs = torch.empty(shape), torch.empty(shape)
    one, other = (torch.Generator().manual_seed(7) for _ in range(2))
    for _ in range(2):  # the generator goes on from the same place
        init._redrawn_(ours, 0.02, one)
        nn.init.trunc_normal_(theirs, std=0.02, a=-0.06, b=0.06, generator=other)
        assert torch.equal(ours, theirs) and ours.abs().max() <= 0.0600001


def test_a_torch_that_draws_otherwise_is_asked_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init, "_draws_as_torch", lambda: False)
    parameter = nn.Parameter(torch.empty(4, 4))
    torch.manual_seed(0)
    init.normal_(parameter, 0.5)
    torch.manual_seed(0)
    assert torch.equal(parameter, nn.init.trunc_normal_(torch.empty(4, 4), std=0.5, a=-1.5, b=1.5))


@pytest.fixture
def unset_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    yield
    torch.use_deterministic_algorithms(False)


def test_every_weight_is_drawn(unset_is_nan: None) -> None:
    configs = {name.replace("/", "_"): mapping for name, mapping in mixer_configs().items()}
    state = torch.random.get_rng_state()
    model = LanguageModel(ModelConfig(53, 256, len(configs), list(configs), configs, learnable_residual=True))
    assert torch.equal(torch.random.get_rng_state(), state)  # making it draws nothing
    assert model.embedding.weight.isnan().all()
    model.init_weights(0)
    assert [name for name, p in model.named_parameters() if not p.isfinite().all()] == []
