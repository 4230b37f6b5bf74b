"""A base without the layers below its last one, so that stored stem states can be continued.

In: a base model. Out: a shallow copy that shares every parameter and whose last layer gets stored states in place of what
the layers below would compute; the final norm follows as usual. Knows no architecture: layers keep the attributes that
bodies read off them.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dynamo_lm.backbone.base_model import body_name, copy_attributes, decoder_layers, layer_input


class SkippedLayer(nn.Module):
    """Stands for a decoder layer and returns its input, or `stem` if that is set, in the form of the layer's own output."""

    def __init__(self, layer: nn.Module, as_tuple: bool):
        super().__init__()
        self.as_tuple = as_tuple
        self.stem: Tensor | None = None  # (batch, length, hidden)
        copy_attributes(self, layer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = layer_input(args, kwargs) if self.stem is None else self.stem
        return (hidden,) if self.as_tuple else hidden


def last_layer_only(base: PreTrainedModel) -> tuple[PreTrainedModel, SkippedLayer]:
    """The copy, and the layer whose `stem` is handed to the last one."""
    layers, as_tuple = decoder_layers(base), _returns_tuple(base)
    skipped = [SkippedLayer(layer, as_tuple) for layer in layers[:-1]]

    def twin(module: nn.Module) -> nn.Module:
        made = copy.copy(module)
        if module is layers:
            made._modules = {str(i): layer for i, layer in enumerate([*skipped, layers[-1]])}
        else:
            made._modules = {name: child and twin(child) if _holds(child, layers) else child
                             for name, child in module._modules.items()}  # fmt: skip
        return made

    return twin(base), skipped[-1]  # type: ignore[return-value]


def _holds(module: nn.Module | None, layers: nn.ModuleList) -> bool:
    return module is not None and any(part is layers for part in module.modules())


def _returns_tuple(base: PreTrainedModel) -> bool:
    """Whether the base's decoder layers return a tuple, as one forward of one token shows."""
    outputs: list[Any] = []
    body = getattr(base, body_name(base))
    with decoder_layers(base)[0].register_forward_hook(lambda module, args, output: outputs.append(output)), torch.no_grad():
        body(input_ids=torch.zeros(1, 1, dtype=torch.long, device=base.device), use_cache=False)
    return isinstance(outputs[0], tuple)
