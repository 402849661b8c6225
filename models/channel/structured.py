"""SwiGLU whose maps are products of two smaller ones, with a dense helper that guides them through the first part of training.

Source: Wei et al. 2024, "Building on Efficient Foundations: Effectively Training LLMs with Structured Feedforward Layers" (arXiv 2406.16450).
A map W (out, in) becomes left(right(x)) by one of three structures:

    lowrank       right (r, in), left (out, r)
    blockdense    right of b diagonal blocks (r / b, in / b), left (out, r)
    blockshuffle  both of b diagonal blocks, through min(in, out) numbers that are dealt out to all blocks in between (Monarch)

Self-guided training adds a dense W that starts as left right and is mixed in, a W x + (1 - a) left(right(x)), with a falling from 1 to 0 as a cosine
over the first `guide` of the run. It trains only: evaluation, decoding and export see the structured maps alone.

Legend: D model width, F inner width, b blocks, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels.linear import linear
from models.init import Module, init_matrix, tag
from models.layers import RMSNorm, SwiGLU

STRUCTURES = ("lowrank", "blockdense", "blockshuffle")


@dataclass
class Config:
    structure: str = "lowrank"
    rank: float = 0.5  # r / D, of lowrank and blockdense
    blocks: int = 2  # of blockdense and blockshuffle
    guide: float = 0.0  # share of the run that the dense helper guides; 0: none
    rate_power: float = 0.0  # a factor's learning rate is that of its map times (the map's inputs / its own) to this power

    def problems(self, d_model: int, d_ff: int) -> list[str]:
        if self.structure not in STRUCTURES:
            return [f"structure is {self.structure!r}; choose one of {', '.join(STRUCTURES)}."]
        problems = []
        if self.structure != "blockshuffle" and not 1 <= self.rank * d_model <= min(d_model, d_ff):
            problems.append(
                f"rank {self.rank:g} is a share of d_model {d_model}, and has to give at least 1 and at most the smaller width."
            )
        if self.structure != "lowrank" and (self.blocks < 1 or d_model % self.blocks or d_ff % self.blocks):
            problems.append(f"blocks {self.blocks} does not divide the widths {d_model} and {d_ff}; choose a divisor of both.")
        if not 0 <= self.guide <= 1:
            problems.append(f"guide is a share of the run from 0 to 1, not {self.guide:g}.")
        if not -2 <= self.rate_power <= 2:
            problems.append(f"rate_power is a power from -2 to 2, most often 0, 0.5 or 1, not {self.rate_power:g}.")
        return problems


class Blocks(Module):
    """A map of b diagonal blocks: (..., in) -> (..., out), each block (in / b, out / b)."""

    def __init__(self, inputs: int, outputs: int, blocks: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(blocks, inputs // blocks, outputs // blocks))
        tag(self.weight, fan_in=inputs // blocks, splits=[outputs // blocks])

    def forward(self, x: Tensor) -> Tensor:
        b, width, _ = self.weight.shape
        y_bMN = torch.bmm(x.reshape(-1, b, width).transpose(0, 1), self.weight)
        return y_bMN.transpose(0, 1).reshape(*x.shape[:-1], -1)


class StructuredLinear(Module):
    """x (..., in) -> (..., out), through `between` numbers. dense: the helper's map, if it is guided."""

    def __init__(self, inputs: int, outputs: int, config: Config, rank: int, residual: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features, self.blocks, self.residual = inputs, outputs, config.blocks, residual
        self.shuffled = config.structure == "blockshuffle"
        between = min(inputs, outputs) if self.shuffled else rank
        blocked = config.structure != "lowrank"
        self.right = Blocks(inputs, between, config.blocks) if blocked else nn.Linear(inputs, between, bias=False)
        self.left = Blocks(between, outputs, config.blocks) if self.shuffled else nn.Linear(between, outputs, bias=False)
        self.dense = nn.Linear(inputs, outputs, bias=False) if config.guide else None
        if config.rate_power:
            for factor, width in ((self.right, inputs), (self.left, between)):
                fan_in = width // (config.blocks if isinstance(factor, Blocks) else 1)
                tag(factor.weight, rate=(inputs / fan_in) ** config.rate_power)
        for layer in (self.left, self.dense) if residual else ():
            if layer is not None:
                tag(layer.weight, residual=True)

    def forward(self, x: Tensor, mixed: Tensor | None) -> Tensor:
        """mixed: the helper's share, or None where there is none."""
        h = _product(self.right, x)
        y = _product(self.left, _dealt(h, self.blocks) if self.shuffled else h)
        y = _dealt(y, self.out_features // self.blocks) if self.shuffled else y
        return y if mixed is None or self.dense is None else torch.lerp(y, linear(x, self.dense), mixed.to(y.dtype))

    @torch.no_grad()
    def merged(self) -> Tensor:
        """(out, in): the dense map that computes the same, multiplied in fp64."""
        h = _matrix(self.right).T
        y = (_dealt(h, self.blocks) if self.shuffled else h) @ _matrix(self.left).T
        y = _dealt(y, self.out_features // self.blocks) if self.shuffled else y
        return y.T.float().contiguous()

    @torch.no_grad()
    def init_weights(self, std: float, n_layers: int) -> None:
        """lowrank: the nearest map of its rank to a normal one of `std`, its singular values split evenly. Blocks: orthonormal. All together are of
        the size (Frobenius) that a normal map of `std` has: a nearest map left as small as it comes learns late, and guidance does not make up
        for that. The helper starts as their product. All is drawn on the CPU, see `normal_`."""
        whole = nn.Parameter(torch.empty(self.out_features, self.in_features))
        init_matrix(tag(whole, residual=True) if self.residual else whole, std, n_layers)
        if isinstance(self.right, nn.Linear):
            left, right = _nearest(whole, self.right.out_features)
            self.right.weight.copy_(right)
            self.left.weight.copy_(left)
        else:
            for layer in (self.right, self.left):
                for block in layer.weight if isinstance(layer, Blocks) else [layer.weight]:
                    block.copy_(nn.init.orthogonal_(torch.empty(block.shape)))
        gain = (whole.norm() / self.merged().norm().cpu()).sqrt().item()
        self.right.weight.mul_(gain)
        self.left.weight.mul_(gain)
        if self.dense is not None:
            self.dense.weight.copy_(self.merged())

    def flops_per_token(self, guided: bool) -> int:
        dense = 2 * self.dense.weight.numel() if guided and self.dense is not None else 0
        return 2 * (self.right.weight.numel() + self.left.weight.numel()) + dense


def _nearest(whole: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """left (out, r) and right (r, in), whose product is the nearest to `whole` of that rank, the singular values split evenly. By the eigenvectors of
    the smaller Gram matrix, half the time of a singular value decomposition; the largest values are far from zero."""
    wide = whole.shape[1] > whole.shape[0]
    tall = whole.T if wide else whole
    values, vectors = torch.linalg.eigh(tall.T @ tall)
    V, S = vectors[:, -rank:], values[-rank:].sqrt()
    left, right = tall @ V / S.sqrt(), (V * S.sqrt()).T
    return (right.T, left.T) if wide else (left, right)


def _product(layer: nn.Linear | Blocks, x: Tensor) -> Tensor:
    return linear(x, layer) if isinstance(layer, nn.Linear) else layer(x)  # type: ignore[no-any-return]


def _matrix(layer: nn.Linear | Blocks) -> Tensor:
    """(out, in) in fp64."""
    return layer.weight.double() if isinstance(layer, nn.Linear) else torch.block_diag(*(block.T for block in layer.weight.double()))


def _dealt(h: Tensor, rows: int) -> Tensor:
    """The numbers of h, which lie in `rows` rows, read column by column."""
    return h.unflatten(-1, (rows, -1)).transpose(-1, -2).flatten(-2)


class Channel(SwiGLU):
    """mixed: the helpers' share in all maps of this layer; guided: whether they are there in training now."""

    one_last_product = False
    mixed: Tensor

    def __init__(self, config: Config, d_model: int, d_ff: int) -> None:
        Module.__init__(self)  # all maps are others than SwiGLU's
        rank = (
            max(1, round(config.rank * d_model / config.blocks)) * config.blocks
            if config.structure == "blockdense"
            else round(config.rank * d_model)
        )
        self.config, self.guided = config, config.guide > 0
        self.gate = StructuredLinear(d_model, d_ff, config, rank)
        self.up = StructuredLinear(d_model, d_ff, config, rank)
        self.down = StructuredLinear(d_ff, d_model, config, rank, residual=True)
        self.register_buffer("mixed", torch.ones(()), persistent=False)

    def _share(self) -> Tensor | None:
        return self.mixed if self.guided and self.training else None

    def gate_and_up(self, x_BTD: Tensor) -> tuple[Tensor, ...]:
        return self.gate(x_BTD, self._share()), self.up(x_BTD, self._share())

    def out(self, inner_BTF: Tensor) -> Tensor:
        return self.down(inner_BTF, self._share())  # type: ignore[no-any-return]

    def follow(self, share: float) -> bool:
        """a = (1 + cos(pi share / guide)) / 2 up to the end of the guided part, where the helpers are left out."""
        before, self.guided = self.guided, share < self.config.guide
        self.mixed.fill_(0.5 + 0.5 * math.cos(math.pi * share / self.config.guide) if self.guided else 0.0)
        return before != self.guided

    def init_weights(self, std: float, n_layers: int) -> None:
        for layer in (self.gate, self.up, self.down):
            layer.init_weights(std, n_layers)

    def flops_per_token(self) -> int:
        return self.inner_flops_per_token() + self.down.flops_per_token(self.guided and self.training)  # type: ignore[no-any-return]

    def inner_flops_per_token(self) -> int:
        guided = self.guided and self.training
        return self.gate.flops_per_token(guided) + self.up.flops_per_token(guided)  # type: ignore[no-any-return]

    def plain_weights(self) -> dict[str, Tensor]:
        return {f"{name}.weight": getattr(self, name).merged() for name in ("gate", "up", "down")}

    def fused_step(self, x_BD: Tensor, norm: RMSNorm, keep_D: Tensor | None) -> Callable[[], None] | None:
        return None
