"""The weight of n-grams in a draft: those of a table, and those of the text itself.

A table says what follows few tokens in all texts and lacks most n-grams; a text repeats names, phrases and whole lines that
no table has. So longer n-grams are believed as far as they were seen, and the rest is left to shorter ones, down to the
token alone. In: a table, a text and candidates. Out: candidates and their probabilities.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dynamo_lm.cooccurrence.lookup import NEW, Lookup
from dynamo_lm.kernels import loader

SHORTEST, LONGEST = 2, 8  # tokens of the text that are looked for in it
PLACES = 256  # where they stood before, the latest ones: a text of one token alone has thousands


def weigh(
    lookup: Lookup, text: np.ndarray, ids: np.ndarray, scores: np.ndarray, alpha_c: float
) -> tuple[np.ndarray, np.ndarray]:
    """Candidates x after a text and their q(x) ∝ e^score(x) * (p~(x | text) / p^(x))^alpha_c.

    p~_0(x) = p^(x). For h, the last m tokens of the text, for m = 1, 2, .. while the table has followers of h:

        p~_m(x) = w p^(h, x) / p^(h) + (1 - w s) p~_(m-1)(x),    w = n / (n + NEW d)

    h was counted n times and has d different followers in the table, with the share s of what followed it. Then the same
    for the last SHORTEST to LONGEST tokens while they stand in the text before, where n, d and the followers are those in
    the text and s is 1. This is interpolation as Witten and Bell's (1991), with NEW 0.3 in place of 1. Of a text only the
    latest PLACES count where its last SHORTEST tokens stood.

    What followed there is a candidate, too: such tokens take the places of others with the least scores, of half of the
    candidates at most, the latest ones first. Their score is the least that is finite.

    Args:
        text: (t,) int64, drafts included.
        ids: (k,) int64, distinct.
        scores: (k,) float64.

    Returns:
        ids (k,) and q (k,), which sums to 1.
    """
    fast = loader.sampler()
    if fast is not None:
        return _compiled(fast, lookup, text, ids, scores, alpha_c)
    places = _places(text)
    ids, scores = _with_followers(text[places], ids, scores)
    alone = np.maximum(np.exp(lookup.unigram(ids)), lookup.rarest)
    weights = np.log(_in_text(text, places, ids, _in_table(lookup, text, ids, alone)) / alone)
    q = scores + alpha_c * weights
    q = np.exp(q - q.max())
    return ids, q / q.sum()


def _places(text: np.ndarray) -> np.ndarray:
    """After each of the latest places where the last SHORTEST tokens stood before, the latest first."""
    places = np.arange(SHORTEST, text.size)
    for back in range(1, min(SHORTEST, text.size) + 1):
        places = places[text[places - back] == text[-back]]
    return places[::-1][:PLACES]


def _with_followers(followers: np.ndarray, ids: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Candidates and their scores with `followers` among them."""
    there = set(ids.tolist())
    new = [token for token in dict.fromkeys(followers.tolist()) if token not in there]
    if not new:
        return ids, scores
    by_score = np.lexsort((-np.arange(ids.size), scores))  # of equal ones the last first
    free = by_score[~np.isin(ids[by_score], followers)][: min(len(new), ids.size // 2)]
    ids, scores, least = ids.copy(), scores.copy(), scores[np.isfinite(scores)].min()
    ids[free], scores[free] = new[: free.size], least
    return ids, scores


def _in_table(lookup: Lookup, text: np.ndarray, ids: np.ndarray, p: np.ndarray) -> np.ndarray:
    """p~ after the table's n-grams, (k,)."""
    for length in range(1, min(lookup.order - 1, text.size) + 1):
        row = lookup.row(text[text.size - length :].tolist())
        if row < 0:
            break
        weight, rest = lookup.shares(length + 1)[row].tolist()
        if weight == 0:
            break
        parent = float(lookup.logs[length - 1][row])
        p = weight * np.exp(lookup.log_after(row, ids, length + 1) - parent) + rest * p
    return p


def _in_text(text: np.ndarray, places: np.ndarray, ids: np.ndarray, p: np.ndarray) -> np.ndarray:
    """p~ after the text's own n-grams, (k,)."""
    for length in range(SHORTEST, LONGEST + 1):
        if length > SHORTEST:
            places = places[places >= length]
            places = places[text[places - length] == text[-length]] if places.size else places
        if not places.size:
            break
        tokens, counts = np.unique(text[places], return_counts=True)
        at = np.minimum(tokens.searchsorted(ids), tokens.size - 1)
        share = np.where(tokens[at] == ids, counts[at], 0) / places.size
        weight = places.size / (places.size + NEW * tokens.size)
        p = weight * share + (1 - weight) * p
    return p


def _compiled(
    fast: Any, lookup: Lookup, text: np.ndarray, ids: np.ndarray, scores: np.ndarray, alpha_c: float
) -> tuple[np.ndarray, np.ndarray]:
    """`weigh` by the kernels, which write over what they are given."""
    text, ids, scores = np.ascontiguousarray(text, np.int64), np.array(ids, np.int64), np.array(scores, np.float64)
    q = np.empty(ids.size)
    fast.dynamo_lm_weigh(
        lookup.pointers(lookup.order),
        lookup.order,
        lookup.rarest,
        loader.address(text),
        text.size,
        alpha_c,
        loader.address(ids),
        loader.address(scores),
        ids.size,
        loader.address(q),
    )
    return ids, q
