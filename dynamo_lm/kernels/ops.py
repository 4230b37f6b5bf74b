"""Registers the custom ops with torch: the shapes of their results, what they refuse, and that they have no gradients.

The checks are those of the three files in csrc/ that define ops, in the same words, so that a tracer refuses what the kernel
would.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

STRIDE = 16  # entries that the kernels take at a time, as in lanes.h: what they sum over is a multiple of it
DTYPES = (torch.float32, torch.bfloat16)
GROUP = 32  # entries of a row of a quantised weight that share a scale
BESIDE = 16  # rows of a quantised weight that lie side by side
MAX_DIMS = 8


def register() -> None:
    """Register shapes for torch's tracers and the refusal of gradients, once the ops themselves are loaded."""
    fakes: dict[str, Callable[..., Tensor]] = {
        "skinny_matmul": _skinny_matmul,
        "quantized_matmul": _quantized_matmul,
        "decode_attention": _decode_attention,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"dynamo_lm::{name}", fake)

        def refuse(*args: Any, name: str = name, **kwargs: Any) -> None:
            raise RuntimeError(f"{name} has no gradient; use torch's own operations, or call it under torch.no_grad().")

        # The context is set up in the forward, and only where an input requires a gradient.
        torch.library.register_autograd(f"dynamo_lm::{name}", refuse, setup_context=refuse)


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise RuntimeError(otherwise)


def _skinny_matmul(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x: (..., in), weight: (out, in), bias: (out,) -> (..., out)."""
    _require(1 <= x.dim() <= MAX_DIMS, "skinny_matmul: x has no dimension, or more than 8.")
    _require(weight.dim() == 2, "skinny_matmul: weight must have two dimensions, (out, in).")
    _require(x.dtype in DTYPES, "skinny_matmul: x must be float32 or bfloat16.")
    _require(weight.dtype == x.dtype, "skinny_matmul: weight must have the dtype of x.")
    _require(weight.is_contiguous(), "skinny_matmul: weight must be contiguous; pass weight.contiguous().")
    out, size = weight.shape
    _require(x.shape[-1] == size, "skinny_matmul: the last size of x must be the last size of weight.")
    _require(size > 0 and size % STRIDE == 0, "skinny_matmul: the inner size must be a positive multiple of 16.")
    if bias is not None:
        _require(bias.shape == (out,), "skinny_matmul: bias must have one dimension, the first size of weight.")
        fits = bias.dtype == x.dtype and bias.is_contiguous()
        _require(fits, "skinny_matmul: bias must be contiguous and have the dtype of x.")
    return x.new_empty((*x.shape[:-1], out))


def _quantized_matmul(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out: int) -> Tensor:
    """x: (..., in), weight: (blocks, in / 4 or in / 8, 16, 4), scale: (blocks, in / 32, parts, 16) -> (..., out)."""
    _require(1 <= x.dim() <= MAX_DIMS, "quantized_matmul: x has no dimension, or more than 8.")
    _require(x.dtype in DTYPES, "quantized_matmul: x must be float32 or bfloat16.")
    fits = weight.dtype in (torch.int8, torch.uint8)
    _require(fits, "quantized_matmul: weight must be int8, or uint8 with two in a byte.")
    fits = weight.dim() == 4 and weight.shape[2:] == (BESIDE, 4) and weight.is_contiguous()
    _require(fits, "quantized_matmul: weight must be contiguous, (blocks, entries, 16, 4).")
    fits = out > 0 and weight.shape[0] == -(-out // BESIDE)
    _require(fits, "quantized_matmul: weight must have a block for every 16 of out.")
    size = weight.shape[1] * (4 if weight.dtype == torch.int8 else 8)
    _require(x.shape[-1] == size, "quantized_matmul: the last size of x must be the inner size of weight.")
    _require(size > 0 and size % GROUP == 0, "quantized_matmul: the inner size must be a positive multiple of 32.")
    parts = 1 if weight.dtype == torch.int8 else 2
    fits = scale.shape == (weight.shape[0], size // GROUP, parts, BESIDE)
    fits = fits and scale.dtype == torch.int16 and scale.is_contiguous()
    _require(fits, "quantized_matmul: scale must be contiguous int16, (blocks, inner size / 32, 1 or 2 with uint8, 16).")
    if bias is not None:
        _require(bias.shape == (out,), "quantized_matmul: bias must have one dimension, of out entries.")
        fits = bias.dtype == x.dtype and bias.is_contiguous()
        _require(fits, "quantized_matmul: bias must be contiguous and have the dtype of x.")
    return x.new_empty((*x.shape[:-1], out))


def _decode_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """query: (rows, heads, queries, width), key and value: (rows, fewer heads, slots, width), mask: (rows or 1, 1, queries,
    slots) -> (rows, queries, heads, width)."""
    four = all(tensor.dim() == 4 for tensor in (query, key, value, mask))
    _require(four, "decode_attention: query, key, value and mask must have four dimensions.")
    _require(query.dtype in DTYPES, "decode_attention: query must be float32 or bfloat16.")
    same = key.dtype == value.dtype == query.dtype
    _require(same, "decode_attention: key and value must have the dtype of query.")
    _require(mask.dtype == torch.bool, "decode_attention: mask must be bool, true where a key is attended to.")
    _require(key.shape == value.shape, "decode_attention: key and value must have the same shape.")
    rows, heads, queries, width = query.shape
    _require(key.shape[0] == rows, "decode_attention: query and key must have as many rows.")
    divides = key.shape[1] > 0 and heads % key.shape[1] == 0
    _require(divides, "decode_attention: the heads of query must be a multiple of those of key.")
    _require(key.shape[3] == width, "decode_attention: query and key must have one width.")
    _require(width > 0 and width % STRIDE == 0, "decode_attention: the width must be a positive multiple of 16.")
    _require(key.shape[2] > 0, "decode_attention: there are no keys.")
    fits = mask.shape[0] in (1, rows) and mask.shape[1:] == (1, queries, key.shape[2])
    _require(fits, "decode_attention: mask must be (rows or 1, 1, queries, keys).")
    return query.new_empty((rows, queries, heads, width))
