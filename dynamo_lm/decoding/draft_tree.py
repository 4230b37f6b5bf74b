"""Drafts as a small tree: several continuations verified in one forward, where the machine does that nearly for free.

A chain of drafts ends at its first mistake; a tree that holds the next best tokens too often goes on. In: candidates of
heads 2..n and the verified token. Out: tokens with their parents, the likeliest paths first. How many of them are worth a
forward depends on what a wider forward costs, which `AdaptiveDraftLength` learns from the steps themselves. Knows no model.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dynamo_lm.cooccurrence.table import Cooccurrence
from dynamo_lm.sampling.drafting import conditional
from dynamo_lm.sampling.top_k import HeadCandidates, PairwiseCorrection

BRANCHES = 8  # children looked at after each token


@dataclass(frozen=True)
class Tree:
    """Drafted tokens; every parent comes before its children."""

    tokens: list[int]
    parents: list[int]  # index of the token before, counted with the verified token as 0
    probabilities: list[float]  # of the whole path, by the draft distribution; falling

    def first(self, count: int) -> Tree:
        """The `count` likeliest paths' ends, which are a tree again."""
        return Tree(self.tokens[:count], self.parents[:count], self.probabilities[:count])


def grow(
    heads: HeadCandidates,
    text: np.ndarray,
    table: Cooccurrence | None,
    *,
    alpha_c: float,
    temperature: float,
    pairwise: PairwiseCorrection | None,
    most: int,
) -> Tree:
    """The `most` likeliest paths after the verified tokens `text` (t,), by the distribution that drafts are drawn from.

    Args:
        heads: candidates of heads 2..n; paths have at most as many tokens.
        table, alpha_c, temperature, pairwise: as in `dynamo_lm.sampling.drafting.draft`.
    """
    tree = Tree([], [], [])
    waiting: list[tuple[float, int, int, int]] = []  # (-probability of the path, tie-break, parent, token)
    paths: list[list[int]] = [[]]

    def look_after(index: int, probability: float) -> None:
        depth = len(paths[index])
        if depth < len(heads.ids):
            so_far = np.append(text, np.array(paths[index], np.int64))
            ids, q = conditional(heads, depth, so_far, table, alpha_c, temperature, pairwise)
            for rank in np.argsort(-q, kind="stable")[:BRANCHES].tolist():
                if q[rank] > 0:
                    heapq.heappush(waiting, (-probability * q[rank], len(waiting), index, int(ids[rank])))

    look_after(0, 1.0)
    while waiting and len(tree.tokens) < most:
        negative, _, parent, token = heapq.heappop(waiting)
        tree.tokens.append(token)
        tree.parents.append(parent)
        tree.probabilities.append(-negative)
        paths.append([*paths[parent], token])
        if len(tree.tokens) < most:
            look_after(len(paths) - 1, -negative)
    return tree


def depths(parents: Sequence[int]) -> list[int]:
    """Steps from the verified token, which comes first, (1 + tokens,)."""
    result = [0]
    for parent in parents:
        result.append(result[parent] + 1)
    return result


def ancestry(parents: Sequence[int], width: int) -> np.ndarray:
    """Which token sees which: itself and those before it on its path, (width, width) bool. Padding sees itself."""
    visible = np.eye(width, dtype=bool)
    for index, parent in enumerate(parents, start=1):
        visible[index] |= visible[parent]
    return visible
