"""The joint J over tuples of candidate tokens: heads' product times the co-occurrence weight (method.md section 3).

In: every head's top-k candidates, and a table. Out: J for tuples of every length, as lists of its non-zero entries.
A cell of the k^m grid is its index in row-major order, so ascending cells are tuples in lexicographic order.

The grid is never built. With the mask, tuples grow token by token along the table's trie, and one pass serves all
lengths; without it, partial products that are already below the least value wanted are dropped.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dynamo_lm.cooccurrence import Cooccurrence
from dynamo_lm.errors import InputError

_offsets = WeakTensorKeyDictionary()  # a level's keys -> its child offsets; goes when the table goes
SCAN_LIMIT = 16  # children scanned per binary search saved (measured); beyond it, searching is faster


@dataclass(frozen=True)
class Heads:
    """The k candidates of each of n heads, by decreasing probability, equal ones by increasing token id."""

    ids: np.ndarray  # (n, k) int64 token ids
    probs: np.ndarray  # (n, k) float64, each row sums to 1

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
        if top_k < vocab_size:
            tied = np.flatnonzero((scores[:, top_k - 1] == scores[:, top_k]) & (scores[:, top_k] > -np.inf))
            ids, scores = ids[:, :top_k].copy(), scores[:, :top_k].copy()
            for row in tied:  # torch.topk takes any of the equal ones, we the lowest ids
                at_least = (logits[row] >= best.values[row, top_k - 1]).nonzero().flatten()
                values = logits[row, at_least].double().cpu().numpy()
                first = np.argsort(-values, kind="stable")[:top_k]
                ids[row], scores[row] = at_least.cpu().numpy()[first], values[first]
        order = np.arange(len(ids))[:, None], np.lexsort((ids, -scores))
        ids, scores = ids[order], scores[order]
        probs = np.exp((scores - scores[:, :1]) / temperature)
        return cls(ids, probs / probs.sum(-1, keepdims=True))

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
        self.heads, self.table, self.alpha_c, self.least = heads, table, alpha_c, least
        if table is None or alpha_c == 0:
            self.table = None
            self.prefixes = [np.arange(heads.ids.shape[1])]  # per length: (h,) cells
            self.scores = [heads.probs[0]]  # per length: (h,) product of probabilities
            return
        logs = table.log_p(torch.from_numpy(heads.ids).to(table.keys[0].device), 1).double().cpu().numpy()
        # (n, k) log of f_i(x) / p^(x)^alpha_c; tokens that were never counted are in no n-gram
        self.weighted = np.where(logs > -np.inf, heads.log_probs - alpha_c * np.maximum(logs, -1e30), -np.inf)
        by_id = np.argsort(heads.ids[0])  # rows that ascend are found faster
        self.prefixes = [by_id]
        self.rows = [heads.ids[0][by_id]]  # per length: (h,) rows of the table
        self.scores = [self.weighted[0][by_id]]  # per length: (h,) sum of `weighted` over the tuple

    def __getitem__(self, m: int) -> Joint:
        """J of length m; no entries if no candidate tuple was ever seen."""
        while len(self.prefixes) < m:
            self._grow()
        cells, scores = self.prefixes[m - 1], self.scores[m - 1]
        if m == 1:
            return Joint(cells, self.heads.probs[0][cells])
        if self.table is None:
            return Joint(cells, scores)
        scores = scores + self.alpha_c * _log_p(self.table, self.rows[m - 1], m)
        top = scores.max(initial=-np.inf)
        if top == -np.inf:
            return Joint(cells[:0], scores[:0])
        values = np.exp(scores - top)
        return Joint(cells, values / values.sum())

    def _grow(self) -> None:
        """Append one token to every prefix."""
        m, k = len(self.prefixes), self.heads.ids.shape[1]  # head m (from 0) gives the new token
        cells, scores = self.prefixes[-1], self.scores[-1]
        if self.table is None:
            values = np.multiply.outer(scores, self.heads.probs[m]).ravel()
            grown = (cells[:, None] * k + np.arange(k)).ravel()
            if self.least > 0:  # the factors to come are at most 1
                keep = values >= self.least
                values, grown = values[keep], grown[keep]
            self.scores.append(values)
        else:
            parent, rank, rows = seen_extensions(self.table, self.rows[-1], self.heads.ids[m], m + 1)
            grown = cells[parent] * k + rank
            self.rows.append(rows)
            self.scores.append(scores[parent] + self.weighted[m, rank])
        self.prefixes.append(grown)


def seen_extensions(
    table: Cooccurrence, rows: np.ndarray, ids: np.ndarray, order: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which of `rows` (h,) of level order - 1 were seen followed by which of the distinct tokens `ids` (k,).

    Returns three arrays (hits,), in any order: for every n-gram that is in the table the index into `rows`, the index
    into `ids` and its own row. What `table.extend(rows[:, None], ids)` would find, but most rows have few children, and
    looking at all of them is far cheaper than k binary searches.
    """
    keys = table.keys[order - 1]
    if keys.device.type != "cpu":
        return _search(table, rows, ids, order)
    sorted_keys, vocab_size = keys.numpy(), table.vocab_size
    floors = rows * vocab_size  # the smallest key of each row's children
    offsets = child_offsets(table, order)
    start = offsets.take(rows, mode="clip")  # a token the table does not know has no children
    size = offsets.take(rows + 1, mode="clip") - start
    ends = np.cumsum(size)
    if size.sum() > SCAN_LIMIT * rows.size * ids.size:
        return _search(table, rows, ids, order)

    rank_of = np.full(vocab_size, -1, np.int32)
    known = np.flatnonzero(ids < vocab_size)
    rank_of[ids[known]] = known
    row = np.repeat(start - ends + size, size)  # (children,) of the first row, then of the second, ..
    row += np.arange(row.size)
    token = sorted_keys.take(row)
    token -= np.repeat(floors, size)
    rank = rank_of.take(token)
    hit = np.flatnonzero(rank >= 0)
    return np.repeat(np.arange(rows.size), size)[hit], rank[hit].astype(np.int64), row[hit]


def child_offsets(table: Cooccurrence, order: int) -> np.ndarray:
    """(rows + 1,) int64: where the children of each row of level order - 1 start at level `order`. Kept for reuse."""
    keys = table.keys[order - 1]
    if keys not in _offsets:
        floors = np.arange(table.num_rows(order - 1) + 1) * table.vocab_size
        _offsets[keys] = np.searchsorted(keys.numpy(), floors)
    return _offsets[keys]


def _search(table: Cooccurrence, rows: np.ndarray, ids: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    device = table.keys[0].device
    grid = table.extend(torch.from_numpy(rows).to(device)[:, None], torch.from_numpy(ids).to(device), order)  # (h, k)
    parent, rank = (grid >= 0).nonzero(as_tuple=True)
    return parent.cpu().numpy(), rank.cpu().numpy(), grid[parent, rank].cpu().numpy()


def _log_p(table: Cooccurrence, rows: np.ndarray, order: int) -> np.ndarray:
    """Log frequencies of `rows` (h,) as float64 on the CPU."""
    return table.log_p(torch.from_numpy(rows).to(table.keys[0].device), order).double().cpu().numpy()
