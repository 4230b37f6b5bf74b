"""Tables answer look-ups as a dictionary would, survive a trip to disk exactly and refuse anything else."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import log_weight
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dynamo_lm.cooccurrence import storage
from dynamo_lm.cooccurrence.counting import count
from dynamo_lm.cooccurrence.table import Cooccurrence
from dynamo_lm.errors import InputError
from dynamo_lm.kernels import loader

INF = math.inf
Arrays = dict[str, np.ndarray]


def table_of(*documents: list[int], vocab_size: int = 4, **options) -> Cooccurrence:
    return count([np.array(document, np.int64) for document in documents], vocab_size=vocab_size, **options)


@pytest.fixture
def table() -> Cooccurrence:
    # tokens: 0 x4, 1 x3, 2 x1 of 8; pairs: 01 x3, 12 x1, 20 x1 of 5; triples: 012, 120, 201 of 3; token 3 never occurs
    return table_of([0, 1], [0, 1, 2, 0, 1], [0], tokenizer="abc")


documents_of_five = st.lists(st.lists(st.integers(0, 4), max_size=25), min_size=1, max_size=8).filter(any)


def test_extend_walks_from_a_token_to_a_triple(table: Cooccurrence) -> None:
    pairs = table.extend(torch.tensor([0, 1, 2, 0]), torch.tensor([1, 2, 0, 2]), 2)
    assert pairs.tolist() == [0, 1, 2, -1]  # 01, 12, 20 in sorted order; 02 was never seen
    assert table.extend(pairs, torch.tensor([2, 0, 1, 1]), 3).tolist() == [0, 1, 2, -1]


def test_extend_broadcasts_rows_against_tokens(table: Cooccurrence) -> None:
    grid = table.extend(torch.arange(4)[:, None], torch.arange(4)[None, :], 2)
    assert grid.tolist() == [[-1, 0, -1, -1], [-1, -1, 1, -1], [2, -1, -1, -1], [-1, -1, -1, -1]]


def test_a_token_outside_the_vocabulary_is_unseen_and_does_not_alias_another_row(table: Cooccurrence) -> None:
    # 0 * 4 + 6 would be the key of the pair (1, 2), and 1 * 4 - 3 that of (0, 1)
    assert table.extend(torch.tensor([0, 1, 9, -1]), torch.tensor([6, -3, 1, 5]), 2).tolist() == [-1] * 4
    assert table.log_p(torch.tensor([4, -1]), 1).tolist() == [-INF, -INF]
    assert log_weight(table, torch.tensor([[4, 0], [0, 5]])).tolist() == [-INF, -INF]


def test_log_p_is_the_log_of_count_over_total(table: Cooccurrence) -> None:
    assert table.log_p(torch.tensor([0, 3]), 1).tolist() == pytest.approx([math.log(4 / 8), -INF])
    assert table.log_p(torch.tensor([0, 2, -1]), 2).tolist() == pytest.approx([math.log(3 / 5), math.log(1 / 5), -INF])


def test_log_weight_is_the_log_of_joint_over_independent_frequencies(table: Cooccurrence) -> None:
    expected = [math.log((3 / 5) / (4 / 8 * 3 / 8)), -INF, -INF]
    assert log_weight(table, torch.tensor([[0, 1], [1, 0], [3, 3]])).tolist() == pytest.approx(expected)
    triple = math.log((1 / 3) / (4 / 8 * 3 / 8 * 1 / 8))
    assert log_weight(table, torch.tensor([[[0, 1, 2]]])).tolist() == [[pytest.approx(triple)]]


@settings(max_examples=40, deadline=None)
@given(documents=documents_of_five, m=st.integers(1, 4))
def test_log_weight_equals_brute_force_on_every_tuple(documents: list[list[int]], m: int) -> None:
    table = table_of(*documents, vocab_size=5, order=4)
    tuples = torch.cartesian_prod(*[torch.arange(5)] * m).reshape(-1, m)

    def frequency(gram: list[int]) -> float:
        windows = [d[i : i + len(gram)] for d in documents for i in range(len(d) - len(gram) + 1)]
        return windows.count(gram) / max(len(windows), 1)

    single = [frequency([token]) for token in range(5)]
    for gram, weight in zip(tuples.tolist(), log_weight(table, tuples).tolist(), strict=True):
        joint = frequency(gram)
        expected = math.log(joint / math.prod(single[token] for token in gram)) if joint else -INF
        assert weight == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_an_order_without_any_row_answers_unseen() -> None:
    table = table_of([0], [1])
    assert table.extend(torch.tensor([0, 1]), torch.tensor([1, 0]), 2).tolist() == [-1, -1]
    assert log_weight(table, torch.tensor([[0, 1, 2]])).tolist() == [-INF]


@pytest.mark.parametrize("order", [0, 1, 4])
def test_orders_beyond_the_table_are_refused(table: Cooccurrence, order: int) -> None:
    with pytest.raises(InputError):
        table.extend(torch.tensor([0]), torch.tensor([0]), order)


@settings(max_examples=40, deadline=None)
@given(left=documents_of_five, right=documents_of_five)
def test_merging_equals_counting_everything_at_once(left: list[list[int]], right: list[list[int]]) -> None:
    parts = [table_of(*left, vocab_size=5, order=4), table_of(*right, vocab_size=5, order=4)]
    assert Cooccurrence.merge(*parts) == table_of(*left, *right, vocab_size=5, order=4)


@pytest.fixture(scope="module")
def compiled() -> Any:
    if not loader.available():
        pytest.skip("needs a C++ compiler")
    return loader.sampler()


def assert_seen_is_numpys(compiled: Any, table: Cooccurrence, ids: np.ndarray) -> None:
    """At every order, from the rows seen so far; by rising row, then token."""
    lookup = table.lookup
    rows = np.arange(table.vocab_size + 2)  # two of them unknown
    for order in range(2, table.order + 1):
        found = [part.tolist() for part in lookup._compiled(compiled, rows, ids, order)]
        expected = [part.tolist() for part in lookup._scan(rows, ids, order)]
        assert sorted(zip(*found, strict=True)) == sorted(zip(*expected, strict=True))
        assert found[2] == sorted(found[2])
        rows = np.array(found[2], np.int64)


@settings(max_examples=100, deadline=None)
@given(
    documents=documents_of_five,
    ids=st.lists(st.integers(0, 9), unique=True, min_size=1, max_size=8),
)
def test_the_compiled_look_up_is_numpys(compiled: Any, documents: list[list[int]], ids: list[int]) -> None:
    table = table_of(*documents, vocab_size=5, order=4)
    assert_seen_is_numpys(compiled, table, np.array(ids))


@pytest.mark.parametrize("k", [1, 2, 18, 19, 50])
def test_the_compiled_look_up_searches_among_many_children(compiled: Any, k: int) -> None:
    # token 7 has 300 children, 16 * 19 is more; token 8 has one
    table = table_of(*[[7, token, token] for token in range(300)], [8, 1], vocab_size=300)
    ids = np.random.default_rng(k).permutation(320)[:k]
    assert_seen_is_numpys(compiled, table, ids)
    assert_seen_is_numpys(compiled, table, np.arange(640)[::-2][-k:])  # not contiguous


def test_no_rows_are_followed_by_nothing(compiled: Any, table: Cooccurrence) -> None:
    none = np.array([], np.int64)
    assert [part.size for part in table.lookup._compiled(compiled, none, np.arange(3), 2)] == [0, 0, 0]
    assert [part.size for part in table.lookup._compiled(compiled, np.arange(3), none, 2)] == [0, 0, 0]


def test_merging_refuses_tables_of_another_kind(table: Cooccurrence) -> None:
    for other in (table_of([0], order=2), table_of([0], vocab_size=5), table_of([0], tokenizer="xyz")):
        with pytest.raises(InputError):
            Cooccurrence.merge(table, other)
    assert Cooccurrence.merge(table, table_of([0])).tokenizer == "abc"


def test_pruning_keeps_totals_and_reports_the_dropped_mass(table: Cooccurrence) -> None:
    pruned = table.prune({2: 2, 3: 2})
    assert (pruned.total(2), pruned.num_rows(2), pruned.num_rows(3)) == (5, 1, 0)
    assert pruned.pruned_mass == pytest.approx((0, 2 / 5, 1))
    assert log_weight(pruned, torch.tensor([[0, 1]])).equal(log_weight(table, torch.tensor([[0, 1]])))
    assert pruned.prune(1) == pruned


@settings(max_examples=30, deadline=None)
@given(documents=documents_of_five, minimum=st.integers(1, 3))
def test_a_saved_table_comes_back_exactly(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], minimum: int
) -> None:
    table = table_of(*documents, vocab_size=5, order=4, min_counts=minimum, tokenizer="abc", description="words")
    path = tmp_path_factory.mktemp("table") / "t.safetensors"
    table.save(path)
    loaded = Cooccurrence.load(path, expect_tokenizer="abc")
    assert loaded == table and loaded.description == "words"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("times", [254, 255, 256, 65535, 65536])
def test_counts_beyond_a_byte_come_back_exactly(tmp_path: Path, times: int) -> None:
    table = table_of([0] * times + [1, 2], vocab_size=70000, order=2)
    table.save(tmp_path / "t")
    assert Cooccurrence.load(tmp_path / "t") == table


def test_more_than_255_children_come_back_exactly(tmp_path: Path) -> None:
    table = table_of(*[[7, token] for token in range(300)], vocab_size=300, order=2)
    table.save(tmp_path / "t")
    assert Cooccurrence.load(tmp_path / "t") == table


def test_a_row_takes_about_four_bytes_on_disk(tmp_path: Path) -> None:
    table = count([np.random.default_rng(0).zipf(1.3, 40_000) % 4096], vocab_size=4096)
    table.save(tmp_path / "t")
    assert (tmp_path / "t").stat().st_size < 4.3 * sum(map(table.num_rows, (1, 2, 3)))


def test_only_known_and_different_tokenizers_are_refused(table: Cooccurrence, tmp_path: Path) -> None:
    table.save(tmp_path / "t")
    for fine in (None, "", "abc"):
        assert Cooccurrence.load(tmp_path / "t", expect_tokenizer=fine) == table
    with pytest.raises(InputError, match="tokenizer abc, not xyz"):
        Cooccurrence.load(tmp_path / "t", expect_tokenizer="xyz")
    replace(table, tokenizer="").save(tmp_path / "t")
    Cooccurrence.load(tmp_path / "t", expect_tokenizer="xyz")


def test_a_truncated_file_is_refused(table: Cooccurrence, tmp_path: Path) -> None:
    path = tmp_path / "t"
    table.save(path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError):
            Cooccurrence.load(path)


def test_a_flipped_bit_anywhere_is_refused(table: Cooccurrence, tmp_path: Path) -> None:
    path = tmp_path / "t"
    table.save(path)
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 7]) + whole[at + 1 :])
        with pytest.raises(InputError):
            Cooccurrence.load(path)


def test_files_that_are_no_table_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no table")
    save_file({"weight": np.zeros(3)}, tmp_path / "model")
    for name in ("text", "model", "missing", "."):
        with pytest.raises(InputError, match="table"):
            Cooccurrence.load(tmp_path / name)


def test_saving_into_a_missing_folder_is_refused(table: Cooccurrence, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        table.save(tmp_path / "missing" / "t")


def rewrite(path: Path, change: Callable[[Arrays, dict], object]) -> None:
    """Alter a table as somebody who knows the format would: with a checksum that matches."""
    arrays = load_file(path)
    with safe_open(path, framework="np") as file:
        facts = json.loads(file.metadata()["facts"])
    change(arrays, facts)
    storage.write(path, arrays, json.dumps(facts))


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda a, f: a.update({"2.tokens": a["2.tokens"] + np.uint16(4)}), "outside the vocabulary"),
        (lambda a, f: a.update({"2.tokens": a["2.tokens"][:-1]}), "offsets of order 2"),
        (lambda a, f: a.update({"2.tokens": a["2.tokens"].reshape(1, -1)}), "not a list of integers"),
        (lambda a, f: a.update({"2.tokens": a["2.tokens"].astype(np.float32)}), "not a list of integers"),
        (lambda a, f: a.update({"3.children": np.array([3, 0], np.uint8)}), "offsets of order 3"),
        (lambda a, f: a.update({"2.children": np.array([3, 0, 0, 0], np.uint8)}), "not sorted"),
        (lambda a, f: a.update({"2.counts": np.array([255, 1, 1], np.uint8)}), "overflow"),
        (lambda a, f: a.update({"2.counts": np.array([0, 1, 1], np.uint8)}), "a count for every row"),
        (lambda a, f: a.update({"2.counts": np.array([9, 1, 1], np.uint8)}), "more n-grams than were counted"),
        (lambda a, f: a.update({"extra": np.zeros(1, np.uint8)}), "number of entries"),
        (lambda a, f: a.pop("3.tokens"), "3.tokens"),
        (lambda a, f: f.update(vocab_size=5), "number of entries|offsets"),
        (lambda a, f: f.update(vocab_size="4"), "not counts"),
        (lambda a, f: f.update(order=7), "impossible"),
        (lambda a, f: f.update(totals=[8, 5]), "impossible"),
        (lambda a, f: f.update(totals=3), "contradicts"),
        (lambda a, f: f.pop("tokenizer"), "tokenizer"),
        (lambda a, f: f.update(version=99), "format version 99"),
    ],
)
def test_a_table_that_contradicts_itself_is_refused(
    table: Cooccurrence, tmp_path: Path, change: Callable[[Arrays, dict], object], complaint: str
) -> None:
    table.save(tmp_path / "t")
    rewrite(tmp_path / "t", lambda arrays, facts: None)
    assert Cooccurrence.load(tmp_path / "t") == table
    rewrite(tmp_path / "t", change)
    with pytest.raises(InputError, match=complaint):
        Cooccurrence.load(tmp_path / "t")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_look_ups_agree_on_every_device(table: Cooccurrence) -> None:
    tuples = torch.cartesian_prod(*[torch.arange(5)] * 3)
    assert log_weight(table.to("cuda"), tuples.cuda()).cpu().equal(log_weight(table, tuples))
