"""Attention for the few queries of a decoding step, on a CPU.

In: an attention module of a copy (see `linear.py`) that uses transformers' attention interface. Out: the same module with
this package's kernel as its attention function. The kernel gives a query the same result in any batch; torch's own, in
bfloat16, does not, and then a step of four tokens is not exactly four steps of one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dynamo_lm.kernels import loader, ops
from dynamo_lm.private_interfaces import attention_implementation, uses_attention_interface, with_attention

NAME = "dynamo_lm_decode_attention"  # in transformers' AttentionInterface
MAX_QUERIES = 64  # more are a prompt, which torch's tiles are made for


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
        or query.shape[2] > MAX_QUERIES
        or width % ops.STRIDE
        or value.shape[3] != width
        or kwargs.get("position_bias") is not None
        or torch.is_grad_enabled()
    ):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    scale = width**-0.5 if scaling is None else scaling
    return torch.ops.dynamo_lm.decode_attention(query, key, value, attention_mask, scale), None


AttentionInterface.register(NAME, attention)


def patch_attention(module: nn.Module, copies: dict[int, PreTrainedConfig]) -> None:
    """Make the kernel a copied module's attention function, if it is an attention module that uses transformers' interface.

    copies: the configurations that were copied so far, by the identity of the original.
    """
    config = vars(module).get("config")
    if not isinstance(config, PreTrainedConfig) or isinstance(module, PreTrainedModel) or not loader.available():
        return
    if attention_implementation(config) != "sdpa" or not uses_attention_interface(module):
        return
    tensors = [*module.parameters(), *module.buffers()]  # a quantised layer has none but buffers
    floats = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    if tensors and all(tensor.device.type == "cpu" for tensor in tensors) and floats <= set(ops.DTYPES):
        vars(module)["config"] = copies.setdefault(id(config), with_attention(config, NAME))


def uses_kernel(module: nn.Module) -> bool:
    """Whether a module is one that `patch_attention` changed."""
    config = vars(module).get("config")
    return isinstance(config, PreTrainedConfig) and attention_implementation(config) == NAME
