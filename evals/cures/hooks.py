"""Looks into, and reaches into, the recurrences of a model while it runs: the scans of Mamba-2 (ours and transformers'), our delta rules
and our cells.

A hook on a scan sees its inputs after the softplus of the step sizes, may change them, and calls the scan (or something else) itself. This is
where retention is measured and where cures act (evals/cures/scan.py). Nothing is changed for good: the hooks live as long as the context.
Legend: B batch, T time, H heads, P head width, G groups, N state width, S states of a cell, I channels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evals.adapters.base import Adapter, ItemError
from evals.adapters.hf import HFAdapter
from evals.adapters.own import OwnAdapter


@dataclass
class Scan:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, y_t = C_t h_t: x (B, T, H, P), dt (B, T, H) > 0, A (H,) < 0, B and C (B, T, G, N), h0 (B, H, P, N)."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    h0: Tensor | None


Run = Callable[[Scan], tuple[Tensor, Tensor]]  # a scan to (y, last state)
ScanHook = Callable[[int, Scan, Run], tuple[Tensor, Tensor]]


@dataclass
class Rule:
    """S_t = a_t S_{t-1} (I - b_t k_t k_t^T) + b_t v_t k_t^T, what a hook may change of it: beta (B, n T, H), g (B, T, H) = ln a or None (a = 1)."""

    beta: Tensor
    g: Tensor | None
    tokens: int  # T
    width: int  # of a key

    def gates(self) -> Tensor:
        """g, zeros where there is none."""
        return self.beta.new_zeros(self.beta.shape[0], self.tokens, self.beta.shape[2]) if self.g is None else self.g


RuleRun = Callable[[Rule], tuple[Tensor, Tensor]]  # a rule to (o, last state)
RuleHook = Callable[[int, Rule, RuleRun], tuple[Tensor, Tensor]]


@contextmanager
def replaced(holder: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)


def layers_that_run(adapter: OwnAdapter, op: str) -> list[tuple[int, Any]]:
    """(layer, mixer) of our mixers that declare `op` as their recurrence."""
    blocks: Any = adapter.model.blocks
    return [(i, block.mixer) for i, block in enumerate(blocks) if block.mixer.recurrence == op]


def scan_layers(adapter: Adapter) -> list[tuple[int, Any]]:
    """(layer, module) of the Mamba-2 mixers whose scan can be hooked."""
    if isinstance(adapter, OwnAdapter):
        return layers_that_run(adapter, "ssd")
    if isinstance(adapter, HFAdapter):
        scans = [
            m for m in adapter.model.modules() if hasattr(sys.modules.get(type(m).__module__), "mamba2_chunk_scan") and hasattr(m, "A_log")
        ]
        return [(int(getattr(m, "layer_idx", i)), m) for i, m in enumerate(scans)]
    return []


@contextmanager
def scan_hook(adapter: Adapter, hook: ScanHook) -> Iterator[list[int]]:
    """hook(layer, scan, run) stands in for every scan; yields the list of layers called so far. Raises ItemError if there are no scans."""
    layers = scan_layers(adapter)
    if not layers:
        raise ItemError(f"{adapter.kind} has no Mamba-2 scan that can be reached into.")
    now, called = [0], []

    def announce(layer: int) -> Callable[..., None]:
        def before(*_: Any) -> None:
            now[0] = layer
            called.append(layer)

        return before

    with ExitStack() as stack:
        for layer, module in layers:
            handle = module.register_forward_pre_hook(announce(layer))
            stack.callback(handle.remove)
            if isinstance(adapter, OwnAdapter):  # a single token is to take the scan too
                stack.enter_context(replaced(module, "one_kernel", False))
        for module in {sys.modules[type(m).__module__] for _, m in layers}:
            if isinstance(adapter, OwnAdapter):
                stack.enter_context(replaced(module, "ssd", _own_scan(module.ssd, hook, now)))
            else:
                original = module.mamba2_chunk_scan
                stack.enter_context(replaced(module, "mamba2_chunk_scan", _hf_scan(original, hook, now)))
                if hasattr(module, "mamba2_selective_state_update"):
                    stack.enter_context(replaced(module, "mamba2_selective_state_update", _hf_step(original, hook, now)))
        yield called


def _own_scan(original: Any, hook: ScanHook, now: list[int]) -> Any:
    def ssd(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Any = None, starts: Any = None, *, D_H: Any = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        assert starts is None, "evaluations feed one document at a time"
        with torch.autocast(x.device.type, enabled=False):
            y, h = hook(now[0], Scan(x, dt, A, B, C, h0), lambda s: original(s.x, s.dt, s.A, s.B, s.C, s.h0, None, **options))
            return (y if D_H is None else y + x * D_H[:, None]), h  # the skip sees x as it is, whatever the hook made of it

    return ssd


def _plain_hf(original: Any, chunk_size: int) -> Run:
    def run(s: Scan) -> tuple[Tensor, Tensor]:
        return original(s.x, s.dt, s.A, s.B, s.C, chunk_size=chunk_size, initial_states=s.h0, return_final_states=True)

    return run


def _hf_scan(original: Any, hook: ScanHook, now: list[int]) -> Any:
    def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Any = None, **options: Any) -> Any:
        if options.get("dt_bias") is not None:
            dt = dt + options["dt_bias"].to(dt.dtype)
        if options.get("dt_softplus"):
            dt = F.softplus(dt)
        dt = dt.clamp(*options.get("dt_limit", (0.0, float("inf"))))
        with torch.autocast(x.device.type, enabled=False):
            y, h = hook(now[0], Scan(x, dt, A, B, C, options.get("initial_states")), _plain_hf(original, chunk_size))
        if D is not None:
            y = y + (D[:, None] * x if D.ndim == 1 else D * x).to(y.dtype)
        return (y, h) if options.get("return_final_states") else y

    return scan


def _hf_step(original: Any, hook: ScanHook, now: list[int]) -> Any:
    """transformers' decoding step, by the same hook: state (B, H, P, N), x (B, H, P), dt (B, H, P), A (H, P, N), B and C (B, G, N)."""

    def step(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Any = None, **options: Any) -> Tensor:
        dt_BH = dt[..., 0] + (options["dt_bias"][:, 0] if options.get("dt_bias") is not None else 0)
        dt_BH = F.softplus(dt_BH) if options.get("dt_softplus") else dt_BH
        y, h = hook(now[0], Scan(x[:, None], dt_BH[:, None], A[:, 0, 0], B[:, None], C[:, None], state), _plain_hf(original, 1))
        state.copy_(h)
        y = y[:, 0]
        return (y + D * x if D is not None else y).to(x.dtype)

    return step


@dataclass
class Spread:
    """Of numbers seen so far, for each head: how many, their sum, how many were below zero, the lowest and the highest."""

    count: int = 0
    total: Tensor | float = 0.0
    negative: Tensor | float = 0.0
    lowest: Tensor | None = None
    highest: Tensor | None = None

    def add(self, values_BTH: Tensor) -> None:
        x = values_BTH.flatten(0, 1)
        self.count, self.total, self.negative = self.count + len(x), self.total + x.sum(0), self.negative + (x < 0).sum(0)
        low, high = x.amin(0), x.amax(0)
        self.lowest = low if self.lowest is None else torch.minimum(self.lowest, low)
        self.highest = high if self.highest is None else torch.maximum(self.highest, high)

    def figures(self) -> dict[str, list[float]]:
        """mean, lowest, highest, and the share below zero, a number a head."""
        assert self.lowest is not None and self.highest is not None
        values = {"mean": self.total / self.count, "lowest": self.lowest, "highest": self.highest, "negative": self.negative / self.count}
        return {name: torch.as_tensor(value).tolist() for name, value in values.items()}


class Retention:
    """Sums ln(retention) of every head (Mamba-2: ln alpha = dt A) or channel of a cell (ln |d state_t / d state_{t-1}|, diagonal entries).

    totals[(layer, name)]: (B, heads or channels) up to the tokens seen; `tokens` of them. For a cell with several states the diagonal is the
    direct path only. spread[(layer, name)]: of a delta rule's gates and updates, the eigenvalues themselves.
    """

    def __init__(self) -> None:
        self.totals: dict[tuple[int, str], Tensor] = {}
        self.tokens: dict[tuple[int, str], int] = {}
        self.spread: dict[tuple[int, str], Spread] = {}

    def add(self, layer: int, name: str, log_BTH: Tensor) -> None:
        """Adds ln(retention) of T more tokens."""
        key = (layer, name)
        value = log_BTH.double().sum(1)
        self.totals[key] = self.totals[key] + value if key in self.totals else value
        self.tokens[key] = self.tokens.get(key, 0) + log_BTH.shape[1]

    def scan(self, layer: int, scan: Scan, run: Run) -> tuple[Tensor, Tensor]:
        """A hook for `scan_hook` that changes nothing."""
        self.add(layer, "ssm", scan.dt.double() * scan.A.double())
        return run(scan)

    def rule(self, layer: int, rule: Rule, run: RuleRun) -> tuple[Tensor, Tensor]:
        """A hook for `rule_hook` that changes nothing: `delta`, the logarithms of the gates, and `delta_update`, what the updates leave on the
        average over the K directions of a key, ln |det(I - b k k^T)| / K = ln |1 - b| / K with keys of norm 1. Of both the spread: of a, and of
        1 - b, an update's one eigenvalue that is not 1."""
        self.add(layer, "delta", rule.gates().double().clamp(min=-1e3))
        left = torch.log((1 - rule.beta.double()).abs().clamp(min=1e-30)) / rule.width
        self.add(layer, "delta_update", left.unflatten(1, (rule.tokens, -1)).sum(2))
        for name, values in (("delta", rule.gates().double().exp()), ("delta_update", 1 - rule.beta.double())):
            self.spread.setdefault((layer, name), Spread()).add(values)
        return run(rule)


@contextmanager
def measure_retention(adapter: Adapter) -> Iterator[Retention]:
    """Records retention while the model runs; layers without a recurrence that can be looked into leave nothing."""
    retention = Retention()
    with ExitStack() as stack:
        if scan_layers(adapter):
            stack.enter_context(scan_hook(adapter, retention.scan))
        if rule_layers(adapter):
            stack.enter_context(rule_hook(adapter, retention.rule))
        if isinstance(adapter, OwnAdapter):
            stack.enter_context(_cells(adapter, retention))
        yield retention


@contextmanager
def each_module(layers: list[tuple[int, Any]], name: str) -> Iterator[tuple[list[int], set[Any], Callable[[Any, Any], None]]]:
    """(a list whose one element is the layer that runs now, the modules of the mixers in `layers`, a function that puts another in the place of a
    module's `name`), until the context ends."""
    now = [0]
    with ExitStack() as stack:
        for layer, mixer in layers:
            handle = mixer.register_forward_pre_hook(lambda *_, layer=layer: now.__setitem__(0, layer))
            stack.callback(handle.remove)

        def replace(module: Any, watched: Any) -> None:
            stack.enter_context(replaced(module, name, watched))

        yield now, {sys.modules[type(mixer).__module__] for _, mixer in layers}, replace


def rule_layers(adapter: Adapter) -> list[tuple[int, Any]]:
    """(layer, mixer) of our delta rules."""
    return layers_that_run(adapter, "delta_rule") if isinstance(adapter, OwnAdapter) else []


@contextmanager
def rule_hook(adapter: Adapter, hook: RuleHook) -> Iterator[None]:
    """hook(layer, rule, run) stands in for every delta rule of ours. Raises ItemError if there are none."""
    layers = rule_layers(adapter)
    if not layers:
        raise ItemError(f"{adapter.kind} has no delta rule that can be reached into.")
    with ExitStack() as stack:
        for _, mixer in layers:
            stack.enter_context(replaced(mixer, "one_kernel", False))
        now, modules, replace = stack.enter_context(each_module(layers, "delta_rule"))
        for module in modules:
            replace(module, _own_rule(module.delta_rule, hook, now))
        yield


def _own_rule(original: Any, hook: RuleHook, now: list[int]) -> Any:
    def delta_rule(
        q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Any = None, h0: Any = None, starts: Any = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        assert starts is None, "evaluations feed one document at a time"

        def run(r: Rule) -> tuple[Tensor, Tensor]:
            return original(q, k, v, r.beta, r.g, h0, None, **options)

        return hook(now[0], Rule(beta, g, q.shape[1], k.shape[-1]), run)

    return delta_rule


@contextmanager
def _cells(adapter: OwnAdapter, retention: Retention) -> Iterator[None]:
    """The context in which the solves of our cells add to `retention`."""
    from kernels.parallel_rnn.reference import jacobian

    layers = [(i, mixer) for i, mixer in layers_that_run(adapter, "parallel_rnn") if mixer.cell.lowered]
    with each_module(layers, "parallel_rnn") as (now, modules, replace):
        for module in modules:
            original = module.parallel_rnn

            def watched(
                cell: Any, pre: Tensor, rec: Tensor, h0: Any = None, starts: Any = None, *, original: Any = original,
                bias_PD: Tensor | None = None, emitted: bool = False, **options: Any,
            ) -> Any:  # fmt: skip
                if not cell.lowered:  # channels may depend on each other here, so that diagonal entries are no retention
                    return original(cell, pre, rec, h0, starts, bias_PD=bias_PD, emitted=emitted, **options)
                states, final = original(cell, pre, rec, h0, starts, bias_PD=bias_PD, **options)
                wide = torch.promote_types(pre.dtype, torch.float32)
                inputs = pre.flatten(3) if pre.dim() == 5 else pre
                before = torch.zeros_like(final)[:, None] if h0 is None else h0.to(final.dtype)[:, None]
                before = torch.cat([before.to(wide), states[:, :-1].to(wide)], 1)
                with torch.autocast(pre.device.type, enabled=False):
                    for a in range(0, pre.shape[1], 512):  # (S, S) derivatives of a piece at a time
                        piece = inputs[:, a : a + 512].to(wide) + (0 if bias_PD is None else bias_PD.to(wide))
                        J = jacobian(cell, piece, rec.to(wide), before[:, a : a + 512])
                        for i, name in enumerate(cell.state):
                            retention.add(now[0], name, J[..., i, i, :].abs().clamp(min=1e-30).log())
                return states[:, :, -1] if emitted else states, final

            replace(module, watched)
        yield
