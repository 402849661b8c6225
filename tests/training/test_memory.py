"""The estimate of memory: its measuring mode against sizes known by hand, its parts put together against a whole model run in one piece."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from kernels.dispatch import planned, planned_compiled
from models.attend import sdpa
from models.lm import LanguageModel
from training.config.cli import checked, compose_config
from training.cost import memory
from training.cost.flops import meta_model
from training.setup import model_config

TINY = ["size=tiny", "train.seq_len=128", "train.micro_batch=2", "train.global_batch=4", "model.vocab_size=512", "data.path=nowhere"]


def test_a_layer_costs_what_it_keeps() -> None:
    """y = tanh(x W): kept are x W's tanh (its own output) and nothing else that is new; backward makes dW, dx and one more of the width."""
    with memory._as_on_a_gpu():
        part, x = nn.Linear(256, 256, bias=False), torch.empty(64, 256, requires_grad=True)
        cost = memory._measure(lambda t: torch.tanh(part(t)), part, x, False)
    size, weight = 4 * 64 * 256, 4 * 256 * 256
    assert cost.saved == size and cost.forward == 2 * size and cost.gradients == weight
    assert size + weight <= cost.backward <= 2 * size + weight


def whole(overrides: list[str]) -> tuple[int, int, int]:
    """(kept after the forward pass, peak of it, peak of the backward pass) of a model in one piece, gradients of parameters dropped."""
    config = checked(compose_config(overrides))
    with memory._as_on_a_gpu():
        model = LanguageModel(model_config(config, None)[0]).train()
        model.set_activation_checkpointing(config.train.activation_checkpointing)
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        ids = torch.zeros(config.train.micro_batch, config.train.seq_len, dtype=torch.int64)
        ledger = memory.Ledger([ids, *model.parameters()])
        with ledger:
            with torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16"):
                output = model(ids, labels=ids, segment_ids=ids.int())
            kept, forward = ledger.now, ledger.peak
            ledger.peak = 0
            assert output.loss_sum is not None and output.z_loss_sum is not None
            (output.loss_sum + output.z_loss_sum).backward()
    return kept, forward, ledger.peak


@pytest.mark.parametrize("model", ["transformer", "mamba2", "paragru", "hybrid"])
@pytest.mark.parametrize("words", [["train.precision=bf16"], ["train.precision=fp32", "train.activation_checkpointing=full"]])
def test_parts_put_together_are_the_whole(model: str, words: list[str]) -> None:
    overrides = [f"model={model}", *TINY, *words]
    config = checked(compose_config(overrides))
    parts = memory.activations(config, model_config(config, None)[0])
    kept, forward, backward = whole(overrides)
    assert parts.embedding + sum(c.saved for c in parts.layers) + parts.head.saved == pytest.approx(kept, rel=0.02)
    assert parts.forward_peak() == pytest.approx(forward, rel=0.05)
    assert parts.backward_peak(False) == pytest.approx(backward, rel=0.08)


def test_packed_attention_is_counted_without_a_mask() -> None:
    """As many tokens in longer rows cost no more, where a mask would grow with their length."""

    def kept(T: int, *more: str) -> float:
        words = [f"train.seq_len={T}", f"train.micro_batch={4096 // T}", f"train.global_batch={4096 // T}", *more]
        config = checked(compose_config(["model=transformer", *TINY, *words]))
        return sum(c.saved for c in memory.activations(config, model_config(config, None)[0]).layers)

    bf16 = "train.precision=bf16"
    assert kept(2048, bf16) == pytest.approx(kept(256, bf16), rel=0.01)
    for more in ([], [bf16, "train.compile=true"]):  # which the packed kernel does not take
        assert kept(2048, *more) > 1.1 * kept(256, *more)


def test_more_ranks_stages_offload_and_recomputation_need_less() -> None:
    def peak(world: int, *words: str) -> float:
        config = checked(
            compose_config(["model=hybrid", *TINY, "size.n_layers=8", "deepspeed.bucket_bytes=1000000", "dry_run=true", *words])
        )
        settings, _ = model_config(config, None)
        return memory.estimate(config, meta_model(settings), memory.activations(config, settings), world).peak

    assert peak(1, "deepspeed=zero1") > peak(2, "deepspeed=zero1") > peak(8, "deepspeed=zero1")
    assert peak(1, "deepspeed=zero2") > peak(1, "deepspeed=zero2", "deepspeed.offload_optimizer=cpu")
    assert peak(1, "deepspeed=zero1") > peak(1, "deepspeed=zero1", "train.activation_checkpointing=full")


def test_plans_are_made_inside_only() -> None:
    q = torch.ones(1, 1, 4, 8)
    with pytest.raises(RuntimeError), memory._as_on_a_gpu(compiled=True):
        assert planned() and planned_compiled()
        with memory._as_on_a_gpu():
            assert planned() and not planned_compiled() and isinstance(sdpa(q, q, q), FakeTensor)
        assert planned_compiled()
        raise RuntimeError
    assert not planned() and not planned_compiled() and torch.equal(sdpa(q, q, q), q)
