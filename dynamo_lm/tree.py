"""Drafts as a small tree: several continuations verified in one forward, where the machine does that nearly for free.

A chain of drafts ends at its first mistake; a tree that holds the next best tokens too often goes on. In: candidates of
heads 2..n and the certain token. Out: tokens with their parents, the likeliest paths first. How many of them are worth a
forward depends on what a wider forward costs, which `Pace` learns from the steps themselves. Knows no model.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dynamo_lm.cooccurrence import Cooccurrence
from dynamo_lm.joint import Heads, Link
from dynamo_lm.sampling import conditional

BRANCHES = 8  # children looked at behind each token
TRIES = 3  # steps of each size before the times are believed
REMEMBERED = 15  # latest steps of each size, whose median counts
PATIENCE, RARELY = 24, 0.75  # after so many steps with fewer kept drafts each, steps without drafts are tried, too


@dataclass(frozen=True)
class Tree:
    """Drafted tokens; every parent comes before its children."""

    tokens: list[int]
    parents: list[int]  # index of the token before, counted with the certain token as 0
    probabilities: list[float]  # of the whole path, by the draft distribution; falling

    def first(self, count: int) -> Tree:
        """The `count` likeliest paths' ends, which are a tree again."""
        return Tree(self.tokens[:count], self.parents[:count], self.probabilities[:count])


def grow(
    heads: Heads,
    first: int,
    table: Cooccurrence | None,
    *,
    alpha_c: float,
    temperature: float,
    link: Link | None,
    most: int,
) -> Tree:
    """The `most` likeliest paths behind the certain token `first`, by the distribution that drafts are drawn from.

    Args:
        heads: candidates of heads 2..n; paths have at most as many tokens.
        table, alpha_c, temperature, link: as in `dynamo_lm.sampling.draft`.
    """
    tree = Tree([], [], [])
    waiting: list[tuple[float, int, int, int]] = []  # (-probability of the path, tie-break, parent, token)
    paths: list[list[int]] = [[first]]

    def look_behind(index: int, probability: float) -> None:
        depth = len(paths[index]) - 1
        if depth < len(heads.ids):
            q = conditional(heads, depth, paths[index], table, alpha_c, temperature, link)
            for rank in np.argsort(-q, kind="stable")[:BRANCHES].tolist():
                if q[rank] > 0:
                    heapq.heappush(waiting, (-probability * q[rank], len(waiting), index, int(heads.ids[depth, rank])))

    look_behind(0, 1.0)
    while waiting and len(tree.tokens) < most:
        negative, _, parent, token = heapq.heappop(waiting)
        tree.tokens.append(token)
        tree.parents.append(parent)
        tree.probabilities.append(-negative)
        paths.append([*paths[parent], token])
        if len(tree.tokens) < most:
            look_behind(len(paths) - 1, -negative)
    return tree


@dataclass
class Pace:
    """How many drafts a step should carry: what steps of each size took, and how far draft probabilities can be trusted."""

    sizes: tuple[int, ...]  # tokens in a forward, the certain one included, ascending
    seconds: dict[int, deque[float]] = field(default_factory=dict)  # of the latest steps of each size
    steps: int = 0
    expected: float = 0.0  # tokens that the probabilities promised
    kept: int = 0  # and that were kept

    def record(self, size: int, seconds: float, expected: float, kept: int) -> None:
        """A step with `size` tokens took so long; its drafts promised `expected` kept tokens, and `kept` were."""
        self.seconds.setdefault(size, deque(maxlen=REMEMBERED)).append(seconds)
        self.steps += 1
        self.expected += expected
        self.kept += kept

    @property
    def considered(self) -> tuple[int, ...]:
        """The sizes, and no draft at all where so few were kept that this may be faster."""
        rare = self.steps >= PATIENCE and self.kept < RARELY * self.steps
        return (1, *self.sizes) if rare and len(self.sizes) > 1 else self.sizes

    def choose(self, probabilities: Sequence[float]) -> int:
        """The size with the most tokens a second for drafts of these (falling) path probabilities."""
        for size in self.considered:
            if len(self.seconds.get(size, ())) < TRIES:
                return size
        trust = self.kept / self.expected if self.expected else 1.0

        def rate(size: int) -> float:
            return (1 + trust * sum(probabilities[: size - 1])) / float(np.median(self.seconds[size]))

        return max(self.considered, key=rate)


def depths(parents: Sequence[int]) -> list[int]:
    """Steps from the certain token, which comes first, (1 + tokens,)."""
    found = [0]
    for parent in parents:
        found.append(found[parent] + 1)
    return found


def ancestry(parents: Sequence[int], width: int) -> np.ndarray:
    """Which token sees which: itself and those before it on its path, (width, width) bool. Padding sees itself."""
    seen = np.eye(width, dtype=bool)
    for index, parent in enumerate(parents, start=1):
        seen[index] |= seen[parent]
    return seen
