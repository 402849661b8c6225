"""Launches the kernels of heads whose matrices do not fit on a multiprocessor (kernels/dense_rnn/large_codegen.py writes them).

A pass over all slices is one launch, whose programs meet at a barrier after every step (in teams of as many as own a head's channels); so a pass, or
the walk in order, with nothing to do costs one launch and no step. Everything else is as of small heads: burn-in, corrections, certificate, counters.

Legend: B batch, T time, n slices, P input projections, G matrices, S states, D = E K channels in E heads, KP: K filled up to whole tiles.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dense_rnn import chain_source, large_codegen, large_held_source, large_source, launch, marks, matrices
from kernels.dense_rnn.plans import SLOTS, Layer
from kernels.dense_rnn.reference import BURN_IN, NEAR, TOLERANCE
from kernels.dispatch import interpreted, no_triton, planned
from kernels.parallel_rnn.cell import Cell
from kernels.parallel_rnn.launch import Layout, load_source, multiprocessors
from kernels.parallel_rnn.products import Dense, trace_dense

PROVEN = {2: 2048, 4: 2048}  # channels up to which they were seen to be right on a GPU, by bytes of an input
# dtypes in which matrices on chip were seen to be right on a GPU, by numbers of matrices and states of a cell: of an LSTM, a GRU, an sLSTM
PROVEN_ON_CHIP = {(4, 2): (torch.bfloat16, torch.float16), (3, 1): (torch.bfloat16, torch.float16), (4, 3): (torch.bfloat16,)}
HELD, HELD_BACK = 768, 768  # channels up to which matrices of 16 bits stay on chip, forwards and backwards, where the cell lets them
ON_CHIP = 768  # the most that fit there
LARGEST = 2048  # channels of a head
SHORTEST = 32  # steps of a slice
CHAINED = 220 << 10  # bytes of shared memory for ends of slices; 7 KB are left to sums


def proven(pre: Tensor, K: int) -> bool:
    """Whether the kernels run on a GPU without being asked for by name."""
    return K <= PROVEN.get(pre.element_size(), 0) or os.environ.get("EVERYWHEN_DENSE_KERNELS") == "1"


def proven_on_chip(cell: Cell, pre: Tensor) -> bool:
    """Whether a GPU was seen to be right with matrices that stay on chip."""
    return pre.dtype in PROVEN_ON_CHIP.get((len(cell.mat), len(cell.state)), ()) or os.environ.get("EVERYWHEN_DENSE_KERNELS") == "1"


def takes(pre: Tensor, K: int) -> bool:
    """Whether a head is too large for the kernels of kernels/dense_rnn/launch.py."""
    return K > launch.LARGEST.get(pre.element_size(), K)


def why_not(cell: Cell, pre: Tensor, K: int) -> str:
    """Empty if the kernels can run, else one sentence."""
    reason = no_triton(pre.device)
    if reason:
        return reason
    if pre.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"The kernels of dense heads have no {pre.dtype}."
    if K > LARGEST:
        return f"The kernels of dense heads take heads of up to {LARGEST} channels, not of {K}."
    if torch.version.hip is not None:
        return "Large dense heads need an NVIDIA GPU, on which all programs of a launch can meet."
    if not planned() and not interpreted():
        tiles = Tiles.of(cell, pre, K)
        programs = -(-K // tiles.multiple) * tiles.multiple // tiles.columns
        if programs > multiprocessors(pre.device):
            return f"A head of {K} channels takes {programs} multiprocessors, more than this GPU has."
    return cell.why_loop


@dataclass(frozen=True)
class Tiles:
    """Of a program: rows and channels forwards and backwards, depth of a product's tile, warps, tiles in flight, depth and warps backwards (0: the
    same)."""

    rows: int
    columns: int
    rows_back: int
    columns_back: int
    depth: int
    warps: int
    stages: int
    depth_back: int = 0
    warps_back: int = 0
    held: bool = False  # forwards and backwards: matrices that stay on chip (large_held_source.py)
    held_back: bool = False

    @property
    def multiple(self) -> int:
        return max(self.columns, self.columns_back, self.depth, self.depth_back)

    @staticmethod
    def of(cell: Cell, pre: Tensor, K: int) -> Tiles:
        """Those of matrices that stay on chip, up to as many channels as HELD and HELD_BACK say, where they can and a GPU was seen to be right."""
        tiles, on = Tiles.streamed(cell, pre, K), Tiles.on_chip(cell, pre, K)
        if on is None or not proven_on_chip(cell, pre):
            return tiles
        if K <= HELD:
            tiles = replace(tiles, rows=on.rows, columns=on.columns, depth=on.depth, depth_back=tiles.depth_back or tiles.depth, held=True)
        if K <= HELD_BACK and on.held_back:
            tiles = replace(tiles, rows_back=on.rows_back, columns_back=on.columns_back, depth_back=on.depth, held_back=True)
        return tiles

    @staticmethod
    def on_chip(cell: Cell, pre: Tensor, K: int) -> Tiles | None:
        """64 rows and four matrices of 32 channels make products 64 wide for each group of four warps. In fp16 every program's cotangents have a scale
        of their own, so that a product backwards cannot take those of several programs."""
        dense = trace_dense(cell)
        if not large_held_source.held(dense) or pre.element_size() != 2 or K > ON_CHIP or len(dense.products) not in (3, 4):
            return None
        if pre.is_cuda and not planned() and torch.cuda.get_device_capability(pre.device) != (9, 0):  # wgmma, and 227 KB of shared memory
            return None
        both, depth = pre.dtype == torch.bfloat16, 128 if K % 256 else 256
        if interpreted():
            return Tiles(16, 16, 16, 16, 64, 4, 1, held=True, held_back=both)
        return (
            Tiles(64, 32, 64, 32, depth, 8, 1, held=True, held_back=True) if both else Tiles(64, 32, 32, 64, depth, 8, 3, depth, held=True)
        )

    @staticmethod
    def streamed(cell: Cell, pre: Tensor, K: int) -> Tiles:
        """A step has some 16 values for each row and channel, which fit into registers of tiles of 2,048. Matrices of four gates side by side make
        products 128 wide and 64 or more rows high, of wgmma; backwards, and where one matrix stands alone, 32 rows take mma.sync instead: ptxas 12.8
        assembles wgmma of narrow products wrongly. Where matrices outweigh all else, twice the rows are worth some spilled registers."""
        if interpreted():
            return Tiles(16, 16, 16, 16, 16, 4, 1)
        if pre.element_size() == 4:
            return Tiles(32, 32, 32, 64, 32, 8, 2)
        dense = trace_dense(cell)
        wide = all(len(large_source.of_operand(dense, i)) > 2 for i in range(len(dense.operands)))
        # an iteration takes half a microsecond whatever it reads, up to tiles of some 50 KB; K is not filled up for deep ones
        depth, back = (next(deep for deep in (most, 128, 64) if deep == 64 or K % deep == 0) for most in (128, 256))
        return Tiles(32 if not wide else 128 if K > 1024 else 64, 32, 32, 64, 64 if K > 1024 else depth, 8, 3, back)


def burn_in_back(dtype: torch.dtype, held: bool, length: int) -> int:
    """Steps behind a slice of `length` from which its adjoints are guessed: half of it in bf16, where that leaves one correction of two, and otherwise as
    few as cost none (an LSTM with starting weights, 768 and 2,048 channels, 1,024 steps)."""
    if held:
        return 24
    return {torch.float16: 16, torch.bfloat16: min(64, max(BURN_IN, length // 2))}.get(dtype, BURN_IN)


@dataclass(frozen=True)
class Plan:
    """Slices of how many steps, steps of burn-in, and a program's tiles."""

    slices: int
    length: int
    burn_in: int
    tiles: Tiles

    @staticmethod
    def of(
        cell: Cell, pre: Tensor, K: int, slices: int | None = None, burn_in: int | None = None, tiles: Tiles | None = None,
        back: bool = False,
    ) -> Plan:  # fmt: skip
        """A step takes about as long for one row as for a whole tile (the matrices come from the second-level cache either way): as many slices as
        fill the rows of all teams that fit on the device."""
        tiles = tiles or Tiles.of(cell, pre, K)
        (B, T), E = pre.shape[:2], pre.shape[3:].numel() // K
        rows, columns = (tiles.rows_back, tiles.columns_back) if back else (tiles.rows, tiles.columns)
        if slices is None:
            teams = max(1, multiprocessors(pre.device) * columns // (-(-K // tiles.multiple) * tiles.multiple))
            slices = min(T // SHORTEST, rows * teams // (E * B))
            slices = slices if slices >= 4 else 1
        length = -(-T // max(1, min(slices, T)))
        n = -(-T // length)
        if burn_in is None:
            burn_in = burn_in_back(pre.dtype, tiles.held_back, length) if back else BURN_IN
        return Plan(n, length, min(burn_in, length) if n > 1 else 0, tiles)


def in_force(cell: Cell, pre: Tensor, K: int, layer: Layer | None, back: bool) -> Plan:
    """The reckoned plan, or what a layer has learnt to do since, as of small heads. A burn-in of 32 steps saves a correction of some 50 here."""
    plan = Plan.of(cell, pre, K, back=back)
    if layer is None:
        return plan
    return Plan.of(cell, pre, K, *layer.passes[back].plan(plan.slices, pre.shape[1], plan.burn_in), back=back)


@functools.cache
def kernels(cell: Cell, maths: str, short: str, pieces: int = 0) -> ModuleType:
    """pieces: tiles of depth that a program's matrices make, where they stay on chip."""
    return load_source(f"{cell.name}_large", large_codegen.source(cell, short, maths, pieces))


def forward_tiles(dense: Dense, mat: Tensor, KP: int, columns: int, dtype: torch.dtype) -> Tensor:
    """The matrices in `dtype`, flat: of each operand (E, KP / columns, KP, M, columns), the M matrices that multiply it side by side."""
    K, parts = mat.shape[1], []
    for operand in range(len(dense.operands)):
        mine = large_source.of_operand(dense, operand)
        M = large_source.padded(len(mine))
        wide = launch.taken(mat, [dense.products[i].matrix for i in mine]).to(dtype)
        wide = F.pad(wide, (0, KP - K, 0, M - len(mine), 0, KP - K)) if KP > K or M > len(mine) else wide
        parts.append(wide.unflatten(3, (-1, columns)).permute(0, 3, 1, 2, 4).flatten())
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def backward_tiles(dense: Dense, mat: Tensor, KP: int, dtype: torch.dtype) -> Tensor:
    """(E, products, KP outputs, KP inputs) in `dtype`."""
    E, K = mat.shape[:2]
    new = torch.zeros if KP > K else torch.empty
    wide = new(E, len(dense.products), KP, KP, dtype=dtype, device=mat.device)
    wide[:, :, :K, :K] = launch.taken(mat, [product.matrix for product in dense.products]).permute(0, 2, 3, 1)
    return wide


def stages_of_chain(cell: Cell, block: int) -> int:
    """How many slices' ends are on their way to the kernels that go from slice to slice, which hold all but one of them on chip."""
    values = 4 * block * (3 * len(cell.state) + len(launch.facts(cell).tracked))  # bytes of a slice
    return min(chain_source.CHAIN_STAGES, 1 + CHAINED // values)


class _Problem(launch.Solve):
    """A solve of large heads."""

    def __init__(
        self, cell: Cell, pre: Tensor, rec: Tensor, mat: Tensor, h0: Tensor, starts: Tensor | None, plan: Plan, back: bool
    ) -> None:
        super().__init__(cell, pre, rec, mat, h0, starts, plan.slices)
        self.plan, tiles, n = plan, plan.tiles, plan.slices
        self.back = back
        self.rows, self.columns = (tiles.rows_back, tiles.columns_back) if back else (tiles.rows, tiles.columns)
        self.held = tiles.held_back if back else tiles.held
        self.KP = -(-self.K // tiles.multiple) * tiles.multiple
        depth = (tiles.depth_back or tiles.depth) if back else tiles.depth
        pieces = self.KP // depth if self.held else 0
        self.module = kernels(cell, "portable" if interpreted() else "ptx", str(pre.dtype)[6:] if pre.element_size() == 2 else "", pieces)
        self.programs = self.KP // self.columns
        self.groups, self.groups_finish = (self.E * -(-rows // self.rows) for rows in (self.B * n, self.B))
        self.RT = self.groups // self.E * self.rows
        self.most = max(1, multiprocessors(pre.device) // self.programs)
        each = self.most * (1 + self.programs) * large_held_source.LINE if self.held else self.most
        self.counters = torch.zeros(2 + launch.CORRECTIONS[pre.element_size()], each, dtype=torch.int32, device=pre.device)
        self.passes = 0
        self.constants: dict[str, Any] = {
            "E": self.E, "K": self.K, "KP": self.KP, "HEAD": self.at.head, "NEAR": NEAR, "HAS_RESET": starts is not None,
            **self.of_products(self.module.tl), "BM": self.rows, "BN": self.columns,
            "BK": self.columns if back and pre.dtype == torch.float16 and not self.held else depth, "STAGES": tiles.stages,
            "num_warps": tiles.warps_back or tiles.warps if back else tiles.warps, "num_stages": 1,
        }  # fmt: skip
        self.chain = (n, TOLERANCE[pre.dtype])
        block = 1 << (self.K - 1).bit_length()
        self.chain_constants = {
            "K": self.K, "D": self.D, "BK": block, "DEPENDENT": False, "STAGES": stages_of_chain(cell, block), "num_warps": 8,
        }  # fmt: skip
        self.todo = torch.empty(self.B, n, self.E, dtype=torch.int32, device=pre.device)
        self.bad = torch.empty(self.B, self.E, dtype=torch.int32, device=pre.device)
        self.begins, self.ends, self.nearby, self.products = (self.per_slice(i) for i in (self.S, self.S, self.S, self.tracked))
        self.measures = (self.begins, self.ends, self.products, self.nearby)

    def shared(self, *shape: int) -> Tensor:
        """What programs of a team exchange, of even and odd steps: zero where rows and channels are filled up."""
        return torch.zeros(2, *shape, self.RT, self.E * self.KP, dtype=self.product, device=self.pre.device)

    def summed(self) -> Tensor:
        """What programs that share columns exchange."""
        return self.h0.new_empty(large_source.padded(len(self.dense.products)), self.RT, self.E * self.KP)

    def walk(self, name: str, tensors: tuple[Any, ...], first: bool = False, finish: bool = False) -> None:
        """A pass in one launch, or, in the interpreter, phase by phase."""
        kernel = getattr(self.module, f"{name}_held" if self.held else name)
        at, plan, groups = self.at, self.plan, self.groups_finish if finish else self.groups
        begin = -plan.burn_in if first else 0
        sizes = (self.T, plan.length, plan.slices, self.B, self.RT, at.batch, at.time, at.projection, at.se, plan.burn_in)
        counter = self.counters[self.passes]
        self.passes += 1
        if not interpreted():
            teams = min(groups, self.most)
            constants = {**self.constants, "FIRST": first, "FINISH": finish, "MODE": -2, "launch_cooperative_grid": True}
            kernel[(teams * self.programs,)](*tensors, counter, begin, teams, *sizes, **constants)
            return
        end = (plan.slices - int(self.bad.min())) * plan.length if finish else plan.length
        levels = list(reversed(range(len(self.dense.levels)))) if self.back else list(range(len(self.dense.levels)))
        phases = [(begin, -1), *((it, l) for it in range(begin, end) for l in ([0, 1] if self.held and self.back else levels))]
        for it, mode in phases:
            constants = {**self.constants, "FIRST": first, "FINISH": finish, "MODE": mode}
            kernel[(groups * self.programs,)](*tensors, counter, it, groups, *sizes, **constants)


def forward(
    cell: Cell,
    pre: Tensor,
    rec: Tensor,
    mat: Tensor,
    h0: Tensor,
    starts: Tensor | None,
    plan: Plan | None = None,
    layer: Layer | None = None,
    halves: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(emitted (B, T, D) in pre's dtype, kept (B, T, S - 1, D) fp32, final (B, S, D) fp32)."""
    assert not halves  # such are solved in plain torch
    plan = plan or in_force(cell, pre, mat.shape[1], layer, False)
    p = _Problem(cell, pre, rec, mat, h0, starts, plan, back=False)
    dense, n = p.dense, plan.slices
    emitted, kept, final = p.pre.new_empty(p.B, p.T, p.D), p.h0.new_empty(p.B, p.T, p.S - 1, p.D), torch.empty_like(p.h0)
    several = len(dense.levels) > 1
    tensors = (
        p.at.tensor, p.rec, forward_tiles(dense, mat, p.KP, p.columns, p.product), p.h0, p.reset, emitted, kept, p.begins, p.ends,
        p.products, p.nearby, p.todo, p.bad, final, p.shared(len(dense.operands)), p.per_slice(len(dense.products)) if several else p.ends,
    )  # fmt: skip
    p.walk("walk", tensors, first=True)
    if n == 1:
        return emitted, kept, p.ends[:, 0]
    stats = (launch._counters(pre.device) if layer is None else layer.counters)[:SLOTS]
    for k in range(min(launch.CORRECTIONS[pre.element_size()], n - 1)):
        p.module.correct[p.E, p.B](*p.measures, p.todo, p.bad, stats, float(k + 1), *p.chain, **p.chain_constants)
        p.walk("walk", tensors)
    p.module.certify[p.E, p.B](*p.measures, p.bad, final, stats, *p.chain, **p.chain_constants)
    p.walk("walk", tensors, finish=True)
    return emitted, kept, final


def forward_with_marks(
    cell: Cell, pre: Tensor, rec: Tensor, mat: Tensor, h0: Tensor, starts: Tensor | None, plan: Plan | None = None,
    layer: Layer | None = None, halves: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`forward` with zeros in place of the kept states, in the shape of marks.py's."""
    emitted, _, final = forward(cell, pre, rec, mat, h0, starts, plan, layer, halves)
    return emitted, final.new_zeros(final.shape[0], marks.marks_of(pre.shape[1]), *final.shape[1:]), final


def restore(
    cell: Cell, pre: Tensor, rec: Tensor, mat: Tensor, h0: Tensor, starts: Tensor | None, empty: Tensor, plan: Plan | None = None,
    layer: Layer | None = None, halves: bool = False,
) -> Tensor:  # fmt: skip
    """The kept states (B, T, S - 1, D), bit for bit, by another solve under the plan of the first one."""
    return forward(cell, pre, rec, mat, h0, starts, plan, layer, halves)[1]


def backward(
    cell: Cell, pre: Tensor, rec: Tensor, mat: Tensor, h0: Tensor, starts: Tensor | None, emitted: Tensor, kept: Tensor,
    d_emitted: Tensor, d_kept: Tensor | None, d_final: Tensor, plan: Plan | None = None, layer: Layer | None = None,
    halves: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of pre (its dtype, laid out as torch.empty_like does), rec, mat and h0 (fp32)."""
    return backward_with_border(cell, pre, rec, mat, h0, starts, emitted, kept, d_emitted, d_kept, d_final, plan, layer, halves)[:4]


def backward_with_border(
    cell: Cell, pre: Tensor, rec: Tensor, mat: Tensor, h0: Tensor, starts: Tensor | None, emitted: Tensor, kept: Tensor,
    d_emitted: Tensor, d_kept: Tensor | None, d_final: Tensor, plan: Plan | None = None, layer: Layer | None = None,
    halves: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`backward`, and the adjoint's size near the first step (B, S, D)."""
    assert not halves  # such are solved in plain torch
    plan = plan or in_force(cell, pre, mat.shape[1], layer, True)
    p: Any = _Problem(cell, pre, rec, mat, h0, starts, plan, back=True)
    dense, n, Q = p.dense, plan.slices, len(p.dense.products)
    before = launch._before(p, emitted, starts)
    products, operands = launch._known(p, before, kept, starts, True)
    d_whole = torch.empty_like(pre)
    to = Layout(d_whole.unsqueeze(3) if pre.dim() == 4 else d_whole)
    # gradients of inputs that are the products' cotangents, in their order, lie as these do: one is the other
    same = p.E == 1 and pre.dim() == 4 and to.tensor.data_ptr() == d_whole.data_ptr() and d_whole.is_contiguous()
    same = same and launch.facts(cell).as_inputs == list(range(pre.shape[2])) == list(range(Q))
    d_prod = d_whole.view(1, p.B * p.T, Q, p.K) if same else before.new_empty(p.E, p.B * p.T, Q, p.K)
    partial, d_h0 = p.per_slice(p.rec.shape[0]), torch.empty_like(p.h0)
    with_kept, scaled = d_kept is not None and p.S > 1, pre.dtype == torch.float16
    d_emitted, d_final = d_emitted.contiguous(), d_final.float().contiguous()
    scales = p.h0.new_zeros(2, len(dense.levels), p.RT, p.E * p.programs) if scaled else p.h0
    several = len(dense.levels) > 1
    tensors = (
        p.at.tensor, p.rec, backward_tiles(dense, mat, p.KP, p.product), p.reset, before, kept, p.h0, products, d_emitted,
        d_kept.contiguous() if with_kept and d_kept is not None else d_emitted, d_final, to.tensor, d_prod, partial, p.begins, p.ends,
        p.products, p.nearby, p.todo, p.bad, d_h0, p.shared(Q), scales, p.summed() if p.held else p.per_slice(len(dense.operands)) if several else p.ends,
        to.batch, to.time, to.projection, to.se, with_kept, scaled, same,
    )  # fmt: skip
    p.walk("walk_back", tensors, first=True)
    if n > 1:
        stats = (launch._counters(pre.device) if layer is None else layer.counters)[SLOTS:]
        for k in range(min(launch.CORRECTIONS[pre.element_size()], n - 1)):
            p.module.correct_back[p.E, p.B](*p.measures, p.todo, p.bad, stats, float(k + 1), *p.chain, **p.chain_constants)
            p.walk("walk_back", tensors)
        p.module.certify_back[p.E, p.B](*p.measures, p.bad, d_h0, stats, *p.chain, **p.chain_constants)
        p.walk("walk_back", tensors, finish=True)
    else:
        d_h0 = p.ends[:, 0]
    if to.tensor.data_ptr() != d_whole.data_ptr():  # a layout the kernels cannot write
        d_whole.copy_(to.tensor.view(d_whole.shape))
    d_rec, biases = partial.sum((0, 1)), {r: large_source.bias_of(dense, r) for r in range(p.rec.shape[0])}
    if any(of is not None for of in biases.values()):
        sums = d_whole.sum((0, 1), dtype=torch.float32).flatten(1)
        for r, of in biases.items():
            d_rec[r] = sums[of] if of is not None else d_rec[r]
    return d_whole, d_rec, matrices.gradient(p, operands, d_prod)[0], d_h0, p.nearby[:, 0]
