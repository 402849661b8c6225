"""Random problems for what an optimizer does with lists of tensors, and for its symmetric products.

Legend: k matrices, r rows, c columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.symmetric import symmetric
from kernels.symmetric.sizes import DEPTH, TILE
from kernels.tensor_lists import momentum_and_update, take_step, total_norm
from tests.kernels.generate.answers import compared, products
from tests.kernels.generate.case import Answers, Draw


def norm_of_many(draw: Draw) -> Answers:
    sizes = [draw.size(4096, 65536, 65537, 300000, small=(1, 3, 8, 500, 4095, 4097, 65540)) for _ in range(draw.choice([1, 2, 7]))]
    size = draw.magnitude(-6, 6)
    tensors = [(size * draw.randn(n)).to(draw.device) for n in sizes]
    beside = draw.chance(0.2)  # of the 16 bytes at which wide loads begin
    given = [torch.cat([t[:1], t])[1:] if beside else t for t in tensors]
    whole = torch.cat(tensors)
    return compared(["norm"], [total_norm(given)], [whole.double().norm()], [whole.norm()], f"{sizes}, beside {beside}")


def ends_of_muon(draw: Draw) -> Answers:
    """The two ends of a step of Muon."""
    K, R, side = draw.choice([1, 2, 5]), draw.size(100, 1024, 2816, small=(1, 3, 8, 17, 40)), draw.choice([1, 1, 2, 3])
    C = side * draw.size(100, 256, 1024, small=(1, 4, 5, 12, 33))
    dtype = torch.bfloat16 if draw.device == "cuda" and draw.chance(0.5) else torch.float32
    nesterov, divide, size, keep = draw.chance(0.5), draw.chance(0.5), draw.magnitude(-6, 6), draw.choice([1.0, 0.99])
    g, m, w = ([(size * draw.randn(R, C)).to(draw.device) for _ in range(K)] for _ in range(3))
    divisor = torch.tensor(1 + 3 * draw.random(), device=draw.device) if divide else None

    def loop(kind: torch.dtype) -> list[Tensor]:
        momentum, moved, updates = [], [], []
        for gradient, old, weight in zip(g, m, w):
            gradient = gradient.to(kind) / (1.0 if divisor is None else divisor.to(kind))
            new = old.to(kind) + 0.05 * (gradient - old.to(kind))
            x = gradient + 0.95 * (new - gradient) if nesterov else new
            momentum.append(new)
            updates += list(x.split(C // side, 1))
            moved.append(keep * weight.to(kind) - 0.3 * x.to(dtype).to(kind))
        return [torch.stack(momentum), torch.stack(updates), torch.stack(moved)]

    own, weights = torch.stack(m), [t.clone() for t in w]
    x, _ = momentum_and_update(g, [0] * K, own, 0.95, nesterov, side, dtype, divisor)
    take_step(weights, [0] * K, (R, C), x, keep, 0.3, side)
    found = [own, x, torch.stack(weights)]
    described = f"k {K}, r {R}, c {C}, side {side}, {dtype}, nesterov {nesterov}, divided {divide}"
    return compared(["momentum", "update", "weights"], found, loop(torch.float64), loop(torch.float32), described, 2.0, dtype)


def symmetric_product(draw: Draw) -> Answers:
    """Whole tiles, which the kernel takes, and others, which torch does."""
    K, M = draw.choice([1, 2, 3]), draw.size(384, 1024, 1000, small=(1, 5, 2 * TILE))
    N = draw.size(1024, 2816, small=(1, 7, DEPTH, 2 * DEPTH))
    dtype = draw.choice([torch.float32, torch.float16])
    x = (draw.randn(K, M, N) / N**0.5).to(draw.device, dtype)
    x = x.mT.contiguous().mT if draw.chance(0.5) else x
    add = symmetric(x) if draw.chance(0.5) else None
    alpha, beta, diagonal = draw.choice([(1.0, 0.0, 0.0), (2.0315, -4.775, 0.0), (2.0315, -4.775, 3.4445)])
    each = (0.5 + draw.rand(K)).to(draw.device) if draw.chance(0.3) else None  # numbers of each matrix

    def exact(kind: torch.dtype) -> list[Tensor]:
        product = alpha * x.to(kind) @ x.to(kind).mT
        product = product if add is None else product + beta * add.to(kind)
        product = product + diagonal * torch.eye(M, dtype=kind, device=x.device)
        return [product if each is None else product * each[:, None, None].to(kind)]

    found = [symmetric(x, None, add, *(n if each is None else n * each for n in (alpha, beta, diagonal)))]
    described = f"k {K}, m {M}, n {N}, {dtype}, added {add is not None}, diagonal {diagonal}, each {each is not None}"
    return compared(["product"], found, exact(torch.float64), exact(torch.float32), described, products(draw, dtype), draw.within(dtype))
