"""The op everywhen::swiglu. Saved for backward are the inputs."""

import torch
from torch import Tensor

from kernels.dispatch import no_triton
from kernels.op import define
from kernels.swiglu import reference


def use_triton(gate: Tensor, up: Tensor) -> bool:
    return gate.dtype == up.dtype != torch.float64 and gate.shape == up.shape and not no_triton(gate.device)


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    from kernels.swiglu import triton

    return triton.product(gate, up)


def _backward(d: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    from kernels.swiglu import triton

    return triton.product_backward(d, gate, up)


product, product_op = define(
    "swiglu",
    _forward,
    lambda gate, up: gate.new_empty(gate.shape),
    _backward,
    reference=reference.swiglu,
    reference_backward=reference.swiglu_backward,
)
