"""Generated tasks against brute force, their streams against SplitMix64 in plain integers, the reader's order, and mistakes in sentences."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from data.loader import BatchLoader
from data.synthetic import TASKS, build_task, to_dict
from data.synthetic.source import SyntheticReader, SyntheticSet
from data.synthetic.task import IGNORE, Draws, _mix
from data.synthetic.tracking import group_table

MAPPINGS: list[dict[str, Any]] = [
    {"name": "parity"},
    {"name": "parity", "answers": "last"},
    {"name": "cycle_navigation", "modulus": 5},
    {"name": "cycle_navigation", "modulus": 2, "answers": "last"},
    {"name": "modular_arithmetic", "modulus": 5},
    {"name": "modular_arithmetic", "modulus": 3, "answers": "last"},
    {"name": "word_problem", "group": "s3"},
    {"name": "word_problem", "group": "a4"},
    {"name": "word_problem", "group": "a5"},
    {"name": "word_problem", "group": "s5", "answers": "last"},
    {"name": "mqar", "pairs": 3, "symbols": 10},
    {"name": "mqar", "pairs": 1, "symbols": 4},
    {"name": "khop", "hops": 1, "symbols": 7},
    {"name": "khop", "hops": 2, "symbols": 5},
    {"name": "khop", "hops": 2, "symbols": 5, "rule": "successor"},
    {"name": "khop", "hops": 3, "symbols": 4, "rule": "successor", "answers": "last"},
    {"name": "khop", "hops": 4, "symbols": 3, "answers": "last"},
    {"name": "keep_nth", "n": 5, "symbols": 11},
    {"name": "keep_nth", "n": 1, "symbols": 11, "answers": "last"},
    {"name": "copying", "tokens": 4, "symbols": 6, "selective": True},
    {"name": "copying", "tokens": 3, "symbols": 6, "selective": False},
]


def key(mapping: dict) -> str:
    return "-".join(str(v) for v in mapping.values())


def last_only(labels: list[int]) -> list[int]:
    at = max(t for t, label in enumerate(labels) if label != IGNORE)
    return [label if t == at else IGNORE for t, label in enumerate(labels)]


def parity(x: list[int], m: dict) -> list[int]:
    return [sum(x[: t + 1]) % 2 for t in range(len(x))]


def cycle_navigation(x: list[int], m: dict) -> list[int]:
    place, out = 0, []
    for token in x:
        place += {0: 0, 1: 1, 2: -1}[token]
        out.append(place % m["modulus"])
    return out


def modular_arithmetic(x: list[int], m: dict) -> list[int]:
    p, out = m["modulus"], []
    for t in range(len(x)):
        if t % 2:
            out.append(IGNORE)
            continue
        value = x[0]
        for i in range(2, t + 1, 2):
            value = {p: value + x[i], p + 1: value - x[i], p + 2: value * x[i]}[x[i - 1]]
        out.append(value % p)
    return out


def word_problem(x: list[int], m: dict) -> list[int]:
    n = int(m["group"][1:])
    elements = list(itertools.permutations(range(n)))
    if m["group"][0] == "a":
        elements = [e for e in elements if sum(e[i] > e[j] for i in range(n) for j in range(i + 1, n)) % 2 == 0]
    out = []
    for t in range(len(x)):
        arrangement = list(range(n))  # where thing i lies now
        for token in x[: t + 1]:
            arrangement = [elements[token][place] for place in arrangement]
        out.append(elements.index(tuple(arrangement)))
    return out


def mqar(x: list[int], m: dict) -> list[int]:
    pairs, half = m["pairs"], m["symbols"] // 2
    value_of = {x[2 * i]: x[2 * i + 1] for i in range(pairs)}
    assert len(value_of) == pairs and all(k < half <= v for k, v in value_of.items())
    assert sorted(t for t in x[2 * pairs :] if t < half) == sorted(value_of)  # each key asked for once, and no other key anywhere
    return [IGNORE] * (2 * pairs) + [value_of[token] if token < half else IGNORE for token in x[2 * pairs :]]


def khop(x: list[int], m: dict) -> list[int]:
    out = []
    for t in range(len(x)):
        place: int | None = t
        if m["rule"] == "successor":
            earlier = [i for i in range(t - m["hops"] + 1) if x[i] == x[t]]
            out.append(x[earlier[-1] + m["hops"]] if earlier else IGNORE)
            continue
        for _ in range(m["hops"]):
            earlier = [i for i in range(place) if x[i] == x[place]] if place is not None else []
            place = earlier[-1] + 1 if earlier else None
        out.append(IGNORE if place is None else x[place])
    return out


def keep_nth(x: list[int], m: dict) -> list[int]:
    return [IGNORE] * (m["n"] - 1) + [x[m["n"] - 1]] * (len(x) - m["n"] + 1)


def copying(x: list[int], m: dict) -> list[int]:
    symbols = [token for token in x if token < m["symbols"]]
    assert len(symbols) == m["tokens"] and x[-m["tokens"] :] == [m["symbols"] + 1] * m["tokens"]
    if not m["selective"]:
        assert x[: m["tokens"]] == symbols
    return [IGNORE] * (len(x) - m["tokens"]) + symbols


@pytest.mark.parametrize("mapping", MAPPINGS, ids=key)
def test_answers_equal_brute_force(mapping: dict) -> None:
    task = build_task(mapping)
    full, vocabulary = to_dict(task), task.vocabulary()
    assert len(set(vocabulary)) == len(vocabulary)
    for T in (task.min_length(), task.min_length() + 1, 37):
        inputs, labels = task.sample(Draws(3, "train", np.arange(11)), T)
        assert inputs.shape == labels.shape == (11, T) and inputs.dtype == labels.dtype == np.int64
        for x, y in zip(inputs.tolist(), labels.tolist()):
            expected = globals()[mapping["name"]](x, full)
            assert y == (last_only(expected) if mapping.get("answers") == "last" else expected)
            assert 0 <= min(x) and max(max(x), max(y)) < len(vocabulary) and any(label != IGNORE for label in y)
    again = task.sample(Draws(3, "train", np.arange(11)), 37)
    other = task.sample(Draws(4, "train", np.arange(11)), 37)
    held_out = task.sample(Draws(3, "valid", np.arange(11)), 37)
    assert all((a == b).all() for a, b in zip((inputs, labels), again))
    assert (inputs != other[0]).any() and (inputs != held_out[0]).any()


def test_every_task_is_tested() -> None:
    assert {m["name"] for m in MAPPINGS} == set(TASKS)


@pytest.mark.parametrize("group,order", [("s3", 6), ("s4", 24), ("s5", 120), ("a4", 12), ("a5", 60)])
def test_tables_are_groups(group: str, order: int) -> None:
    table = group_table(group)
    assert table.shape == (order, order)
    assert (table[0] == np.arange(order)).all() and (table[:, 0] == np.arange(order)).all()
    assert (np.sort(table, 0) == np.arange(order)[:, None]).all() and (np.sort(table, 1) == np.arange(order)).all()
    a, b, c = np.random.default_rng(0).integers(0, order, (3, 500))
    assert (table[table[a, b], c] == table[a, table[b, c]]).all()


def splitmix64(state: int, n: int) -> list[int]:
    mask, out = (1 << 64) - 1, []
    for _ in range(n):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        out.append(z ^ (z >> 31))
    return out


def test_words_are_splitmix64_and_go_on_where_they_stopped() -> None:
    draws = Draws(5, "valid", np.array([0, 9, (1 << 43) - 1]))
    words = np.concatenate([draws.words(3), draws.words(0), draws.words(4)], 1)
    states = Draws(5, "valid", np.array([0, 9, (1 << 43) - 1])).state_R
    assert words.tolist() == [splitmix64(int(s), 7) for s in states]
    assert splitmix64(0, 1) == [0xE220A8397B1DCDAF]  # the generator's published first word


def test_no_two_samples_share_a_stream() -> None:
    k = np.concatenate([np.arange(2000), (1 << 43) - 1 - np.arange(2000)])
    seeds = (0, 1, 2, 77, (1 << 20) - 1)
    states = np.concatenate([Draws(seed, split, k).state_R for seed in seeds for split in ("train", "valid")])
    assert len(np.unique(states)) == len(states) == 10 * 4000

    def unmix(z: int) -> int:  # the finalizer undone, so it is a bijection and the numbers above are all that matters
        mask = (1 << 64) - 1
        z ^= (z >> 31) ^ (z >> 62)
        z = z * pow(0x94D049BB133111EB, -1, 1 << 64) & mask
        z ^= (z >> 27) ^ (z >> 54)
        z = z * pow(0xBF58476D1CE4E5B9, -1, 1 << 64) & mask
        return z ^ (z >> 30) ^ (z >> 60)

    number = (77 << 44) | (123456789 << 1) | 1
    assert unmix(int(Draws(77, "valid", np.array([123456789])).state_R[0])) == number
    assert unmix(int(_mix(np.array([42], np.uint64))[0])) == 42


def test_draws_are_even() -> None:
    draws = Draws(0, "train", np.arange(3000))
    counts = np.bincount(draws.below(40, 7).ravel(), minlength=7)
    assert abs(counts / counts.sum() - 1 / 7).max() < 0.004  # four standard deviations
    order = draws.order(5)
    assert (np.sort(order, 1) == np.arange(5)).all()
    assert abs(np.bincount(order[:, 2], minlength=5) / 3000 - 0.2).max() < 0.03


@pytest.mark.parametrize("T,curriculum", [(37, 0), (37, 60), (100, 61), (5, 9), (39, 3)])
def test_reader_is_a_function_of_the_number(T: int, curriculum: int) -> None:
    reader = SyntheticReader(build_task({"name": "parity"}), T, 7, curriculum=curriculum)
    inputs, labels, segments = reader.labelled(np.arange(90))
    for k in (0, 13, 29, 59, 60, 89):
        alone = reader.labelled(np.array([k]))
        assert all((whole[k] == part[0]).all() for whole, part in zip((inputs, labels, segments), alone))
    shuffled = np.random.default_rng(0).permutation(90)
    assert all((whole[shuffled] == part).all() for whole, part in zip((inputs, labels, segments), reader.labelled(shuffled)))
    n_R = reader.lengths(np.arange(90))
    assert (n_R[curriculum:] == T).all() and (np.diff(n_R) >= 0).all()
    for x, y, s, n in zip(inputs, labels, segments, n_R):
        pieces = min(T // n, 8)
        assert (y[: pieces * n] != IGNORE).all() and (y[pieces * n :] == IGNORE).all()
        for piece in range(pieces):
            where = slice(piece * n, (piece + 1) * n)
            assert y[where].tolist() == parity(x[where].tolist(), {}) and len(set(s[where])) == 1
        assert (np.diff(s) >= 0).all() and len(set(s)) == -(-T // n)
    if curriculum >= 60:
        assert len(set(n_R.tolist())) == 4 and n_R[0] == T // 8


def test_ranks_and_micro_batches_see_one_order() -> None:
    reader = SyntheticReader(build_task({"name": "mqar", "pairs": 2, "symbols": 8}), 17, 1, curriculum=20)
    everything: dict[str, Any] = {"micro_batch": 12}
    second_half: dict[str, Any] = {"micro_batch": 3, "replica": 1, "replicas": 2}
    with (
        BatchLoader(reader, global_batch=12, start_step=3, **everything) as whole,
        BatchLoader(reader, global_batch=12, start_step=3, **second_half) as part,
    ):
        for _ in range(2):
            one, halves = next(whole)[0], next(part)
            for name in ("input_ids", "labels", "segment_ids"):
                for i, batch in enumerate(halves):
                    assert (getattr(one, name)[6 + 3 * i : 9 + 3 * i] == getattr(batch, name)).all()
            assert [k for b in halves for k in b.sample_ids] == one.sample_ids[6:]
            assert (one.labels != IGNORE).sum() >= 12 * 2


@pytest.mark.parametrize(
    "mapping,expected",
    [
        ({}, "needs a name"),
        ({"name": "paritty"}, "'parity'"),
        ({"name": "parity", "modulus": 3}, "modulus"),
        ({"name": "parity", "answers": "all"}, "every, last"),
        ({"name": "word_problem", "group": "s9"}, "s3"),
        ({"name": "cycle_navigation", "modulus": 1}, "modulus must be 2 or more"),
        ({"name": "modular_arithmetic", "modulus": "five"}, "whole number"),
        ({"name": "mqar", "symbols": 9}, "even"),
        ({"name": "mqar", "pairs": 5, "symbols": 8}, "only 4"),
        ({"name": "mqar", "pairs": True}, "whole number"),
        ({"name": "khop", "hops": 0}, "hops must be 1"),
        ({"name": "copying", "selective": "yes"}, "true or false"),
    ],
)
def test_bad_tasks_are_one_sentence(mapping: dict, expected: str) -> None:
    with pytest.raises(ValueError) as caught:
        build_task(mapping)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_problems_of_a_task_come_together() -> None:
    with pytest.raises(ValueError) as caught:
        build_task({"name": "khop", "hops": 0, "symbols": 0, "answers": "never"})
    assert len(str(caught.value).splitlines()) == 3


def test_seeds_splits_and_lengths_out_of_range() -> None:
    task = build_task({"name": "mqar", "pairs": 3, "symbols": 8})
    for arguments in ((task, 11, 0), (task, 12, 1 << 20), (task, 12, -1), (task, 12, 0, "test"), (task, 12, 0, "train", -1)):
        with pytest.raises(ValueError) as caught:
            SyntheticReader(*arguments)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError):
        Draws(0, "train", np.array([1 << 43]))


def test_set_stands_in_for_shards() -> None:
    one = SyntheticSet({"name": "khop"}, "train")
    assert one.fingerprint == SyntheticSet({"name": "khop", "hops": 1}, "valid").fingerprint
    assert one.fingerprint != SyntheticSet({"name": "khop", "hops": 2}, "train").fingerprint
    tokenizer = one.tokenizer()
    assert tokenizer.get_vocab_size() == one.vocab_size == 10 and tokenizer.encode("t3 t9").ids == [3, 9]


def test_configs_tell_what_does_not_fit() -> None:
    from training.config.cli import checked, compose_config, config_groups
    from training.errors import UserError

    names = [o for o in config_groups()["experiment"] if o.startswith("synthetic/")]
    assert {"synthetic/parity", "synthetic/mqar", "synthetic/s3", "synthetic/a5"} <= set(names)
    for arguments, parts in (
        (["experiment=synthetic/mqar", "data.task.pairs=40"], ["train.seq_len=100", "160"]),
        (["experiment=synthetic/parity", "data.task.answers=some", "train.steps=-1"], ["every, last", "train.steps"]),
        (["experiment=synthetic/hop1", "eval.lengths=[4,200]"], ["holds 4", "11"]),
        (["experiment=synthetic/parity", "seed=-4"], ["seed"]),
        (["experiment=synthetic/party"], ["synthetic/parity"]),
    ):
        with pytest.raises(UserError) as caught:
            checked(compose_config(arguments))
        for part in parts:
            assert part in str(caught.value)
    for model in ("transformer", "mamba2", "paralstm", "hybrid"):
        config = checked(compose_config(["experiment=synthetic/s3", f"model={model}"]))
        bounds = {m["recurrent_bound"] for m in config.model["mixers"].values() if m["type"] == "rnn"}
        assert bounds <= {"none"} and config.model["d_ff"] == 0
    assert checked(compose_config(["model=paragru"])).model["mixers"]["paragru"]["recurrent_bound"] == "clip"
