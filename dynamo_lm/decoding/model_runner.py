"""Forwards of the decoding loop: token ids in, final hidden states of all heads out (docs/method.md section 4).

Puts together what a base's body takes: padded tokens, positions, masks, and a cache with a slot for every sequence. Tokens
of a step may be chains or trees of drafts. Steps of one fixed shape may be compiled (`compiled.py`). Knows nothing of how
tokens are chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from weakref import WeakSet

import torch
from torch import Tensor

from dynamo_lm.backbone.attention_mask import AttentionMaskBuilder
from dynamo_lm.backbone.base_model import decoder_layers
from dynamo_lm.backbone.stacked_heads import has_hooks
from dynamo_lm.backbone.token_limits import context_limit
from dynamo_lm.decoding.compiled import CompiledStep, capacity, compile_steps
from dynamo_lm.decoding.fused_layers import FusedLayer
from dynamo_lm.decoding.kv_cache import RaggedKVCache, StaticKVCache
from dynamo_lm.decoding.protocol import MultiHeadLM
from dynamo_lm.decoding.sequence import SequenceState
from dynamo_lm.devices import sent
from dynamo_lm.errors import InputError


class ModelRunner:
    """A model as the decoding loop runs it.

    Attributes:
        model: arranged for decoding.
        context: tokens that it can hold; where it states no limit, more than any.
        caches: all that `new_cache` made, as long as they exist; those of compiled steps aside.
    """

    def __init__(self, model: MultiHeadLM, num_heads: int, *, compile: bool):
        """compile: steps of one fixed shape, compiled, for one sequence. Raises InputError where that is not possible."""
        self.num_heads, self.compile = num_heads, compile
        self.forward: Callable[..., Tensor]
        if compile:
            if has_hooks(model.last_layer):
                raise InputError("compile=True does not run forward hooks on the base's last layer; leave it out.")
            self.model, self.forward = compile_steps(model, num_heads)
        else:
            self.model = model.optimize_for_inference(num_heads)
            self.forward = self.model.hidden
        self.context = context_limit(model.config)
        self.caches: WeakSet[RaggedKVCache] = WeakSet()
        self.device = self.model.device  # here and below: what to ask the model anew in every step would be slow
        self._last_layer = decoder_layers(self.model.base)[-1]
        self._mask_form = AttentionMaskBuilder.of(self.model.base.config, self.model.dtype)

    def new_cache(self, sequences: Sequence[SequenceState]) -> RaggedKVCache:
        """A cache for sequences that begin."""
        if not self.compile:
            cache = RaggedKVCache(self.model.cache_entries, len(sequences))
            self.caches.add(cache)
            return cache
        size = capacity(sequences[0].prompt_length + sequences[0].options.max_new_tokens + self._fixed(sequences))
        kept = self.model.runtime.compiled.pop((self.num_heads, self.device, size), None)
        if kept is not None:
            return kept
        static = StaticKVCache(self.model.cache_entries, size, self.device)
        if isinstance(self.forward, CompiledStep):
            static.lay_out(self.forward.layout)
        return static

    def release(self, cache: RaggedKVCache) -> None:
        """Takes back a cache that no sequence needs any more."""
        if isinstance(cache, StaticKVCache) and cache.device.type == "cuda":  # for whom its steps are recorded
            self.model.runtime.compiled[self.num_heads, cache.device, cache.capacity] = cache
        else:
            cache.release()

    def release_all(self) -> None:
        """Gives the memory of all caches back, also after a step that failed."""
        for cache in self.caches:
            cache.release()

    def _fixed(self, sequences: Sequence[SequenceState]) -> int:
        """Tokens of every forward after the prefill, if they are all to have one shape; else 0."""
        if not self.compile:
            return 0
        return (
            sequences[0].draft_length.sizes[-1] if sequences[0].draft_length is not None else sequences[0].options.num_heads
        )

    def prefill(self, sequences: Sequence[SequenceState], cache: RaggedKVCache) -> tuple[Tensor, Tensor | None]:
        """One forward over the prompts of sequences that begin.

        Returns:
            Final hidden states of the heads at the prompts' ends, (n, sequences, 1, hidden); and the base's at all prompt
            tokens, (sequences, width, hidden), or None if no sequence has `prompt_logprobs` and the prefill was in parts.
        """
        prompt, size = sequences[0].input_ids, self._fixed(sequences)
        scored = any(sequence.options.prompt_logprobs for sequence in sequences)
        if isinstance(self.forward, CompiledStep) and self.forward.prefills_faster(len(prompt), size) and not scored:
            empty = cache.lengths
            for start in range(0, len(prompt), size):
                part = prompt[start : start + size]
                hidden = self._run(self.forward, [part], cache, [0], size)
                cache.commit(torch.tensor([len(part)]))
            cache.lengths = empty  # the caller commits what is kept
            return hidden[:, :, len(part) - 1, None], None
        hidden = self._run(
            self.model.hidden, [sequence.input_ids for sequence in sequences], cache, range(len(sequences)), 0
        )
        ends = sent(torch.tensor([sequence.prompt_length - 1 for sequence in sequences]), hidden.device)
        return hidden[:, torch.arange(len(sequences), device=hidden.device), ends][:, :, None], hidden[0]

    def decode(
        self, sequences: Sequence[SequenceState], cache: RaggedKVCache, slots: Sequence[int], *, heads: bool = True
    ) -> Tensor:
        """One forward over what every sequence emitted (or drafted) last; slots: theirs in the cache.

        heads: whether anything is read from heads 2..; a layer that can then leaves them out.

        Returns:
            Final hidden states of the heads, (n, sequences, width, hidden); shorter sequences are padded at their end.
        """
        width = max(len(sequence.input_ids) for sequence in sequences)
        input_ids, last = [sequence.input_ids for sequence in sequences], self._last_layer
        trees = [sequence.parents for sequence in sequences] if any(sequence.branches for sequence in sequences) else None
        skips = isinstance(last, FusedLayer) and last.skips_heads(cache.num_slots, width)
        cache.without_heads = skips and not heads and trees is None  # what is read later must be a chain
        hidden = self._run(self.forward, input_ids, cache, slots, self._fixed(sequences), trees)
        cache.without_heads = False
        return hidden

    def _run(
        self,
        forward: Callable[..., Tensor],
        input_ids: Sequence[list[int]],
        cache: RaggedKVCache,
        slots: Sequence[int],
        least: int,
        trees: Sequence[list[int]] | None = None,
    ) -> Tensor:
        """A forward over `input_ids`, by sequence, padded to the longest or to `least` tokens; empty slots are all padding.

        trees: by sequence, where the token before each but the first is; None: they are all chains.
        """
        width = max(least, *map(len, input_ids))
        positions = cache.reserve(width)  # (sequences, width)
        padded = [tokens + [0] * (width - len(tokens)) for tokens in input_ids]
        tokens = torch.tensor(cache.by_slot(slots, padded, [0] * width))
        if cache.num_slots == 1 and trees is None:
            mask = self._mask_form.next(int(positions[0, 0]), width, cache.end, device=self.device)
        else:
            keys, visible = torch.arange(cache.end)[None], None
            if trees is not None:
                positions, keys, visible = cache.as_trees(positions, cache.by_slot(slots, trees, []))
            mask = self._mask_form.mask(positions, keys, visible=visible, device=self.device)
        hidden = forward(
            sent(tokens, self.device),
            num_heads=1 if cache.without_heads else self.num_heads,
            attention_mask=mask,
            position_ids=sent(positions.clamp(max=self.context - 1), self.device),
            cache=cache,
        )
        if list(slots) != list(range(cache.num_slots)):
            hidden = hidden.index_select(1, sent(torch.tensor(slots), hidden.device))
        return hidden
