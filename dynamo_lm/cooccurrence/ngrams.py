"""N-grams as integers: pieces of text in, sorted runs of counts out; runs in, levels of a table out (method.md section 3).

Every document is followed by `order - 1` end marks. The window of `order` tokens at each position becomes one integer, its
key, and the counts of shorter n-grams are sums over the keys that share a prefix: one sort serves all orders, and windows
that reach a mark are the shorter n-grams at a document's end.

All functions are pure: pieces and ranges can be counted in any order, by any process, and again after one was lost. Knows
no files, no processes and no torch, so that a worker starts fast.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np

from dynamo_lm.errors import InputError

Grams: TypeAlias = tuple[np.ndarray, np.ndarray]  # keys, int64, increasing; counts
Runs: TypeAlias = list[Grams]  # of one partition, or a range of keys of it
Levels: TypeAlias = list[Grams]  # by order, the unigrams first
Piece: TypeAlias = list[np.ndarray]  # tokens, marks, tokens, marks ..

MAX_COUNT = 2**16  # n-grams that are counted more often are in a histogram's last entry


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of `order` tokens as integer keys that sort like the windows.

    A key has the digits of its tokens in base `vocab_size + 1`; the mark is the digit `vocab_size`. Windows are partitioned
    by their first token, which counts from the partition's first, so that 63 bits hold any key: 7 tokens a partition or
    more.
    """

    vocab_size: int
    order: int
    starts: np.ndarray  # (partitions,) int64, the first token of each, increasing from 0

    @classmethod
    def partitioned(cls, vocab_size: int, order: int, sample: Piece, partitions: int) -> "Windows":
        """About `partitions` of about the same weight by the tokens of a sample, or more where keys need them."""
        span = min(vocab_size, 2**63 // (vocab_size + 1) ** (order - 1))  # the tokens of a partition at most
        tokens = np.concatenate(sample[::2], dtype=np.int64, casting="unsafe")
        weights = np.bincount(tokens[(tokens >= 0) & (tokens < vocab_size)], minlength=vocab_size) + tokens.size / vocab_size
        mass = np.cumsum(weights)  # half of it by the sample: other texts have other tokens
        cuts = np.searchsorted(mass, np.arange(1, partitions) / partitions * mass[-1], side="right")
        starts = np.unique(np.concatenate([np.arange(0, vocab_size, span), cuts]))
        return cls(vocab_size, order, starts[starts < vocab_size])

    @property
    def base(self) -> int:
        return self.vocab_size + 1

    def count(self, piece: Piece) -> tuple[dict[int, Grams], int]:
        """By partition, the different windows of a piece with their counts, int32; and how many windows there are.

        Raises:
            InputError: a token outside the vocabulary.
        """
        stream = np.concatenate(piece, dtype=np.int64, casting="unsafe")  # uint64 beyond int64 wraps below zero
        outside = np.count_nonzero(stream.view(np.uint64) >= self.vocab_size)
        if outside != sum(marks.size for marks in piece[1::2]):
            wrong = next(token for part in piece[::2] for token in part.tolist() if not 0 <= token < self.vocab_size)
            raise InputError(
                f"Token id {wrong} is outside the vocabulary of {self.vocab_size}; count with the tokenizer of the ids."
            )
        size = stream.size - self.order + 1
        first, keys = stream[:size], np.zeros(size, np.int64)
        for i in range(1, self.order):
            keys *= self.base
            keys += stream[i : i + size]
        real = first != self.vocab_size
        if not real.all():
            first, keys = first[real], keys[real]
        if len(self.starts) == 1:
            keys += first * self.base ** (self.order - 1)
            return {0: _tally(keys)}, keys.size
        sizes = np.diff(self.starts, append=self.vocab_size)
        # (vocab_size,) the partition of each first token, in few bits: NumPy sorts those by radix
        partition_of = np.repeat(np.arange(sizes.size, dtype=np.min_scalar_type(sizes.size)), sizes)
        partitions = partition_of[first]
        keys += (first - self.starts[partitions]) * self.base ** (self.order - 1)
        keys = keys[np.argsort(partitions, kind="stable")]
        windows = np.bincount(partitions)
        filled = np.flatnonzero(windows)
        parts = np.split(keys, np.cumsum(windows[filled])[:-1])
        return {p: _tally(part) for p, part in zip(filled.tolist(), parts, strict=True)}, keys.size

    def ranges(self, runs: list[np.ndarray], size: int) -> list[list[slice]]:
        """Cut the sorted keys of a partition's runs into ranges, as one slice of each run, of about `size` keys in all.

        N-grams of two tokens or more are in one range each, with all that begin with them.
        """
        # Between two of every len(runs)-th sample are at most len(runs) samples, and one stride of each run.
        stride = max(1, size // (2 * len(runs)))
        samples = np.sort(np.concatenate([run[stride - 1 :: stride] for run in runs]))[len(runs) - 1 :: len(runs)]
        unit = self.base ** max(0, self.order - 2)
        borders = np.unique(samples // unit * unit)
        cuts = [[0, *np.searchsorted(run, borders).tolist(), run.size] for run in runs]
        spans = [[slice(*span) for span in pairwise(cut)] for cut in cuts]
        return [list(slices) for slices in zip(*spans, strict=True)]

    def levels(self, runs: Runs) -> Levels:
        """The n-grams of 1 .. `order` tokens, without marks, that begin the windows of a range; all counts int64.

        Keys are unique and increasing; their first digit counts from the partition's first token.
        """
        keys = np.concatenate([keys for keys, _ in runs])
        places = np.argsort(keys, kind="stable")  # a merge: the runs are sorted
        keys, counts = keys[places], np.concatenate([counts for _, counts in runs], dtype=np.int64)[places]
        levels: Levels = []
        for m in range(self.order, 0, -1):
            first = _firsts(keys)
            keys, counts = keys[first], np.add.reduceat(counts, first) if first.size else counts[:0]
            if m == 1:
                levels.append((keys, counts))
                break
            prefixes = keys // self.base
            real = keys - prefixes * self.base != self.vocab_size
            levels.append((keys, counts) if real.all() else (keys[real], counts[real]))
            keys = prefixes
        return levels[::-1]

    def histograms(self, partition: int, runs: Runs) -> list[np.ndarray]:
        """By order, how many n-grams of a range are counted 0, 1, 2 .. times."""
        return [np.bincount(np.minimum(counts, MAX_COUNT)) for _, counts in self.levels(runs)]

    def rows(self, partition: int, runs: Runs, *, minimum: tuple[int, ...]) -> tuple[list[int], Levels]:
        """By order, the sum of counts and the n-grams of a range that are counted `minimum` times or more.

        Their keys are those of a trie's rows, parent * vocab_size + last token. Parents are rows of the level below within
        the range, of order 2 the first tokens; keys of order 1 are tokens.
        """
        start, levels = int(self.starts[partition]), self.levels(runs)
        totals = [int(counts.sum()) for _, counts in levels]
        tokens, counts = levels[0]
        result, below = [(tokens + start, counts)], tokens
        for m in range(1, self.order):
            keys, counts = levels[m]
            if minimum[m] > 1:
                enough = counts >= minimum[m]
                keys, counts = keys[enough], counts[enough]
            prefixes = keys // self.base
            first = _firsts(prefixes)
            parents = prefixes[first] + start if m == 1 else np.searchsorted(below, prefixes[first])
            rows = keys - prefixes * self.base
            rows += np.repeat(parents * self.vocab_size, np.diff(first, append=keys.size))
            result.append((rows, counts))
            below = keys
        return totals, result


def pieces(documents: Iterable[np.ndarray], mark: int, gap: int, chunk: int) -> Iterator[Piece]:
    """Cut "every document, then `gap` marks" into pieces with about `chunk` windows of `gap + 1` tokens each.

    A piece alternates between parts of documents and marks. Every window that starts with a token is in
    one piece: where a document is cut, the part ends in the `gap` tokens that begin the next piece.
    """
    marks = np.full(gap, mark)
    piece: Piece = []
    room = chunk
    for document in documents:
        tokens = np.asarray(document)
        if tokens.ndim != 1 or (tokens.dtype.kind not in "iu" and tokens.size):
            raise InputError(f"A document must be a 1-D array of integers, not {tokens.ndim}-D of {tokens.dtype}.")
        while tokens.size > room + gap:
            yield [*piece, tokens[: room + gap]]
            tokens, piece, room = tokens[room:], [], chunk
        if tokens.size:
            piece += [tokens, marks]
            room -= tokens.size + gap
        if room <= 0:
            yield piece
            piece, room = [], chunk
    if piece:
        yield piece


def _tally(keys: np.ndarray) -> Grams:
    """Different keys and how often each occurs; sorts `keys`."""
    keys.sort()
    first = _firsts(keys)
    return keys[first], np.diff(first, append=keys.size).astype(np.int32)


def _firsts(keys: np.ndarray) -> np.ndarray:
    """Where in sorted `keys` each different one begins."""
    return np.flatnonzero(np.concatenate([np.ones(min(keys.size, 1), bool), keys[1:] != keys[:-1]]))
