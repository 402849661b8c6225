"""GRU as cuDNN and torch.nn.GRU write it (the reset acts after the product), with diagonal recurrent weights and their bias.

r = sigmoid(r + ar h),  z = sigmoid(z + az h),  n = tanh(n + r (an h + bn)),  h = (1 - z) n + z h
"""

import torch

from kernels.parallel_rnn.cell import Pre, Rec, State

BIAS_INIT = {"z": (0.0, 4.0)}


def step(r: Pre, z: Pre, n: Pre, ar: Rec, az: Rec, an: Rec, bn: Rec, h: State) -> tuple[State]:
    r = torch.sigmoid(r + ar * h)
    z = torch.sigmoid(z + az * h)
    n = torch.tanh(n + r * (an * h + bn))
    return (n + z * (h - n),)
