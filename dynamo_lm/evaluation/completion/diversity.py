"""How varied text is, which belongs to every quality number: a lower temperature makes text likelier and duller.

Pure functions of token ids or strings. Shares run from 0 to 1. They depend on the length of the texts and on how many are
pooled, so they compare only arms with the same prompts, the same number of seeds and the same `max_new_tokens`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

MAUVE_TEXTS = 50  # below, its clusters (a tenth of the texts) would be fewer than five
MAUVE_SEED = 25


def distinct(tokens: Sequence[int], n: int) -> float:
    """Different n-grams over n-grams of one text (Li et al. 2016); 0 if it is shorter than n."""
    return pooled_distinct([tokens], n)


def pooled_distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams over n-grams of all texts together; 0 if there are none.

    Falls with the amount of text pooled. A bootstrap must resample whole pools (prompts): drawing texts with replacement
    would put copies into a pool.
    """
    total = sum(max(0, len(text) - n + 1) for text in texts)
    distinct_grams = {gram for text in texts for gram in _grams(text, n)}
    return len(distinct_grams) / total if total else 0.0


def repetition(tokens: Sequence[int], n: int = 4) -> float:
    """Share of a text's n-grams that occurred earlier in it; 0 if it is shorter than n."""
    return 1 - distinct(tokens, n) if len(tokens) >= n else 0.0


def self_bleu(texts: Sequence[str]) -> float | None:
    """Mean sentence BLEU of each text against the others (Zhu et al. 2018), 0 (nothing shared) to 1 (all alike).

    By sacrebleu, with its tokenizer, smoothing and effective order. None with fewer than two texts.
    """
    if len(texts) < 2:
        return None
    from sacrebleu.metrics import BLEU

    bleu = BLEU(effective_order=True)
    others = [[*texts[:index], *texts[index + 1 :]] for index in range(len(texts))]
    return mean([bleu.sentence_score(text, rest).score / 100 for text, rest in zip(texts, others, strict=True)])


def measure(texts_by_prompt: Sequence[Sequence[tuple[Sequence[int], str]]]) -> dict[str, float | None]:
    """All measures of one arm; `texts_by_prompt[p]` are its completions of prompt p as (token ids, text).

    Returns:
        distinct_1..3 and repetition, means over the texts that are long enough; pooled_distinct_2 and self_bleu, over the
        completions of a prompt, means over prompts. None where no text or prompt could be measured.
    """
    tokens = [tokens for texts in texts_by_prompt for tokens, _ in texts]
    pools = [[tokens for tokens, _ in texts] for texts in texts_by_prompt]
    return {
        "distinct_1": mean([distinct(text, 1) for text in tokens if len(text) >= 1]),
        "distinct_2": mean([distinct(text, 2) for text in tokens if len(text) >= 2]),
        "distinct_3": mean([distinct(text, 3) for text in tokens if len(text) >= 3]),
        "pooled_distinct_2": mean([pooled_distinct(pool, 2) for pool in pools if any(len(text) >= 2 for text in pool)]),
        "self_bleu": mean([self_bleu([text for _, text in texts]) for texts in texts_by_prompt]),
        "repetition": mean([repetition(text) for text in tokens if len(text) >= 4]),
    }


def mauve(candidate: np.ndarray, base: np.ndarray) -> float | None:
    """MAUVE (Pillutla et al. 2021) between two sets of texts: 0 (nothing in common) to 1 (the same distribution).

    Args:
        candidate: features of the candidate's texts, (texts, features), as `ReferenceJudge.features` makes them.
        base: features of the base model's, (texts, features).

    Returns:
        The score with a fixed seed; None with fewer than 50 texts on a side, where its histogram over clusters (a tenth as
        many as texts) is mostly noise. It falls with fewer texts, so only sets of the same size compare, and its ceiling is
        the base against a second sample of itself, not 1.
    """
    if min(len(candidate), len(base)) < MAUVE_TEXTS:
        return None
    with _quiet():  # faiss warns on file descriptor 2 that a hundred points are few
        import faiss
        from mauve import compute_mauve

        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)  # so that sums have one order
        try:
            result = compute_mauve(p_features=candidate, q_features=base, seed=MAUVE_SEED, verbose=False)
        finally:
            faiss.omp_set_num_threads(threads)
    return float(np.clip(result.mauve, 0, 1))


def _grams(tokens: Sequence[Any], n: int) -> Iterator[tuple]:
    return zip(*(tokens[start:] for start in range(n)), strict=False)


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of the values that are not None; None if there are none."""
    numbers = [value for value in values if value is not None]
    return float(np.mean(numbers)) if numbers else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing reaches the process's standard error from C++."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
