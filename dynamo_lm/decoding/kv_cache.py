"""Keys and values of sequences with lengths of their own.

The only file that knows transformers' cache classes. A `RaggedKVCache` has a slot for each sequence, and entry j of a slot
holds the sequence's position j, always: there is no padding on the left and nothing to crop. A step writes its tokens after
each sequence's length; keeping fewer than were written only means that the length grows by less, and the next step
overwrites the rest. A sequence that ended leaves its slot empty (length 0) for another, because moving the others costs more
than to compute an empty slot once. A layer may hold every slot several times, once for each head of a `StackedHeads`.
Sliding layers keep the whole context (their window is in the mask), so memory grows with the context, not with the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from dynamo_lm.decoding.draft_tree import ancestry, depths
from dynamo_lm.devices import sent
from dynamo_lm.private_interfaces import mark_static_address

GROWTH = 256  # positions; capacity at least doubles, so that n tokens cost O(log n) copies


class StepWithoutHeads(NamedTuple):
    """What heads' layers would have read in a step of one slot."""

    start: int  # position of the first token
    hidden: Tensor  # (1, tokens, hidden)
    turns: tuple[Tensor, Tensor]  # cosines and sines, (1, tokens, width)
    mask: Tensor  # (1, 1, tokens, end) bool


class RaggedKVCache(Cache):
    """A key-value cache whose slots have their own lengths.

    Attributes:
        lengths: tokens held by each slot, (slots,) int64 on the CPU.
        without_heads: whether the forward in progress leaves the heads' layers out, see `FusedLayer`.
        unread: steps whose keys and values of heads are missing. Forgotten when slots change: only drafts depend on it.
    """

    def __init__(self, num_layers: int, num_slots: int):
        super().__init__(layers=[_RaggedLayer(self) for _ in range(num_layers)])
        self.lengths = torch.zeros(num_slots, dtype=torch.long)
        self.end = 0  # positions in use after the write in progress
        self.start: int | None = 0  # where it begins, if at the same position in all slots
        self.without_heads, self.unread = False, list[StepWithoutHeads]()
        self.places: dict[int, tuple[Tensor, Tensor]] = {}  # else where, by copies in a layer, see `write_indices`

    @property
    def num_slots(self) -> int:
        return len(self.lengths)

    def by_slot(self, slots: Sequence[int], values: Sequence[Any], empty: Any) -> list[Any]:
        """The values of these slots, in the order of all slots, with `empty` for the others."""
        result = [empty] * self.num_slots
        for slot, value in zip(slots, values, strict=True):
            result[slot] = value
        return result

    def reserve(self, new: int) -> Tensor:
        """Announces a forward of `new` tokens a slot and returns their positions, (slots, new) int64."""
        starts = self.lengths.tolist()
        self.end = max(starts) + new
        positions = torch.from_numpy(np.add.outer(starts, np.arange(new)))
        self.start = starts[0] if min(starts) == max(starts) else None
        if self.start is None:
            self.places = {1: (torch.arange(len(starts))[:, None], positions)}
        return positions

    def write_indices(self, copies: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Where the write in progress goes in a layer that holds all slots `copies` times: slot (copies * slots, 1) and
        position (copies * slots, new) of every token, computed once for all layers."""
        if copies not in self.places or self.places[copies][0].device != device:
            slots, positions = self.places[1]
            self.places[copies] = (
                sent(_copied(slots, copies, self.num_slots), device),
                sent(positions.repeat(copies, 1), device),
            )
        return self.places[copies]

    def commit(self, counts: Tensor) -> None:
        """Ends a forward: of the tokens just written, slot r keeps the first `counts[r]`. counts: (slots,) int64."""
        self.lengths = self.lengths + counts

    def as_trees(self, positions: Tensor, parents: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Positions of queries and keys, and which keys each query sees, where the tokens of a forward are trees.

        Args:
            positions: that are written, (slots, width), as `reserve` gave them.
            parents: by slot, where in the forward the token before each but the first is.

        Returns:
            (slots, width), (slots, end) and (slots, width, end) bool.
        """
        num_slots, width = positions.shape
        depth = torch.zeros(num_slots, width, dtype=torch.long)
        ancestors = torch.empty(num_slots, width, width, dtype=torch.bool)
        for slot, each in enumerate(parents):
            depth[slot, : len(each) + 1] = torch.tensor(depths(each))
            ancestors[slot] = torch.from_numpy(ancestry(each, width))
        entries = torch.arange(self.end).expand(num_slots, -1)
        queries = self.lengths[:, None] + depth
        keys = entries.scatter(1, positions, queries)
        visible = (entries < self.lengths[:, None])[:, None].repeat(1, width, 1)
        return queries, keys, visible.scatter(2, positions[:, None].expand(-1, width, -1), ancestors)

    def gather(self, paths: Sequence[Sequence[int]]) -> None:
        """Before `commit`: moves the tokens just written at places 1, 2, .. of each slot there from the places in its path.

        paths: by slot, ascending places among the tokens just written, of which place 0 stays.
        """
        starts = self.lengths.tolist()
        moves = [(slot, starts[slot] + to, starts[slot] + at) for slot, path in enumerate(paths)
                 for to, at in enumerate(path, start=1) if to != at]  # fmt: skip
        if moves:
            slots, to, at = torch.tensor(moves).T
            for layer in self._filled():
                layer.move(slots, to, at)

    def select(self, slots: Tensor) -> None:
        """Drops all slots but these, and positions that none of them needs. slots: (kept,) int64."""
        self.unread.clear()
        lengths = self.lengths[slots]
        for layer in self._filled():
            layer.select(slots, int(lengths.max()) + GROWTH)
        self.lengths = lengths

    def copy_from(self, other: RaggedKVCache, sources: Tensor, slots: Tensor) -> None:
        """Copies `sources`, slots of another cache of the same model, into `slots` of this one, (copied,) int64 each."""
        self.unread.clear()
        lengths = other.lengths[sources]
        for mine, theirs in zip(self._filled(), other._filled(), strict=True):
            mine.copy_from(theirs, sources, slots, int(lengths.max()))
        self.lengths[slots] = lengths

    def extend(self, other: RaggedKVCache) -> None:
        """Appends the slots of another cache of the same model. Positions that no slot needs are given back."""
        self.unread.clear()
        lengths = torch.cat([self.lengths, other.lengths])
        for mine, theirs in zip(self._filled(), other._filled(), strict=True):
            mine.extend(theirs, int(lengths.max()) + GROWTH)
        self.lengths = lengths

    def room(self, entry: int, shape: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer with room for the write in progress, for a kernel that writes them itself, each
        slot's from its length on.

        Args:
            shape: of keys of no token, (copies * slots, heads, 0, width), for a layer that has none yet.
            like: has their type.
        """
        layer: Any = self.layers[entry]
        if not layer.is_initialized:
            empty = like.new_empty(shape)
            layer.lazy_initialization(empty, empty)
        if layer.keys.shape[2] < self.end:
            layer.keys, layer.values = _roomy(layer.keys, self.end), _roomy(layer.values, self.end)
        return layer.keys, layer.values

    def release(self) -> None:
        """Gives keys and values back at once. Cache and entries hold each other, so they would wait for Python's garbage
        collection, which comes seldom: a thousand megabytes in an hour of short texts."""
        self.layers.clear()

    def buffers(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every layer that was written, (slots, heads, positions, width) each."""
        return [(layer.keys, layer.values) for layer in self._filled()]  # type: ignore[misc]

    def _filled(self) -> list[_RaggedLayer]:
        """The layers that a forward has written."""
        return [layer for layer in self.layers if layer.is_initialized]  # type: ignore[union-attr, misc]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return int(self.lengths.max()) if len(self.lengths) else 0


class StaticKVCache(RaggedKVCache):
    """A `RaggedKVCache` of one slot whose buffers never change their shape, so that a step over it can be compiled.

    Every forward sees all `capacity` positions; the mask hides those that hold nothing or an earlier sequence's.
    """

    def __init__(self, num_layers: int, capacity: int, device: torch.device | None = None):
        """device: of the keys and values, the CPU by default."""
        super().__init__(num_layers, 1)
        self.capacity, self.device = capacity, device or torch.device("cpu")
        self.write_positions: Tensor | None = None  # (new,) on the device: where the forward in progress writes
        self.arguments: dict[Any, list[Any]] = {}  # by compiled step: its tensors, these buffers among them

    def lay_out(self, layout: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Makes the buffers before the first forward would. layout: keys and values of no token, by layer; heads that are
        left out have further layers after them."""
        for layer, (keys, values) in zip(self.layers, layout, strict=False):
            layer.lazy_initialization(keys, values)  # type: ignore[union-attr, call-arg]

    def release(self) -> None:
        super().release()
        self.arguments.clear()

    def reserve(self, new: int) -> Tensor:
        positions = super().reserve(new)
        self.end, self.write_positions = self.capacity, sent(positions[0], self.device)
        return positions


class _RaggedLayer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, cache: RaggedKVCache):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        static = isinstance(self.cache, StaticKVCache)
        capacity = self.cache.capacity if isinstance(self.cache, StaticKVCache) else 0
        self.keys = key_states.new_zeros((*key_states.shape[:2], capacity, key_states.shape[3]))
        self.values = value_states.new_zeros((*value_states.shape[:2], capacity, value_states.shape[3]))
        if static and self.device.type == "cuda":  # recorded steps write to these very buffers
            mark_static_address(self.keys)
            mark_static_address(self.values)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """(slots, heads, new, width) each -> all positions in use, (slots, heads, positions, width)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if isinstance(self.cache, StaticKVCache):
            self.keys.index_copy_(2, self.cache.write_positions, key_states)  # type: ignore[union-attr, arg-type]
            self.values.index_copy_(2, self.cache.write_positions, value_states)  # type: ignore[union-attr, arg-type]
            return self.keys, self.values  # type: ignore[return-value]
        self.keys = _write(self.keys, key_states, self.cache)  # type: ignore[arg-type]
        self.values = _write(self.values, value_states, self.cache)  # type: ignore[arg-type]
        return self.keys[:, :, : self.cache.end], self.values[:, :, : self.cache.end]

    @property
    def copies(self) -> int:
        """How often the layer holds every slot; read it before the cache's slots change."""
        return len(self.keys) // self.cache.num_slots  # type: ignore[arg-type]

    def select(self, slots: Tensor, length: int) -> None:
        """Keeps these slots, in every copy, and at most `length` positions."""
        slots = sent(_copied(slots, self.copies, self.cache.num_slots), self.device)
        self.keys = self.keys[:, :, :length].index_select(0, slots)  # type: ignore[index]
        self.values = self.values[:, :, :length].index_select(0, slots)  # type: ignore[index]

    def copy_from(self, other: _RaggedLayer, sources: Tensor, slots: Tensor, length: int) -> None:
        """Copies the first `length` positions of another layer's slots to slots of this one, in every copy."""
        at = sent(_copied(sources, other.copies, other.cache.num_slots), self.device)
        to = sent(_copied(slots, self.copies, self.cache.num_slots), self.device)
        self.keys, self.values = _roomy(self.keys, length), _roomy(self.values, length)  # type: ignore[arg-type]
        self.keys[to, :, :length] = other.keys[at, :, :length]  # type: ignore[index]
        self.values[to, :, :length] = other.values[at, :, :length]  # type: ignore[index]

    def extend(self, other: _RaggedLayer, length: int) -> None:
        """Appends the slots of another layer, to every copy of the slots."""
        copies = self.copies
        self.keys = _appended(self.keys, other.keys, copies, length)  # type: ignore[arg-type]
        self.values = _appended(self.values, other.values, copies, length)  # type: ignore[arg-type]

    def move(self, slots: Tensor, to: Tensor, at: Tensor) -> None:
        """Copies positions `at` of `slots` to positions `to`, (moves,) each."""
        slots = sent(_copied(slots, self.copies, self.cache.num_slots), self.device)
        to, at = (sent(positions.repeat(self.copies), self.device) for positions in (to, at))
        self.keys[slots, :, to] = self.keys[slots, :, at]  # type: ignore[index]
        self.values[slots, :, to] = self.values[slots, :, at]  # type: ignore[index]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.end, 0

    def get_seq_length(self) -> int:
        return self.cache.get_seq_length()

    def get_max_length(self) -> int:
        return -1


def _copied(slots: Tensor, copies: int, total: int) -> Tensor:
    """Slot numbers, (slots, ...), in a layer that holds all `total` slots `copies` times, one copy after the other."""
    return slots if copies == 1 else torch.cat([slots + copy * total for copy in range(copies)])


def _appended(buffer: Tensor, more: Tensor, copies: int, length: int) -> Tensor:
    """Two buffers of (copies * slots, heads, any, width) as one of (copies * all slots, heads, length, width)."""
    parts = [F.pad(part, (0, 0, 0, length - part.shape[2])).unflatten(0, (copies, -1)) for part in (buffer, more)]
    return torch.cat(parts, 1).flatten(0, 1)


def _roomy(buffer: Tensor, length: int) -> Tensor:
    """The buffer, or a larger one with its contents where it has fewer positions."""
    if buffer.shape[2] >= length:
        return buffer
    grown = buffer.new_zeros((*buffer.shape[:2], max(2 * buffer.shape[2], length + GROWTH), buffer.shape[3]))
    grown[:, :, : buffer.shape[2]] = buffer
    return grown


def _write(buffer: Tensor, new: Tensor, cache: RaggedKVCache) -> Tensor:
    buffer = _roomy(buffer, cache.end)
    if cache.start is not None:
        buffer[:, :, cache.start : cache.start + new.shape[2]] = new
    else:
        slots, positions = cache.write_indices(len(buffer) // cache.num_slots, buffer.device)
        buffer[slots, :, positions] = new.transpose(1, 2)  # (slots, new, heads, width): one write for slots of any lengths
    return buffer
