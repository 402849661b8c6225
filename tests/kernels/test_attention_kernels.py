"""Packed attention's kernels: in the interpreter and compiled without a GPU; on a GPU against float64 and as a CUDA graph."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kernels.attention import attention, launch, reference, why_not
from models.segments import Documents

pytest.importorskip("triton")
from tests.conftest import on_gpu  # noqa: E402
from tests.kernels.test_triton import run  # noqa: E402

HERE = Path(__file__).parent


def test_every_kernel_in_the_interpreter() -> None:
    assert run("interpreted_attention.py") == "ok"


@pytest.mark.slow
def test_every_kernel_compiles_with_tensor_cores_and_hardly_spills() -> None:
    """Another release of Triton may count otherwise: then only much spilling is a failure. What is spilled is read in the loop and never
    written there."""
    import triton

    golden, found = json.loads((HERE / "resources_attention.json").read_text()), json.loads(run("compiled_attention.py"))
    assert all(use["tensor_cores"] > 0 and use["shared"] <= 227 << 10 for use in found.values()), found
    assert all(use["copies"] > 0 and use.get("spilled", 0) <= 160 for name, use in found.items() if "mend" not in name), found
    if triton.__version__ == golden["triton"]:
        assert found == golden["kernels"], "If the change is wanted: python -m tests.kernels.compiled_attention --golden"


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("rows,length", [(1, 1), (3, 50)])
def test_bounds_are_the_first_and_last_token_of_each_tokens_document(rows: int, length: int, share: float) -> None:
    segments = (torch.rand(rows, length) < share).cumsum(1)
    first, last = Documents(segments).bounds()
    assert first.dtype == last.dtype == torch.int32
    for b in range(rows):
        for t in range(length):
            same = (segments[b] == segments[b, t]).nonzero()
            assert (int(first[b, t]), int(last[b, t])) == (int(same[0]), int(same[-1]))


def test_without_a_gpu_the_formula_runs_and_is_differentiable() -> None:
    q, k, v = (torch.randn(2, n, 12, 8, dtype=torch.float64, requires_grad=True) for n in (4, 2, 2))
    bounds = Documents((torch.rand(2, 12) < 0.3).cumsum(1)).bounds()
    assert why_not(q) and why_not(q.bfloat16()), "models take torch's kernels here"
    given = reference.attention(q, k, v, bounds[0], None, 5, 8**-0.5)[0]
    d = torch.randn_like(given)
    torch.testing.assert_close(attention(q, k, v, bounds, 5), given)
    found, wanted = (torch.autograd.grad(y, (q, k, v), d) for y in (attention(q, k, v, bounds, 5), given))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    "shape,stride", [((2, 3, 5, 64), (960, 64, 192, 1)), ((1, 3, 1, 64), (5, 72, 7, 1)), ((2, 2, 4, 64), (520, 260, 65, 1))]
)
def test_rows_that_are_not_aligned_are_copied(shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
    x = torch.randn(4000).bfloat16().as_strided(shape, stride)
    made = launch.ready(x)
    assert torch.equal(made, x) and not any(s % launch.RUN for s in launch.strides_of(made)) and made.stride(-1) == 1
    assert (made.data_ptr() == x.data_ptr()) == (stride[0] == 960)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "B,H,G,T,L,K,share,window",
    [
        (2, 4, 4, 300, 300, 64, 0.02, 0),
        (2, 4, 2, 257, 257, 128, 0.05, 0),
        (1, 4, 4, 333, 333, 128, 0.01, 17),
        (2, 2, 2, 129, 400, 64, 0.02, 0),
        (1, 2, 2, 100, 1000, 128, None, 300),
        (1, 3, 3, 200, 200, 80, 0.03, 0),
        (1, 2, 1, 200, 200, 256, 0.02, 0),
        (1, 2, 2, 65, 65, 24, 0.5, 0),
        (1, 4, 4, 2048, 2048, 64, 0.001, 0),
        (1, 2, 2, 2048, 2048, 128, None, 0),
    ],
)
def test_against_float64_on_a_gpu(
    B: int, H: int, G: int, T: int, L: int, K: int, share: float | None, window: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, t, n, K, device="cuda").to(dtype).transpose(1, 2).requires_grad_() for n, t in ((H, T), (G, L), (G, L)))
    d = torch.randn(B, H, T, K, device="cuda").to(dtype)
    bounds = None if share is None else Documents((torch.rand(B, L, device="cuda") < share).cumsum(1)).bounds()
    wide: list[torch.Tensor] = [t.detach().double().requires_grad_() for t in (q, k, v)]
    y, again = attention(q, k, v, bounds, window), attention(q, k, v, bounds, window)
    exact = reference.attention(*(*wide, None if bounds is None else bounds[0], None, window, K**-0.5))[0]
    found, wanted = (y, *torch.autograd.grad(y, (q, k, v), d)), (exact, *torch.autograd.grad(exact, wide, d.double()))
    assert torch.equal(y, again) and all(torch.equal(a, b) for a, b in zip(found[1:], torch.autograd.grad(again, (q, k, v), d)))
    for a, b in zip(found, wanted):
        assert (a - b).norm() < (6e-3 if dtype == torch.bfloat16 else 8e-4) * b.norm()


@on_gpu
def test_a_graph_takes_other_documents_as_data() -> None:
    q, k, v = (torch.randn(2, 200, 2, 64, device="cuda").bfloat16().transpose(1, 2).requires_grad_() for _ in range(3))
    d, segments = torch.randn_like(q), torch.zeros(2, 200, dtype=torch.int32, device="cuda")

    def answers() -> list[torch.Tensor]:
        y = attention(q, k, v, Documents(segments).bounds())
        return [y.detach(), *torch.autograd.grad(y, (q, k, v), d)]

    answers()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = answers()
    for share in (0.01, 0.5):
        segments.copy_((torch.rand(2, 200) < share).cumsum(1))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(recorded, answers()))
