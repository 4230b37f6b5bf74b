"""The last decoder layer and the heads' layers as one wider layer, for decoding.

All n of them have one class and one input, the stem's output (docs/method.md section 1). Called one by one they cost n times
the dozens of small operations around their few matrix products. Here the layer's own code runs once, on a batch in which
every sequence appears n times, head by head; only modules that hold weights are called once per head, each on its part of
the batch. In: decoder layers. Out: one `StackedHeads`, if they can be stacked. Keys and values of all heads are in the last
layer's cache entry. Knows no architecture.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynamo_lm.backbone.base_model import copy_attributes


class StackedHeads(nn.Module):
    """n decoder layers of one class, called as one: (rows, width, hidden) -> (n * rows, width, hidden), head by head."""

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        self.layer, self.copies = stack_modules(layers), len(layers)
        copy_attributes(self, layers[0])

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows = hidden_states.shape[0]

        def tiled(value: Any) -> Any:
            """Repeat per-sequence arguments for every head: masks, positions, rotary tables."""
            if isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == rows > 1:
                return torch.cat([value] * self.copies)
            return tuple(map(tiled, value)) if isinstance(value, tuple) else value

        repeated = torch.cat([hidden_states] * self.copies)
        return self.layer(repeated, *map(tiled, args), **{name: tiled(value) for name, value in kwargs.items()})


class _PerHead(nn.Module):
    """The same module of every head, each called on its part of the batch."""

    def __init__(self, modules: Sequence[nn.Module]):
        super().__init__()
        self.heads = nn.ModuleList(modules)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        count = len(self.heads)
        parts = [value.chunk(count) if isinstance(value, Tensor) else (value,) * count for value in args]
        named = {
            name: value.chunk(count) if isinstance(value, Tensor) else (value,) * count for name, value in kwargs.items()
        }
        outputs = [
            module(*(part[i] for part in parts), **{name: part[i] for name, part in named.items()})
            for i, module in enumerate(self.heads)
        ]
        if isinstance(outputs[0], tuple):
            return tuple(map(torch.cat, zip(*outputs, strict=True)))
        return torch.cat(outputs)

    def __getattr__(self, name: str) -> Any:
        """Attributes that a layer reads from its parts, such as a weight's dtype, are the same for all heads."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(next(iter(self._modules["heads"].children())), name)  # type: ignore[union-attr]


def can_stack(layers: Sequence[nn.Module]) -> bool:
    """Whether layers can run as one: same modules and settings (but for the cache entry), no weights in nested modules, and
    no hooks, which belong to one of them."""
    if any(map(has_hooks, layers)):
        return False
    trees = [dict(layer.named_modules()) for layer in layers]
    if any(tree.keys() != trees[0].keys() for tree in trees):
        return False
    for name, module in trees[0].items():
        others = [tree[name] for tree in trees[1:]]
        if any(type(other) is not type(module) or settings(other) != settings(module) for other in others):
            return False
        if _holds_weights(module) and any(_holds_weights(part) for part in module.modules() if part is not module):
            return False
        if getattr(getattr(module, "config", None), "scale_attn_by_inverse_layer_idx", False):
            return False  # a layer's index changes what it computes
    return True


def has_hooks(module: nn.Module) -> bool:
    """Whether a module or a part of it has forward hooks, or a forward of its own in place of its class's."""
    return any(part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in module.modules())


def _holds_weights(module: nn.Module) -> bool:
    return any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))


def settings(module: nn.Module) -> dict[str, Any]:
    """What a module was made with, but for its place among the layers."""
    plain = (bool, int, float, str, type(None))
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, plain) and name != "layer_idx" and not name.startswith("_")
    }


def stack_modules(modules: Sequence[nn.Module]) -> nn.Module:
    """A shallow copy of the first module in which every part with weights of its own is that of all of them."""
    first = modules[0]
    if _holds_weights(first):
        return _PerHead(modules)
    twin = copy.copy(first)
    twin._forward_hooks = type(first._forward_hooks)()
    twin._modules = {
        name: None if child is None else stack_modules([module._modules[name] for module in modules])  # type: ignore[misc]
        for name, child in first._modules.items()
    }
    return twin
