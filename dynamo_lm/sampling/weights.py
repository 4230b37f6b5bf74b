"""The weight of n-grams in a draft: those of a table, and those of the text itself.

A table says what follows few tokens in all texts and lacks most n-grams; a text repeats names, phrases and whole lines that
no table has. So longer n-grams are believed as far as they were seen, and the rest is left to shorter ones, down to the
token alone. In: a table, a text and candidates. Out: candidates and their probabilities. None of these is 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dynamo_lm.cooccurrence.lookup import NEW, Lookup
from dynamo_lm.kernels import loader

SHORTEST, LONGEST = 2, 8  # tokens of the text that are looked for in it


def weigh(
    lookup: Lookup, text: np.ndarray, ids: np.ndarray, scores: np.ndarray, alpha_c: float
) -> tuple[np.ndarray, np.ndarray]:
    """Candidates x after a text and their q(x) ∝ e^score(x) * (p~(x | text) / p^(x))^alpha_c.

    p~_0(x) = p^(x). For h, the last m tokens of the text, for m = 1, 2, .. while the table has followers of h:

        p~_m(x) = w p^(h, x) / p^(h) + (1 - w s) p~_(m-1)(x),    w = n / (n + NEW d)

    h was counted n times and has d different followers in the table, with the share s of what followed it. Then the same
    for the last SHORTEST to LONGEST tokens while they stand in the text before, where n, d and the followers are those in
    the text and s is 1. This is interpolation as Witten and Bell's (1991), with NEW 0.3 in place of 1.

    Tokens that stood after the last SHORTEST tokens before are candidates, too: they take the places of the last ones, at
    most of half of them, with the least of all scores.

    Args:
        text: (t,) int64, drafts included.
        ids: (k,) int64, distinct, by falling score or nearly so.
        scores: (k,) float64.

    Returns:
        ids (k,) and q (k,), which sums to 1.
    """
    fast = loader.sampler()
    if fast is not None:
        return _compiled(fast, lookup, text, ids, scores, alpha_c)
    new = _followers(text, ids, ids.size // 2)
    if new.size:
        kept = ids.size - new.size
        ids, scores = np.append(ids[:kept], new), np.append(scores[:kept], np.full(new.size, scores.min()))
    alone = np.maximum(np.exp(lookup.unigram(ids)), lookup.rarest)
    weights = np.log(_in_text(text, ids, _in_table(lookup, text, ids, alone)) / alone)
    q = scores + alpha_c * weights
    q = np.exp(q - q.max())
    return ids, q / q.sum()


def _followers(text: np.ndarray, ids: np.ndarray, most: int) -> np.ndarray:
    """What followed the last SHORTEST tokens before and is not in `ids`, the latest first."""
    places = np.arange(SHORTEST, text.size)  # after each earlier n-gram
    for back in range(1, min(SHORTEST, text.size) + 1):
        places = places[text[places - back] == text[-back]]
    new = dict.fromkeys(token for token in text[places[::-1]].tolist() if token not in ids)
    return np.array(list(new)[:most], np.int64)


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


def _in_text(text: np.ndarray, ids: np.ndarray, p: np.ndarray) -> np.ndarray:
    """p~ after the text's own n-grams, (k,)."""
    places = np.arange(SHORTEST, text.size)  # after each earlier n-gram
    for back in range(1, min(LONGEST, text.size) + 1):
        places = places[places >= back]
        places = places[text[places - back] == text[-back]]
        if not places.size:
            break
        if back >= SHORTEST:
            followers = text[places]
            weight = places.size / (places.size + NEW * np.unique(followers).size)
            p = weight * (followers[:, None] == ids).mean(0) + (1 - weight) * p
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
