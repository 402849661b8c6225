"""The estimate of memory: its measuring mode against sizes known by hand, its parts put together against a whole model run in one piece."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from data.errors import UserError
from kernels.dispatch import planned, planned_compiled
from models.attend import sdpa
from models.lm import LanguageModel
from models.remade import Parts, parts_by_layer, setting
from training.choices import residual_dtype
from training.config.cli import checked, compose_config
from training.cost import memory, recomputation
from training.cost.flops import meta_model
from training.setup import model_config

TINY = ["size=tiny", "train.seq_len=128", "train.micro_batch=2", "train.global_batch=4", "model.vocab_size=512", "data.path=nowhere"]


def test_a_layer_costs_what_it_keeps() -> None:
    """y = tanh(x W): kept are x W's tanh (its own output) and nothing else that is new; backward makes dW, dx and one more of the width."""
    with memory._as_on_a_gpu():
        part, x = nn.Linear(256, 256, bias=False), torch.empty(64, 256, requires_grad=True)
        cost = memory._measure(lambda t, _: (torch.tanh(part(t)), None), part, x, False)
    size, weight = 4 * 64 * 256, 4 * 256 * 256
    assert cost.saved == size and cost.forward == 2 * size and cost.gradients == weight
    assert 2 * size + weight <= cost.backward <= 3 * size + weight  # dy is one of them


def whole(overrides: list[str]) -> tuple[int, int, int]:
    """(kept after the forward pass, peak of it, peak of the backward pass) of a model in one piece, gradients of parameters dropped."""
    config = checked(compose_config(overrides))
    with memory._as_on_a_gpu():
        model = LanguageModel(model_config(config, None)[0]).train()
        model.set_activation_checkpointing(config.train.activation_checkpointing)
        model.residual_dtype = residual_dtype(config.train)
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        ids = torch.zeros(config.train.micro_batch, config.train.seq_len, dtype=torch.int64)
        ledger = memory.Ledger([ids, *model.parameters()])
        with ledger:
            with torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16"):
                output = model(ids, labels=ids, segment_ids=ids.int())
            after_forward, forward = ledger.now, ledger.peak
            ledger.peak = 0
            assert output.loss_sum is not None and output.z_loss_sum is not None
            (output.loss_sum + output.z_loss_sum).backward()
    return after_forward, forward, ledger.peak


@pytest.mark.parametrize("model", ["transformer", "mamba2", "paragru", "hybrid"])
@pytest.mark.parametrize(
    "words",
    ["bf16 none", "fp32 full", "bf16 {mixer:2,layer:[1]}", "bf16 {swiglu:0.5,mlp:2}", "fp32 [mlp,mixer]", "bf16 {layer:[1]} narrow"],
)
def test_parts_put_together_are_the_whole(model: str, words: str) -> None:
    precision, choice, *narrow = words.split(" ")
    if model == "mamba2" and "mlp" in choice:
        choice = "mixer"
    overrides = [f"model={model}", *TINY, f"train.precision={precision}", f"train.activation_checkpointing={choice}"]
    overrides += ["train.residual=bf16"] if narrow else []
    config = checked(compose_config(overrides))
    parts = memory.activations(config, model_config(config, None)[0])
    after_forward, forward, backward = whole(overrides)
    assert parts.embedding + sum(c.saved for c in parts.layers) + parts.head.saved == pytest.approx(after_forward, rel=0.01)
    assert parts.forward_peak() == pytest.approx(forward, rel=0.01)
    assert parts.backward_peak(False) == pytest.approx(backward, rel=0.04)


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


def test_products_in_8_bits_keep_less() -> None:
    """Inputs in 8 bits for 16, weights both ways round."""

    def kept(fp8: bool) -> float:
        words = ["model=transformer", *TINY, "train.precision=bf16", "size.n_layers=1", "size.d_model=512", f"train.fp8={str(fp8).lower()}"]
        config = checked(compose_config(words))
        return sum(c.saved for c in memory.activations(config, model_config(config, None)[0]).layers)

    try:
        assert 0.6 * kept(False) < kept(True) < kept(False)
    finally:
        kept(False)


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


@pytest.mark.parametrize("word", ["train.compile=true", "train.initial_state=random", "data.reader=stream", "train.cuda_graph=off"])
def test_gradients_are_whole_under_zero2_only_where_passes_are_to_be_graphs(word: str) -> None:
    def held(*words: str) -> memory.Held:
        config = checked(compose_config(["model=transformer", *TINY, "deepspeed=zero2", *words]))
        with torch.device("meta"):
            return memory.held(config, LanguageModel(model_config(config, None)[0]), 4)

    graphs, plain = held("train.cuda_graph=all"), held()
    assert graphs.reduction > plain.reduction
    assert held("train.cuda_graph=all", word) == plain


def test_each_part_frees_what_it_stands_for() -> None:
    """Of a transformer under bf16: swiglu the product of gate and up, mlp these two and the copies of its weights as well."""
    words = ["model=transformer", *TINY, "train.precision=bf16", "size.n_layers=2"]
    config = checked(compose_config(words))
    settings, rows = model_config(config, None)[0], 2 * 128
    D, F = settings.d_model, settings.mlp_width
    measured = memory.Measured(config, settings)

    def saved(*parts: str) -> int:
        return measured.layer(1, frozenset(parts), True).saved

    assert saved() - saved("swiglu") == 2 * rows * F
    assert saved() - saved("mlp") == 3 * 2 * rows * F + 3 * 2 * D * F
    assert saved() - saved("mlp", "mixer") == (saved() - saved("mlp")) + (saved() - saved("mixer"))
    assert saved("layer") == 4 * rows * D + 2 * rows * D  # its output, and what the layer before owes


def test_states_of_dense_heads_are_the_first_to_go() -> None:
    """Of an LSTM with dense heads its memory cells, in fp32; auto makes them again before it makes any other product again."""
    words = ["model=dense_lstm", *TINY, "train.precision=bf16", "size.n_layers=4", "size.d_model=768", "deepspeed=zero0"]
    words += ["train.seq_len=1024", "train.micro_batch=16", "train.global_batch=16"]
    config = checked(compose_config(words))
    settings, rows = model_config(config, None)[0], 16 * 1024
    measured = memory.Measured(config, settings)
    freed = measured.layer(1, frozenset(), True).saved - measured.layer(1, frozenset({"states"}), True).saved
    marks = 16 * (1024 // 32 + 1) * 2 * 4 * settings.d_model
    assert freed == 4 * rows * settings.d_model - marks
    rungs = [rung.parts for rung in recomputation._ladder(measured, meta_model(settings), settings)]
    with_states = next(i for i, parts in enumerate(rungs) if "states" in parts)
    assert not any(parts & {"mlp", "mixer", "layer"} for parts in rungs[: with_states + 1]), rungs
    with pytest.raises(UserError, match="use mixer"):
        checked(compose_config([*words, "train.activation_checkpointing=states", "parallel.sequence=2"]))


@pytest.mark.parametrize("model", ["transformer", "hybrid", "mamba2"])
def test_auto_recomputes_as_little_as_fits(model: str) -> None:
    config = checked(compose_config([f"model={model}", *TINY, "train.precision=bf16", "size.n_layers=8", "deepspeed=zero0"]))
    settings, _ = model_config(config, None)
    lm = meta_model(settings)

    def chosen(room: float) -> recomputation.Chosen:
        return recomputation.choose(config, settings, lm, 1, room)

    def again(parts: list[Parts]) -> int:
        lm.set_activation_checkpointing(parts)
        return lm.recomputed_flops_per_token(128)

    everything = memory.estimate(config, lm, memory.activations(config, settings), 1)
    assert setting(chosen(everything.peak).parts) == "none"
    least = chosen(0)
    assert not least.fits and least.estimate.peak < everything.peak
    before = 0
    for share in (0.9, 0.5, 0.1, 0.0):
        room = least.estimate.peak + share * (everything.peak - least.estimate.peak)
        choice = chosen(room)
        assert choice.fits and choice.estimate.peak <= room and again(choice.parts) >= before
        told = memory.estimate(config, lm, memory.activations(config, settings, parts_by_layer(_written(choice.parts), settings)), 1)
        assert told.peak == choice.estimate.peak  # what it says asks for the same
        before = again(choice.parts)
    if settings.mlp_width:
        assert set().union(*chosen(0.95 * everything.peak + 0.05 * least.estimate.peak).parts) == {"swiglu"}


def _written(parts: list[Parts]) -> Any:
    """The setting that stands for these parts, as it comes out of the command line."""
    words = f"train.activation_checkpointing={setting(parts)}"
    return checked(compose_config(["size=tiny", "size.n_layers=8", "data.path=nowhere", words])).train.activation_checkpointing


def test_plans_are_made_inside_only() -> None:
    q = torch.ones(1, 1, 4, 8)
    with pytest.raises(RuntimeError), memory._as_on_a_gpu(compiled=True):
        assert planned() and planned_compiled()
        with memory._as_on_a_gpu():
            assert planned() and not planned_compiled() and isinstance(sdpa(q, q, q), FakeTensor)
        assert planned_compiled()
        raise RuntimeError
    assert not planned() and not planned_compiled() and torch.equal(sdpa(q, q, q), q)
