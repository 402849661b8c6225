"""The custom ops everywhen::swiglu and its backward. Saved for backward are the inputs."""

from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import direct, no_triton
from kernels.swiglu import reference


def use_triton(gate: Tensor, up: Tensor) -> bool:
    return gate.dtype == up.dtype != torch.float64 and gate.shape == up.shape and not no_triton(gate.device)


def _product(gate: Tensor, up: Tensor) -> Tensor:
    if use_triton(gate, up) and gate.numel():
        from kernels.swiglu import triton as kernels

        with torch.cuda.device_of(gate):  # Triton launches on the current device
            return kernels.product(gate, up)
    return reference.swiglu(gate, up).contiguous()


product_op = torch.library.custom_op("everywhen::swiglu", _product, mutates_args=())


@product_op.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


def _backward(d: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    if use_triton(gate, up) and gate.numel():
        from kernels.swiglu import triton as kernels

        with torch.cuda.device_of(gate):
            return kernels.product_backward(d, gate, up)
    d_gate, d_up = reference.swiglu_backward(d, gate, up)
    return d_gate.contiguous(), d_up.contiguous()


backward_op = torch.library.custom_op("everywhen::swiglu_backward", _backward, mutates_args=())
product_backward = direct(backward_op, _backward)


@backward_op.register_fake
def _(d: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor]:
    return product_backward(d, *ctx.saved_tensors)


product = direct(product_op, _product, _save, _differentiate)
