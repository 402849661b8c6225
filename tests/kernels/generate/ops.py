"""Random problems for the operations around the recurrence: Mamba-2's scan, the delta rule, the convolution, norms, products, rotary positions, the loss, and the
decoding steps.

    python -m tests.kernels.generate.ops ssd 1234 --device cuda                                   one case again
    python -m tests.kernels.generate.ops --device cuda --cases 200 --out FILE.json --jobs 8       many, with new seeds; goes on if FILE.jsonl is there

--device interpreter runs the kernels in Triton's interpreter, cpu what runs without a GPU. Legend: B batch, T time, D channels, W width of a
convolution, H heads, P head width, G groups, N state width, V vocabulary, K head width of attention or inputs of a product.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import torch

from tests.kernels.generate.attention import packed_attention
from tests.kernels.generate.case import Answers, Draw, Result, main, run_one
from tests.kernels.generate.delta import delta, delta_borders, delta_not_finite, delta_token
from tests.kernels.generate.dense import dense, dense_step
from tests.kernels.generate.layers import (
    convolution,
    convolution_history,
    convolution_not_finite,
    norm,
    product,
    stream_and_norm,
    sum_of_stream,
    turning,
)  # fmt: skip
from tests.kernels.generate.losses import loss_of_head, loss_of_rows
from tests.kernels.generate.matrix import matrix_states, matrix_token
from tests.kernels.generate.optimizers import ends_of_muon, norm_of_many, symmetric_product
from tests.kernels.generate.scans import scan, scan_borders, scan_not_finite
from tests.kernels.generate.steps import cell_token, fused_projection, fused_recurrences, mamba2_token

KINDS: dict[str, Callable[[Draw], Answers]] = {
    "ssd": scan, "ssd_borders": scan_borders, "ssd_not_finite": scan_not_finite, "conv": convolution, "conv_not_finite": convolution_not_finite, "conv_history": convolution_history, "norm": norm,
    "residual": sum_of_stream, "add_norm": stream_and_norm, "swiglu": product, "rotary": turning, "loss": loss_of_rows, "head": loss_of_head, "mamba2_step": mamba2_token,
    "delta": delta, "delta_borders": delta_borders, "delta_not_finite": delta_not_finite, "delta_step": delta_token, "dense": dense,
    "dense_step": dense_step,
    "m2rnn": matrix_states, "m2rnn_step": matrix_token,
    "cell_step": cell_token, "project": fused_projection, "fused_step": fused_recurrences,
    "attention": packed_attention, "norm_of_many": norm_of_many, "muon": ends_of_muon, "symmetric": symmetric_product,
}  # fmt: skip
KERNELS_ONLY = ("project", "fused_step")
COMPILED = ("dense_step",)  # cases that are kernels of their own, which a GPU's processes would compile for minutes: by name only


def usable(kind: str, device: str) -> bool:
    if device == "cuda" and kind in COMPILED:
        return False
    return device != "cpu" or kind not in KERNELS_ONLY or os.environ.get("TRITON_INTERPRET") == "1"


def run_case(kind: str, seed: int, device: str) -> Result:
    return run_one(KINDS[kind], kind, seed, device)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(min(100, main("tests.kernels.generate.ops", [*KINDS], run_case, usable)))
