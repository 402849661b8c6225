"""The delta rule in plain torch, by chunks, against the recurrence in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.delta_rule import delta_rule
from models.mixers.delta import Config
from tests.conftest import ROOT, run_ranks
from tests.kernels.delta_rule_cases import answers, asked, oracle, problem
from tests.kernels.delta_rule_ranks import OPTIONS, by_slices, compare, whole_problem


@pytest.mark.parametrize(("T", "n"), [(1, 1), (7, 3), (64, 1), (65, 2), (130, 1)])
@pytest.mark.parametrize("starts", [0.0, 0.1])
@pytest.mark.parametrize("normalize", [False, True])
def test_values_and_gradients(T: int, n: int, starts: float, normalize: bool) -> None:
    tensors, new = problem(2, T, 4, 3, 2, 5, n, starts=starts, unit=not normalize)
    tensors = [t.double() for t in tensors]
    do, d_final = asked(tensors)
    found = answers(delta_rule, tensors, new, do, d_final, normalize=normalize, scale=0.5)
    for a, b in zip(found, oracle(tensors, new, do, d_final, normalize=normalize, scale=0.5)):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_gates_of_one_and_of_nothing_repeated_keys_and_reflections_stay_finite() -> None:
    tensors, _ = problem(1, 200, 2, 8, 1, 16)
    tensors[1][:], tensors[3][:] = tensors[1][:, :1], 2.0
    tensors[4][:] = 0.0
    do, d_final = asked(tensors)
    compare(answers(delta_rule, tensors, None, do, d_final, normalize=True), oracle(tensors, None, do, d_final, normalize=True), 1e-4)
    tensors[4][:, ::9], tensors[4][:, 1::9] = -torch.inf, -200.0
    found, wanted = answers(delta_rule, tensors, None, do, d_final, normalize=True), oracle(tensors, None, do, d_final, normalize=True)
    assert all(t.isfinite().all() for t in found)
    compare(found, wanted, 1e-4, ("dh0",))  # nothing comes from behind a gate of nothing
    assert not found[-1].any()


def test_one_step_and_no_steps() -> None:
    tensors, _ = problem(3, 1, 4, 6, 2, 8, 3, starts=0.0)
    starts = torch.tensor([[True], [False], [False]])
    tensors[5][0], tensors[4][1] = torch.nan, -torch.inf
    with torch.no_grad():
        o, final = delta_rule(*(*tensors, starts), normalize=True, scale=0.5)
    wanted = oracle(tensors, starts, *asked(tensors), normalize=True, scale=0.5)
    torch.testing.assert_close(o.double(), wanted[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(final.double(), wanted[1], atol=1e-5, rtol=1e-5)
    q, k, v, beta, g, h0 = (t[:, :0] if i < 5 else t for i, t in enumerate(tensors))
    o, final = delta_rule(q, k, v, beta, g, h0)
    assert o.shape == (3, 0, 4, 6) and torch.equal(final[1:], h0[1:])


@pytest.mark.parametrize("place", range(6))
def test_gradient_of_one_tensor_only(place: int) -> None:
    """The final state knows nothing of queries."""
    tensors, starts = problem(1, 9, 2, 3, 1, 4, starts=0.2)
    do, d_final = asked(tensors)
    leaves = [t.clone().requires_grad_(i == place) for i, t in enumerate(tensors)]
    o, final = delta_rule(*(*leaves, starts), normalize=True)
    (o * do).sum().add((final * d_final).sum()).backward()
    compare([leaves[place].grad], [oracle(tensors, starts, do, d_final, normalize=True)[2 + place]], 1e-5)


@pytest.mark.parametrize(
    "sizes", [(0, 5, 2, 8, 1, 8), (2, 0, 2, 8, 1, 8), (1, 3, 2, 0, 1, 4), (1, 3, 2, 4, 1, 0), (1, 1, 1, 1, 1, 1)], ids=str
)
def test_sizes_of_nothing_and_of_one(sizes: tuple[int, ...]) -> None:
    tensors, _ = problem(*sizes)
    starts = torch.zeros(*sizes[:2], dtype=torch.bool)
    do, d_final = asked(tensors)
    found = answers(delta_rule, tensors, starts, do, d_final, normalize=True)
    assert [t.shape for t in found[2:]] == [t.shape for t in tensors] and found[0].shape == do.shape
    assert all(t.isfinite().all() for t in found)


def test_a_document_a_token_and_a_gate_of_nothing_beside_reflections() -> None:
    tensors, _ = problem(1, 80, 2, 8, 1, 8)
    tensors[3][:], tensors[4][:, 30] = 2.0, -torch.inf
    do, d_final = asked(tensors)
    for starts in (torch.ones(1, 80, dtype=torch.bool), None):
        wanted = oracle(tensors, starts, do, d_final, normalize=True)
        skip = ("dg", "dh0") if starts is not None else ("dh0",)
        compare(answers(delta_rule, tensors, starts, do, d_final, normalize=True), wanted, 1e-5, skip)


def test_what_does_not_fit_is_refused() -> None:
    q, k, v, beta, g, _ = problem(1, 6, 4, 8, 2, 8)[0]
    with pytest.raises(ValueError, match="do not go together"):
        delta_rule(q, k[:, :4], v, beta, g)
    with pytest.raises(ValueError, match="must divide"):
        delta_rule(q[:, :4], k, v, beta)
    with pytest.raises(ValueError, match="must have the shape"):
        delta_rule(q, k, v, beta, g[:, :3])


@pytest.mark.parametrize(
    ("place", "wrong", "said"),
    [
        (5, torch.zeros(1, 4, 8, 4), "h0 must be"),  # kernels would cut it, or read what lies behind it
        (5, torch.zeros(3, 4, 8, 8), "h0 must be"),
        (6, torch.zeros(1, 5, dtype=torch.bool), "starts must be bool of shape"),
        (6, torch.zeros(1, 6, dtype=torch.int64), "starts must be bool"),
        (0, torch.zeros(6, 2, 8), "q must be"),
        (2, torch.zeros(1, 6, 4, 8, dtype=torch.int64), "floating-point"),
        (3, torch.zeros(1, 6, 4, device="meta"), "on one device"),
    ],
    ids=str,
)
def test_states_starts_and_kinds_that_do_not_fit_are_refused(place: int, wrong: torch.Tensor, said: str) -> None:
    given: list[Any] = [*problem(1, 6, 4, 8, 2, 8)[0], torch.zeros(1, 6, dtype=torch.bool)]
    given[place] = wrong
    with pytest.raises(ValueError, match=said):
        delta_rule(*given)


def test_what_is_not_finite_stays_in_its_document() -> None:
    """Its gradients too."""
    for bad in range(5):
        tensors, _ = problem(1, 40, 2, 5, 1, 6)
        starts = torch.zeros(1, 40, dtype=torch.bool)
        starts[:, [10, 20]] = True
        do, d_final = asked(tensors)
        wanted = answers(delta_rule, tensors, starts, do, d_final, normalize=True)
        tensors[bad][0, 12] = torch.nan
        found = answers(delta_rule, tensors, starts, do, d_final, normalize=True)
        others = torch.cat([torch.arange(10), torch.arange(20, 40)])
        assert not found[0].isfinite().all()
        for i, (a, b) in enumerate(zip(found, wanted)):
            a, b = (a, b) if i in (1, 7) else (a[:, others], b[:, others])
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_keys_whose_squares_leave_the_dtype_are_not_taken_for_zeros() -> None:
    tensors, _ = problem(1, 70, 2, 8, 1, 8)
    starts = (torch.arange(70) == 40)[None]
    wanted, _ = delta_rule(*(*tensors, starts), normalize=True)
    tensors[1] = torch.cat([tensors[1][:, :45], tensors[1][:, 45:] * 1e25], 1)
    o, final = delta_rule(*(*tensors, starts), normalize=True)
    torch.testing.assert_close(o[:, :45], wanted[:, :45])
    assert o[:, 45:].isnan().all() and final.isnan().all()


def test_widths_of_one_strides_of_nothing_and_gates_far_below_zero() -> None:
    """One head of one channel; tensors whose steps or heads are one and the same; log gates to the lowest number beside b = 2."""
    for sizes in ((2, 70, 1, 1, 1, 1), (1, 70, 2, 5, 2, 1, 2), (2, 70, 2, 8, 1, 8)):
        tensors, _ = problem(*sizes)
        tensors[2], tensors[3] = tensors[2][:, :1].expand_as(tensors[2]), torch.full_like(tensors[3][:, :1], 2.0).expand_as(tensors[3])
        tensors[4][:, ::4], tensors[4][:, 1::4], tensors[4][:, 2::4] = -torch.inf, torch.finfo(torch.float32).min, -88.0
        do, d_final = asked(tensors)
        found = answers(delta_rule, tensors, None, do, d_final, normalize=True)
        for a, b in zip(found, oracle(tensors, None, do, d_final, normalize=True)):
            assert (a - b).norm() < 1e-4 * b.norm().clamp(min=0.1)  # two reflections of one channel leave nothing


def test_all_at_once_in_slices() -> None:
    """Packed rows, h0, a gradient of the final state, grouped heads, two updates a token, four slices of 1,024 tokens."""
    tensors, starts, do, d_final = whole_problem(1024, torch.float32, "cpu", (2, 2, 6, 1, 8, 2))
    wanted = oracle(tensors, starts, do, d_final, **OPTIONS)
    compare(answers(delta_rule, tensors, starts, do, d_final, **OPTIONS), wanted, 1e-4)
    compare(by_slices(tensors, starts, do, d_final, 4), wanted, 1e-4)


def test_all_at_once_on_two_ranks() -> None:
    done = run_ranks(2, ["-m", "tests.kernels.delta_rule_ranks", "cpu", "4096", "float32"], PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("is equal") == 2


@pytest.mark.parametrize("T", [1, 70])
def test_autocast_changes_nothing(T: int) -> None:
    tensors, starts = problem(1, T, 2, 8, 1, 16, 2, starts=0.05)
    do, d_final = asked(tensors)
    wanted = answers(delta_rule, tensors, starts, do, d_final, normalize=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = answers(delta_rule, tensors, starts, do, d_final, normalize=True)
        with torch.no_grad():
            alone = delta_rule(*(*tensors, starts), normalize=True)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))
    compare([*alone], wanted[:2], 1e-6)


@pytest.mark.slow
def test_several_updates_compile() -> None:
    tensors, starts = problem(1, 70, 2, 8, 1, 8, 2, starts=0.1)
    with torch.no_grad():
        wanted = delta_rule(*(*tensors, starts), normalize=True)
        found = torch.compile(delta_rule, fullgraph=True)(*(*tensors, starts), normalize=True)
    compare([*found], [*wanted], 1e-5)


@pytest.mark.parametrize("wrong", [{"expand_v": float("nan")}, {"dt_max": float("inf")}, {"dt_floor": float("nan")}], ids=str)
def test_widths_and_step_sizes_that_are_no_numbers_are_refused(wrong: dict[str, float]) -> None:
    (problem,) = Config(**wrong).problems(64)  # type: ignore[arg-type]
    assert "must" in problem
