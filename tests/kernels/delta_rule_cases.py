"""Problems for the tests of the delta rule, and the float64 loop's answers to them; used with and without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.delta_rule.reference import delta_rule_sequential

NAMES = ("q", "k", "v", "beta", "g", "h0")


def problem(
    B: int,
    T: int,
    H: int,
    V: int,
    G: int,
    K: int,
    n: int = 1,
    *,
    dtype: torch.dtype = torch.float32,
    starts: float = 0.0,
    decay: float = 0.1,
    largest: float = 2.0,
    unit: bool = False,
    device: str = "cpu",
) -> tuple[list[Tensor], Tensor | None]:
    """q, k, v, beta, g, h0 and starts; q, k and v are parts of one tensor, as in the model. decay: the largest -g; half of the gates are a
    thousandth of that. largest: of beta. unit: keys of norm 1, for where the op does not normalise them."""
    r = torch.Generator().manual_seed(T * 7 + V + n)
    joint = torch.randn(B, T, G * K + n * (G * K + H * V), generator=r)
    q, k, v = joint.split([G * K, n * G * K, n * H * V], -1)
    if unit:
        k = torch.nn.functional.normalize(k.reshape(B, T * n, G, K), dim=-1).reshape(k.shape)
        joint = torch.cat([q, k, v], -1)
    q, k, v = joint.to(device, dtype).split([G * K, n * G * K, n * H * V], -1)
    gate = -decay * torch.rand(B, T, H, generator=r) * torch.where(torch.rand(B, T, H, generator=r) < 0.5, 1.0, 1e-3)
    beta, h0 = largest * torch.rand(B, T * n, H, generator=r), torch.randn(B, H, V, K, generator=r)
    new = torch.rand(B, T, generator=r) < starts if starts else None
    shaped = [q.unflatten(-1, (G, K)), k.reshape(B, T * n, G, K), v.reshape(B, T * n, H, V)]
    return [*shaped, *(t.to(device) for t in (beta, gate, h0))], None if new is None else new.to(device)


def answers(
    rule: Callable[..., Any], tensors: list[Tensor], starts: Tensor | None, do: Tensor, d_final: Tensor, **options: Any
) -> list[Tensor]:
    """o, final state, and the gradients of NAMES."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    o, final = rule(*leaves, starts, **options)
    made = torch.autograd.grad((o, final), leaves, (do.to(o.dtype), d_final.to(final.dtype)))
    return [o.detach(), final.detach(), *made]


def oracle(tensors: list[Tensor], starts: Tensor | None, do: Tensor, d_final: Tensor, **options: Any) -> list[Tensor]:
    return answers(delta_rule_sequential, [t.double() for t in tensors], starts, do.double(), d_final.double(), **options)


def asked(tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Gradients of the outputs and of the final state, drawn from torch's global generator."""
    q, v, h0 = tensors[0], tensors[2], tensors[5]
    do = torch.randn(*q.shape[:2], *v.shape[2:], device=q.device).to(v.dtype)
    return do, torch.randn(h0.shape, device=h0.device)


def distance(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-9)).item()
