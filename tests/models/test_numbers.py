"""Numbers the models must meet: published sizes, FLOPs, starting values, precision, and the masks of the fast paths."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import models.head
from kernels.ssd.reference import ssd_sequential
from models import mixers
from models.attend import attend_in_blocks
from models.cells import available as cells
from models.cells import load_cell
from models.config import ModelConfig
from models.head import Head
from models.init import roles
from models.layers import CausalConv
from models.lm import LanguageModel
from models.segments import document_starts
from tests.mixers import mixer_configs

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = [(24, 1024, 4, 0.406), (24, 2048, 4, 1.42), (32, 2560, 2, 2.90), (32, 4096, 4, 6.76)]


def rnn(**changes: Any) -> dict[str, Any]:
    return {"type": "rnn", "cell": "paragru", "n_heads": 4, **changes}


@pytest.mark.parametrize("n_layers, d_model, n_heads, billions", PUBLISHED)
def test_paragru_has_the_published_sizes(n_layers: int, d_model: int, n_heads: int, billions: float) -> None:
    config = ModelConfig(50304, d_model, n_layers, ["g"], {"g": rnn(n_heads=n_heads)}, learnable_residual=True)
    with torch.device("meta"):
        model = LanguageModel(config)
    assert abs(sum(model.parameter_counts().values()) / 1e9 / billions - 1) < 0.02


@pytest.mark.parametrize("d_model, width", [(32, 128), (192, 512), (512, 1536), (1024, 2816), (4096, 11008)])
def test_mlp_width(d_model: int, width: int) -> None:
    assert ModelConfig(8, d_model).mlp_width == width


@pytest.mark.parametrize("name", cells())
def test_flops_of_an_rnn_model_are_what_torch_counts(name: str) -> None:
    model = LanguageModel(ModelConfig(53, 32, 3, ["g"], {"g": rnn(cell=name)}))
    model.init_weights(0)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 19, dtype=torch.long))
    elementwise = 3 * 2 * len(load_cell(name).rec) * 32
    assert counter.get_total_flops() == 19 * (model.flops_per_token(19) - elementwise)


@pytest.mark.parametrize("window", [0, 5])
def test_flops_of_a_transformer_are_torchs_plus_the_causal_pairs(window: int) -> None:
    T, H, K = 19, 4, 8
    mixer = {"type": "attention", "n_heads": H, "n_kv_heads": 2, "window": window}
    model = LanguageModel(ModelConfig(53, 32, 2, ["a"], {"a": mixer}))
    model.init_weights(0)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, T, dtype=torch.long))
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    pairs = sum(min(t + 1, window or T) for t in range(T))
    assert 0 <= T * model.flops_per_token(T) - products - 2 * 4 * H * K * pairs < 2 * T  # rounded up per token and layer


def test_starting_values() -> None:
    torch.manual_seed(0)
    for bound in ("none", "clip", "tanh"):
        mixer: Any = mixers.build(rnn(recurrent_bound=bound, recurrent_init=0.1), 256, 0)
        mixer.init_weights(0.02, 8)
        weights = mixer.recurrent_weights()
        assert abs(float(weights.std()) / 0.0987 - 1) < 0.1, bound  # 0.1, cut at three deviations
        assert bound == "none" or weights.abs().max() <= 0.5
        assert abs(float(mixer.cell_weight.std()) * 64**0.5 - 0.987) < 0.05
        assert abs(float(mixer.in_proj.weight.std()) - 0.02 * 0.987) < 0.001
        assert abs(float(mixer.out_proj.weight.std()) - 0.005 * 0.987) < 0.0005
    mixer = mixers.build({"type": "mamba2", "head_dim": 4}, 512, 0)
    mixer.init_weights(0.02, 8)
    dt = F.softplus(mixer.dt_bias)
    assert dt.min() > 0.00099 and dt.max() < 0.101 and abs(float(dt.log().mean()) + 4.6) < 0.3
    assert mixer.A_log.exp().min() >= 1 and mixer.A_log.exp().max() <= 16 and bool((mixer.D == 1).all())


def test_biases_start_where_the_config_asks_and_else_where_the_cell_does() -> None:
    mixer: Any = mixers.build(rnn(cell="dense_lstm", bias_init={"f": 1, "g": [-2.0, 2.0]}), 32, 0)
    mixer.init_weights(0.02, 8)
    rows = dict(zip(mixer.cell.pre, mixer.cell_bias.detach()))
    wanted = {"i": torch.linspace(0, -4, 32), "f": torch.ones(32), "g": torch.linspace(-2, 2, 32), "o": torch.zeros(32)}
    assert rows.keys() == wanted.keys()
    for name, row in wanted.items():
        torch.testing.assert_close(rows[name], row, msg=name)
    for wrong in ({"q": 1}, {"f": "one"}, {"f": [1, 2, 3]}, {"f": float("nan")}, {"f": True}):
        config, problems = mixers.parse("a", rnn(cell="dense_lstm", bias_init=wrong), 32)
        assert config is None and len(problems) == 1 and "bias_init of the cell dense_lstm" in problems[0], problems


def test_bounds_of_recurrent_weights() -> None:
    for bound, low in (("none", 2.0), ("clip", 0.5), ("tanh", 0.5)):
        mixer: Any = mixers.build(rnn(recurrent_bound=bound), 32, 0)
        torch.nn.init.constant_(mixer.recurrent, 2.0)
        assert mixer.recurrent_weights().abs().max() <= low
        mixer.recurrent_weights().sum().backward()
        assert bool((mixer.recurrent.grad == 0).all()) == (bound == "clip")  # a plain clamp: nothing passes where it bites


def test_input_projection_is_block_diagonal_over_heads() -> None:
    mixer: Any = mixers.build(rnn(n_heads=2), 8, 0)
    mixer.init_weights(0.1, 0)
    u = torch.randn(2, 3, 8)
    got = mixer._project(u)  # (B, T, P, E, K), the bias is added by the solve
    for e in range(2):
        wanted = (u[..., 4 * e : 4 * e + 4] @ mixer.cell_weight[e]).unflatten(-1, (3, 4))
        torch.testing.assert_close(got[..., e, :], wanted)


def test_mamba2_is_its_recurrence_in_float64() -> None:
    torch.manual_seed(0)
    mixer: Any = mixers.build({"type": "mamba2", "d_state": 8, "head_dim": 8, "n_groups": 2, "chunk": 6, "dt_limit_max": 0.8}, 32, 0)
    mixer.init_weights(0.3, 0)
    x = torch.randn(2, 23, 32)
    single = mixer(x)[0]
    mixer.double()
    z, xBC, dt = mixer.in_proj(x.double()).split([64, 96, 8], -1)
    xBC = F.silu(F.conv1d(F.pad(xBC.transpose(1, 2), (3, 0)), mixer.conv.weight[:, None], mixer.conv.bias, groups=96).transpose(1, 2))
    x_, B_, C_ = xBC[..., :64].unflatten(-1, (8, 8)), xBC[..., 64:80].unflatten(-1, (2, 8)), xBC[..., 80:].unflatten(-1, (2, 8))
    dt = F.softplus(dt + mixer.dt_bias).clamp(0, 0.8)
    assert bool((dt == 0.8).any()) and bool((dt < 0.8).any())
    y, _ = ssd_sequential(x_, dt, -mixer.A_log.exp(), B_, C_)
    y = ((y + x_ * mixer.D[:, None]).flatten(2) * F.silu(z)).unflatten(-1, (2, 32))
    y = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5)).flatten(2) * mixer.norm.weight
    torch.testing.assert_close(single.double(), mixer.out_proj(y), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("T", [1, 5, 6, 12, 13, 25])
def test_window_in_blocks_is_the_plain_mask(T: int, heads: tuple[int, int]) -> None:
    torch.manual_seed(0)
    for cached in (0, 1, 5):
        q, k, v = torch.randn(2, heads[0], T, 8), torch.randn(2, heads[1], cached + T, 8), torch.randn(2, heads[1], cached + T, 8)
        ahead = torch.arange(cached, cached + T)[:, None] - torch.arange(cached + T)
        for segments in (None, torch.randint(0, 2, (2, cached + T)).cumsum(1)):
            mask = ((ahead >= 0) & (ahead < 6))[None, None]
            if segments is not None:
                mask = mask & (segments[:, None, cached:, None] == segments[:, None, None, :])
            wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
            torch.testing.assert_close(attend_in_blocks(q, k, v, segments, 6), wanted)


def test_window_bounds_the_cache() -> None:
    mixer: Any = mixers.build({"type": "attention", "n_heads": 2, "window": 4}, 32, 0)
    _, state = mixer(torch.randn(1, 50, 32), mixer.init_state(1))
    assert state.k_BGLK.shape[2] == 3 and state.k_BGLK.untyped_storage().nbytes() == state.k_BGLK.numel() * 4


def test_tokens_without_ids_are_segment_zero_in_every_mixer() -> None:
    torch.manual_seed(0)
    for type_ in mixers.available():
        known = {field.name for field in dataclasses.fields(mixers.load(type_).Config)}
        small = {"n_heads": 2} if "n_heads" in known else {"head_dim": 16} if "head_dim" in known else {}
        mixer: Any = mixers.build({"type": type_, **small}, 32, 0)
        mixer.init_weights(0.3, 0)
        x = torch.randn(1, 12, 32)
        for later, ids in ((0, [0] * 12), (1, [0] * 5 + [1] * 7)):
            _, state = mixer(x[:, :5], mixer.init_state(1))
            second, _ = mixer(x[:, 5:], state, torch.full((1, 7), later))
            torch.testing.assert_close(second, mixer(x, segment_ids=torch.tensor([ids]))[0][:, 5:], atol=1e-5, rtol=1e-4)


def test_packed_convolution_and_its_gradients() -> None:
    torch.manual_seed(0)
    conv = CausalConv(3, 4).double()
    conv.init_weights()
    segments = torch.tensor([[0, 0, 1, 2, 2, 2, 2, 2, 2], [3] * 9])
    x = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    past = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    starts = document_starts(segments, torch.tensor([0, 3]))
    assert starts is not None
    wide = torch.cat([torch.randn(2, 9, 2, dtype=torch.float64), x, torch.randn(2, 9, 1, dtype=torch.float64)], -1)
    before, y, after, state = conv(wide, 2, past, starts)
    assert torch.equal(before, wide[..., :2]) and torch.equal(after, wide[..., 5:])
    for b in range(2):
        for t in range(9):
            wanted = conv.bias
            for j in range(4):
                if not bool(starts[b, max(0, t - j + 1) : t + 1].any()):
                    wanted = wanted + conv.weight[:, 3 - j] * (x[b, t - j] if t >= j else past[b, 3 + t - j])
            torch.testing.assert_close(y[b, t], F.silu(wanted))
    torch.testing.assert_close(state, x[:, 6:])
    assert torch.autograd.gradcheck(lambda x, past, w, b: conv_with(conv, x, past, starts, w, b), (x, past, conv.weight, conv.bias))


def conv_with(conv: CausalConv, x: torch.Tensor, past: torch.Tensor, starts: Any, weight: torch.Tensor, bias: torch.Tensor) -> Any:
    return torch.func.functional_call(conv, {"weight": weight, "bias": bias}, (x, 0, past, starts))[1]


def test_head_loss_gradients_and_their_precision() -> None:
    torch.manual_seed(0)
    head = Head(16, 31).double()
    h, labels = torch.randn(11, 16, dtype=torch.float64, requires_grad=True), torch.randint(0, 31, (11,))
    labels[3] = -100
    assert torch.autograd.gradcheck(
        lambda h, w: torch.func.functional_call(head, {"weight": w}, (h, labels), {"chunk": 4}), (h, head.weight)
    )
    assert torch.autograd.gradcheck(
        lambda h, w: 0.7 * torch.func.functional_call(head, {"weight": w}, (h, labels), {"chunk": 4, "summed": True})[0].sum(),
        (h, head.weight),
    )
    head, h, labels = Head(16, 31), torch.randn(4096, 16), torch.randint(0, 31, (4096,))
    errors = []
    for chunk, summed in ((4096, False), (8, False), (8, True)):  # under autocast, 512 chunks must sum as exactly as one
        with torch.autocast("cpu", torch.bfloat16):
            nll, _ = head(h, labels, chunk=chunk, summed=summed)
        assert nll.dtype == torch.float32
        low = torch.autograd.grad(nll.sum(), head.weight)[0]
        exact = torch.autograd.grad(F.cross_entropy(F.linear(h, head.weight), labels, reduction="sum"), head.weight)[0]
        errors.append(float((low - exact).norm() / exact.norm()))
    assert max(errors) < 1.2 * errors[0] and errors[0] < 0.01, errors


def test_logits_are_computed_once_where_losses_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    """And again for any other gradient: of one token's loss, of the log-partition too, or both beside the sum's."""
    torch.manual_seed(0)
    head, h, labels = Head(8, 31), torch.randn(10, 8, requires_grad=True), torch.randint(0, 31, (10,))
    calls = []
    logits = models.head._logits

    def counted(*a: Any) -> Any:
        calls.append(0)
        return logits(*a)

    monkeypatch.setattr(models.head, "_logits", counted)
    losses = {
        "of the sum": lambda nll, log_z: nll.sum() / 3,
        "of one": lambda nll, log_z: nll[4] / 3,
        "with log z": lambda nll, log_z: nll.sum() + log_z.square().sum(),
        "of both": lambda nll, log_z: nll.sum() + nll[3],
        "of none": lambda nll, log_z: 0.5 * log_z.sum(),
    }
    for name, loss in losses.items():
        found = []
        for summed in (True, False):
            calls.clear()
            value = loss(*head(h, labels, chunk=4, summed=summed))
            found.append(torch.autograd.grad(value, (h, head.weight), retain_graph=summed))
            assert len(calls) == (3 if summed and name == "of the sum" else 6), name
            if summed:  # what was made with the losses is not used up
                torch.testing.assert_close(torch.autograd.grad(value, (h, head.weight)), found[0])
        torch.testing.assert_close(*found)
    calls.clear()
    with torch.no_grad():
        head(h, labels, chunk=4, summed=True)
    for leaf in (h, head.weight):  # the other is wanted by nobody
        h.requires_grad_(leaf is h)
        head.weight.requires_grad_(leaf is not h)
        torch.autograd.grad(head(h, labels, chunk=4, summed=True)[0].sum(), leaf)
    assert len(calls) == 9
    model = LanguageModel(ModelConfig(31, 8, 1, ["a"], {"a": {"type": "attention", "n_heads": 2}}, head_chunk=4))
    model.init_weights(0)
    for z_loss, times in ((0.0, 3), (1e-3, 6)):
        model.config.z_loss = z_loss
        calls.clear()
        output = model(labels[None], labels[None])
        (output.loss_sum + output.z_loss_sum).backward()
        assert len(calls) == times and bool(output.z_loss_sum) == bool(z_loss)


def test_gradients_flow_through_carried_state() -> None:
    settings = {"g": rnn(n_heads=2), "m": {"type": "mamba2", "d_state": 8, "head_dim": 16}, "a": {"type": "attention", "n_heads": 2}}
    model = LanguageModel(ModelConfig(53, 32, 3, list(settings), settings))
    ids, gradients = torch.randint(0, 53, (2, 17), generator=torch.Generator().manual_seed(0)), []
    for checkpointing, cuts in (("none", [0, 17]), ("none", [0, 9, 17]), ("full", [0, 4, 17])):
        model.init_weights(1)
        model.zero_grad()
        model.set_activation_checkpointing(checkpointing)
        state, loss = model.init_state(2), torch.zeros(())
        for a, b in zip(cuts, cuts[1:]):
            output = model(ids[:, a:b], ids[:, a:b], state=state)
            state, loss = output.state, loss + output.loss_sum
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for other in gradients[1:]:
        for a_, b_ in zip(gradients[0], other):
            torch.testing.assert_close(a_, b_, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("mapping", mixer_configs().values(), ids=mixer_configs())
def test_every_mixer_file_is_whole_and_its_parameters_have_their_roles(mapping: dict[str, Any]) -> None:
    with torch.device("meta"):
        mixer: Any = mixers.build(mapping, 256, 0)
    of_maps = {id(module.weight) for module in mixer.modules() if isinstance(module, torch.nn.Linear)}
    for name, p in mixer.named_parameters():
        if name in ("recurrent", "A_log", "D", "dt_bias"):
            assert "keep_fp32" in roles(p), name
        assert {"keep_fp32", "no_decay"} & set(roles(p)) != {"keep_fp32"}, (
            f"{name}: what stays fp32 is a recurrence's own and does not decay"
        )
        if p.ndim == 1 or name in ("conv.weight", "cell_bias"):
            assert "no_decay" in roles(p), name
        assert id(p) not in of_maps or not {"keep_fp32", "no_decay"} & set(roles(p)), name
    assert sum("residual" in roles(p) for p in mixer.parameters()) == 1


def test_wrong_types_and_impossible_values_are_told_together() -> None:
    mixer = {"a": {"type": "attention", "n_heads": "four"}, "g": {"type": "rnn", "n_heads": 5, "recurrent_mx": 1.0}}
    rest = {"norm_eps": "1e-6", "z_loss": -1.0, "pattern": ["a", "b"], "mixers": mixer}
    with pytest.raises(ValueError) as caught:
        ModelConfig.from_dict({"vocab_size": "many", "d_modle": 64, "n_layers": True, **rest})
    lines = str(caught.value).splitlines()
    for part in (
        "vocab_size must be a whole number",
        "'d_model'",
        "n_layers must be a whole number",
        "z_loss",
        "names 'b'",
        "a.n_heads must be of type int",
        "did you mean 'recurrent_max'",
    ):
        assert sum(part in line for line in lines) == 1, (part, lines)
    assert not any("norm_eps" in line for line in lines)


def test_mamba2_keeps_no_chunk_matrices_for_the_backward_pass() -> None:
    mixer: Any = mixers.build({"type": "mamba2", "d_state": 4, "head_dim": 4, "chunk": 64}, 32, 0)
    mixer.init_weights(0.1, 0)
    saved_elements = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal saved_elements
        saved_elements += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        y, _ = mixer(torch.randn(1, 256, 32))
    assert saved_elements < 256 * 64 * 16  # one (chunk, chunk) matrix per chunk and head: T * chunk * heads
    y.sum().backward()
