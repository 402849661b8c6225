"""The delta rule's Triton kernels on a GPU against the float64 loop, in the sizes and ways the interpreter is too slow for."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from kernels.delta_rule import delta_rule, launch, reference
from tests.conftest import ROOT
from tests.kernels.delta_rule_cases import NAMES, answers, asked, distance, oracle, problem
from tests.kernels.delta_rule_ranks import OPTIONS, by_slices, compare, whole_problem

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

LABELS = ("o", "final", *(f"d{n}" for n in NAMES))
ALL: dict[str, Any] = {"normalize": True, "scale": 0.125}


def found_and_wanted(tensors: list[torch.Tensor], starts: Any, **options: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    torch.manual_seed(0)
    do, d_final = asked(tensors)
    return answers(delta_rule, tensors, starts, do, d_final, **options), oracle(tensors, starts, do, d_final, **options)


def within(found: list[torch.Tensor], wanted: list[torch.Tensor], times: float) -> None:
    """Against what the oracle's own answers lose when rounded to 16 bits: states, corrected values and inverses are rounded on the way."""
    off = []
    for name, a, b in zip(LABELS, found, wanted):
        if b.norm() < 1e-3 * b.numel() ** 0.5:
            continue  # forgotten: nothing to compare with
        rounding = max(distance(b.to(torch.bfloat16), b), torch.finfo(torch.bfloat16).eps / 5)
        if not distance(a, b) <= times * rounding:
            off.append(f"{name} {distance(a, b) / rounding:.2f}")
    assert not off, off


SIZES = [
    (2, 300, 4, 64, 2, 128, 1),
    (1, 1, 2, 64, 1, 64, 1),
    (1, 70, 6, 24, 2, 40, 2),
    (1, 257, 2, 128, 2, 128, 3),
]
# Of four bytes one tile does not hold such keys; compiling takes most of a minute a case.
WIDER_THAN_128 = [
    ((1, 130, 1, 256, 1, 256, 1), 0.1, 0.0),
    ((2, 200, 4, 128, 2, 192, 2), 0.0, 0.05),
    ((9, 192, 32, 64, 32, 160, 1), 50.0, 0.02),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("decay", "starts"), [(0.1, 0.0), (50.0, 0.05), (0.0, 0.02)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_values_and_gradients(sizes: tuple[int, ...], decay: float, starts: float, dtype: torch.dtype) -> None:
    close(*problem(*sizes, decay=decay, starts=starts, dtype=dtype, device="cuda"))


@pytest.mark.parametrize(("sizes", "decay", "starts"), WIDER_THAN_128, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_keys_wider_than_128(sizes: tuple[int, ...], decay: float, starts: float, dtype: torch.dtype) -> None:
    close(*problem(*sizes, decay=decay, starts=starts, dtype=dtype, device="cuda"))


def close(tensors: list[torch.Tensor], starts: Any) -> None:
    """To what the dtype of the values promises."""
    found, wanted = found_and_wanted(tensors, starts, **ALL)
    dtype = tensors[2].dtype
    if dtype == torch.bfloat16:
        return within(found, wanted, 8.0)
    errors = [distance(a, b) if b.norm() > 1e-6 else float((a - b).norm()) for a, b in zip(found, wanted)]
    limits = [1e-3] * 8 if dtype == torch.float16 else [1e-5] * 2 + [1e-4] * 6
    off = [f"{name} {error:.1e}" for name, error, limit in zip(LABELS, errors, limits) if not error <= limit]
    assert not off, off


WIDTHS = [(24, 40), (17, 33), (24, 64), (64, 40), (1, 1), (8, 24), (80, 48), (127, 65), (96, 96), (100, 200), (16, 256), (256, 16)]


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("layout", ["joint", "apart", "shifted"])
def test_widths_and_layouts(widths: tuple[int, int], layout: str) -> None:
    """Widths that are no powers of two and no multiples of 16; tensors by themselves, and columns 1 and on of a wider one."""
    V, K = widths
    tensors, starts = problem(2, 200, 6, V, 2, K, dtype=torch.bfloat16, starts=0.02, device="cuda")

    def laid(t: torch.Tensor) -> torch.Tensor:
        if layout == "shifted":
            flat = t.flatten(2)
            return torch.cat([flat[..., :1], flat, flat[..., :2]], -1)[..., 1:-2].unflatten(-1, t.shape[2:])
        return t.contiguous() if layout == "apart" else t

    # of one channel each update erases nearly all: what is left is small beside what was rounded, inverses kept for the way back included (78 on
    # an H200)
    within(*found_and_wanted([laid(t) if i < 3 else t for i, t in enumerate(tensors)], starts, **ALL), 5.0 if K > 1 else 100.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extremes_stay_finite_and_right(dtype: torch.dtype) -> None:
    """Keys that repeat, b = 2, gates of one and of nothing."""
    tensors, _ = problem(2, 300, 4, 64, 2, 64, dtype=dtype, device="cuda")
    tensors[1] = tensors[1][:, :1].expand_as(tensors[1]).clone()
    tensors[3][:], tensors[4][:] = 2.0, 0.0
    found, wanted = found_and_wanted(tensors, None, **ALL)
    assert all(t.isfinite().all() for t in found)
    for name, a, b in zip(LABELS, found, wanted):
        assert distance(a, b) < (2e-4 if dtype == torch.float32 else 5e-2), (
            f"{name}: {distance(a, b):.1e}"
        )  # 2e-4: sums of +-2, in tf32 products
    tensors[4][:, ::7], tensors[4][:, 1::7] = -torch.inf, -60.0
    found, wanted = found_and_wanted(tensors, None, **ALL)
    assert all(t.isfinite().all() for t in found) and not found[-1].any()
    for name, a, b in zip(LABELS[:-1], found, wanted):
        assert distance(a, b) < (1e-4 if dtype == torch.float32 else 5e-2), f"{name}: {distance(a, b):.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_everything_at_once(dtype: torch.dtype) -> None:
    """T = 4,096, packed rows, h0, a gradient of the final state, two updates a token, grouped heads: the whole and two slices."""
    tensors, starts, do, d_final = whole_problem(4096, dtype, "cuda", (3, 4, 64, 2, 128, 2))
    wanted = oracle(tensors, starts, do, d_final, **OPTIONS)
    limit = 3e-2 if dtype == torch.bfloat16 else 1e-4
    chunked = answers(delta_rule, [t.double() for t in tensors], starts, do.double(), d_final.double(), **OPTIONS)
    compare(chunked, wanted, 1e-9)  # what ranks compare themselves with
    compare(answers(delta_rule, tensors, starts, do, d_final, **OPTIONS), wanted, limit)
    compare(by_slices(tensors, starts, do, d_final, 2), wanted, limit)


def test_everything_at_once_on_two_devices() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]  # not forked: CUDA is in use here
    command = [*launcher, "-m", "tests.kernels.delta_rule_ranks", "cuda", "4096", "bfloat16,float32"]
    settings = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.count("is equal") == 4, done.stdout + done.stderr[-3000:]


@pytest.mark.parametrize("sizes", [(2, 300, 4, 128, 2, 128, 1), (1, 257, 2, 64, 2, 256, 3), (9, 200, 32, 128, 32, 64, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_states_of_kept_corrected_values_are_those_of_the_forward_pass(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """Bit for bit: what differed would add up from chunk to chunk, as no update takes it out again. Few heads and many, whose walks take other rows."""
    tensors, starts = problem(*sizes, dtype=dtype, starts=0.02, decay=0.1, device="cuda")
    q, k, v, beta, g, h0 = tensors
    first = launch.Problem(q, k, v, beta, g, starts, True, 0.125)
    first.project(keep=True)
    last = first.walk(launch.filled(h0, first.V, first.K))
    again = launch.Problem(q, k, v, beta, g, starts, True, 0.125, first.kept)
    again.project(values=False, keep=True)
    assert torch.equal(again.walk(launch.filled(h0, first.V, first.K), given=True), last)
    assert torch.equal(again.states, first.states)


def test_packed_rows_chunks_and_steps_equal_the_whole() -> None:
    tensors, starts = problem(2, 300, 4, 64, 2, 64, dtype=torch.bfloat16, starts=0.02, device="cuda")
    q, k, v, beta, g, h0 = tensors
    assert starts is not None
    with torch.no_grad():
        whole, final = delta_rule(*(*tensors, starts), **ALL)
        state, parts = h0, []
        for a, e in ((0, 100), (100, 165), *((t, t + 1) for t in range(165, 300))):
            cut = (t[:, a:e] for t in (q, k, v, beta, g))
            o, state = delta_rule(*(*cut, state, starts[:, a:e]), **ALL)
            parts.append(o)
        assert distance(torch.cat(parts, 1), whole.double()) < 1e-2 and distance(state, final.double()) < 1e-2
        starts[:] = False
        starts[:, 130] = True
        packed, end = delta_rule(*(*tensors, starts), **ALL)
        alone, last = delta_rule(*(t[:, 130:] for t in (q, k, v, beta, g)), **ALL)
        assert distance(packed[:, 130:], alone.double()) < 1e-2 and distance(end, last.double()) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_not_finite_stays_in_its_document(dtype: torch.dtype) -> None:
    for bad in (0, 1, 2, 3, 4):
        for place, cuts in ((200, (190, 230)), (60, (40, 350)), (255, (255, 256))):
            tensors, _ = problem(2, 400, 4, 64, 2, 32, dtype=dtype, device="cuda")
            starts = torch.zeros(2, 400, dtype=torch.bool, device="cuda")
            starts[:, list(cuts)] = True
            others = torch.ones(400, dtype=torch.bool)
            others[slice(*cuts)] = False
            with torch.no_grad():
                wanted = delta_rule(*(*tensors, starts), **ALL)
                tensors[bad] = tensors[bad].clone()
                tensors[bad][0, place] = torch.nan
                o, final = delta_rule(*(*tensors, starts), **ALL)
            assert distance(o[:, others], wanted[0][:, others]) < 1e-2 and distance(final, wanted[1]) < 1e-2
            assert torch.equal(o[1], wanted[0][1]) and not o[0].isfinite().all()


def test_repeatable_compiled_recomputed_and_in_a_graph() -> None:
    tensors, starts = problem(2, 700, 8, 64, 4, 64, dtype=torch.bfloat16, starts=0.01, device="cuda")
    do, d_final = asked(tensors)
    first, again = (answers(delta_rule, tensors, starts, do, d_final, **ALL) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    whole = [t.float() for t in tensors]
    fp32 = answers(delta_rule, whole, starts, do.float(), d_final, **ALL)
    with torch.autocast("cuda", torch.bfloat16):  # changes nothing
        assert all(torch.equal(a, b) for a, b in zip(fp32, answers(delta_rule, whole, starts, do.float(), d_final, **ALL)))
        assert all(torch.equal(a, b) for a, b in zip(first, answers(delta_rule, tensors, starts, do, d_final, **ALL)))
    compiled = answers(torch.compile(delta_rule, fullgraph=True), tensors, starts, do, d_final, **ALL)
    assert all(torch.equal(a, b) for a, b in zip(first, compiled))

    def recomputed(*given: Any, **options: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(delta_rule, *given, use_reentrant=False, **options)

    assert all(torch.equal(a, b) for a, b in zip(first, answers(recomputed, tensors, starts, do, d_final, **ALL)))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        answers(delta_rule, tensors, starts, do, d_final, **ALL)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = answers(delta_rule, tensors, starts, do, d_final, **ALL)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(first, replayed))


def test_more_blocks_than_a_grid_is_wide_in_other_dimensions() -> None:
    """70,000 rows of the batch; the last fifty of them, gradients too, as by themselves."""
    tensors, _ = problem(70_000, 3, 1, 16, 1, 16, dtype=torch.bfloat16, device="cuda")
    do, d_final = asked(tensors)
    found = answers(delta_rule, tensors, None, do, d_final, **ALL)
    wanted = oracle([t[-50:].contiguous() for t in tensors], None, do[-50:], d_final[-50:], **ALL)
    within([t[-50:] for t in found], wanted, 8.0)
    assert all(t.isfinite().all() for t in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_more_than_two_to_the_seventeenth_steps(dtype: torch.dtype) -> None:
    """Against chunks in float64, as the loop would take hours; documents of some thousand tokens, and one of all."""
    for starts in (1e-4, 0.0):
        tensors, new = problem(1, (1 << 17) + 5, 2, 32, 1, 64, dtype=dtype, starts=starts, decay=0.01, device="cuda")
        do, d_final = asked(tensors)
        wanted = answers(delta_rule, [t.double() for t in tensors], new, do.double(), d_final.double(), **ALL)
        within(answers(delta_rule, tensors, new, do, d_final, **ALL), wanted, 8.0)


def test_long_and_past_int32_elements(most_of_a_gpu: None) -> None:
    T, H, K, V = (1 << 18) + 5, 64, 16, 128  # 2.1e9 elements of v
    q, k = (torch.zeros(1, T, 1, K, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    v, beta = torch.zeros(1, T, H, V, device="cuda", dtype=torch.bfloat16), torch.full((1, T, H), 0.5, device="cuda")
    g = torch.full((1, T, H), -0.01, device="cuda")
    for t in (q, k, v):
        t[:, -300:].normal_()
    with torch.no_grad():
        o, final = delta_rule(q, k, v, beta, g, **ALL)
        tail = [t[:, -300:].double() for t in (q, k, v, beta, g)]
        wanted, end = reference.delta_rule_sequential(*tail, **ALL)
    assert distance(o[:, -300:], wanted) < 1e-2 and distance(final, end) < 1e-2 and not o[:, :-300].any()


def test_gradients_past_int32_elements(most_of_a_gpu: None) -> None:
    """Of the last 300 steps of 2.1e9 values; those before write nothing."""
    T, H, K, V, tail = (1 << 18) + 5, 64, 16, 128, 300
    q, k = (torch.randn(1, T, 1, K, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    v, do = (torch.zeros(1, T, H, V, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    beta, g = torch.full((1, T, H), 0.5, device="cuda"), torch.full((1, T, H), -0.01, device="cuda")
    for t in (v, do):
        t[:, -tail:].normal_()
    leaves = [t.requires_grad_() for t in (q, k, v, beta, g)]
    found = torch.autograd.grad(delta_rule(*leaves, **ALL)[0], leaves, do)
    parts = [t.detach()[:, -tail:].double().requires_grad_() for t in leaves]
    wanted = torch.autograd.grad(reference.delta_rule_sequential(*parts, **ALL)[0], parts, do[:, -tail:].double())
    within([t[:, -tail:] for t in found], [*wanted], 8.0)
    assert found[2][:, : -(1 << 12)].abs().amax() < 1e-12  # gates of exp(-0.01) have forgotten them when somebody reads
