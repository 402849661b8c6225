"""The kernels of dense heads on a GPU against the float64 loop, in the sizes and dtypes the interpreter is too slow for."""

from __future__ import annotations

import pytest
import torch

from kernels.dense_rnn import dense_rnn, large, launch
from kernels.dense_rnn.launch import Plan
from tests.kernels.dense_rnn_cases import check_gradient_of_matrices, cotangents, distance, known_cells, problem, wanted

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

NAMES = ("emitted", "final", "pre", "rec", "mat", "h0")
LIMITS = {torch.float32: (1e-5, 1e-4), torch.float16: (2e-3, 4e-3), torch.bfloat16: (8e-3, 2e-2)}


@pytest.mark.parametrize("K", [16, 32, 48, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("slices", [1, 4])
def test_values_and_gradients(K: int, dtype: torch.dtype, slices: int) -> None:
    if K > launch.LARGEST[dtype.itemsize]:
        pytest.skip("its matrices do not fit")
    check("dense_lstm", K, dtype, slices)


@pytest.mark.parametrize("name", [name for name in known_cells() if name != "dense_lstm"])
def test_other_cells(name: str) -> None:
    check(name, 64, torch.float32, 4)
    check(name, 64, torch.bfloat16, 4)


@pytest.mark.parametrize("name", ["dense_lstm", "slstm", "dense_gru", "dense_gru_before"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_inputs_in_blocks(name: str, dtype: torch.dtype) -> None:
    """As a block-diagonal projection makes them: there the gradients of most inputs are the cotangents of products."""
    for K in (32, 64) if dtype == torch.float32 else (32, 64, 128):
        check(name, K, dtype, 4, blocks=2)


@pytest.mark.parametrize("name", ["dense_lstm", "slstm", "dense_gru"])
@pytest.mark.parametrize("K, tile", [(64, (launch.ROWS, 8)), (128, (launch.FEW_ROWS, 8))], ids=str)
def test_the_other_tile(name: str, K: int, tile: tuple[int, int]) -> None:
    """Heads of 64 by programs of sixteen rows, as with a compiler that was not tried with eight; heads of 128 by programs of eight."""
    for blocks in (0, 2):
        check(name, K, torch.bfloat16, 4, blocks, tile=tile)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("K", [16, 48, 64, 96, 128])
def test_gradient_of_matrices(K: int, dtype: torch.dtype) -> None:
    """The kernel alone, in pieces of whole tiles and of others, of few steps and of many."""
    for name, blocks in (("slstm", 2), ("dense_lstm", 0), ("dense_gru", 0), ("dense_gru_before", 1), ("dense_elman", 4)):
        for B, T in ((1, 5), (3, 261), (4, 2048)):
            check_gradient_of_matrices(name, (B, T, 12, K), dtype, blocks, "cuda", 2e-5)


def check(
    name: str,
    K: int,
    dtype: torch.dtype,
    slices: int,
    blocks: int = 0,
    T: int = 261,
    burn_in: int | None = None,
    starts: float = 0.01,
    tile: tuple[int, int] = (0, 0),
) -> None:
    cell, tensors, new = problem(name, 3, T, 2 * max(1, blocks), K, gain=0.8, starts=starts, device="cuda")
    d_emitted, d_final = cotangents(tensors)
    given = [t.to(dtype if i in (0, 2) else torch.float32) for i, t in enumerate(tensors)]
    low, plan, flat = d_emitted.to(dtype), Plan.of(given[0], K, slices, burn_in, *tile), given[0]
    if blocks:
        given[0] = flat.unflatten(3, (blocks, -1)).permute(3, 0, 1, 2, 4).contiguous().permute(1, 2, 3, 0, 4)
    emitted, kept, final = launch.forward(cell, *(*given, new, plan))
    back = (*given, new, emitted, kept, low, None, d_final.float(), plan)
    gradients = launch.backward(cell, *back)
    again = launch.backward(cell, *back)
    assert all(torch.equal(a, b) for a, b in zip(gradients, again))
    given[0], gradients = flat, (gradients[0].flatten(3) if blocks else gradients[0], *gradients[1:])
    for i, (label, a, b) in enumerate(zip(NAMES, (emitted, final, *gradients), wanted(cell, given, new, low, d_final.float()))):
        assert distance(a, b) < LIMITS[dtype][i > 1], label


@pytest.mark.parametrize("name", ["dense_lstm", "slstm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_slices_that_join_what_was_before(name: str, dtype: torch.dtype) -> None:
    """Long slices from no burn-in, whose later walks end where they have come back."""
    for blocks in (0, 2):
        check(name, 64, dtype, 8, blocks, T=1500, burn_in=0, starts=0.002 * blocks)


@pytest.mark.parametrize("name", ["dense_lstm", "slstm"])
def test_many_slices(name: str) -> None:
    check(name, 64, torch.bfloat16, 60, T=1980, burn_in=0)


def test_memories_that_expand_are_walked_bit_for_bit() -> None:
    cell, tensors, starts = problem("dense_lstm", 2, 512, 2, 64, gain=12.0, device="cuda")
    tensors[0][:, :, 0] += 4
    given = [t.bfloat16() if i in (0, 2) else t.float() for i, t in enumerate(tensors)]
    one, several = (launch.forward(cell, *(*given, starts, Plan.of(given[0], 64, n))) for n in (1, 8))
    assert all(torch.equal(a, b) for a, b in zip(one, several))


def test_a_cuda_graph_and_torch_compile() -> None:
    cell, tensors, starts = problem("dense_lstm", 2, 256, 2, 64, starts=0.01, device="cuda")
    given = [t.bfloat16() if i in (0, 2) else t.float() for i, t in enumerate(tensors)]
    wanted_ = dense_rnn(cell, *(*given, starts))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = dense_rnn(cell, *(*given, starts))
    graph.replay()
    compiled = torch.compile(lambda *t: dense_rnn(cell, *(*t, starts)), fullgraph=True)(*given)
    for found in (captured, compiled):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted_))


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_large_head(dtype: torch.dtype, held: bool) -> None:
    """held: with matrices that stay on chip, of 16 bits alone."""
    cell, tensors, starts = problem("dense_lstm", 3, 133, 1, 256, starts=0.01, device="cuda")
    d_emitted, d_final = cotangents(tensors)
    given, low = [t.to(dtype if i in (0, 2) else torch.float32) for i, t in enumerate(tensors)], d_emitted.to(dtype)
    tiles = large.Tiles.on_chip(cell, given[0], 256) if held else large.Tiles.streamed(cell, given[0], 256)
    if tiles is None:
        assert dtype == torch.float32
        return
    exact = wanted(cell, given, starts, low, d_final.float())
    for slices in (1, 4):
        plan = large.Plan.of(cell, given[0], 256, slices, tiles=tiles)
        emitted, kept, final = large.forward(cell, *(*given, starts, plan))
        back = (*given, starts, emitted, kept, low, None, d_final.float(), plan)
        gradients, again = large.backward(cell, *back), large.backward(cell, *back)
        assert all(torch.equal(a, b) for a, b in zip(gradients, again))
        for i, (label, a, b) in enumerate(zip(NAMES, (emitted, final, *gradients), exact)):
            assert distance(a, b) < LIMITS[dtype][i > 1], (slices, label)
