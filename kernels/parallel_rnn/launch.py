"""Builds a cell's generated kernels and launches them. Triton is imported here only, when a kernel is first wanted.

Generated source is kept in a cache folder (EVERYWHEN_CACHE, or ~/.cache/everywhen), because Triton reads the source of a kernel from its file.

Nothing here waits for the device. The forward pass launches a fixed number of kernels: a pass over the slices, CORRECTIONS times (a Newton
step on the starts, another pass), and a last pass that walks the whole sequence in order. Each one returns at once for the (batch row,
channel block)s that have converged, so what is returned is either certified or sequential. `last_report()` tells which, when asked.

Legend: B batch, T time, N slices, P input projections, R recurrent weights, S states, D channels.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import no_triton
from kernels.parallel_rnn import codegen, reference
from kernels.parallel_rnn.cell import Cell
from kernels.parallel_rnn.trace import NotLowered, trace

BLOCK = 64  # channels a program owns, a warp for every 64
CORRECTIONS = 2  # Newton steps before the sequential walk
BURN_IN = 64  # steps walked from zero before a slice, as the first guess of its start
PROGRAMS, SLICES = 1024, 64  # programs wanted, some eight on each multiprocessor of a large GPU, and most slices
PROGRAMS_BACK, SLICES_BACK = 4096, 128  # the backward pass has no corrections, which more slices would make dearer
_report: dict[str, Any] = {}


def cache_folder() -> Path:
    """Where generated source lies; a temporary folder where home cannot be written."""
    wanted = Path(os.environ.get("EVERYWHEN_CACHE", Path.home() / ".cache" / "everywhen")) / "parallel_rnn"
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        return wanted
    except OSError:
        return Path(tempfile.mkdtemp(prefix="everywhen-"))


@functools.cache
def kernels(cell: Cell, unroll: int) -> ModuleType:
    """The module of a cell's kernels. Raises NotLowered (the cell) or ImportError (no Triton)."""
    text = codegen.source(cell, unroll)
    name = f"{cell.name}_{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    path = cache_folder() / f"{name}.py"
    if not path.exists() or path.read_text() != text:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as part:  # other ranks may write the same file
            part.write(text)
        os.replace(part.name, path)
    spec = importlib.util.spec_from_file_location(f"everywhen_kernels_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def why_not(cell: Cell, device: torch.device) -> str:
    """Empty if the Triton kernels can run this cell on this device, else one sentence."""
    reason = no_triton(device)
    if reason:
        return reason
    try:
        trace(cell)
    except NotLowered as problem:
        return str(problem)
    return ""


class Plan:
    """Sizes of a launch: channels a program, warps, slices of how many steps, and steps of burn-in."""

    def __init__(self, cell: Cell, B: int, T: int, D: int, device: torch.device, slices: int | None = None, back: bool = False) -> None:
        self.unroll = 2 if device.type == "cpu" else codegen.UNROLL  # the interpreter pays for every statement
        self.block = 16 if device.type == "cpu" else BLOCK if D > 32 else 32
        self.warps = max(1, self.block // 64)  # two channels a thread: four-byte loads of bf16
        self.blocks = -(-D // self.block)
        if slices is None:
            programs, most = (PROGRAMS_BACK, SLICES_BACK) if back else (PROGRAMS, SLICES)
            slices = min(-(-programs // (self.blocks * B)), most)
            if slices < 2 or T < 128:
                slices = 1
            slices = min(slices, max(1, T // 64))
        steps = -(-T // slices)
        self.slice = -(-steps // self.unroll) * self.unroll
        self.slices = -(-T // self.slice)
        burn = 0 if trace(cell).linear else min(BURN_IN, self.slice)
        self.burn = burn // self.unroll * self.unroll


def ready(pre: Tensor) -> Tensor:
    """Strides over batch, time and projection are free; channels must be neighbours."""
    return pre if pre.stride(-1) == 1 or pre.shape[-1] == 1 else pre.contiguous()


def forward(cell: Cell, pre: Tensor, rec: Tensor, h0: Tensor, starts: Tensor | None, slices: int | None = None) -> tuple[Tensor, Tensor]:
    """(states (B, T, S, D) in pre's dtype, final (B, S, D) fp32)."""
    pre, rec, h0 = ready(pre), rec.float().contiguous(), h0.float().contiguous()
    (B, T, _, D), S = pre.shape, len(cell.state)
    plan = Plan(cell, B, T, D, pre.device, slices)
    module = kernels(cell, plan.unroll)
    states, final = pre.new_empty(B, T, S, D), h0.new_empty(B, S, D)
    reset = states if starts is None else starts.contiguous().view(torch.uint8)
    n = plan.slices
    start, end = h0.new_empty(B, n, S, D), h0.new_empty(B, n, S, D)
    product = h0.new_empty(B, n, S, S, D)
    done = torch.zeros(B, plan.blocks, dtype=torch.int32, device=pre.device)
    strides = (pre.stride(0), pre.stride(1), pre.stride(2))

    def walk(source: Tensor, n: int, length: int, guess: bool, check: bool) -> None:
        module.forward[(plan.blocks, n, B)](
            pre, rec, h0, reset, states, source, end, product, final, done, T, D, length, plan.burn, *strides,
            HAS_RESET=starts is not None, GUESS=guess, CHECK=check, SLICED=n > 1, BD=plan.block, num_warps=plan.warps,
        )  # fmt: skip

    if n == 1:
        walk(h0, 1, plan.slice, False, False)
        _report.clear()
        reference.last_report = reference.Report()
        return states, final
    residual, count = torch.zeros(B, plan.blocks, device=pre.device), torch.zeros_like(done)
    tolerance = 1e-6 if pre.dtype == torch.float32 else 1e-5

    def correct() -> None:
        module.correct[(plan.blocks, B)](start, end, product, done, residual, count, n, D, tolerance, BD=plan.block, num_warps=plan.warps)

    linear = trace(cell).linear
    walk(start, n, plan.slice, True, False)
    for _ in range(1 if linear else CORRECTIONS):
        correct()
        walk(start, n, plan.slice, False, True)
    if not linear:  # one correction solves a linear cell
        correct()
        walk(h0, 1, -(-T // plan.unroll) * plan.unroll, False, True)
    exact = {"residual": torch.zeros_like(residual), "converged": torch.ones_like(done)} if linear else {"residual": residual, "converged": done}
    _report.update(slices=n, count=count, **exact)
    return states, final


def last_report() -> dict[str, float]:
    """Of the last sliced forward pass: slices, most corrections, largest residual at its last check, and the share of (batch row, channel
    block)s that were walked in order because they had not converged. Waits for the device: call it when logging, not every step."""
    if not _report:
        plain = reference.last_report
        return {"slices": plain.slices, "corrections": plain.corrections, "residual": plain.residual, "sequential": 0.0}
    sequential = 1 - _report["converged"].float().mean().item()
    return {
        "slices": _report["slices"], "corrections": int(_report["count"].max()), "residual": float(_report["residual"].max()), "sequential": sequential
    }  # fmt: skip


def backward(
    cell: Cell, pre: Tensor, rec: Tensor, h0: Tensor, starts: Tensor | None, states: Tensor, d_states: Tensor, d_final: Tensor,
    slices: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of pre (its dtype), rec and h0 (fp32)."""
    pre, rec, h0 = ready(pre), rec.float().contiguous(), h0.float().contiguous()
    d_states, d_final = d_states.contiguous(), d_final.float().contiguous()
    (B, T, P, D), R, S = pre.shape, len(cell.rec), len(cell.state)
    plan = Plan(cell, B, T, D, pre.device, slices, back=True)
    module = kernels(cell, plan.unroll)
    n, grid = plan.slices, (plan.blocks, plan.slices, B)
    reset = states if starts is None else starts.contiguous().view(torch.uint8)
    sizes = (T, D, plan.slice, pre.stride(0), pre.stride(1), pre.stride(2))
    options = {"HAS_RESET": starts is not None, "BD": plan.block, "num_warps": plan.warps}
    carry = d_final
    if n > 1:
        end, product, carry = h0.new_empty(B, n, S, D), h0.new_empty(B, n, S, S, D), h0.new_empty(B, n, S, D)
        module.adjoint[grid](pre, rec, h0, reset, states, d_states, carry, end, product, d_final, *sizes, **options)
        module.scan_adjoint[(plan.blocks, B)](end, product, d_final, carry, n, D, BD=plan.block, num_warps=plan.warps)
    d_pre = torch.empty(B, T, P, D, dtype=pre.dtype, device=pre.device)
    partial, d_h0 = h0.new_empty(B, n, max(R, 1), D), torch.empty_like(h0)
    module.gradient[grid](pre, rec, h0, reset, states, d_states, carry, d_pre, partial, d_h0, *sizes, **options)
    return d_pre, partial.sum((0, 1))[:R], d_h0


def step(cell: Cell, pre: Tensor, rec: Tensor, h: Tensor) -> Tensor:
    """One decoding step in one kernel."""
    pre, h = ready(pre), h.contiguous()
    B, _, D = pre.shape
    plan = Plan(cell, B, 1, D, pre.device)
    new = torch.empty_like(h)
    kernels(cell, plan.unroll).decode[(plan.blocks, B)](
        pre, rec.float().contiguous(), h, new, D, pre.stride(0), pre.stride(1), BD=plan.block, num_warps=plan.warps
    )
    return new
