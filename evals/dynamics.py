"""The recurrences of a model as dynamical systems: how far back each layer reaches, its rank, and its spectral radius.

    python -m evals.dynamics checkpoint=runs/quickstart [length=256] [rows=2] [text=FILE] [data=DIR] [seed=0] [device=auto] [out=FILE.json]

Mamba-2 (ours and transformers'), delta rules, running averages, cells that are linear, and attention are read as (Lambda, B, C) by head, and their
outputs are rebuilt from these within 1e-4, else the program says so; other cells by the Jacobian of each channel; any other mixer with a state by
probes through its own forward, and rebuilt if it turns out to be linear. Writes JSON, and beside it a page (.md). docs/methods/dynamics.md says how to read it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from evals.adapters.base import Adapter, ItemError
from evals.adapters.own import OwnAdapter
from evals.cures.hooks import Run, Scan, each_module, scan_hook, scan_layers
from evals.measures.dynamics import QUANTILES, TOLERANCE, Recurrence, figures, mixing_figures, probed
from evals.suites.prose import problems_of_text, report_on_prose
from training.config.arguments import parse_arguments, program

DEFAULTS: dict[str, Any] = {
    "checkpoint": None,
    "length": 256,
    "rows": 2,
    "text": None,
    "data": None,
    "seed": 0,
    "device": "auto",
    "out": None,
}


def of_scan(s: Scan, y: Tensor) -> Recurrence:
    """Mamba-2: Lambda = exp(dt A), B = dt B, u = x, C = C of the head's group."""
    x, dt, A, B, C, y = (t.double() for t in (s.x, s.dt, s.A, s.B, s.C, y))
    H = x.shape[2]
    B, C = (t.repeat_interleave(H // t.shape[2], 2) for t in (B, C))
    return Recurrence(torch.exp(dt * A), x[0, 0].numel() * B.shape[-1], (dt[..., None] * B)[..., None, :], x[..., None, :], C, y)


def of_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, y: Tensor, normalize: bool = False, scale: float = 1.0
) -> Recurrence:
    """The delta rule of n updates a token: Lambda = exp(g) (I - b_1 k_1 k_1^T) .. (I - b_n k_n k_n^T), and update r writes b_r k_r, with what the
    updates after it take of it, times v_r."""
    from kernels.delta_rule.reference import unit_norm

    q, k, v, beta, y = (t.double() for t in (q, k, v, beta, y))
    q, k = (unit_norm(t) if normalize else t for t in (q, k))
    (B, T, G, K), H = q.shape, v.shape[2]
    q, k = (t.repeat_interleave(H // G, 2) for t in (q, k))
    n = k.shape[1] // T
    k, v, beta = (t.unflatten(1, (T, n)) for t in (k, v, beta))  # (B, T, n, H, ...)
    gate = torch.ones(B, T, H, dtype=torch.float64, device=q.device) if g is None else g.double().exp()
    Lambda = gate[..., None, None] * torch.eye(K, dtype=torch.float64, device=q.device)
    writes = k.new_zeros(B, T, H, 0, K)
    for r in range(n):
        key, b = k[:, :, r], beta[:, :, r, :, None]
        Lambda = Lambda - (Lambda @ key[..., None]) * (b * key)[..., None, :]
        writes = writes - (writes @ key[..., None]) * (b * key)[..., None, :]
        writes = torch.cat([writes, (b * key)[..., None, :]], 3)
    return Recurrence(Lambda, H * K * v.shape[-1], writes, v.transpose(2, 3), q * scale, y)


class Reading:
    """The rows of the report as the model runs: one for each layer whose recurrence was read."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, Any]] = {}
        self.inputs: dict[int, Tensor] = {}

    def add(self, layer: int, kind: str, row: dict[str, Any]) -> None:
        self.rows[layer] = {"layer": layer, "kind": kind, **row}

    def scan(self, layer: int, s: Scan, run: Run) -> tuple[Tensor, Tensor]:
        y, h = run(s)
        self.add(layer, "mamba2", figures(of_scan(s, y)))
        return y, h


@contextmanager
def _rules(layers: list[tuple[int, Any]], reading: Reading) -> Iterator[None]:
    with each_module(_with(layers, "delta_rule"), "delta_rule") as (now, modules, replace):
        for module in modules:
            original = module.delta_rule

            def watched(q: Any, k: Any, v: Any, beta: Any, g: Any = None, *rest: Any, original: Any = original, **options: Any) -> Any:
                y, h = original(q, k, v, beta, g, *rest, **options)
                reading.add(now[0], "delta rule", figures(of_rule(q, k, v, beta, g, y, **options)))
                return y, h

            replace(module, watched)
        yield


@contextmanager
def _cells(layers: list[tuple[int, Any]], reading: Reading) -> Iterator[None]:
    """Cells whose channels do not mix."""
    solved = [(i, m) for i, m in _with(layers, "parallel_rnn") if getattr(m, "cell", None) is not None and m.cell.lowered]
    with each_module(solved, "parallel_rnn") as (now, modules, replace):
        for module in modules:
            original = module.parallel_rnn

            def watched(
                cell: Any, pre: Tensor, rec: Tensor, h0: Tensor, *rest: Any, original: Any = original, bias_PD: Any = None, emitted: bool = False,
                **options: Any,
            ) -> Any:  # fmt: skip
                states, final = original(cell, pre, rec, h0, *rest, bias_PD=bias_PD, **options)
                if cell.lowered:
                    inputs = (pre.flatten(3) if pre.dim() == 5 else pre).double() + (0 if bias_PD is None else bias_PD.double())
                    before = torch.cat([h0[:, None].double(), states[:, :-1].double()], 1)
                    reading.add(now[0], f"cell {cell.name}", figures(of_cell(cell, inputs, rec.double(), before, states.double())))
                return (states[:, :, -1] if emitted else states), final

            replace(module, watched)
        yield


@contextmanager
def _attention(layers: list[tuple[int, Any]], reading: Reading) -> Iterator[None]:
    """Attention has M itself: the softmax, of which y is rebuilt."""
    with each_module(_with(layers, "attend"), "attend") as (now, modules, replace):
        for module in modules:
            original = module.attend

            def watched(q: Tensor, k: Tensor, v: Tensor, documents: Any, window: int, original: Any = original) -> Tensor:
                y = original(q, k, v, documents, window)
                T, repeat = q.shape[2], q.shape[1] // k.shape[1]
                ones = torch.ones(T, T, dtype=torch.bool, device=q.device)
                seen = ones.tril() & (ones.triu(1 - window) if window else ones)
                keys, values = (t.double().repeat_interleave(repeat, 1) for t in (k, v))
                scores = (q.double() @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
                M = scores.softmax(-1)
                error = float((M @ values - y).abs().max() / y.abs().max().clamp(min=1e-30))
                reading.add(now[0], "attention", {"heads": q.shape[1], "rebuild_error": error, **mixing_figures(M)})
                return y

            replace(module, watched)
        yield


@contextmanager
def _averages(layers: list[tuple[int, Any]], reading: Reading) -> Iterator[None]:
    """Averages weighted by exp(s): Lambda is the share of the sum so far that lay before a token, B the share of the token."""
    with each_module(_with(layers, "running_average"), "running_average") as (now, modules, replace):
        for module in modules:
            original = module.running_average

            def watched(s: Tensor, v: Tensor, log_sum: Tensor, *rest: Any, original: Any = original) -> Any:
                y, *after = original(s, v, log_sum, *rest)
                sums = torch.cat([log_sum[:, None], s], 1).double().logcumsumexp(1)
                share = (s.double() - sums[:, 1:]).exp()[..., None, None]
                size = v[0, 0].numel() + v.shape[2]
                r = Recurrence(
                    (sums[:, :-1] - sums[:, 1:]).exp(), size, share, v.double()[..., None, :], torch.ones_like(share[..., 0]), y.double()
                )
                reading.add(now[0], "running average", figures(r))
                return y, *after

            replace(module, watched)
        yield


def of_cell(cell: Any, inputs: Tensor, rec: Tensor, before: Tensor, states: Tensor) -> Recurrence:
    """A cell by channel: Lambda its Jacobian (S, S), for the S states; where one state enters linearly what is written too, the step from nothing.
    inputs (B, T, P, D), rec (R, D), before and states (B, T, S, D)."""
    from kernels.parallel_rnn.reference import jacobian

    J = jacobian(cell, inputs, rec, before).permute(0, 1, 4, 3, 2)  # rows times Lambda: the transpose
    if J.shape[-1] > 1:
        return Recurrence(J, J.shape[2] * J.shape[-1])
    Lambda, h = J[..., 0, 0], states[:, :, 0]
    (written,) = cell(inputs.unbind(2), rec.unbind(0), (torch.zeros_like(h),))
    if float((Lambda * before[:, :, 0] + written - h).abs().max()) > TOLERANCE * float(h.abs().max()):
        return Recurrence(Lambda, J.shape[2])
    ones = torch.ones_like(written)
    return Recurrence(Lambda, J.shape[2], written[..., None, None], ones[..., None, None], ones[..., None], h[..., None])


def _with(layers: list[tuple[int, Any]], name: str) -> list[tuple[int, Any]]:
    """The layers whose mixer's file calls `name`."""
    return [(i, m) for i, m in layers if hasattr(sys.modules[type(m).__module__], name)]


@torch.no_grad()
def dynamics(adapter: Adapter, ids_RT: Tensor) -> list[dict[str, Any]]:
    """The rows of the report, one a layer, of a model that reads ids (R, T). Raises ItemError where nothing can be read, and where outputs are not
    those of what was read, or not finite."""
    adapter.losses(
        ids_RT[:, :-1], ids_RT[:, 1:], adapter.start(len(ids_RT))
    )  # refuses what is not finite, of which the figures mean nothing
    reading, layers = Reading(), []
    with ExitStack() as stack:
        if isinstance(adapter, OwnAdapter):
            blocks: Any = adapter.model.blocks
            layers = [(i, block.mixer) for i, block in enumerate(blocks)]
            for layer, mixer in layers:
                handle = mixer.register_forward_pre_hook(lambda m, x, layer=layer: reading.inputs.__setitem__(layer, x[0].detach()))
                stack.callback(handle.remove)
            for watch in (_rules, _cells, _averages, _attention):
                stack.enter_context(watch(layers, reading))
        if scan_layers(adapter):
            stack.enter_context(scan_hook(adapter, reading.scan))
        adapter.advance(ids_RT, adapter.start(len(ids_RT)))
    for layer, mixer in layers:
        if layer not in reading.rows and mixer.tensors_of(mixer.init_state(1), "recurrent"):
            kind = type(mixer).__module__.rpartition(".")[2]
            cell = getattr(mixer, "cell", None)
            reading.add(layer, kind if cell is None else f"cell {cell.name}", probed(mixer, reading.inputs[layer]))
    rows = [reading.rows[layer] for layer in sorted(reading.rows)]
    if not rows:
        raise ItemError(f"{adapter.kind} has no recurrence and no attention of ours that could be read.")
    for row in rows:
        if not row.get("rebuild_error", 0.0) <= TOLERANCE:  # NaN is above it
            raise ItemError(
                f"The outputs of layer {row['layer']} ({row['kind']}) are not those of its Lambda, B and C: {row['rebuild_error']:.1e} apart."
            )
    return rows


def page(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        f"# Recurrences of {report['model']['name']}",
        "",
        f"{report['rows']} row{'s' * (report['rows'] != 1)} of {report['length']} tokens of {report['text']}. Memory: tokens after which 1/e of the state is left, over heads "
        "(lowest, middle, highest); radius: largest eigenvalue of a step, over heads and time; rank: effective rank of the T x T mixing matrix; "
        "first: share of the first token in what the second half reads; coupling: correlation of forgetting and writing.",
        "",
        "| layer | mixer | state | n | memory | radius | rank | first | coupling | rebuilt within |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["layers"]:
        memory = " / ".join("never lost" if v is None else f"{v:.3g}" for v in row["memory"][::2]) if "memory" in row else ""
        radius = " / ".join(f"{v:.4f}" for v in row["radius"][::2]) if "radius" in row else ""
        shown = [row["layer"], row["kind"], row.get("size", "cache"), row.get("expansion") or "", memory, radius]
        shown += [
            _figure(row.get(key), form)
            for key, form in (("mixing_rank", ".1f"), ("first_token", ".3f"), ("coupling", ".2f"), ("rebuild_error", ".0e"))
        ]
        lines.append("| " + " | ".join(map(str, shown)) + " |")
    return "\n".join(lines) + "\n"


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def problems_of(values: dict[str, Any]) -> list[str]:
    """What cannot be run, a sentence each."""
    problems = problems_of_text(values)
    if not 8 <= values["length"] <= 4096:
        problems.append(f"length must be from 8 to 4096 tokens, as matrices of all pairs are made; not {values['length']}.")
    return problems


def run(values: dict[str, Any]) -> dict[str, Any]:
    """Reads one model, writes the JSON and the page, prints the page and returns the report. Raises UserError."""

    def measure(adapter: Adapter, ids: Tensor) -> dict[str, Any]:
        return {"quantiles": QUANTILES, "layers": dynamics(adapter, ids)}

    return report_on_prose("dynamics", values, measure, page)


def main(arguments: list[str] | None = None) -> int:
    """The command line of this module; returns the exit status."""
    return program(__doc__, lambda words: run(parse_arguments(words, DEFAULTS, problems_of)) and None, arguments)


if __name__ == "__main__":
    sys.exit(main())
