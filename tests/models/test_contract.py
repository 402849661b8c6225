"""The contract every mixer keeps: run on each file of configs/mixer and each cell of models/cells, so a new one is tested with no edit here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from models import mixers
from models.cells import available as cells
from models.contract import tensor_bytes

ROOT = Path(__file__).resolve().parents[2]
D, T = 32, 19
CONFIGS: dict[str, dict[str, Any]] = {p.stem: yaml.safe_load(p.read_text()) for p in sorted((ROOT / "configs/mixer").glob("*.yaml"))}
CONFIGS |= {f"cell-{name}": {"type": "rnn", "cell": name, "n_heads": 2} for name in cells()}
CONFIGS |= {
    "attention-gqa": {"type": "attention", "n_heads": 4, "n_kv_heads": 2, "qk_norm": True},
    "mamba2-groups": {"type": "mamba2", "d_state": 8, "head_dim": 16, "n_groups": 2, "chunk": 5},
    "rnn-bare": {"type": "rnn", "cell": "paragru", "gate": False, "norm": False, "d_conv": 0, "recurrent_bound": "tanh", "expand": 2.0},
}
SMALL = {"mamba2": {"d_state": 8, "head_dim": 16, "chunk": 7}, "attention": {"window": 6}}


def mapping_of(name: str) -> dict[str, Any]:
    mapping = dict(CONFIGS[name])
    if name == "mamba2":
        mapping |= SMALL["mamba2"]
    if mapping.get("window"):
        mapping |= SMALL["attention"]
    return mapping


@pytest.fixture(params=sorted(CONFIGS))
def mixer(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    built = mixers.build(mapping_of(request.param), D, 0)
    built.init_weights(0.2, 0)
    return built.eval()


def x_of(dtype: torch.dtype = torch.float32, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, T, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


SEGMENTS = torch.tensor([[0] * 5 + [1] * 3 + [2] * 11, [4] * 1 + [5] * 17 + [6]], dtype=torch.int32)


def test_a_later_token_changes_nothing_before_it(mixer: Any) -> None:
    x = x_of()
    changed = x.clone()
    changed[:, 11] += 1
    a, b = mixer(x)[0], mixer(changed)[0]
    assert torch.equal(a[:, :11], b[:, :11])
    assert not torch.allclose(a[:, 11:], b[:, 11:])


def test_packed_documents_equal_separate_ones(mixer: Any) -> None:
    x = x_of()
    packed = mixer(x, segment_ids=SEGMENTS)[0]
    for row in range(2):
        for segment in SEGMENTS[row].unique():
            inside = SEGMENTS[row] == segment
            torch.testing.assert_close(packed[row : row + 1, inside], mixer(x[row : row + 1, inside])[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("segments", [None, SEGMENTS])
@pytest.mark.parametrize("cuts", [[0, 7, 8, 19], list(range(T + 1))])
def test_chunks_with_carried_state_equal_the_whole(mixer: Any, cuts: list[int], segments: torch.Tensor | None) -> None:
    x = x_of()
    whole, state = mixer(x, segment_ids=segments)[0], mixer.init_state(2)
    parts = []
    for a, b in zip(cuts, cuts[1:]):
        y, state = mixer(x[:, a:b], state, None if segments is None else segments[:, a:b])
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("length", [1, 4, T])
def test_state_has_the_bytes_it_says(mixer: Any, length: int) -> None:
    _, state = mixer(x_of()[:, :length], mixer.init_state(2))
    assert tensor_bytes(state) == mixer.state_bytes(length, 2, torch.float32)


def test_gradients_against_float64(mixer: Any) -> None:
    x32 = x_of().requires_grad_()
    weight = torch.randn(2, T, D, generator=torch.Generator().manual_seed(2))
    (mixer(x32, segment_ids=SEGMENTS)[0] * weight).sum().backward()
    single = {n: p.grad.clone() for n, p in mixer.named_parameters()} | {"x": x32.grad}
    mixer.zero_grad()
    mixer.double()
    x64 = x32.detach().double().requires_grad_()
    (mixer(x64, segment_ids=SEGMENTS)[0] * weight).sum().backward()
    for name, exact in ({n: p.grad for n, p in mixer.named_parameters()} | {"x": x64.grad}).items():
        error = (single[name].double() - exact).norm() / exact.norm().clamp(min=1e-6)
        assert error < 1e-4, (name, float(error))


def test_flops_formula_counts_the_projections(mixer: Any) -> None:
    counter = FlopCounterMode(display=False)
    with counter:
        mixer(x_of(batch=1))
    linear = sum(2 * m.in_features * m.out_features for m in mixer.modules() if isinstance(m, torch.nn.Linear))
    assert counter.get_total_flops() / T >= linear
    assert linear <= mixer.flops_per_token(T) < 3 * linear + 50_000
    assert mixer.flops_per_token(T) <= mixer.flops_per_token(10 * T)


def test_every_parameter_is_initialised_and_sane(mixer: Any) -> None:
    with torch.no_grad():
        for p in mixer.parameters():
            p.fill_(float("nan"))
    mixer.init_weights(0.02, 12)
    for name, p in mixer.named_parameters():
        assert torch.isfinite(p).all(), name
    assert (
        abs(float(mixer.out_proj.weight.std() if hasattr(mixer, "out_proj") else mixer.o_proj.weight.std()) / (0.02 / 24**0.5) - 1) < 0.15
    )


def test_bf16_stays_near_fp32(mixer: Any) -> None:
    mixer.init_weights(0.1, 0)
    exact = mixer(x_of())[0]
    with torch.autocast("cpu", torch.bfloat16):
        low = mixer(x_of())[0]
    assert (low.float() - exact).norm() / exact.norm() < 0.04


def test_one_token_and_an_empty_config() -> None:
    for type_ in mixers.available():
        config, problems = mixers.parse("m", {"type": type_}, 64)
        assert config is not None and not problems
        built = mixers.load(type_).Mixer(config, 64, 0)
        built.init_weights(0.1, 0)
        assert built(torch.randn(1, 1, 64))[0].shape == (1, 1, 64)


@torch.no_grad()
@pytest.mark.parametrize("segments", [None, SEGMENTS])
def test_decoding_without_gradients_equals_the_whole(mixer: Any, segments: torch.Tensor | None) -> None:
    """Single tokens take other ways where nothing is differentiated."""
    x = x_of()
    whole, state, parts = mixer(x, segment_ids=segments)[0], mixer.init_state(2), []
    for t in range(T):
        y, state = mixer(x[:, t : t + 1], state, None if segments is None else segments[:, t : t + 1])
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-4)
