"""rotary: queries and keys turned by their positions (Su et al. 2021), both in one pass."""

from __future__ import annotations

from torch import Tensor

from kernels.rotary import op, reference


def rotary(
    q_BHTK: Tensor, k_BGTK: Tensor, positions_T: Tensor, theta: float, frequencies_J: Tensor | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Both with the pair (i, i + K/2) of every head turned by positions / theta^(2i/K), in their dtype; angles and products in fp32 (fp64 for
    fp64). positions (T,) int64. Strides are free; what the kernel returns lies as (B, T, heads, K). Differentiable in q and k.

    frequencies (J <= K/2,): angles of a step of one position instead of theta's, for the pairs (i, i + J); later columns stay as they are.
    scale: a factor on what is turned. Positions (B, 1, T) with frequencies (B, 1, T, J), each row's and token's own, are turned in plain torch."""
    if positions_T.ndim == 1 and op.use_triton(q_BHTK, k_BGTK):
        return op.turn(q_BHTK, k_BGTK, positions_T, theta, False, frequencies_J, scale)
    return reference.rotary(q_BHTK, k_BGTK, positions_T, theta, frequencies_J, scale)
