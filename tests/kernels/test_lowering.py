"""What a step may do: everything that lowers against autograd in float64, and a sentence for everything that does not."""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor

import models.cells
from kernels.decode_step import cell as decoding
from kernels.parallel_rnn import adjoint, codegen, op, parallel_rnn, reference
from kernels.parallel_rnn.cell import Cell, Pre, Rec, State, biased
from kernels.parallel_rnn.expressions import torch_functions
from kernels.parallel_rnn.trace import NotLowered, trace
from models import mixers
from tests.kernels.function_cases import FUNCTIONS, INF, NAN, cell_of, many, points
from tests.kernels.test_parallel_rnn import agree, everything, problem
from training.config.checks import check
from training.config.cli import checked, compose_config
from training.errors import UserError


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_derivatives_are_autograds(name: str) -> None:
    """In float64 at kinks, bounds, zeros and infinities; and where a value is a number so is its derivative, or autograd has none either."""
    x = points(60).double()
    x = torch.cat([x, torch.tensor([-0.0, 1e-300, 1.5, 2.0, 1.0], dtype=torch.float64)]).requires_grad_()
    value = FUNCTIONS[name](x)
    (wanted,) = torch.autograd.grad(value.sum(), x)
    functions = torch_functions(cell_of(FUNCTIONS[name]))
    assert functions is not None
    computed = functions[1](x.detach(), x.detach(), torch.ones_like(x))[0].expand_as(x)
    clear = ~x.isnan() & (x != 0 if name == "where" else x == x)  # autograd's own 0 * inf, see below
    sixth = name == "hardsigmoid"  # torch's is that of fp32
    assert torch.allclose(computed[clear], wanted[clear], rtol=1e-7 if sixth else 1e-9, atol=3e-9, equal_nan=True), (
        x[clear],
        computed[clear],
        wanted[clear],
    )


def test_a_branch_not_taken_leaks_nothing() -> None:
    """Where autograd makes NaN of 0 * inf: values, Jacobians and gradients are those of the branch taken, whatever arrives from above."""

    def step(x: Pre, h: State) -> tuple[Tensor, ...]:
        return (torch.where(h > 0, torch.log(h) + torch.sqrt(h), 2.0 * x) + torch.relu(h).sqrt() + torch.where(x > 1, 1 / (x - 1), x),)

    functions = torch_functions(Cell.from_step(step))
    assert functions is not None
    x, h, g = (torch.tensor(v, dtype=torch.float64) for v in ([1.0, 1.0, 0.5], [0.0, -1.0, 0.0], [1.0, 3.0, INF]))
    (J,) = functions[0](x, h)
    d_x, d_h = functions[1](x, h, g)
    assert J.tolist() == [0.0, 0.0, 0.0] and d_x.tolist() == [3.0, 9.0, INF] and d_h.tolist() == [0.0, 0.0, 0.0]


def test_nothing_that_may_be_nan_is_simplified() -> None:
    def step(x: Pre, h: State) -> tuple[Tensor, ...]:
        return (0.0 * h + (x - x) + x / x + torch.zeros_like(h) * x,)

    cell = Cell.from_step(step)
    x, h = (
        torch.tensor([[[[INF, NAN, 0.0, 2.0]]]], dtype=torch.float64).flatten(2, 2),
        torch.tensor([[[1.0, 1.0, 1.0, INF]]], dtype=torch.float64),
    )
    out, _ = parallel_rnn(cell, x, torch.zeros(0, 4, dtype=torch.float64), h)
    assert out.isnan().all()


def test_a_cell_of_many_functions_is_its_loop() -> None:
    cell = Cell.from_step(many)
    assert cell.lowered
    inputs = problem(cell, 2, 130, 5, resets=0.05)
    agree(everything(lambda *a: parallel_rnn(*a), cell, inputs), everything(reference.sequential, cell, inputs), 1e-8)
    compile(codegen.source(cell), "kernels", "exec")
    compile(decoding.source(cell), "decoding", "exec")


TABLE = torch.linspace(0.1, 0.6, 6, dtype=torch.float64)
COUNT = [0]


def counting(x: Tensor, h: Tensor) -> Tensor:
    COUNT[0] += 1
    return x + 0.1 * h * COUNT[0]


def in_place(x: Tensor, h: Tensor) -> Tensor:
    z = 2.0 * x
    z += 0.5 * h
    return z


NOT_LOWERED: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "branch": ("'sum'", lambda x, h: x + 0.5 * h if h.sum() > 0 else x + h),
    "sum": ("'sum'", lambda x, h: x + 0.1 * h.sum(0, keepdim=True)),
    "roll": ("roll", lambda x, h: torch.tanh(x + 0.5 * torch.roll(h, 1, -1))),
    "flip": ("'flip'", lambda x, h: torch.tanh(x + 0.5 * h.flip(0))),
    "index": ("getitem", lambda x, h: x + 0.5 * h[:, :1]),
    "matmul": ("matmul", lambda x, h: x + 0.1 * (h @ TABLE.expand(6, 6))),
    "softmax": ("softmax", lambda x, h: x + torch.softmax(h, -1)),
    "shape": ("'shape'", lambda x, h: x + 0.5 * h / h.shape[-1]),
    "table": ("Tensor inside the step", lambda x, h: x + h * TABLE),
    "table first": ("Tensor inside the step", lambda x, h: x + TABLE * h),
    "asking": ("something else than to what stands for them", lambda x, h: x + (0.5 if isinstance(h, Tensor) else 0.4) * h),
    "random": ("Tensor inside the step", lambda x, h: x + 0.0 * h * torch.rand(6)),
    "state": ("same at every call", counting),
    "in place": ("iadd", in_place),
    "methods in place": ("'mul_'", lambda x, h: (x + h).mul_(0.5) + 0.1 * h),
    "detach": ("'detach'", lambda x, h: x + 0.5 * h.detach() + 0.1 * h),
    "round": ("rounding_mode", lambda x, h: torch.tanh(x) + torch.div(h, 2, rounding_mode="floor")),
    "unknown": ("lgamma", lambda x, h: torch.lgamma(torch.sigmoid(x)) + 0.1 * h),
    "precision": ("precision", lambda x, h: x + 0.5 * h.float()),
    "bounds": ("bound of clamp", lambda x, h: torch.clamp(x + 0.5 * h, -x.abs(), x.abs())),
    "number": ("outside the range of fp32", lambda x, h: x + 1e-40 * h),
    "power": ("the power", lambda x, h: torch.tanh(x) ** 77 + 0.5 * h),
    "base": ("rpow", lambda x, h: 2 ** torch.tanh(x) + 0.5 * h),
}


@pytest.mark.filterwarnings("ignore:Cell")
@pytest.mark.parametrize("name", list(NOT_LOWERED))
def test_what_cannot_be_followed_runs_as_the_loop(name: str) -> None:
    word, call = NOT_LOWERED[name]

    def step(x: Pre, h: State) -> tuple[Tensor, ...]:
        return (call(x, h),)

    cell = Cell.from_step(step, f"cell_{name}")
    assert re.match(f"Cell cell_{name} runs as a loop in plain torch: .*{word}.*\\.$", cell.why_loop), cell.why_loop
    assert not cell.lowered and biased(cell).why_loop == cell.why_loop
    pre = torch.randn(2, 40, 1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inputs = pre, torch.zeros(0, 6, dtype=torch.float64), 0.1 * torch.ones(2, 1, 6, dtype=torch.float64), None
    COUNT[0] = 0
    computed = everything(parallel_rnn, cell, inputs)
    COUNT[0] = 0
    agree(computed, everything(reference.sequential, cell, inputs), 0.0)
    for method in ("parallel", "triton"):
        with pytest.raises(ValueError, match=f"method='{method}' is not possible: Cell cell_{name} runs as a loop"):
            parallel_rnn(cell, *inputs[:3], method=method)
    with pytest.raises(ValueError, match="no product of Jacobians"):
        adjoint(cell, *inputs, (pre[:, :, 0], pre[:, :, :0]), None)


def test_arguments_are_lowered_or_refused_wherever_they_stand() -> None:
    x = torch.linspace(-3, 3, 50, dtype=torch.float64)
    right: list[Callable[[Tensor], Tensor]] = [
        lambda x: F.softplus(x, 2.0), lambda x: F.softplus(x, threshold=1.0), lambda x: F.softplus(x, 3.0, 0.5), lambda x: F.relu(x, inplace=False),
        lambda x: F.relu(x, False), lambda x: torch.add(x, x, alpha=3), lambda x: torch.sub(x, 1.0, alpha=2), lambda x: x.add(x, alpha=0.5),
        lambda x: F.leaky_relu(x, 0.3), lambda x: F.elu(x, 2.0), lambda x: F.gelu(x, approximate="none"), lambda x: torch.clamp(x, min=-1, max=0.5),
        lambda x: x.clamp(max=0.0), lambda x: torch.div(x, 3.0, rounding_mode=None), lambda x: torch.addcmul(x, x, x, value=-2), lambda x: torch.exp(x, out=None),
        lambda x: torch.zeros_like(x, dtype=None) + x, lambda x: x.masked_fill(x > 1, 7.0), lambda x: x.where(x > 0, x * x), lambda x: F.hardtanh(x, -0.5, 2.0),
    ]  # fmt: skip
    for call in right:
        y = x.clone().requires_grad_()
        wanted = call(y)
        functions = torch_functions(cell_of(call))
        assert functions is not None
        computed = functions[1](x, x, torch.ones_like(x))[0]
        assert torch.allclose(computed, torch.autograd.grad(wanted.sum(), y)[0], rtol=1e-9), wanted
        out, _ = parallel_rnn(cell_of(call), x[None, None, None], torch.zeros(0, 50, dtype=torch.float64))
        assert torch.allclose(out[0, 0, 0], wanted.detach())
    wrong: list[Callable[[Tensor], Tensor]] = [
        lambda x: F.relu(x, inplace=True), lambda x: F.relu(x, True), lambda x: torch.exp(x, out=x), lambda x: F.silu(x, inplace=True),
        lambda x: F.softplus(x, x), lambda x: x.clamp(), lambda x: torch.clamp(x, 2.0, 1.0), lambda x: torch.where(x > 0), lambda x: x.to(torch.float32),
        lambda x: F.gelu(x, approximate="none") if x.dtype == torch.float64 else x, lambda x: torch.sigmoid(x > 0) + x, lambda x: (x > 0) + (x > 1) + x,
    ]  # fmt: skip
    for call in wrong:
        with pytest.raises(NotLowered, match=r"Cell a_function runs as a loop in plain torch: .*\."):
            trace(cell_of(call))


def test_a_cell_that_is_not_lowered_says_so_once_and_differentiates_twice() -> None:
    def softened(x: Pre, h: State) -> tuple[Tensor, ...]:
        return (torch.tanh(x + 0.5 * h) * torch.special.i0(0.1 * h),)

    cell = Cell.from_step(softened)
    op.warn_once.cache_clear()
    pre = torch.randn(1, 40, 1, 3, dtype=torch.float64, requires_grad=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            states, _ = parallel_rnn(cell, pre, torch.zeros(0, 3, dtype=torch.float64))
    assert ["Cell softened runs as a loop in plain torch: torch's special_i0 cannot be lowered to a kernel."] == [
        str(w.message) for w in caught
    ]
    oracle, _ = reference.sequential(cell, pre, torch.zeros(0, 3, dtype=torch.float64), torch.zeros(1, 1, 3, dtype=torch.float64), None)
    twice = []
    for s in (states, oracle):
        (g,) = torch.autograd.grad(s.square().sum(), pre, create_graph=True)
        twice.append(torch.autograd.grad(g.square().sum(), pre)[0])
    assert torch.equal(*twice)


def test_names_do_not_collide() -> None:
    """With those of generated code, of a bias, of Triton, of torch."""

    def step(
        x: Pre, tl: Pre, torch_: Pre, bias_x: Rec, v1_: Rec, g_h: Pre, triton: Rec, x0: State, d: State, h: State
    ) -> tuple[Tensor, ...]:
        x0 = torch.tanh(x + bias_x * h) * tl
        d = torch.sigmoid(torch_ + v1_ * d) * (1 - torch.sigmoid(torch_ + v1_ * d))
        return x0, d, torch.tanh(g_h + triton * h + x0 * d)

    cell = Cell.from_step(step)
    inputs = problem(cell, 1, 140, 3)
    agree(everything(parallel_rnn, cell, inputs), everything(reference.sequential, cell, inputs), 1e-9)
    bias = torch.randn(4, 3, dtype=torch.float64)
    with_bias = parallel_rnn(cell, *inputs[:3], bias_PD=bias)[0]
    assert torch.allclose(with_bias, parallel_rnn(cell, inputs[0] + bias, *inputs[1:3])[0])
    assert len({*biased(cell).rec}) == 3 + 4
    for text in (codegen.source(biased(cell)), decoding.source(cell)):
        compile(text, "kernels", "exec")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Files here are cells."""
    monkeypatch.setattr(models.cells, "__path__", [*models.cells.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if name.startswith("models.cells."):
            del sys.modules[name]


HEAD = "import torch\nfrom kernels.parallel_rnn.cell import Pre, Rec, State\n"
BROKEN = {
    "bare": ("def step(x: Pre, h: State): return torch.tanh(x + h)", r"must return a tuple of its 1 new state, (h,), not a bare tensor."),
    "bare_in_a_loop": (
        "def step(x: Pre, h: State): return torch.lgamma(x + h)",
        "must return a tuple of its 1 new state, (h,), not a bare tensor.",
    ),
    "too_many": ("def step(x: Pre, h: State): return x, h", "must return a tuple of its 1 new state, (h,), not 2 values."),
    "too_few": ("def step(x: Pre, c: State, h: State): return (x + h,)", "must return a tuple of its 2 new states, (c, h), not 1 values."),
    "none": ("def step(x: Pre, h: State): pass", "not None."),
    "compared": ("def step(x: Pre, h: State): return (x > h,)", "a new state must be a tensor of numbers, not a comparison."),
    "numbered": ("def step(x: Pre, h: State): return (1.0,)", "a new state must be a tensor of numbers, not a float."),
    "plain": ("def step(x: Pre, a, h: State): return (a * h + x,)", "annotate the argument 'a' with Pre, Rec, Mat or State."),
    "stars": ("def step(x: Pre, *h: State): return (x,)", "write the argument 'h' as an ordinary one"),
    "keywords": ("def step(x: Pre, h: State, **rest: Rec): return (x,)", "write the argument 'rest' as an ordinary one"),
    "default": ("def step(x: Pre, h: State, a: Rec = 0.5): return (a * h + x,)", "the argument 'a' has a default value"),
    "stateless": ("def step(x: Pre, a: Rec): return (a * x,)", "needs at least one Pre and one State argument."),
    "nothing": ("def stop(x: Pre, h: State): return (x,)", "has no function `step`"),
    "number": ("step = 3", "its step must be a function, not a int."),
    "syntax": ("def step(x: Pre, h: State) return (x,)", "is not Python: expected ':' in line 3."),
    "imports": (
        "import nowhere_to_be_found\ndef step(x: Pre, h: State): return (x,)",
        "cannot be imported: ModuleNotFoundError: No module named 'nowhere_to_be_found'.",
    ),
    "wrong_name": ("def step(x: Pre, h: State): return (x + hh,)", "its step fails with NameError: name 'hh' is not defined."),
    "in_place": ("def step(x: Pre, h: State):\n    h += x\n    return (h,)", "its step changes its argument 'h' in place"),
    "undone": (
        "def step(x: Pre, h: State):\n    z = torch.tanh(x + h)\n    z *= 0.5\n    return (z,)",
        "its step cannot be differentiated, it fails with RuntimeError: one of",
    ),
    "maximum": (
        "def step(x: Pre, h: State): return (torch.maximum(x + h, 0.5),)",
        "its step fails with TypeError: maximum(): argument 'other'",
    ),
    "whole": (
        "def step(x: Pre, h: State): return ((torch.lgamma(x + h) > 0).int(),)",
        "must be a tensor of floating point numbers, not torch.int32.",
    ),
    "bias": (
        "BIAS_INIT = {'q': 1.0}\ndef step(x: Pre, h: State): return (x + h,)",
        "BIAS_INIT names 'q', which is no Pre argument of its step; these are x.",
    ),
    "biases": (
        "BIAS_INIT = {'x': (1.0, 2.0, 3.0)}\ndef step(x: Pre, h: State): return (x + h,)",
        "BIAS_INIT['x'] must be a finite number or a pair of them",
    ),
}


@pytest.mark.parametrize("name", list(BROKEN))
def test_a_broken_cell_is_a_sentence_before_anything_starts(name: str, folder: Path) -> None:
    text, expected = BROKEN[name]
    (folder / f"{name}.py").write_text(f"{HEAD}{text}\n")
    config, problems = mixers.parse("a", {"type": "rnn", "cell": name}, 32)
    assert config is None and len(problems) == 1 and expected in problems[0] and problems[0].count("\n") == 0, problems
    with torch.device("meta"):
        assert mixers.parse("a", {"type": "rnn", "cell": name}, 32)[1] == problems


def test_a_file_that_is_no_name_and_a_cell_that_is_not_there(folder: Path) -> None:
    (folder / "my-cell.py").write_text(f"{HEAD}def step(x: Pre, h: State): return (x + h,)\n")
    assert "rename models/cells/my-cell.py" in mixers.parse("a", {"type": "rnn", "cell": "my-cell"}, 32)[1][0]
    assert "there is no cell 'nosuch'; models/cells/ holds" in mixers.parse("a", {"type": "rnn", "cell": "nosuch"}, 32)[1][0]


SMALL = [
    "model=paragru",
    "size=tiny",
    "train.seq_len=64",
    "train.micro_batch=2",
    "train.global_batch=2",
    "model.vocab_size=512",
    "data.path=nowhere",
]


@pytest.mark.parametrize("name", ["sine", "branching"])
def test_dry_run_of_a_new_cell(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from train import train

    body = {"sine": "return (torch.sin(x + a * h),)", "branching": "return (torch.tanh(x + a * h) if h.sum() > 0 else torch.sin(x),)"}[name]
    (folder / f"{name}.py").write_text(f"{HEAD}def step(x: Pre, a: Rec, h: State): {body}\n")
    assert train(checked(compose_config([*SMALL, "dry_run=true", f"model.mixers.paragru.cell={name}"])), "") is None
    assert "parameters" in capsys.readouterr().out


def test_sequence_parallelism_refuses_a_cell_that_is_a_loop(folder: Path) -> None:
    (folder / "looped.py").write_text(f"{HEAD}def step(x: Pre, h: State): return (torch.lgamma(x + h),)\n")
    words = [*SMALL, "parallel.sequence=2", "model.mixers.paragru.cell=looped"]
    resolved: Any = OmegaConf.to_container(compose_config(words), resolve=True)
    with pytest.raises(
        UserError, match="mixer paragru cannot be split over ranks, as its cell is solved as a loop .*lgamma cannot be lowered"
    ):
        check(resolved, 2)
