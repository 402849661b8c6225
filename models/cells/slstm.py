"""sLSTM (arXiv 2405.04517, section 2.2) with dense heads: exponential gates over a normaliser.

The paper carries c and n, and a stabiliser m that keeps both in range: c = f c + e^i z, n = f n + e^i, h = sigmoid(o) c / n. The same is carried
here as what it comes to, log n and the mean c / n, which need no stabiliser and are one state less:

write = sigmoid(i - (log f + log n)),  log n = log(f n + e^i),  c = c + write (tanh(z + Rz h) - c),  h = sigmoid(o + Ro h) c
with i = i + Ri h and log f = logsigmoid(f + Rf h). A log n of zero says that nothing was written yet; one that comes out as zero is 1e-30.
"""

import torch
import torch.nn.functional as F

from kernels.parallel_rnn.cell import LogState, Mat, Pre, State

BIAS_INIT = {"f": (1.0, 4.0), "i": (0.0, -4.0)}


def step(i: Pre, f: Pre, z: Pre, o: Pre, Ri: Mat, Rf: Mat, Rz: Mat, Ro: Mat, n: LogState, c: State, h: State) -> tuple[State, State, State]:
    empty = n == 0
    i = i + Ri @ h
    kept = F.logsigmoid(f + Rf @ h) + n
    more = i - kept
    write = torch.where(empty, 1.0, torch.sigmoid(more))
    n = torch.where(empty, i, kept + F.softplus(more)) + 1e-30
    c = c + write * (torch.tanh(z + Rz @ h) - c)
    return n, c, torch.sigmoid(o + Ro @ h) * c
