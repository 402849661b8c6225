"""Problems for the solvers of dense heads, and cells that the models do not have."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels.dense_rnn import launch, matrices, recompute, reference
from kernels.parallel_rnn import with_bias
from kernels.parallel_rnn.cell import Cell, Mat, Pre, Rec, State, biased
from kernels.parallel_rnn.launch import Layout
from models.cells import available, load_cell


def shared_matrix(x: Pre, y: Pre, R: Mat, a: Rec, m: State, h: State) -> tuple[State, State]:
    """One matrix, two operands, and a memory that looks at the emitted state."""
    m = torch.sigmoid(y + R @ m) * m + a * h
    return m, torch.tanh(x + R @ h) * torch.sigmoid(m)


def raw_products(x: Pre, R: Mat, Q: Mat, m: State, h: State) -> tuple[State, State]:
    """Products that are also used as they are: as a new state and as another product's operand."""
    p = R @ h
    return p, torch.tanh(x + p + 0.1 * m) + 0.5 * torch.tanh(Q @ p)


def repeated_input(x: Pre, R: Mat, h: State) -> tuple[State]:
    return (torch.tanh(x + x + R @ h),)


def known_cells() -> dict[str, Cell]:
    return {
        **{name: load_cell(name) for name in available() if load_cell(name).mat},
        **{step.__name__: Cell.from_step(step, step.__name__) for step in (shared_matrix, raw_products, repeated_input)},
    }


def problem(
    name: str, B: int, T: int, E: int, K: int, *, gain: float = 1.0, starts: float = 0.0, seed: int = 0, device: str = "cpu"
) -> tuple[Cell, list[Tensor], Tensor | None]:
    """(cell, [pre (B, T, P, D), rec, mat, h0] in float64, starts)."""
    cell, generator = known_cells()[name], torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    D = E * K
    pre = draw(B, T, len(cell.pre), D)
    if name == "dense_lstm":
        pre[:, :, 1] += torch.linspace(0, 4, D)
        pre[:, :, 0] += torch.linspace(0, -4, D)
    tensors = [pre, draw(len(cell.rec), D) * 0.3, draw(E, K, len(cell.mat), K) * gain / K**0.5, draw(B, len(cell.state), D) * 0.3]
    new = torch.rand(B, T, generator=generator) < starts if starts else None
    return cell, [t.to(device) for t in tensors], None if new is None else new.to(device)


def wanted(cell: Cell, tensors: list[Tensor], starts: Tensor | None, d_emitted: Tensor, d_final: Tensor) -> list[Tensor]:
    """Emitted and final states and all gradients by the float64 loop under autograd."""
    given = [t.detach().double().requires_grad_() for t in tensors]
    states, final = reference.sequential(cell, *(*given, starts))
    loss = (states[:, :, -1] * d_emitted.double()).sum() + (final * d_final.double()).sum()
    return [states[:, :, -1].detach(), final.detach(), *torch.autograd.grad(loss, given, allow_unused=True, materialize_grads=True)]


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-300)) if b.numel() else 0.0


def cotangents(tensors: list[Tensor], seed: int = 1) -> tuple[Tensor, Tensor]:
    pre, _, _, h0 = tensors
    generator = torch.Generator().manual_seed(seed)
    d_emitted = torch.randn(*pre.shape[:2], pre.shape[3], generator=generator, dtype=torch.float64)
    return d_emitted.to(pre.device), torch.randn(h0.shape, generator=generator, dtype=torch.float64).to(pre.device)


def check_walked(module: ModuleType, sizes: tuple[int, int, int, int], plans_of: Callable[[Cell, Tensor], list[Any]]) -> None:
    """Matrices that expand, B, T, E, K as `sizes`: what is not certified is walked in order, forwards and backwards, bit for bit as without slices.
    module: launch.py or large.py; plans_of: a plan of one slice and one of several."""
    before, launch.CORRECTIONS = launch.CORRECTIONS, {2: 1, 4: 1}
    chaotic = problem("dense_lstm", *sizes, gain=12.0, starts=0.02, seed=3)
    chaotic[1][0][:, :, 0] += 4
    cell, tensors, starts = chaotic
    given, (d_emitted, d_final) = [t.float() for t in tensors], cotangents(tensors)
    launch.last_report()
    plans = plans_of(cell, given[0])
    one, several = (module.forward(cell, *(*given, starts, plan)) for plan in plans)
    assert all(torch.equal(a, b) for a, b in zip(one, several))
    ends = (*one[:2], d_emitted.float(), None, d_final.float())
    gradients, in_slices = (module.backward(cell, *(*given, starts, *ends, plan)) for plan in plans)
    assert all(distance(a, b) < 1e-5 for a, b in zip(in_slices, gradients))
    report = launch.last_report()
    assert report["walked"] > 0.1 and report["corrections"] == 1, report
    launch.CORRECTIONS = before


def check_gradient_of_matrices(
    name: str, sizes: tuple[int, int, int, int], dtype: torch.dtype, blocks: int, device: str, limit: float
) -> None:
    """The kernel of the gradient of matrices, of random emitted states and cotangents, against float64. sizes: B, T, E, K; blocks: in how many the
    cotangents lie, as gradients of inputs do, or 0: head by head."""
    (B, T, E, K), plain = sizes, known_cells()[name]
    cell, (_, rec, mat, h0), starts = biased(plain), *problem(name, *sizes, starts=0.01, device=device)[1:]
    generator, N, D = torch.Generator(device).manual_seed(5), B * T, E * K

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    like, emitted = draw(max(1, blocks), B, T, len(cell.pre), D // max(1, blocks)).permute(1, 2, 3, 0, 4), draw(B, T, D)
    rec = with_bias(rec, rec.new_zeros(len(cell.pre), D))
    p = launch.Problem(cell, like, rec, launch.joined(mat), h0, starts, launch.Plan.of(like, K, 1), False)
    written, before = launch.facts(cell), recompute.states_before(p, emitted, starts)
    by_head = draw(p.E, N, len(p.dense.products), p.K)
    alone = recompute.emitted_alone(p)
    operands = None if alone else [recompute.by_head(p, before), recompute.by_head(p, draw(B, T, D))][: len(p.dense.operands)]
    assert not blocks or written.as_inputs
    d = matrices.Cotangents(p, Layout(like) if blocks else None, by_head, written.as_inputs)
    h0_emitted = p.h0[:, -1].to(dtype).contiguous()
    d_mat, sums = matrices.gradient_by_kernel(p, emitted, h0_emitted, operands, d, written.as_ones)
    d_mat = launch.parted(d_mat, E, K)
    wanted_, u = torch.zeros_like(d_mat, dtype=torch.float64), [recompute.by_head(p, before)] if operands is None else operands
    for i, product in enumerate(p.dense.products):
        dp = like.double()[:, :, written.as_inputs[i]].reshape(N, p.E, p.K).transpose(0, 1) if blocks else by_head[:, :, i].double()
        whole = u[product.operand].double().transpose(1, 2) @ dp
        wanted_[:, :, product.matrix] += launch.parted(whole[:, :, None], E, K)[:, :, 0]
        for r in (r for r, of in written.as_ones.items() if of == i):
            assert distance(sums[r], dp.sum(1).flatten()) < limit, (name, sizes, "sums", distance(sums[r], dp.sum(1).flatten()))
    assert distance(d_mat, wanted_) < limit, (name, sizes, distance(d_mat, wanted_))
