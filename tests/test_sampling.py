"""Algorithm 1 and drafts: worked examples, the method's invariants, and agreement with the slow reference."""

import math
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import reference
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynamo_lm.cooccurrence.counting import count
from dynamo_lm.cooccurrence.table import Cooccurrence
from dynamo_lm.errors import InputError
from dynamo_lm.kernels import loader
from dynamo_lm.sampling import drafting, otsu, top_k
from dynamo_lm.sampling.algorithm1 import draw, survivors
from dynamo_lm.sampling.drafting import draft, draft_from
from dynamo_lm.sampling.joint import Joint, Joints
from dynamo_lm.sampling.options import Algorithm1, check
from dynamo_lm.sampling.otsu import foreground
from dynamo_lm.sampling.top_k import HeadCandidates, highest

NOTHING = torch.tensor([], dtype=torch.long)
PLAIN = Algorithm1(otsu=False, top_k=2, temperature=1, repetition_penalty=1)  # thresholds and penalty only as stated


def table_of(*documents: list[int], vocab_size: int = 2, order: int = 2) -> Cooccurrence:
    return count([np.array(document) for document in documents], vocab_size=vocab_size, order=order)


def heads_of(*probabilities: list[float]) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def left_over(logits: Tensor, context: list[int], table, options: Algorithm1, m: int) -> dict[tuple[int, ...], float]:
    """What the fast code may emit at length m: {ranks: value}."""
    heads = HeadCandidates.top(logits, options.top_k, options.temperature)
    present = np.isin(np.arange(logits.shape[1]), context)
    least = options.eps_b ** (len(logits) - 1) * (1 - 1e-9)
    left = survivors(Joints(heads, table, options.alpha_c, least)[m], heads, present, options, m)
    ranks = zip(*(axis.tolist() for axis in np.unravel_index(left.cells, (options.top_k,) * m)), strict=True)
    return dict(zip(ranks, left.values.tolist(), strict=True))


# Tokens 0 and 1 are equally frequent; of four pairs three are 01 and one is 10: weights (3/4)/(1/4) = 3 and 1.
THREE_TO_ONE = table_of([0, 1], [0, 1], [0, 1], [1, 0])
EVEN = heads_of([0.5, 0.5], [0.5, 0.5])


def test_the_mask_multiplies_the_heads_by_the_cooccurrence_weight() -> None:
    result = draw(EVEN, NOTHING, THREE_TO_ONE, PLAIN, None, greedy=True)
    assert result.tokens == [0, 1]
    assert result.joint == pytest.approx(0.75)  # 1/4 * 3 against 1/4 * 1
    halved = draw(EVEN, NOTHING, THREE_TO_ONE, replace(PLAIN, alpha_c=0.5), None, greedy=True)
    assert halved.joint == pytest.approx(math.sqrt(3) / (math.sqrt(3) + 1))


def test_without_mask_or_table_the_joint_is_the_product_of_the_heads() -> None:
    logits = heads_of([0.8, 0.2], [0.3, 0.7])
    for table, alpha_c in ((None, 1.0), (THREE_TO_ONE, 0.0)):
        result = draw(logits, NOTHING, table, replace(PLAIN, alpha_c=alpha_c), None, greedy=True)
        assert (result.tokens, result.joint) == ([0, 1], pytest.approx(0.56))


def test_backs_off_unless_an_entry_exceeds_the_threshold_strictly() -> None:
    # n = 2, J = 1/4 everywhere
    assert draw(EVEN, NOTHING, None, replace(PLAIN, eps_b=0.25), seeded()).backed_off == 1
    assert draw(EVEN, NOTHING, None, replace(PLAIN, eps_b=0.2499), seeded()).backed_off == 0
    # n = 3, threshold eps_b^2: 0.512 > 0.49, and 0.64 < 0.7
    logits = heads_of([0.8, 0.2], [0.8, 0.2], [0.8, 0.2])
    assert draw(logits, NOTHING, None, replace(PLAIN, eps_b=0.7), None, greedy=True).tokens == [0, 0, 0]
    # 0.512 < 0.5184 and 0.64 < 0.72: down to one
    assert draw(logits, NOTHING, None, replace(PLAIN, eps_b=0.72), None, greedy=True).tokens == [0]


def test_backs_off_where_no_candidate_tuple_was_ever_seen() -> None:
    surely_one = heads_of([0, 1], [0, 1])  # 11 is not in the table
    result = draw(surely_one, NOTHING, THREE_TO_ONE, replace(PLAIN, top_k=1, eps_b=0), None)
    assert (result.tokens, result.joint, result.backed_off) == ([1], 1.0, 1)


def test_entries_below_the_static_threshold_are_dropped_and_the_rest_is_not_renormalised() -> None:
    options = replace(PLAIN, eps_b=0.3)
    assert left_over(EVEN, [], THREE_TO_ONE, options, 2) == {(0, 1): pytest.approx(0.75)}
    assert len(left_over(EVEN, [], THREE_TO_ONE, replace(PLAIN, eps_b=0.25), 2)) == 2  # equal is not below


def test_otsu_drops_the_background_but_never_the_largest_entry() -> None:
    logits = heads_of([0.9, 0.06, 0.04], [0.9, 0.06, 0.04])  # 0.81 against at most 0.054
    options = replace(PLAIN, top_k=3, eps_b=0)
    assert len(left_over(logits, [], None, options, 2)) == 9
    assert left_over(logits, [], None, replace(options, otsu=True, blur=False), 2) == {(0, 0): pytest.approx(0.81)}
    # Blurred, the peak's neighbours are foreground too, with their own values. One axis, 0.9 0.06 0.04, becomes
    # 0.48 0.265 0.05: the largest of the grid are 0.2304, twice 0.1272 and 0.0702; the threshold parts the last two.
    blurred = left_over(logits, [], None, replace(options, otsu=True), 2)
    assert blurred == pytest.approx({(0, 0): 0.81, (0, 1): 0.054, (1, 0): 0.054})


def test_a_lone_peak_survives_that_the_blur_levels() -> None:
    # 0.12 in a corner blurs to 0.03, at the middle of the block of nine 0.098 stays 0.098, at its corners 0.055
    cells = np.array([0, 36, 37, 38, 44, 45, 46, 52, 53, 54])  # of 8 x 8
    values = np.array([0.12] + [0.88 / 9] * 9)
    assert foreground(cells, values, 8, 2, blur=True).tolist() == [False] + [True] * 9
    heads = HeadCandidates(np.array([range(8)] * 2), np.full((2, 8), 1 / 8))
    options = replace(PLAIN, eps_b=0, otsu=True, top_k=8)
    assert survivors(Joint(cells, values), heads, np.zeros(8, bool), options, 2).cells.tolist() == cells.tolist()


def test_repetition_divides_once_per_position_seen_in_the_context_or_earlier_in_the_tuple() -> None:
    options = replace(PLAIN, eps_b=0, repetition_penalty=2)
    assert left_over(EVEN, [0], THREE_TO_ONE, options, 2) == pytest.approx({(0, 1): 0.75 / 2, (1, 0): 0.25 / 2})
    assert left_over(EVEN, [0, 1, 1], THREE_TO_ONE, options, 2) == pytest.approx({(0, 1): 0.75 / 4, (1, 0): 0.25 / 4})
    repeats = left_over(heads_of([0, 1], [0, 1], [0, 1]), [], None, replace(options, top_k=1), 3)
    assert repeats == {(0, 0, 0): 0.25}  # 1 1 1: the second and the third


def test_the_penalty_comes_before_the_back_off_test() -> None:
    options = replace(PLAIN, repetition_penalty=2)
    assert draw(EVEN, NOTHING, THREE_TO_ONE, options, None, greedy=True).tokens == [0, 1]
    assert draw(EVEN, torch.tensor([0]), THREE_TO_ONE, options, None, greedy=True).tokens == [1]  # 0.375 < 0.5


def test_one_token_is_drawn_from_the_penalised_first_head() -> None:
    options = replace(PLAIN, eps_b=1, repetition_penalty=2)
    logits, generator = heads_of([0.6, 0.4]), seeded()
    drawn = [draw(logits, torch.tensor([0]), None, options, generator).tokens[0] for _ in range(1000)]
    assert np.mean(drawn) == pytest.approx(4 / 7, abs=0.05)  # 0.3 against 0.4
    assert draw(logits, torch.tensor([0]), None, options, None, greedy=True).joint == pytest.approx(0.4)


@pytest.mark.parametrize("options", [replace(PLAIN, eps_b=1), replace(PLAIN, eps_b=1, repetition_penalty=0.5)])
def test_eps_b_of_one_always_emits_one_token_even_when_sure(options: Algorithm1) -> None:
    sure = heads_of([1, 0], [1, 0], [1, 0])
    assert draw(sure, torch.tensor([0]), None, options, None).tokens == [0]


def test_equal_candidates_are_ordered_by_token_id_also_where_top_k_cuts() -> None:
    heads = HeadCandidates.top(torch.tensor([[1.0, 2, 1, 2, 1, 1], [0, 0, 0, 0, 0, 0]]), 3, 1.0)
    assert heads.ids.tolist() == [[1, 3, 0], [0, 1, 2]]
    assert draw(torch.zeros(2, 6), NOTHING, None, replace(PLAIN, eps_b=0), None, greedy=True).tokens == [0, 0]


def test_tuples_are_drawn_as_often_as_the_joint_says() -> None:
    table = table_of([0, 1, 2, 2, 1], [2, 0, 0, 1, 1], [0, 2, 1, 0], vocab_size=3)
    options = replace(PLAIN, top_k=3, eps_b=0)
    logits, generator = heads_of([0.5, 0.3, 0.2], [0.5, 0.3, 0.2]), seeded(1)
    heads = [reference.candidates(row, 3, 1.0) for row in logits.tolist()]
    expected = {cell: 2000 * value for cell, value in reference.joint_grid(heads, table, 1.0).items() if value}
    drawn = Counter(tuple(draw(logits, NOTHING, table, options, generator).tokens) for _ in range(2000))
    assert set(drawn) == set(expected)
    chi_square = sum((drawn[cell] - mean) ** 2 / mean for cell, mean in expected.items())
    assert chi_square < 26.1  # 8 degrees of freedom or fewer, 0.1 %


def test_a_draw_consumes_one_uniform_and_a_greedy_one_none() -> None:
    generator, twin = seeded(), seeded()
    draw(EVEN, NOTHING, THREE_TO_ONE, PLAIN, generator)
    torch.rand(1, dtype=torch.float64, generator=twin)
    draw(EVEN, NOTHING, THREE_TO_ONE, PLAIN, generator, greedy=True)
    assert torch.equal(generator.get_state(), twin.get_state())


@pytest.mark.parametrize(
    "wrong",
    [{"eps_b": 1.1}, {"eps_b": math.nan}, {"alpha_c": -1}, {"temperature": 0}, {"top_k": 0}, {"repetition_penalty": 0}],
)
def test_options_out_of_range_are_refused_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        Algorithm1(**wrong)


def test_check_refuses_what_cannot_be_drawn() -> None:
    check(PLAIN, 2, 2, THREE_TO_ONE)
    check(replace(PLAIN, alpha_c=0), 3, 2, THREE_TO_ONE)
    with pytest.raises(InputError, match="order 2 but 3 tokens are drawn; count with --order 3 or set alpha_c=0"):
        check(PLAIN, 3, 2, THREE_TO_ONE)
    with pytest.raises(InputError, match="top_k is 3"):
        check(replace(PLAIN, top_k=3), 2, 2, None)
    with pytest.raises(InputError, match="counts 2 tokens but the model has 1"):
        check(replace(PLAIN, top_k=1), 2, 1, THREE_TO_ONE)
    with pytest.raises(InputError, match="too large"):
        check(replace(PLAIN, eps_b=0, top_k=1000), 4, 5000, None)
    with pytest.raises(InputError, match="top_k is 3"):
        draw(EVEN, NOTHING, None, replace(PLAIN, top_k=3), None)
    with pytest.raises(InputError, match="finite"):
        draw(EVEN * math.nan, NOTHING, None, PLAIN, None)


# --- agreement with the reference -------------------------------------------------------------------------------------


@st.composite
def cases(draw_from):
    """Logits (n, V), documents, options, seed: random ones, with ties in half of the cases."""
    n, vocab_size = draw_from(st.integers(2, 4)), draw_from(st.integers(6, 12))
    top_k = draw_from(st.integers(1, 6 if n < 4 else 4))
    rng = np.random.default_rng(draw_from(st.integers(0, 2**32 - 1)))
    spread = draw_from(st.sampled_from([0.5, 2, 5]))
    logits = rng.normal(0, spread, (n, vocab_size))
    if draw_from(st.booleans()):
        logits = logits.round()
    documents = [rng.integers(0, vocab_size, rng.integers(4, 60)) for _ in range(3)]
    options = Algorithm1(
        eps_b=draw_from(st.sampled_from([0.0, 0.05, 0.3, 0.5, 1.0])),
        alpha_c=draw_from(st.sampled_from([0.0, 0.5, 1.0])),
        otsu=draw_from(st.booleans()),
        blur=draw_from(st.booleans()),
        top_k=top_k,
        temperature=draw_from(st.sampled_from([0.7, 1.0])),
        repetition_penalty=draw_from(st.sampled_from([0.8, 1.0, 1.1, 2.0])),
    )
    table = count(documents, vocab_size=vocab_size, order=n) if draw_from(st.integers(0, 9)) else None
    return torch.from_numpy(logits).float(), documents[0][:4].tolist(), table, options, draw_from(st.integers(0, 99))


@settings(max_examples=150, deadline=None)
@given(cases(), st.booleans(), st.sampled_from([0, otsu.SPARSE_COST]))
def test_what_survives_and_what_is_drawn_is_the_references(case, greedy: bool, sparse_cost: int) -> None:
    logits, context, table, options, seed = case
    heads = [reference.candidates(row, options.top_k, options.temperature) for row in logits.tolist()]
    for m in range(1, len(heads) + 1):
        expected = reference.survivors(reference.joint_grid(heads[:m], table, options.alpha_c), heads[:m], context, options)
        if m > 1 and options.eps_b == 1:
            continue  # `draw` does not even ask
        with patch.object(otsu, "SPARSE_COST", sparse_cost):  # 0: never the dense grid
            assert left_over(logits, context, table, options, m) == pytest.approx(expected, rel=1e-9, abs=0)
    mine = draw(logits, torch.tensor(context), table, options, seeded(seed), greedy)
    theirs = reference.draw(logits, torch.tensor(context), table, options, seeded(seed), greedy)
    assert (mine.tokens, mine.backed_off) == (theirs.tokens, theirs.backed_off)
    assert mine.joint == pytest.approx(theirs.joint, rel=1e-9)


def some_coupling(seed: int):
    """A pairwise that adds a number of its own to each (head, token before, token), up to 3 either way."""

    def pairwise(head: int, previous: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        return 3 * np.sin(seed + 7.0 * head + 3.0 * previous[:, None] * (1 + candidates))

    return pairwise


@settings(max_examples=60, deadline=None)
@given(cases(), st.booleans())
def test_a_coupled_draw_is_the_references(case, greedy: bool) -> None:
    logits, context, table, options, seed = case
    pairwise = some_coupling(seed)
    mine = draw(logits, torch.tensor(context), table, options, seeded(seed), greedy, pairwise)
    theirs = reference.draw(logits, torch.tensor(context), table, options, seeded(seed), greedy, pairwise)
    assert (mine.tokens, mine.backed_off) == (theirs.tokens, theirs.backed_off)
    assert mine.joint == pytest.approx(theirs.joint, rel=1e-9)


@settings(max_examples=50, deadline=None)
@given(cases())
def test_the_ends_of_the_dial_hold_exactly(case) -> None:
    logits, context, table, options, seed = case
    tokens = torch.tensor(context)
    assert len(draw(logits, tokens, table, replace(options, eps_b=1), seeded(seed)).tokens) == 1
    heads = [reference.candidates(row, options.top_k, options.temperature) for row in logits.tolist()]
    assume(any(reference.joint_grid(heads, table, options.alpha_c).values()))
    assert len(draw(logits, tokens, table, replace(options, eps_b=0), seeded(seed)).tokens) == len(logits)


@settings(max_examples=50, deadline=None)
@given(cases())
def test_scanning_children_finds_what_searching_finds(case) -> None:
    logits, _, table, options, _ = case
    assume(table is not None)
    ids = HeadCandidates.top(logits, options.top_k, 1.0).ids
    rows = ids[0]
    for order in range(2, table.order + 1):
        found = table.lookup.children(rows, ids[order - 1], order)
        searched = table.lookup._search(rows, ids[order - 1], order)
        assert sorted(zip(*map(np.ndarray.tolist, found), strict=True)) == list(
            zip(*map(np.ndarray.tolist, searched), strict=True)
        )
        rows = found[2]


def test_tables_of_fewer_tokens_than_the_model_know_nothing_of_the_rest() -> None:
    padded = heads_of([0.25] * 4, [0.25] * 4)
    options = replace(PLAIN, top_k=4, eps_b=0)
    assert left_over(padded, [], THREE_TO_ONE, options, 2) == pytest.approx({(0, 1): 0.75, (1, 0): 0.25})


# --- drafts -----------------------------------------------------------------------------------------------------------

OPEN = {"alpha_c": 1.0, "temperature": 1.0, "generator": None, "greedy": True}


def test_a_draft_is_weighted_by_what_was_seen_after_the_text() -> None:
    # p^(1) = 3/9, p^(2) = 2/9; 0 was counted 4 times and has two followers. Its pairs are 4 of 4, its share of tokens 4/9.
    table = table_of([0, 1], [0, 1], [0, 1], [0, 2], [2], vocab_size=3)
    result = draft(heads_of([0, 0.5, 0.5]), np.array([0]), table, top_k=2, **OPEN)
    ids, q = result.proposals[0]
    seen = 4 / 9 * 4
    weight = seen / (seen + 0.6)
    one, two = (weight * pair / (4 / 9) + (1 - weight) * alone for pair, alone in ((3 / 4, 3 / 9), (1 / 4, 2 / 9)))
    assert (result.tokens, ids.tolist()) == ([1], [1, 2])
    assert q[0].item() / q[1].item() == pytest.approx((one / (3 / 9)) / (two / (2 / 9)))


def test_what_was_never_seen_is_left_to_shorter_n_grams() -> None:
    table = table_of([0, 1], [1, 2], vocab_size=3, order=3)  # 01 and 12, no triple
    result = draft(heads_of([0, 0.9, 0.1]), np.array([0, 1]), table, top_k=2, **OPEN)
    assert result.tokens == [2]  # after 1: 2, however sure the head is of 1; 01 has no followers
    assert 0 < result.q[0, 0] < 0.5
    assert draft(heads_of([0, 0.9, 0.1]), np.array([2]), table, top_k=2, **OPEN).tokens == [1]  # 2 has none either


def test_a_text_weights_what_it_said_before_and_adds_it() -> None:
    table = table_of([0, 1, 2, 3, 4, 5, 6, 7], vocab_size=9)
    text = np.array([1, 2, 7, 8, 1, 2])
    drafted = draft(heads_of([0.4, 0.3, 0.2, 0.1, 0, 0, 0, 0, 0]), text, table, top_k=4, **OPEN)
    assert drafted.ids.tolist() == [[0, 1, 2, 7]]  # in place of 3
    assert drafted.tokens == [7]
    both = draft(heads_of([0.4, 0.3, 0.2, 0, 0, 0, 0, 0, 0.1]), np.append(text, [8, 1, 2]), table, top_k=4, **OPEN)
    assert both.ids.tolist() == [[0, 1, 7, 8]]  # 8 stood there, too, and stays
    fresh = draft(heads_of([0.4, 0.3, 0.2, 0.1, 0, 0, 0, 0, 0]), text[:-1], table, top_k=4, **OPEN)
    assert fresh.ids.tolist() == [[0, 1, 2, 3]]


@settings(max_examples=60, deadline=None)
@given(cases(), st.booleans(), st.integers(0, 2), st.booleans(), st.integers(0, 12))
def test_a_draft_is_the_references(case, greedy: bool, shorter: int, coupled: bool, repeated: int) -> None:
    logits, context, table, options, seed = case
    pairwise = some_coupling(seed) if coupled else None
    settings_ = {"alpha_c": options.alpha_c, "top_k": options.top_k, "temperature": options.temperature}
    if table is not None and table.order - shorter >= 1:
        order = table.order - shorter
        table = Cooccurrence(
            table.vocab_size, table.keys[:order], table.counts[:order], table.totals[:order], table.min_counts[:order]
        )
    text = np.random.default_rng(seed).choice(logits.shape[1], repeated)  # what it said before among it
    text = np.concatenate([text[: repeated // 2], text, context[:1]])
    how = {"greedy": greedy, "pairwise": pairwise, **settings_}
    mine = draft(logits, text, table, generator=seeded(seed), **how)
    theirs = reference.draft(logits, text, table, generator=seeded(seed), **how)
    assert mine.tokens == theirs.tokens
    for (ids, q), (their_ids, their_q) in zip(mine.proposals, theirs.proposals, strict=True):
        assert torch.equal(ids, their_ids)
        torch.testing.assert_close(q, their_q, rtol=1e-6, atol=0)
        assert q.sum().item() == pytest.approx(1)


# ---------------------------------------------------------------- kernels against NumPy and torch


needs_kernel = pytest.mark.skipif(not loader.available(), reason="needs a C++ compiler")


@st.composite
def chains(draw):
    """Candidates of 0 to 4 slots, some without probability, some unknown to a table of any order, and a text."""
    slots, k = draw(st.integers(0, 4)), draw(st.integers(1, 9))
    vocab_size, order = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ids = np.stack([rng.permutation(16)[:k] for _ in range(slots)]) if slots else np.empty((0, k), np.int64)
    probs = np.exp(rng.normal(0, 3, (slots, k))) * (rng.random((slots, k)) > draw(st.sampled_from([0.0, 0.3])))
    if draw(st.booleans()):
        probs = probs.round()  # ties
    probs[:, 0] += 0.5
    # few documents: histories that were never seen; many: all of them
    documents = [rng.integers(0, vocab_size, rng.integers(1, 30)) for _ in range(draw(st.sampled_from([1, 3, 100])))]
    table = count(documents, vocab_size=vocab_size, order=order) if draw(st.integers(0, 9)) else None
    if table is not None and draw(st.booleans()):
        table = table.prune(2)
    heads = HeadCandidates(ids, probs / probs.sum(-1, keepdims=True))
    text = rng.integers(draw(st.sampled_from([1, 2, 16])), size=draw(st.integers(1, 20) | st.sampled_from([300, 900])))
    return heads, text, table, draw(st.sampled_from([0.0, 0.5, 1.0, 3.0])), draw(st.integers(0, 99))


def assert_same_chain(heads: HeadCandidates, text: np.ndarray, table, alpha_c: float, seed: int, greedy: bool) -> None:
    generator, twin = seeded(seed), seeded(seed)
    mine = drafting._compiled_chain(loader.sampler(), heads, text, table, alpha_c, generator, greedy)
    with patch.object(loader, "_sampler", None):
        theirs = draft_from(heads, text, table, alpha_c=alpha_c, temperature=1.0, generator=twin, greedy=greedy)
    assert mine.tokens == theirs.tokens
    assert torch.equal(mine.ids, theirs.ids)
    torch.testing.assert_close(mine.q, theirs.q, rtol=1e-9, atol=0)
    assert torch.equal(generator.get_state(), twin.get_state())


@needs_kernel
@settings(max_examples=400, deadline=None)
@given(chains(), st.booleans())
def test_the_kernels_chain_of_drafts_is_numpys(case, greedy: bool) -> None:
    assert_same_chain(*case, greedy)


@needs_kernel
def test_the_kernels_take_candidates_as_they_lie() -> None:
    heads = HeadCandidates(np.arange(12).reshape(2, 6)[:, ::2], np.full((2, 6), 1 / 3)[:, ::2])
    assert_same_chain(heads, np.array([0]), THREE_TO_ONE, 1.0, 0, False)


@needs_kernel
def test_a_copied_table_leads_the_kernels_to_its_own_arrays() -> None:
    table = table_of([0, 1], [0, 1], [1, 0])
    table.lookup.pointers(2)
    twin = deepcopy(table)
    del table
    assert_same_chain(HeadCandidates(np.array([[0, 1]]), np.array([[0.5, 0.5]])), np.array([0]), twin, 1.0, 0, True)


LOGITS = st.one_of(st.sampled_from([0.0, -0.0, 1.5, 2.0, -math.inf, -70.0]), st.floats(-90, 90, width=32))


@st.composite
def lines_of_logits(draw):
    """(lines, size) float32: a few drawn values among many, so that there are ties, or noise."""
    lines, size = draw(st.integers(1, 3)), draw(st.integers(1, 700))
    values = torch.tensor(draw(st.lists(LOGITS, min_size=1, max_size=12)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    logits = values[torch.randint(len(values), (lines, size), generator=generator)]
    return logits + torch.randn(lines, size, generator=generator) if draw(st.booleans()) else logits


@needs_kernel
@settings(max_examples=200, deadline=None)
@given(lines_of_logits(), st.data())
def test_the_kernel_finds_the_candidates_that_torch_and_the_host_find(logits, data):
    count = data.draw(st.integers(1, min(60, logits.shape[1])))
    ids, values = highest(logits, count)
    slow_ids, slow_values = top_k._put_right(logits, count)
    finite = slow_values[:, :1].isfinite()  # lines without a finite first are refused behind this, in any order
    assert torch.equal(values, slow_values)
    assert torch.equal(ids.where(finite, -1), slow_ids.where(finite, -1))


@needs_kernel
def test_what_is_not_a_number_is_left_to_torch():
    logits = torch.arange(100.0)[None].clone()
    logits[0, 3] = math.nan
    ids, values = highest(logits, 2)
    assert ids[0, 0] == 3 and values[0, 0].isnan()
    with pytest.raises(InputError, match="not a finite number"):
        HeadCandidates.top(logits, 2, 1.0)


@needs_kernel
def test_the_kernels_get_only_logits_that_they_take(monkeypatch):
    logits = torch.zeros(2, 4)
    assert loader.sampler_of(logits) is not None
    assert loader.sampler_of(logits.double()) is None
    assert loader.sampler_of(logits[:, ::2]) is None
    assert loader.sampler_of(logits[:0]) is None
    monkeypatch.setattr(loader, "MAX_LOGITS", 7)
    assert loader.sampler_of(logits) is None
