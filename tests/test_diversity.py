"""Diversity measures against values worked out by hand and against sacrebleu itself."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_lm.evaluation.completion.diversity import distinct, mauve, measure, pooled_distinct, repetition, self_bleu

ids = st.lists(st.integers(0, 4), max_size=12)


def test_distinct_is_different_n_grams_over_n_grams():
    text = [1, 2, 1, 2, 1]  # pairs 12 21 12 21; triples 121 212 121
    assert distinct(text, 1) == 2 / 5
    assert distinct(text, 2) == 2 / 4
    assert distinct(text, 3) == 2 / 3
    assert distinct([7], 2) == 0
    assert distinct([], 1) == 0


def test_pooled_distinct_counts_an_n_gram_of_two_texts_once_and_none_across_texts():
    assert pooled_distinct([[1, 2, 3], [1, 2, 4]], 2) == 3 / 4  # 12 23 12 24
    assert pooled_distinct([[1], [2]], 2) == 0
    assert pooled_distinct([], 2) == 0


def test_repetition_is_the_share_of_four_grams_seen_before():
    assert repetition([1, 2, 3, 4, 5]) == 0
    assert repetition([1, 1, 1, 1, 1, 1]) == pytest.approx(2 / 3)  # three times 1111
    assert repetition([1, 2, 3, 4, 9, 1, 2, 3, 4]) == pytest.approx(1 / 6)
    assert repetition([1, 1]) == 0


@given(st.lists(ids, max_size=5), st.integers(1, 4))
def test_pooled_distinct_equals_a_count_by_hand(texts, n):
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    assert pooled_distinct(texts, n) == (len(set(grams)) / len(grams) if grams else 0)


@given(ids)
def test_repetition_equals_a_walk_through_the_text(tokens):
    grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    seen = sum(gram in grams[:i] for i, gram in enumerate(grams))
    assert repetition(tokens) == pytest.approx(seen / len(grams) if grams else 0)


def test_self_bleu_is_one_for_equal_texts_and_zero_without_a_common_word():
    assert self_bleu(["the cat sat on the mat"] * 3) == pytest.approx(1)
    assert self_bleu(["a b c d e", "f g h i j"]) == 0
    assert self_bleu(["alone"]) is None
    assert self_bleu([]) is None


@settings(deadline=None)
@given(st.lists(st.lists(st.sampled_from(["a", "b", "cat,", "dog", "it's", "."]), max_size=9), min_size=2, max_size=5))
def test_self_bleu_equals_sacrebleu_on_each_text_against_the_others(words):
    from sacrebleu.metrics import BLEU

    texts = [" ".join(row) for row in words]
    bleu = BLEU(effective_order=True)
    scores = [bleu.sentence_score(text, texts[:i] + texts[i + 1 :]).score / 100 for i, text in enumerate(texts)]
    assert self_bleu(texts) == pytest.approx(np.mean(scores), abs=1e-12)


def test_measure_averages_over_texts_and_pools_within_a_prompt():
    first = [([1, 2, 1, 2], "x y x y"), ([1, 2, 3, 4], "x y z w")]  # pairs 12 21 12 | 12 23 34
    second = [([5], "v"), ([], "")]
    found = measure([first, second])
    assert found["distinct_1"] == pytest.approx((1 / 2 + 1 + 1) / 3)
    assert found["distinct_2"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["distinct_3"] == 1
    assert found["pooled_distinct_2"] == pytest.approx(4 / 6)
    assert found["repetition"] == 0
    assert found["self_bleu"] == pytest.approx(np.mean([self_bleu(["x y x y", "x y z w"]), 0]))


def test_measure_of_nothing_is_none():
    assert set(measure([[([], "")]]).values()) == {None}


def test_mauve_tells_equal_piles_from_different_ones_quietly_and_the_same_each_time(capfd):
    rng = np.random.default_rng(0)
    centre = np.eye(8, dtype=np.float32)
    one, two, far = (
        (centre[where] + 0.1 * rng.normal(size=(60, 8))).astype(np.float32)
        for where in (rng.integers(0, 4, 60), rng.integers(0, 4, 60), rng.integers(4, 8, 60))
    )
    near = mauve(one, two)
    assert near > 0.8 > 0.1 > mauve(far, two)
    assert mauve(one, two) == near
    assert capfd.readouterr() == ("", "")


def test_mauve_of_few_texts_is_none():
    assert mauve(np.ones((49, 3)), np.ones((60, 3))) is None
