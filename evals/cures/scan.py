"""Cures that act on the scans of Mamba-2: another decay, other step sizes, a window, skipped tokens. The first two act on our delta rules too.

A window of the delta rule is no difference of two states: what the older one has become went through a matrix for each token. Nor can tokens with
a small step be skipped: how much they write is another projection than how much they forget, and they take out what the state held.

Each is a context in which the model is cured: `with retention(adapter, setting): ...`. Legend as in evals/cures/hooks.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from evals.adapters.base import Adapter, ItemError
from evals.cures.hooks import Rule, RuleHook, RuleRun, Run, Scan, ScanHook, rule_hook, rule_layers, scan_hook, scan_layers
from evals.cures.setting import Setting, acting_on_start, feed_calibration

PUBLISHED_LEFT = 0.9999**8192  # 0.4408: what the published multiplier leaves after its training length of 8,192 tokens


def horizon_multiplier(train_length: int) -> float:
    """The m with m^T = 0.9999^8192, the published multiplier carried over to another training length (0.9984 for 512, 0.9996 for 2,048)."""
    return PUBLISHED_LEFT ** (1 / train_length)


@contextmanager
def _acting(adapter: Adapter, on_scan: ScanHook, on_rule: RuleHook) -> Iterator[None]:
    """The context in which these act on the model's scans and delta rules. Raises ItemError if it has neither."""
    if not scan_layers(adapter) and not rule_layers(adapter):
        raise ItemError(f"{adapter.kind} has neither a Mamba-2 scan nor a delta rule that can be reached into.")
    with ExitStack() as stack:
        if scan_layers(adapter):
            stack.enter_context(scan_hook(adapter, on_scan))
        if rule_layers(adapter):
            stack.enter_context(rule_hook(adapter, on_rule))
        yield


@contextmanager
def retention(adapter: Adapter, setting: Setting, m: float = 0.0, b: float = 1.0) -> Iterator[None]:
    """alpha' = m alpha and B' = b B: h_t = m alpha_t h_{t-1} + b dt_t x_t B_t^T (arXiv 2410.07145, section 5: m = 0.9999, b = 0.75 at 8K).

    The delta rule likewise: a' = m a, and its strength b times b, by which it takes out less as well as writing less.
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

    def on_rule(layer: int, r: Rule, run: RuleRun) -> tuple[Tensor, Tensor]:
        return run(replace(r, beta=b * r.beta, g=r.gates() + math.log(m)))

    with _acting(adapter, hook, on_rule):
        yield


@contextmanager
def dt_scaling(adapter: Adapter, setting: Setting, c: float = 0.5) -> Iterator[None]:
    """dt' = c dt after the softplus: slower decay and weaker insertion alike (jzhang38/LongMamba, c = 0.5; MambaExtend with one scale for all).
    The delta rule's step sizes are those of its gates alone: slower decay, and it writes as before."""
    if c <= 0:
        raise ItemError(f"dt needs c above zero, not {c:g}.")

    def hook(layer: int, s: Scan, run: Run) -> tuple[Tensor, Tensor]:
        return run(Scan(s.x, c * s.dt, s.A, s.B, s.C, s.h0))

    def on_rule(layer: int, r: Rule, run: RuleRun) -> tuple[Tensor, Tensor]:
        return run(r if r.g is None else replace(r, g=c * r.g))

    with _acting(adapter, hook, on_rule):
        yield


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

    with scan_hook(adapter, hook), acting_on_start(adapter, buffers.clear):
        yield


def windowed(s: Scan, buffer: Scan | None, r: int, block: int = 256) -> tuple[Tensor, Tensor, Scan]:
    """(y (B, T, H, P), state (B, H, P, N), next buffer) of the scan in which step t sees its last r inputs only.

    buffer: the r-1 inputs before these, None at the beginning; block: queries at a time.
    """
    T = s.x.shape[1]
    if buffer is not None:
        x, dt, Bm = (torch.cat([getattr(buffer, n), getattr(s, n)], 1) for n in ("x", "dt", "B"))
    else:
        x, dt, Bm = s.x, s.dt, s.B
    past, heads = x.shape[1] - T, x.shape[2] // Bm.shape[2]
    wide = torch.promote_types(x.dtype, torch.float32)
    total = (dt.double() * s.A.double()).cumsum(1)  # fp64, as differences of long sums cancel
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
        feed_calibration(adapter, setting)
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
    """(H,): for each head the g for which those of its step sizes (N, H) that are at least g add up to `share` of all; 0 for share >= 1."""
    if share >= 1:
        return dt_NH.new_zeros(dt_NH.shape[1])
    ordered = dt_NH.sort(0, descending=True).values
    reached = ordered.cumsum(0) / ordered.sum(0)
    place = (reached < share).sum(0).clamp(max=len(ordered) - 1)
    return ordered.gather(0, place[None])[0]
