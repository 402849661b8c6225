"""What models run on a GPU besides the recurrences, against float64: attention over packed documents, the loss, compiled and whole models."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import attention, cross_entropy
from kernels.cross_entropy import reference
from models import attend, mixers
from models.config import ModelConfig
from models.decode import Decoder
from models.head import Head
from models.lm import LanguageModel

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("settings", [{}, {"n_kv_heads": 2}, {"window": 17}, {"qk_norm": True, "window": 100, "n_kv_heads": 1}], ids=str)
def test_packed_attention(settings: dict[str, int], packed: bool, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if own and torch.cuda.get_device_capability()[0] not in attention.CAPABILITIES:
        pytest.skip("needs an H100 or a B200")
    torch.manual_seed(0)
    monkeypatch.setattr(attend, "own_kernels", "own" if own else "torch")
    mixer = mixers.build({"type": "attention", "n_heads": 4, **settings}, 128, 0)
    mixer.init_weights(0.1, 0)
    mixer.cuda()
    x, weight = torch.randn(3, 211, 128, device="cuda"), torch.randn(3, 211, 128, device="cuda")
    segments = (torch.rand(3, 211, device="cuda") < 0.05).cumsum(1).int() if packed else None
    calls = []
    module, name = (attention, "attention") if own else (attend, "packed_attention")
    run = getattr(module, name)

    def noted(*a: Any) -> Tensor:
        calls.append(0)
        return run(*a)

    monkeypatch.setattr(module, name, noted)

    def answers(autocast: bool) -> list[Tensor]:
        mixer.zero_grad()
        mixer.double() if not autocast else mixer.float()
        leaf = x.to(torch.float32 if autocast else torch.float64).requires_grad_()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            y = mixer(leaf, None, segments)[0]
        (y * weight).sum().backward()
        return [t.double() for t in (y.detach(), leaf.grad, *(p.grad for p in mixer.parameters()))]

    exact = answers(False)
    assert not calls
    computed = answers(True)
    assert bool(calls) == (packed or "window" in settings)
    for a, b in zip(computed, exact):
        assert (a - b).norm() < 1e-2 * b.norm()


@pytest.mark.parametrize(("N", "V"), [(1, 5), (33, 1000), (300, 32_000), (700, 50_432)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy(N: int, V: int, dtype: torch.dtype) -> None:
    logits, labels = (3 * torch.randn(N, V, device="cuda")).to(dtype), torch.randint(0, V, (N,), device="cuda")
    labels[::7] = -100
    wanted = reference.losses(logits.double(), labels)
    nll, log_z = cross_entropy.losses(logits, labels)
    torch.testing.assert_close([nll.double(), log_z.double()], list(wanted), atol=1e-5, rtol=1e-6)
    g = [torch.randn(N, device="cuda") for _ in range(2)]
    d_wanted = reference.gradient(logits.double(), labels, wanted[1], (g[0] * (labels != -100)).double(), g[1].double())
    d = cross_entropy.gradient_(logits.clone(), labels, log_z, *g)
    ulp = torch.finfo(dtype).eps
    assert ((d - d_wanted).abs() <= 0.6 * ulp * d_wanted.abs() + 1e-5 * (d_wanted.abs() + 1e-3)).all()
    ones, zeros = torch.ones_like(g[0]), torch.zeros_like(g[0])
    kept, d = logits.clone(), cross_entropy.gradient_(logits.clone(), labels, log_z, ones, zeros)
    at_once = cross_entropy.losses_and_gradient_(logits, labels)
    assert at_once[2].data_ptr() == logits.data_ptr() and not torch.equal(kept, logits)
    torch.testing.assert_close(at_once, (nll, log_z, d), atol=2e-6, rtol=4 * ulp)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layer", [{"type": "rnn"}, {"type": "rnn", "cell": "paralstm"}, {"type": "mamba2"}, {"type": "attention"}], ids=str
)
def test_compiled_models_equal_eager_ones(layer: dict[str, object]) -> None:
    """Losses and all gradients of a model with packed documents, in fp32."""
    model = LanguageModel(
        ModelConfig.from_dict({"vocab_size": 300, "d_model": 128, "n_layers": 2, "pattern": ["x"], "mixers": {"x": layer}, "d_ff": 192})
    )
    model.init_weights(0)
    model.cuda()
    ids = torch.randint(0, 300, (2, 301), device="cuda")
    segments = (torch.arange(301, device="cuda") >= torch.tensor([[50], [200]], device="cuda")).int()
    results = []
    for forward in (model, torch.compile(model)):
        model.zero_grad()
        loss = forward(ids, labels=ids, segment_ids=segments).loss_sum
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*results):
        assert (a - b).norm() <= 2e-4 * (1e-3 + a.norm())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_a_label_that_is_no_logit_is_a_nan_loss(dtype: torch.dtype) -> None:
    """Neither a neighbour's logit nor a wait for the device."""
    torch.manual_seed(0)
    head, h = Head(64, 1000).cuda(), torch.randn(6, 64, device="cuda", requires_grad=True)
    labels = torch.tensor([3, 1000, -1, -100, 999, 1 << 20], device="cuda", dtype=dtype)
    for recompute in (True, False):
        nll, log_z = head(h, labels, recompute=recompute)
        assert nll.isnan().tolist() == [False, True, True, False, False, True] and not nll[3] and not log_z[3]
        (d_h,) = torch.autograd.grad(nll[[0, 3, 4]].sum(), h)
        assert not d_h[3].any() and d_h[[0, 4]].isfinite().all()


class Rubbish:
    """A recorded graph that only the collector lets go."""

    def __init__(self) -> None:
        self.me, self.graph, self.x = self, torch.cuda.CUDAGraph(), torch.zeros(8, device="cuda")
        with torch.cuda.graph(self.graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
            self.y = self.x + 1


def test_rubbish_that_ends_in_the_middle_of_a_recording_does_not_void_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel(ModelConfig(64, 64, 2, ["d", "g"], {"d": {"type": "delta", "n_heads": 4}, "g": {"type": "rnn"}}))
    model.init_weights(0)
    model.cuda()
    ids = torch.randint(0, 64, (1, 6), device="cuda")
    enter, was_on, thresholds = torch.cuda.graph.__enter__, gc.isenabled(), gc.get_threshold()
    gc.disable()
    try:
        for _ in range(3):
            Rubbish()
        torch.cuda.synchronize()

        def entered(recording: Any) -> None:
            enter(recording)
            if gc.isenabled():  # the collector comes by
                gc.collect()

        monkeypatch.setattr(torch.cuda.graph, "__enter__", entered)
        gc.enable()
        gc.set_threshold(1 << 30)  # only where it is asked for
        with torch.no_grad():
            state = model(ids[:, :5], state=model.init_state(1)).state
            assert state is not None
            decoded = Decoder(model, state, 8).step(ids[:, 5]).clone()
            torch.testing.assert_close(decoded, model(ids, state=model.init_state(1)).logits[:, 5], atol=1e-3, rtol=1e-3)
    finally:
        gc.set_threshold(*thresholds)
        (gc.enable if was_on else gc.disable)()
        gc.collect()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("fused", [True, False])
def test_a_model_on_the_second_gpu_decodes_while_the_first_is_current(fused: bool) -> None:
    layers: dict[str, dict[str, Any]] = {
        "g": {"type": "rnn"},
        "m": {"type": "mamba2", "head_dim": 16, "d_state": 16},
        "a": {"type": "attention", "n_heads": 4},
    }
    model = LanguageModel(ModelConfig(64, 64, 3, ["g", "m", "a"], layers, learnable_residual=True))
    model.init_weights(0)
    model.to("cuda:1")
    ids = torch.randint(0, 64, (2, 9), device="cuda:1")
    with torch.no_grad(), torch.cuda.device(0):
        state = model(ids[:, :4], state=model.init_state(2)).state
        assert state is not None
        decoder = Decoder(model, state, 16, fused=fused)
        decoded = torch.stack([decoder.step(ids[:, t]).clone() for t in range(4, 9)], 1)
        torch.testing.assert_close(decoded, model(ids, state=model.init_state(2)).logits[:, 4:], atol=1e-3, rtol=1e-3)
        assert torch.cuda.current_device() == 0
