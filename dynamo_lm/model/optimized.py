"""A model arranged for decoding: the same tensors, in modules that are fast for steps of a few tokens.

In: a model and how many of its heads are used. Out: a shallow copy, in which products and attention suit few rows
(`kernels.linear`), the heads' layers run as one with the last layer (`backbone.stacked_heads`), and layers that the kernels
know whole compute a step in one call (`decoding.fused_layers`), all of them together where nothing lies between
(`decoding.fused_body`). The model itself is not changed.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from dynamo_lm.backbone import offloading
from dynamo_lm.backbone.base_model import body_name, decoder_layers
from dynamo_lm.backbone.stacked_heads import StackedHeads, can_stack
from dynamo_lm.decoding.fused_body import fuse_body
from dynamo_lm.decoding.fused_layers import FusedDraftLayer, fuse_layers
from dynamo_lm.kernels import loader
from dynamo_lm.kernels.linear import optimize_modules


def optimized(model: Any, num_heads: int, *, fuse: bool) -> Any:
    """A `DynaMoForCausalLM` arranged for heads 1..num_heads.

    fuse: use the kernels that compute a whole layer. A compiler cannot look into them, and fuses operations itself.
    """
    offloading.check_own_forward(model.base)
    kernels = loader.available()  # wherever the model is, the sampler runs on the host
    twin = optimize_modules(model)
    twin = copy.copy(model) if twin is model else twin
    layers, config = decoder_layers(twin.base), model.config
    copied = layers is not decoder_layers(model.base)  # else accelerate moves the base
    together: list[nn.Module] = []  # what the last layer computes, if it is
    stacked: nn.Module | None = None
    one_layer = not config.sequential and config.feed == "stem" and config.layers_per_head == 1
    if num_heads > 1 and one_layer and copied:
        extra = [head.layers[0] for head in twin.heads[: num_heads - 1]]
        if model.stack_heads and can_stack([layers[-1], *extra]):
            together = [layers[-1], *extra]
            layers[-1] = stacked = StackedHeads(together)
    if fuse and kernels and copied:
        fuse_layers(layers, together)
        twin.base._modules[body_name(twin.base)] = fuse_body(twin.body, model.body, model.cache_argument)
        if config.sequential:
            twin.sequential_head.midlayer = FusedDraftLayer.of(twin.sequential_head.midlayer)
    twin._last_layer = (stacked or layers[-1],)  # the layer that tells whether it computes all heads
    twin.plain_readout = twin.reads_plainly()
    return twin
