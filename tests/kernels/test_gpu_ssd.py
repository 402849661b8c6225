"""The scan's Triton kernels on a GPU against the float64 loop, in the sizes and ways the interpreter is too slow for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.ssd import launch, reference, ssd
from tests.kernels.ssd_cases import NAMES, answers, distance, gap, oracle, problem

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)


@pytest.fixture(params=["chunks at once", "chunks in order"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of computing outputs of narrow heads: `walk` and `outputs`, or `carry`, which otherwise wants more heads than tests have."""
    monkeypatch.setattr(launch, "PROGRAMS", 1 if request.param == "chunks in order" else 1 << 30)
    return str(request.param)


def scan(*arguments: Any, D: Any) -> Any:
    return ssd(*arguments, D_H=D)


def compare(sizes: tuple[int, ...], **options: Any) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    tensors, starts = problem(*sizes, device="cuda", **options)
    torch.manual_seed(0)
    dy, d_final = torch.randn(tensors[0].shape, device="cuda").to(tensors[0].dtype), torch.randn(tensors[5].shape, device="cuda")
    return answers(scan, tensors, starts, dy, d_final), oracle(tensors, starts, dy, d_final), dy


@pytest.mark.parametrize(
    "sizes",
    [(2, 300, 4, 64, 2, 128), (1, 1, 2, 64, 1, 64), (1, 70, 6, 24, 2, 40), (2, 129, 3, 96, 1, 16), (1, 200, 2, 128, 1, 64)],
    ids=str,
)
@pytest.mark.parametrize(("decay", "starts"), [(1.0, 0.0), (50.0, 0.05), (0.01, 0.02)])
def test_fp32(sizes: tuple[int, ...], decay: float, starts: float) -> None:
    computed, wanted, _ = compare(sizes, decay=decay, starts=starts)
    for name, a, b in zip(("y", "final"), computed, wanted):
        assert gap(a, b) <= 1e-5, f"{name}: {gap(a, b):.1e}"
    for name, a, b in zip(NAMES, computed[2:], wanted[2:]):
        assert distance(a, b) <= 1e-4, f"d{name}: {distance(a, b):.1e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "sizes", [(2, 600, 8, 64, 1, 128), (1, 513, 20, 64, 2, 64), (2, 257, 3, 40, 1, 32), (3, 64, 5, 64, 1, 64)], ids=str
)
@pytest.mark.parametrize(("decay", "starts"), [(1.0, 0.0), (50.0, 0.02), (0.01, 0.01)])
def test_16_bits(sizes: tuple[int, ...], dtype: torch.dtype, decay: float, starts: float, way: str) -> None:
    """Against what the oracle's own answers lose when rounded to the dtype: 1.75 times for what comes in it (states are rounded, and the inputs they
    are summed from: 1.57 was measured where decays are slow), three times for what comes in fp32."""
    computed, wanted, _ = compare(sizes, decay=decay, starts=starts, dtype=dtype)
    off = []
    for name, a, b in zip(("y", "final", *(f"d{n}" for n in NAMES)), computed, wanted):
        if b.norm() < 1e-3 * b.numel() ** 0.5:
            continue  # forgotten: nothing to compare with
        times = distance(a, b) / distance(b.to(dtype), b)
        if times > (1.75 if name in ("y", "dx", "dB", "dC") else 3.0):
            off.append(f"{name} {times:.2f}")
    assert not off, off


ODD = [(24, 40), (17, 33), (24, 64), (17, 64), (64, 40), (64, 33), (1, 1), (16, 16), (8, 24), (33, 17), (80, 48), (127, 65), (100, 200)]
CASES = [(torch.bfloat16, widths, "joint") for widths in ODD]
CASES += [(dtype, widths, "joint") for dtype in (torch.float16, torch.float32) for widths in ODD[:7:2]]
CASES += [(torch.bfloat16, widths, layout) for widths in ((24, 40), (64, 64), (17, 33)) for layout in ("apart", "shifted", "time first")]


def laid(tensors: list[torch.Tensor], layout: str) -> list[torch.Tensor]:
    """x, B and C: each by itself; columns 1 and on of a wider tensor, so that no row is aligned; with time before the batch."""

    def change(t: torch.Tensor) -> torch.Tensor:
        if layout == "shifted":
            flat = t.flatten(2)
            wide = torch.cat([flat[..., :1], flat, flat[..., :2]], -1)
            return wide[..., 1:-2].unflatten(-1, t.shape[2:])
        return t.transpose(0, 1).contiguous().transpose(0, 1) if layout == "time first" else t.contiguous()

    return [change(t) if i in (0, 3, 4) and layout != "joint" else t for i, t in enumerate(tensors)]


@pytest.mark.parametrize(("dtype", "widths", "layout"), CASES, ids=str)
def test_widths_and_layouts_of_every_dtype(dtype: torch.dtype, widths: tuple[int, int], layout: str, way: str) -> None:
    """Head and state widths that are no powers of two and no multiples of 16, both, one of them or none."""
    P, N = widths
    tensors, starts = problem(2, 300, 6, P, 2, N, dtype=dtype, starts=0.02, device="cuda")
    tensors = laid(tensors, layout)
    torch.manual_seed(0)
    dy, d_final = torch.randn(tensors[0].shape, device="cuda").to(dtype), torch.randn(tensors[5].shape, device="cuda")
    computed, wanted = answers(scan, tensors, starts, dy, d_final), oracle(tensors, starts, dy, d_final)
    for name, a, b in zip(("y", "final", *(f"d{n}" for n in NAMES)), computed, wanted):
        # of few numbers it may be less
        rounding = 0.0 if dtype == torch.float32 else max(distance(b.to(dtype), b), torch.finfo(dtype).eps / 5)
        limit = (1.75 if name in ("y", "dx", "dB", "dC") else 3.0) * rounding + (1e-4 if name not in ("y", "final") else 1e-5)
        assert distance(a, b) <= limit, f"{name}: {distance(a, b):.1e}, of which rounding {rounding:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_of_very_different_sizes(dtype: torch.dtype, way: str) -> None:
    """Every seventh step is large, and decays are fast: gradients of A and dt against the float64 loop."""
    for step, decay in ((20.0, 1.0), (0.1, 1e3)):
        tensors, starts = problem(1, 400, 4, 32, 1, 16, dtype=dtype, starts=0.01, device="cuda")
        tensors[1] = torch.full_like(tensors[1], 1e-4) if step > 1 else step * torch.rand_like(tensors[1])
        tensors[1][:, ::7] = step
        tensors[2] = -decay * torch.linspace(0.5, 1, 4, device="cuda")
        dy, d_final = torch.randn(tensors[0].shape, device="cuda").to(dtype), torch.randn(tensors[5].shape, device="cuda")
        computed, wanted = answers(scan, tensors, starts, dy, d_final), oracle(tensors, starts, dy, d_final)
        for name, a, b in zip(("y", "final", *(f"d{n}" for n in NAMES)), computed, wanted):
            rounding = 0.0 if dtype == torch.float32 else 3 * distance(b.to(dtype), b)
            assert distance(a, b) <= rounding + 1e-5, f"steps of {step}, decay {decay}: {name} is off by {distance(a, b):.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_not_finite_stays_in_its_document(dtype: torch.dtype, way: str) -> None:
    """In whichever input; also where several documents share a chunk, and where one began in an earlier chunk."""
    for bad in (0, 1, 3, 4):
        for place, cuts in ((200, (190, 230)), (60, (40, 350)), (255, (255, 256))):
            tensors, _ = problem(2, 400, 4, 64, 2, 32, dtype=dtype, device="cuda")
            starts = torch.zeros(2, 400, dtype=torch.bool, device="cuda")
            starts[:, list(cuts)] = True
            others = torch.ones(400, dtype=torch.bool)
            others[slice(*cuts)] = False
            wanted = scan(*tensors[:6], starts, D=tensors[6])
            tensors[bad] = tensors[bad].clone()
            tensors[bad][0, place] = torch.nan if bad % 2 else torch.inf
            y, final = scan(*tensors[:6], starts, D=tensors[6])
            assert distance(y[:, others], wanted[0][:, others]) < 1e-2 and distance(final, wanted[1]) < 1e-2
            assert torch.equal(y[1], wanted[0][1]) and not y[0].isfinite().all()


def test_repeatable_and_compiled(way: str) -> None:
    tensors, starts = problem(2, 700, 16, 64, 1, 64, dtype=torch.bfloat16, starts=0.01, device="cuda")
    dy, d_final = torch.randn(tensors[0].shape, device="cuda"), torch.randn(tensors[5].shape, device="cuda")
    first, again = (answers(scan, tensors, starts, dy, d_final) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    compiled = answers(torch.compile(scan, fullgraph=True), tensors, starts, dy, d_final)
    assert all(torch.equal(a, b) for a, b in zip(first, compiled))


def test_a_million_steps_past_int32_elements(most_of_a_gpu: None) -> None:
    T, H, P, N = (1 << 20) + 5, 32, 64, 16  # 2.2e9 elements of x
    joint = torch.zeros(1, T, H * P + 2 * N, device="cuda", dtype=torch.bfloat16)
    joint[:, -300:].normal_()
    x, b, c = joint.split([H * P, N, N], -1)
    dt, A = torch.full((1, T, H), 0.1, device="cuda"), -torch.rand(H, device="cuda")
    with torch.no_grad():
        tensors = [x.unflatten(-1, (H, P)), dt, A, b.unflatten(-1, (1, N)), c.unflatten(-1, (1, N))]
        y, final = ssd(*tensors)
        tail = [t[:, -300:].double() if t.ndim > 1 else t.double() for t in tensors]
        expected, end = reference.ssd_sequential(*tail)
    assert distance(y[:, -300:], expected) < 6e-3 and distance(final, end) < 6e-3 and not y[:, :-300].any()
