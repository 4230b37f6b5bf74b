"""Drafts as a tree: what is grown, what is accepted, and that the text stays the base's own."""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import replace

import numpy as np
import pytest
import torch
from architectures import EOS, NAMES, cycle, dynamo_of, markov_dynamo, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_lm.cooccurrence.counting import count
from dynamo_lm.decoding.batch import decode
from dynamo_lm.decoding.draft_length import FORGET_STEPS, JUDGED_STEPS, AdaptiveDraftLength
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


def decode_on_paper(length: AdaptiveDraftLength, seconds, likely: float, steps: int, *, chain: bool) -> tuple[float, float]:
    """Tokens a second of so many steps, and the share of them at rest.

    seconds: of a step, by tokens carried; at 0 of a step at rest. likely: how often a draft is accepted after the last one.
    """
    probabilities, tokens, spent, rested, size, carried = [likely**i for i in range(1, 64)], 0.0, 0.0, 0, 0, 0
    for _ in range(steps):
        rests = length.rests()
        expected = sum(probabilities[: carried - 1]) if carried else 0.0
        tokens, spent, rested = tokens + 1 + expected, spent + seconds[carried if carried or rests else 1], rested + rests
        if rests and not carried:
            length.record_rest(seconds[0])
        elif carried:
            length.record(carried, seconds[carried], expected, expected)
        if rests:
            carried = 0
            continue
        size = 1
        if chain:
            while size < length.sizes[-1] and length.worth(probabilities[size - 1], size - 1):
                size += 1
        carried = size if chain else length.choose(probabilities)
    return tokens / spent, rested / steps


LENGTHS = [AdaptiveDraftLength(sizes, n) for sizes, n in (((1, 2, 3, 4), 4), ((1, 2, 4, 8, 16), 4), ((1, 2, 4, 8), 2))]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(LENGTHS), st.floats(0, 0.95), st.floats(0, 0.8), st.floats(0, 1), st.floats(0, 0.1))
def test_what_is_learned_is_nearly_as_fast_as_the_best_number_of_drafts(length, likely, heads, each, more):
    """Of steps that take 1 at rest, 1 + heads with them, and each + more * drafts for another draft."""
    length = replace(length, seconds={}, recent=deque(maxlen=JUDGED_STEPS))
    seconds = {size: 1 + heads + each * (size - 1) + more * (size - 1) ** 2 for size in length.sizes} | {0: 1.0}
    decode_on_paper(length, seconds, likely, 200, chain=length.sizes[-1] == 4)
    rate, rested = decode_on_paper(length, seconds, likely, 1000, chain=length.sizes[-1] == 4)
    rates = {size: sum(likely**i for i in range(size)) / seconds[size] for size in length.sizes} | {0: 1.0}
    assert rate > 0.9 * max(rates.values())
    if rates[0] > 1.02 * max(rates[size] for size in length.sizes):
        assert rested > 0.8
    elif rates[0] < 0.9 * max(rates[size] for size in length.sizes):
        assert rested < 0.05


@pytest.mark.parametrize("chain", [True, False])
def test_heads_come_back_when_drafts_are_likely_or_steps_without_them_slower(chain):
    length, seconds = AdaptiveDraftLength((1, 2, 3, 4), 4), {0: 1.0, 1: 1.3, 2: 1.5, 3: 1.7, 4: 1.9}
    assert decode_on_paper(length, seconds, 0.2, 400, chain=chain)[1] > 0.7
    assert decode_on_paper(length, seconds, 0.9, 400, chain=chain)[1] < 0.3
    assert decode_on_paper(length, seconds, 0.2, 400, chain=chain)[1] > 0.7
    slower = {size: 2 * time if size == 0 else time for size, time in seconds.items()}
    assert decode_on_paper(length, slower, 0.2, 400, chain=chain)[1] < 0.3


def test_one_size_is_always_taken():
    length = AdaptiveDraftLength((6,))
    for _ in range(2 * FORGET_STEPS):
        assert not length.rests() and length.choose([0.0] * 5) == 6
        length.record(6, 1.0, 0.5, 0)


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
