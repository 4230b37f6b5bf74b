"""Drafts as a tree: what is grown, what is accepted, and that the text stays the base's own."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from architectures import EOS, NAMES, cycle, dynamo_of, markov_dynamo, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_lm.cooccurrence.counting import count
from dynamo_lm.decoding.batch import decode
from dynamo_lm.decoding.draft_length import (
    IDLE_STEPS,
    REST_STEPS,
    TRIALS,
    WARM_UP_STEPS,
    WINDOW,
    AdaptiveDraftLength,
)
from dynamo_lm.decoding.draft_tree import ancestry, depths, grow
from dynamo_lm.decoding.kv_cache import RaggedKVCache
from dynamo_lm.decoding.options import DecodingOptions
from dynamo_lm.decoding.verification import accept_greedy, accept_tree
from dynamo_lm.errors import InputError
from dynamo_lm.sampling.drafting import conditional
from dynamo_lm.sampling.options import Algorithm1
from dynamo_lm.sampling.top_k import HeadCandidates


def heads_and_table(seed: int, n: int, k: int):
    rng = np.random.default_rng(seed)
    heads = HeadCandidates.top(torch.from_numpy(rng.normal(0, 2, (n - 1, 12))).float(), k, 1.0)
    return heads, count([rng.integers(0, 12, 80)], vocab_size=12, order=3)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.integers(2, 4), st.integers(1, 5), st.integers(1, 12), st.sampled_from([0.0, 0.5, 1.0]))
def test_a_tree_holds_the_likeliest_paths(seed, n, k, most, alpha_c):
    heads, table = heads_and_table(seed, n, k)
    how = {"alpha_c": alpha_c, "temperature": 1.0, "pairwise": None}
    text = np.array([5, 3, 1, 7, 5, 3])
    tree = grow(heads, text, table, most=most, **how)
    paths = [[]]
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        paths.append([*paths[parent], token])
    everything = {}  # every path's probability, the slow way
    for length in range(1, n):
        for ranks in itertools.product(range(k), repeat=length):
            path, probability = [], 1.0
            for depth, rank in enumerate(ranks):
                ids, q = conditional(heads, depth, np.append(text, np.array(path, np.int64)), table, **how)
                probability *= float(q[rank])
                path.append(int(ids[rank]))
            everything[tuple(path)] = probability
    possible = sorted((p for p in everything.values() if p > 0), reverse=True)
    assert tree.probabilities == pytest.approx(possible[:most])
    assert [everything[tuple(path)] for path in paths[1:]] == pytest.approx(tree.probabilities)
    assert len({tuple(path) for path in paths}) == len(paths)


def test_what_a_token_of_a_tree_sees():
    # 0 the certain token; 1 and 2 behind it; 3 behind 1; 4 behind 3; one token of padding
    assert depths([0, 0, 1, 3]) == [0, 1, 1, 2, 3]
    expected = ["100000", "110000", "101000", "110100", "110110", "000001"]
    assert ["".join(str(int(seen)) for seen in row) for row in ancestry([0, 0, 1, 3], 6)] == expected


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 999), st.integers(0, 6), st.booleans())
def test_a_tree_that_is_a_chain_is_judged_as_a_chain(seed, length, budget):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, 3, (length + 1, 4), generator=generator).float()
    drafts = torch.randint(0, 4, (length,), generator=generator).tolist()
    regret_budgets = [1.5 * place for place in range(1, length + 1)] if budget else []
    assert accept_tree(logits, drafts, list(range(length)), regret_budgets) == accept_greedy(logits, drafts, regret_budgets)


def test_the_bases_choices_are_followed_down_the_tree():
    logits = torch.zeros(5, 6)
    for place, best in enumerate([4, 0, 5, 0, 2]):
        logits[place, best] = 1.0
    # behind the certain token 3 and 4, behind 4 (place 2) 1 and 5 (place 4): the base goes 4, 5, 2
    verdict = accept_tree(logits, [3, 4, 1, 5], [0, 0, 2, 2])
    assert (verdict.accepted, verdict.token, verdict.path) == (2, 2, [2, 4])
    assert accept_tree(logits, [3, 1, 5], [0, 0, 1]).path == []
    spent = accept_tree(logits, [3, 1, 5], [0, 0, 1], regret_budgets=[1.0, 1.0])  # costs 1 nat; then 5 where 0 is best
    assert (spent.path, spent.costs, spent.token) == ([1], [1.0], 0)


@pytest.mark.parametrize(
    ("name", "tree"), [*((name, 9) for name in NAMES), ("gpt_neox", 3), ("gemma3", 3), ("qwen3_moe", 3)]
)
def test_trees_change_no_text(name, tree):
    model = dynamo_of(name)
    prompts = [random_tokens(length, seed=length).tolist() for length in (4, 9, 6)]
    plain = decode(model, prompts, DecodingOptions(18, 1, end_tokens=frozenset([EOS])), seeds=[0, 1, 2])
    grown = decode(model, prompts, DecodingOptions(18, 3, tree=tree, end_tokens=frozenset([EOS])), seeds=[0, 1, 2])
    assert [row.tokens for row in grown] == [row.tokens for row in plain]
    for row, other in zip(grown, plain, strict=True):
        assert row.statistics.log_likelihood == pytest.approx(other.statistics.log_likelihood, rel=1e-3)


def test_a_tree_finds_the_second_best_draft():
    ahead = 0.6 * cycle(10, 5) + 0.4 * cycle(10, 2)  # head 2 prefers a token that is wrong; its second choice is right
    model = markov_dynamo(cycle(10), ahead)
    chain, tree = (
        decode(model, [[0]], DecodingOptions(12, 2, tree=size, algorithm=Algorithm1(top_k=5)), seeds=[0])[0].statistics
        for size in (0, 2)
    )
    assert chain.tokens_per_step == 1.0 and tree.step_sizes == [1, 2, 2, 2, 2, 2, 1]


def test_sizes_are_tried_and_then_the_fastest_is_taken():
    draft_length = AdaptiveDraftLength((4, 8, 16))
    for size, seconds in ((4, 1.0), (8, 1.1), (16, 3.0)):
        for _ in range(TRIALS):
            assert draft_length.choose([0.5] * 15) == size
            draft_length.record(size, seconds, expected=1.5, accepted=1)
    assert draft_length.choose([0.5, 0.4, 0.3, 0.3, 0.3, 0.2, 0.2] + [0.01] * 8) == 8
    assert draft_length.choose([0.9, 0.1, 0.01, 0.001] + [0.0] * 11) == 4  # the rest is worth nothing


def test_where_hardly_any_draft_is_kept_none_is_tried_and_taken_if_faster():
    draft_length, promising, hopeless = AdaptiveDraftLength((4, 8)), [0.9] * 7, [0.05] * 7
    for step in range(WARM_UP_STEPS):
        assert draft_length.choose(hopeless) in (4, 8)
        draft_length.record(draft_length.choose(hopeless), 1.5, expected=0.3, accepted=step % 4 == 0)
    for _ in range(TRIALS):
        assert draft_length.choose(hopeless) == 1
        draft_length.record(1, 1.0, expected=0.0, accepted=0)
    assert draft_length.choose(hopeless) == 1
    assert draft_length.choose(promising) in (4, 8)  # as soon as drafts are likely again
    assert all(len(times) <= WINDOW for times in draft_length.seconds.values())


def test_heads_rest_while_no_draft_is_worth_it():
    """And are asked again in between, so that drafts come back when they are."""
    draft_length, hopeless, promising = AdaptiveDraftLength((4, 8), accepted=0, steps=WARM_UP_STEPS), [0.05] * 7, [0.9] * 7
    for size, seconds in ((4, 1.5), (8, 2.0), (1, 1.0)):
        for _ in range(TRIALS):
            draft_length.record(size, seconds, expected=0.0, accepted=0)
    asked = []
    for _ in range(10 * (REST_STEPS + 1)):
        asked.append(not draft_length.rests())
        if asked[-1]:
            assert draft_length.choose(hopeless) == 1
    assert all(asked[:IDLE_STEPS]) and sum(asked[IDLE_STEPS:]) == 9
    while draft_length.rests():
        pass
    assert draft_length.choose(promising) in (4, 8)
    assert not any(draft_length.rests() for _ in range(IDLE_STEPS))


def test_kept_slots_move_up_for_every_copy_of_a_row():
    cache = RaggedKVCache(2, 2)
    cache.reserve(2)
    for layer, copies in enumerate((1, 3)):  # the second layer is wide: three copies of every row
        cache.layers[layer].update(*[torch.zeros(2 * copies, 1, 2, 1)] * 2)
    cache.commit(torch.tensor([2, 1]))
    cache.reserve(4)
    written = torch.arange(4.0)[None, None, :, None]
    for layer, copies in enumerate((1, 3)):
        new = torch.cat([written + 10 * row + 100 * copy for copy in range(copies) for row in range(2)])
        cache.layers[layer].update(new, new)
    cache.gather([[2, 3], [3]])
    cache.commit(torch.tensor([3, 2]))
    for layer, copies in enumerate((1, 3)):
        keys = cache.layers[layer].keys[:, 0, :, 0]
        for copy in range(copies):
            assert (keys[2 * copy, 2:5] - 100 * copy).tolist() == [0, 2, 3]
            assert (keys[2 * copy + 1, 1:3] - 100 * copy).tolist() == [10, 13]


@pytest.mark.parametrize("tree", [-1, 64])
def test_sizes_out_of_range_are_refused(tree):
    with pytest.raises(InputError, match="tree is"):
        DecodingOptions(5, 2, tree=tree)
