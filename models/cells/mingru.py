"""minGRU (arXiv 2410.01201, section 3.1): gates of the input alone, so the recurrence is linear in its state.

z = sigmoid(z),  h = (1 - z) h + z c
"""

import torch

from kernels.parallel_rnn.cell import Pre, State

BIAS_INIT = {"z": (0.0, -4.0)}


def step(z: Pre, c: Pre, h: State) -> tuple[State]:
    z = torch.sigmoid(z)
    return (h + z * (c - h),)
