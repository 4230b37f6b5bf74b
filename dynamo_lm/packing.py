"""Documents of tokens in, blocks of equal length and their labels out.

A block is `block_size` consecutive tokens of an epoch's concatenated documents. `segments` says which document piece a
token belongs to, `positions` counts inside the piece, `targets` gives the labels of head `shift`. Every block, and so
every batch, is a pure function of the seed and its number: a training run resumes anywhere. Nothing here knows text,
tokenizers or files.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dynamo_lm.errors import InputError

if TYPE_CHECKING:
    from dynamo_lm.data import TokenStore

IGNORED = -100  # the label that torch's cross-entropy skips


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
        self.total = int((store.offsets[documents + 1] - store.offsets[documents]).sum())
        if self.total < block_size:
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

    def block(self, epoch: int, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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
            left = int(ends[piece]) - start - filled  # tokens of this document from here to its end
            size = min(left, self.block_size - filled)
            if size:
                source = int(self.store.offsets[documents[piece] + 1]) - left
                here = slice(filled, filled + size)
                tokens[here] = self._tokens[source : source + size]
                segments[here] = segment
                positions[here] = np.arange(size)
                filled, segment = filled + size, segment + 1
            piece += 1
        return tokens, segments, positions

    def batch(self, step: int, batch_size: int) -> dict[str, Tensor]:
        """Batch number `step`: `tokens`, `segments`, `positions`, each int64 (batch_size, block_size).

        It holds the blocks `step * batch_size ..` of the epochs put end to end, whatever was asked for before.
        """
        if step < 0 or batch_size < 1:
            raise InputError(f"A batch needs a step >= 0 and a size >= 1, not {step} and {batch_size}.")
        numbers = range(step * batch_size, (step + 1) * batch_size)
        blocks = [self.block(*divmod(number, self.num_blocks())) for number in numbers]
        tokens, segments, positions = (torch.from_numpy(np.stack(rows)) for rows in zip(*blocks, strict=True))
        return {"tokens": tokens, "segments": segments, "positions": positions}

    def batches(self, start_step: int, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """`batch(start_step)`, `batch(start_step + 1)`, .. without end."""
        step = start_step
        while True:
            yield self.batch(step, batch_size)
            step += 1

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


def targets(tokens: Tensor, segments: Tensor, shift: int) -> Tensor:
    """Labels of the head that predicts `shift` tokens ahead; tokens, segments and labels are int64 (batch, length).

    The label at position t is tokens[t + shift] where that token is in the block and in the same document piece,
    otherwise -100.
    """
    if shift < 1:
        raise InputError(f"A head predicts at least 1 token ahead, not {shift}.")
    labels = torch.full_like(tokens, IGNORED)
    if shift < tokens.shape[1]:
        same = segments[:, shift:] == segments[:, :-shift]  # (batch, length - shift)
        labels[:, :-shift] = tokens[:, shift:].where(same, IGNORED)
    return labels
