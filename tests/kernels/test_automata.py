"""Starts of slices by composed maps (kernels/dense_rnn/automata.py), on exact trackers made by hand: in plain torch and in Triton's interpreter."""

import pytest
import torch

from kernels.dense_rnn import automata, reference
from kernels.dense_rnn.automata import compose, solve
from kernels.dense_rnn.dictionary import Dictionary, slices_for
from models.cells import load_cell
from scripts.bench.trackers import TRACKERS, products, size, tracker
from tests.conftest import run_program
from tests.kernels.dense_rnn_cases import problem


def learnt(name: str, cell_name: str, heads: int, dtype: torch.dtype, all_states: bool) -> torch.Tensor:
    """The dictionary of another row's states, as many as the group has elements, or as there are states."""
    K, n = size(name)
    pre, rec, mat, h0 = tracker(name, load_cell(cell_name), 1, 40 * K, heads, dtype, seed=7)
    states = reference.sequential(load_cell(cell_name), pre, rec, mat, h0, None)[0]
    dictionary = Dictionary(heads, K if all_states else n, 1, K)
    dictionary.learn(states[0, 4:])
    assert not all_states or (dictionary.spread == 0).all()
    return dictionary.states


@pytest.mark.parametrize("name", TRACKERS)
@pytest.mark.parametrize("cell_name", ["dense_elman", "dense_gru"])
def test_exact_trackers_are_solved_in_one_pass_bit_for_bit(name: str, cell_name: str) -> None:
    cell, heads, n = load_cell(cell_name), 1 if name == "A5" else 2, 8
    pre, rec, mat, h0 = tracker(name, cell, 2, 96, heads, torch.float32)
    wanted = reference.sequential(cell, pre, rec, mat, h0, None)[0]
    moves, neutral = products(name)
    assert len(wanted.flatten(0, 1).unique(dim=0)) > len(moves)
    states = solve(cell, pre, rec, mat, h0, None, learnt(name, cell_name, heads, torch.float32, all_states=True), n)
    assert torch.equal(states, wanted) and automata.last_report == automata.Report(n, 0, 0.0)
    reference.solve(cell, pre, rec, mat, h0, None, n, tolerance=0.0)
    assert reference.last_report.corrections == n - 2  # corrections alone make one slice after the other right; the burn-in made the second


def test_a_product_for_each_element_is_enough_where_the_last_element_read_settles() -> None:
    cell = load_cell("dense_elman")
    pre, rec, mat, h0 = tracker("S3", cell, 1, 128, 1, torch.float64)
    states = solve(cell, pre, rec, mat, h0, None, one_for_each("S3"), 8)
    assert torch.equal(states, reference.sequential(cell, pre, rec, mat, h0, None)[0]) and automata.last_report.repeats == 0
    assert states.dtype == torch.float64


def one_for_each(name: str) -> torch.Tensor:
    """(1, n, 1, K): the states after element 0 was read."""
    (X, n) = products(name)[0].shape
    states = torch.full((n, X, n), -1.0)
    states[torch.arange(n), 0, torch.arange(n)] = 1
    return states.view(1, n, 1, X * n)


def test_documents_begin_inside_slices() -> None:
    cell = load_cell("dense_gru")
    pre, rec, mat, h0 = tracker("S3", cell, 2, 90, 1, torch.float32)
    starts = torch.rand(2, 90, generator=torch.Generator().manual_seed(1)) < 0.05
    wanted = reference.sequential(cell, pre, rec, mat, h0, starts)[0]
    dictionary = Dictionary(1, 20, 1, size("S3")[0])
    dictionary.learn(wanted.flatten(0, 1))
    assert torch.equal(solve(cell, pre, rec, mat, h0, starts, dictionary.states, 7), wanted) and not automata.last_report.walked


def test_what_is_no_automaton_is_walked_in_order() -> None:
    cell, tensors, _ = problem("dense_lstm", 2, 64, 2, 4, gain=12.0)
    pre, rec, mat, h0 = tensors
    wanted = reference.sequential(cell, pre, rec, mat, h0, None)[0]
    dictionary = Dictionary(2, 6, 2, 4)
    dictionary.learn(wanted.flatten(0, 1))
    assert torch.equal(solve(cell, pre, rec, mat, h0, None, dictionary.states, 8), wanted)
    assert automata.last_report.walked and dictionary.spread.min() > 0.05


def test_maps_compose_as_they_follow_each_other() -> None:
    maps, index = torch.randint(5, (2, 11, 3, 5)), torch.randint(5, (2, 3))
    whole = compose(maps, index)
    for s in range(11):
        assert torch.equal(whole[:, s], index)
        index = maps[:, s].gather(-1, index[..., None])[..., 0]
    assert torch.equal(whole[:, 11], index)


def test_a_dictionary_is_part_of_a_state_dict_and_learns_the_same_from_the_same() -> None:
    borders = torch.randn(50, 2, 12, generator=torch.Generator().manual_seed(0))
    one, other = Dictionary(3, 5, 2, 4), Dictionary(3, 5, 2, 4)
    one.learn(borders)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.states, other.states) and torch.equal(one.spread, other.spread)
    heads = borders.view(50, 2, 3, 4)
    assert all((heads[:, :, e] == one.states[e, m]).flatten(1).all(1).any() for e in range(3) for m in range(5))


def test_it_pays_for_long_rows_and_few_of_them_only() -> None:
    assert slices_for(16, 2048, 12, 48, programs=264) == 1
    assert slices_for(1, 32768, 12, 6, programs=264) > 1 and slices_for(1, 32768, 1, 48, programs=264) > 1
    assert slices_for(1, 256, 1, 6, programs=264) == 1


def test_kernels_in_the_interpreter() -> None:
    done = run_program(["-m", "tests.kernels.interpreted_automata"], TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
