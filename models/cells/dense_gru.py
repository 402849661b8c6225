"""GRU with dense heads as cuDNN and torch.nn.GRU write it: the reset acts after the product.

r = sigmoid(r + Rr h),  z = sigmoid(z + Rz h),  n = tanh(n + r (Rn h + bn)),  h = (1 - z) n + z h
"""

import torch

from kernels.parallel_rnn.cell import Mat, Pre, Rec, State

BIAS_INIT = {"z": (0.0, 4.0)}


def step(r: Pre, z: Pre, n: Pre, Rr: Mat, Rz: Mat, Rn: Mat, bn: Rec, h: State) -> tuple[State]:
    r = torch.sigmoid(r + Rr @ h)
    z = torch.sigmoid(z + Rz @ h)
    n = torch.tanh(n + r * (Rn @ h + bn))
    return (n + z * (h - n),)
