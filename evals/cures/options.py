"""Cures of state collapse that need no training, each an option of an evaluation: `cures=NAME[:key=value...],NAME...`.

| name | acts on | source |
|---|---|---|
| retention | Mamba-2 scans | "forget more, insert less" (arXiv 2410.07145, section 5) |
| dt | Mamba-2 scans | LongMamba (jzhang38): smaller step sizes; also MambaExtend with one constant |
| window | Mamba-2 scans | sliding window by difference of states (arXiv 2410.07145, section 5) |
| longmamba | Mamba-2 scans | LongMamba (Ye et al., arXiv 2504.16053): skipped tokens in global heads |
| clamp | every recurrent state | state normalisation of the first version of arXiv 2410.07145, applied between chunks |
| restart | every recurrent state | the reference any cure must beat: an empty state every r tokens |
| lambda | our attention layers | LM-Infinite (arXiv 2308.16137): Lambda mask with a cap on distances |

T is the training length. A cure applies to the layers it knows and leaves the others as they are. Just-read-twice prompting is an order of
retrieval tasks (evals/inputs/tasks.py); cures by training are state passing, fitted or random initial states and longer sequences (docs/long_context.md).
Legend as in evals/cures/hooks.py; Q queries of a block, L keys, K head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evals.adapters.base import Adapter, ItemError
from evals.adapters.own import OwnAdapter
from evals.cures.hooks import Run, Scan, scan_hook, scan_layers
from training.errors import UserError

PUBLISHED_KEPT = 0.9999**8192  # 0.4408: what the published multiplier leaves after its training length of 8,192 tokens


@dataclass
class Setting:
    """What a cure may depend on: T, the length of the text to come, and ids of calibration rows (R, T)."""

    train_length: int
    total_length: int
    calibration_RT: np.ndarray
    chunk: int


@dataclass
class Cure:
    name: str
    options: dict[str, float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return "-".join([self.name, *(f"{k}{v:g}" for k, v in self.options.items())])

    def applied(self, adapter: Adapter, setting: Setting) -> AbstractContextManager[Any]:
        """The context in which the model is cured. Raises ItemError where nothing in the model can be."""
        return CURES[self.name][0](adapter, setting, **self.options)


def parse(text: str) -> list[Cure]:
    """`retention:b=0.75,dt:c=0.5` -> cures. Raises UserError in one sentence."""
    found = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, *pairs = part.split(":")
        if name not in CURES:
            raise UserError(f"There is no cure {name!r}; choose from {', '.join(CURES)}, default or none.")
        options = {}
        for pair in pairs:
            key, _, value = pair.partition("=")
            try:
                options[key] = float(value)
            except ValueError:
                raise UserError(f"{part!r}: write a cure's options as NAME:key=number.") from None
            if key not in CURES[name][1]:
                raise UserError(f"Cure {name} has no option {key!r}; it has {', '.join(CURES[name][1])}.")
        found.append(Cure(name, options))
    return found


def suitable(adapter: Adapter) -> list[Cure]:
    """A list that is worth trying on this model."""
    found = []
    if scan_layers(adapter):
        found += [
            Cure("retention"),
            Cure("retention", {"b": 0.75}),
            Cure("dt", {"c": 0.75}),
            Cure("dt", {"c": 0.5}),
            Cure("window"),
            Cure("longmamba"),
        ]
    state = adapter.advance(torch.zeros(1, 2, dtype=torch.long), adapter.start(1))
    if adapter.layer_states(state):
        found += [Cure("clamp"), Cure("restart")]
    if _attention(adapter):
        found.append(Cure("lambda"))
    return found


def horizon_multiplier(train_length: int) -> float:
    """m with m^T = 0.9999^8192, the published multiplier carried over to another training length (0.9984 for 512, 0.9996 for 2,048)."""
    return PUBLISHED_KEPT ** (1 / train_length)


@contextmanager
def retention(adapter: Adapter, setting: Setting, m: float = 0.0, b: float = 1.0) -> Iterator[None]:
    """alpha' = m alpha and B' = b B: h_t = m alpha_t h_{t-1} + b dt_t x_t B_t^T (arXiv 2410.07145, section 5: m = 0.9999, b = 0.75 at 8K).

    m = 0 takes `horizon_multiplier(T)`. Inside an unchanged scan: dt' = dt + ln(m)/A gives exp(dt' A) = m exp(dt A), and x' = x b dt/dt'
    keeps dt' x' = b dt x.
    """
    m = m or horizon_multiplier(setting.train_length)
    if not 0 < m <= 1 or b < 0:
        raise ItemError(f"retention needs 0 < m <= 1 and b >= 0, not m={m:g} and b={b:g}.")

    def hook(layer: int, s: Scan, run: Run) -> tuple[Tensor, Tensor]:
        dt = s.dt + math.log(m) / s.A
        x = (s.x * (b * s.dt / dt.clamp(min=1e-30))[..., None]).to(torch.promote_types(s.x.dtype, torch.float32))
        y, h = run(Scan(x, dt, s.A, s.B, s.C, s.h0))
        return y.to(s.x.dtype), h

    with scan_hook(adapter, hook):
        yield


@contextmanager
def dt_scaling(adapter: Adapter, setting: Setting, c: float = 0.5) -> Iterator[None]:
    """dt' = c dt after the softplus: slower decay and weaker insertion alike (jzhang38/LongMamba, c = 0.5; MambaExtend with one scale for all)."""
    if c <= 0:
        raise ItemError(f"dt needs c above zero, not {c:g}.")

    def hook(layer: int, s: Scan, run: Run) -> tuple[Tensor, Tensor]:
        return run(Scan(s.x, c * s.dt, s.A, s.B, s.C, s.h0))

    with scan_hook(adapter, hook):
        yield


def windowed(s: Scan, buffer: Scan | None, r: int, block: int = 256) -> tuple[Tensor, Tensor, Scan]:
    """(y, state, next buffer) of the scan in which step t sees its last r inputs only; buffer: the r-1 inputs before these."""
    T = s.x.shape[1]
    if buffer is not None:
        x, dt, Bm = (torch.cat([getattr(buffer, n), getattr(s, n)], 1) for n in ("x", "dt", "B"))
    else:
        x, dt, Bm = s.x, s.dt, s.B
    past, heads = x.shape[1] - T, x.shape[2] // Bm.shape[2]
    wide = torch.promote_types(x.dtype, torch.float32)
    total = (dt.double() * s.A.double()).cumsum(1)  # of differences of long sums: fp64
    weighted = x.to(wide) * dt.to(wide)[..., None]
    B_full, outputs = Bm.to(wide).repeat_interleave(heads, 2), []
    for a in range(0, T, block):
        e = min(a + block, T)
        low, high = max(0, past + a - r + 1), past + e
        query, key = torch.arange(past + a, past + e, device=x.device), torch.arange(low, high, device=x.device)
        distance = query[:, None] - key
        inside = (distance >= 0) & (distance < r)
        decay = (total[:, past + a : past + e, None] - total[:, None, low:high]).masked_fill(~inside[..., None], -math.inf).exp().to(wide)
        C = s.C[:, a:e].to(wide).repeat_interleave(heads, 2)
        scores = torch.einsum("bqhn,bkhn->bqkh", C, B_full[:, low:high]) * decay
        outputs.append(torch.einsum("bqkh,bkhp->bqhp", scores, weighted[:, low:high]))
    n = total.shape[1]
    last = slice(max(0, n - r), n)
    left = (total[:, -1:] - total[:, last]).exp().to(wide)
    h = torch.einsum("bkhp,bkhn->bhpn", weighted[:, last] * left[..., None], B_full[:, last])
    keep = slice(max(0, n - (r - 1)), n)
    return torch.cat(outputs, 1).to(s.x.dtype), h, Scan(x[:, keep], dt[:, keep], s.A, Bm[:, keep], s.C[:, :0], None)


@contextmanager
def window(adapter: Adapter, setting: Setting, r: float = 0) -> Iterator[None]:
    """h^(r)_t = h_t - alpha_{t-r+1..t} h_{t-r}: the state of the last r tokens only (arXiv 2410.07145, section 5). r = 0 takes T.

    The difference equals the sum over the last r inputs, which is what is computed here: subtracting two states that have exploded would
    cancel. A layer sees r steps of its own inputs, which through the layers below reach further back.
    """
    width = int(r) or setting.train_length
    buffers: dict[int, Scan] = {}
    if width < 1:
        raise ItemError("window needs r of at least one token.")

    def hook(layer: int, s: Scan, run: Run) -> tuple[Tensor, Tensor]:
        y, h, buffers[layer] = windowed(s, buffers.get(layer), width)
        return y, h

    with scan_hook(adapter, hook), _on_start(adapter, buffers.clear):
        yield


@contextmanager
def longmamba(adapter: Adapter, setting: Setting, theta: float = 1e-2, clip: float = 0.95) -> Iterator[None]:
    """In global heads (prod_{1..T} alpha > theta) tokens with a small step are skipped: dt_t < g makes dt_t = 0, hence alpha = 1 and no insertion
    (LongMamba, arXiv 2504.16053). For a text of S tokens g is chosen so that the decay over the kept tokens of S is about the decay over
    all tokens of T: S E[dt 1(dt >= g)] = T E[dt], with dt clipped at its `clip` quantile, from calibration text. Nothing is done for S <= T.
    """
    steps: dict[int, list[Tensor]] = {}

    def look(layer: int, s: Scan, run: Run) -> tuple[Tensor, Tensor]:
        steps.setdefault(layer, []).append(s.dt.detach().double().flatten(0, 1))
        rates[layer] = s.A.double()
        return run(s)

    rates: dict[int, Tensor] = {}
    with scan_hook(adapter, look):
        _feed(adapter, setting)
    T, S = setting.train_length, max(setting.train_length, setting.total_length)
    limits = {}
    for layer, parts in steps.items():
        dt_NH = torch.cat(parts)
        mean_H = dt_NH.mean(0)
        is_global = (rates[layer] * mean_H * T).exp() > theta
        top = torch.quantile(dt_NH[: 1 << 14], clip, dim=0)
        limits[layer] = torch.where(is_global, skip_limit(dt_NH.clamp(max=top), T / S), torch.zeros_like(mean_H))

    def hook(layer: int, s: Scan, run: Run) -> tuple[Tensor, Tensor]:
        return run(Scan(s.x, torch.where(s.dt < limits[layer].to(s.dt.dtype), torch.zeros_like(s.dt), s.dt), s.A, s.B, s.C, s.h0))

    with scan_hook(adapter, hook):
        yield


def skip_limit(dt_NH: Tensor, share: float) -> Tensor:
    """(H,): the g for which the steps of at least g add up to `share` of all steps; 0 for share >= 1."""
    if share >= 1:
        return dt_NH.new_zeros(dt_NH.shape[1])
    ordered = dt_NH.sort(0, descending=True).values
    held = ordered.cumsum(0) / ordered.sum(0)
    place = (held < share).sum(0).clamp(max=len(ordered) - 1)
    return ordered.gather(0, place[None])[0]


def _feed(adapter: Adapter, setting: Setting, each: Callable[[Any], None] | None = None) -> None:
    ids = torch.from_numpy(setting.calibration_RT[:, : setting.train_length])
    state = adapter.start(ids.shape[0])
    for a in range(0, ids.shape[1], setting.chunk):
        state = adapter.advance(ids[:, a : a + setting.chunk], state)
        if each is not None:
            each(state)


@contextmanager
def clamp(adapter: Adapter, setting: Setting, q: float = 0.999, p: float = 0.0) -> Iterator[None]:
    """h <- h min(1, p / |h|) for every head after each chunk; the published form does so at every step (p = 0.5 there), which no parallel scan can.

    p = 0 takes the q quantile of the norms met inside T on calibration text, for each layer and head.
    """
    norms: dict[tuple[int, str], list[Tensor]] = {}

    def note(layer: int, name: str, x: Tensor) -> Tensor:
        norms.setdefault((layer, name), []).append(x.flatten(2).norm(dim=-1) if x.ndim > 2 else x.norm(dim=-1))
        return x

    if not p:
        _feed(adapter, setting, lambda state: adapter.replace_states(state, note) and None)
        if not norms:
            raise ItemError(f"{adapter.kind} has no recurrent state to clamp.")
    limits = {key: torch.quantile(torch.cat(parts).double(), q, dim=0) for key, parts in norms.items()}

    def limit(layer: int, name: str, x: Tensor) -> Tensor:
        norm = (x.flatten(2).norm(dim=-1) if x.ndim > 2 else x.norm(dim=-1)).double()
        most = limits[(layer, name)] if not p else torch.full_like(norm, p)
        scale = (most / norm.clamp(min=1e-30)).clamp(max=1.0).to(x.dtype)
        return x * scale.reshape(scale.shape + (1,) * (x.ndim - scale.ndim))

    with _after_chunk(adapter, lambda state: adapter.replace_states(state, limit)):
        yield


@contextmanager
def restart(adapter: Adapter, setting: Setting, r: float = 0) -> Iterator[None]:
    """Every recurrent state becomes zero each r tokens (0: T), rounded to whole chunks: no memory beyond r, nothing to collapse."""
    every, seen = max(1, round((int(r) or setting.train_length) / setting.chunk)), [0]

    def after(state: Any) -> Any:
        seen[0] += 1
        return state if seen[0] % every else adapter.replace_states(state, lambda layer, name, x: torch.zeros_like(x))

    with _after_chunk(adapter, after), _on_start(adapter, lambda: seen.__setitem__(0, 0)):
        yield


@contextmanager
def _after_chunk(adapter: Adapter, act: Callable[[Any], Any]) -> Iterator[None]:
    before = adapter.after_chunk
    adapter.after_chunk = act
    try:
        yield
    finally:
        adapter.after_chunk = before


@contextmanager
def _on_start(adapter: Adapter, act: Callable[[], Any]) -> Iterator[None]:
    before = adapter.on_start
    adapter.on_start = act
    try:
        yield
    finally:
        adapter.on_start = before


def _attention(adapter: Adapter) -> list[Any]:
    """Our full-attention mixers (those with a window of their own need no mask)."""
    if not isinstance(adapter, OwnAdapter):
        return []
    blocks: Any = adapter.model.blocks
    return [b.mixer for b in blocks if hasattr(b.mixer, "q_proj") and hasattr(b.mixer.config, "rope") and not b.mixer.config.window]


@contextmanager
def lambda_mask(adapter: Adapter, setting: Setting, first: float = 10, local: float = 0) -> Iterator[None]:
    """Query i sees key j if i - j < L or j < first (the Lambda mask), and no distance counts as more than L (LM-Infinite, arXiv 2308.16137).

    L = local, 0 takes T. With rotary positions the capped score of a far first token is that of the query rotated to position L and the
    unrotated key. The cache holds first + L tokens, so memory does not grow.
    """
    mixers = _attention(adapter)
    if not mixers:
        raise ItemError(f"{adapter.kind} has no attention layer of ours without a window, so there is nothing to mask.")
    L = int(local) or setting.train_length
    for mixer in mixers:
        mixer.forward = _lambda_forward(mixer, int(first), L)
    try:
        yield
    finally:
        for mixer in mixers:
            del mixer.forward  # the class's own shows again


def _lambda_forward(mixer: Any, first: int, local: int) -> Callable[..., Any]:
    from kernels.rotary.reference import rotate
    from models.mixers.attention import State

    def turn(x: Tensor, positions: Tensor) -> Tensor:
        return rotate(x, positions, *mixer.turned(positions)) if mixer.config.rope else x

    def forward(x_BTD: Tensor, state: Any = None, segment_ids: Any = None) -> tuple[Tensor, Any]:
        assert segment_ids is None, "evaluations feed one document at a time"
        B, T, _ = x_BTD.shape
        q = mixer.q_proj(x_BTD).view(B, T, mixer.H, mixer.K).transpose(1, 2)
        k = mixer.k_proj(x_BTD).view(B, T, mixer.G, mixer.K).transpose(1, 2)
        v = mixer.v_proj(x_BTD).view(B, T, mixer.G, mixer.K).transpose(1, 2)
        if mixer.q_norm is not None:
            q, k = mixer.q_norm(q), mixer.k_norm(k)
        seen = state.seen if state is not None else 0
        new = torch.arange(seen, seen + T, device=x_BTD.device)
        place, far_q = new, turn(q, torch.full_like(new, local))
        q, k = turn(q, new), turn(k, new)
        if state is not None:
            cached = state.k_BGLK.shape[2]
            k, v = torch.cat([state.k_BGLK.to(k.dtype), k], 2), torch.cat([state.v_BGLK.to(v.dtype), v], 2)
            old = torch.arange(cached, device=x_BTD.device)
            place = torch.cat([torch.where(old < first, old, old + seen - cached), new])  # the first tokens, then the last ones
        y = _lambda_attention(q, far_q, k, v, new, place, first, local, turn)
        y = mixer.o_proj(y.transpose(1, 2).reshape(B, T, mixer.H * mixer.K))
        if state is None:
            return y, None
        keep = (place < first) | (place > seen + T - 1 - local)
        return y, State(k[:, :, keep], v[:, :, keep], None, seen + T)

    return forward


def _lambda_attention(
    q: Tensor, far_q: Tensor, k: Tensor, v: Tensor, query_T: Tensor, key_L: Tensor, first: int, local: int, turn: Any, block: int = 256
) -> Tensor:
    """Exact softmax over the window and the first tokens, a block of queries at a time. q, far_q (B, H, T, K); k, v (B, G, L, K)."""
    group, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    n = int((key_L < first).sum())  # they stand in front
    unrotated = turn(k[:, :, :n], -key_L[:n])
    parts = []
    for a in range(0, q.shape[2], block):
        rows = slice(a, a + block)
        distance = query_T[rows, None] - key_L
        scores = torch.matmul(q[:, :, rows], k.transpose(-1, -2)).to(wide) * scale
        if n:
            far = torch.matmul(far_q[:, :, rows], unrotated.transpose(-1, -2)).to(wide) * scale
            scores = torch.cat([torch.where(distance[:, :n] >= local, far, scores[..., :n]), scores[..., n:]], -1)
        allowed = (distance >= 0) & ((distance < local) | (key_L < first))
        parts.append(torch.matmul(scores.masked_fill(~allowed, -math.inf).softmax(-1).to(v.dtype), v))
    return torch.cat(parts, 2)


CURES: dict[str, tuple[Callable[..., AbstractContextManager[Any]], tuple[str, ...]]] = {
    "retention": (retention, ("m", "b")),
    "dt": (dt_scaling, ("c",)),
    "window": (window, ("r",)),
    "longmamba": (longmamba, ("theta", "clip")),
    "clamp": (clamp, ("q", "p")),
    "restart": (restart, ("r",)),
    "lambda": (lambda_mask, ("first", "local")),
}
