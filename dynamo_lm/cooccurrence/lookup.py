"""One step's look-ups in a co-occurrence table, on the CPU and in microseconds.

In: rows of the table's trie and candidate tokens. Out: the n-grams of both that are in the table, as rows, and
their log frequencies. The arrays are the table's own where it lies on the CPU, plus where each row's children begin.
`Cooccurrence.extend` and `.log_p` give the same by a binary search each, on any device; the tests compare the two.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from dynamo_lm.kernels import loader

NEW = 0.3  # of a continuation: how much each different one lowers the belief in all of them (LOG.md)
LEAST_REST = 1e-9  # what followers leave to others, however often they were counted
SCAN_LIMIT = 16  # children scanned per binary search saved (measured); beyond it, searching is faster


class Lookup:
    """A table's trie as arrays; made once per table by `Cooccurrence.lookup`."""

    def __init__(
        self, vocab_size: int, keys: Sequence[np.ndarray], logs: Sequence[np.ndarray], totals: Sequence[int]
    ) -> None:
        """keys: per level, (rows,) int64, ascending; logs: per level, log frequencies (rows,) float32; totals: n-grams
        counted, per level."""
        self.vocab_size, self.totals = vocab_size, totals
        self.keys = [np.ascontiguousarray(level) for level in keys]
        self.logs = [np.ascontiguousarray(level) for level in logs]
        self.unigrams = np.append(self.logs[0].astype(np.float64), -np.inf)  # one more for tokens the table does not know
        self._offsets: dict[int, np.ndarray] = {}
        self._tokens: dict[int, np.ndarray] = {}
        self._shares: dict[int, np.ndarray] = {}
        self._pointers: dict[int, tuple[Any, list[np.ndarray]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pointers": {}}  # a copy's arrays lie elsewhere

    @property
    def order(self) -> int:
        """The longest n-gram in the table."""
        return len(self.keys)

    def unigram(self, ids: np.ndarray) -> np.ndarray:
        """Log frequencies of single tokens, float64; -inf for those that were never counted or are unknown."""
        return self.unigrams.take(ids, mode="clip")

    def log_p(self, rows: np.ndarray, order: int) -> np.ndarray:
        """Log frequencies of rows of level `order`, (h,) -> (h,) float64. The rows must exist."""
        return self.logs[order - 1].take(rows).astype(np.float64)

    def offsets(self, order: int) -> np.ndarray:
        """(rows + 1,) int64: where the children of each row of level order - 1 start at level `order`."""
        if order not in self._offsets:
            floors = np.arange(self.keys[order - 2].size + 1) * self.vocab_size
            self._offsets[order] = np.searchsorted(self.keys[order - 1], floors)
        return self._offsets[order]

    def tokens(self, order: int) -> np.ndarray:
        """The last token of each row of level `order`, (rows,) int32."""
        if order not in self._tokens:
            self._tokens[order] = (self.keys[order - 1] % self.vocab_size).astype(np.int32)
        return self._tokens[order]

    @property
    def rarest(self) -> float:
        """The frequency that stands for tokens that were never counted: half a token's."""
        return 0.5 / max(self.totals[0], 1)

    def shares(self, order: int) -> np.ndarray:
        """How far what followed each row of level order - 1 is to be believed, (rows, 2) float32.

        Of a row that was counted n times and has d children: n / (n + NEW d), the weight of its children, and what they
        leave to shorter n-grams. A row without children leaves everything.
        """
        if order not in self._shares:
            with np.errstate(divide="ignore"):
                parents, children = (np.exp(self.logs[level].astype(np.float64)) for level in (order - 2, order - 1))
            distinct = np.diff(self.offsets(order))
            kept = np.bincount(self.keys[order - 1] // self.vocab_size, children, parents.size)
            n, some = parents * self.totals[order - 1], distinct > 0
            weight = np.divide(n, n + NEW * distinct, out=np.zeros(n.size), where=some)
            kept = np.minimum(np.divide(kept, parents, out=np.zeros(n.size), where=some), 1)
            rest = np.maximum(1 - weight * kept, LEAST_REST)
            self._shares[order] = np.stack([weight, rest], -1).astype(np.float32)
        return self._shares[order]

    def pointers(self, longest: int) -> Any:
        """Where the arrays of n-grams of 1 .. `longest` tokens lie, for the kernels: sampler.cpp's `Level`s."""
        if longest not in self._pointers:
            levels, arrays = [0, self.vocab_size, 0, loader.address(self.logs[0]), 0], self.logs
            for order in range(2, longest + 1):
                offsets, tokens, shares = self.offsets(order), self.tokens(order), self.shares(order)
                levels += [loader.address(offsets), offsets.size - 1, loader.address(tokens)]
                levels += [loader.address(self.logs[order - 1]), loader.address(shares)]
                arrays = [*arrays, offsets, tokens, shares]
            # The arrays are kept beside it, and the first entry stays: another thread may have made its own meanwhile.
            self._pointers.setdefault(longest, ((ctypes.c_int64 * len(levels))(*levels), arrays))
        return self._pointers[longest][0]

    def row(self, tokens: list[int]) -> int:
        """The row of an n-gram at the level of its length; -1 if it is not in the table."""
        row = tokens[0] if tokens[0] < self.vocab_size else -1
        for order, token in enumerate(tokens[1:], start=2):
            if row < 0 or token >= self.vocab_size:
                return -1
            keys, key = self.keys[order - 1], row * self.vocab_size + token
            position = int(keys.searchsorted(key))
            row = position if position < keys.size and keys[position] == key else -1
        return row

    def log_after(self, row: int, ids: np.ndarray, order: int) -> np.ndarray:
        """Log frequencies of the n-grams `row` (of level order - 1) followed by each of `ids`, (k,) float64; -inf unseen."""
        offsets = self.offsets(order)
        start, end = offsets[row], offsets[row + 1]
        if start == end:
            return np.full(ids.size, -np.inf)
        children = self.keys[order - 1][start:end]
        keys = ids + row * self.vocab_size  # of a token beyond the vocabulary: above the last child's
        positions = children.searchsorted(keys)
        positions[positions == children.size] = 0
        logs = self.logs[order - 1][start:end].take(positions).astype(np.float64)
        logs[children.take(positions) != keys] = -np.inf
        return logs

    def children(self, rows: np.ndarray, ids: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The table's n-grams that are one of `rows` (h,), of level order - 1, and one of the distinct tokens `ids` (k,).

        Returns three arrays (hits,), in any order: for each n-gram the index into `rows`, the index into `ids` and its own
        row. The same as `Cooccurrence.extend(rows[:, None], ids)`, but most rows have few children,
        and scanning all of them is far cheaper than k binary searches.
        """
        fast = loader.sampler()
        return self._scan(rows, ids, order) if fast is None else self._compiled(fast, rows, ids, order)

    def _compiled(
        self, fast: Any, rows: np.ndarray, ids: np.ndarray, order: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`children` by the kernels."""
        offsets, tokens = self.offsets(order), self.tokens(order)
        rows, ids = np.ascontiguousarray(rows, np.int64), np.ascontiguousarray(ids, np.int64)
        room = rows.size * ids.size + 1
        output = np.empty(3 * room, np.int64)  # most of it is never touched
        at = loader.address(output)
        hits = fast.dynamo_lm_children(
            loader.address(offsets),
            offsets.size - 1,
            loader.address(tokens),
            self.vocab_size,
            loader.address(rows),
            rows.size,
            loader.address(ids),
            ids.size,
            at,
            at + 8 * room,
            at + 16 * room,
        )
        return output[:hits], output[room : room + hits], output[2 * room : 2 * room + hits]

    def _scan(self, rows: np.ndarray, ids: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`children` by a scan of every child, or by `_search` where there are too many."""
        offsets = self.offsets(order)
        start = offsets.take(rows, mode="clip")  # a token the table does not know has no children
        size = offsets.take(rows + 1, mode="clip") - start
        children = int(size.sum())
        if children > SCAN_LIMIT * rows.size * ids.size:
            return self._search(rows, ids, order)
        rank_of = np.full(self.vocab_size, -1, np.int32)
        valid = np.flatnonzero(ids < self.vocab_size)
        rank_of[ids[valid]] = valid
        ends = np.cumsum(size)
        row = np.repeat(start - ends + size, size)  # (children,) of the first row, then of the second, ..
        row += np.arange(children)
        rank = rank_of.take(self.tokens(order).take(row))
        hit = np.flatnonzero(rank >= 0)
        return np.searchsorted(ends, hit, side="right"), rank.take(hit).astype(np.int64), row.take(hit)

    def _search(self, rows: np.ndarray, ids: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`children` by one binary search per pair."""
        keys = self.keys[order - 1]
        children = rows[:, None] * self.vocab_size + ids
        positions = np.minimum(keys.searchsorted(children), max(keys.size - 1, 0))
        hit = (keys.take(positions) == children) & (ids < self.vocab_size)
        parent, rank = hit.nonzero()
        return parent, rank, positions[parent, rank]
