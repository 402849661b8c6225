"""The scan's Triton kernels without a GPU: their values in the interpreter, and that every one compiles for sm_90."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from tests.kernels.test_triton import run  # noqa: E402

HERE = Path(__file__).parent


@pytest.mark.slow
def test_every_kernel_in_the_interpreter() -> None:
    assert run("interpreted_ssd.py") == "ok"


@pytest.mark.slow
def test_every_kernel_compiles_with_tensor_cores_and_hardly_spills() -> None:
    """Another release of Triton may count otherwise: then only much spilling is a failure."""
    import triton

    golden = json.loads((HERE / "resources_ssd.json").read_text())
    compiled = json.loads(run("compiled_ssd.py", *map(str, golden["arguments"])))
    assert all(use["wgmma"] > 0 for name, use in compiled.items() if name not in ("prepare", "recover", "finish", "add_shares")), compiled
    assert all(use.get("spilled", 0) <= 224 and use["shared"] <= 227 << 10 for use in compiled.values()), compiled
    if triton.__version__ == golden["triton"]:
        assert compiled == golden["kernels"], "If the change is wanted: python -m tests.kernels.compiled_ssd bf16 64 128 --golden"


@pytest.mark.slow
@pytest.mark.parametrize("P,N", [(112, 208), (64, 256)])
def test_wide_heads_and_states_fit_into_shared_memory(P: int, N: int) -> None:
    compiled = json.loads(run("compiled_ssd.py", "bf16", str(P), str(N)))
    assert all(use["shared"] <= 227 << 10 for use in compiled.values()), compiled


@pytest.mark.parametrize("P,N", [(16, 16), (1, 1), (16, 33), (24, 40), (64, 128)])
def test_bf16_heads_are_never_taken_narrower_than_32(P: int, N: int) -> None:
    """Heads of 16 beside states of 16 gave wrong gradients on an H100."""
    from kernels.ssd import launch

    x = torch.randn(2, 3, 4, P, dtype=torch.bfloat16)
    wide = launch.ready(x, x.dtype, launch.NARROWEST)
    assert wide.shape[-1] >= 32 and wide.shape[-1] % launch.RUN == 0 and torch.equal(wide[..., :P], x) and not wide[..., P:].any()
    assert launch.ready(x.float(), torch.float32, launch.NARROWEST).shape == x.shape
