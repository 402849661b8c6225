"""Rotary positions beyond the plain ones: scaled for longer texts (linear, dynamic, yarn, llama3), or on a part of the head only.

A scaling is a mapping with transformers' names: {rope_type: llama3, factor: 8, low_freq_factor: 1, high_freq_factor: 4,
original_max_position_embeddings: 8192}. Each number is rounded where transformers rounds it: far out, another rounding is another angle.

Legend: J pairs of columns that are turned, K head width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import is_eager

NEEDED: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
OPTIONAL: dict[str, tuple[str, ...]] = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
}


def rope_problems(width: int, fraction: float, theta: float, scaling: dict[str, Any]) -> list[str]:
    """Why heads of `width` columns cannot have these rotary positions, one sentence for each problem."""
    if not 0 < fraction <= 1:
        return [f"rope_fraction must lie above 0 and be at most 1, not {fraction}; rope=false switches positions off."]
    if not 0 < theta < math.inf:
        return [f"rope_theta must be above zero, not {theta}."]
    turned = int(width * fraction)
    if turned % 2 or not turned:
        part = "" if fraction == 1 else f", and rope_fraction leaves {turned} of {width} columns"
        return [f"rotary positions need an even head width, not {turned if fraction == 1 else width}{part}."]
    return scaling_problems(scaling, theta, turned) if scaling else []


def scaling_problems(scaling: dict[str, Any], theta: float, dim: int) -> list[str]:
    """What is wrong with `scaling` for `dim` turned columns, one sentence for each problem."""
    kind = scaling.get("rope_type")
    if kind not in NEEDED:
        return [f"rope_scaling.rope_type is {kind!r}; choose {', '.join(NEEDED)}, or null for none."]
    known, problems = {"rope_type", *NEEDED[kind], *OPTIONAL.get(kind, ())}, []
    for key in scaling:
        if key not in known:
            problems.append(f"rope_scaling.{key} is nothing that {kind} has; it takes {', '.join(sorted(known))}.")
    for key in NEEDED[kind]:
        if key not in scaling:
            problems.append(f"rope_scaling.{key} is missing, which {kind} needs.")
    for key, value in scaling.items():
        if key not in known or key == "rope_type":
            continue
        if key == "truncate":
            if not isinstance(value, bool):
                problems.append(f"rope_scaling.truncate must be true or false, not {value!r}.")
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
            problems.append(f"rope_scaling.{key} must be a number above zero, not {value!r}.")
    if problems:
        return problems
    if kind == "llama3" and not scaling["low_freq_factor"] < scaling["high_freq_factor"]:
        problems.append("rope_scaling.low_freq_factor must be below high_freq_factor.")
    if kind == "yarn" and theta <= 1:
        problems.append(f"yarn needs a rope_theta above one, not {theta}.")
    if kind == "dynamic" and dim <= 2:
        problems.append("dynamic scaling needs more than two turned columns.")
    return problems


def unscaled(dim: int, base: Any) -> Tensor:
    """(J,) frequencies of `dim` turned columns to a base (a number, or a tensor without dimensions)."""
    return 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))


def llama3(dim: int, theta: float, scaling: dict[str, Any]) -> Tensor:
    """Long waves are stretched, short ones kept, those between blended (Llama 3.1)."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    length, turns = scaling["original_max_position_embeddings"], unscaled(dim, theta)
    waves = 2 * math.pi / turns
    stretched = torch.where(waves > length / low, turns / factor, turns)
    smooth = (length / waves - low) / (high - low)
    between = ~(waves < length / high) & ~(waves > length / low)
    return torch.where(between, (1 - smooth) * stretched / factor + smooth * stretched, stretched)


def yarn(dim: int, theta: float, scaling: dict[str, Any]) -> Tensor:
    """Waves that turn often within the original length are kept, those that turn seldom stretched, with a ramp between (arXiv 2309.00071)."""

    def column(rotations: float) -> float:
        return (dim * math.log(scaling["original_max_position_embeddings"] / (rotations * 2 * math.pi))) / (2 * math.log(theta))

    low, high = column(scaling.get("beta_fast", 32)), column(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)).clamp(0, 1)
    original_share, powers = 1 - ramp, theta ** (torch.arange(0, dim, 2).to(torch.float32) / dim)
    return 1.0 / (scaling["factor"] * powers) * (1 - original_share) + 1.0 / powers * original_share


def yarn_scale(scaling: dict[str, Any]) -> float:
    """The factor by which YaRN multiplies the turned columns of queries and keys."""
    factor = scaling["factor"]

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return magnitude(scaling["mscale"]) / magnitude(scaling["mscale_all_dim"])
    return magnitude(1.0)


class Rope:
    """The rotary frequencies of one mixer, computed once for each device. scale: a factor on the turned columns."""

    def __init__(self, dim: int, theta: float, scaling: dict[str, Any]) -> None:
        self.dim, self.theta, self.scaling = dim, theta, dict(scaling)
        self.kind = scaling.get("rope_type", "default")
        self.scale = yarn_scale(scaling) if self.kind == "yarn" else 1.0
        self.by_device: dict[str, Tensor] = {}

    def _fixed(self) -> Tensor:
        if self.kind == "llama3":
            return llama3(self.dim, self.theta, self.scaling)
        if self.kind == "yarn":
            return yarn(self.dim, self.theta, self.scaling)
        turns = unscaled(self.dim, self.theta)
        return turns / self.scaling["factor"] if self.kind == "linear" else turns

    def frequencies(self, positions_T: Tensor) -> Tensor:
        """(J,) frequencies on the device of `positions`. Under dynamic scaling they stretch with the largest position of this call once it
        lies beyond the original length, as in transformers; tokens that are in a cache already keep the angles of the call that read
        them."""
        device = str(positions_T.device)
        fixed = self.by_device.get(device)
        if fixed is None:
            fixed = self._fixed().to(positions_T.device)
            recorded = positions_T.is_cuda and is_eager(positions_T) and torch.cuda.is_current_stream_capturing()
            if (
                is_eager(positions_T) and not recorded and device != "meta"
            ):  # memory from a CUDA graph's capture belongs to that graph: do not reuse it
                self.by_device[device] = fixed
        return fixed if self.kind != "dynamic" or not positions_T.numel() else self._stretched(positions_T.max() + 1, fixed)

    def of_lengths(self, lengths: Tensor) -> Tensor:
        """(..., J) frequencies under dynamic scaling of tokens whose documents have these lengths (...): those of the documents alone."""
        return self._stretched(lengths[..., None], self._fixed().to(lengths.device))

    def _stretched(self, context: Tensor, fixed: Tensor) -> Tensor:
        factor, length = self.scaling["factor"], self.scaling["original_max_position_embeddings"]
        context = context.clamp(min=length)
        base = self.theta * ((factor * context / length) - (factor - 1)) ** (self.dim / (self.dim - 2))
        columns = torch.arange(0, self.dim, 2, dtype=torch.float32, device=context.device) / self.dim
        return torch.where(context > length, 1.0 / base**columns, fixed)
