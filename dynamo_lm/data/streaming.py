"""Sharded text in, blocks of tokens out while it is read: no more is tokenized than a window ahead.

The documents of all shards, shard after shard in an order drawn from (seed, epoch), are one stream of tokens that begins
again at its end. It is cut into windows of equal length. A window is shuffled and cut into blocks as `packing.Blocks` does
with a corpus, by (seed, window). So a block is a pure function of the text, the seed and its number. `WindowLog` keeps where
windows begin, so that a run that resumes reads a shard and tokenizes a window, not all that came before, and a hash of each,
so that it notices text that has changed. Knows no ranks.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dynamo_lm.data.packing import Blocks
from dynamo_lm.data.sources import Shard, files, shards
from dynamo_lm.data.token_store import check_end_token, digest, token_dtype, token_ids, tokenizer_fingerprint
from dynamo_lm.errors import InputError
from dynamo_lm.jsonl_cache import JsonlLog

FORMAT = 1  # of the stream: another number is other blocks
ENDS = 2**16  # bytes at either end of a file that tell whether it is the same


_Documents = Iterator[tuple["Position", np.ndarray]]


class Position(NamedTuple):
    """A place in the stream."""

    epoch: int = 0
    shard: int = 0  # in the order of the epoch
    record: int = 0  # of the shard
    token: int = 0  # of the record's document


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of the stream, in the form of a `TokenStore`."""

    tokens: np.ndarray  # (window,)
    offsets: np.ndarray  # (pieces + 1,) int64: piece i of a document is tokens[offsets[i]:offsets[i + 1]]
    responses: None = None

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.tokens.tobytes() + self.offsets.tobytes()).hexdigest()


class TextStream:
    """The tokens of all documents of `sources`, epoch after epoch, without those held out.

    Args:
        sources: as for `dynamo_lm.data.sources.documents`.
        window: tokens of a window.
        held_out: share of the documents that are left out, drawn from the seed and the document's text.

    Raises:
        InputError: a source that does not exist, or a tokenizer without an end-of-text token.
    """

    def __init__(
        self,
        sources: Sequence[str],
        tokenizer: Any,
        window: int,
        *,
        seed: int,
        held_out: float = 0.0,
        text_field: str | None = None,
    ) -> None:
        check_end_token(tokenizer)
        if not 0 <= held_out < 1:
            raise InputError(f"The validation fraction must be at least 0 and below 1, not {held_out}.")
        self.sources, self.tokenizer, self.window, self.seed = list(sources), tokenizer, window, seed
        self.held_out, self.text_field = held_out, text_field
        parts = [files(source) for source in self.sources]  # a wrong path is reported at once
        self.fingerprint = digest(
            {
                "format": FORMAT,
                "shards": [
                    source if paths is None else [_of_file(path) for path in paths]
                    for source, paths in zip(self.sources, parts, strict=True)
                ],
                "tokenizer": tokenizer_fingerprint(tokenizer),
                "text_field": text_field,
                "held_out": held_out,
            }
        )
        self._dtype = token_dtype(1 + max(tokenizer.get_vocab().values()))
        self._next: tuple[Position, _Documents, np.ndarray | None] | None = None  # where, from where on, a document's rest

    @cached_property
    def shards(self) -> list[Shard]:
        """In the order of the sources."""
        return [shard for source in self.sources for shard in shards(source)]

    def check(self) -> None:
        """Read the beginning of every file, so that a broken one is reported before the first step, not when it is reached.

        Raises:
            InputError: a file that cannot be read, or that has no field with text.
        """
        for shard in self.shards:
            if shard.file is not None and shard.file.suffix.lower() in (".jsonl", ".parquet"):
                next(shard.texts(self.text_field), None)

    def held_out_texts(self) -> Iterator[str]:
        """The documents that are held out, in the order of the shards.

        Raises:
            InputError: at the end, if there is none.
        """
        empty = True
        for shard in self.shards:
            for text in filter(self._is_held_out, shard.texts(self.text_field)):
                empty = False
                yield text
        if empty:
            raise InputError(
                "No document is held out to measure on; give a larger --validation-fraction, a --validation text, or "
                "--validation-fraction 0."
            )

    def read(self, start: Position) -> tuple[Window, Position]:
        """The window that begins at `start`, and where the next one begins.

        Raises:
            InputError: text that cannot be read, or none in any shard.
        """
        if self._next is None or self._next[0] != start:
            self._next = start, self._documents(start), None
        position, documents, rest = self._next
        self._next = None  # a generator that failed is not asked again
        pieces, filled = [], 0
        while filled < self.window:
            if rest is None:
                position, rest = next(documents)
            piece, rest = rest[: self.window - filled], rest[self.window - filled :]
            pieces.append(piece)
            filled += len(piece)
            if len(rest):
                position = position._replace(token=position.token + len(piece))
            else:
                position, rest = Position(position.epoch, position.shard, position.record + 1), None
        self._next = position, documents, rest
        return Window(np.concatenate(pieces), np.cumsum([0, *map(len, pieces)], dtype=np.int64)), position

    def _documents(self, start: Position) -> _Documents:
        """(place, tokens) of every document from `start` on; never ends."""
        places: deque[Position] = deque()  # of the texts that the tokenizer has read and not given back yet
        for ids in token_ids(self._texts(start, places), self.tokenizer):
            place, tokens = places.popleft(), np.array(ids, dtype=self._dtype)
            yield (start, tokens[start.token :]) if place == start._replace(token=0) else (place, tokens)

    def _texts(self, start: Position, places: deque[Position]) -> Iterator[str]:
        for epoch in count(start.epoch):
            of_epoch = 0
            for number, shard in enumerate(self._order(epoch)):
                here = (epoch, number)
                if here < (start.epoch, start.shard):
                    of_epoch += 1  # there was text before `start`
                    continue
                first = start.record if here == (start.epoch, start.shard) else 0
                of_epoch += first
                for record, text in enumerate(shard.texts(self.text_field, first), first):
                    if not threading.main_thread().is_alive():
                        return  # the process ends, and waits for this thread
                    if text.strip() and not self._is_held_out(text):
                        of_epoch += 1
                        places.append(Position(epoch, number, record))
                        yield text
            if not of_epoch:
                raise InputError(f"{', '.join(self.sources)} holds no document with any text to train on.")

    def _order(self, epoch: int) -> list[Shard]:
        order = np.random.default_rng((self.seed, epoch, 1)).permutation(len(self.shards))
        return [self.shards[index] for index in order]

    def _is_held_out(self, text: str) -> bool:
        if not self.held_out or not text.strip():
            return False
        drawn = hashlib.blake2b(text.encode(), digest_size=8, key=str(self.seed).encode()).digest()
        return int.from_bytes(drawn, "little") < self.held_out * 2**64


# A window; the first one that was read on the way to it; of each from there, where it ends and its hash.
_Reading = tuple[Window, int, list[tuple[Position, str]]]


class WindowLog:
    """The windows of a stream by number, read on one thread beside the caller's, one window ahead.

    Args:
        file: JSON lines: a first one that describes the stream, then where each window ends and its hash.
        resume: whether the file must be of this stream; else another one is begun.

    Raises:
        InputError: the file is of another stream, or damaged.
    """

    def __init__(self, stream: TextStream, file: Path, *, resume: bool) -> None:
        head = {"stream": stream.fingerprint, "window": stream.window, "seed": stream.seed}
        self.stream, self._starts, self._hashes = stream, [Position()], list[str]()
        if not resume:
            file.unlink(missing_ok=True)
        self._log = JsonlLog(file)
        before, *windows = self._log.records or [head]
        positions = [_position(line, number) for number, line in enumerate(windows)]
        if self._log.damaged or before.keys() != head.keys() or None in positions:
            raise InputError(f'"{file}" is damaged; delete it, and the text is read from its beginning.')
        if before != head:
            raise InputError(
                f'"{file}" is of other text or of another --look-ahead or --seed; use the same to resume, or give another '
                "--out for a new run."
            )
        if not self._log.records:
            self._log.append(head)
        self._starts += [position for position in positions if position is not None]
        self._hashes += [line["sha256"] for line in windows]
        self._ahead: tuple[int, Future[_Reading]] | None = None

    def window(self, number: int) -> Window:
        """Window `number`; the next one is begun.

        Raises:
            InputError: text that cannot be read, or that has changed since the window was read before.
        """
        if self._ahead is None or self._ahead[0] != number:
            if self._ahead is not None:
                self._ahead[1].exception()  # wait: one thread at a time reads
            self._begin(number)
        assert self._ahead is not None
        window, first, passed = self._ahead[1].result()
        for index, (after, sha256) in enumerate(passed, first):
            if index == len(self._hashes):
                self._log.append({"window": index, "next": after, "sha256": sha256})
                self._starts.append(after)
                self._hashes.append(sha256)
            elif self._hashes[index] != sha256:
                raise InputError(
                    f"The text is not what it was when this run read it (window {index + 1:,} of {self.stream.window:,} "
                    "tokens differs); resume with the same text, or give another --out for a new run."
                )
        self._begin(number + 1)
        return window

    def _begin(self, number: int) -> None:
        """Read a window, and those before it that were never read, on a thread of its own."""
        first = min(number, len(self._starts) - 1)
        future: Future[_Reading] = Future()

        def read() -> None:
            try:
                passed, after = [], self._starts[first]
                for _ in range(first, number + 1):
                    window, after = self.stream.read(after)
                    passed.append((after, window.sha256))
                future.set_result((window, first, passed))
            except BaseException as error:
                future.set_exception(error)

        self._ahead = number, future
        threading.Thread(target=read, name="text ahead").start()


class StreamedBlocks:
    """The blocks of a stream's windows, by number; `prepare` says which can be read.

    Args:
        window: gives the window of a number, the same on every rank that calls it.
        length: tokens of a window, a multiple of `block_size`.
    """

    def __init__(self, window: Callable[[int], Window], length: int, block_size: int, *, seed: int) -> None:
        self.block_size, self.seed, self._window, self._per_window = block_size, seed, window, length // block_size
        self._blocks: dict[int, Blocks] = {}  # by window

    def prepare(self, numbers: range) -> None:
        """Have the windows of these blocks in memory and no others; every rank calls it with the same numbers."""
        needed = range(numbers.start // self._per_window, (numbers.stop - 1) // self._per_window + 1)
        self._blocks = {
            number: self._blocks[number] if number in self._blocks else self._blocks_of(self._window(number))
            for number in needed
        }

    def rows(self, numbers: Iterable[int]) -> dict[str, Tensor]:
        """Blocks that are prepared, in the form of `Blocks.rows`."""
        places = [divmod(number, self._per_window) for number in numbers]
        blocks = [self._blocks[window].block(window, index) for window, index in places]
        stacked = (torch.from_numpy(np.stack(rows)) for rows in zip(*blocks, strict=True))
        return dict(zip(Blocks.names, stacked, strict=True))

    def learned_counts(self, vocab_size: int) -> Tensor:
        """How often each token occurs in the first window, (vocab_size,) int64; every rank calls it."""
        self.prepare(range(1))
        return self._blocks[0].learned_counts(vocab_size)

    def _blocks_of(self, window: Window) -> Blocks:
        return Blocks(window, np.arange(len(window.offsets) - 1), self.block_size, seed=self.seed)  # type: ignore[arg-type]


def _position(line: dict[str, Any], number: int) -> Position | None:
    """Where window `number` ends by its line in the log, or None if that is not such a line."""
    after = line.get("next")
    if line.get("window") != number or not isinstance(line.get("sha256"), str) or not isinstance(after, list):
        return None
    if len(after) != len(Position()) or any(type(value) is not int or value < 0 for value in after):
        return None
    return Position(*after)


def _of_file(path: Path) -> tuple[str, int, str]:
    """Name, size and a hash of the beginning and the end."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            ends = file.read(ENDS)
            file.seek(max(0, size - ENDS))
            ends += file.read()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    return path.name, size, hashlib.sha256(ends).hexdigest()
