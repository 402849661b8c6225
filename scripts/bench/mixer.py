"""Accuracy, then speed, of what surrounds the recurrence in a mixer on one GPU: short convolution with SiLU, gated norm, whole mixers, and
a profile of where a mixer's time goes. Limits are bytes at the copy bandwidth measured in the same run. JSON to --out.

    python -m scripts.bench.mixer --out docs/results/mixer/gpu.json            # a minute
    python -m scripts.bench.mixer --out sweep.json --sweep                     # launch sizes of the kernels too
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.gated_norm import op as norm_op
from kernels.gated_norm import reference as norm_reference
from kernels.short_conv import op as conv_op
from kernels.short_conv import reference as conv_reference
from models import mixers
from scripts.bench.timing import Results, attempted, copy_bandwidth, milliseconds

SHAPES = [(16, 2048, 2048), (1, 32768, 2048)]
MIXERS: dict[str, dict[str, Any]] = {
    "paragru": {"type": "rnn"},
    "paralstm": {"type": "rnn", "cell": "paralstm"},
    "mamba2": {"type": "mamba2"},
}


def inputs(B: int, T: int, D: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """x and gate are the halves of one projection, as in a mixer."""
    torch.manual_seed(0)
    projected = torch.randn(B, T, 2 * D, device="cuda", dtype=dtype)
    return {
        "x": projected[..., :D], "gate": projected[..., D:], "h": torch.randn(B, T, D, device="cuda", dtype=dtype),
        "dy": torch.randn(B, T, D, device="cuda", dtype=dtype), "weight": torch.randn(D, 4, device="cuda") / 2,
        "bias": torch.randn(D, device="cuda"), "norm": torch.randn(D, device="cuda"), "history": torch.randn(B, 3, D, device="cuda", dtype=dtype),
        "starts": torch.rand(B, T, device="cuda") < 0.01,
    }  # fmt: skip


def gaps(ours: list[Tensor], exact: list[Tensor], names: list[str], largest: bool = False) -> dict[str, float]:
    """||ours - exact|| / ||exact|| of each tensor by name; largest: also the largest absolute error of the first one, the output."""
    out = {name: float((a.double() - b).norm() / b.norm()) for name, a, b in zip(names, ours, exact)}
    return out | ({"y_abs": float((ours[0].double() - exact[0]).abs().max())} if largest else {})


def accuracy(dtype: torch.dtype) -> dict[str, Any]:
    """Errors against torch's own gradients in float64, at (2, 700, 96); for the output, those of the rounded oracle beside them."""
    from kernels.gated_norm import launch as norm_launch
    from kernels.short_conv import launch as conv_launch

    p = inputs(2, 700, 96, dtype)
    fine = {k: v.double().requires_grad_() for k, v in p.items() if k not in ("starts", "dy")}
    conv = [p["x"], p["history"], p["weight"], p["bias"], p["starts"], True]
    oracle = conv_reference.short_conv(fine["x"], fine["history"], fine["weight"], fine["bias"], p["starts"], True)
    gradients = torch.autograd.grad(oracle, [fine[k] for k in ("x", "history", "weight", "bias")], p["dy"].double())
    got = [conv_launch.convolve(*conv), *conv_launch.convolve_backward(p["dy"], *conv)]
    out = {"conv": gaps(got, [oracle.detach(), *gradients], ["y", "dx", "dhistory", "dweight", "dbias"], True)}
    out["conv"]["y_abs_of_the_rounded_oracle"] = float((oracle.to(dtype) - oracle).detach().abs().max())
    for name, gate, first in (("norm then gate", True, True), ("gate then norm", True, False), ("norm", False, False)):
        leaves = [fine["h"], fine["gate"] if gate else None, fine["norm"]]
        oracle = norm_reference.gated_norm(fine["h"], fine["gate"] if gate else None, fine["norm"], 1e-5, 1, first)
        gradients = torch.autograd.grad(oracle, [leaf for leaf in leaves if leaf is not None], p["dy"].double())
        norm_arguments = (p["h"], p["gate"] if gate else None, p["norm"], 1e-5, 1, first)
        got = [norm_launch.norm(*norm_arguments, dtype), *(g for g in norm_launch.norm_backward(p["dy"], *norm_arguments) if g is not None)]
        out[name] = gaps(got, [oracle.detach(), *gradients], ["y", "dh", *(["dgate"] if gate else []), "dweight"], True)
        out[name]["y_abs_of_the_rounded_oracle"] = float((oracle.to(dtype) - oracle).detach().abs().max())
    return out


def kernel_rows(B: int, T: int, D: int, copy: float) -> dict[str, Any]:
    """bf16; reads and writes of (B, T, D) each pass needs: 2 and 3 (convolution), 3 and 5 (gated norm), 2 and 3 (norm)."""
    from kernels.gated_norm import launch as norm_launch
    from kernels.short_conv import launch as conv_launch

    p = inputs(B, T, D, torch.bfloat16)
    conv = (p["x"], None, p["weight"], p["bias"], None, True)
    packed = (p["x"], None, p["weight"], p["bias"], p["starts"], True)
    gated, first = (p["h"], p["gate"], p["norm"], 1e-5, 1, True), (p["h"], p["gate"], p["norm"], 1e-5, 1, False)
    plain = (p["h"], None, p["norm"], 1e-5, 1, False)
    passes: dict[str, tuple[int, Callable[[], Any]]] = {
        "conv forward": (2, lambda: conv_launch.convolve(*conv)),
        "conv backward": (3, lambda: conv_launch.convolve_backward(p["dy"], *conv)),
        "conv forward, documents": (2, lambda: conv_launch.convolve(*packed)),
        "conv backward, documents": (3, lambda: conv_launch.convolve_backward(p["dy"], *packed)),
        "norm, gate forward": (3, lambda: norm_launch.norm(*gated, torch.bfloat16)),
        "norm, gate backward": (5, lambda: norm_launch.norm_backward(p["dy"], *gated)),
        "gate, norm forward": (3, lambda: norm_launch.norm(*first, torch.bfloat16)),
        "gate, norm backward": (5, lambda: norm_launch.norm_backward(p["dy"], *first)),
        "norm forward": (2, lambda: norm_launch.norm(*plain, torch.bfloat16)),
        "norm backward": (3, lambda: norm_launch.norm_backward(p["dy"], *plain)),
        "torch rms_norm forward": (2, lambda: torch.nn.functional.rms_norm(p["h"], (D,), p["norm"].bfloat16(), 1e-5)),
    }
    rows: dict[str, Any] = {}
    for name, (units, run) in passes.items():
        took, limit = milliseconds(run, 15), units * B * T * D * 2 / copy
        rows[name] = {"ms": took, "limit_ms": limit, "over_limit": took / limit}
    return {"B": B, "T": T, "D": D, "passes": rows}


@contextmanager
def kernels_off() -> Iterator[None]:
    """The same mixers with convolution, norm and gate in plain torch."""
    before = conv_op.use_triton, norm_op.use_triton
    conv_op.use_triton, norm_op.use_triton = (lambda x: False), (lambda h, groups: False)
    try:
        yield
    finally:
        conv_op.use_triton, norm_op.use_triton = before


def step_of(name: str, B: int, T: int, D: int, autocast: bool) -> Callable[[], Any]:
    """Forward and backward of a mixer with every gradient: fp32 weights under autocast as in training, or all in bf16."""
    torch.manual_seed(0)
    mixer = mixers.build(MIXERS[name], D, 0)
    mixer.init_weights(0.02, 24)
    mixer = mixer.cuda() if autocast else mixer.cuda().to(torch.bfloat16)
    x = torch.randn(B, T, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(B, T, D, device="cuda", dtype=torch.bfloat16)

    def step() -> Any:
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            y = mixer(x)[0]
        return y.detach(), *torch.autograd.grad(y, (x, *mixer.parameters()), dy)

    return step


def mixer_row(name: str, B: int, T: int, D: int) -> dict[str, Any]:
    repeats = 3 if name == "mamba2" else 10
    row: dict[str, Any] = {"mixer": name, "B": B, "T": T, "D": D}
    for label, autocast in (("autocast", True), ("bf16", False)):
        step = step_of(name, B, T, D, autocast)
        row[f"{label}_ms"] = milliseconds(step, repeats)
        with kernels_off():
            row[f"{label}_torch_ms"] = milliseconds(step, repeats)
        del step
        torch.cuda.empty_cache()
    small = step_of(name, 2, 300, 256, True)
    ours = small()
    with kernels_off():
        plain = small()
    row["largest_relative_difference_to_torch"] = max(float((a - b).norm() / b.norm().clamp(min=1e-6)) for a, b in zip(ours, plain))
    return row


def profile(name: str, B: int, T: int, D: int) -> list[dict[str, Any]]:
    """The 15 kernels that take most device time in a step, milliseconds and calls a step."""
    step, steps = step_of(name, B, T, D, True), 3
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]) as record:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    events = [e for e in record.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in events) / steps / 1e3
    rows = [{"kernel": e.key[:110], "ms": e.self_device_time_total / steps / 1e3, "calls": e.count / steps} for e in events[:15]]
    return [{"kernel": "all", "ms": total, "calls": sum(e.count for e in events) / steps}, *rows]


def sweep(B: int, T: int, D: int, copy: float) -> list[dict[str, Any]]:
    """Launch sizes away from the defaults."""
    from kernels.gated_norm import launch as norm_launch
    from kernels.short_conv import launch as conv_launch

    p = inputs(B, T, D, torch.bfloat16)
    conv, gated = (p["x"], None, p["weight"], p["bias"], None, True), (p["h"], p["gate"], p["norm"], 1e-5, 1, True)
    rows = []

    def tried(module: Any, units: int, run: Callable[[], Any], **values: tuple[int, ...]) -> None:
        before = {name: getattr(module, name) for name in values}
        for choice in itertools.product(*values.values()):
            for name, value in zip(values, choice):
                setattr(module, name, value)
            row: dict[str, Any] = {**dict(zip(values, choice)), "over_limit": milliseconds(run, 7) / (units * B * T * D * 2 / copy)}
            rows.append(row)
            print(row, flush=True)
        for name, value in before.items():
            setattr(module, name, value)

    tried(conv_launch, 2, lambda: conv_launch.convolve(*conv), BLOCK=(128, 256), UNROLL=(4, 8), SLICE=(32, 64, 128))
    back = {"BLOCK_BACK": (64, 128), "UNROLL_BACK": (2, 4, 8), "SLICE_BACK": (64, 128, 256)}
    tried(conv_launch, 3, lambda: conv_launch.convolve_backward(p["dy"], *conv), **back)
    tried(norm_launch, 3, lambda: norm_launch.norm(*gated, torch.bfloat16), PER_WARP=(256, 512, 1024))
    tried(norm_launch, 5, lambda: norm_launch.norm_backward(p["dy"], *gated), PER_WARP_BACK=(128, 256, 512))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sweep", action="store_true", help="also time other launch sizes")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("This benchmark needs a CUDA device.")
    copy = copy_bandwidth()
    results = Results(arguments.out, torch.device("cuda"), copy_bytes_per_ms=copy)

    def keep(key: str, make: Callable[..., Any], *values: Any) -> None:
        results.keep(key, attempted(lambda: make(*values)))

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        keep(f"accuracy {str(dtype)[6:]}", accuracy, dtype)
    for shape in SHAPES:
        keep(f"kernels {shape}", kernel_rows, *shape, copy)
    for name in MIXERS:
        for shape in SHAPES[: 1 if name == "mamba2" else 2]:
            keep(f"mixer {name} {shape}", mixer_row, name, *shape)
        keep(f"profile {name}", profile, name, *SHAPES[0])
    if arguments.sweep:
        keep("sweep", sweep, *SHAPES[0], copy)


if __name__ == "__main__":
    main()
