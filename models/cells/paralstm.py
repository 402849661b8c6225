"""ParaLSTM (arXiv 2510.21450, equation 3.3): LSTM with coupled input and forget gates, peepholes and diagonal recurrent weights.

f = sigmoid(f + af h + pf c),  z = tanh(z + az h),  c = f c + (1 - f) z,  o = sigmoid(o + ao h + po c),  h = o tanh(c)
The output gate's peephole sees the new c.
"""

import torch

from kernels.parallel_rnn.cell import Pre, Rec, State

BIAS_INIT = {"f": (0.0, 4.0)}


def step(f: Pre, o: Pre, z: Pre, af: Rec, ao: Rec, az: Rec, pf: Rec, po: Rec, c: State, h: State) -> tuple[State, State]:
    f = torch.sigmoid(f + af * h + pf * c)
    z = torch.tanh(z + az * h)
    c = f * c + (1 - f) * z
    o = torch.sigmoid(o + ao * h + po * c)
    return c, o * torch.tanh(c)
