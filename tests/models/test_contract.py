"""The contract every mixer keeps: run on each file of configs/mixer and each cell of models/cells, so a new one is tested with no edit here."""

from __future__ import annotations

import sys
from typing import Any, get_args

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from kernels.dispatch import planning
from models import mixers
from models.cells import available as cells
from models.contract import Role, state_tensors, tensor_bytes
from tests.mixers import mixer_configs

D, T = 32, 19
CONFIGS: dict[str, dict[str, Any]] = mixer_configs()
CONFIGS |= {f"cell-{name}": {"type": "rnn", "cell": name, "n_heads": 2} for name in cells()}
CONFIGS |= {
    "attention-gqa": {"type": "attention", "n_heads": 4, "n_kv_heads": 2, "qk_norm": True},
    "attention-gated": {"type": "attention", "n_heads": 4, "output_gate": True},
    "delta-groups": {"type": "delta", "n_heads": 4, "n_k_heads": 2, "expand_v": 1.5, "updates": 3, "negative": True},
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


def test_the_empty_state_asks_no_weight_for_its_shape(mixer: Any) -> None:
    """Between passes ZeRO-3 leaves weights without elements, and states are made then."""
    whole = {name: tensor.shape for name, tensor in state_tensors(mixer.init_state(2)).items()}
    sizes = mixer.state_bytes(T, 2)
    for p in mixer.parameters():
        p.data = p.data.new_empty(0)
    assert {name: tensor.shape for name, tensor in state_tensors(mixer.init_state(2)).items()} == whole
    assert mixer.state_bytes(T, 2) == sizes


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


def test_the_tensors_of_a_state_are_what_their_roles_say(mixer: Any) -> None:
    x, roles = x_of(torch.float64), mixer.double().state_roles()

    def after(length: int, x: torch.Tensor = x) -> dict[str, torch.Tensor]:
        return state_tensors(mixer(x[:, :length], mixer.init_state(2), torch.zeros(2, length, dtype=torch.int32))[1])

    open_form, shorter, other = after(8), after(4), after(8, torch.cat([-x[:, :1], x[:, 1:]], 1))
    fixed_form = state_tensors(mixer.fixed_state(mixer(x, mixer.init_state(2), SEGMENTS)[1], 2 * T))
    assert set(roles) == {*open_form, *fixed_form} and set(roles.values()) <= set(get_args(Role))
    for name, tensor in {**open_form, **fixed_form}.items():
        assert tensor.is_floating_point() == (roles[name] != "bookkeeping"), name
    for name, tensor in open_form.items():
        if roles[name] != "bookkeeping":
            assert (tensor.shape != shorter[name].shape) == (roles[name] == "cache"), f"{name}: only a cache grows"
        if roles[name] in ("recurrent", "history"):
            forgets = torch.equal(tensor, other[name])
            assert forgets == (roles[name] == "history"), f"{name}: all tokens are in what is recurrent, the last few in a history"
    assert mixer.grows() == ("cache" in roles.values())


def test_a_fixed_state_decodes_as_the_open_one(mixer: Any) -> None:
    x = x_of()
    with torch.no_grad():
        _, state = mixer(x[:, :7], mixer.init_state(2))
        assert mixer.cached_tokens(state) == (0 if not mixer.grows() else next(iter(mixer.tensors_of(state, "cache").values())).shape[2])
        before = {name: tensor.clone() for name, tensor in state_tensors(state).items()}
        fixed = mixer.fixed_state(state, T)
        stays, following = state_tensors(fixed), state
        for t in range(7, T - 1):
            wanted, following = mixer(x[:, t : t + 1], following)
            y, after = mixer(x[:, t : t + 1], fixed)
            for name, tensor in state_tensors(after).items():
                stays[name].copy_(tensor)  # as models/decode.py does
            torch.testing.assert_close(y, wanted, atol=1e-5, rtol=1e-4)
        assert all(torch.equal(tensor, before[name]) for name, tensor in state_tensors(state).items())
        opened = mixer.open_state(fixed)
        assert set(state_tensors(opened)) <= set(mixer.state_roles())
        torch.testing.assert_close(mixer(x[:, T - 1 :], opened)[0], mixer(x[:, T - 1 :], following)[0], atol=1e-5, rtol=1e-4)


def test_a_state_goes_on_in_another_segment(mixer: Any) -> None:
    x, segment = x_of(), torch.tensor([4, 6])
    _, state = mixer(x[:, :7], mixer.init_state(2), torch.tensor([[3] * 7, [1] * 2 + [2] * 5]))
    moved = mixer.in_segment(state, segment)
    y = mixer(x[:, 7:], moved, segment[:, None].expand(2, T - 7))[0]
    torch.testing.assert_close(y, mixer(x[:, 7:], state)[0])
    fresh = mixer(x[:, 7:], state, segment[:, None].expand(2, T - 7))[0]
    assert not torch.allclose(y, fresh)
    started = mixer.in_segment(mixer.init_state(2), segment)
    torch.testing.assert_close(mixer(x, started, segment[:, None].expand(2, T))[0], mixer(x)[0], atol=1e-5, rtol=1e-4)


def test_random_states_and_memories_have_the_sizes_of_real_ones(mixer: Any) -> None:
    _, real = mixer(x_of(), mixer.init_state(2))
    drawn = mixer.random_state(2, T)
    assert {n: t.shape for n, t in state_tensors(drawn).items()} == {n: t.shape for n, t in state_tensors(real).items()}
    assert mixer(x_of()[:, :1], drawn)[0].isfinite().all() and tensor_bytes(drawn) == mixer.state_bytes(T, 2, torch.float32)
    memories = mixer.named_memories(real)
    assert sum(t.numel() for t in memories.values()) == sum(t.numel() for t in mixer.tensors_of(real, "recurrent").values())
    assert all(len(tensor) == 2 for tensor in memories.values())
    moved = mixer.at_position(real, 10 * T)
    assert {n: t.shape for n, t in state_tensors(moved).items()} == {n: t.shape for n, t in state_tensors(real).items()}


def test_memory_is_planned_without_a_look_at_values(mixer: Any) -> None:
    with planning(), FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, T, D, requires_grad=True)
        y, _ = mixer(x, None, torch.zeros(2, T, dtype=torch.int32))
        (dx,) = torch.autograd.grad(y, x, torch.empty_like(y))
    assert y.shape == dx.shape == x.shape


def test_the_recurrence_is_called_by_its_name_in_the_module(mixer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a mixer declares is what forward runs, and no known op is left undeclared."""
    module = sys.modules[type(mixer).__module__]
    called = []
    for op in ("ssd", "delta_rule", "parallel_rnn", "dense_rnn", mixer.recurrence or "ssd"):
        if original := getattr(module, op, None):

            def noted(*given: Any, op: str = op, original: Any = original, **options: Any) -> Any:
                called.append(op)
                return original(*given, **options)

            monkeypatch.setattr(module, op, noted)
    mixer(torch.randn(2, T, D))
    assert set(called) == ({mixer.recurrence} if mixer.recurrence else set())


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


@torch.no_grad()
@pytest.mark.parametrize("cell", ["dense_lstm", "dense_gru_before"])
def test_one_dense_head_of_the_whole_width(cell: str) -> None:
    """Wider than a head of the small kernels: tokens one by one, and in pieces, give what the whole gives."""
    config, problems = mixers.parse("m", {"type": "rnn", "cell": cell, "head_size": 256}, 256)
    assert config is not None and not problems
    built = mixers.load("rnn").Mixer(config, 256, 0)
    built.init_weights(0.1, 0)
    assert tuple(built.matrices.shape[:2]) == (1, 256)
    x = torch.randn(2, 9, 256)
    whole, state, parts = built(x)[0], built.init_state(2), []
    for piece in (x[:, :5], *x[:, 5:].split(1, 1)):
        y, state = built(piece, state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
