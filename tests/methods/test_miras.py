"""Miras: the row that is Gated DeltaNet, gradients against autograd, memories of a chunk against a plain loop, and losses that outliers hurt less."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models import mixers
from models.mixers.miras import miras_gradient, miras_read
from scripts.studies.methods.miras import LOSSES, recall_error


def built(**values: Any) -> Any:
    torch.manual_seed(0)
    mixer = mixers.build({"type": "miras", "n_heads": 2, **values}, 16, 0)
    mixer.init_weights(0.3, 0)
    return mixer.double().eval()


def test_a_matrix_with_l2_and_decay_is_gated_deltanet() -> None:
    mixer, x = built(), torch.randn(2, 40, 16, dtype=torch.float64)
    delta: Any = mixers.build({"type": "delta", "n_heads": 2}, 16, 0).double()
    delta.load_state_dict(mixer.state_dict())
    segments = (torch.arange(40) >= torch.tensor([[17], [33]])).int()
    for ids in (None, segments):
        torch.testing.assert_close(mixer(x, None, ids)[0], delta(x, None, ids)[0])
    assert not torch.allclose(built(chunk=4)(x)[0], delta(x)[0])


@pytest.mark.parametrize("loss", ["dot", "l2", "huber", "lp"])
@pytest.mark.parametrize("deep", [False, True])
def test_gradients_are_those_of_the_loss(deep: bool, loss: str) -> None:
    draw, p = torch.Generator().manual_seed(1), 1.5 if deep else 3.0

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(2, 3, *shape, generator=draw, dtype=torch.float64)

    weights = [drawn(4, 8), drawn(8, 4)] if deep else [drawn(4, 4)]
    weights = [w.requires_grad_() for w in weights]
    k, v, limit = drawn(4, 1), drawn(4, 1), drawn(1, 1).abs()
    held = miras_read(weights, k)[-1]
    error = held - v
    size = error.abs()
    inside = size <= limit
    value = {
        "dot": -(held * v),
        "l2": error.square() / 2,
        "huber": torch.where(inside, size.square() / 2, limit * (size - limit / 2)),
        "lp": torch.where(
            (size < 1) == (p > 2), size.pow(p) / p, size.square() / 2
        ),  # the flatter of the two; its value jumps at 1, not its slope
    }[loss]
    for ours, wanted in zip(miras_gradient(weights, k, v, loss, p, limit), torch.autograd.grad(value.sum(), weights)):
        torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-4)


def test_a_chunk_takes_its_gradients_at_the_memory_that_it_began_with() -> None:
    mixer, x = built(chunk=4), torch.randn(1, 11, 16, dtype=torch.float64)
    z, qkv, after, _ = mixer.conv(torch.nn.functional.linear(x, mixer.in_proj.weight), 16, None, None)
    q, k, v = (part.unflatten(-1, (2, 8))[0] for part in qkv.chunk(3, -1))
    q, k = (torch.nn.functional.normalize(t, dim=-1, eps=1e-3) for t in (q, k))
    eta, gate = torch.sigmoid(after[0, :, :2]), torch.exp(mixer._log_decay(after[..., None, None][:, :, 2:])[0, :, :, 0, 0])
    W, start, out = torch.zeros(2, 8, 8, dtype=torch.float64), None, []
    for t in range(11):
        start = W.clone() if t % 4 == 0 else start
        W, start = gate[t, :, None, None] * W, gate[t, :, None, None] * start
        error = (start @ k[t, :, :, None]) - v[t, :, :, None]
        W = W - eta[t, :, None, None] * error * k[t, :, None]
        out.append((W @ q[t, :, :, None])[..., 0])
    o = torch.stack(out)
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-5 * 8)  # the scale 1 / sqrt(8) of the outputs, undone
    wanted = o.flatten(1) * torch.nn.functional.silu(z[0])
    torch.testing.assert_close(mixer(x)[0][0], wanted @ mixer.out_proj.weight.T, atol=1e-4, rtol=1e-3)


def test_outliers_hurt_robust_losses_less() -> None:
    for seed in range(3):
        worse = {name: recall_error(LOSSES[name], seed) - recall_error(LOSSES[name], seed, 0.0) for name in ("l2", "huber", "lp 1.5")}
        assert worse["huber"] < worse["l2"] / 3 and worse["lp 1.5"] < worse["l2"] / 2, worse


def test_retentions_keep_the_weights_where_they_say() -> None:
    x = 3 * torch.randn(1, 30, 16, dtype=torch.float64)
    memora = built(memory="mlp", retention="kl")
    state = memora(x, memora.init_state(1))[1]
    for weight in memora._weights([state.down_BHKM, state.up_BHMK]):
        torch.testing.assert_close(weight.sum(-1), torch.ones_like(weight[..., 0]))
    moneta = built(memory="mlp", loss="lp", retention="lq")
    stored = [100.0 * w for w in (moneta.down_HKM[None], moneta.up_HMK[None])]
    for first, written, weight in zip((moneta.down_HKM, moneta.up_HMK), stored, moneta._weights(stored)):
        A = first + written
        torch.testing.assert_close(weight, A / A.abs().pow(4).mean((-2, -1), keepdim=True).sqrt(), atol=1e-6, rtol=1e-4)


def test_fresh_memories_have_layers_of_about_one_and_gradients_that_do_not_explode() -> None:
    """Held far below one by its retention, a memory's output is enlarged by its norm, and so is every gradient that goes through its tokens."""
    torch.manual_seed(1)
    for row in ({"loss": "lp", "retention": "lq"}, {"loss": "huber"}, {"retention": "kl"}):
        mixer, x = built(memory="mlp", **row), torch.randn(1, 48, 16, dtype=torch.float64, requires_grad=True)
        mixer.config.p = 3.0
        weights = mixer._weights([torch.zeros(1, *w.shape, dtype=w.dtype) for w in (mixer.down_HKM, mixer.up_HMK)])
        key = torch.nn.functional.normalize(torch.randn(1, 2, 8, 1, dtype=torch.float64), dim=2)
        if row.get("retention") != "kl":  # rows of a softmax are means
            assert miras_read(weights, key)[2].std(-2).min() > 0.05
        mixer(x)[0][:, -1].sum().backward()
        assert x.grad is not None and x.grad.norm() < 30, (row, x.grad.norm())


@pytest.mark.parametrize("p", [1.5, 3.0])
def test_a_step_carries_no_further_than_the_error(p: float) -> None:
    error = torch.logspace(-4, 4, 50, dtype=torch.float64)[None, None, :, None]
    key = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    slope = miras_gradient([torch.zeros(1, 1, 50, 1, dtype=torch.float64)], key, -error, "lp", p, None)[0]
    assert bool((slope <= error).all()) and bool((slope > 0).all())
