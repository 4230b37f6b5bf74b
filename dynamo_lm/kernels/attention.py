"""A model whose attention suits the few queries of a decoding step, on a CPU.

In: an attention module of a copy (see `linear.py`) that calls transformers' attention interface. Out: the same
module with the project's kernel behind that interface. The kernel gives a query the same result whichever queries are
beside it; torch's own, in bfloat16, does not, and then a step of four tokens is not quite four steps of one.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dynamo_lm.kernels import loader

NAME = "dynamo_lm_decode_attention"  # in transformers' register of attention functions
MOST = 64  # queries; more are a prompt, which torch's tiles are made for


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' interface: (rows, heads, queries, width), .. -> (rows, queries, heads, width)."""
    width = query.shape[3]
    if (
        attention_mask is None
        or attention_mask.dtype != torch.bool
        or attention_mask.shape[1] != 1
        or query.shape[2] > MOST
        or width % loader.STRIDE
        or value.shape[3] != width
        or kwargs.get("position_bias") is not None
        or torch.is_grad_enabled()
    ):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    scale = width**-0.5 if scaling is None else scaling
    return torch.ops.dynamo_lm.decode_attention(query, key, value, attention_mask, scale), None


ALL_ATTENTION_FUNCTIONS.register(NAME, attention)


def patch_attention(module: nn.Module, copies: dict[int, PreTrainedConfig]) -> None:
    """Puts the kernel behind a copied module's attention, if it has any that goes through transformers' interface.

    copies: the configurations that were copied for it so far, by the identity of the original.
    """
    config = vars(module).get("config")
    if not isinstance(config, PreTrainedConfig) or isinstance(module, PreTrainedModel) or not loader.available():
        return
    uses_interface = hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS")
    weight = next(module.parameters(), None)
    if not uses_interface or config._attn_implementation != "sdpa" or weight is None or weight.device.type != "cpu":
        return
    if weight.dtype in loader.DTYPES:
        if id(config) not in copies:
            copies[id(config)] = copy.copy(config)
            copies[id(config)]._attn_implementation_internal = NAME
        vars(module)["config"] = copies[id(config)]
