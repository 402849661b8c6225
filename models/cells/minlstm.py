"""minLSTM (arXiv 2410.01201, section 3.2): forget and input gates of the input alone, normalised to sum to one.

f, i = sigmoid(.),  h = f / (f + i) h + i / (f + i) c
"""

import torch

from kernels.parallel_rnn.cell import Pre, State

BIAS_INIT = {"f": (0.0, 4.0)}


def step(f: Pre, i: Pre, c: Pre, h: State) -> tuple[State]:
    f = torch.sigmoid(f)
    i = torch.sigmoid(i)
    keep = f / (f + i)
    return (keep * h + (1 - keep) * c,)
