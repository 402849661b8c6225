"""swiglu: silu(gate) up, in one pass over its inputs and, backward, one more."""

from __future__ import annotations

from torch import Tensor

from kernels.swiglu import op, reference


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of two tensors of one shape, in gate's dtype; rounded once, where torch's two operations round twice."""
    return op.product(gate, up) if op.use_triton(gate, up) else reference.swiglu(gate, up)
