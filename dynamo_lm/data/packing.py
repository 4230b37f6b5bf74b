"""Documents of tokens in, blocks of equal length and their labels out.

A block of text (`Blocks`) is `block_size` consecutive tokens of an epoch's concatenated documents; a block of conversations
(`WholeBlocks`) holds whole ones and padding, and marks the tokens that are learned. `segments` is the document piece that a
token belongs to, `positions` counts inside the piece, `targets` gives the labels of head `shift`. Every block, and so
every batch, is a pure function of the seed and its number: a training run resumes anywhere. Knows no text, tokenizers or
files.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from dynamo_lm.data.token_store import TokenStore
from dynamo_lm.errors import InputError

IGNORED = -100  # the label that torch's cross-entropy skips


class TrainingBlocks(Protocol):
    """What training needs of its blocks."""

    block_size: int

    def prepare(self, numbers: range) -> None:
        """Make the blocks of these numbers ready for `rows`; every rank calls it with the same numbers."""

    def rows(self, numbers: Iterable[int]) -> dict[str, Tensor]: ...

    def learned_counts(self, vocab_size: int) -> Tensor: ...


class _Epoch(NamedTuple):
    documents: np.ndarray  # (documents,) ids in the order they are concatenated
    ends: np.ndarray  # (documents,) where each ends in the concatenation
    blocks: np.ndarray  # (blocks,) the order in which the blocks are visited


class Blocks:
    """Endless deterministic epochs of packed blocks, with random access.

    An epoch concatenates `documents` (ids in `store`) in an order drawn from (seed, epoch), cuts every `block_size`
    tokens, and visits the blocks in an order drawn likewise. The tail that fills no block is dropped; under `shuffle`
    it is another tail each epoch. `shuffle=False` keeps both orders, for validation.
    """

    names: tuple[str, ...] = ("tokens", "segments", "positions")  # of what a block consists of
    whole = False  # whether documents are kept whole

    def __init__(
        self, store: TokenStore, documents: np.ndarray, block_size: int, *, seed: int, shuffle: bool = True
    ) -> None:
        documents = np.asarray(documents, dtype=np.int64)
        if block_size < 1:
            raise InputError(f"The block size must be at least 1, not {block_size}.")
        if seed < 0:
            raise InputError(f"The seed must be 0 or positive, not {seed}.")
        if len(documents) == 0:
            raise InputError("There is no document to cut into blocks; give a corpus with at least one.")
        if (store.responses is not None) != self.whole:
            raise InputError("Conversations go into WholeBlocks and text into Blocks; this store holds the other kind.")
        self.total = int((store.offsets[documents + 1] - store.offsets[documents]).sum())
        if self.total < block_size and not self.whole:
            raise InputError(
                f"The documents hold {self.total:,} tokens, fewer than one block of {block_size:,}; "
                f"give more text or a smaller --block-size."
            )
        self.store, self.documents, self.block_size = store, documents, block_size
        self.seed, self.shuffle = seed, shuffle
        self._tokens = np.asarray(store.tokens)  # the same memory map, without memmap's cost per slice
        self._epochs: dict[int, _Epoch] = {}  # the last two used: a batch may span a border

    def num_blocks(self, epoch: int = 0) -> int:
        """Blocks in an epoch: the same in every one, because only the order of the documents changes."""
        return self.total // self.block_size

    def block(self, epoch: int, index: int) -> tuple[np.ndarray, ...]:
        """The `index`-th block visited in `epoch`: (tokens, segments, positions), each int64 (block_size,).

        Segments number the document pieces of the block 0, 1, 2, ..; positions restart at 0 with each piece, also for a
        document continued from another block, whose beginning this block cannot attend to.
        """
        if not 0 <= index < self.num_blocks(epoch):
            raise IndexError(f"block {index} of {self.num_blocks(epoch)}")
        documents, ends, order = self._epoch(epoch)
        tokens, segments, positions = np.empty((3, self.block_size), dtype=np.int64)
        start = int(order[index]) * self.block_size  # in the epoch's concatenation
        piece = int(np.searchsorted(ends, start, side="right"))  # the document that holds token `start`
        filled = segment = 0
        while filled < self.block_size:
            left = int(ends[piece]) - start - filled  # tokens of this document up to its end
            size = min(left, self.block_size - filled)
            if size:
                source = int(self.store.offsets[documents[piece] + 1]) - left
                chunk = slice(filled, filled + size)
                tokens[chunk] = self._tokens[source : source + size]
                segments[chunk] = segment
                positions[chunk] = np.arange(size)
                filled, segment = filled + size, segment + 1
            piece += 1
        return tokens, segments, positions

    def prepare(self, numbers: range) -> None:
        """Nothing: all blocks are on disk."""

    def learned_counts(self, vocab_size: int) -> Tensor:
        """How often each token is a target, (vocab_size,) int64: in responses where there are any, else everywhere."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        for document in self.documents:
            span = slice(int(self.store.offsets[document]), int(self.store.offsets[document + 1]))
            tokens = self._tokens[span]
            learned = tokens if self.store.responses is None else tokens[np.asarray(self.store.responses[span], dtype=bool)]
            counts += np.bincount(np.asarray(learned, dtype=np.int64), minlength=vocab_size)
        return torch.from_numpy(counts)

    def batch(self, step: int, batch_size: int) -> dict[str, Tensor]:
        """Batch number `step`: `tokens`, `segments`, `positions`, each int64 (batch_size, block_size), and what else a block
        of this kind consists of.

        It holds the blocks `step * batch_size ..` of the epochs put end to end, whatever was read before.
        """
        if step < 0 or batch_size < 1:
            raise InputError(f"A batch needs a step >= 0 and a size >= 1, not {step} and {batch_size}.")
        return self.rows(range(step * batch_size, (step + 1) * batch_size))

    def rows(self, numbers: Iterable[int]) -> dict[str, Tensor]:
        """The blocks of these numbers, counted through the epochs put end to end, in the form of `batch`."""
        blocks = [self.block(*divmod(number, self.num_blocks())) for number in numbers]
        stacked = (torch.from_numpy(np.stack(rows)) for rows in zip(*blocks, strict=True))
        return dict(zip(self.names, stacked, strict=True))

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            documents, blocks = self.documents, np.arange(self.num_blocks(epoch))
            if self.shuffle:
                random = np.random.default_rng((self.seed, epoch))
                documents, blocks = random.permutation(documents), random.permutation(blocks)
            ends = np.cumsum(self.store.offsets[documents + 1] - self.store.offsets[documents])
            if len(self._epochs) == 2:
                del self._epochs[next(iter(self._epochs))]
            self._epochs[epoch] = _Epoch(documents, ends, blocks)
        return self._epochs[epoch]


class WholeBlocks(Blocks):
    """Blocks of whole conversations: none is cut, and none sees another.

    Conversations are put into blocks once, the longest first, each into the fullest block that has room; what remains is
    padding, which nothing learns from and nothing sees. An epoch visits the blocks in an order drawn from (seed, epoch);
    with `shuffle=False` every epoch in the order of the first.
    A block has a fourth part, `responses`: whether a token is learned, bool (block_size,).

    Raises:
        InputError: a conversation is longer than a block.
    """

    names = ("tokens", "segments", "positions", "responses")
    whole = True

    def __init__(
        self, store: TokenStore, documents: np.ndarray, block_size: int, *, seed: int, shuffle: bool = True
    ) -> None:
        super().__init__(store, documents, block_size, seed=seed, shuffle=shuffle)
        self._responses = np.asarray(store.responses)
        lengths = store.offsets[self.documents + 1] - store.offsets[self.documents]
        if lengths.max() > block_size:
            raise InputError(
                f"A conversation of {lengths.max():,} tokens does not fit a block of {block_size:,}; "
                f"give a larger --block-size or leave it out."
            )
        self._visited: tuple[int, np.ndarray] | None = None  # the last epoch and its order
        self._packed: list[list[int]] = []  # documents by block
        rooms: list[tuple[int, int]] = []  # (room left, block), rising
        for index in np.argsort(-lengths, kind="stable").tolist():
            length = int(lengths[index])
            place = bisect.bisect_left(rooms, (length, 0))
            room, block = rooms.pop(place) if place < len(rooms) else (block_size, len(self._packed))
            if block == len(self._packed):
                self._packed.append([])
            self._packed[block].append(int(self.documents[index]))
            bisect.insort(rooms, (room - length, block))

    def num_blocks(self, epoch: int = 0) -> int:
        return len(self._packed)

    def block(self, epoch: int, index: int) -> tuple[np.ndarray, ...]:
        """(tokens, segments, positions, responses); padding repeats the last token as a segment of its own."""
        if not 0 <= index < self.num_blocks(epoch):
            raise IndexError(f"block {index} of {self.num_blocks(epoch)}")
        tokens, segments, positions = np.zeros((3, self.block_size), dtype=np.int64)
        responses = np.zeros(self.block_size, dtype=bool)
        filled = 0
        chosen = self._packed[int(self._order(epoch)[index])]
        for segment, document in enumerate(chosen):
            source = slice(int(self.store.offsets[document]), int(self.store.offsets[document + 1]))
            chunk = slice(filled, filled + source.stop - source.start)
            tokens[chunk], responses[chunk] = self._tokens[source], self._responses[source]
            segments[chunk], positions[chunk] = segment, np.arange(chunk.stop - chunk.start)
            filled = chunk.stop
        tokens[filled:] = tokens[filled - 1]
        segments[filled:] = len(chosen)
        positions[filled:] = np.arange(self.block_size - filled)
        return tokens, segments, positions, responses

    def packed_number(self, number: int) -> int:
        """Which block stands at `number`, counted through the epochs put end to end: one number for one content."""
        epoch, index = divmod(number, self.num_blocks())
        return int(self._order(epoch)[index])

    def _order(self, epoch: int) -> np.ndarray:
        """(blocks,) the order in which an epoch visits them."""
        if self._visited is None or self._visited[0] != epoch:
            random = np.random.default_rng((self.seed, epoch if self.shuffle else 0))  # never the longest ones first
            self._visited = epoch, random.permutation(len(self._packed))
        return self._visited[1]


def targets(tokens: Tensor, segments: Tensor, shift: int, responses: Tensor | None = None) -> Tensor:
    """Labels of the head that predicts `shift` tokens ahead; tokens, segments and labels are int64 (batch, length).

    The label at position t is tokens[t + shift] where that token is in the block and in the same document piece and, given
    `responses` (bool, (batch, length)), is a response's, otherwise -100. Where the position itself stands does not matter:
    the last tokens of a prompt predict the first ones of its answer.
    """
    if shift < 1:
        raise InputError(f"A head predicts at least 1 token ahead, not {shift}.")
    labels = torch.full_like(tokens, IGNORED)
    if shift < tokens.shape[1]:
        same = segments[:, shift:] == segments[:, :-shift]  # (batch, length - shift)
        counts = same if responses is None else same & responses[:, shift:]
        labels[:, :-shift] = tokens[:, shift:].where(counts, IGNORED)
    return labels
