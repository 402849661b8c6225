"""parallel_rnn against the sequential loop in float64: states, final state and every gradient, for every cell in models/cells."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

from kernels.parallel_rnn import parallel_rnn, parallel_rnn_step, reference
from kernels.parallel_rnn.cell import Cell, Pre, Rec, State
from kernels.parallel_rnn.trace import trace
from models.cells import diagonal, load_cell


def three(x: Pre, y: Pre, a: Rec, b: Rec, p: State, q: State, h: State) -> tuple[State, State, State]:
    """A cell of three states that no paper has."""
    p = torch.tanh(x + a * h - 0.3 * q)
    q = q * torch.sigmoid(y + b * p) + p / (1 + torch.exp(-h))
    return p, q, torch.tanh(q) * torch.sigmoid(h - 1)


def cells() -> list[Cell]:
    return [*(load_cell(name) for name in diagonal()), Cell.from_step(three)]


Problem = tuple[Tensor, Tensor, Tensor, Tensor | None]  # pre, rec, h0, starts


def problem(cell: Cell, B: int, T: int, D: int, weight: float = 0.5, bias: float = 0.0, resets: float = 0.0) -> Problem:
    g = torch.Generator().manual_seed(T + D)
    pre = torch.randn(B, T, len(cell.pre), D, generator=g, dtype=torch.float64) * (1 + abs(bias) / 4)
    pre[:, :, 0] += bias
    rec = weight * (2 * torch.rand(len(cell.rec), D, generator=g, dtype=torch.float64) - 1)
    h0 = torch.randn(B, len(cell.state), D, generator=g, dtype=torch.float64)
    starts = torch.rand(B, T, generator=g) < resets if resets else None
    return pre, rec, h0, starts


def everything(run: Callable[..., tuple[Tensor, Tensor]], cell: Cell, inputs: Problem) -> list[Tensor]:
    """states, final, and the gradients of pre, rec, h0 under fixed cotangents."""
    pre, rec, h0 = (x.clone().requires_grad_() for x in inputs[:3])
    states, final = run(cell, pre, rec, h0, inputs[3])
    g = torch.Generator().manual_seed(7)
    loss = (states * torch.randn(states.shape, generator=g, dtype=torch.float64)).sum()
    loss = loss + (final * torch.randn(final.shape, generator=g, dtype=torch.float64)).sum()
    wanted = [pre, rec, h0] if rec.numel() else [pre, h0]
    return [states.detach(), final.detach(), *torch.autograd.grad(loss, wanted)]


def agree(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for name, a, b in zip(("states", "final", "d 0", "d 1", "d 2"), found, wanted):
        error = ((a - b).abs().max() / (1 + b.abs().max())).item()
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("cell", cells(), ids=lambda c: c.name)
@pytest.mark.parametrize(("T", "D", "slices"), [(1, 5, None), (2, 1, 2), (31, 5, 4), (33, 33, 5), (257, 5, 9), (257, 1, None)])
def test_parallel_is_the_loop(cell: Cell, T: int, D: int, slices: int | None) -> None:
    inputs = problem(cell, 2, T, D, resets=0.05)
    run = lambda *a: reference.parallel(*a, slices=slices)  # noqa: E731
    agree(everything(run, cell, inputs), everything(reference.sequential, cell, inputs), 1e-9)


@pytest.mark.parametrize("cell", cells(), ids=lambda c: c.name)
@pytest.mark.parametrize(("weight", "bias"), [(8.0, 0.0), (2.0, 40.0), (0.5, -40.0), (0.5, 9.2), (4.0, -9.2)])
def test_any_weight_scale_saturation_and_long_memory(cell: Cell, weight: float, bias: float) -> None:
    inputs = problem(cell, 1, 96, 8, weight, bias)
    run = lambda *a: reference.parallel(*a, slices=8)  # noqa: E731
    found, wanted = everything(run, cell, inputs), everything(reference.sequential, cell, inputs)
    assert torch.allclose(found[0], wanted[0], atol=1e-7, rtol=1e-6)
    for a, b in zip(found[2:], wanted[2:]):
        assert ((a - b).norm() <= 1e-5 * (1 + b.norm())).item()


@pytest.mark.parametrize("cell", cells(), ids=lambda c: c.name)
def test_fp32_and_bf16(cell: Cell) -> None:
    inputs = problem(cell, 2, 129, 16)
    wanted = everything(reference.sequential, cell, inputs)
    pre, rec, h0 = (x.float() for x in inputs[:3])
    states, final = parallel_rnn(cell, pre, rec, h0)
    assert (states - wanted[0]).abs().max() < 1e-5 and final.dtype == torch.float32
    low = pre.bfloat16()
    states, final = parallel_rnn(cell, low, rec, h0)
    oracle = reference.sequential(cell, low.double(), rec.double(), h0.double(), None)[0]
    floor = (oracle.bfloat16().double() - oracle).abs().max()
    assert states.dtype == torch.bfloat16 and final.dtype == torch.float32
    assert (states.double() - oracle).abs().max() <= 1.5 * floor + 1e-6


@pytest.mark.parametrize("cell", cells(), ids=lambda c: c.name)
def test_step_is_the_op(cell: Cell) -> None:
    pre, rec, h0, _ = problem(cell, 2, 5, 3)
    states, final = parallel_rnn(cell, pre, rec, h0)
    h = h0
    for t in range(5):
        h = parallel_rnn_step(cell, pre[:, t], rec, h)
    assert torch.allclose(h, final) and torch.allclose(h, states[:, -1])


@pytest.mark.parametrize("name", ["paragru", "paralstm"])
def test_gradcheck(name: str) -> None:
    cell = load_cell(name)
    pre, rec, h0, starts = problem(cell, 1, 6, 2, resets=0.3)
    inputs = tuple(x.requires_grad_() for x in (pre, rec, h0))
    assert torch.autograd.gradcheck(lambda *a: parallel_rnn(cell, *(*a, starts), method="parallel"), inputs)


def test_heads_bias_emitted_and_borders() -> None:
    cell = load_cell("paralstm")
    (P, R, S), (E, B, T, K) = (len(cell.pre), len(cell.rec), len(cell.state)), (3, 2, 70, 4)
    g = torch.Generator().manual_seed(0)
    pre = torch.randn(E, B, T, P, K, generator=g, dtype=torch.float64).requires_grad_()
    rec, bias = (torch.randn(n, E * K, generator=g, dtype=torch.float64).mul(0.3).requires_grad_() for n in (R, P))
    h0 = torch.randn(B, S, E * K, generator=g, dtype=torch.float64).requires_grad_()
    leaves, d = (pre, rec, bias, h0), torch.randn(B, T, E * K, generator=g, dtype=torch.float64)
    flat = pre.permute(1, 2, 3, 0, 4).flatten(3)
    wanted, _ = parallel_rnn(cell, flat + bias, rec, h0, method="sequential", emitted=True)
    gradients = torch.autograd.grad((wanted * d).sum(), leaves)
    for save in ("states", "borders"):
        found, _ = parallel_rnn(cell, pre.permute(1, 2, 3, 0, 4), rec, h0, bias_PD=bias, emitted=True, save=save)
        assert torch.allclose(found, wanted, atol=1e-11)
        for a, b in zip(torch.autograd.grad((found * d).sum(), leaves), gradients):
            assert torch.allclose(a, b, atol=1e-9)
    step = parallel_rnn_step(cell, flat[:, 0].detach(), rec, h0, bias)
    assert torch.allclose(step[:, -1], wanted[:, 0], atol=1e-11)


def test_messages() -> None:
    cell = load_cell("paragru")
    with pytest.raises(ValueError, match="takes pre"):
        parallel_rnn(cell, torch.zeros(1, 2, 2, 4), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="choose one of"):
        parallel_rnn(cell, torch.zeros(1, 2, 3, 4), torch.zeros(3, 4), method="fast")
    with pytest.raises(ValueError, match="annotate"):
        Cell.from_step(lambda x, h: (x,))
    with pytest.raises(ValueError, match="no cell"):
        load_cell("nosuch")


@pytest.mark.parametrize("name", ["paralstm", "mingru"])
def test_opcheck(name: str) -> None:
    cell = load_cell(name)
    pre, rec, h0, starts = problem(cell, 2, 7, 3, resets=0.3)
    leaves = [x.requires_grad_() for x in (pre, rec, h0)]
    torch.library.opcheck(torch.ops.everywhen.parallel_rnn.default, (*leaves, starts, cell.key, "auto", False))
    torch.library.opcheck(torch.ops.everywhen.parallel_rnn.default, (*leaves, starts, cell.key, "auto", True))
    leaves = [x.detach().float().requires_grad_() for x in leaves]
    torch.library.opcheck(torch.ops.everywhen.parallel_rnn.default, (*leaves, None, cell.key, "parallel", False))


def test_compile_checkpoint_and_autocast() -> None:
    cell = load_cell("paragru")
    pre, rec, h0 = (x.float().requires_grad_() for x in problem(cell, 2, 40, 8)[:3])

    def run(pre: Tensor, rec: Tensor, h0: Tensor) -> Tensor:
        states, final = parallel_rnn(cell, 2 * pre, rec, h0)
        return states.sum() + (final**2).sum()

    wanted = torch.autograd.grad(run(pre, rec, h0), (pre, rec, h0))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    again = torch.autograd.grad(torch.utils.checkpoint.checkpoint(run, pre, rec, h0, use_reentrant=False), (pre, rec, h0))
    with torch.autocast("cpu", torch.bfloat16):
        cast = torch.autograd.grad(run(pre, rec, h0), (pre, rec, h0))
    for found in (torch.autograd.grad(compiled(pre, rec, h0), (pre, rec, h0)), again, cast):
        for a, b in zip(found, wanted):
            assert torch.equal(a, b)


def test_non_contiguous_and_empty() -> None:
    cell = load_cell("paralstm")
    pre, rec, h0, _ = problem(cell, 2, 9, 6)
    odd = pre.transpose(1, 3).contiguous().transpose(1, 3)
    assert torch.equal(parallel_rnn(cell, odd, rec, h0)[0], parallel_rnn(cell, pre, rec, h0)[0])
    states, final = parallel_rnn(cell, pre[:, :0], rec, h0)
    assert states.shape == (2, 0, 2, 6) and torch.equal(final, h0)


def test_kernels_need_a_gpu() -> None:
    with pytest.raises(ValueError, match="method='triton' is not possible"):
        parallel_rnn(load_cell("paragru"), torch.zeros(1, 2, 3, 4), torch.zeros(3, 4), method="triton")


def test_linear_cells_are_recognised() -> None:
    assert [name for name in diagonal() if trace(load_cell(name)).linear] == ["mingru", "minlstm"]
