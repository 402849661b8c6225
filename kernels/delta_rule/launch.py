"""Runs the Triton kernels of `triton.py` and `gradients.py`; imports Triton only when a kernel is first wanted.

Saved for the backward pass are the inputs, the inverses (64 S numbers a head), the corrected values (S V) and what is known of each sub-step
(`Kept`); it makes the states again. While a pass runs it holds, besides its results, W and U (S (K + V) numbers a head) and the state entering each
chunk (S / 64 K V); going back also the gradients of the states and of the corrected values, and two squares a chunk. No sum is made by atomic
additions, so results repeat bit for bit. Matrix products take bf16 operands where v is bf16; fp16 is lifted to fp32, whose range the states need, and
like fp32 multiplied in three tf32 products: exact, but slow. Sums, decays, norms, triangular systems and the carried state are fp32 throughout.

Legend: as in reference.py; L chunks of 64 sub-steps, filled up.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels.delta_rule.reference import CHUNK
from kernels.dispatch import interpreted, no_triton
from kernels.joint import rooms

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDEST = 256  # of keys
WIDEST_OF_FOUR_BYTES = 128  # of keys in one tile; wider ones take two, as kernels with tiles of 256 read outside of memory on an H200
RUN = 16  # operands are made of whole runs of so many elements, as those of Mamba-2's scan
# Width in which kernels take keys and values. Assembled by the ptxas 12.8 that Triton 3.6 brings, values of 32 or fewer gave outputs and gradients
# that were wholly wrong on an H100, or read outside of memory; the same kernels assembled by ptxas 13.4 are right, and so are 64 and more by both.
NARROWEST = 64
FARTHEST = 1 << 24  # elements between two steps: what lies in a chunk is addressed in 32 bits
CORRECTED_KEPT = True  # from the forward pass to the backward pass: U is not made again there, and states are made without waiting for W
AT_ONCE = 264  # programs of a walk that run at once: two on each of the 132 processors of an H100
RECOVERED = 4096  # elements of a state that a program of `recover` holds


@dataclass(frozen=True)
class Tile:
    """Of a kernel: the columns of V taken at once, warps, stages and registers."""

    columns: int
    warps: int
    stages: int
    registers: int = 0  # the most a thread takes; 0: as many as the compiler likes


# Chosen once for every length and batch, by kernel, for keys up to 128 wide; `sizes` has the others.
NARROW = {
    "project": Tile(128, 4, 1, 168), "walk": Tile(64, 4, 2), "states": Tile(64, 4, 3), "outputs": Tile(64, 4, 1, 128),
    "local": Tile(128, 4, 1, 128), "walk_back": Tile(64, 4, 1), "pair_gradients": Tile(32, 4, 3, 168),
    "query_gradients": Tile(128, 4, 1, 168), "key_gradients": Tile(64, 4, 1),
}  # fmt: skip
WIDE = {  # operands of four bytes
    "project": Tile(32, 4, 1), "walk": Tile(16, 4, 1), "states": Tile(16, 4, 1), "outputs": Tile(32, 4, 1),
    "local": Tile(32, 4, 1), "walk_back": Tile(16, 4, 1), "pair_gradients": Tile(32, 8, 1),
    "query_gradients": Tile(16, 8, 1), "key_gradients": Tile(16, 8, 1),
}  # fmt: skip


def sizes(name: str, wide: bool, K: int, V: int) -> Tile:
    """Of a kernel by the width of its operands, keys and values. Two tiles of keys are as one of half the width."""
    tile = (WIDE if wide else NARROW)[name]
    columns, warps, stages = tile.columns, tile.warps, tile.stages
    if pad(K) > 128 and not wide:
        columns, warps, stages = max(16, columns // 2), warps if name == "project" else 8, 1
    return Tile(min(columns, pad(V)), warps, stages, 0 if pad(K) > 128 else tile.registers)


def two_tiles(wide: bool, K: int) -> bool:
    """Whether kernels take the columns of keys in two parts, of half of `pad(K)` each."""
    return wide and pad(K) > WIDEST_OF_FOUR_BYTES


def why_not(v: Tensor, K: int) -> str:
    """Empty if the kernels can run on this tensor, else one sentence."""
    reason = no_triton(v.device) or ("" if v.dtype in DTYPES else f"The delta rule's kernels have no {v.dtype}.")
    return reason or ("" if K <= WIDEST else f"The delta rule's kernels take keys of {WIDEST} channels at most, not {K}.")


def kernels() -> ModuleType:
    from kernels.delta_rule import triton

    return triton


def gradient_kernels() -> ModuleType:
    from kernels.delta_rule import gradients

    return gradients


def kind_of(dtype: torch.dtype) -> torch.dtype:
    """Of what kernels leave for others and multiply, by the dtype of v: the interpreter has no bf16 products."""
    return torch.bfloat16 if dtype == torch.bfloat16 and not interpreted() else torch.float32


def pad(width: int) -> int:
    """The power of two that holds width, at least the 16 of a matrix product."""
    return max(16, 1 << (width - 1).bit_length())


def whole_width(width: int) -> int:
    return -(-width // RUN) * RUN


def least_width() -> int:
    """Of keys and values in the kernels."""
    return RUN if interpreted() else NARROWEST


def strides_of(x: Tensor) -> tuple[int, ...]:
    """Those of batch, time and heads; of a single one 0, which is a multiple of whatever is asked."""
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape[:3], x.stride()[:3]))


def ready(x: Tensor, dtype: torch.dtype, least: int) -> Tensor:
    """In this dtype, and neighbours along the last dimension, zeros after them up to `least` and to whole runs; other strides are free, but of whole
    runs."""
    x, more = x.to(dtype), whole_width(max(x.shape[-1], least)) - x.shape[-1]
    if more:
        return torch.constant_pad_nd(x, (0, more))
    dense = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and not any(stride % RUN for stride in strides_of(x)) and x.stride(1) < FARTHEST
    return x if dense else x.clone(memory_format=torch.contiguous_format)


def filled(state: Tensor | None, V: int, K: int) -> Tensor | None:
    """A state (B, H, V, K) in fp32 with zeros up to these sizes."""
    return None if state is None else torch.constant_pad_nd(state.float(), (0, K - state.shape[3], 0, V - state.shape[2])).contiguous()


# Of every chunk and sub-step, (B, H, L 64, ...): inverses, corrected values over the norms of their keys (nothing if not CORRECTED_KEPT), sums of gates,
# counts of documents, norms and strengths (`triton.py`).
Kept = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Problem:
    """The arguments of one call in the form the kernels take, and what all kernels of a pass share. kept: what the forward pass left."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, starts: Tensor | None, normalize: bool, scale: float,
        kept: Kept | None = None,
    ) -> None:  # fmt: skip
        self.module, dtype = kernels(), v.dtype
        tl = self.module.tl
        self.wide = dtype != torch.bfloat16
        self.kind = kind_of(dtype)
        narrow = self.kind == torch.bfloat16
        self.dot: dict[str, Any] = {"DOT": tl.bfloat16 if narrow else tl.float32, "PRECISION": "tf32x3" if self.wide else "ieee"}
        self.least = least_width()
        self.q, self.k, self.v = (ready(x, dtype, self.least) for x in (q, k, v))
        (self.B, self.T, self.G, self.K), (self.S, self.H, self.V) = self.q.shape, self.v.shape[1:]
        self.N, self.R, self.chunks = self.S // self.T, self.H // self.G, -(-self.S // CHUNK)
        self.beta, self.g, self.starts, self.normalize, self.scale = beta, g, starts, normalize, float(scale)
        self.lost = None if starts is None else torch.zeros(self.B, self.H, dtype=torch.int32, device=v.device)
        self.given, length = kept is not None, self.chunks * CHUNK
        if kept is not None:
            self.inverse, self.corrected, self.total, self.document, self.rk, self.step = kept
            return
        self.total, self.document = self.made(length, dtype=torch.float64), self.made(length, dtype=torch.int32)
        self.rk, self.step = (self.made(length, dtype=torch.float32) for _ in range(2))

    @property
    def kept(self) -> Kept:
        corrected = self.corrected if CORRECTED_KEPT else self.corrected.new_empty(0)
        return self.inverse, corrected, self.total, self.document, self.rk, self.step

    def made(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(self.B, self.H, *shape, dtype=dtype or self.kind, device=self.v.device)

    @property
    def grid(self) -> tuple[int]:
        return (self.B * self.H * self.chunks,)

    def options(self, name: str, **more: Any) -> dict[str, Any]:
        tile = sizes(name, self.wide, self.K, self.V)
        limit = {"maxnreg": tile.registers} if tile.registers and not interpreted() else {}
        two = two_tiles(self.wide, self.K)
        widths = {"TWO": two, "BV": tile.columns, "BK": pad(self.K) // 2 if two else pad(self.K)}
        return {**more, **self.dot, **limit, **widths, "num_warps": tile.warps, "num_stages": tile.stages}

    def walking(self, name: str, **more: Any) -> tuple[tuple[int], dict[str, Any]]:
        """(grid, options) of a kernel whose programs carry rows of one head's state. Of few heads they take fewer rows each, as nobody waits for them
        to end: a step of 32 takes 4.7 us for 6.0 of 64 (`walk_back`, H200)."""
        options = self.options(name, **more)
        few = min(32, options["BV"])
        if self.B * self.H * -(-self.V // few) <= AT_ONCE:
            options["BV"] = few
        return (self.B * self.H * -(-self.V // options["BV"]),), options

    def gates(self) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
        """(g, beta, starts, their strides), something in place of what is not given."""
        g = self.beta if self.g is None else self.g
        marks = self.beta if self.starts is None else self.starts.view(torch.uint8)
        lies = (*g.stride(), *self.beta.stride(), *((0, 0) if self.starts is None else marks.stride()))
        return g, self.beta, marks, lies

    def project(self, values: bool = True, keep: bool = False) -> None:
        """W, U if `values`, and, where they are not given, the inverses if they are to be kept."""
        length = self.chunks * CHUNK
        self.W = self.made(length, self.K)
        self.U = self.made(length, self.V) if values else self.W
        if not self.given:
            self.inverse = self.made(length, CHUNK) if keep else self.W
        g, beta, marks, lies = self.gates()
        self.module.project[self.grid](
            self.k, self.v, g, beta, marks, self.total, self.document, self.rk, self.step, self.inverse, self.W, self.U,
            self.S, self.H, self.R, self.chunks, self.K, self.V, *strides_of(self.k), *strides_of(self.v), *lies, HAS_G=self.g is not None,
            HAS_STARTS=self.starts is not None, HAS_VALUES=values, KEEP=keep, GIVEN=self.given, NORM=self.normalize, N=self.N, **self.options("project"),
        )  # fmt: skip

    def walk(self, begin: Tensor | None, keep: bool = True, given: bool = False) -> Tensor:
        """The last state; kept are the states entering each chunk and the corrected values, unless none is wanted. given: the latter are there."""
        self.begin = torch.zeros(self.B, self.H, self.V, self.K, device=self.v.device) if begin is None else begin
        last = torch.empty_like(self.begin)
        self.states = self.made(self.chunks, self.V, self.K) if keep else self.W
        if not given:
            self.corrected = torch.empty_like(self.U) if keep else self.U
        U = self.corrected if given else self.U
        grid, options = self.walking("states" if given else "walk", MARK=self.lost is not None and not given, KEEP=keep, GIVEN=given)
        self.module.walk[grid](
            self.k, self.total, self.document, self.rk, self.W, U, self.begin, self.states, self.corrected, last, last if self.lost is None else self.lost,
            self.S, self.H, self.R, self.chunks, self.K, self.V, *strides_of(self.k), **options,
        )  # fmt: skip
        return last

    def outputs(self) -> Tensor:
        o = torch.empty(self.B, self.T, self.H, self.V, dtype=self.v.dtype, device=self.v.device)
        self.module.outputs[self.grid](
            self.k, self.q, self.total, self.document, self.corrected, self.states, o, self.total if self.lost is None else self.lost,
            self.scale, self.S, self.H, self.R, self.chunks, self.K, self.V, *strides_of(self.k), *strides_of(self.q),
            **self.options("outputs", MARK=self.lost is not None, NORM=self.normalize, N=self.N),
        )  # fmt: skip
        return o

    def recover(self, o: Tensor, last: Tensor) -> None:
        """Outputs and last states again, in order, of the heads in which something that is not finite may have left its document."""
        if self.lost is None:
            return
        g, beta, marks, lies = self.gates()
        rows = min(pad(self.V), max(1, RECOVERED // pad(self.K)))
        self.module.recover[(self.B * self.H * -(-self.V // rows),)](
            self.k, self.q, self.v, g, beta, marks, self.begin, o, last, self.lost, self.scale, self.T, self.H, self.R, self.K, self.V,
            *strides_of(self.k), *strides_of(self.q), *strides_of(self.v), *lies,
            HAS_G=self.g is not None, NORM=self.normalize, N=self.N, BK=pad(self.K), BV=rows,
        )  # fmt: skip

    def walk_back(self, do: Tensor, later: Tensor | None, keep: bool = True) -> Tensor:
        """The gradient of h0; kept are those of the states leaving each chunk and of the corrected values, unless none is wanted."""
        module = gradient_kernels()
        self.du, self.rq = self.made(self.chunks * CHUNK, self.V), torch.empty_like(self.rk)
        lies = *strides_of(self.k), *strides_of(self.q), *strides_of(do)
        read = (self.k, self.q, do, self.total, self.document, self.rk, self.rq)
        shape = (self.scale, self.S, self.H, self.R, self.chunks, self.K, self.V)
        module.local[self.grid](*read, self.du, *shape, *lies, **self.options("local", NORM=self.normalize, N=self.N))
        later = torch.zeros(self.B, self.H, self.V, self.K, device=do.device) if later is None else later
        first = torch.empty_like(later)
        self.d_states = self.made(self.chunks, self.V, self.K) if keep else self.W
        grid, options = self.walking("walk_back", KEEP=keep, N=self.N)
        module.walk_back[grid](*read, self.W, self.du, later, self.d_states, first, *shape, *lies, **options)
        return first

    def gradients(self, do: Tensor, like: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Of q, k, v, beta and g; the first three lie as those `like` them where heads share no keys."""
        module, device = gradient_kernels(), do.device
        square, length = self.chunks * CHUNK, self.chunks * CHUNK
        right, rows = torch.empty_like(self.du), torch.empty_like(self.total)
        d_scores, d_products, strength = self.made(square, CHUNK), self.made(square, CHUNK), self.made(length, dtype=torch.float32)
        if self.R == 1:
            dq, dk, dv = rooms(like, self.v.dtype)
        else:
            dq, dk = (torch.empty(self.B, n, self.H, self.K, device=device) for n in (self.T, self.S))
            dv = torch.empty(self.B, self.S, self.H, self.V, dtype=self.v.dtype, device=device)
        sums = (self.total, self.document, self.rk, self.rq, self.step)
        shape = (self.scale, self.S, self.H, self.R, self.chunks, self.K, self.V)
        lies = *strides_of(self.k), *strides_of(self.q)
        module.pair_gradients[self.grid](
            self.k, self.q, self.v, do, *sums, self.inverse, self.corrected, self.du, right, d_scores, d_products, dv, rows, strength, *shape, *lies,
            *strides_of(self.v), *strides_of(do), dv.stride(1), **self.options("pair_gradients", N=self.N),
        )  # fmt: skip
        d_beta = torch.empty(self.B, self.S, self.H, device=device)
        dg = None if self.g is None else torch.empty(self.B, self.T, self.H, device=device)
        module.query_gradients[self.grid](
            self.k, self.q, do, self.total, self.document, self.rq, self.states, d_scores, rows, dq, *shape, *lies, *strides_of(do), dq.stride(1),
            **self.options("query_gradients", NORM=self.normalize, N=self.N),
        )  # fmt: skip
        module.key_gradients[self.grid](
            self.k, self.q, self.total, self.document, self.rk, self.step, self.states, self.d_states, self.corrected, right, d_scores, d_products,
            rows, strength, dk, d_beta if dg is None else dg, d_beta, *shape[1:], *lies, dk.stride(1),
            **self.options("key_gradients", HAS_G=self.g is not None, NORM=self.normalize, N=self.N),
        )  # fmt: skip
        if self.R > 1:
            dq, dk = (d.unflatten(2, (self.G, self.R)).sum(3) for d in (dq, dk))
        return dq, dk, dv, d_beta, dg


def forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, h0: Tensor | None, starts: Tensor | None, normalize: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """(o (B, T, H, V) in v's dtype, final state (B, H, V, K) fp32)."""
    return _run(Problem(q, k, v, beta, g, starts, normalize, scale), h0, v.shape[3], k.shape[3])


def forward_kept(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, h0: Tensor | None, starts: Tensor | None, normalize: bool, scale: float
) -> tuple[Tensor, Tensor, Kept]:
    """As `forward`, and what `backward` then need not make again."""
    this = Problem(q, k, v, beta, g, starts, normalize, scale)
    o, last = _run(this, h0, v.shape[3], k.shape[3], keep=True)
    return o, last, this.kept


def _run(this: Problem, h0: Tensor | None, V: int, K: int, keep: bool = False) -> tuple[Tensor, Tensor]:
    this.project(keep=keep)
    last = this.walk(filled(h0, this.V, this.K))
    o = this.outputs()
    this.recover(o, last)
    return (o, last) if (this.V, this.K) == (V, K) else (o[..., :V].contiguous(), last[:, :, :V, :K].contiguous())


def last_state(
    k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, h0: Tensor | None, starts: Tensor | None, normalize: bool, updates: int
) -> Tensor:
    """The final state (B, H, V, K) fp32 alone."""
    this = Problem(k[:, ::updates], k, v, beta, g, starts, normalize, 1.0)
    this.project()
    return this.walk(filled(h0, this.V, this.K), keep=False)[:, :, : v.shape[3], : k.shape[3]].contiguous()


def start_gradient(
    q: Tensor, k: Tensor, do: Tensor, beta: Tensor, g: Tensor | None, starts: Tensor | None, normalize: bool, scale: float
) -> Tensor:
    """The gradient of h0 (B, H, V, K) fp32 by outputs alone, whose gradients are `do` (B, T, H, V)."""
    n = k.shape[1] // q.shape[1]
    values = do if n == 1 else do.repeat_interleave(n, 1)  # of these only the shape counts
    this = Problem(q, k, values, beta, g, starts, normalize, scale)
    this.project(values=False)
    return this.walk_back(ready(do, do.dtype, this.least), None, keep=False)[:, :, : do.shape[3], : k.shape[3]].contiguous()


def backward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, h0: Tensor | None, starts: Tensor | None, normalize: bool, scale: float,
    kept: Kept | None, do: Tensor, d_final: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Gradients of q, k, v, beta, g and h0: those of q, k and v in the dtype of v (fp32 where heads share keys), the others fp32."""
    this, V, K = Problem(q, k, v, beta, g, starts, normalize, scale, kept), v.shape[3], k.shape[3]
    do = ready(do, v.dtype, this.least)
    given = kept is not None and kept[1].numel() > 0
    this.project(values=not given, keep=True)
    this.walk(filled(h0, this.V, this.K), given=given)
    dh0 = this.walk_back(do, filled(d_final, this.V, this.K))
    dq, dk, dv, d_beta, dg = this.gradients(do, (q, k, v) if (this.V, this.K) == (V, K) else (this.q, this.k, this.v))
    if (this.V, this.K) != (V, K):
        dq, dk, dv, dh0 = (t.contiguous() for t in (dq[..., :K], dk[..., :K], dv[..., :V], dh0[:, :, :V, :K]))
    return dq, dk, dv, d_beta, dg, dh0
