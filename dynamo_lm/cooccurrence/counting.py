"""Exact n-gram counting in bounded memory: documents of token ids in, a `Cooccurrence` table out (method.md section 3).

Every document is followed by `order - 1` end marks. The window of `order` tokens at each position becomes one sortable
key, and the counts of shorter n-grams are sums over the keys that share a prefix: one sort serves all orders, and windows
that reach a mark are the shorter n-grams at a document's end.

Two rounds of independent pieces, several threads at a time (numpy sorts without Python's lock). First each chunk of the
text becomes a sorted run of (key, count) rows in a scratch folder; a row is one number, the count in the key's spare low
bits, so that sorting never moves more than the rows themselves. Then the rows of all runs are cut into ranges of keys,
and each range is read, sorted and added up, level by level.

Memory: `memory_mb` for the work, plus about 50 bytes for every n-gram that survives pruning.
Scratch space: at most 8 bytes per token, 16 where `order` tokens do not fit 57 bits; repeats within a chunk take none.
Knows no text and no tokenizers.
"""

import errno
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np
import torch

from dynamo_lm.cooccurrence.storage import MAX_ORDER, MAX_VOCAB
from dynamo_lm.cooccurrence.table import Cooccurrence, check_min_counts
from dynamo_lm.errors import InputError

CHUNK = 4_000_000  # tokens, or rows, that a thread works on at most; half of it where keys are wide

Grams: TypeAlias = tuple[np.ndarray, np.ndarray]  # keys, increasing; counts
Item = TypeVar("Item")
Result = TypeVar("Result")


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
    threads: int | None = None,
) -> Cooccurrence:
    """Count all n-grams of 1 .. `order` tokens; none crosses from one document into the next. Exact.

    documents   1-D integer arrays of token ids, one per document, of any length; read once.
    min_counts  keep n-grams (orders 2 and up) counted at least this often: a number, or {order: number} that does not
                fall with the order; an order left out takes the number of the order below.
    tokenizer   fingerprint stored in the table and compared when it is loaded; "" = unknown.
    memory_mb   working memory in MiB (see the module's docstring).
    scratch     existing folder for temporary files, removed at the end; default: the system's.
    progress    called after every chunk with the number of tokens counted so far.
    threads     pieces worked on at a time; default: torch's number of threads. The table does not depend on it.

    Raises InputError for token ids outside [0, vocab_size), for no tokens at all and for a scratch folder that is full.
    """
    if not 1 <= order <= MAX_ORDER:
        raise InputError(f"The order must be 1 to {MAX_ORDER}, not {order}.")
    if not 1 <= vocab_size <= MAX_VOCAB:
        raise InputError(f"The vocabulary size must be 1 to {MAX_VOCAB}, not {vocab_size}.")
    if memory_mb <= 0:
        raise InputError(f"Counting needs some memory: give memory_mb above 0, not {memory_mb}.")
    minimum = check_min_counts(min_counts, order)
    threads = torch.get_num_threads() if threads is None else threads
    if threads < 1:
        raise InputError(f"Counting needs 1 thread or more, not {threads}.")
    coder = _Coder(vocab_size, order)
    # One piece more than there are threads: the one whose result waits or is being stored.
    ahead = threads + 1
    chunk = max(1, min(CHUNK // (1 + coder.wide), int(memory_mb * 2**20) // (coder.bytes_per_token * ahead)))
    try:
        folder = tempfile.TemporaryDirectory(prefix="dynamo-counts-", dir=scratch)
    except OSError as error:
        raise InputError(f"Counting cannot use the scratch folder {scratch} ({error}); choose another.") from error

    with folder as name, ThreadPoolExecutor(threads) as pool:
        # 1. Sorted runs of rows.
        runs, tokens = _Runs(Path(name), coder), 0
        for rows, windows in _in_order(pool, coder.count_windows, _pieces(documents, vocab_size, order - 1, chunk), ahead):
            runs.add(rows)
            tokens += windows
            if progress is not None:
                progress(tokens)
        if tokens == 0:
            raise InputError("There is nothing to count: the documents hold no tokens.")

        # 2. Ranges of keys from all of them; every level sums over the keys that share its prefix.
        levels = [_Level(least) for least in minimum]
        for grams in _in_order(pool, lambda spans: coder.count_levels(runs.read(spans)), runs.ranges(chunk), ahead):
            for level, (keys, counts) in zip(levels, grams, strict=True):
                level.add(keys, counts)

        # 3. From n-gram keys to rows of a trie.
        dense = np.zeros(vocab_size, np.int64)
        for tokens_seen, counts in levels[0].finish():
            dense[tokens_seen] = counts
        below = np.arange(vocab_size)  # (rows of the level below,) its keys
        trie = [(torch.from_numpy(below), torch.from_numpy(dense))]
        for level in levels[1:]:
            kept = level.finish()
            parts, tallies = [keys for keys, _ in kept], [counts for _, counts in kept]
            del kept
            above = np.concatenate(parts) if level is not levels[-1] else below
            parts = list(_in_order(pool, partial(coder.trie_keys, below), parts, ahead))
            trie_keys, trie_counts = _in_order(pool, _joined, [parts, tallies], ahead)
            trie.append((trie_keys, trie_counts))
            below = above
    totals = tuple(level.total for level in levels)
    all_keys, all_counts = zip(*trie, strict=True)
    return Cooccurrence(vocab_size, all_keys, all_counts, totals, minimum, tokenizer, description)


def _in_order(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    """`map(function, items)` on the pool, with at most `ahead` results computed ahead."""
    pending: deque[Future[Result]] = deque()
    for item in items:
        if len(pending) == ahead:
            yield pending.popleft().result()
        pending.append(pool.submit(function, item))
    while pending:
        yield pending.popleft().result()


def _pieces(documents: Iterable[np.ndarray], mark: int, gap: int, chunk: int) -> Iterator[list[np.ndarray]]:
    """Cut "every document, then `gap` marks" into pieces with about `chunk` windows of `gap + 1` tokens each.

    A piece is a list that alternates between parts of documents and marks. Every window that starts with a token is in
    one piece: where a document is cut, the part ends in the `gap` tokens that begin the next piece.
    """
    marks = np.full(gap, mark)
    piece: list[np.ndarray] = []
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


def _joined(pieces: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(pieces))


def _starts(keys: np.ndarray) -> np.ndarray:
    """Where in sorted `keys` each different one begins."""
    return np.flatnonzero(np.concatenate([np.ones(min(keys.size, 1), bool), keys[1:] != keys[:-1]]))


@dataclass(frozen=True)
class _Coder:
    """Windows of tokens as keys, and keys with counts as rows; both sort like the windows.

    A digit is a token or the mark `vocab_size`, `width` bits wide. A key of all digits is an int64 where that leaves
    MIN_SPARE bits for a count. Otherwise it is a complex number, which numpy sorts by real, then imaginary part: the
    last two digits, and the count, are in the latter, exact below 2^53. A count too large for the spare bits takes
    several rows. Keys of fewer digits are int64 always.
    """

    vocab_size: int
    order: int
    MIN_SPARE = 6  # else a frequent n-gram takes too many rows

    @property
    def width(self) -> int:
        return self.vocab_size.bit_length()

    @property
    def wide(self) -> bool:
        return self.order * self.width + self.MIN_SPARE > 63

    @property
    def spare(self) -> int:
        """Bits for the count."""
        return 53 - 2 * self.width if self.wide else min(31, 63 - self.order * self.width)

    @property
    def place_bits(self) -> int:
        """Bits for a position in a piece of wide keys, beside a pair of tokens."""
        return 63 - 2 * self.width

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.complex128 if self.wide else np.int64)

    @property
    def bytes_per_token(self) -> int:
        return 104 if self.wide else 56  # measured peak of counting a piece and of adding up a range

    # ---- text to rows

    def count_windows(self, piece: list[np.ndarray]) -> tuple[np.ndarray, int]:
        """The sorted rows of a piece's windows, and how many windows start with a token."""
        stream = np.concatenate(piece, dtype=np.int64, casting="unsafe")  # uint64 beyond int64 wraps below zero
        outside = np.count_nonzero(stream.view(np.uint64) >= self.vocab_size)
        if outside != sum(marks.size for marks in piece[1::2]):
            wrong = next(token for part in piece[::2] for token in part.tolist() if not 0 <= token < self.vocab_size)
            raise InputError(
                f"Token id {wrong} is outside the vocabulary of {self.vocab_size}; count with the tokenizer of the ids."
            )
        keys, counts, windows = self._wide_windows(stream) if self.wide else self._windows(stream)
        return self._rows(keys, counts), windows

    def _windows(self, stream: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """Different keys of the windows of `stream` that start with a token, their counts, and the counts' sum."""
        keys = self._digits(stream, self.order)
        keys.sort()
        keys = keys[: np.searchsorted(keys, self.vocab_size << (self.order - 1) * self.width)]
        first = _starts(keys)
        return keys[first], np.diff(first, append=keys.size), keys.size

    def _wide_windows(self, stream: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """The same for keys that are complex. Sorting those is slow: sort integers made of the ranks of token pairs."""
        pairs = self._digits(stream, 2)
        pairs <<= self.place_bits
        pairs |= np.arange(pairs.size)
        pairs.sort()
        places = pairs & (2**self.place_bits - 1)
        pairs >>= self.place_bits
        first = _starts(pairs)
        pairs, repeats = pairs[first], np.diff(first, append=pairs.size)
        ranks = np.empty(places.size, np.int64)
        ranks[places] = np.repeat(np.arange(pairs.size), repeats)
        size = stream.size - self.order + 1
        keys = (ranks if self.order == 4 else stream)[:size] << self.place_bits
        keys |= ranks[self.order - 2 :]
        keys.sort()
        first = _starts(keys)
        real, imag = keys[first] >> self.place_bits, pairs[keys[first] & (2**self.place_bits - 1)]
        real = pairs[real] if self.order == 4 else real
        stop = np.searchsorted(real, self.vocab_size << (self.order - 3) * self.width)
        windows = int(first[stop]) if stop < first.size else keys.size

        result = np.empty(stop, np.complex128)
        result.real, result.imag = real[:stop], imag[:stop]
        return result, np.diff(first[:stop], append=windows), windows

    def _digits(self, stream: np.ndarray, digits: int) -> np.ndarray:
        """Every `digits` neighbours of `stream` in one integer."""
        size = stream.size - digits + 1
        value = stream[:size].copy()
        for i in range(1, digits):
            value <<= self.width
            value |= stream[i : i + size]
        return value

    def _rows(self, keys: np.ndarray, counts: np.ndarray) -> np.ndarray:
        limit = 2**self.spare  # a row holds a count of 1 .. limit
        full = (counts - 1) >> self.spare
        if full.any():
            keys, counts = np.repeat(keys, full + 1), np.repeat(counts, full + 1)
            last = np.cumsum(full + 1) - 1
            rest = counts[last] - full * limit
            counts[:] = limit
            counts[last] = rest
        if not self.wide:
            return (keys << self.spare) + (counts - 1)
        rows = keys.copy()
        rows.imag *= limit
        rows.imag += counts - 1
        return rows

    # ---- rows to counts

    def _unpacked(self, rows: np.ndarray) -> Grams:
        if not self.wide:
            return rows >> self.spare, (rows & (2**self.spare - 1)) + 1
        keys, low = rows.copy(), rows.imag.astype(np.int64)
        keys.imag = low >> self.spare
        return keys, (low & (2**self.spare - 1)) + 1

    def without_count(self, rows: np.ndarray) -> np.ndarray:
        """The smallest rows that have the same keys."""
        keys, _ = self._unpacked(rows)
        return self._rows(keys, np.ones(keys.size, np.int64))

    def count_levels(self, rows: np.ndarray) -> list[Grams]:
        """N-grams of 1 .. `order` tokens that begin the windows of the rows, none with a mark."""
        rows.sort(kind="stable")  # a merge: the rows are sorted runs, one after the other
        levels: list[Grams] = []
        keys, counts = self._unpacked(rows)
        for m in range(self.order, 0, -1):
            first = _starts(keys)
            keys, counts = keys[first], np.add.reduceat(counts, first) if first.size else counts[:0]
            real = self.last(keys) != self.vocab_size
            levels.append((keys, counts) if real.all() else (keys[real], counts[real]))
            if m > 1:
                keys = self.prefix(keys)
        return levels[::-1]

    # ---- counts to a trie

    def trie_keys(self, below: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Row of the level `below` that holds the prefix * vocab_size + last token; overwrites `keys` if it can."""
        prefixes = self.prefix(keys)
        first = _starts(prefixes)
        parents = np.searchsorted(below, prefixes[first]) * self.vocab_size
        rows = self.last(keys, out=None if np.iscomplexobj(keys) else keys)
        rows += np.repeat(parents, np.diff(first, append=keys.size))
        return rows

    def prefix(self, keys: np.ndarray) -> np.ndarray:
        """Keys without their last digit."""
        if not np.iscomplexobj(keys):
            return keys >> self.width
        return keys.real.astype(np.int64) << self.width | keys.imag.astype(np.int64) >> self.width

    def last(self, keys: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """The last digit of keys."""
        digits = keys.imag.astype(np.int64) if np.iscomplexobj(keys) else keys
        return np.bitwise_and(digits, 2**self.width - 1, out=out)


class _Runs:
    """Sorted runs of rows, one after the other in a scratch file."""

    def __init__(self, folder: Path, coder: _Coder) -> None:
        self.path, self.coder = folder / "rows", coder
        self.ends = [0]

    def add(self, rows: np.ndarray) -> None:
        try:
            with open(self.path, "ab") as file:
                file.write(rows.data)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise InputError(
                f"The scratch folder {self.path.parent.parent} is full; free some space or choose another."
            ) from error
        self.ends.append(self.ends[-1] + rows.size)

    def ranges(self, size: int) -> Iterator[list[tuple[int, int]]]:
        """Ranges of keys that cover all rows, as (start, stop) by run, of about `size` rows each; no key is in two."""
        rows = np.memmap(self.path, self.coder.dtype, mode="r")
        runs = [rows[start:stop] for start, stop in zip(self.ends[:-1], self.ends[1:], strict=True)]
        # Between two of every len(runs)-th sample are at most len(runs) samples, and one stride of each run.
        stride = max(1, size // (2 * len(runs)))
        samples = np.sort(np.concatenate([run[stride - 1 :: stride] for run in runs]))
        splitters = self.coder.without_count(samples[len(runs) - 1 :: len(runs)])
        cuts = [[0, *np.searchsorted(run, splitters).tolist(), run.size] for run in runs]
        for i in range(len(splitters) + 1):
            yield [(start + cut[i], start + cut[i + 1]) for start, cut in zip(self.ends[:-1], cuts, strict=True)]

    def read(self, spans: list[tuple[int, int]]) -> np.ndarray:
        size = self.coder.dtype.itemsize
        parts = [np.fromfile(self.path, self.coder.dtype, stop - start, offset=start * size) for start, stop in spans]
        return np.concatenate(parts)


@dataclass
class _Level:
    """Collects the kept n-grams of one order, which come in increasing pieces."""

    minimum: int
    total: int = 0  # before pruning
    kept: list[Grams] = field(default_factory=list)
    newest: Grams | None = None  # its last n-gram may go on in the next piece

    def add(self, keys: np.ndarray, counts: np.ndarray) -> None:
        if keys.size == 0:
            return
        self.total += int(counts.sum())
        if self.newest is not None:
            old_keys, old_counts = self.newest
            if old_keys[-1] == keys[0]:
                counts[0] += old_counts[-1]
                old_keys, old_counts = old_keys[:-1], old_counts[:-1]
            self._keep(old_keys, old_counts)
        self.newest = keys, counts

    def finish(self) -> list[Grams]:
        """The pieces, one at least."""
        self._keep(*(self.newest or (np.empty(0, np.int64), np.empty(0, np.int64))))
        kept, self.kept = self.kept, []
        return kept

    def _keep(self, keys: np.ndarray, counts: np.ndarray) -> None:
        if self.minimum > 1:
            enough = counts >= self.minimum
            keys, counts = keys[enough], counts[enough]
        self.kept.append((keys, counts))
