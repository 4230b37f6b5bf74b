"""Checks of a batch's own bookkeeping between two steps: slots, lengths and memory of its KV cache.

In: a batch. Out: one sentence for each thing that is wrong, none for a sound batch. Reads what `dynamo_lm.decoding.batch`
keeps to itself, and changes nothing.
"""

from __future__ import annotations

from dynamo_lm.decoding.batch import Batch
from dynamo_lm.decoding.kv_cache import RaggedKVCache
from dynamo_lm.decoding.sequence import SequenceState


def violations(batch: Batch) -> list[str]:
    """What is wrong in a batch between two steps."""
    sequences, slots, cache = batch._sequences, batch._slots, batch._cache
    wrong = [f"sequence {each.number} is finished and still runs" for each in batch.running if each.finished]
    leaked = sum(map(_bytes, (other for other in batch.runner.caches if other is not cache)))
    if leaked:
        wrong.append(f"{leaked} bytes are held by caches that no sequence uses")
    if len(slots) != len(sequences) or len(set(slots)) != len(slots):
        wrong.append(f"{len(sequences)} sequences have the slots {slots}")
    elif cache is None:
        wrong += [f"{len(sequences)} sequences have no cache"] if sequences else []
    elif not sequences:
        wrong.append(f"a cache of {cache.num_slots} slots has no sequence")
    else:
        wrong += _wrong_lengths(sequences, slots, cache)
    return wrong


def _wrong_lengths(sequences: list[SequenceState], slots: list[int], cache: RaggedKVCache) -> list[str]:
    """Slots that do not hold as many tokens as their sequence has; layers without room for them."""
    expected = [0] * cache.num_slots
    for sequence, slot in zip(sequences, slots, strict=True):
        if not 0 <= slot < cache.num_slots:
            return [f"sequence {sequence.number} has slot {slot} of {cache.num_slots}"]
        pending = len(sequence.input_ids) if sequence.options.off else 1  # emitted, but in no forward yet
        expected[slot] = len(sequence.tokens) - pending
    wrong = [
        f"slot {slot} holds {held} tokens, not {right}"
        for slot, (held, right) in enumerate(zip(cache.lengths.tolist(), expected, strict=True))
        if held != right
    ]
    for keys, values in cache.buffers():
        if len(keys) % cache.num_slots or min(keys.shape[2], values.shape[2]) < max(expected):
            wrong.append(f"a layer of {cache.num_slots} slots with {max(expected)} tokens has the shape {tuple(keys.shape)}")
    return wrong


def _bytes(cache: RaggedKVCache) -> int:
    return sum(keys.nbytes + values.nbytes for keys, values in cache.buffers())
