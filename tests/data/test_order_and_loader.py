"""The data order: permutations, mixtures, windows and streams, whatever the ranks, micro-batches and restarts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.errors import UserError
from data.loader import BatchLoader, StreamReader, WindowReader, build_reader
from data.order import Blend, Mixture, Permutation
from data.shards import ShardSet
from data.tokenizer import byte_tokenizer, eot_id, fingerprint
from data.writer import ShardWriter, publish


def make(folder: Path, lengths: list[int], shard_tokens: int = 100, seed: int = 0, hold_out: bool = True) -> ShardSet:
    """Shards of random bytes; token 256 is the end-of-text mark."""
    tokenizer, rng = byte_tokenizer(), np.random.default_rng(seed)
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True)
    (partial / "tokenizer.json").write_text(tokenizer.to_str())
    writer = ShardWriter(partial, np.dtype("uint16"), shard_tokens)
    for length in lengths:
        writer.add("train", np.array([256, *rng.integers(0, 256, length)]), length)
    writer.commit(len(lengths))
    if hold_out:
        writer.move_newest("train", "valid")
    writer.finish({"format": 1, "vocab_size": 257, "eot_id": eot_id(tokenizer), "tokenizer_sha256": fingerprint(tokenizer)})
    publish(partial, folder)
    return ShardSet(folder, "train")


@pytest.mark.parametrize("n", [1, 2, 3, 17, 1000, 4097])
def test_permutation_is_a_bijection(n: int) -> None:
    assert sorted(Permutation(n, 3, 0)(np.arange(n)).tolist()) == list(range(n))


def test_permutation_depends_on_every_key_and_looks_shuffled() -> None:
    n = 10_000
    a, b, c = (Permutation(n, *key)(np.arange(n)) for key in ((0, 0), (1, 0), (0, 1)))
    assert (a != b).mean() > 0.99 and (a != c).mean() > 0.99
    assert abs(np.corrcoef(np.arange(n), a)[0, 1]) < 0.05
    assert abs((np.diff(a) == 1).mean()) < 0.01
    huge = Permutation(2**40 + 7, 1)(np.arange(1000))
    assert len(set(huge.tolist())) == 1000 and huge.max() > 2**38


def test_mixture_quotas_are_exact_in_every_block_and_indices_run_on() -> None:
    mixture = Mixture([0.7, 0.2, 0.1], seed=1, block=50)
    seen: list[list[int]] = [[], [], []]
    for k in range(200):
        source, index = mixture(k)
        seen[source].append(index)
        if k % 50 == 49:
            assert [len(s) for s in seen] == [35 * (k + 1) // 50, 10 * (k + 1) // 50, 5 * (k + 1) // 50]
    assert all(s == list(range(len(s))) for s in seen)  # each source in its own order


def test_counts_of_a_mixture_are_those_of_its_samples() -> None:
    mixture = Mixture([0.7, 0.2, 0.1], seed=1, block=50)
    sources = mixture.locate(np.arange(200))[0]
    for n in (0, 1, 49, 50, 51, 137, 200):
        assert mixture.counts(n).tolist() == np.bincount(sources[:n], minlength=3).tolist()
    assert Mixture([2.0], 0).counts(7).tolist() == [7]


def test_weights_that_change_skip_and_repeat_no_sample_of_any_source() -> None:
    blend = Blend([(0, [0.5, 0.5, 0.0]), (33, [0.1, 0.6, 0.3]), (1234, [1.0, 0.0, 2.0])], seed=3)
    source, index = blend.locate(np.arange(4000))
    for i in range(3):
        index_of_source = index[source == i]
        assert index_of_source.tolist() == list(range(len(index_of_source)))
    assert (source[:33] < 2).all() and (source[1234:] != 1).all()
    assert abs((source[33:1233] == 1).mean() - 0.6) < 0.03
    again = [blend.locate(np.array([k])) for k in (3999, 0, 1234, 33)]
    assert [(int(s[0]), int(i[0])) for s, i in again] == [(int(source[k]), int(index[k])) for k in (3999, 0, 1234, 33)]
    alone = Mixture([0.5, 0.5], 3)
    np.testing.assert_array_equal(Blend([(0, [0.5, 0.5])], 3).locate(np.arange(500)), alone.locate(np.arange(500)))
    for wrong in ([(1, [1.0])], [(0, [1.0]), (0, [1.0])]):
        with pytest.raises(ValueError, match="begin at sample 0 and rise"):
            Blend(wrong, 0)


def test_another_batch_goes_on_with_the_next_sample(tmp_path: Path) -> None:
    reader = build_reader([(make(tmp_path / "s", [400, 300]), 1.0)], "windows", 8, 5, 8)
    with BatchLoader(reader, global_batch=4, micro_batch=2, start_step=3, first_sample=17) as loader:
        assert [b.sample_ids for b in [*next(loader), *next(loader)]] == [[17, 18], [19, 20], [21, 22], [23, 24]]


def test_every_token_of_an_epoch_is_a_target_exactly_once(tmp_path: Path) -> None:
    shards = make(tmp_path / "s", [37, 80, 5, 61, 140, 33])
    T = 16
    reader = WindowReader([(shards, 1.0)], T, 0)
    stream = shards.read(0, shards.n_tokens)
    for epoch in range(2):
        starts = sorted(reader.window(k)[1] for k in range(epoch * sum(reader.windows), (epoch + 1) * sum(reader.windows)))
        assert starts == list(range((len(stream) - 1) // T))
    tokens, segment_ids = reader.sample(3)
    start = reader.window(3)[1] * T
    np.testing.assert_array_equal(tokens, stream[start : start + T + 1])
    np.testing.assert_array_equal(segment_ids, np.cumsum(tokens == 256) - int(tokens[0] == 256))


def test_every_epoch_and_seed_has_an_order_of_its_own(tmp_path: Path) -> None:
    shards, T = make(tmp_path / "s", [200, 180, 33]), 16
    n = (shards.n_tokens - 1) // T
    orders = []
    for seed in (0, 1):
        reader = WindowReader([(shards, 1.0)], T, seed)
        orders += [tuple(reader.window(k)[1] for k in range(epoch * n, (epoch + 1) * n)) for epoch in range(3)]
    assert len(set(orders)) == 6 and all(sorted(order) == list(range(n)) for order in orders)


def collect(
    shards: ShardSet, reader: str, world: int, micro: int, start: int, steps: int, prefetch: int = 2
) -> list[tuple[int, list[int], list[int]]]:
    """(step, sample ids, flattened inputs) of the whole global batch."""
    per_rank = []
    for rank in range(world):
        placed: dict[str, Any] = {"replica": rank, "replicas": world, "start_step": start, "prefetch": prefetch}
        with BatchLoader(build_reader([(shards, 1.0)], reader, 8, 5, 8), global_batch=8, micro_batch=micro, **placed) as loader:
            batches = iter(loader)
            per_rank.append([next(batches) for _ in range(steps)])
    result = []
    for s in range(steps):
        rows = [batch for rank in per_rank for batch in rank[s]]
        result.append((start + s, [i for b in rows for i in b.sample_ids], [t for b in rows for t in b.input_ids.flatten().tolist()]))
    return result


@pytest.mark.parametrize("reader", ["windows", "stream"])
def test_order_is_independent_of_ranks_micro_batches_prefetch_and_restarts(tmp_path: Path, reader: str) -> None:
    shards = make(tmp_path / "s", [300, 211, 97, 405])
    whole = collect(shards, reader, 1, 8, 0, 6)
    for world, micro, prefetch in ((2, 4, 1), (4, 1, 5), (8, 1, 2), (1, 2, 3)):
        assert collect(shards, reader, world, micro, 0, 6, prefetch) == whole
    assert collect(shards, reader, 2, 2, 4, 2) == whole[4:]
    assert whole[0][1] == list(range(8))  # disjoint and covering, in order of the ranks


def test_stream_rows_go_on_where_they_stopped(tmp_path: Path) -> None:
    shards = make(tmp_path / "s", [300, 211, 97, 405])
    reader = StreamReader([(shards, 1.0)], 8, 4)
    for row in range(4):
        for step in range(reader.steps - 1):
            a, b = reader.sample(step * 4 + row), reader.sample((step + 1) * 4 + row)
            assert a[0][-1] == b[0][0] and a[1][-1] == b[1][0]


def test_an_error_in_the_thread_reaches_the_consumer_and_closing_never_hangs(tmp_path: Path) -> None:
    shards = make(tmp_path / "s", [300, 211])
    reader = build_reader([(shards, 1.0)], "windows", 8, 0, 4)
    reader.samples = lambda k: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    with BatchLoader(reader, global_batch=4, micro_batch=4) as loader, pytest.raises(ZeroDivisionError):
        next(iter(loader))


@pytest.mark.parametrize(
    "damage,words", [("cut", "bytes instead of"), ("gone", "is missing"), ("meta", "data.prepare"), ("tokenizer", "not the tokenizer")]
)
def test_damaged_shards_are_refused_in_a_sentence(tmp_path: Path, damage: str, words: str) -> None:
    folder = tmp_path / "s"
    make(folder, [150, 80, 50])
    file = folder / "train-00000.bin"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-3])
    elif damage == "gone":
        file.unlink()
    elif damage == "meta":
        (folder / "meta.json").unlink()
    else:
        tokenizer = byte_tokenizer()
        tokenizer.add_tokens(["zebra"])
        (folder / "tokenizer.json").write_text(tokenizer.to_str())
    with pytest.raises(ValueError, match=words):
        ShardSet(folder, "train")


def test_a_token_beyond_the_vocabulary_is_a_sentence_wherever_it_is_read(tmp_path: Path) -> None:
    """A file of the right size with other content: the embedding would read past its end."""
    shards = make(tmp_path / "s", [150, 80, 50])
    tokens = np.fromfile(tmp_path / "s/train-00001.bin", "<u2")
    for wrong in (shards.vocab_size, 65535):
        tokens[7] = wrong
        tokens.tofile(tmp_path / "s/train-00001.bin")
        shards = ShardSet(tmp_path / "s", "train")
        place = shards.shards[0]["tokens"] + 7
        told = f"train-00001.bin holds the token {wrong} at place 7, beyond the {shards.vocab_size} of its vocabulary"
        with pytest.raises(UserError, match=told):
            shards.read(place - 20, 30)
        with pytest.raises(UserError, match=told):
            shards.rows(np.array([0, place - 3]), 5)
        assert len(shards.read(0, place)) == place and len(shards.read(place + 1, 9)) == 9


def test_too_little_data_is_a_sentence(tmp_path: Path) -> None:
    shards = make(tmp_path / "s", [20, 20, 20])
    with pytest.raises(ValueError, match="shorten it"):
        build_reader([(shards, 1.0)], "windows", 4096, 0, 4)
    with pytest.raises(ValueError, match="lower train.global_batch"):
        build_reader([(shards, 1.0)], "stream", 16, 0, 64)


def test_reading_across_shard_borders(tmp_path: Path) -> None:
    shards = make(tmp_path / "s", [90, 90, 90, 90], shard_tokens=100)
    assert len(shards.meta["splits"]["train"]["shards"]) > 1
    whole = shards.read(0, shards.n_tokens)
    for start, n in ((0, 5), (180, 10), (181, 2), (50, 200)):
        np.testing.assert_array_equal(shards.read(start, n), whole[start : start + n])
    documents = [shards.document(i) for i in range(shards.n_documents)]
    assert all(int(ids[0]) == 256 and n_bytes == len(ids) - 1 for ids, n_bytes in documents)
    np.testing.assert_array_equal(np.concatenate([ids for ids, _ in documents]), whole)


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.0, 3.0, 1.0], [0.9, 0.0995, 0.0005]])
def test_mixtures_of_any_weights_reach_every_source_that_has_one(weights: list[float]) -> None:
    mixture = Mixture(weights, seed=0)
    source, index = mixture.locate(np.arange(2 * mixture.block))
    for i, weight in enumerate(weights):
        mine = index[source == i]
        assert sorted(mine.tolist()) == list(range(len(mine)))
        assert abs(len(mine) - 2 * mixture.block * weight / sum(weights)) < 2 and (len(mine) > 0) == (weight > 0)


@pytest.mark.parametrize("weights", [[], [-1.0, 2.0], [0.0], [float("nan"), 1.0], [1.0, 1e-9]])
def test_impossible_weights_are_a_sentence(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights"):
        Mixture(weights, seed=0)


def test_a_mixture_of_folders_has_each_ones_epochs_whole(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a", [300, 200], seed=1), make(tmp_path / "b", [90, 60, 50], seed=2)
    reader = WindowReader([(a, 0.6), (b, 0.4)], 8, 3)
    where = [reader.window(k) for k in range(1000)]
    assert sum(s == 0 for s, _ in where) == 600
    for source, shards in ((0, a), (1, b)):
        mine, n = [w for s, w in where if s == source], (shards.n_tokens - 1) // 8
        for epoch in range(len(mine) // n):
            assert sorted(mine[epoch * n : (epoch + 1) * n]) == list(range(n))
    tokens_RL, segments_RL = reader.samples(np.arange(40, 60))
    for row, k in enumerate(range(40, 60)):
        source, window = where[k]
        np.testing.assert_array_equal(tokens_RL[row], (a, b)[source].read(window * 8, 9))
        one = reader.sample(k)
        np.testing.assert_array_equal(tokens_RL[row], one[0])
        np.testing.assert_array_equal(segments_RL[row], one[1])


def test_ranks_are_disjoint_and_cover_the_batch(tmp_path: Path) -> None:
    reader = build_reader([(make(tmp_path / "s", [300, 211, 97]), 1.0)], "windows", 8, 0, 12)
    seen = []
    for rank in range(3):
        with BatchLoader(reader, global_batch=12, micro_batch=2, replica=rank, replicas=3, start_step=5) as loader:
            batches = next(loader)
            assert len(batches) == 2 and batches[0].input_ids.shape == (2, 8)
            for batch in batches:
                assert batch.input_ids.dtype == batch.labels.dtype and str(batch.segment_ids.dtype) == "torch.int32"
                assert (batch.input_ids[:, 1:] == batch.labels[:, :-1]).all()
            seen += [k for batch in batches for k in batch.sample_ids]
    assert seen == list(range(60, 72))


def test_a_loader_ends_when_closed_and_tells_its_error_again(tmp_path: Path) -> None:
    reader = build_reader([(make(tmp_path / "s", [300, 211]), 1.0)], "windows", 8, 0, 4)
    loader = BatchLoader(reader, global_batch=4, micro_batch=4, prefetch=0)
    next(loader)
    loader.close()
    assert list(loader) == [] and not loader._thread.is_alive()
    reader.samples = lambda k: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    with BatchLoader(reader, global_batch=4, micro_batch=4) as loader:
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                next(loader)
    for rows, micro, replica, replicas in ((6, 4, 0, 1), (8, 4, 0, 4), (8, 2, 2, 2), (0, 1, 0, 1)):
        with pytest.raises(ValueError, match="cannot be divided"):
            BatchLoader(reader, global_batch=rows, micro_batch=micro, replica=replica, replicas=replicas)
    with pytest.raises(ValueError, match="windows or stream"):
        build_reader([(make(tmp_path / "t", [30, 30]), 1.0)], "steam", 8, 0, 4)
