"""Weights of 8 or 4 bits for base and heads: a model that is opened so is the base whose text strict decoding keeps."""

from __future__ import annotations

import logging
from typing import Any

from dynamo_lm.backbone.offloading import is_hooked
from dynamo_lm.errors import InputError
from dynamo_lm.kernels import loader
from dynamo_lm.kernels.quantized import FORMATS, quantize_modules

logger = logging.getLogger(__name__)


def check_quantization(weights: str | None) -> None:
    """Raise InputError for anything but None and a name in `FORMATS`."""
    if weights is not None and weights not in FORMATS:
        raise InputError(f'weights is "{weights}"; give {" or ".join(FORMATS)}, or leave it out.')


def quantize(model: Any, weights: str) -> None:
    """Round the weights of a model's base and heads in place; see `dynamo_lm.kernels.quantized`.

    Args:
        model: a `DynaMoForCausalLM`. It cannot be trained afterwards.
        weights: "int8" or "int4".

    Raises:
        InputError: another format, a model that is quantised already, or a base that accelerate moves.
    """
    check_quantization(weights)
    if model.config.quantization is not None:
        raise InputError(f"The weights are {model.config.quantization} already; open the model as it was before.")
    if is_hooked(model.base):
        raise InputError("The base is spread over devices or offloaded; open it whole, without device_map, to round it.")
    model.config.quantization = weights
    lay_out(model)


def lay_out(model: Any) -> None:
    """Round the weights of a model to the format that its configuration names. Waits for the kernels: without them every
    product unpacks its weight."""
    if not loader.available(wait=True):
        logger.warning("Rounded weights are slow here: the compiled kernels are %s.", loader.status())
    quantize_modules(model, FORMATS[model.config.quantization])
