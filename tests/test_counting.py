"""Counting agrees with collections.Counter, whatever the chunk size, and stays within its memory."""

import itertools
import tracemalloc
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_lm.cooccurrence.counting import BYTES, ThreadEngine, count
from dynamo_lm.cooccurrence.storage import HEADER
from dynamo_lm.cooccurrence.table import Cooccurrence
from dynamo_lm.errors import InputError

Grams = dict[tuple[int, ...], int]


def brute_force(documents: list[list[int]], order: int) -> Grams:
    """Counts of all n-grams of exactly `order` tokens, one by one."""
    return Counter(tuple(d[i : i + order]) for d in documents for i in range(len(d) - order + 1))


def grams_of(table: Cooccurrence, order: int) -> Grams:
    """The table's own n-grams of `order`, read back by walking the trie upwards; unigrams without the unseen ones."""
    result = {}
    for row, n in enumerate(table.counts[order - 1].tolist()):
        gram: tuple[int, ...] = ()
        for level in range(order, 1, -1):
            row, token = divmod(int(table.keys[level - 1][row]), table.vocab_size)
            gram = (token, *gram)
        if n:
            result[(row, *gram)] = n
    return result


def arrays(documents: list[list[int]], dtype: type = np.int64) -> list[np.ndarray]:
    return [np.array(document, dtype) for document in documents]


def memory_for(chunk: int, *, threads: int = 1) -> float:
    """The memory_mb that makes pieces of `chunk` tokens."""
    return chunk * BYTES * (threads + 1) / 2**20


small_documents = st.lists(st.lists(st.integers(0, 4), max_size=30), min_size=1, max_size=12).filter(any)


@settings(max_examples=120, deadline=None)
@given(
    documents=small_documents,
    order=st.integers(1, 4),
    chunk=st.sampled_from([1, 2, 3, 5, 8, 21, 1000]),
    threads=st.integers(1, 3),
)
def test_counts_equal_brute_force_for_any_chunk_size(
    documents: list[list[int]], order: int, chunk: int, threads: int
) -> None:
    memory = memory_for(chunk, threads=threads)
    table = count(arrays(documents), vocab_size=5, order=order, memory_mb=memory, threads=threads)
    for m in range(1, order + 1):
        expected = brute_force(documents, m)
        assert grams_of(table, m) == expected
        assert table.total(m) == sum(expected.values())
        assert (table.keys[m - 1].diff() > 0).all()


@settings(max_examples=80, deadline=None)
@given(
    tokens=st.lists(st.lists(st.integers(0, 4), max_size=30), min_size=1).filter(any),
    kind=st.sampled_from([(4, 65536), (4, 262144), (3, 2**19), (4, 2**20), (3, 2**20), (3, 262144)]),
    chunk=st.sampled_from([1, 4, 13, 1000]),
)
def test_large_vocabularies_are_exact(tokens: list[list[int]], kind: tuple[int, int], chunk: int) -> None:
    order, vocab_size = kind
    ids = [0, 1, 7, vocab_size - 2, vocab_size - 1]
    documents = [[ids[token] for token in document] for document in tokens]
    memory = memory_for(chunk)
    table = count(arrays(documents, np.uint32), vocab_size=vocab_size, order=order, memory_mb=memory, threads=1)
    for m in range(1, order + 1):
        seen = brute_force(documents, m)
        assert table.total(m) == sum(seen.values())
        if m > 1:
            assert grams_of(table, m) == seen


class ManyPartitions(ThreadEngine):
    """Threads that want their runs partitioned as a cluster does."""

    partitions = 3


@settings(max_examples=80, deadline=None)
@given(
    documents=small_documents,
    order=st.integers(1, 4),
    chunk=st.sampled_from([1, 3, 8, 1000]),
    minimum=st.integers(1, 3),
)
def test_a_table_does_not_depend_on_its_partitions(documents: list[list[int]], order: int, chunk: int, minimum: int) -> None:
    options = {"vocab_size": 5, "order": order, "min_counts": minimum, "memory_mb": memory_for(chunk)}
    table = count(arrays(documents), engine=ManyPartitions(1), **options)
    assert table == count(arrays(documents), threads=1, **options)
    for m in range(2, order + 1):
        assert grams_of(table, m) == {g: n for g, n in brute_force(documents, m).items() if n >= minimum}


def test_the_same_counts_are_the_same_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 50, 400) for _ in range(5)]
    count(documents, vocab_size=50, threads=2, memory_mb=memory_for(70, threads=2)).save(tmp_path / "a.safetensors")
    count(documents[::-1], vocab_size=50, engine=ManyPartitions(1)).save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@settings(max_examples=30, deadline=None)
@given(order=st.integers(2, 4), share=st.floats(0.05, 1.1), seed=st.integers(0, 9))
def test_a_table_of_a_stated_size_is_the_least_pruned_that_fits(order: int, share: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    documents = [(60 * rng.random(3000) ** 3).astype(int) for _ in range(4)]
    whole = count(documents, vocab_size=60, order=order, threads=1)
    with TemporaryDirectory() as folder:

        def size(table: Cooccurrence) -> int:
            table.save(f"{folder}/table.safetensors")
            return Path(f"{folder}/table.safetensors").stat().st_size

        limit = share * size(whole) + HEADER
        table = count(documents, vocab_size=60, order=order, threads=1, max_bytes=limit, memory_mb=memory_for(999))
        least = table.min_counts[1]
        assert table == whole.prune(least)
        assert size(table) <= limit
        # the bound on the size counts a header of HEADER bytes, and 8 bytes for each count that fits no byte
        slack = HEADER + 8 * sum(int((level >= 255).sum()) for level in whole.counts)
        assert least == 1 or size(whole.prune(least - 1)) + slack > limit


def test_a_table_that_cannot_be_so_small_is_refused() -> None:
    with pytest.raises(InputError, match=r"No minimum count below 4 makes a table of at most 0.001 MB"):
        count(arrays([[0, 1, 0, 1, 0]]), vocab_size=3, max_bytes=1000)


@settings(max_examples=60, deadline=None)
@given(
    documents=small_documents,
    minimum=st.tuples(st.integers(1, 3), st.integers(0, 2)).map(lambda t: {2: t[0], 3: t[0] + t[1]}),
    chunk=st.sampled_from([2, 9, 1000]),
)
def test_pruning_while_merging_equals_pruning_afterwards(
    documents: list[list[int]], minimum: dict[int, int], chunk: int
) -> None:
    table = count(arrays(documents), vocab_size=5, min_counts=minimum, memory_mb=memory_for(chunk), threads=1)
    for m in (2, 3):
        assert grams_of(table, m) == {g: n for g, n in brute_force(documents, m).items() if n >= minimum[m]}
    assert table == count(arrays(documents), vocab_size=5).prune(minimum)


def test_pruned_mass_is_the_fraction_of_occurrences_dropped() -> None:
    # pairs: 01 x3, 12 x1, 20 x1 -> of 5 occurrences 2 are dropped; triples: 4 different ones... 010 never occurs
    table = count(arrays([[0, 1], [0, 1, 2, 0, 1]]), vocab_size=3, min_counts=2)
    assert table.total(2) == 5 and table.num_rows(2) == 1
    assert table.pruned_mass == pytest.approx((0, 2 / 5, 1))


def test_ngrams_do_not_cross_documents() -> None:
    table = count(arrays([[0, 1], [], [2], [1, 0]]), vocab_size=3)
    assert grams_of(table, 2) == {(0, 1): 1, (1, 0): 1}
    assert table.num_rows(3) == 0 and table.total(3) == 0


def test_documents_may_come_once_and_in_any_integer_type() -> None:
    types = itertools.cycle([np.uint8, np.uint64, np.int32, np.uint16])
    documents = [[0, 1, 2], [2, 2], [1], [0, 2, 1, 1]]
    stream = (np.array(document, dtype) for document, dtype in zip(documents, types, strict=False))
    assert count(stream, vocab_size=3) == count(arrays(documents), vocab_size=3)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("order, vocab_size", [(3, 4096), (4, 4096), (4, 262144)])
def test_working_memory_stays_within_memory_mb(order: int, vocab_size: int, threads: int) -> None:
    def documents():
        rng = np.random.default_rng(0)
        for _ in range(120):
            yield rng.integers(0, 4096, 5000)

    tracemalloc.start()
    table = count(
        documents(), vocab_size=vocab_size, order=order, min_counts=10**6, memory_mb=8, threads=threads
    )  # 600,000 tokens
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert table.total(order) == 120 * (5001 - order)
    assert peak < (8 + 50 * vocab_size / 2**20) * 2**20


@pytest.mark.parametrize("wrong", [-1, 3, 2**40])
def test_a_token_outside_the_vocabulary_is_refused(wrong: int) -> None:
    with pytest.raises(InputError, match=f"Token id {wrong} is outside the vocabulary of 3"):
        count([np.array([0, wrong, 1])], vocab_size=3)


def test_an_unsigned_token_that_would_wrap_is_refused() -> None:
    with pytest.raises(InputError, match="outside the vocabulary"):
        count([np.array([2**64 - 1], np.uint64)], vocab_size=3)


@pytest.mark.parametrize("documents", [[], [[]], [[], []]])
def test_an_empty_stream_is_refused(documents: list[list[int]]) -> None:
    with pytest.raises(InputError, match="no tokens"):
        count(arrays(documents), vocab_size=3)


@pytest.mark.parametrize("document", [np.zeros((2, 2), int), np.array([0.5]), np.array(3)])
def test_what_is_no_list_of_integers_is_refused(document: np.ndarray) -> None:
    with pytest.raises(InputError, match="1-D array of integers"):
        count([document], vocab_size=3)


@pytest.mark.parametrize("minimum", [{2: 3, 3: 2}, {1: 2}, {4: 2}, 0])
def test_minimum_counts_that_fall_with_the_order_or_name_no_order_are_refused(minimum: dict[int, int] | int) -> None:
    with pytest.raises(InputError, match=r"[Mm]inimum counts"):
        count(arrays([[0, 1]]), vocab_size=3, order=3, min_counts=minimum)


@pytest.mark.parametrize("options", [{"order": 0}, {"order": 5}, {"vocab_size": 0}, {"memory_mb": 0}, {"threads": 0}])
def test_impossible_settings_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(InputError):
        count(arrays([[0, 1]]), **{"vocab_size": 3, **options})


def test_scratch_is_empty_afterwards_even_when_counting_fails(tmp_path: Path) -> None:
    documents = arrays([[0, 1, 2]] * 20)
    count(documents, vocab_size=3, scratch=tmp_path, memory_mb=1e-3)
    with pytest.raises(InputError):
        count([*documents, np.array([3])], vocab_size=3, scratch=tmp_path, memory_mb=1e-3)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_scratch_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="scratch folder"):
        count(arrays([[0, 1]]), vocab_size=3, scratch=tmp_path / "missing")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_scratch_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, mode: str) -> IO[bytes]:
        return Path("/dev/full").open(mode)

    monkeypatch.setattr("dynamo_lm.cooccurrence.counting.open", full, raising=False)
    with pytest.raises(InputError, match=f"{tmp_path} is full"):
        count(arrays([[0, 1]]), vocab_size=3, scratch=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_progress_reports_the_tokens_counted_so_far() -> None:
    seen: list[int] = []
    count(arrays([[0, 1, 2, 1, 0]] * 4), vocab_size=3, memory_mb=memory_for(6), threads=1, progress=seen.append)
    assert len(seen) > 1 and seen == sorted(seen) and seen[-1] == 20
