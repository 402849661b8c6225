"""DeepSpeed's settings as the config asks for them."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from models.config import ModelConfig
from models.lm import LanguageModel
from training.config.cli import checked, compose_config
from training.errors import UserError
from training.optim import SkippableAdamW
from training.zero import patches
from training.zero.at_once import buckets
from training.zero.policy import check_tools, deepspeed_config


@pytest.mark.parametrize("kind,linear,vocabulary", [("auto", "bf16", "fp32"), ("fp32", "fp32", "fp32"), ("bf16", "bf16", "bf16")])
def test_gradients_are_reduced_in_the_dtype_that_is_asked_for(kind: str, linear: str, vocabulary: str) -> None:
    """By DeepSpeed's own reading of its settings; parameters of recurrences and norms are summed in fp32 in any case."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.torch_autocast import get_comm_dtype, get_default_autocast_lower_precision_modules, init_autocast_params

    config = checked(compose_config(["data.path=x", "train.precision=bf16", f"deepspeed.reduction={kind}"]))
    given = deepspeed_config(config, 1, 1000)
    read = DeepSpeedConfig(given)
    assert read.communication_data_type == {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}[kind]
    mixers = {"m": {"type": "mamba2", "head_dim": 16, "d_state": 16}, "a": {"type": "attention", "n_heads": 2}}
    model = LanguageModel(ModelConfig(64, 32, 2, ["m", "a"], mixers))

    class Engine:
        module = model

        def zero_quantized_weights(self) -> bool:
            return False

    layers = read.torch_autocast_lower_precision_safe_modules
    init_autocast_params(Engine(), torch.bfloat16, get_default_autocast_lower_precision_modules() if layers is None else layers)
    names = {torch.bfloat16: "bf16", torch.float32: "fp32"}
    found = {name: names[get_comm_dtype(p)] for name, p in model.named_parameters()}
    assert {found[n] for n in found if "proj" in n or "mlp.up" in n} == {linear}
    assert found["head.weight"] == found["embedding.weight"] == vocabulary
    assert {found[n] for n in found if "A_log" in n or "norm" in n} == {"fp32"}


@pytest.mark.parametrize("ranks,columns", [(1, 7), (3, 5), (4, 1), (4, 1000)])
def test_buckets_hold_every_gradient_once_in_the_row_of_its_owner(ranks: int, columns: int) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (1, 30, 5, 2, 17)]
    offsets = [0, 4, 36, 44, 48]  # with gaps, as DeepSpeed aligns them
    part = -(-65 // ranks)
    owned = torch.zeros(ranks, part)
    for width, runs in buckets(parameters, offsets, part, ranks, columns):
        filled = torch.zeros(ranks, width)
        assert width <= columns
        for run in runs:
            filled[run.rank, run.column : run.column + run.count] += 1
            run.parameter.data[run.first : run.first + run.count] += 1
            owned[run.rank, run.place : run.place + run.count] += 1
            assert offsets[[p is run.parameter for p in parameters].index(True)] + run.first == run.rank * part + run.place
        assert filled.max() == 1
    assert all(bool((p == 1).all()) for p in parameters) and owned.max() == 1 and owned.sum() == 55


def test_a_divisor_of_a_finite_norm_is_finite() -> None:
    """AdamW's kernel leaves a step out where it is not, and the host would count that step as made."""
    zero = SimpleNamespace(optimizer=SimpleNamespace(grad_scale=None), clip_grad=1e-30, loss_scale=1.0, device="cpu")
    patches.divide_as_read(zero)
    for norm in (1e15, math.inf):
        zero.unscale_and_clip_grads([], norm)  # type: ignore[attr-defined]
        assert bool(zero.optimizer.grad_scale.isfinite()) == math.isfinite(norm)


@pytest.mark.parametrize("limit", [0.0, 0.5, 100.0])
def test_gradients_are_clipped_as_adamw_reads_them(limit: float) -> None:
    """As on a GPU under ZeRO-1 and 2: the update is that of gradients which DeepSpeed has divided, and the norm comes to the host once."""
    weights = [torch.nn.Parameter(torch.linspace(-1, 1, 40)) for _ in range(2)]
    ours, other = (SkippableAdamW([w], lr=0.1, eps=1.0, fused=True) for w in weights)
    norms = iter([torch.tensor(4.0), torch.tensor(0.25)])
    zero = SimpleNamespace(optimizer=ours, clip_grad=limit, loss_scale=1.0, device="cpu", scaled_global_norm=lambda norm_type: next(norms))
    patches.clip_as_read(zero)
    for _ in range(2):
        gradient = torch.rand(40)
        norm = zero.scaled_global_norm()
        assert isinstance(norm, float)
        weights[0].grad, weights[1].grad = gradient.clone(), gradient / max(1.0, (norm + 1e-6) / limit if limit else 1.0)
        zero.unscale_and_clip_grads([weights[0].grad], norm)
        assert (ours.grad_scale is not None) == (0 < limit < norm)
        ours.step()
        other.step()
        torch.testing.assert_close(*weights)


def test_a_deepspeed_that_steps_on_gradients_that_are_not_finite_is_refused_under_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Releases before 0.19.8 add the square of -1, their word for such a norm, to those of other groups, and step."""
    from deepspeed.runtime import utils

    config = checked(compose_config(["data.path=x", "deepspeed=zero1", "train.micro_batch=2"]))
    check_tools(config, torch.device("cpu"), 2)
    monkeypatch.delattr(utils, "combine_grad_norm_groups")
    check_tools(config, torch.device("cpu"), 1)
    with pytest.raises(UserError, match="install deepspeed>=0.19.8"):
        check_tools(config, torch.device("cpu"), 2)
