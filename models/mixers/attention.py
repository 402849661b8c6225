"""Causal softmax attention: grouped queries, rotary positions (plain, partial or scaled), sliding window, QK-norm, biases; its state is the KV cache.

Parameter shapes are Llama's. Legend: B batch, T new tokens, L cached and new tokens, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from data.errors import UserError
from kernels import decode_step
from kernels.linear import linear, linears
from kernels.rotary import rotary
from models.attend import attend, sdpa
from models.contract import Role, SequenceMixer
from models.init import init_matrix, tag
from models.kv_cache import FixedCache, Room
from models.layers import RMSNorm
from models.rope import Rope, rope_problems
from models.segments import Documents
from models.slices import Slice, untraced


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
    qk_norm_over: str = "head"  # normalised together: the channels of a head, or those of all heads (OLMo)
    qk_norm_centred: bool = False  # these norms hold what their gains are above 1
    qkv_bias: bool = False  # biases of the projections to queries, keys and values
    o_bias: bool = False  # and of the one back
    output_gate: bool = False  # outputs times the sigmoid of another projection of the input

    def problems(self, d_model: int) -> list[str]:
        problems = []
        if self.n_heads < 1 or self.n_kv_heads < 0 or self.head_dim < 0 or self.window < 0:
            return ["n_heads must be above zero; n_kv_heads, head_dim and window zero or more."]
        if self.rope_theta <= 0:
            problems.append(f"rope_theta must be above zero, not {self.rope_theta}.")
        if not self.head_dim and d_model % self.n_heads:
            problems.append(f"d_model {d_model} is not divisible by n_heads {self.n_heads}; change one or set head_dim.")
        elif self.rope:
            problems += rope_problems(
                self.head_dim or d_model // self.n_heads, self.rope_fraction, self.rope_theta, self.rope_scaling or {}
            )
        if self.qk_norm_over not in ("head", "heads"):
            problems.append(f"qk_norm_over is {self.qk_norm_over!r}; choose head (each by itself) or heads (all at once).")
        if self.qk_norm_eps <= 0:
            problems.append(f"qk_norm_eps must be above zero, not {self.qk_norm_eps}.")
        if self.n_kv_heads and self.n_heads % self.n_kv_heads:
            problems.append(f"n_heads {self.n_heads} is not divisible by n_kv_heads {self.n_kv_heads}.")
        return problems


@dataclass
class State:
    """k (rotated) and v (B, G, L, K), the segment of each cached token (B, L) or None while all are segment 0, and the tokens seen."""

    k_BGLK: Tensor
    v_BGLK: Tensor
    segments_BL: Tensor | None
    seen: int
    room: Room | None = field(default=None, init=False, repr=False, compare=False)


class Mixer(SequenceMixer):
    takes_documents: ClassVar[bool] = True

    def __init__(self, config: Config, d_model: int, layer: int) -> None:
        super().__init__()
        self.config, self.d_model = config, d_model
        self.H, self.G = config.n_heads, config.n_kv_heads or config.n_heads
        self.K = config.head_dim or d_model // config.n_heads
        self.q_proj = nn.Linear(d_model, self.H * self.K, bias=config.qkv_bias)
        self.k_proj = nn.Linear(d_model, self.G * self.K, bias=config.qkv_bias)
        self.v_proj = nn.Linear(d_model, self.G * self.K, bias=config.qkv_bias)
        self.o_proj = nn.Linear(self.H * self.K, d_model, bias=config.o_bias)
        self.g_proj = nn.Linear(d_model, self.H * self.K, bias=False) if config.output_gate else None
        tag(self.o_proj.weight, residual=True)
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            if projection.bias is not None:
                tag(projection.bias, "no_decay")
        self.q_norm, self.k_norm = self._new_norm(self.H), self._new_norm(self.G)
        if not config.head_dim:
            tag(self.q_proj.weight if self.q_norm is None else self.q_norm.weight, "scores_of_width")
        plain_rope = config.rope_fraction == 1 and not config.rope_scaling  # theta alone says it all
        self.scaled = None if plain_rope else Rope(int(self.K * config.rope_fraction), config.rope_theta, config.rope_scaling or {})

        self.dynamic = self.scaled if self.scaled is not None and self.scaled.kind == "dynamic" else None
        if self.dynamic is not None:
            self.whole_beyond = self.dynamic.scaling["original_max_position_embeddings"]

    def _new_norm(self, heads: int) -> RMSNorm | None:
        c, width = self.config, self.K if self.config.qk_norm_over == "head" else heads * self.K
        return RMSNorm(width, c.qk_norm_eps, centred=c.qk_norm_centred) if c.qk_norm else None

    def _normed(self, q_BHTK: Tensor, k_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys through their norms, if there are any: over each head's channels, or over those of all heads."""
        if self.q_norm is None or self.k_norm is None:
            return q_BHTK, k_BGTK
        q_BTHK, k_BTGK = q_BHTK.transpose(1, 2), k_BGTK.transpose(1, 2)  # as they lie: the norm copies what cannot be seen as rows
        if self.config.qk_norm_over == "head":
            return self.q_norm(q_BTHK).transpose(1, 2), self.k_norm(k_BTGK).transpose(1, 2)
        q_BTI, k_BTI = q_BTHK.flatten(2), k_BTGK.flatten(2)
        normed = (self.q_norm(q_BTI), self.H), (self.k_norm(k_BTI), self.G)
        q, k = (x.unflatten(-1, (heads, self.K)).transpose(1, 2) for x, heads in normed)
        return q, k

    def init_weights(self, std: float, n_layers: int) -> None:
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            init_matrix(layer.weight, std, n_layers)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        if self.g_proj is not None:
            init_matrix(self.g_proj.weight, std, n_layers)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.init_weights()

    def state_roles(self) -> dict[str, Role]:
        return {
            "k_BGLK": "cache", "v_BGLK": "cache", "segments_BL": "bookkeeping",
            "k_BGCK": "cache", "v_BGCK": "cache", "segments_BC": "bookkeeping", "seen": "bookkeeping",
        }  # fmt: skip

    def why_not_split(self, T: int = 1 << 62) -> str:
        return "dynamic rotary positions depend on the length of the whole sequence" if self.dynamic is not None else ""

    def turned(self, positions_T: Tensor) -> tuple[float, Tensor | None, float]:
        """(theta, frequencies or None for theta's, a factor) with which `rotary` turns queries and keys at these positions."""
        if self.scaled is None:
            return self.config.rope_theta, None, 1.0
        return self.config.rope_theta, self.scaled.frequencies(positions_T), self.scaled.scale

    def _turns(self, seen: int, T: int, documents: Documents | None, device: torch.device) -> tuple[Tensor, float, Tensor | None, float]:
        """What `rotary` turns T tokens behind `seen` by. Dynamic positions are counted and stretched by the document, as if it were alone; the first of
        the cache may have begun before what a window left of it."""
        positions_T = torch.arange(seen, seen + T, device=device)
        if self.dynamic is None or documents is None:
            return positions_T, *self.turned(positions_T)
        begins_BT, ends_BT = (bound[:, -T:] if T else bound[:, :0] for bound in documents.bounds())
        gone = seen + T - documents.segments_BL.shape[1]
        if gone and self.config.window and seen + T > self.dynamic.scaling["original_max_position_embeddings"]:
            raise UserError(
                "Dynamic rotary positions stretch with a document's length, which a window forgets where rows hold several documents or are padded; "
                "read one document a row, without padding."
            )
        before_BT = torch.where(begins_BT == 0, gone, -begins_BT)
        places_BT = torch.arange(seen - gone, seen - gone + T, device=device) + before_BT
        return places_BT[:, None], self.config.rope_theta, self.dynamic.of_lengths(ends_BT + before_BT + 1)[:, None], 1.0

    def forward(
        self,
        x_BTD: Tensor,
        state: State | FixedCache | None = None,
        segment_ids: Tensor | None = None,
        *,
        documents: Documents | None = None,
    ) -> tuple[Tensor, State | FixedCache | None]:
        B, T, _ = x_BTD.shape
        # values are kept for the backward pass as they are, queries and keys turned: columns of one tensor with them they would keep all three
        projected = linears(x_BTD, self.q_proj, self.k_proj, self.v_proj, apart=1)
        heads = (self.H, self.G, self.G)
        q_BHTK, k_BGTK, v_BGTK = (y.view(B, T, n, self.K).transpose(1, 2) for y, n in zip(projected, heads))
        q_BHTK, k_BGTK = self._normed(q_BHTK, k_BGTK)
        if isinstance(state, FixedCache):
            assert T == 1, "a fixed cache takes one token at a time"
            return self.o_proj(self._gated(self._fixed_attend(q_BHTK, k_BGTK, v_BGTK, state)[:, None], x_BTD)), state
        seen = state.seen if state is not None else self.slice.rank * T if self.slice is not None else 0
        if state is not None:
            segments = self._all_segments(state, segment_ids, B, T)
            documents = None if segments is None else Documents(segments)
        elif documents is None and segment_ids is not None:
            documents = Documents(segment_ids)
        if self.config.rope:
            q_BHTK, k_BGTK = rotary(q_BHTK, k_BGTK, *self._turns(seen, T, documents, x_BTD.device))
        if state is not None:
            k_BGTK, v_BGTK, room = self._joined(state, k_BGTK, v_BGTK)
        if self.slice is not None and state is None:
            y_BHTK = self.over_ranks(self.slice, q_BHTK, k_BGTK, v_BGTK, segment_ids)
        else:
            y_BHTK = attend(q_BHTK, k_BGTK, v_BGTK, documents, self.config.window)
        y = linear(self._gated(y_BHTK.transpose(1, 2).reshape(B, T, self.H * self.K), x_BTD), self.o_proj)
        if state is None:
            return y, None
        drop = max(0, k_BGTK.shape[2] - (self.config.window - 1)) if self.config.window else 0
        if drop:  # copies, so that the cache does not keep the dropped tokens' memory alive
            k_BGTK, v_BGTK = k_BGTK[:, :, drop:].clone(), v_BGTK[:, :, drop:].clone()
            segments = segments[:, drop:].clone() if segments is not None else None
        after = State(k_BGTK, v_BGTK, segments, seen + T)
        after.room = None if drop else room
        return y, after

    def _gated(self, y_BTI: Tensor, x_BTD: Tensor) -> Tensor:
        """The heads' outputs, through the output gate if there is one."""
        return y_BTI if self.g_proj is None else y_BTI * torch.sigmoid(linear(x_BTD, self.g_proj))

    @untraced
    def over_ranks(self, slice_: Slice, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, segment_ids: Tensor | None) -> Tensor:
        """On a slice of time: all of the time for some heads where the heads can be dealt out to the ranks (DeepSpeed-Ulysses, arXiv
        2309.14509), unless a window needs only a halo; else the keys of all slices before."""
        window, N = self.config.window, slice_.size
        dealt = self.H % N == 0 and (self.G % N == 0 or N % self.G == 0)
        if (window and window - 1 <= q_BHTK.shape[2]) or not dealt:
            k_BGLK, v_BGLK, documents = _keys_before(slice_, k_BGTK, v_BGTK, segment_ids, window)
            return attend(q_BHTK, k_BGLK, v_BGLK, documents, window)
        q, k, v = _to_heads(slice_, q_BHTK, k_BGTK, v_BGTK)
        return _to_time(slice_, attend(q, k, v, slice_.documents(segment_ids), window))

    def _joined(self, state: State, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor, Room | None]:
        """Cached and new keys and values. Decoding writes into a buffer that grows by doubling; a window, which stays short, is copied."""
        cached, room = state.k_BGLK.shape[2], state.room
        if torch.is_grad_enabled() or self.config.window or k_BGTK.shape[2] > 1 or state.k_BGLK.dtype != k_BGTK.dtype:
            k, v = torch.cat([state.k_BGLK.to(k_BGTK.dtype), k_BGTK], 2), torch.cat([state.v_BGLK.to(v_BGTK.dtype), v_BGTK], 2)
            return k, v, None
        if room is None or room.used != cached or cached + 1 > room.k.shape[2]:
            room = Room(state.k_BGLK, state.v_BGLK, max(64, 2 * cached))
        return *room.append(k_BGTK, v_BGTK), room

    def fixed_state(self, state: State, capacity: int) -> FixedCache:
        """A copy of `state` with room for `capacity` tokens in all (a window keeps only its own). What follows is of the last token's segment."""
        return FixedCache.of(state.k_BGLK, state.v_BGLK, state.segments_BL, state.seen, capacity)

    def _fixed_attend(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, state: FixedCache) -> Tensor:
        """(B, H K) of one token, which is written into the cache."""
        if self.config.rope and self.dynamic is not None:
            lengths_B = state.length()
            frequencies_B11J = self.dynamic.of_lengths(lengths_B)[:, None, None]
            q_BHTK, k_BGTK = rotary(q_BHTK, k_BGTK, lengths_B[:, None, None] - 1, self.config.rope_theta, frequencies_B11J)
        elif self.config.rope:
            positions = state.seen + state.offset
            q_BHTK, k_BGTK = rotary(q_BHTK, k_BGTK, positions, *self.turned(positions))
        mask = state.write(k_BGTK, v_BGTK, self.config.window)
        y = sdpa(q_BHTK, state.k_BGCK, state.v_BGCK, attn_mask=mask)
        state.seen.add_(1)
        return y.flatten(1)

    def fused_step(self, x_BD: Tensor, norm: RMSNorm, keep_D: Tensor | None, state: FixedCache) -> Callable[[], None] | None:
        sizes = {"q": (self.q_proj, self.H), "k": (self.k_proj, self.G), "v": (self.v_proj, self.G)}
        if self.g_proj is not None:
            sizes["g"] = self.g_proj, self.H
        rows = {name: x_BD.new_empty(x_BD.shape[0], heads * self.K) for name, (_, heads) in sizes.items()}
        dtype, gain = state.k_BGCK.dtype, norm.gain.detach()

        def step() -> None:
            for name, (layer, _) in sizes.items():
                decode_step.project(x_BD, layer.weight, rows[name], norm_K=gain, eps=norm.eps)
                if layer.bias is not None:
                    rows[name].add_(layer.bias)
            q, k, v = (rows[name].to(dtype).view(-1, sizes[name][1], 1, self.K) for name in "qkv")
            y_BI = self._fixed_attend(*self._normed(q, k), v, state)
            if self.g_proj is not None:
                y_BI = y_BI * torch.sigmoid(rows["g"])
            decode_step.project(y_BI, self.o_proj.weight, x_BD, add=True, keep_N=keep_D)
            if self.o_proj.bias is not None:
                x_BD.add_(self.o_proj.bias)

        return step

    def open_state(self, state: FixedCache) -> State:
        """The State of a FixedCache, whose tensors it shares."""
        cached = int(state.seen)
        first = max(0, cached - (self.config.window - 1)) if self.config.window else 0
        segments = state.segments_BC[:, first:cached]
        return State(
            state.k_BGCK[:, :, first:cached],
            state.v_BGCK[:, :, first:cached],
            segments if bool(segments.any()) else None,
            cached + state.offset,
        )

    def cached_tokens(self, state: State) -> int:
        return state.k_BGLK.shape[2]

    def in_segment(self, state: State, segment_B: Tensor) -> State:
        B, _, L, _ = state.k_BGLK.shape
        cached = state.segments_BL if state.segments_BL is not None else torch.zeros(B, L, device=segment_B.device, dtype=torch.int32)
        here = cached == cached[:, -1:]
        return replace(state, segments_BL=torch.where(here, segment_B[:, None].to(cached.dtype), cached))

    def at_position(self, state: State, position: int) -> State:
        return replace(state, seen=position)

    def random_state(self, batch: int, T: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> State:
        size = (batch, self.G, self._cache_length(T), self.K)
        k, v = (torch.randn(size, device=device, dtype=dtype or self.k_proj.weight.dtype) for _ in range(2))
        return State(k, v, None, T)

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

    def init_state(self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> State:
        empty = torch.zeros(batch, self.G, 0, self.K, device=device, dtype=dtype or self.k_proj.weight.dtype)
        return State(empty, empty, None, 0)

    def state_bytes(self, T: int, batch: int = 1, dtype: torch.dtype = torch.bfloat16) -> int:
        return 2 * batch * self.G * self.K * self._cache_length(T) * dtype.itemsize

    def _cache_length(self, T: int) -> int:
        """Tokens that the cache holds after T."""
        return min(T, self.config.window - 1) if self.config.window else T

    def flops_per_token(self, T: int) -> int:
        projections = 2 * self.d_model * self.K * ((3 if self.config.output_gate else 2) * self.H + 2 * self.G)
        window = min(self.config.window or T, T)
        pairs = window * (window + 1) / 2 + (T - window) * window  # (query, key) pairs of a causal sequence of T
        return projections + math.ceil(4 * self.H * self.K * pairs / T)


def _to_heads(slice_: Slice, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> list[Tensor]:
    """Queries, keys and values of all of the time, of this rank's share of the heads, in one message; key/value heads that are fewer than the
    ranks are sent to several."""
    N, dtype = slice_.size, q_BHTK.dtype
    k, v = (t.to(dtype).repeat_interleave(max(1, N // t.shape[1]), 1) for t in (k_BGTK, v_BGTK))
    parts = torch.cat([t.unflatten(1, (N, -1)).transpose(0, 1) for t in (q_BHTK, k, v)], 2)  # (N, B, heads, T, K)
    whole = slice_.swapped(parts, "attention").permute(1, 2, 0, 3, 4).flatten(2, 3)
    return list(whole.split([q_BHTK.shape[1] // N, k.shape[1] // N, v.shape[1] // N], 1))


def _to_time(slice_: Slice, y_BHTK: Tensor) -> Tensor:
    """Back from all of the time of some heads to this slice of all heads."""
    parts = y_BHTK.unflatten(2, (slice_.size, -1)).permute(2, 0, 1, 3, 4)
    return slice_.swapped(parts, "attention").transpose(0, 1).flatten(1, 2)


def _keys_before(
    slice_: Slice, k_BGTK: Tensor, v_BGTK: Tensor, segment_ids: Tensor | None, window: int
) -> tuple[Tensor, Tensor, Documents | None]:
    """Keys, values and documents of this slice and of what it sees before it: a halo if the window allows, else all slices before."""
    both, back = torch.stack([k_BGTK, v_BGTK.to(k_BGTK.dtype)]), window - 1
    T = k_BGTK.shape[2]
    if window and back <= T:
        both = torch.cat([slice_.shifted(both[..., T - back :, :], "attention"), both], 3)
        both = both if slice_.rank else both[..., back:, :]  # cut off, so that the first rank's graph holds the exchange too
    else:
        both = torch.cat(list(slice_.gathered(both, "attention")[: slice_.rank + 1]), 3)
        both = both[..., -(T + back) :, :] if window else both
    documents = slice_.documents(segment_ids)
    if documents is not None:
        last = (slice_.rank + 1) * T
        documents = Documents(documents.segments_BL[:, last - both.shape[3] : last])
    return both[0], both[1], documents
