"""The op everywhen::dense_rnn, whatever solves underneath. Saved for backward are the inputs and the states: the emitted one in the dtype of
pre, in which it enters the product, those that a cell keeps to itself in the dtype of the arithmetic (a rounded memory would be another).

Legend: B batch, T time, P input projections, R recurrent weights, G matrices, S states, D = E K channels.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels.dense_rnn import automata, large, launch, marks, plans, reference
from kernels.op import define
from kernels.parallel_rnn.cell import REGISTRY, Cell
from kernels.parallel_rnn.op import flat, joined, warn_once


def kernels_for(pre: Tensor, K: int) -> ModuleType:
    """The module that launches kernels for heads of K channels."""
    return large if large.takes(pre, K) else launch


def saving(module: ModuleType) -> ModuleType:
    """The module that saves borders in place of states for it, and makes states again."""
    return marks if module is launch else module


def use_triton(cell: Cell, pre: Tensor, K: int, method: str, halves: bool = False) -> bool:
    """Whether the kernels run. Raises ValueError if they were asked for by name and cannot."""
    if method == "sliced" or pre.dtype == torch.float64 and method != "triton":
        return False
    module = kernels_for(pre, K)
    reason = module.why_not(cell, pre, K)
    if not reason and halves and module is large:
        reason = f"Heads of {K} channels have no kernels that multiply in two halves."
    if not reason and method == "auto" and pre.is_cuda and module is large and not large.proven(pre, K):
        warn_once(
            f"Heads of {K} channels in {str(pre.dtype)[6:]} are solved in plain torch, which is slow: their kernels have not been seen to be right "
            "on a GPU. EVERYWHEN_DENSE_KERNELS=1 runs them."
        )
        return False
    if reason and method == "triton":
        raise ValueError(f"method='triton' is not possible: {reason}")
    if reason and pre.is_cuda:
        warn_once(f"{reason} It is solved in plain torch, which is slow.")
    return not reason and (method == "triton" or pre.is_cuda)


def chosen(pre: Tensor, h0: Tensor, layer: plans.Layer | None, back: bool) -> tuple[int, int] | tuple[()]:
    """Slices and burn-in in plain torch, where a layer has learnt them."""
    if layer is None:
        return ()
    (B, T), D = pre.shape[:2], h0.shape[2]
    return layer.passes[back].plan(reference.choose_slices(B, T, D, pre.device), T)


def note(layer: plans.Layer | None, back: bool, report: reference.Report, heads: int) -> None:
    if layer is not None and report.slices > 1:
        layer.note(back, report, heads)


def _forward(
    pre: Tensor,
    rec: Tensor,
    mat: Tensor,
    h0: Tensor,
    starts: Tensor | None,
    key: str,
    method: str,
    learner: int,
    halves: bool,
    borders: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(emitted (B, T, D) in the dtype of pre, kept (B, T, S - 1, D) and final (B, S, D) in the dtype of the arithmetic); T >= 1.
    learner: the number of the layer whose plan (plans.py) is in force, or 0. halves: the product in two halves (launch.forward), emitted states in
    the dtype of the arithmetic. borders: in place of kept, marks (B, M, S, D) from which the backward pass makes it again."""
    cell, dtype, layer = REGISTRY[key], reference.compute_dtype(pre), plans.find(learner)
    by_maps = None if layer is None or halves or borders else layer.maps.in_force(pre, mat, h0.shape[1])
    if use_triton(cell, pre, mat.shape[1], method, halves):
        module = kernels_for(pre, mat.shape[1])
        with torch.cuda.device_of(pre):  # Triton launches on the current device
            if layer is not None and not borders and not halves and module is launch:
                return _learning(layer, by_maps, cell, pre, rec, mat, h0, starts)
            solved = saving(module).forward_with_marks if borders else module.forward
            return solved(cell, pre, rec, mat, h0, starts, layer=layer, halves=halves)
    with torch.autocast(pre.device.type, enabled=False):
        given = (cell, flat(pre).to(dtype), rec.to(dtype), mat.to(dtype), h0.to(dtype), starts)
        if by_maps is not None and layer is not None:
            states = automata.solve(*given, *by_maps)
            n, walked = automata.last_report.slices, automata.last_report.walked
            layer.note_walked(torch.full((pre.shape[0], mat.shape[0]), 0 if walked else n), n)
        else:
            states = reference.solve(*given, *chosen(pre, h0, layer, False))
            note(layer, False, reference.last_report, pre.shape[0] * mat.shape[0])
    if layer is not None and not borders:
        layer.maps.leave(states[:, :, -1], states[:, :, :-1])
    return (
        states[:, :, -1].to(dtype if halves else pre.dtype, copy=True).contiguous(),
        h0.new_zeros(h0.shape[0], marks.marks_of(pre.shape[1]), *h0.shape[1:], dtype=dtype)
        if borders
        else states[:, :, :-1].contiguous().clone(),
        states[:, -1].clone(),
    )


def _learning(
    layer: plans.Layer, by_maps: tuple[Tensor, int] | None, cell: Cell, pre: Tensor, rec: Tensor, mat: Tensor, h0: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """launch.forward of a layer that learns, by composed maps where these are in force; states that it asks for are left."""
    if by_maps is None:
        emitted, kept, final = launch.forward(cell, pre, rec, mat, h0, starts, layer=layer)
    else:
        emitted, kept, final, bad = automata.forward(cell, pre, rec, mat, h0, starts, *by_maps)
        layer.note_walked(bad, automata.slices_of(pre, mat, by_maps[1]))
    layer.maps.leave(emitted, kept)
    return emitted, kept, final


def _fake(
    pre: Tensor,
    rec: Tensor,
    mat: Tensor,
    h0: Tensor,
    starts: Tensor | None,
    key: str,
    method: str,
    learner: int,
    halves: bool,
    borders: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    (B, T), S, D = pre.shape[:2], h0.shape[1], h0.shape[2]
    inner = reference.compute_dtype(pre)
    return (
        pre.new_empty(B, T, D, dtype=inner if halves else pre.dtype),
        pre.new_empty(B, marks.marks_of(T), S, D, dtype=inner) if borders else pre.new_empty(B, T, S - 1, D, dtype=inner),
        pre.new_empty(B, S, D, dtype=inner),
    )


def _save(inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> tuple[tuple[Any, ...], tuple[str, str, int, bool, bool]]:
    pre, rec, mat, h0, starts, key, method, learner, halves, borders = inputs
    return (pre, rec, mat, h0, starts, *output[:2]), (key, method, learner, halves, borders)


def _backward(
    d_emitted: Tensor | None, d_kept: Tensor | None, d_final: Tensor | None, pre: Tensor, rec: Tensor, mat: Tensor, h0: Tensor,
    starts: Tensor | None, emitted: Tensor, kept: Tensor, key: str, method: str, learner: int, halves: bool, borders: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of pre, rec, mat and h0, each in the dtype of its tensor."""
    cell, dtype, layer = REGISTRY[key], reference.compute_dtype(pre), plans.find(learner)
    d_emitted = torch.zeros_like(emitted) if d_emitted is None else d_emitted
    d_final = torch.zeros_like(h0) if d_final is None else d_final
    with torch.cuda.device_of(pre), torch.autocast(pre.device.type, enabled=False):
        if use_triton(cell, pre, mat.shape[1], method, halves):
            module = kernels_for(pre, mat.shape[1])
            kept = saving(module).restore(cell, pre, rec, mat, h0, starts, kept, layer=layer, halves=halves) if borders else kept
            d_pre, d_rec, d_mat, d_h0 = module.backward(
                cell, pre, rec, mat, h0, starts, emitted, kept, d_emitted, None if borders else d_kept, d_final, layer=layer, halves=halves
            )
            return d_pre, d_rec.to(rec.dtype), d_mat.to(mat.dtype), d_h0.to(h0.dtype)
    if borders:
        kept = _forward(pre, rec, mat, h0, starts, key, method, learner, halves, False)[1]
    d_kept = torch.zeros_like(kept) if d_kept is None or borders else d_kept
    with torch.autocast(pre.device.type, enabled=False):
        states, d_states = joined(emitted.to(dtype), kept), joined(d_emitted.to(dtype), d_kept.to(dtype))
        x, w, R, h = flat(pre).to(dtype), rec.to(dtype), mat.to(dtype), h0.to(dtype)
        d_pre, d_rec, d_mat, d_h0 = reference.backward(
            cell, x, w, R, h, starts, states, d_states, d_final.to(dtype), *chosen(pre, h0, layer, True)
        )
    note(layer, True, reference.last_backward, pre.shape[0] * mat.shape[0])
    return (
        torch.empty_like(pre).copy_(d_pre.view(pre.shape)),
        d_rec.to(rec.dtype).contiguous(),
        d_mat.to(mat.dtype).contiguous(),
        d_h0.to(h0.dtype).clone(),
    )


def _fake_backward(*given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pre, rec, mat, h0 = given[3:7]
    return torch.empty_like(pre), rec.new_empty(rec.shape), mat.new_empty(mat.shape), h0.new_empty(h0.shape)


solve, solve_op = define("dense_rnn", _forward, _fake, _backward, fake_backward=_fake_backward, save=_save, materialize=False)
