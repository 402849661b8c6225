"""The kernels of M2RNN on a GPU against the float64 loop, in the sizes and dtypes the interpreter is too slow for."""

from __future__ import annotations

import pytest
import torch

from kernels.m2rnn import launch, m2rnn
from tests.kernels.m2rnn_cases import LABELS, answers, asked, distance, oracle, problem

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

LIMITS = {torch.float32: (1e-5, 1e-4), torch.float16: (2e-3, 4e-3), torch.bfloat16: (8e-3, 2e-2)}
SIZES = [
    (3, 261, 2, 64, 2, 64), (2, 150, 4, 40, 2, 24), (2, 130, 2, 16, 1, 128), (1, 70, 2, 128, 2, 64), (1, 1, 1, 8, 1, 5), (2, 200, 6, 16, 1, 64),
    (1, 90, 2, 32, 2, 100), (1, 2, 1, 64, 1, 64),
]  # fmt: skip


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("decay", [0.01, 0.5])
def test_values_and_gradients(sizes: tuple[int, ...], dtype: torch.dtype, decay: float) -> None:
    if sizes[3] > launch.WIDEST_OF_FOUR_BYTES and dtype != torch.bfloat16:
        pytest.skip("its state does not fit")
    torch.manual_seed(0)
    tensors, starts = problem(*sizes, dtype=dtype, starts=0.02, decay=decay, device="cuda")
    if dtype == torch.bfloat16:
        tensors[4] = tensors[4].bfloat16().float()  # enters the product so
    do, d_final = asked(tensors)
    found, again = (answers(m2rnn, tensors, starts, do, d_final) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(found, again))
    for i, (label, a, b) in enumerate(zip(LABELS, found, oracle(tensors, starts, do, d_final))):
        assert distance(a, b) < LIMITS[dtype][i > 1], label


def test_a_small_loss_and_a_long_row(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, starts = problem(1, 3000, 2, 64, 2, 64, dtype=torch.bfloat16, starts=0.001, device="cuda")
    do, d_final = asked(tensors)
    plain, small = (answers(m2rnn, tensors, starts, do, d_final, scale) for scale in (1.0, 2.0**-27))
    for label, a, b in zip(LABELS, small, plain):
        assert distance(a, b) < 1e-6, label
    monkeypatch.setattr(launch, "SCRATCH", 1)  # one chunk at a time, of which only the sum of the weight's gradient has another order
    for label, a, b in zip(LABELS, answers(m2rnn, tensors, starts, do, d_final), plain):
        # tensor cores cut sums off: at most a last digit a step, and always towards zero (2.2e-4 of 3.6e-4 on an H200)
        assert distance(a, b) < 3000 * 2.0**-23 if label == "dw" else torch.equal(a, b), label


def test_a_cuda_graph_and_torch_compile() -> None:
    tensors, starts = problem(2, 256, 2, 64, 1, 64, dtype=torch.bfloat16, starts=0.01, device="cuda")
    do, d_final = asked(tensors)
    wanted = answers(m2rnn, tensors, starts, do, d_final)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = answers(m2rnn, tensors, starts, do, d_final)
    graph.replay()
    compiled = answers(torch.compile(m2rnn, fullgraph=True), tensors, starts, do, d_final)
    for found in (captured, compiled):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted))
