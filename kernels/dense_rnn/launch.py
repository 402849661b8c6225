"""Builds the kernels of a cell that is dense in its heads and launches them. Triton is imported here only, when a kernel is first wanted.

Nothing here waits for the device: a solve is a fixed number of launches (walk, CORRECTIONS times correct and walk, certify, finish), of which
those with nothing to do return at once. What is returned is either certified or walked in order. Counters on the device tell how it went;
`last_report()` reads them, when asked.

Legend: B batch, T time, n slices, P input projections, R recurrent weights, G matrices, S states, D = E K channels in E heads.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels.dense_rnn import codegen, matrices, source
from kernels.dense_rnn.plans import SLOTS, Layer
from kernels.dense_rnn.reference import BURN_IN, NEAR, TOLERANCE
from kernels.dispatch import interpreted, no_triton
from kernels.parallel_rnn.cell import Cell
from kernels.parallel_rnn.launch import Layout, dependently, load_source, multiprocessors
from kernels.parallel_rnn.products import Dense, in_torch, is_leaf, trace_dense
from kernels.parallel_rnn.reference import product
from kernels.parallel_rnn.step import HeadMatrix

CORRECTIONS = {2: 8, 4: 10}  # quasi-Newton steps before the walk in order, by bytes of an input
MORE_FOR = 16  # slices for which one more is made: a walk in order then costs as much as so many
NARROWEST = 64  # width to which heads are filled up: ptxas 12.8 assembles some products with blocks of 16 or 32 wrongly
SHORTEST = 32  # steps of a slice
ROWS, FEW_ROWS = 16, 8  # that a multiprocessor walks, the fewest that a product takes on its left; and on its right
LARGEST = {2: 128, 4: 64}  # channels of a head whose matrices fit on a multiprocessor, by bytes of an input
STAGES, STAGES_WIDE = 4, 2  # steps whose inputs are on their way, and where matrices leave little room for them
TWICE = 128  # bytes of a row of a matrix up to which it has room twice, once transposed
_stats: dict[torch.device, Tensor] = {}


@functools.cache
def kernels(cell: Cell, maths: str, short: str, halves: bool = False, narrow: bool = False) -> ModuleType:
    """The module of a cell's kernels, `short`: the type of inputs in 16 bits, else empty. narrow: of FEW_ROWS rows. Raises NotLowered (the cell) or
    ImportError (no Triton)."""
    return load_source(f"{cell.name}_dense", codegen.source(cell, short, maths, halves, narrow))


@functools.cache
def facts(cell: Cell) -> source.Writer:
    """What the kernels of a cell track and store."""
    return source.Writer(trace_dense(cell))


@functools.cache
def _by_eight() -> bool:
    """Whether products of FEW_ROWS rows are what was tried on a GPU: Triton 3.6 takes them by mma.sync, 3.9 by wgmma, of which the assembler has made
    wrong ones (NARROWEST)."""
    if interpreted():
        return True
    try:
        import triton
    except ImportError:
        return False
    return triton.__version__.startswith("3.6.") and torch.version.hip is None


def pad(width: int) -> int:
    """The power of two that holds width, at least NARROWEST."""
    return max(NARROWEST, 1 << (width - 1).bit_length())


def beside(E: int, K: int) -> int:
    """How many heads are taken as one, where they would be filled up otherwise."""
    return next(m for m in (4, 2, 1) if m == 1 or m * K <= NARROWEST and E % m == 0)


def joined(mat: Tensor) -> Tensor:
    """Matrices (E / m, m K, G, m K) of m heads as one, with zeros between them."""
    E, K, G, _ = mat.shape
    m = beside(E, K)
    if m == 1:
        return mat
    wide, each = mat.new_zeros(E // m, m, K, G, m, K), mat.view(E // m, m, K, G, K)
    for i in range(m):
        wide[:, i, :, :, i] = each[:, i]
    return wide.view(E // m, m * K, G, m * K)


def parted(d_mat: Tensor, E: int, K: int) -> Tensor:
    """(E, K, G, K) of gradients of `joined` matrices."""
    m = beside(E, K)
    if m == 1:
        return d_mat
    wide = d_mat.view(E // m, m, K, -1, m, K)
    return torch.stack([wide[:, i, :, :, i] for i in range(m)], 1).flatten(0, 1)


def why_not(cell: Cell, pre: Tensor, K: int) -> str:
    """Empty if the kernels can run, else one sentence."""
    reason = no_triton(pre.device)
    if reason:
        return reason
    if pre.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"The kernels of dense heads have no {pre.dtype}."
    most = LARGEST[pre.element_size()]
    if K > most:
        return f"The kernels of dense heads hold matrices of {most} channels in {pre.dtype}, not of {K}."
    return cell.why_loop


@dataclass(frozen=True)
class Plan:
    """Slices of how many steps, steps of burn-in, rows and warps of a program."""

    slices: int
    length: int
    burn_in: int
    rows: int
    warps: int

    @staticmethod
    def tile(K: int, itemsize: int) -> tuple[int, int]:
        """(rows, warps) of a program. Of heads of 64 channels in 16 bits two programs share a multiprocessor and hide each other's waiting; others have it
        for themselves, with a warp for each eight channels, up to eight, as registers are shared."""
        return (FEW_ROWS, 4) if pad(K) * itemsize <= TWICE and _by_eight() else (ROWS, min(8, pad(K) // 8))

    @staticmethod
    def of(
        pre: Tensor, K: int, slices: int | None = None, burn_in: int | None = None, rows: int | None = None, warps: int | None = None
    ) -> Plan:
        """A multiprocessor walks ROWS rows of one head or two, bound by the latency of a step, and its registers are full."""
        (B, T), E = pre.shape[:2], pre.shape[3:].numel() // K
        E, K = E // beside(E, K), K * beside(E, K)
        if slices is None:
            slices = min(T // SHORTEST, multiprocessors(pre.device) * ROWS // (E * B))
            slices = slices if slices >= 4 else 1
        length = -(-T // max(1, min(slices, T)))
        n = -(-T // length)
        burn_in = BURN_IN if burn_in is None else burn_in
        tile = Plan.tile(K, pre.element_size())
        return Plan(n, length, min(burn_in, length) if n > 1 else 0, rows or tile[0], warps or tile[1])


def in_force(cell: Cell, pre: Tensor, K: int, layer: Layer | None, back: bool) -> Plan:
    """The reckoned plan, or what a layer has learnt to do. A memory that the diagonal carries is not found by a burn-in, but by corrections."""
    plan = Plan.of(pre, K, burn_in=0 if facts(cell).tracked else None)
    return plan if layer is None else Plan.of(pre, K, *layer.passes[back].plan(plan.slices, pre.shape[1]))


class Solve:
    """What the launches of a solve share, of small heads and of large ones: tensors as kernels read them, and sizes."""

    def __init__(self, cell: Cell, pre: Tensor, rec: Tensor, mat: Tensor, h0: Tensor, starts: Tensor | None, slices: int) -> None:
        self.pre = pre.unsqueeze(3) if pre.dim() == 4 else pre
        self.cell, self.dense, self.mat, self.slices = cell, trace_dense(cell), mat, slices
        self.E, self.K, self.G, _ = mat.shape
        self.B, self.T = pre.shape[:2]
        self.S, self.D = len(cell.state), self.E * self.K
        self.rec, self.h0 = rec.float().contiguous(), h0.float().contiguous()
        self.reset = self.h0 if starts is None else starts.contiguous().view(torch.uint8)
        self.at = Layout(self.pre)
        self.tracked = len(facts(cell).tracked)
        # the interpreter multiplies bf16 as if it were whole numbers
        self.product = torch.float32 if interpreted() and pre.dtype == torch.bfloat16 else pre.dtype

    def of_products(self, tl: ModuleType) -> dict[str, Any]:
        """Constants of kernels that say how products are taken; tl: triton.language."""
        dot = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[self.product]
        return {"DOT": dot, "PRECISION": "tf32x3" if self.pre.dtype == torch.float32 else "ieee"}

    def per_slice(self, entries: int) -> Tensor:
        return self.h0.new_empty(self.B, self.slices, entries, self.D)


class Problem(Solve):
    """A solve of small heads."""

    def __init__(
        self, cell: Cell, pre: Tensor, rec: Tensor, mat: Tensor, h0: Tensor, starts: Tensor | None, plan: Plan, halves: bool
    ) -> None:
        super().__init__(cell, pre, rec, mat, h0, starts, plan.slices)
        self.plan = plan
        short = str(pre.dtype)[6:] if pre.element_size() == 2 else ""
        portable = interpreted() or torch.version.hip is not None
        self.module = kernels(cell, "portable" if portable else "ptx", short, halves, plan.rows < ROWS)
        self.sizes = (self.T, plan.length, plan.slices, self.B, self.at.batch, self.at.time, self.at.projection, self.at.se)
        self.constants: dict[str, Any] = {
            "K": self.K, "D": self.D, "HEAD": self.at.head, "NEAR": NEAR, "HAS_RESET": starts is not None, "HALVES": halves,
            **self.of_products(self.module.tl), "BM": plan.rows, "BK": pad(self.K), "STAGES": STAGES if pad(self.K) * self.product.itemsize <= TWICE else STAGES_WIDE,
            "DEPENDENT": False, "num_warps": plan.warps, "num_stages": 1,
        }  # fmt: skip
        self.grid, self.grid_in_order = ((-(-rows // plan.rows), self.E) for rows in (self.B * plan.slices, self.B))
        self.chain = (plan.slices, TOLERANCE[torch.float32 if halves else pre.dtype])
        self.rounds = min(CORRECTIONS[4 if halves else pre.element_size()] + plan.slices // MORE_FOR, plan.slices - 1)
        self.chain_constants = {"K": self.K, "D": self.D, "BK": pad(self.K), "DEPENDENT": False, "num_warps": 1 if self.K <= 64 else 2}
        # of launches that read what the one before them writes
        self.after, self.chain_after = dependently(self.constants), dependently(self.chain_constants)

    def joins(self, todo: Tensor, wanted: bool) -> tuple[tuple[Tensor, Tensor, float], tuple[bool, int, bool]]:
        """Arguments and constants of walks of corrected slices, which end where they have come back to the walk before, if that is wanted: the states
        of that one every LOOK steps, which slices joined one that they were only near to (if not wanted, none), and how near that is. The last of the
        constants: whether states are stored beside the products of the next step, which makes a walk of several slices quicker and one in order slower."""
        pieces, n = self.plan.length // source.LOOK, self.plan.slices
        if not wanted or n == 1 or self.plan.length <= source.LOOK:
            return (self.h0, torch.zeros_like(todo) if n > 1 else todo, 0.0), (False, source.LOOK, n > 1)
        marks = self.h0.new_empty(self.B * n, pieces, self.S, self.D)
        return (marks, torch.empty_like(todo), self.chain[1]), (True, source.LOOK, True)

    def on_chip(self) -> Tensor:
        """The matrices (E, K, G, K) in the dtype of products, filled up with zeros."""
        width = pad(self.K)
        if width == self.K:
            return self.mat.to(self.product).contiguous()
        padded = torch.zeros(self.E, width, self.G, width, dtype=self.product, device=self.mat.device)
        padded[:, : self.K, :, : self.K] = self.mat
        return padded


def _counters(device: torch.device) -> Tensor:
    """Forward and backward, as in plans.py: largest residual, most corrections, heads of batch rows solved, slices walked, slices."""
    if device not in _stats:
        with torch.inference_mode(False):  # a tensor that later calls may change
            counters = torch.zeros(2 * SLOTS, device=device)
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return counters  # the graph's own: each replay would set it to zero
        _stats[device] = counters
    return _stats[device]


def forward(
    cell: Cell, pre: Tensor, rec: Tensor, mat: Tensor, h0: Tensor, starts: Tensor | None, plan: Plan | None = None,
    layer: Layer | None = None, halves: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(emitted (B, T, D) in pre's dtype, kept (B, T, S - 1, D) fp32, final (B, S, D) fp32). halves: what is multiplied is not rounded to 16 bits but
    taken in two halves, and emitted states are fp32."""
    emitted, kept, final, *_ = solved(cell, pre, rec, mat, h0, starts, plan, layer, halves)
    return emitted, kept, final


def forward_with_border(
    cell: Cell, pre: Tensor, rec: Tensor, mat: Tensor, h0: Tensor, starts: Tensor | None, plan: Plan | None = None,
    layer: Layer | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`forward`, the diagonal Jacobian product of all steps (B, S, S, D), and the channels' size near the end (B, S, D), as the last pass over
    all slices left them."""
    emitted, kept, final, products, nearby, *_ = solved(cell, pre, rec, mat, h0, starts, plan, layer, join=False, track=True)
    P = products.new_zeros(*products.shape[:2], len(cell.state), len(cell.state), products.shape[3])
    for v, (i, j) in enumerate(facts(cell).tracked):
        P[:, :, i, j] = products[:, :, v]
    return emitted, kept, final, product(P[:, None])[:, 0], nearby[:, -1]


def solved(
    cell: Cell, pre: Tensor, rec: Tensor, mat: Tensor, h0: Tensor, starts: Tensor | None, plan: Plan | None, layer: Layer | None,
    halves: bool = False, join: bool = True, track: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`forward`; of each slice the tracked products (B, n, tracked, D), the sizes near its end and the states it starts from (B, n, S, D); and the
    first slice of each head (of `joined`) that was walked in order (B, E), n if none was. join: corrections end where they have come back. track: the
    tracked products are those of the last pass, not of the first one, which corrections are as quick with."""
    plan = plan or in_force(cell, pre, mat.shape[1], layer, False)
    p = Problem(cell, pre, rec, joined(mat), h0, starts, plan, halves)
    B, T, S, D, n = p.B, p.T, p.S, p.D, plan.slices
    emitted, kept, final = (p.h0 if halves else p.pre).new_empty(B, T, D), p.h0.new_empty(B, T, S - 1, D), torch.empty_like(p.h0)
    begins, ends, nearby, products = p.per_slice(S), p.per_slice(S), p.per_slice(S), p.per_slice(p.tracked)
    todo, bad = torch.empty(B, n, p.E, dtype=torch.int32, device=pre.device), torch.empty(B, p.E, dtype=torch.int32, device=pre.device)
    R = p.on_chip()
    shared = (p.at.tensor, p.rec, R)
    (marks, near, limit), how = p.joins(todo, join)
    walked = (*shared, p.h0, p.reset, emitted, kept, begins, ends, products, nearby, todo, marks, near, limit, plan.burn_in)
    p.module.walk[p.grid](*walked, True, track or n > 1, *how, *p.sizes, **p.constants)
    if n == 1:
        return emitted, kept, ends[:, 0], products, nearby, begins, bad.fill_(n)
    stats = (_counters(pre.device) if layer is None else layer.counters)[:SLOTS]
    for k in range(p.rounds):
        p.module.correct[p.E, B](begins, ends, products, nearby, todo, bad, stats, float(k + 1), *p.chain, **p.chain_after)
        p.module.walk[p.grid](*walked, False, track, *how, *p.sizes, **p.after)
    p.module.certify[p.E, B](begins, ends, products, nearby, near, bad, final, stats, *p.chain, **p.chain_after)
    p.module.finish[p.grid_in_order](*shared, p.reset, emitted, kept, ends, bad, final, *p.sizes, **p.after)
    return emitted, kept, final, products, nearby, begins, bad


def _before(p: Problem, emitted: Tensor, starts: Tensor | None) -> Tensor:
    """The emitted state that each step starts from (B, T, D), in the dtype of products."""
    before = emitted.new_empty(emitted.shape)  # torch.cat takes four times the bytes' time here
    before[:, 0], before[:, 1:] = p.h0[:, -1], emitted[:, :-1]
    return before if starts is None else before.masked_fill_(starts[..., None], 0)


def _by_head(p: Problem, x: Tensor) -> Tensor:
    """(B, T, D) as (E, B T, K)."""
    return x.reshape(p.B * p.T, p.E, p.K).transpose(0, 1)


def taken(mat: Tensor, matrices: Sequence[int]) -> Tensor:
    """These matrices of mat (E, K, G, K). An index would come from the host, which a CUDA graph cannot hold."""
    first = matrices[0]
    if list(matrices) == list(range(first, first + len(matrices))):  # neighbours are not copied
        return mat[:, :, first : first + len(matrices)]
    return torch.stack([mat[:, :, g] for g in matrices], 2)


def _emitted_alone(p: Problem) -> bool:
    """Whether all that is multiplied with matrices is the emitted state."""
    return len(p.dense.operands) == 1 and is_leaf(p.dense.operands[0], f"h{p.S - 1}")


def _known(p: Problem, before: Tensor, kept: Tensor, starts: Tensor | None, products: bool) -> tuple[Tensor | None, list[Tensor]]:
    """(products (E, B T, products, K) in fp32, where they are wanted, operands (E, B T, K) in the dtype of products) of all steps, at the known
    states."""
    dense, mat, Q = p.dense, p.mat.to(p.pre.dtype).to(before.dtype), len(p.dense.products)
    if _emitted_alone(p):
        u = _by_head(p, before)
        R = taken(mat, [product.matrix for product in dense.products]).reshape(p.E, p.K, Q * p.K) if products else mat
        return matrices.product_of(u, R).view(p.E, -1, Q, p.K) if products else None, [u]
    memory = torch.cat([p.h0[:, None, :-1], kept[:, :-1]], 1)
    memory = memory if starts is None else memory.masked_fill(starts[..., None, None], 0)
    x, w, h = p.pre.flatten(3).float().unbind(2), p.rec.unbind(0), [*memory.unbind(2), before.float()]
    rounded = [_Rounded(R, p, before.dtype) for R in mat.unbind(2)]
    found, operands = in_torch(p.cell).products(x, w, h, rounded)  # type: ignore[arg-type]
    return torch.stack([_by_head(p, v) for v in found], 2) if products else None, [_by_head(p, u.to(before.dtype)) for u in operands]


class _Rounded(HeadMatrix):
    """A matrix that rounds what it is multiplied with, as the kernels do."""

    def __init__(self, R_EKJ: Tensor, p: Problem, dtype: torch.dtype) -> None:
        super().__init__(R_EKJ)
        self.p, self.dtype = p, dtype

    def __matmul__(self, x: Tensor) -> Tensor:
        return matrices.product_of(_by_head(self.p, x.to(self.dtype)), self.R_EKJ).transpose(0, 1).reshape(self.p.B, self.p.T, self.p.D)


def backward(
    cell: Cell, pre: Tensor, rec: Tensor, mat: Tensor, h0: Tensor, starts: Tensor | None, emitted: Tensor, kept: Tensor,
    d_emitted: Tensor, d_kept: Tensor | None, d_final: Tensor, plan: Plan | None = None,
    layer: Layer | None = None, halves: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of pre (its dtype, laid out as torch.empty_like does), rec, mat and h0 (fp32)."""
    return backward_with_border(cell, pre, rec, mat, h0, starts, emitted, kept, d_emitted, d_kept, d_final, plan, layer, halves)[:4]


def backward_with_border(
    cell: Cell, pre: Tensor, rec: Tensor, mat: Tensor, h0: Tensor, starts: Tensor | None, emitted: Tensor, kept: Tensor,
    d_emitted: Tensor, d_kept: Tensor | None, d_final: Tensor, plan: Plan | None = None,
    layer: Layer | None = None, halves: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`backward`, and the adjoint's size near the first step (B, S, D)."""
    plan = plan or in_force(cell, pre, mat.shape[1], layer, True)
    p = Problem(cell, pre, rec, joined(mat), h0, starts, plan, halves)
    B, T, S, n = p.B, p.T, p.S, plan.slices
    known = pad(p.K) * pre.element_size() > TWICE
    d_whole = torch.empty_like(pre)
    to = Layout(d_whole.unsqueeze(3) if pre.dim() == 4 else d_whole)
    written, h0_emitted = facts(p.cell), p.h0[:, -1].to(emitted.dtype, copy=True).contiguous()
    by_kernel = pre.element_size() == 2 and not halves
    apart = not (by_kernel and written.as_inputs)
    products_known: Tensor | None = None
    operands: list[Tensor] | None = None
    if known or not by_kernel or not _emitted_alone(p):
        products_known, operands = _known(p, _before(p, emitted, starts), kept, starts, known)
    d_prod = emitted.new_empty(p.E, B * T, len(p.dense.products), p.K) if apart else emitted
    partial, d_h0 = p.per_slice(len(written.summed)), torch.empty_like(p.h0)
    begins, ends, nearby, products = p.per_slice(S), p.per_slice(S), p.per_slice(S), p.per_slice(p.tracked)
    todo, bad = torch.empty(B, n, p.E, dtype=torch.int32, device=pre.device), torch.empty(B, p.E, dtype=torch.int32, device=pre.device)
    with_kept = d_kept is not None and S > 1
    d_emitted, d_final = d_emitted.contiguous(), d_final.float().contiguous()
    tensors = (
        p.at.tensor, p.rec, p.on_chip(), p.reset, emitted, kept, p.h0, h0_emitted, emitted if products_known is None else products_known, d_emitted,
        d_kept.contiguous() if with_kept and d_kept is not None else d_emitted, d_final, to.tensor, d_prod, partial, to.batch, to.time,
        to.projection, to.se,
    )  # fmt: skip
    flags = (with_kept, pre.dtype == torch.float16, known, apart)
    measures = (begins, ends, products, nearby)
    (marks, near, limit), (*how, _) = p.joins(todo, not written.summed)  # sums over slices are of whole ones
    joins = (marks, near, limit, plan.burn_in)
    p.module.walk_back[p.grid](*tensors, *measures, todo, *joins, True, *how, *flags, *p.sizes, **p.constants)
    if n > 1:
        stats = (_counters(pre.device) if layer is None else layer.counters)[SLOTS:]
        for k in range(p.rounds):
            p.module.correct_back[p.E, B](*measures, todo, bad, stats, float(k + 1), *p.chain, **p.chain_after)
            p.module.walk_back[p.grid](*tensors, *measures, todo, *joins, False, *how, *flags, *p.sizes, **p.after)
        p.module.certify_back[p.E, B](*measures, near, bad, d_h0, stats, *p.chain, **p.chain_after)
        p.module.finish_back[p.grid_in_order](*tensors, ends, bad, d_h0, *flags, *p.sizes, **p.after)
    else:
        d_h0 = ends[:, 0]
    if to.tensor.data_ptr() != d_whole.data_ptr():  # a layout the kernels cannot write
        d_whole.copy_(to.tensor.view(d_whole.shape))
    if by_kernel:
        cotangents = matrices.Cotangents(p, None if apart else to, d_prod, written.as_inputs)
        d_mat, sums = matrices.gradient_by_kernel(p, emitted, h0_emitted, operands, cotangents, written.as_ones)
    else:
        assert operands is not None
        d_mat, sums = matrices.gradient(p, operands, d_prod, written.as_ones)
    sums |= dict(zip(written.summed, partial.sum((0, 1))))
    d_rec = torch.stack([sums[r] for r in written.W]) if sums else torch.zeros_like(p.rec)
    return d_whole, d_rec, parted(d_mat, *mat.shape[:2]), d_h0, nearby[:, 0]


def last_report() -> dict[str, float]:
    """Of the solves over several slices since the last call, but those of layers that learn: heads of batch rows solved, most corrections, largest residual at the last check,
    and the share of slices that had to be walked in order; the same of the adjoints. Waits for the device: call it when logging."""
    read = torch.stack([t.cpu() for t in _stats.values()]).amax(0).tolist() if _stats else [0.0] * (2 * SLOTS)
    report: dict[str, float] = {}
    for name, (residual, corrections, heads, walked, slices) in zip(("", "_backward"), (read[:SLOTS], read[SLOTS:])):
        report |= {f"heads{name}": heads, f"corrections{name}": corrections, f"residual{name}": residual}
        report[f"walked{name}"] = walked / max(1.0, slices)
    for t in _stats.values():
        t.zero_()
    return report


__all__ = ["Dense", "Plan", "backward", "forward", "last_report", "why_not"]
