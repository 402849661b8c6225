"""Runs the Triton kernels of `triton.py`; imports Triton only when a kernel is first wanted.

Saved for the backward pass are the inputs only; it walks over the states again. Sums over heads and chunks are of partial sums in a fixed
order, so results repeat bit for bit. Matrix products take bf16 operands where x is bf16; fp16 is lifted to fp32, whose range the states
need, and like fp32 multiplied in three tf32 products: exact, but slow. Sums, decays and the carried state are fp32 throughout; states kept
between the kernels are in the dtype of the operands.

Legend: B batch, T time, H heads, P head width, G groups, N state width, Q steps of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import interpreted, no_triton
from kernels.joint import rooms

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PREPARED = 16  # heads a program of `prepare` takes
# Operands of bf16 kernels are made of whole runs of so many elements, so that all their copies are wide and asynchronous. Where head and state
# widths both forbid that, loads go element by element, an address in registers for each: of those kernels results were 30 to 40 % off on an H100
# (Triton 3.6, ptxas 12.8), and once a read was outside of shared memory: ptxas before 13.1 assembles some programs with wgmma wrongly. The same
# kernels without any filling were right when ptxas 13.4 assembled them.
RUN, IN_RUNS = 16, (torch.bfloat16,)
# Heads of 16 beside a state of 16 had the same fault: gradients 49 % off, or a read outside of memory. Filled up to 32 they are right.
NARROWEST = 32  # width in which bf16 kernels take a head
LARGEST_STATE = 128 * 128  # elements of a state that is loaded a stage ahead; larger ones leave no shared memory for it
SHARE_ROWS = 32  # tokens of which a program adds the shares of blocks of heads
RECOVERED = 4096  # elements of a state that a program of `recover` holds


@dataclass(frozen=True)
class Pass:
    """Sizes of a pass: steps of a chunk; of `walk` the columns of N a program owns, warps and stages; of the kernel over all chunks the heads a
    program takes one after the other, warps and stages."""

    Q: int
    columns: int
    walk_warps: int
    walk_stages: int
    heads: int
    warps: int
    stages: int


# Chosen once for every length and batch.
FORWARD, BACKWARD = Pass(128, 64, 4, 3, 8, 8, 3), Pass(64, 64, 4, 3, 8, 8, 3)
FORWARD_SMALL, BACKWARD_SMALL = Pass(64, 64, 4, 3, 1, 4, 4), Pass(64, 64, 8, 3, 8, 4, 3)  # of `carry`, and of the kernels in small.py
QUERY_STAGES = 1  # of `query_side`, which has no registers for more
MORE_HEADS, ENOUGH = 16, 1024  # heads that a program of small.py takes where so many programs are left
FORWARD_WIDE, BACKWARD_WIDE = Pass(32, 32, 4, 1, 8, 8, 1), Pass(32, 32, 4, 1, 8, 8, 1)  # operands of four bytes
ROWS = 64  # rows of P a program of `walk` owns
SMALL = 64  # widths of heads and states up to which `carry` and the kernels of small.py are taken
PROGRAMS = 128  # heads of all rows from which on `carry` fills a GPU


def why_not(x: Tensor) -> str:
    """Empty if the kernels can run on this tensor, else one sentence."""
    return no_triton(x.device) or ("" if x.dtype in DTYPES else f"The scan's kernels have no {x.dtype}.")


def kernels() -> ModuleType:
    from kernels.ssd import triton

    return triton


def gradient_kernels(small: bool) -> ModuleType:
    from kernels.ssd import gradients
    from kernels.ssd import small as narrow

    return narrow if small else gradients


def is_small(dtype: torch.dtype, P: int, N: int) -> bool:
    """Whether kernels for narrow ones take heads of P and states of N."""
    return (dtype == torch.bfloat16 or interpreted()) and max(pad(P), pad(N)) <= SMALL


def carries(dtype: torch.dtype, programs: int, P: int, N: int) -> bool:
    """Whether `carry` computes outputs."""
    return programs >= (8 if interpreted() else PROGRAMS) and is_small(dtype, P, N)


def keeps(x: Tensor, Bm: Tensor) -> tuple[int, ...] | None:
    """The shape of the states that a forward pass can keep for its backward pass, None where it has none: both are to cut time into the same chunks."""
    (B, T, H, P), N = x.shape, Bm.shape[-1]
    ahead, back = (sizes_of(x.dtype, P, N, way, B * H).Q for way in (False, True))
    if not carries(x.dtype, B * H, P, N) or ahead != back:
        return None
    P, N = (whole_width(max(n, least) if x.dtype in IN_RUNS else n, x.dtype) for n, least in ((P, NARROWEST), (N, RUN)))
    return B, -(-T // ahead), H, P, N


def pad(width: int) -> int:
    """The power of two that holds width, at least the 16 of a matrix product."""
    return max(16, 1 << (width - 1).bit_length())


def whole_width(width: int, dtype: torch.dtype) -> int:
    """The width in which kernels take operands of this dtype."""
    return -(-width // RUN) * RUN if dtype in IN_RUNS else width


def strides_of(x: Tensor) -> tuple[int, ...]:
    """Those of batch, time and heads; of a single one 0, which is a multiple of whatever is asked."""
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape[:3], x.stride()[:3]))


def ready(x: Tensor, dtype: torch.dtype, least: int = RUN) -> Tensor:
    """In this dtype, and neighbours along the last dimension, zeros after them up to whole runs and, in bf16, to `least`; other strides are free,
    but of whole runs."""
    width = max(x.shape[-1], least) if dtype in IN_RUNS else x.shape[-1]
    x, more = x.to(dtype), whole_width(width, dtype) - x.shape[-1]
    if more:
        return torch.constant_pad_nd(x, (0, more))
    dense = x.stride(-1) == 1 or x.shape[-1] == 1
    if dtype in IN_RUNS:
        dense = dense and x.data_ptr() % (RUN * x.element_size() // 2) == 0 and not any(stride % RUN for stride in strides_of(x))
    return x if dense else x.clone(memory_format=torch.contiguous_format)


def filled(state: Tensor | None, P: int, N: int) -> Tensor | None:
    """A state (B, H, P, N) in fp32 with zeros up to these sizes."""
    return None if state is None else torch.constant_pad_nd(state.float(), (0, N - state.shape[3], 0, P - state.shape[2])).contiguous()


def sizes_of(dtype: torch.dtype, P: int, N: int, back: bool, programs: int = 0) -> Pass:
    """The sizes of a pass for heads of P and states of N, of which there are `programs`: as many stages as shared memory holds."""
    if interpreted():
        return Pass(16, 16, 4, 1, 2, 4, 1)
    if dtype != torch.bfloat16:
        return BACKWARD_WIDE if back else FORWARD_WIDE
    if back and is_small(dtype, P, N):
        return BACKWARD_SMALL
    if not back and carries(dtype, programs, P, N):
        return FORWARD_SMALL
    sizes = BACKWARD if back else FORWARD
    if max(pad(P), pad(N) // 2) <= 64:
        return sizes
    return replace(sizes, stages=min(sizes.stages, 2 if pad(P) * pad(N) <= LARGEST_STATE else 1))


class Problem:
    """The arguments of one call in the form the kernels take, and what all kernels of a pass share."""

    def __init__(self, x: Tensor, dt: Tensor, A: Tensor, Bm: Tensor, Cm: Tensor, starts: Tensor | None, back: bool) -> None:
        self.module = kernels()
        tl = self.module.tl
        self.narrow = x.dtype == torch.bfloat16 and not interpreted()  # the interpreter has no bf16 products
        wide = x.dtype != torch.bfloat16
        self.sizes = sizes_of(x.dtype, x.shape[-1], Bm.shape[-1], back, x.shape[0] * x.shape[2])
        self.x, self.Bm, self.Cm, self.A = ready(x, x.dtype, NARROWEST), ready(Bm, x.dtype), ready(Cm, x.dtype), A.float().contiguous()
        (self.B, self.T, self.H, self.P), (self.G, self.N) = self.x.shape, self.Bm.shape[2:]
        self.R = self.H // self.G
        self.Q = self.sizes.Q
        self.chunks = -(-self.T // self.Q)
        if self.sizes == BACKWARD_SMALL and self.B * self.chunks * self.G * -(-self.R // MORE_HEADS) >= ENOUGH:
            self.sizes = replace(self.sizes, heads=MORE_HEADS)
        self.state_dtype = torch.bfloat16 if self.narrow else torch.float32
        self.options: dict[str, Any] = {
            "HAS_STARTS": starts is not None, "FINE": x.dtype == torch.float32, "Q": self.Q,
            "DOT": tl.bfloat16 if self.narrow else tl.float32, "PRECISION": "tf32x3" if wide else "ieee",
        }  # fmt: skip
        self.dt, self.starts = dt, starts
        self.lost = None if starts is None else torch.zeros(self.B, self.H, dtype=torch.int32, device=x.device)
        self._prepare(dt, starts)

    def fp32(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.x.device)

    def _prepare(self, dt: Tensor, starts: Tensor | None) -> None:
        length, fine = self.chunks * self.Q, self.options["FINE"]
        self.step, self.total = self.fp32(self.B, self.H, length), self.fp32(self.B, self.H, length)
        self.low = self.fp32(self.B, self.H, length) if fine else self.total
        self.document = self.total if starts is None else torch.empty(self.B, length, dtype=torch.int32, device=dt.device)
        marks, steps = (dt, (0, 0)) if starts is None else (starts.view(torch.uint8), starts.stride())
        self.module.prepare[(self.B * self.chunks, -(-self.H // PREPARED))](
            dt, self.A, marks, self.step, self.total, self.low, self.document, self.T, self.H, self.chunks, *dt.stride(), *steps,
            HAS_STARTS=starts is not None, FINE=fine, Q=self.Q, BH=PREPARED,
        )  # fmt: skip

    def walk(self, x: Tensor, key: Tensor, first: Tensor | None, entering: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(states entering each chunk; the last state; nothing). Given these states: (their gradients as they leave each chunk; the gradient of
        h0; parts of what each chunk's whole decay is asked for)."""
        B, H, P, N, s = self.B, self.H, self.P, self.N, self.sizes
        states, last = self.entering(), self.fp32(B, H, P, N)
        rows, columns = min(ROWS, pad(P)), min(s.columns, pad(N))
        tiles = -(-N // columns)
        passed = last if entering is None else self.fp32(B, self.chunks, H, tiles * P)
        programs = B * H * -(-P // rows) * tiles
        self.module.walk[(programs,)](
            x, key, self.step, self.total, self.low, self.document, last if first is None else first, states, last,
            states if entering is None else entering, passed, last if self.lost is None else self.lost, self.T, H, self.R, self.chunks, P, N,
            *strides_of(x), *strides_of(key), HAS_FIRST=first is not None, REVERSE=entering is not None, BP=rows, BN=columns, num_warps=s.walk_warps, num_stages=s.walk_stages, **self.options,
        )  # fmt: skip
        return states, last, passed

    def entering(self) -> Tensor:
        """Room for the states entering each chunk."""
        return torch.empty(self.B, self.chunks, self.H, self.P, self.N, dtype=self.state_dtype, device=self.x.device)

    def carry(self, skip: Tensor, skips: bool, begin: Tensor | None, y: Tensor, states: Tensor | None) -> Tensor:
        """Writes y, and the states entering each chunk where there is room for them; returns the last state."""
        s, (x_b, x_t, x_h), (b_b, b_t, b_g), (c_b, c_t, c_g) = self.sizes, *(strides_of(t) for t in (self.x, self.Bm, self.Cm))
        last = self.fp32(self.B, self.H, self.P, self.N)
        first = last if begin is None else begin
        self.module.carry[(self.B * self.H,)](
            self.x, self.Bm, self.Cm, skip, self.step, self.total, self.low, self.document, first, last if states is None else states, last, y, last if self.lost is None else self.lost,
            self.T, self.H, self.R, self.chunks, x_b, x_h, b_b, b_g, c_b, c_g, P=self.P, N=self.N, x_t=x_t, b_t=b_t, c_t=c_t,
            KEEP=states is not None, HAS_FIRST=begin is not None, HAS_SKIP=skips, BP=pad(self.P), BN=pad(self.N), STAGES=s.stages, num_warps=s.warps,
            **self.options,
        )  # fmt: skip
        return last

    def recover(self, skip: Tensor, skips: bool, begin: Tensor | None, y: Tensor, final: Tensor) -> None:
        """Outputs and final states again, in order, of the heads in which something that is not finite may have left its document."""
        assert self.starts is not None
        columns = pad(self.N)
        rows = min(pad(self.P), max(1, RECOVERED // columns))
        first = torch.zeros_like(final) if begin is None else begin
        self.module.recover[(self.B * self.H * -(-self.P // rows),)](
            self.x, self.dt, self.A, self.Bm, self.Cm, skip, self.starts.view(torch.uint8), first, y, final, self.lost, self.T, self.H, self.R, self.P, self.N,
            *strides_of(self.x), *self.dt.stride(), *strides_of(self.Bm), *strides_of(self.Cm), *self.starts.stride(), HAS_SKIP=skips, BP=rows, BN=columns,
        )  # fmt: skip

    @property
    def blocks(self) -> int:
        """Programs that share the heads of a group."""
        return -(-self.R // self.sizes.heads)

    def shared(self) -> tuple[Any, ...]:
        return self.T, self.H, self.R, self.blocks, self.chunks, self.P, self.N

    def tiles(self, skip: Tensor | None) -> dict[str, Any]:
        s = self.sizes
        return {
            "HAS_SKIP": skip is not None, "BP": pad(self.P), "BN": pad(self.N), "HEADS": s.heads, "STAGES": s.stages,
            "num_warps": s.warps, **self.options,
        }  # fmt: skip


def forward(
    x: Tensor, dt: Tensor, A: Tensor, Bm: Tensor, Cm: Tensor, D: Tensor | None, h0: Tensor | None, starts: Tensor | None,
    kept: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y (B, T, H, P) in x's dtype, final state (B, H, P, N) fp32). kept: gets the states that `backward` would have to make again, where there are any
    to be had."""
    this = Problem(x, dt, A, Bm, Cm, starts, back=False)
    P, N, skip = x.shape[3], Bm.shape[3], this.A if D is None else D.float().contiguous()
    begin = filled(h0, this.P, this.N)
    y = torch.empty(this.x.shape, dtype=x.dtype, device=x.device)
    if carries(x.dtype, this.B * this.H, P, N):
        states = None if kept is None else this.entering()
        if kept is not None and states is not None:
            kept.append(states)
        final = this.carry(skip, D is not None, begin, y, states)
    else:
        states, final, _ = this.walk(this.x, this.Bm, begin)
        lies = *strides_of(this.x), *strides_of(this.Bm), *strides_of(this.Cm)
        this.module.outputs[(this.B * this.chunks, this.G * this.blocks)](
            this.x, this.Bm, this.Cm, skip, this.step, this.total, this.low, this.document, states, y,
            final if this.lost is None else this.lost, *this.shared(), *lies, **this.tiles(D),
        )  # fmt: skip
    if this.lost is not None:
        this.recover(skip, D is not None, begin, y, final)
    return (y, final) if (this.P, this.N) == (P, N) else (y[..., :P].contiguous(), final[:, :, :P, :N].contiguous())


def backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    Bm: Tensor,
    Cm: Tensor,
    D: Tensor | None,
    h0: Tensor | None,
    starts: Tensor | None,
    dy: Tensor | None,
    d_final: Tensor | None,
    states: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of x, dt, A, B, C, D and h0: x's, B's and C's in the dtype of x, the others fp32. states: what `forward` has kept, else they are made
    again."""
    this = Problem(x, dt, A, Bm, Cm, starts, back=True)
    dy = ready(torch.zeros(x.shape, dtype=x.dtype, device=x.device) if dy is None else dy, x.dtype, NARROWEST)
    P, N = x.shape[3], Bm.shape[3]
    if states is None:
        states, _, _ = this.walk(this.x, this.Bm, filled(h0, this.P, this.N))
    d_states, d_h0, passed = this.walk(dy, this.Cm, filled(d_final, this.P, this.N), states)
    B, T, H, width = this.B, this.T, this.H, this.G * this.blocks
    dx, to_B, to_C = rooms((x, Bm, Cm) if (this.P, this.N) == (P, N) else (this.x, this.Bm, this.Cm), x.dtype)
    d_dt, d_A = this.fp32(B, T, H), this.fp32(B * this.chunks, H)
    d_D = None if D is None else torch.empty_like(d_A)
    d_B, d_C = (this.fp32(B, T, width, this.N) for _ in range(2))
    d_scores = torch.empty(B * this.chunks, width, this.Q, this.Q, dtype=this.state_dtype, device=x.device)
    skip = this.A if D is None else D.float().contiguous()
    if is_small(x.dtype, this.P, this.N):
        _small(this, dy, skip, states, d_states, d_scores, passed, dx, d_dt, d_A, d_B, d_C, d_D)
    else:
        _large(this, dy, skip, states, d_states, d_scores, passed, dx, d_dt, d_A, d_B, d_C, d_D)
    to_A, to_D = this.fp32(H), this.fp32(H)
    rows, columns, heads = -(-B * T // SHARE_ROWS), pad(this.N), min(32, pad(H))
    gradient_kernels(False).add_shares[(rows + -(-H // heads), this.G)](
        d_B, d_C, d_A, d_A if d_D is None else d_D, to_B, to_C, to_A, to_D, B * T, this.N, H, this.G, this.blocks, B * this.chunks,
        to_B.stride(1), rows, HAS_SKIP=d_D is not None, BR=SHARE_ROWS, BN=columns, BH=heads, BC=32,
    )  # fmt: skip
    if (this.P, this.N) != (P, N):
        dx, to_B, to_C, d_h0 = (t.contiguous() for t in (dx[..., :P], to_B[..., :N], to_C[..., :N], d_h0[:, :, :P, :N]))
    return dx, d_dt, to_A, to_B, to_C, None if d_D is None else to_D, d_h0


def _large(
    this: Problem, dy: Tensor, skip: Tensor, states: Tensor, d_states: Tensor, d_scores: Tensor, passed: Tensor,
    dx: Tensor, d_dt: Tensor, d_A: Tensor, d_B: Tensor, d_C: Tensor, d_D: Tensor | None,
) -> None:  # fmt: skip
    """Gradients of x and dt, of A and D per chunk, and of B and C per block of heads, by the kernels of gradients.py."""
    module, after, within = gradient_kernels(False), torch.empty_like(this.total), torch.empty_like(this.total)
    grid, read, lies = (
        (this.B * this.chunks, this.G * this.blocks),
        (this.x, dy, this.Bm, this.Cm),
        (*strides_of(dy), *strides_of(this.Bm), *strides_of(this.Cm)),
    )
    sums, sizes, tiles = (this.step, this.total, this.low, this.document), (*this.shared(), *strides_of(this.x), *lies), this.tiles(d_D)
    module.query_gradients[grid](*read, *sums, states, d_scores, d_C, d_A if d_D is None else d_D, after, within, *sizes, **tiles)
    module.key_gradients[grid](
        *read, this.A, skip, *sums, d_states, d_scores, passed, after, within, dx, d_dt, d_A, d_B, passed.shape[-1], dx.stride(1), *sizes,
        PARTS=pad(passed.shape[-1]), **tiles,
    )  # fmt: skip


def _small(
    this: Problem, dy: Tensor, skip: Tensor, states: Tensor, d_states: Tensor, d_scores: Tensor, passed: Tensor,
    dx: Tensor, d_dt: Tensor, d_A: Tensor, d_B: Tensor, d_C: Tensor, d_D: Tensor | None,
) -> None:  # fmt: skip
    """The same by the kernels of small.py."""
    module, tiles = gradient_kernels(True), this.tiles(d_D)
    grid, (x_b, x_t, x_h), (y_b, y_t, y_h) = (this.B * this.chunks, this.G * this.blocks), strides_of(this.x), strides_of(dy)
    read, sums = (this.x, dy, this.Bm, this.Cm), (this.step, this.total, this.low, this.document)
    within, across, carried, added, skipped = (torch.empty_like(this.total) for _ in range(5))
    sizes = (this.T, this.H, this.R, this.blocks, this.chunks, x_b, x_h, y_b, y_h, *strides_of(this.Bm), *strides_of(this.Cm))
    lies = {"P": this.P, "N": this.N, "x_t": x_t, "y_t": y_t}
    of_queries = tiles | {"STAGES": min(QUERY_STAGES, this.sizes.stages)}
    module.query_side[grid](*read, *sums, states, d_scores, d_C, within, across, carried, skipped, *sizes, **lies, **of_queries)
    module.key_side[grid](*read, skip, *sums, d_states, d_scores, dx, d_B, added, *sizes, **lies, d_t=dx.stride(1), **tiles)
    module.finish[(this.B * this.chunks, -(-this.H // PREPARED))](
        this.A, this.step, within, across, carried, added, skipped, passed, d_dt, d_A, d_A if d_D is None else d_D, this.T, this.H,
        passed.shape[-1], this.chunks, HAS_SKIP=d_D is not None, Q=this.Q, BH=PREPARED, PARTS=pad(passed.shape[-1]),
    )  # fmt: skip
