"""Random cells on random inputs against the float64 loop. A case is its seed; a failure prints the line that runs it again.

    python -m tests.kernels.generate.cells --cases 40 --seed 0                                   # plain torch
    python -m tests.kernels.generate.cells --cases 100 --device cuda --jobs 8 --out cells.json   # the kernels; goes on if cells.jsonl is there
    python -m tests.kernels.generate.cells float16 17 --device interpreter                       # case 17 by Triton's interpreter

What is allowed is a small multiple of what the fp32 loop itself loses, and the certificate's tolerance (docs/parallel_solve.md) of the
channel's own size; for 16-bit inputs the loop with 16-bit states is the measure of gradients.
"""

from __future__ import annotations

import os
import random
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.parallel_rnn import launch, op, reference
from kernels.parallel_rnn.cell import Cell, Pre, Rec, State  # noqa: F401  (names of the generated source)
from kernels.parallel_rnn.trace import trace
from tests.kernels.generate.case import Result, main
from tests.kernels.generate.roundings import most_lost, other_draws, walked, worst

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
UNARY = (
    "torch.sigmoid({})", "torch.tanh({})", "torch.exp(torch.tanh({}))", "torch.log(1.5 + torch.tanh({}))", "torch.sqrt(1.0 + ({}) * ({}))",
    "torch.nn.functional.softplus({})", "torch.relu({})", "torch.sin({})", "torch.cos({})", "torch.nn.functional.silu({})",
    "torch.nn.functional.gelu({})", "torch.clamp({}, -1.0, 1.0)", "torch.abs({})", "torch.exp2(torch.tanh({}))", "torch.log1p(torch.exp({}))",
    "torch.expm1(torch.tanh({}))", "torch.pow(1.0 + torch.sigmoid({}), 1.5)", "torch.minimum({}, 0.5 * ({}))", "torch.maximum({}, 0.1 * ({}))",
    "torch.where({} > 0.2, {}, 0.3 * ({}))", "torch.sign({})",
)  # fmt: skip
REGIMES = ("contracting", "mixed", "linear", "dips", "latching", "chaotic", "normalised", "expanding")


@dataclass
class Case:
    """All that a seed decides."""

    seed: int
    regime: str
    source: str
    B: int
    T: int
    D: int
    slices: int | None
    resets: float
    magnitude: float
    layout: str
    cotangents: str
    poison: str = ""  # what one input is: nan or inf


def expression(rng: random.Random, leaves: list[str], depth: int) -> str:
    if depth == 0 or rng.random() < 0.15:
        return rng.choice(leaves)
    if rng.random() < 0.5:
        inner = expression(rng, leaves, depth - 1)
        return rng.choice(UNARY).replace("{}", inner)
    return f"({expression(rng, leaves, depth - 1)} {rng.choice('+-*')} {expression(rng, leaves, depth - 1)})"


def make_cell(rng: random.Random, regime: str) -> str:
    """The text of a step function."""
    S = rng.choice((1, 1, 1, 1, 2, 2, 2, 3, 4))
    P, R = rng.randint(max(2, S), S + 2), rng.randint(0, 3)
    pre, rec, state = [f"x{i}" for i in range(P)], [f"w{i}" for i in range(R)], [f"s{i}" for i in range(S)]
    leaves = [*pre, *(f"{w} * {s}" for w in rec for s in state)]
    lines = []
    if regime == "normalised":  # an sLSTM: sums of exponentials, and their quotient is emitted
        body = "f = torch.sigmoid(f); i = torch.exp(x); c = f * c + i * torch.tanh(z); n = f * n + i"
        return f"def step(z: Pre, x: Pre, f: Pre, c: State, n: State, h: State):\n    {body}\n    return c, n, c / n\n"
    for i, s in enumerate(state):
        leaves_here = [*leaves, *state[:i]]
        inner = expression(rng, leaves_here, 2)
        if regime == "contracting":
            lines.append(f"f = {rng.choice((0.5, 0.9, 0.98))} * torch.sigmoid({expression(rng, leaves_here, 1)})")
            lines.append(f"{s}_ = f * {s} + (1.0 - f) * torch.tanh({inner})")
        elif regime == "mixed":
            lines.append(f"f = torch.sigmoid({pre[i % P]} + {rng.choice((-2.0, 0.0, 3.0, 6.0))})")
            lines.append(f"{s}_ = f * {s} + (1.0 - f) * torch.tanh({inner}) + 0.1 * torch.tanh({rng.choice(state)})")
        elif regime in ("linear", "dips", "expanding"):
            lines.append(f"{s}_ = {pre[0]} * {s} + {pre[-1]}" + (f" + 0.01 * {state[i - 1]}" if i else ""))
        elif regime == "latching":
            lines.append(f"{s}_ = torch.tanh({pre[0]} * {s} + {pre[-1]})" if i == 0 else f"{s}_ = 0.9 * {s} + 0.1 * {state[0]}_")
        else:  # chaotic
            lines.append(f"{s}_ = torch.tanh({rng.uniform(3, 8):.3f} * {state[i - 1]} + {inner})")
    arguments = [*(f"{n}: Pre" for n in pre), *(f"{n}: Rec" for n in rec), *(f"{n}: State" for n in state)]
    result = ", ".join(f"{s}_" for s in state) + ("," if S == 1 else "")
    return f"def step({', '.join(arguments)}):\n" + "".join(f"    {line}\n" for line in lines) + f"    return {result}\n"


def make_case(seed: int, large: bool) -> Case:
    """large: of a size for a GPU, else for a CPU."""
    rng = random.Random(seed)
    regime = REGIMES[seed % len(REGIMES)]
    source = make_cell(rng, regime)
    if large:
        B, D, T = (
            rng.choice((1, 1, 2, 3)),
            rng.choice((1, 2, 17, 33, 64, 65, 96)),
            rng.choice((1, 2, 31, 127, 128, 129, 257, 509, 1021, 1536, 2049, 2503)),
        )
        slices = rng.choice((None, None, 2, 3, 5, 8, 16))
    else:
        B, D, T, slices = rng.choice((1, 2)), rng.choice((1, 2, 5, 16)), rng.choice((1, 2, 7, 23, 36, 48, 61)), rng.choice((2, 3, 4))
    if seed % 16 == 15:  # a slice in which the product of the Jacobians overflows (`make_inputs`)
        T, slices = max(T, 48), 2
    low, high = {"linear": (-8, 8), "dips": (-8, 4), "expanding": (-8, 0), "latching": (-6, 0)}.get(regime, (-1, 1))
    return Case(
        seed, regime, source, B, T, D, slices, rng.choice((0.0, 0.0, 0.02, 0.1)), 10.0 ** rng.uniform(low, high),
        rng.choice(("plain", "plain", "heads", "time", "expanded")), rng.choice(("all", "emitted", "final")),
        rng.choice(("nan", "inf", "", "", "", "", "", "")),
    )  # fmt: skip


def make_inputs(case: Case, cell: Cell, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """pre (B, T, P, D) in dtype, rec and h0 in fp32, starts, on the CPU."""
    g = torch.Generator().manual_seed(case.seed)
    B, T, D, P, S = case.B, case.T, case.D, len(cell.pre), len(cell.state)
    pre = torch.randn(B, T, P, D, generator=g)
    rec = torch.randn(len(cell.rec), D, generator=g) * (3.0 if case.regime == "chaotic" else 0.5)
    h0 = torch.randn(B, S, D, generator=g) * (0.0 if case.seed % 3 == 0 else 1.0)
    size = case.magnitude
    if case.regime in ("dips", "latching", "expanding", "linear"):
        pre[:, :, -1] *= size
        h0 = h0 * size if case.regime != "latching" else h0
        t, decay = torch.arange(T)[:, None], torch.rand(T, D, generator=g)
        if case.regime == "linear":
            gate = torch.sigmoid(pre[:, :, 0] + 2)
        elif case.regime == "expanding":
            gate = 1.0 + 60.0 / max(T, 60) * decay
            if case.seed % 16 == 15:  # fp32 holds the states, not the product of their Jacobians
                gate = torch.where((t < 31).expand(T, D), 64.0, 1.0)
                pre[:, :, -1], h0 = pre[:, :, -1] * 1e-30 / size, h0 * 1e-30 / size
        else:  # falls for a while and comes back as far, again and again; nothing else is put in on the way
            span = max(4, min(T // 2, 90))
            down = (t // span + torch.arange(D)[None]) % 2 == 0
            gate = torch.where(down, 0.5 + 0.1 * (decay > 0.5), 1 / (0.5 + 0.1 * (decay.roll(span, 0) > 0.5)))
            gate = torch.where(t < span * 4, gate, 0.9 + 0 * gate) if case.seed % 2 else gate
            pre[:, 1:, -1] *= (torch.rand(B, T - 1, D, generator=g) < 0.01).float()
        pre[:, :, 0] = gate
    elif case.regime == "normalised":
        pre[:, :, cell.pre.index("x")] -= 16.5 * (case.seed // 8 % 2)
        pre[:, :, cell.pre.index("f")] += 3.0
        h0 = h0.abs() * 1e-6 + 1e-7
    else:
        pre *= size
    starts = torch.rand(B, T, generator=g) < (0.2 if case.poison else case.resets) if case.resets or case.poison else None
    if case.poison:
        pre[-1, T // 2, case.seed % P, case.seed % D] = float(case.poison)
    return pre.to(dtype), rec, h0, starts


def arranged(pre: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    if layout == "time":
        return pre.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "expanded":
        return pre.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    if layout == "heads" and pre.shape[3] % 2 == 0:
        heads = pre.unflatten(3, (2, -1)).permute(3, 0, 1, 2, 4).contiguous()
        return heads.permute(1, 2, 3, 0, 4)
    return pre


def by_loop(cell: Cell, inputs: tuple[Any, ...], cotangents: tuple[Tensor, Tensor], dtype: torch.dtype) -> list[Tensor]:
    """(states, final, gradients of pre, rec, h0) of the loop under autograd, as fp64."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs[:3]]
    states = walked(cell, leaves[0], leaves[1], leaves[2], inputs[3])
    final = states[:, -1] if states.shape[1] else leaves[2]
    loss = (states * cotangents[0].to(dtype)).sum() + (final * cotangents[1].to(dtype)).sum()
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [x.detach().double() for x in (states, final, *(torch.zeros_like(a) if b is None else b for a, b in zip(leaves, gradients)))]


def solve(
    cell: Cell, case: Case, inputs: tuple[Any, ...], cotangents: tuple[Tensor, Tensor], device: str
) -> tuple[list[Tensor], dict[str, float]]:
    """What `by_loop` returns, by the kernels (a GPU, or the interpreter) or in plain torch, and what is to be reported."""
    pre, rec, h0 = (x.to(device) for x in inputs[:3])
    starts = None if inputs[3] is None else inputs[3].to(device)
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        dtype = reference.compute_dtype(pre)
        with torch.no_grad():
            states = reference.solve(cell, pre.to(dtype), rec, h0, starts, case.slices)
        report = {
            "sequential": float(reference.last_report.corrections >= reference.last_report.slices - 1 > 1),
            "sequential_backward": 0.0,
            "ms": 0.0,
        }
        kept = states.to(inputs[0].dtype).to(dtype)
        gradients = reference.linear_backward(
            cell, pre.to(dtype), rec, h0, starts, kept, cotangents[0].to(dtype), cotangents[1].to(dtype), case.slices
        )
        return [x.double() for x in (kept, states[:, -1], *gradients)], report
    pre = arranged(pre, case.layout)
    d_emitted, d_kept = op.parts(cotangents[0].to(device, inputs[0].dtype))
    launch.last_report()
    emitted, kept, final, _ = launch.forward(cell, pre, rec, h0, starts, slices=case.slices)
    gradients = launch.backward(cell, pre, rec, h0, starts, emitted, kept, d_emitted, d_kept, cotangents[1].to(device), slices=case.slices)
    report = {**launch.last_report(), "ms": 0.0}
    if device != "cpu":
        torch.cuda.synchronize()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        launch.forward(cell, pre, rec, h0, starts, slices=case.slices)
        end.record()
        torch.cuda.synchronize()
        report["ms"] = start.elapsed_time(end)
        launch.last_report()
    found = [op.joined(emitted, kept), final, gradients[0].reshape(inputs[0].shape), *gradients[1:]]
    return [x.cpu().double() for x in found], report


def documents(starts: Tensor | None, B: int, T: int) -> Tensor:
    return torch.zeros(B, T, dtype=torch.long) if starts is None else starts.long().cumsum(1)


def finite_documents(values: Tensor, documents_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, T, D) bool: whether all values (B, T, X, D) of the step's document and channel are finite and not about to overflow."""
    bad = ~(values.abs() < min(1e30, torch.finfo(dtype).max / 2)).all(2)
    out = torch.ones_like(bad)
    for b in range(len(values)):
        for document in documents_BT[b].unique():
            here = documents_BT[b] == document
            out[b, here] = ~bad[b, here].any(0)
    return out


def judge(case: Case, cell: Cell, dtype: torch.dtype, device: str) -> tuple[float, dict[str, float], list[str]]:
    """Runs a case. Returns the share of what is allowed that the states lose, what the solver reports, and problems, sentences."""
    inputs = make_inputs(case, cell, dtype)
    g = torch.Generator().manual_seed(case.seed + 1)
    B, T, D, S = case.B, case.T, case.D, len(cell.state)
    d_states, d_final = torch.randn(B, T, S, D, generator=g).to(dtype).float(), torch.randn(B, S, D, generator=g)
    if case.cotangents == "emitted":
        d_states[:, :, :-1] = 0
    if case.cotangents == "final":
        d_states = d_states * 0
    if case.seed % 5 == 0:
        d_states, d_final = d_states * 1e-6, d_final * 1e-6
    cotangents = (d_states.to(dtype).float(), d_final)
    exact, rough = by_loop(cell, inputs, cotangents, torch.float64), by_loop(cell, inputs, cotangents, torch.float32)
    computed, report = solve(cell, case, inputs, cotangents, device)
    tolerance, eps, low = reference.TOLERANCE[dtype], torch.finfo(dtype).eps, dtype != torch.float32
    times = max(30.0, 2 * tolerance / torch.finfo(torch.float32).eps)
    document = documents(inputs[3], B, T)
    fine = finite_documents(torch.cat([exact[0], rough[0]], 2), document, dtype)
    problems = []
    mask = fine[:, :, None].expand_as(exact[0])
    rounding = eps / 2 * exact[0].abs() if low else torch.zeros_like(exact[0])
    size = torch.where(mask, exact[0].abs(), 0.0).flatten(0, -2).amax(0)
    over = (computed[0] - exact[0]).abs() - rounding
    gap, lost_by_loop = torch.where(mask, over, 0.0).flatten(0, -2).amax(0), worst(rough[0], exact[0], mask)
    smallest = 1e-37 if dtype != torch.float16 else 6e-8
    gap = (gap - smallest).clamp(min=0)
    ratio = (gap / (times * lost_by_loop + 4 * tolerance * size).clamp(min=1e-300)).max().item()
    if not ratio <= 1 and case.regime == "chaotic":  # one loop may have had a lucky draw, and every rounding grows
        lost_by_loop = torch.maximum(lost_by_loop, most_lost(cell, inputs, exact[0], mask))
        ratio = (gap / (times * lost_by_loop + 4 * tolerance * size).clamp(min=1e-300)).max().item()
    if not ratio <= 1 or not torch.isfinite(computed[0][mask]).all():
        problems.append(f"states off by {ratio:.3g} times what is allowed")
    lost = ~fine & ~torch.isfinite(rough[0].to(dtype)).all(2)
    if bool((torch.isfinite(computed[0]).all(2) & lost & ~torch.isfinite(rough[0]).all(2)).any()):
        problems.append("what is not finite in the loop is finite")
    problems += judge_gradients(case, cell, inputs, cotangents, exact, rough, computed, fine, dtype)
    return ratio, report, problems


def judge_gradients(
    case: Case, cell: Cell, inputs: tuple[Any, ...], cotangents: tuple[Tensor, Tensor], exact: list[Tensor], rough: list[Tensor], computed: list[Tensor],
    fine: Tensor, dtype: torch.dtype,
) -> list[str]:  # fmt: skip
    """Of channels whose gradients are finite in both loops, and far from overflow."""
    low, problems = dtype != torch.float32, []
    eps, tolerance = torch.finfo(dtype).eps, reference.TOLERANCE[dtype]
    rounded, around = [torch.zeros_like(x) for x in exact], [exact[0].to(dtype).double()] if low else []
    if trace(
        cell
    ).kinks:  # on which side of one a state lies that is nothing but rounding, as a difference of equal terms, is nobody's choice
        least = 1e-7 * exact[0].abs().amax((0, 1), keepdim=True)
        around += [exact[0] + least, exact[0] - least]
    for states in around:
        fp64 = [x.double() for x in inputs[:3]]
        again = reference.linear_backward(cell, *(*fp64, inputs[3], states, cotangents[0].double(), cotangents[1].double(), 1))
        rounded[2:] = [torch.maximum(r, (a - b).abs()) for r, a, b in zip(rounded[2:], again, exact[2:])]
    there = fine[:, :, None] & torch.isfinite(rough[2]) & (rough[2].abs() < min(1e30, torch.finfo(dtype).max / 2))
    if not torch.isfinite(computed[2][there]).all():
        problems.append("gradients are not finite where the loop's are")
    every = fine.all(1).all(0) & torch.stack([(x.flatten(0, -2).abs() < 1e30).all(0) for x in (*exact[2:], *rough[2:]) if x.numel()]).all(0)
    given = torch.maximum(*(c.double().abs().flatten(0, -2).amax(0) for c in cotangents))
    draws: list[tuple[Tensor, ...]] = []
    for k, (name, want, loop, other, got) in enumerate(zip(("pre", "rec", "h0"), exact[2:], rough[2:], rounded[2:], computed[2:])):
        if not want.numel() or not every.any():
            continue
        axes = tuple(range(want.dim() - 1)) if name != "pre" else (0, 1)
        size = want.abs().amax(axes)
        size = torch.maximum(size, 0.1 * size.amax(0)) if name == "pre" else size  # of terms that cancel, rounding is left
        allowed = (
            100 * (loop - want).abs().amax(axes) + 3 * other.abs().amax(axes) + (max(1e-5, 20 * tolerance) + (4 * eps if low else 0)) * size
        )
        # terms that cancel wholly in the loops leave their rounding where products and sums are one instruction
        allowed = torch.where(size + loop.abs().amax(axes) == 0, 1e-6 * given, allowed)
        gap = ((got - want).abs().amax(axes) - (1e-36 if dtype != torch.float16 else 1e-6)).clamp(min=0)
        ratio = torch.where(every, gap / allowed.clamp(min=1e-300), 0.0).nan_to_num(nan=torch.inf).max().item()
        if not ratio <= 1 and not low:
            draws = draws or other_draws(cell, inputs, cotangents, exact[0])
            lost = torch.stack([(draw[k] - want).abs().amax(axes) for draw in draws]).nan_to_num(nan=0.0, posinf=0.0).amax(0)
            allowed = torch.maximum(allowed, 4 * lost)
            ratio = torch.where(every, gap / allowed.clamp(min=1e-300), 0.0).nan_to_num(nan=torch.inf).max().item()
        if not ratio <= 1:
            problems.append(f"gradient of {name} off by {ratio:.3g} times what is allowed")
    return problems


def run_case(dtype: str, seed: int, device: str) -> Result:
    """Of a dtype's name, a seed, and cpu, interpreter or cuda."""
    case, began = make_case(seed, device == "cuda"), time.monotonic()
    sizes = ", ".join(f"{name} {value}" for name, value in asdict(case).items() if name not in ("seed", "source"))
    # what walks in order for a reason that is no regime's is counted by itself
    group = f"{case.regime} {case.poison or ('overflow' if case.regime == 'expanding' and seed % 16 == 15 else '')}".strip()
    result = Result(dtype, seed, device, True, group, f"{sizes}\n{case.source}")
    names: dict[str, Any] = {"torch": torch, "Pre": Pre, "Rec": Rec, "State": State}
    exec(case.source, names)
    try:
        cell = Cell.from_step(names["step"], f"generated_{seed}")
        if not cell.lowered:
            result.group = "not lowered"
            return result
        result.share, result.numbers, problems = judge(case, cell, DTYPES[dtype], "cuda" if device == "cuda" else "cpu")
    except Exception as problem:  # any is a finding, told with the line that runs it again
        problems = [f"{type(problem).__name__}: {problem}"[:500]]
    result.ok, result.error, result.seconds = not problems, "; ".join(problems), round(time.monotonic() - began, 2)
    return result


def usable(dtype: str, device: str) -> bool:
    """Those that are run if none is named."""
    return dtype != "float16"


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(min(100, main("tests.kernels.generate.cells", [*DTYPES], run_case, usable, every=True)))
