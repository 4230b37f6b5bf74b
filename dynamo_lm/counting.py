"""Exact n-gram counting in bounded memory: documents of token ids in, a `Cooccurrence` table out (method.md section 3).

Every document is followed by `order - 1` end marks in one endless stream. The window of `order` tokens at each position
becomes one sortable key, and the counts of shorter n-grams are sums over the keys that share a prefix: one sort serves
all orders, and windows that reach a mark are the shorter n-grams at a document's end. Each chunk's sorted unique keys
are spilled to a scratch folder; a streaming merge by key ranges adds the runs up and prunes as it goes.

Memory: `memory_mb` for the work, plus about 50 bytes for every n-gram that survives pruning.
Scratch space: at most 12 bytes per token, 20 where (vocab_size + 1) ** order exceeds 63 bits; repeats within a chunk
take none. It knows nothing of text or tokenizers.
"""

import errno
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch

from dynamo_lm.cooccurrence import MAX_ORDER, MAX_VOCAB, Cooccurrence, check_min_counts
from dynamo_lm.errors import InputError

Run: TypeAlias = tuple[np.ndarray, np.ndarray]  # keys, increasing; counts


def count(
    documents: Iterable[np.ndarray],
    *,
    vocab_size: int,
    order: int = 3,
    min_counts: dict[int, int] | int = 1,
    tokenizer: str = "",
    description: str = "",
    memory_mb: float = 1024,
    scratch: str | Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> Cooccurrence:
    """Count all n-grams of 1 .. `order` tokens; none crosses from one document into the next. Exact.

    documents   1-D integer arrays of token ids, one per document, of any length; read once.
    min_counts  keep n-grams (orders 2 and up) counted at least this often: a number, or {order: number} that does not
                fall with the order; an order left out takes the number of the order below.
    tokenizer   fingerprint stored in the table and compared when it is loaded; "" = unknown.
    memory_mb   working memory in MiB (see the module's docstring).
    scratch     existing folder for temporary files, removed at the end; default: the system's.
    progress    called after every chunk with the number of tokens counted so far.

    Raises InputError for token ids outside [0, vocab_size), for no tokens at all and for a scratch folder that is full.
    """
    if not 1 <= order <= MAX_ORDER:
        raise InputError(f"The order must be 1 to {MAX_ORDER}, not {order}.")
    if not 1 <= vocab_size <= MAX_VOCAB:
        raise InputError(f"The vocabulary size must be 1 to {MAX_VOCAB}, not {vocab_size}.")
    if memory_mb <= 0:
        raise InputError(f"Counting needs some memory: give memory_mb above 0, not {memory_mb}.")
    minimum = check_min_counts(min_counts, order)
    coder = _Coder(vocab_size, order)
    budget = min(int(memory_mb * 2**20) // coder.bytes_per_token, 2**30)  # tokens, or rows of runs, held at a time
    try:
        folder = tempfile.TemporaryDirectory(prefix="dynamo-counts-", dir=scratch)
    except OSError as error:
        raise InputError(f"Counting cannot use the scratch folder {scratch} ({error}); choose another.") from error

    with folder as name:
        # 1. Sorted runs of full-length keys.
        runs, carry, tokens = _Runs(Path(name), coder.dtype), np.empty(0, np.int64), 0
        for piece in _stream(documents, vocab_size, gap=order - 1, chunk=max(budget, 1)):
            stream = np.concatenate([carry, piece])
            keys = coder.windows(stream)
            carry = stream[max(0, stream.size - order + 1) :]  # its windows need the next piece
            tokens += keys.size
            runs.add(*_aggregate(np.sort(keys)))
            if progress is not None:
                progress(tokens)
        if tokens == 0:
            raise InputError("There is nothing to count: the documents hold no tokens.")

        # 2. Merge them; every level sums over the keys that share its prefix.
        levels = [_Level(coder, m, minimum[m - 1]) for m in range(1, order + 1)]
        for keys, counts in runs.merged(budget):
            for level in levels:
                level.add(keys, counts)

    # 3. From n-gram keys to rows of a trie.
    all_keys, all_counts, totals, below = [], [], [], np.arange(vocab_size)
    for level in levels:
        grams, counts = level.finish()
        last = coder.last(grams, level.order)
        if level.order == 1:
            dense = np.zeros(vocab_size, np.int64)
            dense[last] = counts
            keys, counts = below, dense
        else:
            keys = np.searchsorted(below, coder.prefix(grams, level.order, level.order - 1)) * vocab_size + last
            below = grams
        all_keys.append(torch.from_numpy(keys))
        all_counts.append(torch.from_numpy(counts))
        totals.append(level.total)
    trie = tuple(all_keys), tuple(all_counts)
    return Cooccurrence(vocab_size, *trie, tuple(totals), minimum, tokenizer, description)


def _stream(documents: Iterable[np.ndarray], end: int, *, gap: int, chunk: int) -> Iterator[np.ndarray]:
    """Cut "every document, then `gap` end marks" into int64 pieces of at most about two chunks; `end` is the mark."""
    parts: list[np.ndarray] = []
    gaps: list[int] = []
    size = 0
    for document in documents:
        tokens = np.asarray(document)
        if tokens.ndim != 1 or (tokens.dtype.kind not in "iu" and tokens.size):
            raise InputError(f"A document must be a 1-D array of integers, not {tokens.ndim}-D of {tokens.dtype}.")
        for start in range(0, tokens.size, chunk):
            parts.append(tokens[start : start + chunk])
            gaps.append(gap if start + chunk >= tokens.size else 0)
            size += parts[-1].size + gap
            if size >= chunk:
                yield _lay_out(parts, gaps, end)
                parts, gaps, size = [], [], 0
    if parts:
        yield _lay_out(parts, gaps, end)


def _lay_out(parts: list[np.ndarray], gaps: list[int], end: int) -> np.ndarray:
    flat = np.concatenate(parts, dtype=np.int64, casting="unsafe")  # uint64 beyond int64 wraps below zero
    if flat.min() < 0 or flat.max() >= end:
        wrong = flat[(flat < 0) | (flat >= end)][0]
        raise InputError(f"Token id {wrong} is outside the vocabulary of {end}; count with the tokenizer of the ids.")
    before = np.cumsum(gaps) - gaps  # (parts,) marks to the left of each part
    stream = np.full(flat.size + sum(gaps), end, np.int64)
    stream[np.arange(flat.size) + np.repeat(before, [part.size for part in parts])] = flat
    return stream


def _aggregate(keys: np.ndarray, counts: np.ndarray | None = None) -> Run:
    """Sorted keys with repeats -> distinct keys and the sum of their counts (1 each by default)."""
    first = np.flatnonzero(np.concatenate([np.ones(min(keys.size, 1), bool), keys[1:] != keys[:-1]]))
    if counts is None:
        return keys[first], np.diff(first, append=keys.size)
    return keys[first], np.add.reduceat(counts, first) if first.size else counts[:0]


@dataclass(frozen=True)
class _Coder:
    """Windows of tokens as keys that sort like the windows. The mark `vocab_size` is one more digit.

    A key is an integer in base vocab_size + 1 where that fits 63 bits, as it always does below order 4. Otherwise it is
    a complex number, which numpy sorts by real, then imaginary part: two digits in each, exact as both are below 2^53.
    """

    vocab_size: int
    order: int

    @property
    def base(self) -> int:
        return self.vocab_size + 1

    @property
    def wide(self) -> bool:
        return self.base**self.order >= 2**63

    @property
    def dtype(self) -> type[np.generic]:
        return np.complex128 if self.wide else np.int64

    @property
    def bytes_per_token(self) -> int:
        return 224 if self.wide else 144  # measured peak of counting a chunk and of merging a round

    def windows(self, stream: np.ndarray) -> np.ndarray:
        """The keys of all full windows of `stream` that start with a token."""
        starts = np.flatnonzero(stream[: max(0, stream.size - self.order + 1)] != self.vocab_size)
        if not self.wide:
            return self._digits(stream, starts, 0, self.order)
        keys = np.empty(starts.size, np.complex128)
        keys.real = self._digits(stream, starts, 0, self.order - 2)
        keys.imag = self._digits(stream, starts, self.order - 2, self.order)
        return keys

    def _digits(self, stream: np.ndarray, starts: np.ndarray, first: int, stop: int) -> np.ndarray:
        value = stream[first:][starts]
        for i in range(first + 1, stop):
            value *= self.base
            value += stream[i:][starts]
        return value

    def prefix(self, keys: np.ndarray, order: int, m: int) -> np.ndarray:
        """Keys of the first `m` digits of keys of `order` digits."""
        if m == order:
            return keys
        if not np.iscomplexobj(keys):
            return keys // self.base ** (order - m)
        first_two = keys.real.astype(np.int64)
        if m == 3:
            return first_two * self.base + keys.imag.astype(np.int64) // self.base
        return first_two // self.base ** (2 - m)

    def last(self, keys: np.ndarray, order: int) -> np.ndarray:
        """The last digit of keys of `order` digits."""
        return (keys.imag.astype(np.int64) if np.iscomplexobj(keys) else keys) % self.base


class _Runs:
    """Sorted runs of (key, count), one behind the other in two scratch files."""

    def __init__(self, folder: Path, dtype: type[np.generic]) -> None:
        self.keys, self.counts = folder / "keys", folder / "counts"
        self.dtype = np.dtype(dtype)
        self.ends = [0]  # rows

    def add(self, keys: np.ndarray, counts: np.ndarray) -> None:
        try:
            for path, array in ((self.keys, keys), (self.counts, counts.astype(np.uint32))):
                with open(path, "ab") as file:
                    file.write(array.data)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            folder = self.keys.parent.parent
            raise InputError(f"The scratch folder {folder} is full; free some space or choose another.") from error
        self.ends.append(self.ends[-1] + keys.size)

    def _read(self, start: int, rows: int) -> Run:
        keys = np.fromfile(self.keys, self.dtype, rows, offset=start * self.dtype.itemsize)
        return keys, np.fromfile(self.counts, np.uint32, rows, offset=start * 4).astype(np.int64)

    def merged(self, rows: int) -> Iterator[Run]:
        """All runs added up, in order, in pieces; about `rows` rows are in memory at a time. No key is split."""
        starts, ends = self.ends[:-1], self.ends[1:]
        block = max(1, rows // max(1, len(starts)))
        buffers = [self._read(0, 0)] * len(starts)
        while True:
            for i, end in enumerate(ends):  # refill what ran low
                missing = min(block - buffers[i][0].size, end - starts[i])
                if missing > 0 and 2 * buffers[i][0].size <= block:
                    more = self._read(starts[i], missing)
                    buffers[i] = (np.concatenate([buffers[i][0], more[0]]), np.concatenate([buffers[i][1], more[1]]))
                    starts[i] += missing
            # Every run is complete up to the smallest last key among the runs that have more on disk.
            open_ends = [b[0][-1] for b, start, end in zip(buffers, starts, ends, strict=True) if start < end]
            limit = np.sort(np.array(open_ends, self.dtype))[:1]
            cuts = [int(np.searchsorted(b[0], limit, "right")[0]) if limit.size else b[0].size for b in buffers]
            keys = np.concatenate([b[0][:cut] for b, cut in zip(buffers, cuts, strict=True)])
            counts = np.concatenate([b[1][:cut] for b, cut in zip(buffers, cuts, strict=True)])
            buffers = [(b[0][cut:], b[1][cut:]) for b, cut in zip(buffers, cuts, strict=True)]
            by_key = np.argsort(keys, kind="stable")  # a merge: the runs are sorted already
            yield _aggregate(keys[by_key], counts[by_key])
            if not limit.size:
                return


@dataclass
class _Level:
    """Collects the kept n-grams of one order from a sorted stream of full-length keys."""

    coder: _Coder
    order: int
    minimum: int
    total: int = 0  # before pruning
    kept: list[Run] = field(default_factory=list)
    last: Run | None = None  # the newest n-gram: later keys may still add to it

    def add(self, keys: np.ndarray, counts: np.ndarray) -> None:
        grams = self.coder.prefix(keys, self.coder.order, self.order)
        real = self.coder.last(grams, self.order) != self.coder.vocab_size  # no end mark within
        grams, counts = grams[real], counts[real]
        self.total += int(counts.sum())
        if self.last is not None:
            grams, counts = np.concatenate([self.last[0], grams]), np.concatenate([self.last[1], counts])
        grams, counts = _aggregate(grams, counts)
        self.last = grams[-1:], counts[-1:]
        self._keep(grams[:-1], counts[:-1])

    def finish(self) -> Run:
        if self.last is not None:
            self._keep(*self.last)
        runs, self.kept = self.kept, []
        return np.concatenate([run[0] for run in runs]), np.concatenate([run[1] for run in runs])

    def _keep(self, grams: np.ndarray, counts: np.ndarray) -> None:
        enough = counts >= self.minimum
        self.kept.append((grams[enough], counts[enough]))
