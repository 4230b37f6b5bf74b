"""Attention masks as a base's body takes them; the only file that knows transformers' conventions for them.

In: positions of queries and keys. Out: masks in the form and for the layer types that the base's configuration states.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from dynamo_lm.devices import sent
from dynamo_lm.errors import InputError
from dynamo_lm.private_interfaces import attention_implementation

CHUNKED = "chunked_attention"  # Llama 4's


@dataclass(frozen=True)
class AttentionMaskBuilder:
    """The form of a base's masks, read from its configuration once, because that is slow."""

    windows: dict[str | None, int | None]  # by layer type (one type None: no types): tokens it attends to, None: all
    additive: torch.dtype | None  # of implementations that add the mask, else None
    chunk: int | None = None  # tokens of the chunks that layers of type "chunked_attention" do not see beyond

    @classmethod
    def of(cls, base_config: PreTrainedConfig, dtype: torch.dtype) -> AttentionMaskBuilder:
        """From layer types, window and attention implementation; dtype: of the model.

        Raises InputError for a layer type that is neither full nor sliding attention.
        """
        config = base_config.get_text_config()
        additive = None if attention_implementation(config) in ("sdpa", "flex_attention") else dtype
        window = getattr(config, "sliding_window", None)
        types = getattr(config, "layer_types", None)
        if types is None:
            return cls({None: window}, additive)
        chunk = getattr(config, "attention_chunk_size", None)
        limits = {"full_attention": None, "sliding_attention": window, "chunked_attention": None}
        for kind in set(types):
            if kind not in limits or (kind, window) == ("sliding_attention", None) or (kind, chunk) == (CHUNKED, None):
                raise InputError(f'Layers of type "{kind}" are not supported; full and sliding attention are.')
        return cls({kind: limits[kind] for kind in set(types)}, additive, chunk if CHUNKED in types else None)

    def mask(
        self,
        queries: Tensor,
        keys: Tensor,
        *,
        query_segments: Tensor | None = None,
        key_segments: Tensor | None = None,
        visible: Tensor | None = None,
        device: torch.device | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The mask (or masks, by layer type).

        Args:
            queries: positions of the queries, (batch, q).
            keys: positions of the keys, (batch or 1, k).
            query_segments, key_segments: documents that queries and keys belong to, (batch, q) and (batch, k); a query
                attends to its own document only.
            visible: which keys each query may attend to at all, (batch, q, k) bool; all by default.
            device: of the mask; the positions' own by default.

        Returns:
            (batch, 1, q, k): booleans, or 0 and the lowest number for implementations that add the mask. One such tensor, or
            a dictionary of them by layer type where the configuration lists layer types.
        """
        distance = queries[:, :, None] - keys[:, None, :]  # (batch, q, k)
        allowed, start = distance >= 0, keys.new_zeros(1, 1, 1)  # start: where the query's document does, (batch, q, 1)
        if query_segments is not None and key_segments is not None:
            same_document = query_segments[:, :, None] == key_segments[:, None, :]
            allowed = allowed & same_document
            if self.chunk is not None:
                start = keys[:, None, :].where(same_document, torch.iinfo(keys.dtype).max).amin(2, keepdim=True)
        if visible is not None:
            allowed = allowed & visible
        masks = {
            kind: self._form(allowed if window is None else allowed & (distance < window), device)
            for kind, window in self.windows.items()
        }
        if self.chunk is not None:
            same = (queries[:, :, None] - start) // self.chunk == (keys[:, None, :] - start) // self.chunk
            masks[CHUNKED] = self._form(allowed & same, device)
        return masks.get(None, masks)  # type: ignore[return-value, arg-type]

    def next(self, start: int, width: int, slots: int, *, device: torch.device) -> Tensor | dict[str, Tensor]:
        """`mask` of one sequence's tokens start .. start + width - 1 over slots that hold positions 0, 1, ..

        The same in less time, because every decoding step needs one.
        """
        queries, keys = np.arange(start, start + width)[:, None], np.arange(slots)
        allowed = keys <= queries  # (width, slots)
        masks = {
            kind: self._form(
                torch.from_numpy(allowed if window is None else allowed & (keys > queries - window))[None], device
            )
            for kind, window in self.windows.items()
        }
        if self.chunk is not None:
            same = queries // self.chunk == keys // self.chunk
            masks[CHUNKED] = self._form(torch.from_numpy(allowed & same)[None], device)
        return masks.get(None, masks)  # type: ignore[return-value, arg-type]

    def _form(self, mask: Tensor, device: torch.device | None) -> Tensor:
        mask = mask[:, None] if device is None else sent(mask[:, None], device)
        if self.additive is None:
            return mask
        lowest = torch.finfo(self.additive).min
        return torch.zeros(mask.shape, dtype=self.additive, device=mask.device).masked_fill_(~mask, lowest)
