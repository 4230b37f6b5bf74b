"""The joint J over tuples of candidate tokens: heads' product times the co-occurrence weight (method.md section 3).

In: every head's top-k candidates, and a table. Out: J for tuples of every length, as lists of its non-zero entries.
A cell of the k^m grid is its index in row-major order, so ascending cells are tuples in lexicographic order. With a
learned coupling (`Heads.conditionals`) a head's factor depends on the token before it.

The grid is never built. With the mask, tuples grow token by token along the table's trie, and one pass serves all
lengths; without it, partial products that are already below the least value wanted are dropped.
"""

from dataclasses import dataclass

import numpy as np

from dynamo_lm.cooccurrence.table import Cooccurrence
from dynamo_lm.sampling.top_k import HeadCandidates


@dataclass(frozen=True)
class Joint:
    """J of one length m, normalised to sum 1 over the k^m grid: entries above 0 (and perhaps some of 0), any order."""

    cells: np.ndarray  # (h,) int64, distinct
    values: np.ndarray  # (h,) float64

    def at_least(self, threshold: float) -> "Joint":
        """The non-zero entries of `threshold` or more, by ascending cell."""
        keep = np.flatnonzero((self.values >= threshold) & (self.values > 0))
        keep = keep[np.argsort(self.cells[keep])]
        return Joint(self.cells[keep], self.values[keep])


class Joints:
    """J for every length 1 .. m: `joints[m]`. Each length is computed at its first use, on shared prefixes.

    The product of heads omits entries below `least` (it has k^m of them); the masked joint is always whole.
    """

    def __init__(self, heads: HeadCandidates, table: Cooccurrence | None, alpha_c: float, least: float) -> None:
        self.heads, self.alpha_c, self.least = heads, alpha_c, least
        self.lookup = table.lookup if table is not None and alpha_c > 0 else None
        if self.lookup is None:
            self.prefixes = [np.arange(heads.ids.shape[1])]  # per length: (h,) cells
            self.scores = [heads.probs[0]]  # per length: (h,) product of probabilities
            return
        logs = self.lookup.unigram(heads.ids)
        # (n, k) log of 1 / p^(x)^alpha_c; tokens that were never counted are in no n-gram
        self.inverse = np.where(logs > -np.inf, -alpha_c * np.maximum(logs, -1e30), -np.inf)
        by_id = np.argsort(heads.ids[0])  # rows that ascend are found faster
        self.prefixes = [by_id]
        self.rows = [heads.ids[0][by_id]]  # per length: (h,) rows of the table
        self.scores = [(heads.log_probs[0] + self.inverse[0])[by_id]]  # per length: (h,) log of f_i / p^^alpha_c, summed

    def __getitem__(self, m: int) -> Joint:
        """J of length m; no entries if no candidate tuple was ever seen."""
        while len(self.prefixes) < m:
            self._grow()
        cells, scores = self.prefixes[m - 1], self.scores[m - 1]
        if m == 1:
            return Joint(cells, self.heads.probs[0][cells])
        if self.lookup is None:
            return Joint(cells, scores)
        scores = scores + self.alpha_c * self.lookup.log_p(self.rows[m - 1], m)
        top = scores.max(initial=-np.inf)
        if top == -np.inf:
            return Joint(cells[:0], scores[:0])
        values = np.exp(scores - top)
        return Joint(cells, values / values.sum())

    def _grow(self) -> None:
        """Append one token to every prefix."""
        m, k = len(self.prefixes), self.heads.ids.shape[1]  # head m (from 0) gives the new token
        cells, scores = self.prefixes[-1], self.scores[-1]
        pairwise = self.heads.conditionals[m - 1] if self.heads.conditionals else None
        if self.lookup is None:
            probs = np.exp(pairwise[cells % k]) if pairwise is not None else self.heads.probs[m]
            values = (scores[:, None] * probs).ravel()
            grown = (cells[:, None] * k + np.arange(k)).ravel()
            if self.least > 0:  # the factors to come are at most 1
                keep = values >= self.least
                values, grown = values[keep], grown[keep]
            self.scores.append(values)
        else:
            parent, rank, rows = self.lookup.children(self.rows[-1], self.heads.ids[m], m + 1)
            before = cells.take(parent)
            grown = before * k + rank
            factor = self.heads.log_probs[m].take(rank) if pairwise is None else pairwise[before % k, rank]
            self.rows.append(rows)
            self.scores.append(scores.take(parent) + factor + self.inverse[m].take(rank))
        self.prefixes.append(grown)
