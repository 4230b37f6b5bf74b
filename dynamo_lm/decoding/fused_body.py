"""A base's body whose layers run in a single call, where it is embedding, layers and final norm and nothing else.

In: a body of a model's optimized copy, whose layers are `FusedLayer`s. Out: a module in its place. A step of a small model
is a few milliseconds, of which calling thirty layers one by one takes a tenth. Layers that compute heads, or that somebody
watches, are still called themselves. The body's own code runs where a call asks for anything else.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dynamo_lm.backbone.base_model import InputCapture
from dynamo_lm.decoding.fused_layers import FusedLayer
from dynamo_lm.decoding.kv_cache import RaggedKVCache
from dynamo_lm.kernels.decoder_layer import run_layers

PARTS = {"embed_tokens", "layers", "norm", "rotary_emb"}
_right: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # by a model's own body, whether two steps were right


class FusedBody(nn.Module):
    """What a body's class is derived from: (slots, tokens) -> last_hidden_state (slots, tokens, hidden)."""

    embed_tokens: Any
    rotary_emb: Any
    layers: Any
    norm: Any

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        cache = next(iter(kwargs.values()), None)  # its name depends on transformers' version
        if len(kwargs) == 1 and isinstance(cache, RaggedKVCache) and input_ids is not None and position_ids is not None:
            hidden = self._step(input_ids, attention_mask, position_ids, cache, kwargs)
            if hidden is not None:
                return SimpleNamespace(last_hidden_state=hidden)  # transformers' own outputs take longer to make
        how = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": use_cache, **kwargs}
        return super().forward(input_ids=input_ids, **how)  # type: ignore[misc]

    def _step(self, input_ids: Tensor, mask: Any, positions: Tensor, cache: RaggedKVCache, named: dict) -> Tensor | None:
        """A step of a few tokens; None where the kernels do not compute it. named: the cache by its name."""
        layers: list[FusedLayer] = list(self.layers.children())
        if not layers[0].takes(*input_ids.shape):  # before anything is computed
            return None
        hidden = self.embed_tokens(input_ids)
        turns = self.rotary_emb(hidden, position_ids=positions)
        if not layers[0].fits(hidden, cache, mask, turns):
            return None
        how = {"attention_mask": mask, "position_embeddings": turns, "position_ids": positions, **named}
        for captures, together, run in _runs(layers):
            for capture in captures:
                capture.keep(hidden)
            if together:
                entries = [layer.room(hidden, cache) for layer in run]
                kernels = [layer.kernels[0] for layer in run]
                hidden = run_layers(kernels, hidden, turns, mask, cache.lengths, entries)
            else:
                for layer in run:
                    hidden = layer(hidden, **how)
        return self.norm(hidden)


class _Run(NamedTuple):
    """Neighbouring layers."""

    captures: list[InputCapture]  # of the first one's input
    together: bool  # whether they run in one call
    layers: list[FusedLayer]


def _runs(layers: Sequence[FusedLayer]) -> Iterator[_Run]:
    """Neighbours that run in one call, and others: those with several kernels, and those that foreign hooks watch."""
    run = _Run([], True, [])
    for layer in layers:
        hooks = list(layer._forward_pre_hooks.values())
        captures = [hook for hook in hooks if isinstance(hook, InputCapture)]
        together = len(layer.kernels) == 1 and not layer._forward_hooks and len(captures) == len(hooks)
        captures = captures if together else []  # elsewhere the layer's call runs them
        if captures or together != run.together:
            if run.layers:
                yield run
            run = _Run(captures, together, [])
        run.layers.append(layer)
    yield run


def fuse_body(body: Any, own: nn.Module, cache_argument: str) -> Any:
    """A `FusedBody` in the place of a body; the body, if that does not compute the same.

    Args:
        body: of an optimized copy; its layers are fused, as far as they can be.
        own: the body of the model itself, for which it is found out once.
        cache_argument: the name by which it takes a cache.
    """
    if not _has_the_form(body):
        return body
    fused: Any = copy.copy(body)
    fused.__class__ = type(f"Fused{type(body).__name__}", (FusedBody, type(body)), {})
    if own not in _right:
        _right[own] = _computes_the_same(body, fused, cache_argument)
    return fused if _right[own] else body


def _has_the_form(body: Any) -> bool:
    parts = {name for name, part in body._modules.items() if part is not None}
    if parts != PARTS or body._forward_hooks or body._forward_pre_hooks or not isinstance(body.layers, nn.ModuleList):
        return False
    layers: list[Any] = list(body.layers)
    if not all(isinstance(layer, FusedLayer) for layer in layers):
        return False
    kernels = [kernel for layer in layers for kernel in layer.kernels]
    return len({(kernel.dtype, kernel.size, kernel.width, kernel.max_rows) for kernel in kernels}) == 1


@torch.no_grad()
def _computes_the_same(body: Any, fused: Any, cache_argument: str) -> bool:
    """Whether two steps, of three tokens and of two, give the states that the body's own code gives, bit for bit."""
    tokens, results = torch.arange(5)[None] % body.embed_tokens.num_embeddings, []
    for module in (body, fused):
        cache, states = RaggedKVCache(len(body.layers), 1), []
        for part in tokens.split(3, 1):
            positions = cache.reserve(part.shape[1])
            mask = torch.arange(cache.end) <= positions[:, None, :, None]
            how: dict[str, Any] = {"position_ids": positions, "use_cache": True, cache_argument: cache}
            try:
                given = module(input_ids=part, attention_mask=mask, **how)
            except Exception:  # parts that want other arguments
                return False
            states.append(given.last_hidden_state)
            cache.commit(torch.tensor([part.shape[1]]))
        results.append(torch.cat(states, 1))
    return torch.equal(*results)
