"""The recurrences of an exported folder: in plain torch with gradients, and in its kernels on a GPU without.

Legend: B batch, T time, D width, P input projections, R recurrent weights, S states of a cell.
"""

from __future__ import annotations

import functools
import inspect
import os
from typing import Any

import torch
from torch import Tensor, nn

from kernels.delta_rule.reference import delta_rule_chunked, delta_rule_step
from kernels.m2rnn.reference import m2rnn_sequential
from kernels.parallel_rnn.reference import compute_dtype, parallel, sequential
from kernels.parallel_rnn.step import HeadMatrix
from kernels.ssd.reference import ssd_chunked

CELLS: dict[str, Any] = {}  # name: (step, (its Jacobian, its gradients) in torch, its kernel, whether it jumps); the middle two may be None
BIASES: dict[str, Any] = {}  # name: where the biases of its inputs start
triton: Any = None  # the module, in the exported file, if it is installed
SCAN: list[Any] = []  # Mamba-2's scan in kernels, if this file has it
RULE: list[Any] = []  # the delta rule in kernels, if this file has it
MATRIX: list[Any] = []  # M2RNN in a kernel, if this file has it
Pre = Rec = Mat = State = LogState = (
    Tensor  # what the arguments of a cell's step are: input projection, learned weight, matrix over a head, carried state
)


class Cell:
    """A recurrent cell: its step function, the names of its arguments by role, and what solves it: its derivatives in torch and its kernel (or None)."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.step, self.derivatives, self.kernel, self.jumps = CELLS[name]
        roles = {name: str(p.annotation) for name, p in inspect.signature(self.step).parameters.items()}
        kinds = (("Pre",), ("Rec",), ("Mat",), ("State", "LogState"))
        named = ([n for n, role in roles.items() if role in kind] for kind in kinds)
        self.pre, self.rec, self.mat, self.state = named

    def __call__(self, pre: Any, rec: Any, state: Any, mat: Any = ()) -> Any:
        given = zip((*self.pre, *self.rec, *self.mat, *self.state), (*pre, *rec, *mat, *state))
        new = self.step(**dict(given))
        return tuple(n if n.dim() >= state[0].dim() else n.expand_as(state[0]) for n in new)

    def __reduce__(self) -> Any:
        """Copies and pickles name the cell, as a kernel can be neither copied nor pickled."""
        return load_cell, (self.name,)


@functools.cache
def load_cell(name: str) -> Cell:
    return Cell(name)


def torch_functions(cell: Cell) -> Any:
    return cell.derivatives


def jumps(cell: Cell) -> bool:
    """Whether the new state is a discontinuous function of the old one."""
    return bool(cell.jumps)


def bias_init(name: str, changed: Any = None) -> Any:
    """Where the biases of a cell's inputs start: (lowest, highest over the channels) by argument. changed: of some of them, instead."""
    pairs = {argument: value if isinstance(value, (tuple, list)) else (value, value) for argument, value in (changed or {}).items()}
    return {**BIASES.get(name, {}), **pairs}


def linears(x: Tensor, *layers: nn.Linear, apart: int = 0) -> tuple[Tensor, ...]:
    """What each of `layers` makes of x (..., D). They are called, not multiplied by their weights: an adapter, a hook or a quantised layer that took the
    place of one acts in its call. apart: says nothing here."""
    return tuple(layer(x) for layer in layers)


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """What `layer` makes of x (..., D)."""
    return linears(x, layer)[0]


def parallel_rnn(
    cell: Any,
    pre: Tensor,
    rec_RD: Tensor,
    h0_BSD: Tensor | None,
    starts_BT: Tensor | None,
    *,
    bias_PD: Tensor | None = None,
    emitted: bool = False,
) -> tuple[Tensor, Tensor]:
    """All states (B, T, S, D), with `emitted` only the last one's (B, T, D), and the final states (B, S, D); a document start zeroes the state
    first. pre (B, T, P, D) or (B, T, P, heads, D / heads). Without gradients and on a GPU by the cell's kernel; else in plain torch, over
    many slices of time at once."""
    pre_BTPD = pre.flatten(3)
    if bias_PD is not None:
        pre_BTPD = pre_BTPD + bias_PD.to(pre_BTPD.dtype)
    (B, T, _, D), dtype = pre_BTPD.shape, compute_dtype(pre_BTPD)
    h0 = (torch.zeros(B, len(cell.state), D, device=pre.device) if h0_BSD is None else h0_BSD).to(dtype)
    learning = torch.is_grad_enabled() and (pre.requires_grad or rec_RD.requires_grad or h0.requires_grad)
    if has_kernel(cell, pre_BTPD) and T and not learning:
        states, final = walk_on_gpu(cell, pre_BTPD, rec_RD, h0, starts_BT)
    else:
        # A cell without written derivatives runs step by step under autograd.
        run = sequential if T == 1 or cell.derivatives is None else parallel
        with torch.autocast(pre.device.type, enabled=False):
            states, final = run(cell, pre_BTPD.to(dtype), rec_RD.to(dtype), h0, starts_BT)
        states = states.to(pre.dtype)
    return states[:, :, -1] if emitted else states, final


def parallel_rnn_step(cell: Any, pre_BPD: Tensor, rec_RD: Tensor, h_BSD: Tensor, bias_PD: Tensor | None = None) -> Tensor:
    """The states (B, S, D) after one token."""
    return parallel_rnn(cell, pre_BPD[:, None], rec_RD, h_BSD, None, bias_PD=bias_PD)[1].to(h_BSD.dtype)


def dense_rnn(
    cell: Any, pre: Tensor, rec_RD: Tensor, mat_EKGK: Tensor, h0_BSD: Tensor | None, starts_BT: Tensor | None, *, bias_PD: Tensor,
    learner: int = 0, save: str = "states",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Emitted states (B, T, D) and final states (B, S, D) of a cell with a matrix for each of E heads of K channels, mat (E, K, matrices, K):
    step by step in plain torch."""
    dtype = compute_dtype(pre)
    with torch.autocast(pre.device.type, enabled=False):
        x_BTPD = pre.flatten(3).to(dtype) + bias_PD.to(dtype)
        (B, T, _, D), rec, mat = x_BTPD.shape, rec_RD.to(dtype).unbind(0), [HeadMatrix(R) for R in mat_EKGK.to(dtype).unbind(2)]
        state = (
            tuple(torch.zeros(B, D, dtype=dtype, device=pre.device) for _ in cell.state) if h0_BSD is None else h0_BSD.to(dtype).unbind(1)
        )
        emitted = []
        for t in range(T):
            if starts_BT is not None:
                state = tuple(torch.where(starts_BT[:, t, None], torch.zeros_like(s), s) for s in state)
            state = cell(x_BTPD[:, t].unbind(1), rec, state, mat)
            emitted.append(state[-1].to(pre.dtype))
    return torch.stack(emitted, 1), torch.stack(state, 1)


def dense_rnn_step(cell: Any, pre_BPD: Tensor, rec_RD: Tensor, mat_EKGK: Tensor, h_BSD: Tensor, bias_PD: Tensor) -> Tensor:
    """The states (B, S, D) after one token."""
    return dense_rnn(cell, pre_BPD[:, None, :, None], rec_RD, mat_EKGK, h_BSD, None, bias_PD=bias_PD)[1].to(h_BSD.dtype)


def has_kernel(cell: Any, pre: Tensor) -> bool:
    """Whether the cell's Triton kernel can run."""
    placed = pre.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return placed and triton is not None and cell.kernel is not None and pre.dtype != torch.float64


def walk_on_gpu(cell: Any, pre: Tensor, rec: Tensor, h0: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """(states, final) by the cell's kernel."""
    pre = pre if pre.stride(-1) == 1 else pre.contiguous()
    (B, T, _, D), S = pre.shape, len(cell.state)
    rec, h0 = rec.detach().float().contiguous(), h0.float().contiguous()
    states, final = pre.new_empty(B, T, S, D), torch.empty_like(h0)
    flags = states if starts is None else starts.contiguous().view(torch.uint8)
    with torch.cuda.device_of(pre):  # Triton launches on the current device
        cell.kernel[(-(-D // 64), B)](
            pre, rec, h0, flags, states, final, T, D, *pre.stride()[:3], HAS_STARTS=starts is not None, BLOCK=64, num_warps=1
        )
    return states, final


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B_: Tensor, C_: Tensor, h0: Tensor | None, starts: Tensor | None, *, chunk: int, D_H: Tensor
) -> Any:
    """Mamba-2's scan and skip: without gradients and on a GPU in kernels, else in plain torch in chunks of time."""
    learning = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, dt, A, B_, C_, D_H, h0))
    if SCAN and not learning and x.shape[1] and can_scan(x):
        try:
            with torch.cuda.device_of(x):
                return SCAN[0](x, dt, A, B_, C_, D_H, h0, starts)
        except triton.OutOfResources:  # less shared memory than the kernels were made for
            SCAN.clear()
    return ssd_chunked(x, dt, A, B_, C_, h0, starts, chunk, D_H)


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, h0: Tensor | None, starts: Tensor | None, *, normalize: bool, scale: float
) -> Any:  # fmt: skip
    """The delta rule: without gradients and on a GPU in kernels, else in plain torch in chunks of time. K, the width of keys."""
    learning = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, beta, g, h0))
    T, K = q.shape[1], q.shape[-1]
    with torch.autocast(q.device.type, enabled=False):
        if T == 1 and h0 is not None:
            return delta_rule_step(q, k, v, beta, g, h0, starts, normalize, scale)
        if RULE and not learning and T and can_scan(v) and K <= (256 if v.dtype == torch.bfloat16 else 128):
            try:
                with torch.cuda.device_of(v):
                    return RULE[0](q, k, v, beta, g, h0, starts, normalize, scale)
            except triton.OutOfResources:  # less shared memory than the kernels were made for
                RULE.clear()
        return delta_rule_chunked(q, k, v, beta, g, h0, starts, normalize, scale)


def m2rnn(q: Tensor, k: Tensor, v: Tensor, g: Tensor, w: Tensor, h0: Tensor | None, starts: Tensor | None) -> Any:
    """M2RNN: without gradients and on a GPU in its kernel, else in plain torch step by step."""
    learning = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, g, w, h0))
    with torch.autocast(v.device.type, enabled=False):
        if MATRIX and not learning and v.shape[1] > 1 and can_scan(v) and v.shape[3] <= (128 if v.dtype == torch.bfloat16 else 64):
            try:
                with torch.cuda.device_of(v):
                    return MATRIX[0](q, k, v, g, w, h0, starts, False)[:2]
            except triton.OutOfResources:  # less shared memory than the kernel was made for
                MATRIX.clear()
        o, final = m2rnn_sequential(q, k, v, g, w, h0, starts)
        return o.to(v.dtype), final


def can_scan(x: Tensor) -> bool:
    """Whether the scan's kernels can run: those of a GPU with products of bfloat16."""
    if triton is None or x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return False
    suits = x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device) >= (8, 0)
    return suits or os.environ.get("TRITON_INTERPRET") == "1"
