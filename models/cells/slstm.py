"""sLSTM (arXiv 2405.04517, section 2.2) with dense heads: exponential gates, a normaliser n and a stabiliser m, which keeps both in range.

i = i + Ri h,  log f = logsigmoid(f + Rf h),  m = max(log f + m, i),  c = e^(log f + m_before - m) c + e^(i - m) tanh(z + Rz h),
n = e^(log f + m_before - m) n + e^(i - m),  h = sigmoid(o + Ro h) c / n
A memory that is empty (n = 0) begins with m = i, whatever m was: then n is at least one.
"""

import torch
import torch.nn.functional as F

from kernels.parallel_rnn.cell import Mat, Pre, State

BIAS_INIT = {"f": (1.0, 4.0), "i": (0.0, -4.0)}


def step(
    i: Pre, f: Pre, z: Pre, o: Pre, Ri: Mat, Rf: Mat, Rz: Mat, Ro: Mat, c: State, n: State, m: State, h: State
) -> tuple[State, State, State, State]:
    i = i + Ri @ h
    kept = F.logsigmoid(f + Rf @ h) + m
    highest = torch.where(n == 0, i, torch.maximum(kept, i))
    keep, write = torch.where(n == 0, 0.0, torch.exp(kept - highest)), torch.exp(i - highest)
    c = keep * c + write * torch.tanh(z + Rz @ h)
    n = keep * n + write
    return c, n, highest, torch.sigmoid(o + Ro @ h) * (c / n)
