"""Recomputation: no choice changes a number; what each keeps; the last product is not made twice; how the setting is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

import kernels.linear
from data.errors import UserError
from models.config import ModelConfig
from models.lm import LanguageModel
from models.mixers import rnn
from models.remade import parts_by_layer, setting

MIXERS = {"m": {"type": "mamba2", "d_state": 8, "head_dim": 16}, "a": {"type": "attention", "n_heads": 2}}
CHOICES: list[Any] = [
    "full", 2, 0.5, "swiglu", "mlp", "mixer", ["mlp", "mixer"], {"a": 1, "swiglu": 2, "layer": [1, "3-4"]}, {"mlp": 0.5, "swiglu": 1},
]  # fmt: skip


def config(**more: Any) -> ModelConfig:
    return ModelConfig(53, 32, 6, **{"pattern": list(MIXERS), "mixers": MIXERS, **more})


def numbers(choice: Any, bf16: bool, stream: torch.dtype | None = None, **more: Any) -> list[Tensor]:
    """Loss and gradients of a step."""
    model = LanguageModel(config(**more))
    model.residual_dtype = stream
    model.init_weights(0)
    model.set_activation_checkpointing(choice)
    ids = torch.arange(34).view(2, 17)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(ids, labels=ids, segment_ids=(ids % 17 > 9).int()).loss_sum
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


BEHIND = {"norm_after": ["a"], "centred_norms": True}  # norms behind these sublayers, holding what their gains are above 1


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("more", [{}, {"learnable_residual": True}, {"d_ff": 0}, BEHIND], ids=["plain", "scaled", "no MLP", "behind"])
def test_no_choice_changes_a_number(bf16: bool, more: dict[str, Any]) -> None:
    expected = numbers("none", bf16, **more)
    for choice in CHOICES if more.get("d_ff") != 0 else ["full", "mixer", {"a": 1, "layer": [0, 4]}]:
        computed = numbers(choice, bf16, **more)
        assert len(computed) == len(expected) and all(torch.equal(a, b) for a, b in zip(computed, expected)), choice


@pytest.mark.parametrize("more", [{}, {"learnable_residual": True}, {"d_ff": 0}, BEHIND], ids=["plain", "scaled", "no MLP", "behind"])
def test_a_stream_of_16_bits_is_rounded_alike_however_it_is_computed(more: dict[str, Any]) -> None:
    """The same numbers whatever is computed again, others than with a stream of 32 bits, and of its order as far from those of fp32."""
    narrow, wide, exact = (numbers("none", bf16, stream, **more) for bf16, stream in ((True, torch.bfloat16), (True, None), (False, None)))
    for choice in ("full", {"layer": 2, "mixer": [1]}):
        assert all(torch.equal(a, b) for a, b in zip(numbers(choice, True, torch.bfloat16, **more), narrow)), choice
    off = [float(torch.cat([(a - b).flatten() for a, b in zip(of[1:], exact[1:])]).norm()) for of in (narrow, wide)]
    assert off[0] != off[1] and off[0] < 3 * off[1] and abs(narrow[0] - exact[0]) < 2e-3 * exact[0], off


def test_states_of_dense_heads_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The op is asked for borders in the layers that are named, and no number changes; a model that has none says so."""
    dense = {"d": {"type": "rnn", "cell": "dense_lstm", "n_heads": 2, "head_size": 16}, **MIXERS}
    asked: list[str] = []
    solve = rnn.dense_rnn

    def noted(*given: Any, **more: Any) -> Any:
        asked.append(more["save"])
        return solve(*given, **more)

    monkeypatch.setattr(rnn, "dense_rnn", noted)
    expected = numbers("none", False, pattern=["d"], mixers=dense)
    computed = numbers({"states": 2}, False, pattern=["d"], mixers=dense)
    assert asked == ["states"] * 6 + ["borders", "states"] * 3
    assert all(torch.equal(a, b) for a, b in zip(computed, expected))
    assert setting(parts_by_layer(["states", "mixer"], config(pattern=["d"], mixers=dense))) == "mixer"
    with pytest.raises(UserError, match="no mixer of this model has dense heads"):
        parts_by_layer("states", config())
    for amount, words in ((99, "the first one alone"), (0.01, "is none"), ({"mlp": 99}, "the first one alone")):
        with pytest.raises(UserError, match=words):
            parts_by_layer(amount, config())
    for amount in (1, config().n_layers, 0, 0.5):
        parts_by_layer(amount, config())


class Products(TorchDispatchMode):
    """Counts matrix products by the shape of what they make."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[tuple[int, ...], int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        made = function(*arguments, **(keywords or {}))
        if function is torch.ops.aten.mm.default:
            self.made[tuple(made.shape)] = self.made.get(tuple(made.shape), 0) + 1
        return made


@pytest.mark.parametrize("choice", ["mlp", "full"])
def test_joined_products_are_made_again_but_for_the_last(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a width of the MLP that no other product has: gate and up (joined) twice, what they are multiplied to once, and equal gradients."""
    monkeypatch.setattr(kernels.linear, "joins", lambda x, layers: torch.is_grad_enabled() and torch.is_autocast_enabled("cpu"))
    expected = numbers("none", True, d_ff=40)
    with Products() as products:
        numbers("none", True, d_ff=40)
    with Products() as again:
        computed = numbers(choice, True, d_ff=40)
    assert all(torch.equal(a, b) for a, b in zip(computed, expected))
    assert again.made[34, 80] == products.made[34, 80] + 6  # a joined product of each layer's gate and up
    mixers = 0 if choice == "mlp" else 9  # attention's values and every mixer's last product make (34, 32) as `down` does, which is spared
    assert again.made[34, 32] == products.made[34, 32] + mixers


def test_evaluation_and_decoding_make_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel(config())
    model.init_weights(0)
    model.set_activation_checkpointing({"layer": 2, "mlp": 1, "mixer": 1})
    monkeypatch.setattr("models.recompute.checkpoint", None)
    ids = torch.arange(34).view(2, 17)
    model.eval()(ids, state=model.init_state(2))
    with torch.no_grad():
        model.train()(ids, labels=ids)


@pytest.mark.parametrize(
    "choice,expected",
    [
        (None, "none"), (False, "none"), (0, "none"), (True, "full"), (1, "full"), ("layer", "full"), (3, "{layer:[0,3]}"),
        (0.5, "{layer:[0-2]}"), (["swiglu", "mixer"], "[swiglu,mixer]"), ("a", "{mixer:[1,3,5]}"), ({"a": 0.7}, "{mixer:[1,3]}"),
        ({"mlp": "0-2", "swiglu": 1}, "{swiglu:[3-5],mlp:[0-2]}"), ({"layer": [0], "mlp": 1}, "{mlp:[1-5],layer:[0]}"),
    ],
)  # fmt: skip
def test_settings_are_read_and_written(choice: Any, expected: str) -> None:
    parts = parts_by_layer(choice, config())
    assert setting(parts) == expected and parts_by_layer(parts, config()) == parts


@pytest.mark.parametrize(
    "choice,said",
    [
        ("most", "names 'most'"), (1.5, "says 1.5"), (-1, "says -1"), ({"mlp": [6]}, "0-5"), ({"a": [0]}, "1,3,5"),
        ([1, 2], "is [1, 2]"), ("auto", "settled"), ({"layer": "x"}, "says 'x'"), ({"layer": []}, "says []"), (float("nan"), "says nan"),
    ],
)  # fmt: skip
def test_what_is_no_setting_is_a_sentence(choice: Any, said: str) -> None:
    with pytest.raises(UserError) as caught:
        parts_by_layer(choice, config())
    assert said in str(caught.value)


def test_parts_of_an_mlp_need_one() -> None:
    with pytest.raises(UserError, match="no MLP"):
        parts_by_layer("mlp", config(d_ff=0))


@pytest.mark.parametrize("compiled, z_loss", [(False, 0.0), (False, 1e-3), (True, 0.0)])
def test_logits_that_are_computed_twice_are_counted(compiled: bool, z_loss: float) -> None:
    """By the products that a compiled step or an eager one makes."""
    model = LanguageModel(ModelConfig(53, 32, 1, ["a"], {"a": MIXERS["a"]}, z_loss=z_loss))
    model.init_weights(0)
    ids, made = torch.arange(34).view(2, 17), 0

    def watched(graph: torch.fx.GraphModule, _: Any) -> Any:
        nonlocal made
        made += sum(node.target == torch.ops.aten.mm.default and node.meta["val"].shape == (34, 53) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal made
            y = func(*args, **(kwargs or {}))
            made += func == torch.ops.aten.mm.default and y.shape == (34, 53)
            return y

    if compiled:
        forward: Any = torch.compile(model, backend=aot_autograd(fw_compiler=watched, bw_compiler=watched))
        forward(ids, labels=ids, reduction="sum").loss_sum.backward()
    else:
        with Watch():
            output = model(ids, labels=ids, reduction="sum")
            (output.loss_sum + output.z_loss_sum).backward()
    assert made == (2 if compiled or z_loss else 1)
    assert model.recomputed_flops_per_token(17, compiled) == (made - 1) * 2 * 32 * 53
