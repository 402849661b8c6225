"""Elman network with dense heads: h = tanh(x + R h)."""

import torch

from kernels.parallel_rnn.cell import Mat, Pre, State


def step(x: Pre, R: Mat, h: State) -> tuple[State]:
    return (torch.tanh(x + R @ h),)
