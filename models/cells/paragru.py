"""ParaGRU (arXiv 2510.21450, equation 3.1): the GRU of Cho et al. with diagonal recurrent weights; the reset acts before the product.

z = sigmoid(z + az h),  r = sigmoid(r + ar h),  c = tanh(c + ac (h r)),  h = (1 - z) h + z c
"""

import torch

from kernels.parallel_rnn.cell import Pre, Rec, State

BIAS_INIT = {"z": (0.0, -4.0)}  # over the channels: memories from two steps to some fifty


def step(z: Pre, r: Pre, c: Pre, az: Rec, ar: Rec, ac: Rec, h: State) -> tuple[State]:
    z = torch.sigmoid(z + az * h)
    r = torch.sigmoid(r + ar * h)
    c = torch.tanh(c + ac * (h * r))
    return (h + z * (c - h),)
