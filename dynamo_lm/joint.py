"""The joint J over tuples of candidate tokens: heads' product times the co-occurrence weight (method.md section 3).

In: every head's top-k candidates, and a table. Out: J for tuples of every length, as lists of its non-zero entries.
A cell of the k^m grid is its index in row-major order, so ascending cells are tuples in lexicographic order. With a
learned coupling (`Heads.links`) a head's factor depends on the token before it.

The grid is never built. With the mask, tuples grow token by token along the table's trie, and one pass serves all
lengths; without it, partial products that are already below the least value wanted are dropped.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dynamo_lm.cooccurrence import Cooccurrence
from dynamo_lm.errors import InputError

# What a learned coupling adds: (head 2..n, candidates of the head before it (p,), its own (k,)) -> logits (p, k) float64.
Link = Callable[[int, np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Heads:
    """The k candidates of each of n heads, by decreasing probability, equal ones by increasing token id."""

    ids: np.ndarray  # (n, k) int64 token ids
    probs: np.ndarray  # (n, k) float64, each row sums to 1
    links: tuple[np.ndarray, ...] = ()  # per head from the second: (k, k) log f_i(x | the previous head's candidate)

    def coupled(self, link: Link, temperature: float) -> "Heads":
        """These candidates, each head's conditioned on its predecessor's: f_i(x) * exp(bonus / temperature), normalised."""
        links = []
        for head in range(1, len(self.ids)):
            scores = self.log_probs[head] + link(head + 1, self.ids[head - 1], self.ids[head]) / temperature  # (k, k)
            scores -= scores.max(-1, keepdims=True)
            links.append(scores - np.log(np.exp(scores).sum(-1, keepdims=True)))
        return Heads(self.ids, self.probs, tuple(links))

    @classmethod
    def top(cls, logits: Tensor, top_k: int, temperature: float) -> "Heads":
        """Top-k of softmax(logits / temperature), logits (n, V), renormalised over the k (method.md section 6.1).

        Raises InputError for more candidates than tokens and for logits without a finite largest value.
        """
        vocab_size = logits.shape[-1]
        if top_k > vocab_size:
            raise InputError(f"top_k is {top_k}, but the vocabulary has {vocab_size} tokens; choose a smaller top_k.")
        logits = logits.detach()
        best = torch.topk(logits, min(top_k + 1, vocab_size))  # one more shows where equal values straddle the cut
        ids, scores = best.indices.cpu().numpy(), best.values.double().cpu().numpy()
        if not np.isfinite(scores[:, 0]).all():
            raise InputError("The largest logit of a head is not a finite number; check the model's output.")
        tied = scores[:, :-1] == scores[:, 1:]
        if tied.any():  # torch.topk takes any of equal ones, in any order; we the lowest ids, in their order
            for row in np.flatnonzero(tied[:, top_k - 1 :].any(-1)):
                values = logits[row].double().cpu().numpy()
                at_least = np.flatnonzero(values >= scores[row, top_k - 1])
                first = at_least[np.argsort(-values[at_least], kind="stable")[:top_k]]
                ids[row, :top_k], scores[row, :top_k] = first, values[first]
            order = np.lexsort((ids[:, :top_k], -scores[:, :top_k]))
            ids, scores = np.take_along_axis(ids, order, -1), np.take_along_axis(scores, order, -1)
        ids, scores = ids[:, :top_k], scores[:, :top_k]
        probs = np.exp((scores - scores[:, :1]) / temperature)
        return cls(ids, probs / probs.sum(-1, keepdims=True))

    def of(self, start: int, end: int) -> "Heads":
        """The heads start .. end - 1; `top` may have found those of several rows at once."""
        return Heads(self.ids[start:end], self.probs[start:end])

    @cached_property
    def log_probs(self) -> np.ndarray:
        """(n, k) float64; -inf for candidates without probability."""
        with np.errstate(divide="ignore"):
            return np.log(self.probs)


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
    """J for every length 1 .. m: `joints[m]`. Each length is computed when it is first asked for, on shared prefixes.

    The product of heads omits entries below `least` (it has k^m of them); the masked joint is always whole.
    """

    def __init__(self, heads: Heads, table: Cooccurrence | None, alpha_c: float, least: float) -> None:
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
        link = self.heads.links[m - 1] if self.heads.links else None
        if self.lookup is None:
            probs = np.exp(link[cells % k]) if link is not None else self.heads.probs[m]
            values = (scores[:, None] * probs).ravel()
            grown = (cells[:, None] * k + np.arange(k)).ravel()
            if self.least > 0:  # the factors to come are at most 1
                keep = values >= self.least
                values, grown = values[keep], grown[keep]
            self.scores.append(values)
        else:
            parent, rank, rows = self.lookup.seen(self.rows[-1], self.heads.ids[m], m + 1)
            before = cells.take(parent)
            grown = before * k + rank
            factor = self.heads.log_probs[m].take(rank) if link is None else link[before % k, rank]
            self.rows.append(rows)
            self.scores.append(scores.take(parent) + factor + self.inverse[m].take(rank))
        self.prefixes.append(grown)
