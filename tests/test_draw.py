"""A whole draw by the kernels is NumPy's: the same tokens, from the same joint, by the same random number."""

import copy
import pickle
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_lm.cooccurrence.counting import count
from dynamo_lm.cooccurrence.table import Cooccurrence
from dynamo_lm.kernels import loader
from dynamo_lm.sampling import algorithm1
from dynamo_lm.sampling.algorithm1 import Draw, draw_from
from dynamo_lm.sampling.options import Algorithm1
from dynamo_lm.sampling.top_k import HeadCandidates

pytestmark = pytest.mark.skipif(not loader.available(), reason="needs a C++ compiler")
VOCAB = 24


def random_heads(rng: np.random.Generator, n: int, k: int, spread: float, *, tied: bool, gone: int) -> HeadCandidates:
    """Heads of k distinct candidates below VOCAB, of which the last `gone` have no probability."""
    scores = rng.normal(0, spread, (n, k))
    if tied:
        scores = scores.round()
    ids = np.stack([rng.permutation(VOCAB)[:k] for _ in range(n)])
    order = np.lexsort((ids, -scores))
    scores, ids = np.take_along_axis(scores, order, -1), np.take_along_axis(ids, order, -1)
    if gone:
        scores[:, -gone:] = -np.inf
    return HeadCandidates.ranked(ids, scores, 1.0)


def random_table(rng: np.random.Generator, order: int, known: int, length: int) -> Cooccurrence:
    """Counts of random tokens below `known`: most n-grams were never seen, and tokens from `known` on are unknown."""
    return count([rng.integers(0, known, length) for _ in range(3)], vocab_size=known, order=order)


@st.composite
def cases(draw):
    """Heads, present (VOCAB,) bool, a table or None, options, greedy, seed."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, k = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    gone = draw(st.integers(0, k - 1)) if draw(st.booleans()) else 0
    heads = random_heads(rng, n, k, draw(st.sampled_from([0.1, 1, 4, 20])), tied=draw(st.booleans()), gone=gone)
    table = None
    if draw(st.integers(0, 4)):
        order = draw(st.integers(max(n, 2), 4))
        table = random_table(rng, order, draw(st.integers(1, VOCAB)), draw(st.sampled_from([5, 50, 2000])))
    options = Algorithm1(
        eps_b=draw(st.sampled_from([0, 1e-3, 0.05, 0.3, 0.9, 1])),
        alpha_c=draw(st.sampled_from([0.0, 0.5, 1.0, 2.0])),
        otsu=draw(st.booleans()),
        blur=draw(st.booleans()),
        top_k=k,
        repetition_penalty=draw(st.sampled_from([0.5, 1.0, 1.1, 3.0])),
    )
    present = rng.random(VOCAB) < draw(st.sampled_from([0, 0.3, 1]))
    return heads, present, table, options, draw(st.booleans()), draw(st.integers(0, 2**32))


def drawn(case, *, compiled: bool) -> tuple[Draw, torch.Tensor]:
    """What a case draws, and the state that it leaves its generator in."""
    heads, present, table, options, greedy, seed = case
    generator = torch.Generator().manual_seed(seed)
    with patch.object(algorithm1, "survivors" if compiled else "_compiled_draw", side_effect=AssertionError):
        if compiled:
            return draw_from(heads, present, table, options, generator, greedy), generator.get_state()
        with patch.object(loader, "_sampler", None):  # nor do they look up or blur
            return draw_from(heads, present, table, options, generator, greedy), generator.get_state()


def assert_the_same(case) -> Draw:
    mine, state = drawn(case, compiled=True)
    theirs, expected = drawn(case, compiled=False)
    assert (mine.tokens, mine.backed_off) == (theirs.tokens, theirs.backed_off)
    assert mine.joint == pytest.approx(theirs.joint, rel=1e-9, abs=0)
    assert torch.equal(state, expected)
    return mine


@settings(max_examples=500, deadline=None)
@given(cases())
def test_a_compiled_draw_is_numpys(case) -> None:
    assert_the_same(case)


@pytest.mark.parametrize("eps_b", [0, 0.02, 0.1])
@pytest.mark.parametrize("blur", [False, True])
@pytest.mark.parametrize("k", [50, 130])
def test_a_compiled_draw_from_many_candidates_is_numpys(k: int, blur: bool, eps_b: float) -> None:
    rng = np.random.default_rng(k)
    words = 200
    documents = [rng.zipf(1.3, 20_000) % words for _ in range(2)]  # a few tokens have hundreds of children
    table = count(documents, vocab_size=words, order=4)
    options = Algorithm1(eps_b=eps_b, blur=blur, top_k=k)
    lengths = set()
    for seed in range(8):
        scores = -np.sort(-rng.normal(0, 3, (4, k)))
        scores[:, 1:] -= 6 * (seed % 2)
        heads = HeadCandidates.ranked(np.stack([rng.permutation(words)[:k] for _ in range(4)]), scores, 1.0)
        present = rng.random(words) < 0.2
        for n, greedy in [(2, False), (3, False), (4, False), (4, True)]:
            lengths.add(len(assert_the_same((heads.of(0, n), present, table, options, greedy, seed)).tokens))
    assert len(lengths) > 2


def test_arrays_may_lie_anyhow() -> None:
    rng = np.random.default_rng(0)
    heads = random_heads(rng, 3, 6, 1.0, tied=False, gone=0)
    scattered = HeadCandidates(np.repeat(heads.ids, 2, 1)[:, ::2], np.asfortranarray(heads.probs))
    table, options = random_table(rng, 3, VOCAB, 500), Algorithm1(top_k=6, eps_b=0)
    for some in (heads, scattered):
        assert_the_same((some, np.zeros(2 * VOCAB, bool)[::2], table, options, False, 0))


def test_a_copied_table_points_to_its_own_arrays() -> None:
    rng = np.random.default_rng(0)
    heads, options = random_heads(rng, 3, 6, 1.0, tied=False, gone=0), Algorithm1(top_k=6, eps_b=0)
    table = random_table(rng, 3, VOCAB, 500)
    own = table.lookup.pointers(3)
    assert table.lookup.pointers(3) is own
    for twin in (copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
        assert not set(own[3::5]) & set(twin.lookup.pointers(3)[3::5])
        assert_the_same((heads, np.zeros(VOCAB, bool), twin, options, False, 0))


@pytest.mark.parametrize(
    "change",
    [
        {"heads": HeadCandidates(np.zeros((21, 8), int), np.full((21, 8), 1 / 8))},  # 8^21 = 2^63 cells
        {"table": None, "options": Algorithm1(top_k=2, eps_b=0), "limit": 7},  # 2^3 tuples
        {"table": None, "options": Algorithm1(top_k=2, eps_b=0.25), "limit": 7},  # the heads' least likely ones count
        {"options": Algorithm1(top_k=3)},  # which these heads do not have
        {"conditionals": (np.zeros((2, 2)),) * 2},
    ],
)
def test_what_the_kernels_do_not_draw_from(change) -> None:
    heads = change.get("heads", HeadCandidates(np.array([[0, 1]] * 3), np.full((3, 2), 0.5), change.get("conditionals", ())))
    table = change.get("table", count([np.array([0, 1, 0])], vocab_size=2, order=3))
    options = change.get("options", Algorithm1(top_k=heads.ids.shape[1]))
    with patch.object(algorithm1, "MAX_COMPILED", change.get("limit", algorithm1.MAX_COMPILED)):
        assert not algorithm1._compilable(heads, table, options)
    assert algorithm1._compilable(
        HeadCandidates(heads.ids[:3], heads.probs[:3]), None, replace(options, top_k=heads.ids.shape[1])
    )


def test_a_short_table_is_enough_for_one_token() -> None:
    heads = HeadCandidates(np.array([[0, 1]] * 3), np.array([[0.9, 0.1]] * 3))
    table = count([np.array([0, 1, 0])], vocab_size=2, order=2)
    assert not algorithm1._compilable(heads, table, Algorithm1(top_k=2))
    for n, eps_b in [(3, 1), (1, 0.5)]:
        case = heads.of(0, n), np.zeros(2, bool), table, Algorithm1(top_k=2, eps_b=eps_b), True, 0
        assert assert_the_same(case).tokens == [0]
