"""Exact n-gram counting in bounded memory: documents of token ids in, a `Cooccurrence` table out (method.md section 3).

Two rounds of independent work, which an engine carries out: each piece of the text becomes a sorted run of (key, count)
rows for every partition of the keys (`ngrams`), then the rows of all runs are cut into ranges of keys, and each range is
sorted and added up, level by level. This module has the engine of one process, whose threads sort without Python's lock
and keep the runs in a scratch folder; `ray_engine` has that of a cluster. A table does not depend on its engine.

Memory: `memory_mb` for the work, plus about 30 bytes for every n-gram that survives pruning.
Scratch space: at most 12 bytes per token; repeats within a piece take none.
Knows no text and no tokenizers.
"""

import errno
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from dynamo_lm.cooccurrence.ngrams import Grams, Levels, Piece, Runs, Windows, pieces
from dynamo_lm.cooccurrence.storage import MAX_ORDER, MAX_VOCAB, minimum_for_size
from dynamo_lm.cooccurrence.table import Cooccurrence, check_min_counts
from dynamo_lm.errors import InputError

PIECE = 4_000_000  # tokens, or rows, that are worked on at once at most
BYTES = 72  # of memory for each of them: measured peak of counting a piece and of adding up a range

Item = TypeVar("Item")
Result = TypeVar("Result")


class Engine(AbstractContextManager["Engine"], Protocol):
    """Carries out the two rounds; a context, which takes what it needs and gives it back."""

    partitions: int  # that it wants to work on independently
    at_once: int  # pieces that share `memory_mb`

    def count(self, windows: Windows, texts: Iterable[Piece], size: int) -> Iterator[int]:
        """`windows.count` of every piece, whose runs it keeps; yields the numbers of windows. `size` as of a range."""

    def ranges(self, function: Callable[[Windows, int, Runs], Result]) -> Iterator[Result]:
        """function(windows, partition, runs) of ranges that cover all rows, in increasing order; may be called again."""


def count(
    documents: Iterable[np.ndarray],
    *,
    vocab_size: int,
    order: int = 3,
    min_counts: dict[int, int] | int = 1,
    max_bytes: float | None = None,
    tokenizer: str = "",
    description: str = "",
    memory_mb: float = 1024,
    scratch: str | Path | None = None,
    progress: Callable[[int], None] | None = None,
    threads: int | None = None,
    engine: Engine | None = None,
) -> Cooccurrence:
    """Count all n-grams of 1 .. `order` tokens; none crosses from one document into the next. Exact.

    documents   1-D integer arrays of token ids, one per document, of any length; read once.
    min_counts  keep n-grams (orders 2 and up) counted at least this often: a number, or {order: number} that does not
                fall with the order; an order left out takes the number of the order below.
    max_bytes   raise the minimum counts of all orders to the least number with which the table's file is no larger.
    tokenizer   fingerprint stored in the table and compared when it is loaded; "" = unknown.
    memory_mb   working memory in MiB (see the module's docstring), of each worker where the engine has processes.
    scratch     existing folder for temporary files, removed at the end; default: the system's.
    progress    called after every piece with the number of tokens counted so far.
    threads     pieces worked on at a time; default: torch's number of threads. The table does not depend on it.
    engine      who does the work; default: the threads of this process.

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
    engine = engine or ThreadEngine(threads, scratch)
    size = max(1, min(PIECE, int(memory_mb * 2**20) // (BYTES * engine.at_once)))

    with engine:
        # 1. Sorted runs of rows.
        texts = pieces(documents, vocab_size, order - 1, size)
        first = next(texts, None)
        if first is None:
            raise InputError("There is nothing to count: the documents hold no tokens.")
        windows = Windows.partitioned(vocab_size, order, first, engine.partitions)
        tokens = 0
        for counted in engine.count(windows, chain([first], texts), size):
            tokens += counted
            if progress is not None:
                progress(tokens)

        # 2. Ranges of keys from all of them, first for how often n-grams of each order are how frequent.
        if max_bytes is not None:
            minimum = minimum_for_size(vocab_size, _added(engine.ranges(Windows.histograms), order), minimum, max_bytes)
        keys, counts, totals = _joined(windows, engine.ranges(partial(Windows.rows, minimum=minimum)))
    return Cooccurrence(vocab_size, keys, counts, totals, minimum, tokenizer, description)


def _added(parts: Iterable[list[np.ndarray]], order: int) -> list[np.ndarray]:
    """The sums of histograms."""
    result = [np.zeros(0, np.int64)] * order
    for histograms in parts:
        for m, histogram in enumerate(histograms):
            long, short = sorted((histogram, result[m]), key=len, reverse=True)
            long[: short.size] += short
            result[m] = long
    return result


def _joined(
    windows: Windows, parts: Iterable[tuple[list[int], Levels]]
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...], tuple[int, ...]]:
    """Keys and counts by level and totals, of the rows of all ranges in order."""
    order, vocab_size = windows.order, windows.vocab_size
    unigrams = np.zeros(vocab_size, np.int64)  # a token may begin the n-grams of several ranges
    keys, counts = ([[np.empty(0, np.int64)] for _ in range(order)] for _ in range(2))
    totals, rows = [0] * order, [0] * order
    for part_totals, levels in parts:
        unigrams[levels[0][0]] += levels[0][1]
        totals = [sum(pair) for pair in zip(totals, part_totals, strict=True)]
        for m in range(order - 1, 0, -1):
            part_keys, part_counts = levels[m]
            if m > 1:
                part_keys += rows[m - 1] * vocab_size  # of the level below, in the ranges before
            rows[m] += part_keys.size
            keys[m].append(part_keys)
            counts[m].append(part_counts)
    keys[0], counts[0] = [np.arange(vocab_size)], [unigrams]
    all_keys, all_counts = (tuple(_concatenated(part) for part in levels) for levels in (keys, counts))
    return all_keys, all_counts, tuple(totals)


def _concatenated(parts: list[np.ndarray]) -> torch.Tensor:
    """The parts as one tensor; empties the list, so that no level is in memory twice for long."""
    result = np.concatenate(parts)
    parts.clear()
    return torch.from_numpy(result)


class ThreadEngine:
    """The threads of one process, with the runs in a scratch folder."""

    partitions = 1

    def __init__(self, threads: int, scratch: str | Path | None = None) -> None:
        self.threads, self.scratch = threads, scratch
        self.at_once = threads + 1  # one more than there are threads: whose result waits or is being stored

    def __enter__(self) -> "ThreadEngine":
        with ExitStack() as stack:
            try:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="dynamo-counts-", dir=self.scratch))
            except OSError as error:
                raise InputError(
                    f"Counting cannot use the scratch folder {self.scratch} ({error}); choose another."
                ) from error
            self._runs = _Runs(Path(folder))
            self._pool = stack.enter_context(ThreadPoolExecutor(self.threads))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def count(self, windows: Windows, texts: Iterable[Piece], size: int) -> Iterator[int]:
        self._windows, self._size = windows, size
        for runs, counted in self._in_order(windows.count, texts):
            self._runs.add(runs)
            yield counted

    def ranges(self, function: Callable[[Windows, int, Runs], Result]) -> Iterator[Result]:
        def run(item: tuple[int, list[tuple[int, int]]]) -> Result:
            partition, spans = item
            return function(self._windows, partition, [self._runs.read(*span) for span in spans])

        return self._in_order(run, self._runs.ranges(self._windows, self._size))

    def _in_order(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """`map(function, items)` on the pool, with at most `at_once` results computed ahead."""
        pending: deque[Future[Result]] = deque()
        for item in items:
            if len(pending) == self.at_once:
                yield pending.popleft().result()
            pending.append(self._pool.submit(function, item))
        while pending:
            yield pending.popleft().result()


class _Runs:
    """Sorted runs of rows, one after the other in two files: the keys and the counts."""

    def __init__(self, folder: Path) -> None:
        self.paths = folder / "keys", folder / "counts"
        self.spans: dict[int, list[tuple[int, int]]] = {}  # by partition: (start, stop) of its runs, in rows
        self.rows = 0

    def add(self, runs: dict[int, Grams]) -> None:
        try:
            for path, part in zip(self.paths, zip(*runs.values(), strict=True), strict=True):
                with open(path, "ab") as file:
                    for array in part:
                        file.write(array.data)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise InputError(
                f"The scratch folder {self.paths[0].parent.parent} is full; free some space or choose another."
            ) from error
        for partition, (keys, _) in runs.items():
            self.spans.setdefault(partition, []).append((self.rows, self.rows + keys.size))
            self.rows += keys.size

    def ranges(self, windows: Windows, size: int) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        """(partition, a span of each of its runs) of ranges of about `size` rows."""
        rows = np.memmap(self.paths[0], np.int64, mode="r")
        for partition, spans in sorted(self.spans.items()):
            for cuts in windows.ranges([rows[start:stop] for start, stop in spans], size):
                yield partition, [(start + cut.start, start + cut.stop) for (start, _), cut in zip(spans, cuts, strict=True)]

    def read(self, start: int, stop: int) -> Grams:
        keys = np.fromfile(self.paths[0], np.int64, stop - start, offset=8 * start)
        return keys, np.fromfile(self.paths[1], np.int32, stop - start, offset=4 * start)
