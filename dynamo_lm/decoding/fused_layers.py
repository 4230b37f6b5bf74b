"""Decoder layers of Llama's form that compute a decoding step in one call each, in a model that is arranged for decoding.

In: the decoder layers of a model's optimized copy. Out: the same list, in which layers that the kernel computes stand behind
a `FusedLayer`. No architecture is named: the parts of a layer are found by their roles, and one step on random states must
give what the layer's own code gives. Whatever a call asks for that the kernel does not do goes through the layer's own code.
Steps that read no head leave the heads' layers out; the next one that does reads all their tokens at once.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynamo_lm.backbone.base_model import copy_attributes
from dynamo_lm.backbone.eagle3_layer import DraftCache, Eagle3Layer
from dynamo_lm.backbone.stacked_heads import has_hooks, settings
from dynamo_lm.decoding.kv_cache import RaggedKVCache, StepWithoutHeads
from dynamo_lm.kernels.attention import MAX_QUERIES, uses_kernel
from dynamo_lm.kernels.decoder_layer import LayerKernel, LayerParts, run_layers

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
HEAD_NORMS = {"q_norm", "k_norm"}
GATED = {"gate_proj", "up_proj", "down_proj"}
LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_right: dict[str, bool] = {}  # by what a layer is, whether a step was right
EXACT, ROUNDED = 1e-4, 0.05  # error that is rounding, relative to the largest entry: in float32, and in fewer bits


class FusedLayer(nn.Module):
    """One decoder layer, or several that see the same states as heads do; (slots, tokens, hidden) -> the same, by layer."""

    def __init__(self, layer: nn.Module, kernels: Sequence[LayerKernel], index: int):
        """layer: what it stands for, whose own code runs where the kernel does not fit; index: of its entry in a cache."""
        super().__init__()
        self.layer, self.kernels, self.index = layer, list(kernels), index
        self.max_rows = min(kernel.max_rows for kernel in kernels)  # of each product; every layer has its own
        self.fitted = False  # whether the kernels computed a step before
        copy_attributes(self, layer)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        cache: Any = kwargs.get("past_key_values", kwargs.get("cache"))
        mask: Any = kwargs.get("attention_mask")
        turns: Any = kwargs.get("position_embeddings")
        if args or not self.fits(hidden_states, cache, mask, turns):
            return self.layer(hidden_states, *args, **kwargs)
        slots, self.fitted = hidden_states.shape[0], True
        keys, values = self.room(hidden_states, cache)
        kernels, results = self.kernels, []
        if cache.without_heads and self.skips_heads(*hidden_states.shape[:2]):
            cache.unread.append(StepWithoutHeads(int(cache.lengths[0]), hidden_states, turns, mask))
            kernels = kernels[:1]
        elif cache.unread and len(kernels) > 1:
            self._read_unread(cache, keys, values)
        for i, kernel in enumerate(kernels):
            part = slice(i * slots, (i + 1) * slots)
            results.append(run_layers([kernel], hidden_states, turns, mask, cache.lengths, [(keys[part], values[part])]))
        return results[0] if len(results) == 1 else torch.cat(results)

    def skips_heads(self, slots: int, tokens: int) -> bool:
        """Whether a step of such a size can do without the kernels of heads, which a later step makes up for."""
        return self.fitted and slots == 1 and len(self.kernels) > 1 and self.takes(slots, tokens)

    def _read_unread(self, cache: RaggedKVCache, keys: Tensor, values: Tensor) -> None:
        """Writes the keys and values of heads for the verified tokens of steps that did without them, many at a time."""
        ends = [*(step.start for step in cache.unread[1:]), int(cache.lengths[0])]
        counts = [end - step.start for step, end in zip(cache.unread, ends, strict=True)]
        hidden = torch.cat([step.hidden[:, :n] for step, n in zip(cache.unread, counts, strict=True)], 1)
        cosine, sine = (
            torch.cat([step.turns[i][:, :n] for step, n in zip(cache.unread, counts, strict=True)], 1) for i in (0, 1)
        )
        masks = [
            F.pad(step.mask[:, :, :n], (0, cache.end - step.mask.shape[3]))
            for step, n in zip(cache.unread, counts, strict=True)
        ]
        mask, start, most = torch.cat(masks, 2), cache.unread[0].start, min(MAX_QUERIES, self.max_rows)
        for at in range(0, hidden.shape[1], most):
            some = slice(at, at + most)
            for i, kernel in enumerate(self.kernels[1:], 1):
                entry = keys[i : i + 1], values[i : i + 1]
                turns, starts = (cosine[:, some], sine[:, some]), torch.tensor([start + at])
                run_layers([kernel], hidden[:, some], turns, mask[:, :, some], starts, [entry])
        cache.unread.clear()

    def room(self, hidden: Tensor, cache: RaggedKVCache) -> tuple[Tensor, Tensor]:
        """Keys and values of the layer with room for the write in progress; hidden: (slots, tokens, hidden)."""
        first = self.kernels[0]
        return cache.room(self.index, (hidden.shape[0] * len(self.kernels), first.kv_heads, 0, first.width), hidden)

    def takes(self, slots: int, tokens: int) -> bool:
        """Whether the kernel computes steps of such a size."""
        return tokens <= MAX_QUERIES and 0 < slots * tokens <= self.max_rows

    def fits(self, hidden: Tensor, cache: Any, mask: Any, turns: Any) -> bool:
        """Whether the kernel computes a step of such a call: its states, cache, mask and rotary positions."""
        return (
            isinstance(cache, RaggedKVCache)
            and isinstance(mask, Tensor)
            and mask.dtype == torch.bool
            and mask.shape[1] == 1
            and mask.shape[3] == cache.end
            and isinstance(turns, tuple)
            and turns[0].shape[-1] == self.kernels[0].width
            and turns[0].dtype == hidden.dtype == self.kernels[0].dtype
            and self.takes(*hidden.shape[:2])
            and not torch.is_grad_enabled()
        )


class FusedDraftLayer(nn.Module):
    """The layer of an eagle3 head, while it drafts."""

    def __init__(self, layer: Eagle3Layer, kernel: LayerKernel):
        super().__init__()
        self.layer, self.kernel = layer, kernel

    @classmethod
    def of(cls, layer: Any) -> Any:
        """An `Eagle3Layer` in one call; itself, if the kernel does not compute it."""
        attention, gated = layer.self_attn, layer.mlp
        try:
            kernel = LayerKernel(
                LayerParts(
                    [attention[f"{name}_proj"] for name in "qkvo"]
                    + [gated[f"{name}_proj"] for name in ("gate", "up", "down")],
                    input_norm=layer.hidden_norm.weight,
                    post_norm=layer.post_attention_layernorm.weight,
                    embedding_norm=layer.input_layernorm.weight,
                    eps=layer.input_layernorm.variance_epsilon,
                    scaling=layer.scale,
                    width=layer.head_size,
                )
            )
        except ValueError:
            return layer
        return cls(layer, kernel)

    def advance(self, state: Tensor, embedding: Tensor, cache: DraftCache) -> Tensor:
        """As `Eagle3Layer.advance`."""
        held, new, kernel = cache.length, state.shape[1], self.kernel
        if new > min(MAX_QUERIES, kernel.max_rows) or not state.dtype == embedding.dtype == kernel.dtype:
            return self.layer.advance(state, embedding, cache)
        entry = cache.room(new, state.new_empty((1, kernel.kv_heads, 0, kernel.width)))
        places = torch.arange(held, held + new)
        cosine, sine = self.layer.turns(places[None], state)
        mask = torch.arange(held + new) <= places[None, None, :, None]
        cache.length = held + new
        turns = cosine[:, 0], sine[:, 0]
        return run_layers([kernel], state, turns, mask, torch.tensor([held]), [entry], embedding.contiguous())


def fuse_layers(layers: nn.ModuleList, heads: Sequence[nn.Module] = ()) -> None:
    """Replaces the layers of a model's optimized copy that the kernel computes, in the list itself.

    Args:
        layers: the base's decoder layers, or what stands in their place.
        heads: the layers that the last one computes, where it is a `StackedHeads`.
    """
    for index, layer in enumerate(layers):
        together = heads if heads and index == len(layers) - 1 else [layer]
        kernels = [kernel for part in together if (kernel := kernel_of(part)) is not None]
        if len(kernels) == len(together):
            layers[index] = FusedLayer(layer, kernels, index)


def kernel_of(layer: nn.Module) -> LayerKernel | None:
    """The kernel of one layer; None if it does not compute what the layer's code does, which layers that only differ in
    their weights show once in a process."""
    parts = None if has_hooks(layer) else parts_of(layer)
    try:
        kernel = None if parts is None else LayerKernel(parts)
    except ValueError:
        return None
    if kernel is None:
        return None
    kind = repr([(name, type(part), settings(part)) for name, part in layer.named_modules()])
    if kind not in _right:
        _right[kind] = is_right(layer, kernel)
    return kernel if _right[kind] else None


def parts_of(layer: Any) -> LayerParts | None:
    """The parts of a layer by their roles; None if it is of another form."""
    if not _has(layer, LAYER) or not _has(layer.self_attn, ATTENTION, HEAD_NORMS) or not _has(layer.mlp, GATED):
        return None
    attention, gated = layer.self_attn, layer.mlp
    of_heads = [part for name in sorted(HEAD_NORMS) if (part := attention._modules.get(name)) is not None]
    norms = [layer.input_layernorm, layer.post_attention_layernorm, *of_heads]
    eps: set[Any] = {getattr(norm, "variance_epsilon", None) for norm in norms}
    if not uses_kernel(attention) or len(eps) != 1 or None in eps or len(of_heads) == 1:
        return None
    return LayerParts(
        [
            attention.q_proj,
            attention.k_proj,
            attention.v_proj,
            attention.o_proj,
            gated.gate_proj,
            gated.up_proj,
            gated.down_proj,
        ],
        input_norm=layer.input_layernorm.weight,
        post_norm=layer.post_attention_layernorm.weight,
        query_norm=attention.q_norm.weight if of_heads else None,
        key_norm=attention.k_norm.weight if of_heads else None,
        eps=eps.pop(),
        scaling=attention.scaling,
        width=attention.head_dim,
    )


def _has(module: nn.Module, names: set[str], more: Collection[str] = ()) -> bool:
    """Whether a module has these parts, possibly more of those, and no others with tensors."""
    parts = module._modules
    others = (part for name, part in parts.items() if part is not None and name not in names and name not in more)
    return parts.keys() >= names and not any(True for part in others for _ in (*part.parameters(), *part.buffers()))


@torch.no_grad()
def is_right(layer: Any, kernel: LayerKernel) -> bool:
    """Whether two steps of two sequences on random states, the second behind different lengths, give what the layer's code
    gives: states, keys and values."""
    generator = torch.Generator().manual_seed(0)
    index, slots, tokens = layer.self_attn.layer_idx, 2, 3

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(kernel.dtype)

    steps = []
    for _ in range(2):
        angles = random(slots, tokens, kernel.width // 2).repeat(1, 1, 2)
        steps.append((random(slots, tokens, kernel.size), (angles.cos(), angles.sin())))
    results = []
    for run in (layer, FusedLayer(layer, [kernel], index)):
        cache = RaggedKVCache(index + 1, slots)
        for hidden, turns in steps:
            positions = cache.reserve(tokens)
            mask = torch.arange(cache.end) <= positions[:, None, :, None]
            how: dict[str, Any] = {"attention_mask": mask, "position_embeddings": turns, "position_ids": positions}
            try:
                state = run(hidden, past_key_values=cache, **how)
            except Exception:  # a layer that wants other arguments
                return False
            cache.commit(torch.tensor([1, 3]))
        if not isinstance(state, Tensor):
            return False
        results.append([state - hidden, *(part[:, :, : cache.end] for part in cache.buffers()[-1])])
    exact = kernel.dtype == torch.float32 and not kernel.rounds
    errors = [((own - fused).abs().max() / own.abs().max()).item() for own, fused in zip(*results, strict=True)]
    return all(error < (EXACT if exact else ROUNDED) for error in errors)
