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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynamo_lm import kernels
from dynamo_lm.cooccurrence import Cooccurrence
from dynamo_lm.errors import InputError

# What a learned coupling adds: (head 2..n, candidates of the head before it (p,), its own (k,)) -> logits (p, k) float64.
Link = Callable[[int, np.ndarray, np.ndarray], np.ndarray]
HOSTS = ("cpu", "mps")  # devices whose memory is the host's


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
        ids, scores = highest(logits.detach(), top_k)
        return cls.ranked(ids.cpu().numpy(), scores.cpu().double().numpy(), temperature)

    @classmethod
    def ranked(cls, ids: np.ndarray, scores: np.ndarray, temperature: float) -> "Heads":
        """`top` of the candidates and their logits, (n, k) each, as `highest` orders them."""
        if not np.isfinite(scores[:, 0]).all():
            raise InputError("The largest logit of a head is not a finite number; check the model's output.")
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


def highest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Ids and values of the largest logits, (..., V) -> (..., count): falling, equal ones by increasing id.

    torch.topk takes any of equal ones, in any order, which the host puts right where it matters. A device that it would have
    to wait for sorts whole numbers instead, no two alike: a logit's bits as an integer, turned round where it is negative,
    rise with it, and the id stands behind them. So logits that differ behind their first 32 bits are equal there.
    """
    if logits.device.type in HOSTS:
        logits = logits.cpu().contiguous()
        fast = kernels.sampler_of(logits)
        return (_compiled(fast, logits, count) if fast is not None else None) or _put_right(logits, count)
    vocab_size = logits.shape[-1]
    numbers = logits.float().nan_to_num(torch.inf, torch.inf, -torch.inf) + 0.0  # -0 and 0 are equal
    bits = numbers.view(torch.int32)
    ranks = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    places = torch.arange(vocab_size - 1, -1, -1, device=logits.device)
    ids = vocab_size - 1 - ((ranks * 2**32 + places).topk(count).values & 0xFFFFFFFF)
    return ids, logits.gather(-1, ids)


def _compiled(fast: Any, logits: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """`highest` of float32 on the CPU by the kernels; None where a value is not a number."""
    shape, size = (*logits.shape[:-1], count), logits.shape[-1]
    ids, scores = torch.empty(shape, dtype=torch.long), torch.empty(shape, dtype=torch.float64)
    lines = logits.numel() // size
    strange = fast.dynamo_lm_highest(logits.data_ptr(), lines, size, count, ids.data_ptr(), scores.data_ptr())
    return None if strange else (ids, scores)


def _put_right(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`highest` of logits on the CPU; the values as float64."""
    best = torch.topk(logits, min(count + 1, logits.shape[-1]))  # one more shows where equal values straddle the cut
    ids, scores = best.indices.numpy(), best.values.double().numpy()
    tied = scores[..., :-1] == scores[..., 1:]
    if tied.any():
        tied &= np.isfinite(scores[..., :1])
        for line in zip(*np.nonzero(tied[..., count - 1 :].any(-1)), strict=True):
            last = scores[line][count - 1]
            places = np.flatnonzero(scores[line][:count] == last)
            ids[line][places] = (logits[line] == last).nonzero()[: len(places), 0].numpy()
        # Behind each other in memory: how many different values are larger, and the id. Equal values stay where they are.
        runs = np.zeros((*scores.shape[:-1], count), np.int64)
        np.cumsum(~tied[..., : count - 1], axis=-1, out=runs[..., 1:])
        keys = (runs << 32) | ids[..., :count]
        keys.sort(-1)
        ids[..., :count] = keys & 0xFFFFFFFF
    return best.indices.narrow(-1, 0, count), torch.from_numpy(scores).narrow(-1, 0, count)


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
