"""LSTM as torch.nn.LSTM writes it, with diagonal recurrent weights.

i, f, o = sigmoid(. + a h),  g = tanh(g + ag h),  c = f c + i g,  h = o tanh(c)
"""

import torch

from kernels.parallel_rnn.cell import Pre, Rec, State

BIAS_INIT = {"f": (0.0, 4.0), "i": (0.0, -4.0)}  # what is forgotten is what is written, at the start


def step(i: Pre, f: Pre, g: Pre, o: Pre, ai: Rec, af: Rec, ag: Rec, ao: Rec, c: State, h: State) -> tuple[State, State]:
    i = torch.sigmoid(i + ai * h)
    f = torch.sigmoid(f + af * h)
    g = torch.tanh(g + ag * h)
    o = torch.sigmoid(o + ao * h)
    c = f * c + i * g
    return c, o * torch.tanh(c)
