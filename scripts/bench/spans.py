"""What ran on the device while something was profiled: spans of kernels, their union, and what of it belonged to NCCL alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

Span = tuple[float, float, str]  # begin, end in microseconds, name of the kernel


def device_spans(run: Callable[[], Any]) -> list[Span]:
    """Kernels and copies of `run`, in order of their beginning."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
        torch.cuda.synchronize()
    return sorted((float(e.time_range.start), float(e.time_range.end), e.name) for e in profile.events() if is_kernel(e))


def is_kernel(event: Any) -> bool:
    """Whether a profiler's event is something that ran on the device, and no mark around kernels. Names of kernels of torch may hold a #, as lambdas
    have it."""
    if event.device_type.name != "CUDA" or getattr(event, "is_user_annotation", False):
        return False
    return not event.name.startswith(("nccl:", "ProfilerStep", "Optimizer.", "## "))


def covered(spans: Iterable[Span]) -> float:
    """Length of the union of spans that come in order."""
    total, end = 0.0, float("-inf")
    for first, last, _ in spans:
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


def exposed(spans: list[Span], steps: int = 1) -> dict[str, Any]:
    """Milliseconds of a step, of `steps` that were profiled: its span, in how much of it kernels of ours ran, NCCL's, NCCL's with none of ours beside, and
    nothing; NCCL's kernels and the longest of ours by name, and the longest gaps of all steps with what ran before and after."""
    if not spans:
        return {}
    ours, nccl = [s for s in spans if "nccl" not in s[2].lower()], [s for s in spans if "nccl" in s[2].lower()]
    span, busy = max(s[1] for s in spans) - spans[0][0], covered(spans)
    gaps, end, before = [], spans[0][1], spans[0][2]
    for first, last, name in spans[1:]:
        if first > end:
            gaps.append((round((first - end) / 1e3, 3), before[:50], name[:50]))
        if last > end:
            end, before = last, name

    def ms(microseconds: float) -> float:
        return round(microseconds / 1e3 / steps, 2)

    return {
        "span_ms": ms(span), "kernels_alone_ms": ms(covered(ours)), "nccl_ms": ms(covered(nccl)), "nccl_alone_ms": ms(busy - covered(ours)),
        "idle_ms": ms(span - busy), "launches": len(spans) // steps, "nccl": {k: ms(v) for k, v in by_name(nccl).items()},
        "longest": {k: ms(v) for k, v in list(by_name(ours).items())[:15]}, "gaps": sorted(gaps, reverse=True)[:15],
    }  # fmt: skip


def by_name(spans: list[Span]) -> dict[str, float]:
    """Microseconds of the kernels of a name, the longest first."""
    total: dict[str, float] = {}
    for first, last, name in spans:
        key = name.replace("(anonymous namespace)::", "").split("(")[0][:60]
        total[key] = total.get(key, 0.0) + last - first
    return dict(sorted(total.items(), key=lambda item: -item[1]))
