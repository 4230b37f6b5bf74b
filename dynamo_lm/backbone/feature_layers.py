"""The states of three layers of a base, low, middle and high, which a head of the EAGLE-3 form reads."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from dynamo_lm.backbone.base_model import decoder_layers
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


def read_layers(base: PreTrainedModel) -> list[nn.Module]:
    """These layers of a base, whose inputs side by side are the features, (batch, length, 3 hidden)."""
    layers = decoder_layers(base)
    return [layers[index] for index in feature_layers(len(layers))]
