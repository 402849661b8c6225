"""LSTM with dense heads, as torch.nn.LSTM writes it for each head: R h is a matrix product over the head's channels.

i, f, o = sigmoid(. + R h),  g = tanh(g + Rg h),  c = f c + i g,  h = o tanh(c)
"""

import torch

from kernels.parallel_rnn.cell import Mat, Pre, State

BIAS_INIT = {"f": (0.0, 4.0), "i": (0.0, -4.0)}  # what is forgotten is what is written, at the start


def step(i: Pre, f: Pre, g: Pre, o: Pre, Ri: Mat, Rf: Mat, Rg: Mat, Ro: Mat, c: State, h: State) -> tuple[State, State]:
    i = torch.sigmoid(i + Ri @ h)
    f = torch.sigmoid(f + Rf @ h)
    g = torch.tanh(g + Rg @ h)
    o = torch.sigmoid(o + Ro @ h)
    c = f * c + i * g
    return c, o * torch.tanh(c)
