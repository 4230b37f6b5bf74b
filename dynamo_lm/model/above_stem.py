"""The part of a model above its stem, to train heads of a frozen base from stem states that are on disk."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from dynamo_lm.backbone.last_layer import last_layer_only
from dynamo_lm.model.modeling import DynaMoForCausalLM


class AboveStem:
    """A model over the same parameters whose `hidden` starts from stem states: the last layer and the heads alone."""

    def __init__(self, model: DynaMoForCausalLM):
        self.model = copy.copy(model)
        self.model._modules = dict(model._modules)
        self.model.base, self.entry = last_layer_only(model.base)
        self.model._last_layer = (model.last_layer,)

    def hidden(self, stem: Tensor, tokens: Tensor, **kwargs: Any) -> Tensor:
        """`DynaMoForCausalLM.hidden` of tokens, (batch, length), whose stem states are known, (batch, length, hidden)."""
        self.entry.stem = stem.to(self.model.dtype)
        try:
            return self.model.hidden(tokens, **kwargs)
        finally:
            self.entry.stem = None


class AboveFeatures:
    """A model with a sequential head whose `hidden` starts from the features and the base's final states."""

    def __init__(self, model: DynaMoForCausalLM):
        self.model = model

    def hidden(self, stored: Tensor, tokens: Tensor, *, num_heads: int | None = None, **kwargs: Any) -> Tensor:
        """`DynaMoForCausalLM.hidden` of tokens, (batch, length); stored: (batch, length, 4 hidden)."""
        size, n = stored.shape[-1] // 4, self.model.num_heads if num_heads is None else num_heads
        features, final = stored.to(self.model.dtype).split([3 * size, size], -1)
        return final[None] if n == 1 else self.model.sequential_hidden(features, final, tokens, n, **kwargs)
