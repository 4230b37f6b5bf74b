"""The states of three layers of a base, low, middle and high, which a head of the EAGLE-3 form reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dynamo_lm.backbone.base_model import decoder_layers, layer_input
from dynamo_lm.errors import InputError

LEAST_LAYERS = 7  # with fewer two of the three layers coincide, and readers count a layer once


def feature_layers(num_layers: int) -> tuple[int, int, int]:
    """The layers whose inputs are the features: the one choice on which all readers of the files agree.

    Raises:
        InputError: the base has too few layers.
    """
    if num_layers < LEAST_LAYERS:
        raise InputError(
            f"An eagle3 head reads three different layers, which takes {LEAST_LAYERS} or more, and the base has "
            f"{num_layers}; use a deeper base, or --head layer."
        )
    return 2, num_layers // 2, num_layers - 3


@contextmanager
def captured_features(base: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Yields a list that receives the features of each forward of the base, (batch, length, 3 hidden)."""
    layers = decoder_layers(base)
    found: list[Tensor] = []
    parts: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
        parts.append(layer_input(args, kwargs))
        if len(parts) == 3:
            found.append(torch.cat(parts, -1))
            parts.clear()

    hooks = [layers[i].register_forward_pre_hook(keep, with_kwargs=True) for i in feature_layers(len(layers))]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
