"""Builds a cell's generated kernels and launches them. Triton is imported here only, when a kernel is first wanted.

Generated source is kept in a cache folder (EVERYWHEN_CACHE, or ~/.cache/everywhen), because Triton reads the source of a kernel from its file.

Nothing here waits for the device. With several slices the forward pass is a fixed number of launches: walk, CORRECTIONS times mend, and finish.
Programs with nothing to do return at once, and what has not converged finish walks in order, so what is returned is either certified or
sequential. A small problem is one launch, of shoot. Counters on the device tell how it went; `last_report()` reads them, when asked.

Legend: B batch, T time, N slices, P input projections, R recurrent weights, S states, E heads of K channels, D = E K channels.
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

from kernels.dispatch import interpreted, no_triton, overlapped
from kernels.parallel_rnn import backward_source, codegen
from kernels.parallel_rnn.cell import Cell
from kernels.parallel_rnn.reference import TOLERANCE, product, remainders, tolerance
from kernels.parallel_rnn.trace import NotLowered, trace
from kernels.parts import summed

BLOCK = 64  # channels a program owns, a warp for every 64: two channels a thread
BLOCK_WHOLE = (
    32  # where time is not cut: one a thread, and two warps share a scheduler, so that one works while the other waits for its step
)
CORRECTIONS, CORRECTIONS_FINE = 3, 5  # Newton steps on the slice starts before the walk in order, of inputs in 16 and in 32 bits
MARK = 32  # steps from one fp32 state kept to the next
STRETCH = 128  # steps mended before old and new are compared, a multiple of MARK
AHEAD_SMALL, MARK_SMALL = 2, 4  # steps of a group and between marks in Triton's interpreter
PROGRAMS, SLICES = 4, 256  # programs wanted for each multiprocessor, one for each of its schedulers, and most slices
PROGRAMS_BACK = 4
ROWS, COLUMNS, EACH = 32, 16, 2  # slices and channels of a tile of shoot, and elements a thread
SHOOT_STEPS, SHOTS = 2048, 8  # longest sequences it takes, and Newton steps it tries
SHARED = 40 << 10  # bytes of shared memory for the inputs it has in flight
CURVED = True  # whether the first correction takes the second order of a slice's end by its start with it, in cells that have it traced
# A program has a scheduler for itself, so registers are there in plenty; asked to save them, ptxas lets one step wait for the one before it.
REGISTERS = 255
MOST_SLICES = 65535  # the second dimension of a launch
_stats: dict[torch.device, Tensor] = {}


@functools.cache
def cache_folder() -> Path:
    """Where generated source lies; a temporary folder of this process where it cannot be written."""
    wanted = Path(os.environ.get("EVERYWHEN_CACHE") or Path.home() / ".cache" / "everywhen") / "parallel_rnn"
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=wanted):
            return wanted
    except (OSError, RuntimeError):
        return Path(tempfile.mkdtemp(prefix="everywhen-"))


def load_source(name: str, text: str) -> ModuleType:
    """The module of generated source, kept in a file named by its content. Raises ImportError without Triton."""
    name = f"{name}_{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    path = cache_folder() / f"{name}.py"
    if not path.exists() or path.read_text() != text:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as part:  # other ranks may write the same file
            part.write(text)
        os.chmod(part.name, 0o644)  # other users of a shared cache read it
        os.replace(part.name, path)
    spec = importlib.util.spec_from_file_location(f"everywhen_kernels_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def kernels(cell: Cell, ahead: int, back: int, maths: str, short: str) -> ModuleType:
    """The module of a cell's kernels, `short`: the type of inputs in 16 bits, else empty. Raises NotLowered (the cell) or ImportError (no Triton)."""
    return load_source(cell.name, codegen.source(cell, ahead, back, maths, short))


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


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return 8 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


class Plan:
    """Sizes of a launch: steps ahead, channels a program, and slices of how many steps. A program runs on one scheduler of a multiprocessor
    and is bound by the latency of a step, so T is cut only as far as gives each scheduler a program: fewer slices, fewer corrections."""

    def __init__(self, pre: Tensor, states: int, slices: int | None = None, back: bool = False) -> None:
        (B, T), D = pre.shape[:2], pre.shape[3:].numel()
        self.short = str(pre.dtype)[6:] if pre.element_size() == 2 else ""
        small = interpreted()  # the interpreter pays for every statement
        few = 1 if states < 3 else 2  # long programs take long to compile, and more registers than there are
        self.ahead, self.back = (AHEAD_SMALL, 2) if small else (codegen.AHEAD // few, codegen.AHEAD_BACK // few)
        self.mark, self.stretch = (MARK_SMALL, MARK_SMALL) if small else (MARK, STRETCH)
        self.block = 16 if small else BLOCK if D > 32 else 32
        self.warps = max(1, self.block // 64)
        self.blocks = -(-D // self.block)
        if slices is None:
            wanted = (PROGRAMS_BACK if back else PROGRAMS) * multiprocessors(pre.device)
            slices = min(max(1, round(wanted / (self.blocks * B))), SLICES, max(1, T // self.mark))
            if slices == 1 and not back and not small:
                self.block, self.blocks = BLOCK_WHOLE, -(-D // BLOCK_WHOLE)
        self.slice = -(-T // (slices * self.mark)) * self.mark
        self.slices = -(-T // self.slice)
        self.window = -(-self.slice // (backward_source.windows(states) * self.back)) * self.back
        self.even = T % (self.back if back else self.ahead) == 0 and D % self.block == 0
        self.grid: tuple[int, ...] = (self.blocks * B, self.slices)


class ShootPlan(Plan):
    """Sizes of the one launch of a small problem: a tile of channels by all time slices a program."""

    def __init__(self, pre: Tensor, states: int, borders: bool) -> None:
        super().__init__(pre, states, 1)
        (B, T), D, small = pre.shape[:2], pre.shape[3:].numel(), interpreted()
        self.group = min(self.ahead, codegen.AHEAD_SHOOT)
        self.block, self.rows = (16, 4) if small else (COLUMNS, ROWS)
        unit = self.mark if borders else self.group
        self.slice = -(-T // (self.rows * unit)) * unit
        self.slices = -(-T // self.slice)
        self.blocks = -(-D // self.block)
        self.even = T == self.rows * self.slice and D % self.block == 0
        self.warps = max(1, self.rows * self.block // (32 * EACH))
        self.grid = (self.blocks * B,)
        self.deep = max(1, min(4, SHARED // (pre.shape[2] * self.group * self.rows * self.block * pre.element_size())))

    @staticmethod
    def fits(pre: Tensor) -> bool:
        """Whether one wave of programs takes it all, and the others would cut time."""
        (B, T), D = pre.shape[:2], pre.shape[3:].numel()
        return 128 <= T <= SHOOT_STEPS and B * -(-D // COLUMNS) <= multiprocessors(pre.device)


def plan_of(pre: Tensor, states: int, slices: int | None = None, borders: bool = False) -> Plan:
    """The forward plan of inputs (B, T, P, E, K); with a number of slices, that of the kernels of large problems."""
    return ShootPlan(pre, states, borders) if slices is None and ShootPlan.fits(pre) else Plan(pre, states, slices)


class Layout:
    """How a tensor (B, T, P, E, K) lies in memory: channels of a head are neighbours, all else has strides. Kernels count the projections of a step in
    32 bits; those that lie further apart are brought together."""

    def __init__(self, pre: Tensor) -> None:
        beside = (pre.stride(-1) == 1 or pre.shape[-1] == 1) and pre.shape[2] * pre.stride(2) < 1 << 31
        self.tensor = pre if beside else pre.contiguous()
        self.batch, self.time, self.projection, head, _ = self.tensor.stride()
        self.head, self.se = int(pre.shape[-1]), int(head) if pre.shape[-2] > 1 else 0


def _sizes(plan: Plan, pre: Tensor, starts: Tensor | None) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """(pre as the kernels read it, run-time sizes, compile-time sizes and options)."""
    at = Layout(pre)
    constants = {
        "D": pre.shape[3:].numel(), "HEAD": at.head, "ST": at.time, "SP": at.projection, "MARK": plan.mark, "HAS_RESET": starts is not None,
        "EVEN": plan.even, "BD": plan.block, "num_warps": plan.warps,
    }  # fmt: skip
    if not interpreted() and torch.version.hip is None:
        constants["maxnreg"] = REGISTERS
    return at.tensor, (pre.shape[1], plan.slice, at.batch, at.se), constants


def _module(cell: Cell, plan: Plan) -> ModuleType:
    return kernels(cell, plan.ahead, plan.back, "portable" if interpreted() or torch.version.hip else "ptx", plan.short)


def _heads(pre: Tensor) -> Tensor:
    return pre.unsqueeze(3) if pre.dim() == 4 else pre


def dependently(constants: dict[str, Any]) -> dict[str, Any]:
    """Options of a launch that reads what the launch before it writes."""
    dependent = overlapped()
    return {**constants, "DEPENDENT": dependent, **({"launch_pdl": True} if dependent else {})}


def _counters(device: torch.device) -> Tensor:
    """Largest residual, most corrections, tiles solved over slices and tiles walked in order, the same two of the backward pass, since they
    were last read."""
    if device not in _stats:
        with torch.inference_mode(False):  # a tensor that later calls may change
            counters = torch.zeros(6, device=device)
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return counters  # the graph's own: each replay would set it to zero
        _stats[device] = counters
    return _stats[device]


def forward(
    cell: Cell, pre: Tensor, rec: Tensor, h0: Tensor, starts: Tensor | None, *, slices: int | None = None, borders: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(emitted (B, T, D) and kept (B, T, S - 1, D) states in pre's dtype, final (B, S, D) fp32, marks (B, M, S, D) fp32; without `borders`
    and with one slice there are none: (B, 0, S, D))."""
    pre, rec, h0 = _heads(pre), rec.float().contiguous(), h0.float().contiguous()
    plan = plan_of(pre, len(cell.state), slices, borders)
    if isinstance(plan, ShootPlan):
        return shoot(cell, plan, pre, rec, h0, starts, borders)
    (B, T), D, S = pre.shape[:2], rec.shape[1], len(cell.state)
    module, n = _module(cell, plan), plan.slices
    emitted, kept = pre.new_empty(B, T, D), pre.new_empty(B, T, S - 1, D)
    marks = h0.new_empty(B, -(-T // plan.mark) if borders or n > 1 else 0, S, D)
    reset = emitted if starts is None else starts.contiguous().view(torch.uint8)
    # a linear cell needs one, and another where rounding counts
    rounds = min(2 if trace(cell).linear else CORRECTIONS if plan.short else CORRECTIONS_FINE, n - 1)
    begins, ends = (h0.new_empty(rounds + 1, B, n, S, D) for _ in range(2))
    products = h0.new_empty(rounds + 1, B, n, S * S + S, D) if n > 1 else h0
    measures = h0.new_empty(B, n, S * S + S, D) if n > 1 else h0
    source, sizes, constants = _sizes(plan, pre, starts)
    curved = CURVED and n > 1 and bool(trace(cell).second)
    curves = h0.new_empty(B, n, S * S * (S + 1) // 2, D) if curved else h0
    module.walk[plan.grid](
        source, rec, h0, reset, emitted, kept, marks, begins, ends, products, measures, curves, False, n > 1, borders or n > 1, curved, *sizes, **constants
    )  # fmt: skip
    if n == 1:
        return emitted, kept, ends[0, :, 0], marks
    final, stats, after, near = torch.empty_like(h0), _counters(pre.device), dependently(constants), tolerance(cell, pre.dtype)
    for k in range(rounds):
        old, new = (begins[k], ends[k], products[k]), (begins[k + 1], ends[k + 1], products[k + 1])
        module.mend[plan.grid](
            source, rec, reset, emitted, kept, marks, *old, *new, measures, curves, stats, float(k + 1), near, plan.stretch, curved and not k, *sizes, **after
        )  # fmt: skip
    last = (begins[rounds], ends[rounds], products[rounds])
    module.finish[plan.grid[:1]](source, rec, reset, emitted, kept, marks, *last, final, stats, n, near, *sizes, **after)
    return emitted, kept, final, marks


def shoot(
    cell: Cell, plan: ShootPlan, pre: Tensor, rec: Tensor, h0: Tensor, starts: Tensor | None, borders: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `forward` returns, in one launch; pre (B, T, P, E, K)."""
    (B, T), D, S = pre.shape[:2], rec.shape[1], len(cell.state)
    emitted, kept = pre.new_empty(B, T, D), pre.new_empty(B, T, S - 1, D)
    marks, begins, final = (
        h0.new_empty(B, -(-T // plan.mark) if borders else 0, S, D),
        h0.new_empty(B, plan.rows, S, D),
        torch.empty_like(h0),
    )
    reset = emitted if starts is None else starts.contiguous().view(torch.uint8)
    source, sizes, constants = _sizes(plan, pre, starts)
    _module(cell, plan).shoot[plan.grid](
        source, rec, h0, reset, emitted, kept, marks, begins, final, _counters(pre.device), tolerance(cell, pre.dtype), SHOTS, plan.rows, plan.deep, borders,
        *sizes, **constants,
    )  # fmt: skip
    return emitted, kept, final, marks


def restore(cell: Cell, pre: Tensor, rec: Tensor, h0: Tensor, starts: Tensor | None, marks: Tensor) -> tuple[Tensor, Tensor]:
    """The states again from the marks, every stretch between two of them at once (of very long sequences, between every few)."""
    pre, rec = _heads(pre), rec.float().contiguous()
    (B, T), D, S = pre.shape[:2], rec.shape[1], len(cell.state)
    plan = Plan(pre, S, min(marks.shape[1], MOST_SLICES))
    marks = marks[:, plan.slice // plan.mark - 1 :: plan.slice // plan.mark]
    emitted, kept = pre.new_empty(B, T, D), pre.new_empty(B, T, S - 1, D)
    begins = torch.cat([h0.float()[:, None], marks], 1)[:, : plan.slices].contiguous()
    ends = torch.empty_like(begins)
    reset = emitted if starts is None else starts.contiguous().view(torch.uint8)
    source, sizes, constants = _sizes(plan, pre, starts)
    _module(cell, plan).walk[plan.grid](
        source, rec, begins, reset, emitted, kept, ends, begins, ends, ends, ends, ends, True, False, False, False, *sizes, **constants
    )
    return emitted, kept


def last_report(device: torch.device | None = None) -> dict[str, float]:
    """Of the passes over several slices since the last call: tiles (batch row, channel block) solved, most corrections, largest residual at
    their last check, and the shares of tiles that had to be walked in order, forward and backward. Waits for the device: call it when
    logging, not every step."""
    found = [(d, t) for d, t in _stats.items() if device is None or d == device]
    read = torch.stack([t.cpu() for _, t in found]).amax(0).tolist() if found else [0.0] * 6
    residual, corrections, tiles, walked, tiles_back, walked_back = read
    for _, t in found:
        t.zero_()
    shares = {"sequential": walked / max(1.0, tiles), "sequential_backward": walked_back / max(1.0, tiles_back)}
    return {"tiles": int(tiles), "corrections": int(corrections), "residual": residual, **shares}


def backward(
    cell: Cell, pre: Tensor, rec: Tensor, h0: Tensor, starts: Tensor | None, emitted: Tensor, kept: Tensor, d_emitted: Tensor,
    d_kept: Tensor | None, d_final: Tensor, *, slices: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of pre (its dtype, laid out as torch.empty_like does), rec and h0 (fp32)."""
    whole, pre, rec, h0 = pre, _heads(pre), rec.float().contiguous(), h0.float().contiguous()
    d_emitted, d_final = d_emitted.contiguous(), d_final.float().contiguous()
    B, D, R, S = len(pre), rec.shape[1], len(cell.rec), len(cell.state)
    plan = Plan(pre, S, slices, back=True)
    module, n = _module(cell, plan), plan.slices
    reset = emitted if starts is None else starts.contiguous().view(torch.uint8)
    d_whole = torch.empty_like(whole)
    d_pre = _heads(d_whole)
    to = Layout(d_pre)
    partial, d_h0 = h0.new_empty(B, n, R, D), torch.empty_like(h0)
    ends, products = (h0.new_empty(B, n, S, D), h0.new_empty(B, n, S, S, D)) if n > 1 else (h0, h0)
    windows = h0.new_empty(B, n, -(-plan.slice // plan.window), S * S + S, D) if n > 1 else h0
    flags = torch.empty(plan.grid[0], n, dtype=torch.int32, device=h0.device) if n > 1 else h0
    source, sizes, constants = _sizes(plan, pre, starts)
    with_kept = d_kept is not None and S > 1
    tensors = (source, rec, h0, reset, emitted, kept, d_emitted, d_kept.contiguous() if with_kept and d_kept is not None else d_emitted)
    outputs = (
        to.tensor,
        partial,
        d_h0,
        d_final,
        ends,
        products,
        windows,
        flags,
        plan.window,
        TOLERANCE[pre.dtype],
        to.batch,
        to.se,
        to.time,
        to.projection,
    )
    module.gradient[plan.grid](*tensors, *outputs, n > 1, with_kept, *sizes, **constants)
    if n > 1:
        most = 1 << (n - 1).bit_length()
        module.mend_gradient[plan.grid](*tensors, *outputs, _counters(pre.device), most, with_kept, *sizes, **dependently(constants))
    if to.tensor is not d_pre:  # a layout the kernels cannot write
        d_pre.copy_(to.tensor)
    return d_whole, summed(partial.flatten(0, 1)), d_h0


def adjoint(
    cell: Cell, pre: Tensor, rec: Tensor, h0: Tensor, starts: Tensor | None, emitted: Tensor, kept: Tensor, d_emitted: Tensor | None = None,
    d_kept: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(gradient (B, S, D) of h0 from those of the states alone, zero without any; product J_T ... J_1 (B, S, S, D) of the Jacobians of all
    steps at the solved states, zero across resets; what a change of some earlier state by its own size would be at the end (B, S, D)), fp32.
    One walk over the inputs."""
    pre, rec, h0 = _heads(pre), rec.float().contiguous(), h0.float().contiguous()
    B, D, S = len(pre), rec.shape[1], len(cell.state)
    plan = Plan(pre, S, back=True)
    reset = emitted if starts is None else starts.contiguous().view(torch.uint8)
    products, ends = h0.new_empty(B, plan.slices, S, S, D), h0.new_zeros(B, plan.slices, S, D)
    left = torch.empty_like(ends)
    source, sizes, constants = _sizes(plan, pre, starts)
    if d_kept is not None and d_emitted is None:
        d_emitted = torch.zeros_like(emitted)
    with_states, with_kept = d_emitted is not None, d_kept is not None and S > 1
    gradients = (
        d_emitted.contiguous() if d_emitted is not None else emitted,
        d_kept.contiguous() if d_kept is not None and S > 1 else emitted,
    )
    _module(cell, plan).transfer[plan.grid](
        source, rec, h0, reset, emitted, kept, *gradients, products, ends, left, with_states, with_kept, *sizes, **constants
    )
    # Each slice maps an adjoint g at its end to product^T g + its own at its start; [[product^T, own], [0, 1]] composes such maps.
    last = torch.cat([torch.zeros_like(ends), torch.ones_like(ends[:, :, :1])], 2)[:, :, None]
    maps = torch.cat([torch.cat([products.transpose(2, 3), ends[:, :, :, None]], 3), last], 2)
    whole = product(maps.flip(1)[:, None])[:, 0]
    return whole[:, :S, S].contiguous(), whole[:, :S, :S].transpose(1, 2).contiguous(), remainders(products, left)[:, -1]


def step(cell: Cell, pre: Tensor, rec: Tensor, h: Tensor) -> Tensor:
    """One decoding step in one kernel: pre (B, P, D), h (B, S, D)."""
    pre, h = pre if pre.stride(-1) == 1 else pre.contiguous(), h.contiguous()
    B, _, D = pre.shape
    plan = Plan(pre[:, None], len(cell.state))
    new = torch.empty_like(h)
    _module(cell, plan).decode[(plan.blocks * B,)](
        pre, rec.float().contiguous(), h, new, pre.stride(0), pre.stride(1), D, BD=plan.block, num_warps=plan.warps
    )
    return new
