"""decode_step: one token through a layer in three to five kernels, for the few rows at which reading the weights is what takes time.

Its reference is the mixers' own forward with T = 1: models/decode.py runs either, tests/models/test_fused_step.py compares them. Everything is
written in place into tensors that stay where they are, so that a CUDA graph can hold the step. Legend: B rows, N outputs, K inputs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from kernels.decode_step import cell as cell_source
from kernels.decode_step import dense_cell
from kernels.dispatch import interpreted, no_triton, overlapped
from kernels.parallel_rnn.cell import Cell
from kernels.parallel_rnn.launch import load_source

LARGEST_HEAD = 128  # channels of a dense head, whose matrices a program reads whole
ROWS = 8  # with more rows a matrix product reads the weights once for all of them


def why_not(device: torch.device, rows: int) -> str:
    """Empty if the kernels can run, else one sentence."""
    return f"{rows} rows are more than {ROWS}." if rows > ROWS else no_triton(device)


@dataclass
class Convolution:
    """A causal convolution and silu behind the outputs first to first + C: weight (C, W), bias (C,), past inputs (B, W-1, C), moved on in place."""

    first: int
    weight_CW: Tensor
    bias_C: Tensor
    past_BWC: Tensor


def _power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _options() -> dict[str, bool]:
    return {"PDL": True, "launch_pdl": True} if overlapped() else {"PDL": False}


def tile(N: int, K: int) -> tuple[int, int, int]:
    """(outputs a program, inputs at once, warps): some 500 programs, so that all multiprocessors have several and none waits for a second turn."""
    if interpreted():  # which pays for every statement of every program
        return 64, 32, 4
    outputs = min(16, max(2, _power(-(-N // 640))))
    return outputs, min(1024 if outputs < 16 else 512, _power(K)), 4


def project(
    x_BK: Tensor, weight_NK: Tensor, out_BN: Tensor, *, norm_K: Tensor | None = None, eps: float = 0.0, gate_BK: Tensor | None = None,
    gate_first: bool = False, pair_NK: Tensor | None = None, conv: Convolution | None = None, silu: tuple[int, int] = (0, 0), add: bool = False,
    keep_N: Tensor | None = None,
) -> None:  # fmt: skip
    """out = W prologue(x), with what surrounds it.

    Before: x * gate (before the norm if gate_first, else after), RMSNorm. After: silu(.) * (pair prologue(x)); the convolution; silu of the
    outputs in the range `silu`; add: keep * out is added (keep None: 1).
    """
    from kernels.decode_step.triton import project as kernel

    (N, K), B = weight_NK.shape, x_BK.shape[0]
    BN, BK, warps = tile(N, K)
    width = conv.weight_CW.shape[1] if conv is not None else 0
    first, last = (conv.first, conv.first + conv.weight_CW.shape[0]) if conv is not None else (0, 0)
    past, taps, bias = (conv.past_BWC, conv.weight_CW, conv.bias_C) if conv is not None else (out_BN,) * 3
    gated = 0 if gate_BK is None else 1 if gate_first else 2
    gate, norm, pair = (weight_NK if t is None else t for t in (gate_BK, norm_K, pair_NK))
    with torch.cuda.device_of(x_BK):  # Triton launches on the current device
        kernel[(B, -(-N // BN))](
            x_BK, gate, norm, weight_NK, pair, out_BN, weight_NK if keep_N is None else keep_N, past, taps, bias, N, K,
            x_BK.stride(0), gate.stride(0), out_BN.stride(0), first, last, *silu, eps,
            GATED=gated, NORMED=norm_K is not None, PAIR=pair_NK is not None, ADD=add, KEPT=keep_N is not None, W=width, BN=BN, BK=BK,
            num_warps=warps, **_options(),
        )  # fmt: skip


def ssm(
    x_BI: Tensor, B_BG: Tensor, C_BG: Tensor, dt_BH: Tensor, dt_bias_H: Tensor, A_log_H: Tensor, skip_H: Tensor, state_BHPM: Tensor,
    y_BI: Tensor, groups: int, low: float, high: float,
) -> None:  # fmt: skip
    """One step of Mamba-2's recurrence; x, B, C and dt are parts of the same rows, in fp32."""
    from kernels.decode_step.triton import ssm as kernel

    B, H, P, M = state_BHPM.shape
    BP = _power(P) if interpreted() else min(16, _power(P))
    with torch.cuda.device_of(x_BI):
        kernel[(B, H, -(-P // BP))](
            x_BI, B_BG, C_BG, dt_BH, dt_bias_H, A_log_H, skip_H, state_BHPM, y_BI, H, P, M, groups, x_BI.stride(0), y_BI.stride(0), low, high,
            BP=BP, BM=_power(M), num_warps=4, **_options(),
        )  # fmt: skip


@functools.cache
def _cell_kernels(cell: Cell) -> ModuleType:
    return load_source(f"{cell.name}_step", cell_source.source(cell))


def cell_step(cell: Cell, u_BI: Tensor, weight_EKO: Tensor, bias_PI: Tensor, rec_RI: Tensor, state_BSI: Tensor) -> None:
    """The cell's inputs, projected head by head (weight (E, I/E, P I/E), as in models/mixers/rnn.py), and its step on the state in place."""
    (E, K, PO), P, D = weight_EKO.shape, len(cell.pre), bias_PI.shape[1]
    O = PO // P  # noqa: E741
    BN, BK = (16, 16) if interpreted() else (8 if D < 132 * 16 else 16, min(256, _power(K)))
    with torch.cuda.device_of(u_BI):
        _cell_kernels(cell).project_and_step[(u_BI.shape[0], -(-O // BN), E)](
            u_BI, weight_EKO, bias_PI, rec_RI, state_BSI, D, K, O, u_BI.stride(0), BN=BN, BK=BK, num_warps=4, **_options()
        )


def steps_dense_heads(K: int, within: int) -> bool:
    """Whether `dense_cell_step` can be had for heads of K channels in blocks of `within`."""
    return K <= LARGEST_HEAD and within % K == 0


@functools.cache
def _dense_cell_kernels(cell: Cell) -> ModuleType:
    return load_source(f"{cell.name}_dense_step", dense_cell.source(cell))


def dense_cell_step(
    cell: Cell, u_BI: Tensor, weight_EIO: Tensor, bias_PI: Tensor, rec_RI: Tensor, mat_EKGK: Tensor, state_BSI: Tensor
) -> None:  # fmt: skip
    """`cell_step` of a cell with dense heads, mat (heads, K, matrices K): heads of at most LARGEST_HEAD channels, each within a block of the
    projection."""
    (_, width, PO), P, D, (heads, K, _) = weight_EIO.shape, len(cell.pre), bias_PI.shape[1], mat_EKGK.shape
    O = PO // P  # noqa: E741
    assert K <= LARGEST_HEAD and O % K == 0, (K, O)
    BN = _power(K)
    BK = 16 if interpreted() else min(_power(width), max(16, 4096 // BN))
    with torch.cuda.device_of(u_BI):
        _dense_cell_kernels(cell).project_and_step[(u_BI.shape[0], heads)](
            u_BI,
            weight_EIO,
            bias_PI,
            rec_RI,
            mat_EKGK,
            state_BSI,
            D,
            width,
            O,
            u_BI.stride(0),
            K=K,
            BN=BN,
            BK=BK,
            num_warps=8,
            **_options(),
        )
