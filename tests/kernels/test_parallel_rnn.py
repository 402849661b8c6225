"""The recurrence solver against a float64 loop with autograd, for every cell on disk and one made up here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.parallel_rnn import parallel_rnn, parallel_rnn_step
from kernels.parallel_rnn.cell import Cell, Pre, Rec, State
from models.cells import available, load_cell


def three_states(x: Pre, y: Pre, a: Rec, b: Rec, u: State, v: State, w: State) -> tuple[State, State, State]:
    u = torch.tanh(x + a * w)
    v = 0.5 * v + torch.sigmoid(y) * u
    return u, v, torch.tanh(v + b * w)


CELLS = {name: load_cell(name) for name in available()} | {"three_states": Cell.from_step(three_states)}


def inputs(cell: Cell, B: int, T: int, D: int, dtype: torch.dtype, scale: float = 0.5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(T * 31 + D)
    shapes = [(B, T, len(cell.pre), D), (len(cell.rec), D), (B, len(cell.state), D)]
    drawn = [torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes]
    drawn[1] *= scale
    drawn[2] *= 0.5
    return [t.to(dtype).requires_grad_() for t in drawn]


def run(cell: Cell, tensors: list[torch.Tensor], starts: torch.Tensor | None, method: str) -> tuple[Any, ...]:
    states, final = parallel_rnn(cell, *tensors, starts, method=method)
    generator = torch.Generator().manual_seed(9)
    loss = (states.double() * torch.randn(states.shape, generator=generator, dtype=torch.float64)).sum()
    loss = loss + (final.double() * torch.randn(final.shape, generator=generator, dtype=torch.float64)).sum()
    wanted = [t for t in tensors if t.numel()]
    return states, final, torch.autograd.grad(loss, wanted)


@pytest.mark.parametrize("scale", [0.5, 8.0])
@pytest.mark.parametrize("T,D", [(1, 1), (2, 5), (33, 3), (129, 2)])
@pytest.mark.parametrize("name", sorted(CELLS))
def test_values_and_all_gradients_in_float64(name: str, T: int, D: int, scale: float) -> None:
    cell = CELLS[name]
    starts = torch.rand(2, T, generator=torch.Generator().manual_seed(1)) < 0.1
    for s in (None, starts):
        exact, ours = (run(cell, inputs(cell, 2, T, D, torch.float64, scale), s, m) for m in ("sequential", "auto"))
        torch.testing.assert_close(ours[0], exact[0], atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(ours[1], exact[1], atol=1e-12, rtol=1e-12)
        for a, b in zip(ours[2], exact[2]):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", sorted(CELLS))
def test_fp32_within_tolerance_of_float64(name: str) -> None:
    cell = CELLS[name]
    exact = run(cell, inputs(cell, 2, 257, 5, torch.float64), None, "sequential")
    single = run(cell, inputs(cell, 2, 257, 5, torch.float32), None, "auto")
    assert (single[0].double() - exact[0]).abs().max() < 1e-5
    for a, b in zip(single[2], exact[2]):
        assert (a.double() - b).norm() / b.norm() < 1e-4


@pytest.mark.parametrize("name", sorted(CELLS))
def test_saturated_gates_and_long_memory_stay_finite_and_exact(name: str) -> None:
    cell = CELLS[name]
    for offset in (-9.0, 9.0, 40.0):
        tensors = inputs(cell, 1, 200, 3, torch.float64, 2.0)
        with torch.no_grad():
            tensors[0] += offset
        exact, ours = (run(cell, tensors, None, m) for m in ("sequential", "auto"))
        assert all(torch.isfinite(g).all() for g in ours[2])
        for a, b in zip(ours[2], exact[2]):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-8)


def test_gradcheck() -> None:
    cell = CELLS["paralstm"]
    tensors = inputs(cell, 1, 5, 2, torch.float64)
    assert torch.autograd.gradcheck(lambda *t: parallel_rnn(cell, *t), tuple(tensors))


@pytest.mark.parametrize("name", sorted(CELLS))
def test_steps_and_split_sequences_equal_the_whole(name: str) -> None:
    cell = CELLS[name]
    pre, rec, h0 = (t.detach() for t in inputs(cell, 2, 21, 4, torch.float64))
    states, final = parallel_rnn(cell, pre, rec, h0)
    first, middle = parallel_rnn(cell, pre[:, :8], rec, h0)
    second, last = parallel_rnn(cell, pre[:, 8:], rec, middle)
    torch.testing.assert_close(torch.cat([first, second], 1), states)
    torch.testing.assert_close(last, final)
    h = h0
    for t in range(21):
        h = parallel_rnn_step(cell, pre[:, t], rec, h)
    torch.testing.assert_close(h, final)


def test_bf16_inputs_are_solved_in_fp32() -> None:
    cell = CELLS["paragru"]
    pre, rec, h0 = (t.detach() for t in inputs(cell, 2, 65, 8, torch.float32))
    low, final = parallel_rnn(cell, pre.bfloat16(), rec, h0)
    oracle, _ = parallel_rnn(cell, pre.bfloat16().double(), rec.double(), h0.double(), method="sequential")
    assert low.dtype == torch.bfloat16 and final.dtype == torch.float32
    assert (low.double() - oracle).abs().max() <= 1.5 * (oracle.bfloat16().double() - oracle).abs().max()


def test_mistakes_are_sentences() -> None:
    def no_role(x: Pre, h: float) -> tuple[float]:
        return (h,)

    with pytest.raises(ValueError, match="annotate the argument 'h'"):
        Cell.from_step(no_role)
    with pytest.raises(ValueError, match="models/cells/ holds"):
        load_cell("grru")
    cell = CELLS["paragru"]
    with pytest.raises(ValueError, match="takes pre"):
        parallel_rnn(cell, torch.zeros(1, 2, 2, 4), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="choose one of"):
        parallel_rnn(cell, torch.zeros(1, 2, 3, 4), torch.zeros(3, 4), method="magic")
