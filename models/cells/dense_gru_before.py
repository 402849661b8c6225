"""GRU of Cho et al. (arXiv 1406.1078) with dense heads: the reset acts before the product, so that a step is two products in a row.

r = sigmoid(r + Rr h),  z = sigmoid(z + Rz h),  n = tanh(n + Rn (r h)),  h = (1 - z) n + z h
"""

import torch

from kernels.parallel_rnn.cell import Mat, Pre, State

BIAS_INIT = {"z": (0.0, 4.0)}


def step(r: Pre, z: Pre, n: Pre, Rr: Mat, Rz: Mat, Rn: Mat, h: State) -> tuple[State]:
    r = torch.sigmoid(r + Rr @ h)
    z = torch.sigmoid(z + Rz @ h)
    n = torch.tanh(n + Rn @ (r * h))
    return (n + z * (h - n),)
