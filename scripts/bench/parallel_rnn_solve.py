"""What scripts/bench/parallel_rnn.py measures of the solve itself: accuracy, times against the bytes that must be moved, memory, launch sizes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.parallel_rnn import launch, op, parallel_rnn, parallel_rnn_step, reference
from models.cells import cell_module, load_cell
from scripts.bench.timing import milliseconds

SHAPES = [(16, 2048, 2048), (4, 8192, 2048), (1, 32768, 2048), (1, 2048, 2048), (1, 512, 2048)]


def inputs(name: str, B: int, T: int, D: int, dtype: torch.dtype, device: str = "cuda") -> tuple[Any, Tensor, Tensor, Tensor]:
    """As a fresh model sees them: unit normal projections, the cell's own biases, small recurrent weights."""
    cell = load_cell(name)
    g = torch.Generator(device).manual_seed(0)
    pre = torch.empty(B, T, len(cell.pre), D, device=device, dtype=dtype).normal_(generator=g)
    for gate, value in getattr(cell_module(name), "BIAS_INIT", {}).items():
        low, high = value if isinstance(value, tuple) else (value, value)
        pre[:, :, cell.pre.index(gate)] += torch.linspace(low, high, D, device=device, dtype=dtype)
    rec = torch.randn(len(cell.rec), D, device=device, generator=g) * D**-0.5
    return cell, pre, rec, torch.zeros(B, len(cell.state), D, device=device)


def accuracy(name: str) -> dict[str, Any]:
    """Largest errors against the float64 loop at (2, 700, 64), in one launch (None) and in several slices."""
    out: dict[str, Any] = {"cell": name}
    for dtype, scale, slices in itertools.product((torch.float32, torch.bfloat16), (1.0, 12.0), (None, 11)):
        cell, pre, rec, h0 = inputs(name, 2, 700, 64, dtype)
        rec = rec * (scale * (64 / 2048) ** 0.5)
        fine_pre, fine_rec, fine_h0 = (x.double() for x in (pre, rec, h0))
        with torch.no_grad():
            states, _ = reference.sequential(cell, fine_pre, fine_rec, fine_h0, None)
        d = torch.randn(states[:, :, -1].shape, device="cuda").to(dtype)
        d_states = op.joined(d.double(), torch.zeros_like(states[:, :, :-1]))
        exact_gradients = reference.linear_backward(cell, fine_pre, fine_rec, fine_h0, None, states, d_states, torch.zeros_like(fine_h0))
        launch.last_report()
        emitted, saved, final, _ = launch.forward(cell, pre, rec, h0, None, slices=slices)
        tag, exact = f"{str(dtype)[6:]} weights x{scale:g}{', sliced' if slices else ', at once'}", states[:, :, -1]
        out.update({f"{tag}: {k}": v for k, v in launch.last_report().items()})
        out[f"{tag}: forward abs"] = (emitted - exact).abs().max().item()
        out[f"{tag}: forward abs of the rounded oracle"] = (exact.to(dtype) - exact).abs().max().item()
        for label, a, b in zip(
            ("pre", "rec", "h0"), launch.backward(cell, pre, rec, h0, None, emitted, saved, d, None, torch.zeros_like(final), slices=slices), exact_gradients
        ):  # fmt: skip
            if b.numel():
                out[f"{tag}: d {label} rel"] = ((a - b).norm() / b.norm()).item()
    return out


def kernel_row(name: str, B: int, T: int, D: int, copy: float, memory: float = 0.0) -> dict[str, Any]:
    """Times of the solve and of its gradient (of the emitted state's, as in a layer) against the bytes they must move: P + S values a channel
    and step forward, 2 P + S + 1 backward. memory: bias of the gate that lets the state change; at -9 it lives for 8,000 steps."""
    cell, pre, rec, h0 = inputs(name, B, T, D, torch.bfloat16)
    if memory:
        pre[:, :, 0] += memory if name == "paragru" else -memory
    P, S = len(cell.pre), len(cell.state)
    launch.last_report()
    emitted, saved, final, _ = launch.forward(cell, pre, rec, h0, None)
    report = launch.last_report()
    d_emitted, d_final = torch.randn_like(emitted), torch.zeros_like(final)
    unit, plan = B * T * D * 2 / copy, launch.plan_of(pre[:, :, :, None], S)
    row = {
        "cell": name, "B": B, "T": T, "D": D, "memory": memory, "slices": plan.slices, "at_once": isinstance(plan, launch.ShootPlan), **report,
        "forward_ms": milliseconds(lambda: launch.forward(cell, pre, rec, h0, None)), "forward_limit_ms": unit * (P + S),
        "backward_ms": milliseconds(lambda: launch.backward(cell, pre, rec, h0, None, emitted, saved, d_emitted, None, d_final)),
        "backward_limit_ms": unit * (2 * P + S + 1),
    }  # fmt: skip
    for way in ("forward", "backward"):
        row[f"{way}_over_limit"] = row[f"{way}_ms"] / row[f"{way}_limit_ms"]
    row["tokens_per_s_fwd_bwd"] = B * T / (row["forward_ms"] + row["backward_ms"]) * 1e3
    return row


def gate_row(name: str, B: int, T: int, D: int, copy: float, bias: float | str) -> dict[str, Any]:
    """Times of the solve with all pre-activations N(0, 1) and a bias on the gate that lets the state change: at -6 it lives for 400 steps. A bias in
    words, "as initialised" or "as initialised -6", comes on top of the cell's own over channels: then up to 22,000."""
    cell, pre, rec, h0 = inputs(name, B, T, D, torch.bfloat16)
    if not isinstance(bias, str):
        pre.normal_(generator=torch.Generator("cuda").manual_seed(1))
    more = float(bias.removeprefix("as initialised") or 0) if isinstance(bias, str) else bias
    pre[:, :, 0] += more if name == "paragru" else -more
    launch.last_report()
    launch.forward(cell, pre, rec, h0, None)
    report = launch.last_report()
    limit, took = B * T * D * 2 * (len(cell.pre) + len(cell.state)) / copy, milliseconds(lambda: launch.forward(cell, pre, rec, h0, None))
    return {"cell": name, "shape": [B, T, D], "bias": bias, "ms": took, "limit_ms": limit, "over": took / limit, **report}


def decode_row(name: str, B: int, D: int) -> dict[str, Any]:
    cell, pre, rec, h0 = inputs(name, B, 1, D, torch.bfloat16)
    with torch.no_grad():
        return {"cell": name, "B": B, "D": D, "ms": milliseconds(lambda: parallel_rnn_step(cell, pre[:, 0], rec, h0))}


def time_row(T: int, copy: float) -> dict[str, Any]:
    """Forward alone against T at (1, T, 2048)."""
    cell, pre, rec, h0 = inputs("paragru", 1, T, 2048, torch.bfloat16)
    forward = milliseconds(lambda: launch.forward(cell, pre, rec, h0, None), 10)
    return {"T": T, "forward_ms": forward, "limit_ms": T * 2048 * 2 * (len(cell.pre) + 1) / copy}


def memory_row(name: str, B: int, T: int, D: int, save: str) -> dict[str, Any]:
    """Peak bytes above the inputs, forward and backward, against the floor: states, the emitted one's gradient and the gradients of the inputs."""
    cell, pre, rec, _ = inputs(name, B, T, D, torch.bfloat16)
    leaves = [pre.requires_grad_(), rec.requires_grad_()] if rec.numel() else [pre.requires_grad_()]
    parallel_rnn(cell, pre, rec, emitted=True, save=save)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    states, _ = parallel_rnn(cell, pre, rec, emitted=True, save=save)
    saved = torch.cuda.memory_allocated() - base
    torch.autograd.grad(states, leaves, torch.ones_like(states))
    floor = 2 * B * T * D * (len(cell.pre) + len(cell.state) + 1)
    peak = torch.cuda.max_memory_allocated() - base
    return {"cell": name, "save": save, "saved_bytes": saved, "peak_bytes": peak, "floor_bytes": floor, "peak_over_floor": peak / floor}


def graph_row(B: int, T: int, D: int) -> dict[str, Any]:
    """Replays of a captured forward against plain launches, and torch.compile (fullgraph) against both, by value."""
    cell, pre, rec, h0 = inputs("paragru", B, T, D, torch.bfloat16)
    with torch.no_grad():
        plain = parallel_rnn(cell, pre, rec, h0)[0]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = parallel_rnn(cell, pre, rec, h0)[0]
        graph.replay()
        same = torch.equal(plain, captured)
        replay = milliseconds(graph.replay)
        compiled = torch.compile(lambda *a: parallel_rnn(cell, *a)[0], fullgraph=True)
        return {
            "B": B,
            "T": T,
            "D": D,
            "replay_equal": same,
            "replay_ms": replay,
            "compiled_equal": torch.equal(compiled(pre, rec, h0), plain),
        }


def past_int32() -> dict[str, Any]:
    cell, T, D = load_cell("mingru"), (1 << 20) + 64, 1088
    pre = torch.zeros(1, T, 2, D, device="cuda", dtype=torch.bfloat16)
    pre[:, -100:].normal_()
    none = torch.zeros(0, D, device="cuda")
    states, _ = parallel_rnn(cell, pre, none)
    tail, _ = reference.sequential(cell, pre[:, -100:].double(), none.double(), torch.zeros(1, 1, D, device="cuda").double(), None)
    return {"elements": pre.numel(), "error": (states[:, -100:] - tail).abs().max().item()}


def sweep(copy: float, keep: Callable[[dict[str, Any]], None]) -> None:
    """Launch sizes: one at a time away from the defaults; GRU and LSTM, large and small problems, short and long memories. Each row goes
    to `keep` as soon as it is there."""
    from kernels.parallel_rnn import backward_source, codegen, forward_source

    tried: list[tuple[str, tuple[Any, str] | None, int]] = [("defaults", None, 0)]
    for place, key, values in (
        (launch, "PROGRAMS", (8, 16)), (launch, "PROGRAMS_BACK", (8, 16)), (launch, "BLOCK", (32,)), (launch, "STRETCH", (64, 256)),
        (launch, "CORRECTIONS", (2, 4)), (codegen, "AHEAD", (4, 16)), (codegen, "AHEAD_BACK", (2, 8)), (forward_source, "STAGES", (3, 6)),
        (backward_source, "STAGES", (3, 6)),
    ):  # fmt: skip
        tried += [(key if place is not backward_source else "STAGES of the backward kernels", (place, key), value) for value in values]
    for label, where, value in tried:
        usual = getattr(where[0], where[1]) if where else 0
        if where:
            setattr(where[0], where[1], value)
        launch.kernels.cache_clear()
        for cell, shape, memory in itertools.product(("paragru", "paralstm"), (*SHAPES[::2], SHAPES[3]), (0.0, -5.0)):
            if memory == 0.0 or shape[1] == 32768:
                keep({"changed": f"{label}={value}" if where else label, **kernel_row(cell, *shape, copy, memory)})
        if where:
            setattr(where[0], where[1], usual)
    launch.kernels.cache_clear()
