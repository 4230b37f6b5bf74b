"""Keys and values of rows with lengths of their own.

The only file that knows transformers' cache classes. In a `RaggedKVCache` slot j of a row holds the row's
position j, always: there is no padding on the left and nothing to crop. A step writes its tokens behind each row's length;
keeping fewer than were written only means that the length grows by less, and the next step overwrites the rest. A row that
ended leaves its seat empty (length 0) for another, because moving the rest costs more than to compute an empty row once. An
entry may hold every row several times, once for each head of a `StackedHeads`. Sliding
layers keep the whole context (their window is in the mask), so memory grows with the context, not with the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from dynamo_lm.decoding.draft_tree import ancestry, depths
from dynamo_lm.devices import sent

GROWTH = 256  # slots; capacity at least doubles, so that n tokens cost O(log n) copies


class RaggedKVCache(Cache):
    """A key-value cache whose rows have their own lengths.

    Attributes:
        lengths: tokens held by each row, (rows,) int64 on the CPU.
    """

    def __init__(self, num_layers: int, rows: int):
        super().__init__(layers=[_RaggedLayer(self) for _ in range(num_layers)])
        self.lengths = torch.zeros(rows, dtype=torch.long)
        self.end = 0  # slots in use after the write in progress
        self.start: int | None = 0  # where it begins, if in all rows at the same slot; else
        self.places: dict[
            int, tuple[Tensor, Tensor]
        ] = {}  # else where, by copies of the rows in an entry, see `write_indices`

    @property
    def rows(self) -> int:
        return len(self.lengths)

    def by_batch_slot(self, batch_slots: Sequence[int], values: Sequence[Any], empty: Any) -> list[Any]:
        """What belongs to rows in these seats, in the order of all seats, with something for empty ones."""
        found = [empty] * self.rows
        for batch_slot, value in zip(batch_slots, values, strict=True):
            found[batch_slot] = value
        return found

    def reserve(self, new: int) -> Tensor:
        """Announces a forward of `new` tokens a row and returns their positions, (rows, new) int64."""
        starts = self.lengths.tolist()
        self.end = max(starts) + new
        positions = torch.from_numpy(np.add.outer(starts, np.arange(new)))
        self.start = starts[0] if min(starts) == max(starts) else None
        if self.start is None:
            self.places = {1: (torch.arange(len(starts))[:, None], positions)}
        return positions

    def write_indices(self, copies: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Where the write in progress goes in an entry that holds all rows `copies` times: row (copies * rows, 1) and
        slot (copies * rows, new) of every token, computed once for all layers."""
        if copies not in self.places or self.places[copies][0].device != device:
            rows, slots = self.places[1]
            self.places[copies] = sent(_copied(rows, copies, self.rows), device), sent(slots.repeat(copies, 1), device)
        return self.places[copies]

    def commit(self, counts: Tensor) -> None:
        """Ends a forward: of the tokens just written, row r keeps the first `counts[r]`. counts: (rows,) int64."""
        self.lengths = self.lengths + counts

    def as_trees(self, positions: Tensor, parents: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Positions of queries and slots, and what each query sees, where the tokens of a forward are trees.

        Args:
            positions: slots that are written, (rows, width), as `reserve` gave them.
            parents: by row, where in the forward the token before each but the first is.

        Returns:
            (rows, width), (rows, slots) and (rows, width, slots) bool.
        """
        rows, width = positions.shape
        depth = torch.zeros(rows, width, dtype=torch.long)
        seen = torch.empty(rows, width, width, dtype=torch.bool)
        for row, each in enumerate(parents):
            depth[row, : len(each) + 1] = torch.tensor(depths(each))
            seen[row] = torch.from_numpy(ancestry(each, width))
        slots = torch.arange(self.end).expand(rows, -1)
        queries = self.lengths[:, None] + depth
        keys = slots.scatter(1, positions, queries)
        visible = (slots < self.lengths[:, None])[:, None].repeat(1, width, 1)
        return queries, keys, visible.scatter(2, positions[:, None].expand(-1, width, -1), seen)

    def gather(self, paths: Sequence[Sequence[int]]) -> None:
        """Before `commit`: moves the tokens just written at places 1, 2, .. of each row there from the places in its path.

        paths: by row, ascending places among the tokens just written, of which place 0 stays.
        """
        starts = self.lengths.tolist()
        moves = [(row, starts[row] + to, starts[row] + at) for row, path in enumerate(paths)
                 for to, at in enumerate(path, start=1) if to != at]  # fmt: skip
        if moves:
            rows, to, at = torch.tensor(moves).T
            for layer in self._filled():
                layer.move(rows, to, at)

    def select(self, rows: Tensor) -> None:
        """Drops all rows but these, and slots that none of them needs. rows: (kept,) int64."""
        lengths = self.lengths[rows]
        for layer in self._filled():
            layer.select(rows, int(lengths.max()) + GROWTH)
        self.lengths = lengths

    def copy_from(self, other: RaggedKVCache, rows: Tensor, batch_slots: Tensor) -> None:
        """Copies rows of another cache of the same model into seats of this one, (copied,) int64 each."""
        lengths = other.lengths[rows]
        for mine, theirs in zip(self._filled(), other._filled(), strict=True):
            mine.copy_from(theirs, rows, batch_slots, int(lengths.max()))
        self.lengths[batch_slots] = lengths

    def extend(self, other: RaggedKVCache) -> None:
        """Appends the rows of another cache of the same model. Slots that no row needs are given back."""
        lengths = torch.cat([self.lengths, other.lengths])
        for mine, theirs in zip(self._filled(), other._filled(), strict=True):
            mine.extend(theirs, int(lengths.max()) + GROWTH)
        self.lengths = lengths

    def release(self) -> None:
        """Gives keys and values back at once. Cache and entries hold each other, so they would wait for Python's garbage
        collection, which comes seldom: a thousand megabytes in an hour of short texts."""
        self.layers.clear()

    def buffers(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every entry that was written, (rows, heads, slots, width) each."""
        return [(layer.keys, layer.values) for layer in self._filled()]  # type: ignore[misc]

    def _filled(self) -> list[_RaggedLayer]:
        """The entries that a forward has written."""
        return [layer for layer in self.layers if layer.is_initialized]  # type: ignore[union-attr, misc]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return int(self.lengths.max()) if len(self.lengths) else 0


class StaticKVCache(RaggedKVCache):
    """A `RaggedKVCache` of one row whose buffers never change their shape, so that a step over it can be compiled.

    Every forward sees all `capacity` slots; the mask hides those that hold nothing, or what an earlier row left there.
    """

    def __init__(self, num_layers: int, capacity: int, device: torch.device | None = None):
        """device: of the keys and values, the CPU by default."""
        super().__init__(num_layers, 1)
        self.capacity, self.device = capacity, device or torch.device("cpu")
        self.slots: Tensor | None = None  # (new,) on the device: where the forward in progress writes
        self.handed: dict[Any, list[Any]] = {}  # by compiled step: its tensors, these buffers among them

    def lay_out(self, layout: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Makes the buffers before the first forward would. layout: keys and values of no token, by entry; heads that are
        left out have further entries behind them."""
        for layer, (keys, values) in zip(self.layers, layout, strict=False):
            layer.lazy_initialization(keys, values)  # type: ignore[union-attr, call-arg]

    def release(self) -> None:
        super().release()
        self.handed.clear()

    def reserve(self, new: int) -> Tensor:
        positions = super().reserve(new)
        self.end, self.slots = self.capacity, sent(positions[0], self.device)
        return positions


class _RaggedLayer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, cache: RaggedKVCache):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        slots = self.cache.capacity if isinstance(self.cache, StaticKVCache) else 0
        self.keys = key_states.new_zeros((*key_states.shape[:2], slots, key_states.shape[3]))
        self.values = value_states.new_zeros((*value_states.shape[:2], slots, value_states.shape[3]))
        if (
            isinstance(self.cache, StaticKVCache) and self.device.type == "cuda"
        ):  # recorded steps write to these very buffers
            torch._dynamo.mark_static_address(self.keys)
            torch._dynamo.mark_static_address(self.values)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """(rows, heads, new, width) each -> all slots in use, (rows, heads, slots, width)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if isinstance(self.cache, StaticKVCache):
            self.keys.index_copy_(2, self.cache.slots, key_states)  # type: ignore[union-attr, arg-type]
            self.values.index_copy_(2, self.cache.slots, value_states)  # type: ignore[union-attr, arg-type]
            return self.keys, self.values  # type: ignore[return-value]
        self.keys = _write(self.keys, key_states, self.cache)  # type: ignore[arg-type]
        self.values = _write(self.values, value_states, self.cache)  # type: ignore[arg-type]
        return self.keys[:, :, : self.cache.end], self.values[:, :, : self.cache.end]

    @property
    def copies(self) -> int:
        """How often the entry holds every row; ask before the cache's rows change."""
        return len(self.keys) // self.cache.rows  # type: ignore[arg-type]

    def select(self, rows: Tensor, slots: int) -> None:
        """Keeps these rows, in every copy, and as many slots at most."""
        rows = sent(_copied(rows, self.copies, self.cache.rows), self.device)
        self.keys = self.keys[:, :, :slots].index_select(0, rows)  # type: ignore[index]
        self.values = self.values[:, :, :slots].index_select(0, rows)  # type: ignore[index]

    def copy_from(self, other: _RaggedLayer, rows: Tensor, batch_slots: Tensor, slots: int) -> None:
        """Copies so many slots of another entry's rows to the seats, in every copy."""
        at = sent(_copied(rows, other.copies, other.cache.rows), self.device)
        to = sent(_copied(batch_slots, self.copies, self.cache.rows), self.device)
        self.keys, self.values = _roomy(self.keys, slots), _roomy(self.values, slots)  # type: ignore[arg-type]
        self.keys[to, :, :slots] = other.keys[at, :, :slots]  # type: ignore[index]
        self.values[to, :, :slots] = other.values[at, :, :slots]  # type: ignore[index]

    def extend(self, other: _RaggedLayer, slots: int) -> None:
        """Appends the rows of another entry, to every copy of the rows."""
        copies = self.copies
        self.keys = _appended(self.keys, other.keys, copies, slots)  # type: ignore[arg-type]
        self.values = _appended(self.values, other.values, copies, slots)  # type: ignore[arg-type]

    def move(self, rows: Tensor, to: Tensor, at: Tensor) -> None:
        """Copies slots `at` of `rows` to slots `to`, (moves,) each."""
        rows = sent(_copied(rows, self.copies, self.cache.rows), self.device)
        to, at = (sent(slots.repeat(self.copies), self.device) for slots in (to, at))
        self.keys[rows, :, to] = self.keys[rows, :, at]  # type: ignore[index]
        self.values[rows, :, to] = self.values[rows, :, at]  # type: ignore[index]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.end, 0

    def get_seq_length(self) -> int:
        return self.cache.get_seq_length()

    def get_max_length(self) -> int:
        return -1


def _copied(rows: Tensor, copies: int, total: int) -> Tensor:
    """Row numbers, (rows, ...), in an entry that holds all `total` rows `copies` times, one copy after the other."""
    return rows if copies == 1 else torch.cat([rows + copy * total for copy in range(copies)])


def _appended(buffer: Tensor, more: Tensor, copies: int, slots: int) -> Tensor:
    """Two buffers of (copies * rows, heads, any, width) as one of (copies * all rows, heads, slots, width)."""
    parts = [F.pad(part, (0, 0, 0, slots - part.shape[2])).unflatten(0, (copies, -1)) for part in (buffer, more)]
    return torch.cat(parts, 1).flatten(0, 1)


def _roomy(buffer: Tensor, slots: int) -> Tensor:
    """The buffer, or a larger one with its contents where it has fewer slots."""
    if buffer.shape[2] >= slots:
        return buffer
    grown = buffer.new_zeros((*buffer.shape[:2], max(2 * buffer.shape[2], slots + GROWTH), buffer.shape[3]))
    grown[:, :, : buffer.shape[2]] = buffer
    return grown


def _write(buffer: Tensor, new: Tensor, cache: RaggedKVCache) -> Tensor:
    buffer = _roomy(buffer, cache.end)
    if cache.start is not None:
        buffer[:, :, cache.start : cache.start + new.shape[2]] = new
    else:
        rows, slots = cache.write_indices(len(buffer) // cache.rows, buffer.device)
        buffer[rows, :, slots] = new.transpose(1, 2)  # (rows, new, heads, width): one write for rows of any lengths
    return buffer
