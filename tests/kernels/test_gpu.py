"""The Triton kernels on a GPU against the float64 loop, in the sizes and ways the interpreter is too slow for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.parallel_rnn import adjoint, launch, op, parallel_rnn, parallel_rnn_step, reference
from kernels.parallel_rnn.cell import Cell
from tests.kernels import function_cases
from tests.kernels.test_parallel_rnn import cells, problem

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)


def on_gpu(cell: Cell, *sizes: int, dtype: torch.dtype = torch.float32, **options: Any) -> list[Any]:
    pre, rec, h0, starts = problem(cell, *sizes, **options)
    return [pre.to("cuda", dtype), rec.cuda().float(), h0.cuda().float(), None if starts is None else starts.cuda()]


@pytest.fixture(params=["at once", "sliced"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small problems in one launch, and by the kernels of large ones."""
    if request.param == "sliced":
        monkeypatch.setattr(launch, "SHOOT_STEPS", 0)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("cell", cells(), ids=lambda c: c.name)
@pytest.mark.parametrize(("T", "D"), [(1, 5), (2, 1), (31, 33), (257, 65), (1030, 96)])
@pytest.mark.parametrize(("weight", "bias"), [(0.5, 0.0), (8.0, 0.0), (0.5, -9.2)])
def test_states_and_gradients(cell: Cell, T: int, D: int, weight: float, bias: float) -> None:
    pre, rec, h0, starts = on_gpu(cell, 2, T, D, weight=weight, bias=bias, resets=0.01)
    fine = [x.double().requires_grad_() for x in (pre, rec, h0)]
    leaves = [x.requires_grad_() for x in (pre, rec, h0)]
    states, final = parallel_rnn(cell, *(*leaves, starts), method="triton")
    oracle, end = reference.sequential(cell, *(*fine, starts))
    sensitive = weight > 1  # an unstable recurrence amplifies fp32 rounding; the sequential fp32 loop is then the measure
    if sensitive:
        loop, _ = reference.sequential(cell, *(*(x.detach() for x in leaves), starts))
        allowed = 1e-4 + 10 * (loop - oracle).abs().max().item()
    else:
        allowed = 1e-5 * (1 + oracle.abs().max().item())
    assert (states - oracle).abs().max().item() <= allowed
    if sensitive:
        return
    d, e = torch.randn_like(states), torch.randn_like(final)
    gradients = torch.autograd.grad((states * d).sum() + (final * e).sum(), leaves, allow_unused=True)
    wanted = torch.autograd.grad((oracle * d).sum() + (end * e).sum(), fine, allow_unused=True)
    for a, b in zip(gradients, wanted):
        if b is not None and b.numel():
            assert (a - b).norm() <= 1e-4 * b.norm() + 3e-7  # fp32 holds tanh, and so 1 - tanh^2, to 1.2e-7


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("cell", cells(), ids=lambda c: c.name)
def test_bf16_is_as_good_as_the_rounded_oracle(cell: Cell) -> None:
    pre, rec, h0, _ = on_gpu(cell, 2, 900, 64, dtype=torch.bfloat16)
    states, _ = parallel_rnn(cell, pre, rec, h0)
    oracle, _ = reference.sequential(cell, pre.double(), rec.double(), h0.double(), None)
    assert (states - oracle).abs().max() <= 1.5 * (oracle.bfloat16() - oracle).abs().max()


@pytest.mark.usefixtures("way")
def test_repeatable_graph_capturable_and_compiled() -> None:
    cell = cells()[0]
    pre, rec, h0, _ = on_gpu(cell, 1, 2048, 64)
    first = parallel_rnn(cell, pre, rec, h0)[0]
    assert torch.equal(first, parallel_rnn(cell, pre, rec, h0)[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = parallel_rnn(cell, pre, rec, h0)[0]
    graph.replay()
    assert torch.equal(captured, first)
    compiled = torch.compile(lambda *a: parallel_rnn(cell, *a)[0], fullgraph=True)
    assert torch.equal(compiled(pre, rec, h0), first)
    with torch.no_grad():
        assert torch.allclose(parallel_rnn_step(cell, pre[:, 0], rec, h0), first[:, 0], atol=1e-6)


def test_unconverged_slices_are_walked_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "CORRECTIONS", 0)
    monkeypatch.setattr(launch, "CORRECTIONS_FINE", 0)
    monkeypatch.setattr(launch, "SHOOT_STEPS", 0)
    cell = cells()[0]
    pre, rec, h0, _ = on_gpu(cell, 1, 1024, 64)
    launch.last_report()
    states, *_ = launch.forward(cell, pre, rec, h0, None)
    assert launch.last_report()["sequential"] > 0
    assert (states - reference.sequential(cell, pre.double(), rec.double(), h0.double(), None)[0][:, :, -1]).abs().max() < 1e-5


@pytest.mark.parametrize("shots", [0, 8])
def test_at_once_a_loop_that_does_not_converge_ends_exact(monkeypatch: pytest.MonkeyPatch, shots: int) -> None:
    """Recurrent weights of 8 at full width; without Newton's steps, and weights with which some channels never forget, the slices become exact
    one by one."""
    monkeypatch.setattr(launch, "SHOTS", shots)
    cell = cells()[0]
    pre, rec, h0, starts = on_gpu(cell, 1, 2048, 2048, weight=8.0 if shots else 2.0, resets=0.001)
    launch.last_report()
    states, *_ = launch.forward(cell, pre, rec, h0, starts)
    report = launch.last_report()
    loop = reference.sequential(cell, pre, rec, h0, starts)[0][:, :, -1]
    oracle = reference.sequential(cell, pre.double(), rec.double(), h0.double(), starts)[0][:, :, -1]
    assert report["residual"] <= 1e-6 and report["tiles"] == 128 and (shots or report["sequential"] > 0), report
    assert (states - oracle).abs().max() <= 1e-5 + 10 * (loop - oracle).abs().max()


@pytest.mark.parametrize("name", ["paragru", "paralstm"])
def test_borders_alone_give_the_same_gradients(name: str) -> None:
    cell = next(c for c in cells() if c.name == name)
    inputs = [x.requires_grad_() for x in on_gpu(cell, 2, 700, 64)[:3]]
    gradients = []
    for save in ("states", "borders"):
        out, _ = parallel_rnn(cell, *inputs, emitted=True, save=save)
        gradients.append(torch.autograd.grad(out.square().sum(), inputs))
    for a, b in zip(*gradients):
        assert torch.allclose(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cell", cells(), ids=lambda c: c.name)
def test_what_slices_on_two_gpus_tell_each_other(cell: Cell) -> None:
    pre, rec, h0, starts = on_gpu(cell, 2, 700, 65, resets=0.002)
    states, _ = parallel_rnn(cell, pre, rec, h0, starts)
    d_emitted = torch.ones_like(states[:, :, -1])
    computed = adjoint(cell, pre, rec, h0, starts, op.parts(states), d_emitted)
    wanted = adjoint(cell, pre.double(), rec.double(), h0.double(), starts, op.parts(states.double()), d_emitted.double())
    # what is left of states that mix is a bound, not the same in slices
    for a, b in zip(computed[: 3 if len(cell.state) == 1 else 2], wanted):
        assert (a - b).norm() <= 1e-4 * (1e-3 + b.norm())


@pytest.mark.parametrize("short", ["", "float16", "bfloat16"])
@pytest.mark.parametrize("maths", ["ptx", "portable"])
def test_every_function_of_a_step_on_a_dense_grid(short: str, maths: str) -> None:
    """fp32 numbers of every size and sign, each 8191st there is."""
    bits = torch.arange(-(1 << 31), 1 << 31, 8191, dtype=torch.int64, device="cuda")
    x = bits.to(torch.int32).view(torch.float32)
    function_cases.check(
        torch.cat([x[(x.abs() >= function_cases.TINY) | x.isnan()], function_cases.points(20_000).cuda()]), [(short, maths)]
    )


def test_beyond_int32_elements(most_of_a_gpu: None) -> None:
    cell = next(c for c in cells() if c.name == "mingru")
    pre = torch.zeros(1, (1 << 20) + 64, 2, 1088, device="cuda", dtype=torch.bfloat16)  # 2.3e9 elements
    pre[:, -100:].normal_()
    states, _ = parallel_rnn(cell, pre, torch.zeros(0, 1088, device="cuda"))
    tail, _ = reference.sequential(
        cell, pre[:, -100:].double(), torch.zeros(0, 1088, device="cuda").double(), torch.zeros_like(pre[:, 0, :1]).double(), None
    )
    assert (states[:, -100:] - tail).abs().max() < 2e-2
