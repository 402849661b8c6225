"""Causal softmax attention: grouped queries, rotary positions (plain, partial or scaled), sliding window, QK-norm, biases; its state is the KV cache.

Parameter shapes are Llama's. Legend: B batch, T new tokens, L cached and new tokens, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import decode_step
from kernels.dispatch import is_eager
from kernels.rotary import rotary
from models.contract import SequenceMixer, document_starts
from models.init import init_matrix, tag
from models.isolation import Lost, isolated
from models.layers import RMSNorm
from models.rope import Rope, rope_problems

if TYPE_CHECKING:
    from models.parallel import Slice


MASK_ELEMENTS = 1 << 27  # the largest mask of packed documents that is held; beyond it they are taken one by one
LONG = 8192  # tokens of a mean document from which attention within one alone, by a better kernel, beats that of all together
PACKED_DTYPES = (torch.float16, torch.bfloat16)  # of which torch has kernels that take packed documents as they lie, without a mask


def causal_mask(T: int, L: int) -> Tensor:
    """The mask under which the last of T queries sees all of L keys, one before it L - 1, and so on; torch never writes it out."""
    from torch.nn.attention.bias import causal_lower_right  # loads torch.compile, more than a second that most programs need not wait

    return causal_lower_right(T, L)


def documents_of(segments_BL: Tensor) -> tuple[Tensor, list[list[int]]]:
    """(int32 (documents + 1,): where each document begins in the rows laid end to end, and their end; the same within each row, on the host).
    Found once for a tensor, which all layers are given, as that waits for the device."""
    version = None if segments_BL.is_inference() else segments_BL._version  # None: nobody counts changes, so nothing is kept
    known = getattr(segments_BL, "documents", None)
    if known is None or version is None or known[0] != version:
        L = segments_BL.shape[1]
        first = document_starts(segments_BL)
        assert first is not None
        first[:, :1] = True
        bounds = F.pad(first.flatten().nonzero()[:, 0].int(), (0, 1), value=first.numel())
        cuts: list[list[int]] = [[] for _ in range(len(segments_BL))]
        for at in bounds.tolist()[:-1]:
            cuts[at // L].append(at % L)
        known = version, bounds, [[*row, L] for row in cuts]
        segments_BL.documents = known  # type: ignore[attr-defined]
    return known[1], known[2]


def packs(q_BHTK: Tensor) -> bool:
    """Whether FlashAttention of packed sequences takes queries of this dtype and width."""
    return q_BHTK.dtype in PACKED_DTYPES and q_BHTK.shape[-1] % 8 == 0 and q_BHTK.shape[-1] <= 256


def packed_attention(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, segments_BT: Tensor | None, window: int) -> Tensor:
    """Causal attention within documents (rows, without segments) by FlashAttention of packed sequences, within `window` tokens if above 0."""
    from torch.nn.attention import varlen  # loads torch.compile

    (B, H, T, K), G = q_BHTK.shape, k_BGTK.shape[1]
    if segments_BT is None:
        bounds = torch.arange(0, B * T + 1, T, device=q_BHTK.device, dtype=torch.int32)
    else:
        bounds = documents_of(segments_BT)[0]
    if G != H:
        k_BGTK, v_BGTK = k_BGTK.repeat_interleave(H // G, 1), v_BGTK.repeat_interleave(H // G, 1)
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q_BHTK, k_BGTK, v_BGTK.to(q_BHTK.dtype)))
    y = varlen.varlen_attn(q, k.to(q.dtype), v, bounds, bounds, T, T, window_size=(window - 1 if window else -1, 0))
    return y.view(B, T, H, K).transpose(1, 2)


@dataclass
class Config:
    n_heads: int = 8  # query heads
    n_kv_heads: int = 0  # key/value heads; 0: as many as query heads
    head_dim: int = 0  # 0: d_model / n_heads
    rope: bool = True  # rotary positions
    rope_theta: float = 10000.0
    rope_fraction: float = 1.0  # share of a head's columns, the first ones, that have rotary positions
    rope_scaling: dict | None = None  # type: ignore[type-arg]  # for longer texts: a rope_type (linear, dynamic, yarn, llama3) and its numbers
    window: int = 0  # a token sees itself and the window-1 before it; 0: all
    qk_norm: bool = False  # RMSNorm of queries and keys per head
    qk_norm_eps: float = 1e-5
    qkv_bias: bool = False  # biases of the projections to queries, keys and values
    o_bias: bool = False  # and of the one back

    def problems(self, d_model: int) -> list[str]:
        found = []
        if self.n_heads < 1 or self.n_kv_heads < 0 or self.head_dim < 0 or self.window < 0:
            return ["n_heads must be above zero; n_kv_heads, head_dim and window zero or more."]
        if self.rope_theta <= 0:
            found.append(f"rope_theta must be above zero, not {self.rope_theta}.")
        if not self.head_dim and d_model % self.n_heads:
            found.append(f"d_model {d_model} is not divisible by n_heads {self.n_heads}; change one or set head_dim.")
        elif self.rope:
            found += rope_problems(self.head_dim or d_model // self.n_heads, self.rope_fraction, self.rope_theta, self.rope_scaling or {})
        if self.qk_norm_eps <= 0:
            found.append(f"qk_norm_eps must be above zero, not {self.qk_norm_eps}.")
        if self.n_kv_heads and self.n_heads % self.n_kv_heads:
            found.append(f"n_heads {self.n_heads} is not divisible by n_kv_heads {self.n_kv_heads}.")
        return found


@dataclass
class State:
    """k (rotated) and v (B, G, L, K), the segment of each cached token (B, L) or None while all are segment 0, and the tokens seen."""

    k_BGLK: Tensor
    v_BGLK: Tensor
    segments_BL: Tensor | None
    seen: int
    room: Room | None = field(default=None, init=False, repr=False, compare=False)


class Room:
    """Buffers (B, G, C, K) that k and v are the first `used` tokens of. Whoever holds exactly those may write the next ones in place; a state
    that others have gone on from finds `used` changed and copies, so that no state is ever written into."""

    def __init__(self, k_BGLK: Tensor, v_BGLK: Tensor, capacity: int) -> None:
        B, G, L, K = k_BGLK.shape
        self.k, self.v = k_BGLK.new_empty(B, G, capacity, K), v_BGLK.new_empty(B, G, capacity, K)
        self.k[:, :, :L], self.v[:, :, :L], self.used = k_BGLK, v_BGLK, L

    def append(self, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        end = self.used + k_BGTK.shape[2]
        self.k[:, :, self.used : end], self.v[:, :, self.used : end], self.used = k_BGTK, v_BGTK, end
        return self.k[:, :, :end], self.v[:, :, :end]


@dataclass
class FixedState:
    """A cache of fixed size for graphs of one decoding step: buffers (B, G, C, K), each place's segment, and the tokens seen as a tensor.
    A step writes into it."""

    appended: ClassVar[tuple[str, ...]] = ("k_BGCK", "v_BGCK")  # a step writes behind what was seen only

    k_BGCK: Tensor
    v_BGCK: Tensor
    segments_BC: Tensor
    seen: Tensor  # (1,): tokens in the buffers
    offset: int = 0  # tokens that a window dropped before


class Mixer(SequenceMixer):
    def __init__(self, config: Config, d_model: int, layer: int) -> None:
        super().__init__()
        self.config, self.d_model = config, d_model
        self.H, self.G = config.n_heads, config.n_kv_heads or config.n_heads
        self.K = config.head_dim or d_model // config.n_heads
        self.q_proj = nn.Linear(d_model, self.H * self.K, bias=config.qkv_bias)
        self.k_proj = nn.Linear(d_model, self.G * self.K, bias=config.qkv_bias)
        self.v_proj = nn.Linear(d_model, self.G * self.K, bias=config.qkv_bias)
        self.o_proj = nn.Linear(self.H * self.K, d_model, bias=config.o_bias)
        tag(self.o_proj.weight, residual=True)
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            if projection.bias is not None:
                tag(projection.bias, "no_decay")
        self.q_norm = RMSNorm(self.K, config.qk_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.K, config.qk_norm_eps) if config.qk_norm else None
        plain_rope = config.rope_fraction == 1 and not config.rope_scaling  # theta alone says it all
        self.scaled = None if plain_rope else Rope(int(self.K * config.rope_fraction), config.rope_theta, config.rope_scaling or {})

    def init_weights(self, std: float, n_layers: int) -> None:
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            init_matrix(layer.weight, std, n_layers)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.init_weights()

    def why_whole(self, T: int = 1 << 62) -> str:
        dynamic = self.scaled is not None and self.scaled.kind == "dynamic"
        return "dynamic rotary positions depend on the length of the whole sequence" if dynamic else ""

    def turned(self, positions_T: Tensor) -> tuple[float, Tensor | None, float]:
        """(theta, frequencies or None for theta's, a factor) with which `rotary` turns queries and keys at these positions."""
        if self.scaled is None:
            return self.config.rope_theta, None, 1.0
        return self.config.rope_theta, self.scaled.frequencies(positions_T), self.scaled.scale

    def forward(
        self, x_BTD: Tensor, state: State | FixedState | None = None, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, State | FixedState | None]:
        B, T, _ = x_BTD.shape
        q_BHTK = self.q_proj(x_BTD).view(B, T, self.H, self.K).transpose(1, 2)
        k_BGTK = self.k_proj(x_BTD).view(B, T, self.G, self.K).transpose(1, 2)
        v_BGTK = self.v_proj(x_BTD).view(B, T, self.G, self.K).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            q_BHTK, k_BGTK = self.q_norm(q_BHTK), self.k_norm(k_BGTK)
        if isinstance(state, FixedState):
            return self._fixed_step(q_BHTK, k_BGTK, v_BGTK, state), state
        seen = state.seen if state is not None else self.slice.rank * T if self.slice is not None else 0
        if self.config.rope:
            positions = torch.arange(seen, seen + T, device=x_BTD.device)
            q_BHTK, k_BGTK = rotary(q_BHTK, k_BGTK, positions, *self.turned(positions))
        segments = segment_ids
        if state is not None:
            k_BGTK, v_BGTK, room = self._joined(state, k_BGTK, v_BGTK)
            segments = self._all_segments(state, segment_ids, B, T)
        if self.slice is not None and state is None:
            y_BHTK = self._across(self.slice, q_BHTK, k_BGTK, v_BGTK, segment_ids)
        else:
            y_BHTK = self._attend(q_BHTK, k_BGTK, v_BGTK, segments)
        y = self.o_proj(y_BHTK.transpose(1, 2).reshape(B, T, self.H * self.K))
        if state is None:
            return y, None
        drop = max(0, k_BGTK.shape[2] - (self.config.window - 1)) if self.config.window else 0
        if drop:  # copies, so that the cache does not keep the dropped tokens' memory alive
            k_BGTK, v_BGTK = k_BGTK[:, :, drop:].clone(), v_BGTK[:, :, drop:].clone()
            segments = segments[:, drop:].clone() if segments is not None else None
        after = State(k_BGTK, v_BGTK, segments, seen + T)
        after.room = None if drop else room
        return y, after

    def _across(self, own: Slice, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, segment_ids: Tensor | None) -> Tensor:
        """Of a slice of time: all of the time for some heads where the heads divide among the ranks, unless a window needs only a halo."""
        window = self.config.window
        if (window and window - 1 <= q_BHTK.shape[2]) or not own.swaps(self.H, self.G):
            k_BGLK, v_BGLK, segments = own.keys(k_BGTK, v_BGTK, segment_ids, window)
            return self._attend(q_BHTK, k_BGLK, v_BGLK, segments)
        q, k, v = own.to_heads(q_BHTK, k_BGTK, v_BGTK)
        return own.to_time(self._attend(q, k, v, own.all_segments(segment_ids)))

    def _joined(self, state: State, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor, Room | None]:
        """Cached and new keys and values. Decoding writes into a buffer that grows by doubling; a window, which stays short, is copied."""
        cached, room = state.k_BGLK.shape[2], state.room
        if torch.is_grad_enabled() or self.config.window or k_BGTK.shape[2] > 1 or state.k_BGLK.dtype != k_BGTK.dtype:
            k, v = torch.cat([state.k_BGLK.to(k_BGTK.dtype), k_BGTK], 2), torch.cat([state.v_BGLK.to(v_BGTK.dtype), v_BGTK], 2)
            return k, v, None
        if room is None or room.used != cached or cached + 1 > room.k.shape[2]:
            room = Room(state.k_BGLK, state.v_BGLK, max(64, 2 * cached))
        return *room.append(k_BGTK, v_BGTK), room

    def fixed_state(self, state: State, capacity: int) -> FixedState:
        """A copy of `state` with room for `capacity` tokens in all (a window keeps only its own). What follows is of the last token's segment."""
        room, cached = Room(state.k_BGLK, state.v_BGLK, capacity), state.k_BGLK.shape[2]
        room.k[:, :, cached:], room.v[:, :, cached:] = 0, 0
        segments = torch.zeros(room.k.shape[0], capacity, dtype=torch.int32, device=room.k.device)
        if state.segments_BL is not None:
            segments[:, :cached] = state.segments_BL
            segments[:, cached:] = state.segments_BL[:, -1:]
            gone = (segments != segments[:, -1:])[:, None, :, None]  # never read again, so that no mask need keep a NaN apart
            room.k.masked_fill_(gone, 0.0)
            room.v.masked_fill_(gone, 0.0)
        offset = state.seen - cached
        return FixedState(room.k, room.v, segments, torch.tensor([cached], device=room.k.device), offset)

    def _fixed_step(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, state: FixedState) -> Tensor:
        assert q_BHTK.shape[2] == 1, "a fixed cache takes one token at a time"
        return self.o_proj(self._fixed_attend(q_BHTK, k_BGTK, v_BGTK, state)[:, None])

    def _fixed_attend(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, state: FixedState) -> Tensor:
        """What the heads read (B, H K) for the next token, which is added to the cache."""
        if self.config.rope:
            positions = state.seen + state.offset
            q_BHTK, k_BGTK = rotary(q_BHTK, k_BGTK, positions, *self.turned(positions))
        state.k_BGCK.index_copy_(2, state.seen, k_BGTK.to(state.k_BGCK.dtype))
        state.v_BGCK.index_copy_(2, state.seen, v_BGTK.to(state.v_BGCK.dtype))
        place = torch.arange(state.k_BGCK.shape[2], device=q_BHTK.device)
        visible = place <= state.seen
        if self.config.window:
            visible = visible & (place > state.seen - self.config.window)
        mask = (visible & (state.segments_BC == state.segments_BC[:, -1:]))[:, None, None]
        y = F.scaled_dot_product_attention(q_BHTK, state.k_BGCK, state.v_BGCK, attn_mask=mask, enable_gqa=self.G != self.H)
        state.seen.add_(1)
        return y.flatten(1)

    def fused_step(self, x_BD: Tensor, norm: RMSNorm, keep_D: Tensor | None, state: FixedState) -> Callable[[], None]:
        sizes = {"q": (self.q_proj, self.H), "k": (self.k_proj, self.G), "v": (self.v_proj, self.G)}
        rows = {name: x_BD.new_empty(x_BD.shape[0], heads * self.K) for name, (_, heads) in sizes.items()}
        dtype = state.k_BGCK.dtype

        def step() -> None:
            for name, (layer, _) in sizes.items():
                decode_step.project(x_BD, layer.weight, rows[name], norm_K=norm.weight, eps=norm.eps)
                if layer.bias is not None:
                    rows[name].add_(layer.bias)
            q, k, v = (rows[name].to(dtype).view(-1, heads, 1, self.K) for name, (_, heads) in sizes.items())
            if self.q_norm is not None and self.k_norm is not None:
                q, k = self.q_norm(q), self.k_norm(k)
            y_BI = self._fixed_attend(q, k, v, state)
            decode_step.project(y_BI, self.o_proj.weight, x_BD, add=True, keep_N=keep_D)
            if self.o_proj.bias is not None:
                x_BD.add_(self.o_proj.bias)

        return step

    def open_state(self, state: FixedState) -> State:
        """The State of a FixedState, whose tensors it shares."""
        cached = int(state.seen)
        first = max(0, cached - (self.config.window - 1)) if self.config.window else 0
        segments = state.segments_BC[:, first:cached]
        return State(
            state.k_BGCK[:, :, first:cached],
            state.v_BGCK[:, :, first:cached],
            segments if bool(segments.any()) else None,
            cached + state.offset,
        )

    @staticmethod
    def _all_segments(state: State, segment_ids: Tensor | None, B: int, T: int) -> Tensor | None:
        """Segments of cached and new tokens (B, L); None while no ids were ever given. Tokens without ids go on with the last one."""
        cached = state.segments_BL
        if segment_ids is None:
            if cached is None:
                return None
            last = cached[:, -1:] if cached.shape[1] else cached.new_zeros(B, 1)
            return torch.cat([cached, last.expand(B, T)], 1)
        if cached is None:
            cached = torch.zeros(B, state.k_BGLK.shape[2], device=segment_ids.device, dtype=torch.int32)
        return torch.cat([cached, segment_ids.to(cached.dtype)], 1)

    def _divided(self, q_BHTK: Tensor, k_BGLK: Tensor, segments_BL: Tensor | None) -> bool:
        """Whether queries and keys are of the same tokens, and documents or a window keep some apart."""
        T, window = q_BHTK.shape[2], self.config.window
        return T == k_BGLK.shape[2] and (segments_BL is not None or 0 < window < T)

    def _attend(self, q_BHTK: Tensor, k_BGLK: Tensor, v_BGLK: Tensor, segments_BL: Tensor | None) -> Tensor:
        T, window = q_BHTK.shape[2], self.config.window
        if not T:
            return q_BHTK + 0 * (k_BGLK.sum() + v_BGLK.sum())  # for autograd: gradients of zero, not none
        if self._divided(q_BHTK, k_BGLK, segments_BL) and self._packable(q_BHTK):
            if segments_BL is not None and not window and segments_BL.numel() >= LONG * (len(documents_of(segments_BL)[0]) - 1):
                return self._attend_documents(q_BHTK, k_BGLK, v_BGLK, segments_BL)
            return packed_attention(q_BHTK, k_BGLK, v_BGLK, segments_BL, window)
        if segments_BL is not None:
            lost_BHT1, q, k, v = isolated(q_BHTK, k_BGLK, v_BGLK, segments_BL, window)
            return Lost.apply(self._attend_masked(q, k, v, segments_BL), q_BHTK, lost_BHT1)
        return self._attend_masked(q_BHTK, k_BGLK, v_BGLK, segments_BL)

    def _attend_masked(self, q_BHTK: Tensor, k_BGLK: Tensor, v_BGLK: Tensor, segments_BL: Tensor | None) -> Tensor:
        """By torch's attention, with a mask where there must be one."""
        T, L, window = q_BHTK.shape[2], k_BGLK.shape[2], self.config.window
        grouped = q_BHTK.shape[1] != k_BGLK.shape[1]
        if window and T > window:
            return self._attend_in_blocks(q_BHTK, k_BGLK, v_BGLK, segments_BL)
        if segments_BL is None and not (window and window < L):  # no mask in memory
            if T in (1, L):
                return F.scaled_dot_product_attention(q_BHTK, k_BGLK, v_BGLK, is_causal=T > 1, enable_gqa=grouped)
            return F.scaled_dot_product_attention(q_BHTK, k_BGLK, v_BGLK, attn_mask=causal_mask(T, L), enable_gqa=grouped)
        if segments_BL is not None and not window and segments_BL.shape[0] * T * L > MASK_ELEMENTS:
            return self._attend_documents(q_BHTK, k_BGLK, v_BGLK, segments_BL)
        ahead = torch.arange(L - T, L, device=q_BHTK.device)[:, None] - torch.arange(L, device=q_BHTK.device)
        seen_TL = ahead >= 0
        if window:
            seen_TL = seen_TL & (ahead < window)
        mask = seen_TL[None, None]
        if segments_BL is not None:
            mask = mask & (segments_BL[:, None, -T:, None] == segments_BL[:, None, None, :])
        return F.scaled_dot_product_attention(q_BHTK, k_BGLK, v_BGLK, attn_mask=mask, enable_gqa=grouped)

    @staticmethod
    def _packable(q_BHTK: Tensor) -> bool:
        """Whether `packed_attention` can run; its bounds have to be looked at, so nobody may be tracing or capturing."""
        return (
            q_BHTK.is_cuda and packs(q_BHTK) and is_eager(q_BHTK) and not torch.version.hip and not torch.cuda.is_current_stream_capturing()
        )

    @staticmethod
    @torch._disable_dynamo  # torch.compiler.disable, but loading the compiler when it is called
    def _attend_documents(q_BHTK: Tensor, k_BGLK: Tensor, v_BGLK: Tensor, segments_BL: Tensor) -> Tensor:
        """One document at a time, so that no mask is held: for long sequences, whose documents are large enough to fill a device. Waits for it."""
        T, L, rows = q_BHTK.shape[2], k_BGLK.shape[2], []
        for b, cuts in enumerate(documents_of(segments_BL)[1]):
            parts = []
            for a, e in zip(cuts, cuts[1:]):
                if e <= L - T:
                    continue
                n = e - max(a, L - T)
                q, k, v = q_BHTK[b : b + 1, :, e - n - (L - T) : e - (L - T)], k_BGLK[b : b + 1, :, a:e], v_BGLK[b : b + 1, :, a:e]
                grouped = q.shape[1] != k.shape[1]
                if n in (1, e - a):
                    parts.append(F.scaled_dot_product_attention(q, k, v, is_causal=n > 1, enable_gqa=grouped))
                else:
                    parts.append(F.scaled_dot_product_attention(q, k, v, attn_mask=causal_mask(n, e - a), enable_gqa=grouped))
            rows.append(torch.cat(parts, 2))
        return torch.cat(rows)

    def _attend_in_blocks(self, q_BHTK: Tensor, k_BGLK: Tensor, v_BGLK: Tensor, segments_BL: Tensor | None) -> Tensor:
        """A window W in O(T W) time and memory: each block of W queries sees its own block of keys and the one before."""
        B, _, T, _ = q_BHTK.shape
        W, cached = self.config.window, k_BGLK.shape[2] - q_BHTK.shape[2]  # cached <= W - 1
        before, after, C = W - cached, -T % W, -(-T // W)
        none = -(2**31)  # segment of the padding; a document's id is never this
        if segments_BL is None:
            segments_BL = torch.zeros(B, k_BGLK.shape[2], device=q_BHTK.device, dtype=torch.int32)
        keys = F.pad(segments_BL.to(torch.int32), (before, after), value=none).unfold(1, 2 * W, W)  # (B, C, 2W)
        k, v = (F.pad(t, (0, 0, before, after)).unfold(2, 2 * W, W).permute(0, 2, 1, 4, 3).flatten(0, 1) for t in (k_BGLK, v_BGLK))
        q = F.pad(q_BHTK, (0, 0, 0, after)).unflatten(2, (C, W)).transpose(1, 2).flatten(0, 1)  # (B C, H, W, K)
        ahead = torch.arange(W, 2 * W, device=q.device)[:, None] - torch.arange(2 * W, device=q.device)
        # A padded query sees padding: finite, and cut off below.
        mask = (ahead >= 0) & (ahead < W) & (keys[:, :, W:, None] == keys[:, :, None, :])
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.flatten(0, 1)[:, None], enable_gqa=q.shape[1] != k.shape[1])
        return y.unflatten(0, (B, C)).transpose(1, 2).flatten(2, 3)[:, :, :T]

    def init_state(self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> State:
        empty = torch.zeros(batch, self.G, 0, self.K, device=device, dtype=dtype or self.k_proj.weight.dtype)
        return State(empty, empty, None, 0)

    def state_bytes(self, T: int, batch: int = 1, dtype: torch.dtype = torch.bfloat16) -> int:
        kept = min(T, self.config.window - 1) if self.config.window else T
        return 2 * batch * self.G * self.K * kept * dtype.itemsize

    def flops_per_token(self, T: int) -> int:
        projections = 2 * self.d_model * self.K * (2 * self.H + 2 * self.G)
        window = min(self.config.window or T, T)
        pairs = window * (window + 1) / 2 + (T - window) * window  # (query, key) pairs of a causal sequence of T
        return projections + math.ceil(4 * self.H * self.K * pairs / T)
