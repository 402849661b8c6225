"""Accuracy, then speed, of the delta rule on one GPU, with fla's kernels in the same run where they start; JSON to --out, written after every part.

python -m scripts.bench.delta_rule --out docs/results/delta_rule/gpu.json                  # accuracy, kernels, parts, peers: three minutes
python -m scripts.bench.delta_rule --out train.json --parts training                       # a 400M hybrid against the Transformer, four minutes
python -m scripts.bench.delta_rule --out fla.json --parts kernels,peers --shapes 0,1 --ahead 14    # beside fla at the two shapes that have bars
python -m scripts.bench.delta_rule --out sweep.json --parts sweep                          # tiles, warps and stages; builds many kernels

--ahead compiles the kernels of the chosen parts first, in so many processes; those of fla in all their configurations, of which its tuner then times
each at every shape anew.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.delta_rule import delta_rule, launch, reference
from models.config import ModelConfig
from models.lm import LanguageModel
from scripts.bench.timing import Results, attempted, copy_bandwidth, milliseconds, seconds, unmeasured
from scripts.studies.options import refuse

# B, T, heads, key width, value width, updates a token. The first two have bars: forward, forward and backward, in milliseconds.
SHAPES = [
    (4, 2048, 16, 128, 128, 1),
    (4, 4096, 64, 128, 128, 1),
    (4, 2048, 16, 128, 128, 2),
    (16, 2048, 8, 128, 128, 1),
    (1, 32768, 16, 128, 128, 1),
]
BARS = {SHAPES[0]: (0.4, 1.5), SHAPES[1]: (2.0, 6.5)}
PUBLISHED = {SHAPES[0]: (0.75, 2.09), SHAPES[1]: (1.58, 5.96)}  # fla's chunk_gdn on a GB200
TFLOPS = 745e9  # operations a millisecond of a large bf16 product on an H100, measured
DTYPES = ("bfloat16", "float16", "float32")
NAMES = ("o", "final", "dq", "dk", "dv", "dbeta", "dg", "dh0")


def inputs(B: int, T: int, H: int, K: int, V: int, n: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """As a fresh model sees them: step sizes log-uniform in [0.001, 0.1], A in (0, 16); q, k and v parts of one tensor."""
    r = torch.Generator("cuda").manual_seed(0)
    joint = torch.empty(B, T, H * K + n * H * (K + V), device="cuda", dtype=dtype).normal_(generator=r)
    q, k, v = joint.split([H * K, n * H * K, n * H * V], -1)
    dt = torch.exp(torch.rand(B, T, H, device="cuda", generator=r) * 4.6 - 6.9)
    g = -dt * 16 * torch.rand(H, device="cuda", generator=r)
    beta = torch.sigmoid(torch.randn(B, T * n, H, device="cuda", generator=r))
    return [q.unflatten(-1, (H, K)), k.reshape(B, T * n, H, K), v.reshape(B, T * n, H, V), beta, g]


def both(rule: Callable[..., Any], tensors: list[Tensor], do: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    o, *_ = rule(*leaves)
    return [o, *torch.autograd.grad(o, leaves, do.to(o.dtype))]


def ours(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, h0: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return delta_rule(q, k, v, beta, g, h0, normalize=True, scale=q.shape[-1] ** -0.5)


def theirs() -> Callable[..., Any]:
    """fla's function with our arguments. Raises ImportError where it is not installed."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # type: ignore[import-not-found,unused-ignore]

    def rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Any:
        return chunk_gated_delta_rule(q, k, v, g, beta, scale=q.shape[-1] ** -0.5, use_qk_l2norm_in_kernel=True)

    return rule


def accuracy(names: Sequence[str] = DTYPES, updates: Sequence[int] = (1, 2)) -> dict[str, Any]:
    """Relative distances from the float64 loop at (2, 700): of the kernels, and of the loop's own answer rounded to the dtype."""
    out: dict[str, Any] = {}
    for dtype in (getattr(torch, name) for name in names):
        for n in updates:
            tensors = inputs(2, 700, 4, 128, 128, n, dtype)
            h0 = torch.randn(2, 4, 128, 128, device="cuda")
            do, d_final = torch.randn(2, 700, 4, 128, device="cuda").to(dtype), torch.randn_like(h0)

            def answers(rule: Callable[..., Any], given: list[Tensor], do: Tensor = do, d_final: Tensor = d_final) -> list[Tensor]:
                leaves = [t.detach().requires_grad_() for t in given]
                o, final = rule(*leaves)
                return [o, final, *torch.autograd.grad((o, final), leaves, (do.to(o.dtype), d_final.to(final.dtype)))]

            exact = functools.partial(reference.delta_rule_sequential, normalize=True, scale=128**-0.5)
            wanted = answers(exact, [t.double() for t in (*tensors, h0)])
            for name, a, b in zip(NAMES, answers(ours, [*tensors, h0]), wanted):
                rounded = ((b.to(dtype).double() - b).norm() / b.norm()).item()
                out[f"{str(dtype)[6:]} n={n} {name}"] = {"error": ((a.double() - b).norm() / b.norm()).item(), "of rounding": rounded}
    return out


def limits(shape: tuple[int, ...], copy: float) -> dict[str, float]:
    """The least bytes and operations, as times: inputs and outputs once (backward: inputs, gradients of both), chunks of 64."""
    B, T, H, K, V, n = shape
    read, written, gates = 2 * B * T * H * (K + n * (K + V)), 2 * B * T * H * V, 4 * B * T * H * (1 + n)
    steps, Q = B * T * n * H, launch.CHUNK
    forward = 2 * steps * (Q * (K + K / 2 + V / 2 + K / 2 + V / 2) + 3 * K * V)
    return {
        "forward_byte_limit_ms": (read + written + gates) / copy,
        "forward_backward_byte_limit_ms": (3 * read + 2 * written + 3 * gates) / copy,
        "forward_flop_limit_ms": forward / TFLOPS,
        "forward_backward_flop_limit_ms": 3.5 * forward / TFLOPS,
    }


def kernel_row(shape: tuple[int, ...], copy: float, repeats: int = 10) -> dict[str, Any]:
    B, T, H, _, V, n = shape
    tensors, do = inputs(*shape), torch.randn(B, T, H, V, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        forward = milliseconds(lambda: ours(*tensors), repeats)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    total = milliseconds(lambda: both(ours, tensors, do), repeats)
    row = {
        "shape": list(shape), "forward_ms": forward, "forward_backward_ms": total, **limits(shape, copy),
        "peak_bytes_beyond_inputs": torch.cuda.max_memory_allocated() - before,
    }  # fmt: skip
    if shape in BARS:
        row |= {"bars_ms": BARS[shape], "published_fla_gb200_ms": PUBLISHED[shape]}
        row["within_bars"] = forward <= BARS[shape][0] and total <= BARS[shape][1]
    return row


def peer_row(shape: tuple[int, ...], repeats: int = 10) -> dict[str, Any]:
    """fla's kernels on the same tensors: time, and how far its outputs are from ours."""
    if shape[-1] > 1:
        return {"shape": list(shape), "skipped": "several updates a token"}
    rule, tensors = theirs(), inputs(*shape)
    do = torch.randn(*shape[:3], shape[4], device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        o = rule(*tensors)[0]
        row: dict[str, Any] = {"shape": list(shape), "forward_ms": milliseconds(lambda: rule(*tensors), repeats)}
        row["distance_from_ours"] = ((o.float() - ours(*tensors)[0].float()).norm() / o.float().norm()).item()
    row["forward_backward_ms"] = attempted(lambda: milliseconds(lambda: both(rule, tensors, do), repeats))
    return row


def parts(shape: tuple[int, ...]) -> dict[str, float]:
    """Device time of each kernel, forward and backward, in milliseconds."""
    tensors, do = inputs(*shape), torch.randn(*shape[:3], shape[4], device="cuda", dtype=torch.bfloat16)
    both(ours, tensors, do)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(3):
            both(ours, tensors, do)
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda e: -e.device_time_total)
    return {f"{e.key[:60]} x{e.count // 3}": round(e.device_time_total / 3e3, 4) for e in events[:16]}


def training(pattern: list[str], T: int, rows: int, at_most: float = 15.0) -> dict[str, Any]:
    """Tokens a second of a 400M model's whole step (32,768 tokens in micro-batches of `rows` sequences, bf16 autocast, fused AdamW)."""
    attention: dict[str, Any] = {"type": "attention", "n_heads": 8}
    gated = {**attention, "qk_norm": True, "output_gate": True}
    mixers = {"plain": attention, "gated": gated, "delta": {"type": "delta", "n_heads": 8}}
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(vocab_size=50432, d_model=1024, n_layers=24, pattern=pattern, mixers=mixers))
    model.init_weights(0)
    model = model.cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, 50432, (32768 // T, T), device="cuda")

    def step() -> None:
        for part in tokens.split(rows):
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(part, labels=part).loss_sum / tokens.numel()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    device, times = torch.device("cuda"), list[float]()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        seconds(step, device)
    while len(times) < 8 and sum(times) < at_most:
        times.append(seconds(step, device))
    ms = 1e3 * statistics.median(times)
    return {
        "pattern": pattern, "T": T, "micro_batch": rows, "step_ms": ms, "tokens_per_s": 32768 / ms * 1e3,
        "peak_bytes": torch.cuda.max_memory_allocated(), "parameters": sum(p.numel() for p in model.parameters()),
    }  # fmt: skip


def train_all(results: Results) -> None:
    """The hybrid (3:1) and the Transformer at the same lengths, and their ratio."""
    for T, rows in ((2048, 8), (8192, 2), (32768, 1)):
        rates = []
        for name, pattern in (("transformer", ["plain"]), ("hybrid", ["delta", "delta", "delta", "gated"])):
            row = attempted(functools.partial(training, pattern, T, rows))
            torch.cuda.empty_cache()
            results.item("training", f"{name} T={T}", row)
            rates.append(row.get("tokens_per_s", 0.0))
        if all(rates):
            results.item("training", f"ratio T={T}", rates[1] / rates[0])


def changes() -> list[tuple[str, launch.Tile]]:
    rows = []
    for name, tile in launch.NARROW.items():
        tried = {"columns": (32, 64, 128), "warps": (2, 4, 8), "stages": (2, 3), "registers": (0, 128, 168)}
        rows += [(name, replace(tile, **{size: value})) for size, values in tried.items() for value in values]
    return [(name, tile) for name, tile in rows if tile != launch.NARROW[name]]


def sweep(results: Results, copy: float) -> None:
    """One size at a time away from the constants."""
    usual = dict(launch.NARROW)

    def times() -> Any:
        rows = [attempted(functools.partial(kernel_row, shape, copy, 5)) for shape in SHAPES[:2]]
        return [[round(r["forward_ms"], 4), round(r["forward_backward_ms"], 4)] if "forward_ms" in r else r["error"][:120] for r in rows]

    results.append("sweep", {"kernel": "", "times_ms": times()})
    for name, tile in changes():
        launch.NARROW[name] = tile
        results.append("sweep", {"kernel": name, "tile": str(tile), "times_ms": times()})
        launch.NARROW[name] = usual[name]


def tried_in_shares(number: int, count: int) -> None:
    """From here on Triton's tuner, in this process, tries every `count`-th configuration only, or one at least."""
    from triton.runtime.autotuner import Autotuner

    make = Autotuner.__init__

    def make_some(self: Any, fn: Any, arg_names: Any, configs: Any, *rest: Any, **more: Any) -> None:
        make(self, fn, arg_names, configs[number % max(1, len(configs)) :: count] if configs else configs, *rest, **more)

    Autotuner.__init__ = make_some  # type: ignore[method-assign, unused-ignore]


def compile_of(job: tuple[Any, ...]) -> str:
    """Compiles what a part at a shape runs, in a process of its own; nothing, or why it could not."""
    part, *what = job
    if part == "peers":
        tried_in_shares(*what[1:])
    run: dict[str, Callable[[], Any]] = {
        "accuracy": lambda: accuracy(*what), "kernels": lambda: kernel_row(what[0], 1.0),
        "peers": lambda: dict(enumerate(map(peer_row, what[0]))),
    }  # fmt: skip
    with unmeasured():
        row = attempted(run[part])
    return f"{job}: {row['error']}" if "error" in row else ""


def compile_ahead(parts_wanted: list[str], dtypes: list[str], shapes: Sequence[tuple[int, ...]], processes: int) -> None:
    jobs: list[tuple[Any, ...]] = []
    if "accuracy" in parts_wanted:
        jobs += [("accuracy", [name], [n]) for name in reversed(dtypes) for n in (2, 1)]  # what takes longest first
    if "kernels" in parts_wanted or "split" in parts_wanted:
        jobs += [("kernels", shape) for shape in dict.fromkeys(shapes)]
    if "peers" in parts_wanted:
        jobs += [("peers", [*dict.fromkeys(shapes)], number, processes) for number in range(processes)]
    with multiprocessing.get_context("spawn").Pool(processes, maxtasksperchild=1) as pool:
        for complaint in pool.imap_unordered(compile_of, jobs):
            if complaint:
                print(complaint, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", default="accuracy,kernels,split,peers")
    parser.add_argument(
        "--shapes",
        default=",".join(map(str, range(len(SHAPES)))),
        help="numbers of SHAPES in this file; one that is named twice is measured again",
    )
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="of the accuracy")
    parser.add_argument("--ahead", type=int, default=0, help="processes that compile before anything is measured")
    arguments = parser.parse_args()
    lists = {"parts": ("accuracy", "kernels", "split", "peers", "training", "sweep"), "dtypes": DTYPES}
    refuse(parser, arguments, lists={**lists, "shapes": [str(i) for i in range(len(SHAPES))]})
    if not torch.cuda.is_available():
        sys.exit("This measures a GPU, and there is none here.")
    wanted, dtypes = arguments.parts.split(","), arguments.dtypes.split(",")
    shapes = [SHAPES[int(number)] for number in arguments.shapes.split(",")]
    if arguments.ahead > 0:
        compile_ahead(wanted, dtypes, shapes, arguments.ahead)
    copy = copy_bandwidth()
    sizes = {name: str(tile) for name, tile in launch.NARROW.items()}
    results = Results(arguments.out, torch.device("cuda"), sizes=sizes, copy_bytes_per_ms=copy)
    if "accuracy" in wanted:
        results.keep("accuracy", attempted(functools.partial(accuracy, dtypes)))
    for place, shape in enumerate(shapes):
        title = f"{shape} again" if shape in shapes[:place] else f"{shape}"
        if "kernels" in wanted:
            results.keep(f"kernels {title}", attempted(functools.partial(kernel_row, shape, copy)))
        if "peers" in wanted:
            results.keep(f"fla {title}", attempted(functools.partial(peer_row, shape)))
    if "split" in wanted:
        for shape in dict.fromkeys(shapes[:3]):
            results.keep(f"split {shape}", attempted(functools.partial(parts, shape)))
    if "training" in wanted:
        train_all(results)
    if "sweep" in wanted:
        sweep(results, copy)


if __name__ == "__main__":
    main()
