"""Decoder layers of Llama's form in one call, for the few tokens of a decoding step on a CPU (csrc/decoder_layer.cpp).

In: the layers' parts, as a model's optimized copy has them (`linear.py`, `quantized.py`). Out: a `LayerKernel` of each, and
`run_layers`, which computes a step of such layers and writes their keys and values. Called one by one, the two dozen
operations of a layer take longer than its products do in 8 bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynamo_lm.kernels import loader, ops
from dynamo_lm.kernels.linear import SkinnyLinear
from dynamo_lm.kernels.quantized import QuantizedLinear

FLOAT32, BFLOAT16, INT8, INT4 = range(4)
KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.int8: INT8, torch.uint8: INT4}
MATRICES = ("query", "key", "value", "output", "gate", "up", "down")
_P, _N = ctypes.c_void_p, ctypes.c_int64


class _Matrix(ctypes.Structure):
    _fields_ = [(name, _P) for name in ("weight", "scale", "bias")] + [(name, _N) for name in ("out", "in_size", "kind")]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Matrix) for name in MATRICES),
        *((name, _P) for name in ("input_norm", "post_norm", "query_norm", "key_norm", "embedding_norm")),
        *((name, _N) for name in ("size", "heads", "kv_heads", "width", "dtype")),
        *((name, ctypes.c_double) for name in ("eps", "scaling")),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, _P) for name in ("hidden", "embedding", "cosine", "sine")),
        ("turn_step", _N),
        ("mask", _P),
        *((name, _N) for name in ("mask_rows", "mask_step", "mask_line")),
        ("starts", _P),
        *((name, _N) for name in ("slots", "tokens", "end")),
        ("result", _P),
    ]


@dataclass(frozen=True)
class LayerParts:
    """The modules and weights of one layer."""

    linears: Sequence[Any]  # query, key, value, output, gate, up, down
    input_norm: Tensor  # weights, (hidden,)
    post_norm: Tensor
    eps: float
    scaling: float
    width: int  # of a head
    query_norm: Tensor | None = None  # of single heads, (width,)
    key_norm: Tensor | None = None
    embedding_norm: Tensor | None = None  # where attention reads a token's embedding beside the state


class LayerKernel:
    """A layer as the kernel computes it.

    Attributes:
        max_rows: tokens of a step up to which its products are the kernel's, as in the layers themselves.
        rounds: whether weights have 8 or 4 bits.
    """

    def __init__(self, parts: LayerParts):
        """Raises ValueError, with the reason, for parts that the kernel does not compute."""
        self.dtype = parts.input_norm.dtype
        self._kept: list[Tensor] = []  # what the kernel reads stays alive
        linears = parts.linears
        matrices = dict(zip(MATRICES, map(self._matrix, linears), strict=True))
        heads, kv_heads = linears[0].out_features // parts.width, linears[1].out_features // parts.width
        size = linears[3].out_features
        norms = {name: getattr(parts, name) for name in ("input_norm", "post_norm", "embedding_norm")}
        of_heads = {name: getattr(parts, name) for name in ("query_norm", "key_norm")}
        self._layer = _Layer(
            **matrices,
            **{name: self._address(weight, size) for name, weight in norms.items()},
            **{name: self._address(weight, parts.width) for name, weight in of_heads.items()},
            size=size,
            heads=heads,
            kv_heads=kv_heads,
            width=parts.width,
            dtype=KINDS[self.dtype],
            eps=parts.eps,
            scaling=parts.scaling,
        )
        self._check(self._layer)
        self.kv_heads, self.width, self.size = kv_heads, parts.width, size
        self.max_rows = min(getattr(linear, "max_rows", 2**31) for linear in linears)
        self.rounds = any(isinstance(linear, QuantizedLinear) for linear in linears)
        self.address = ctypes.addressof(self._layer)

    def _matrix(self, linear: Any) -> _Matrix:
        if isinstance(linear, QuantizedLinear):
            weight, scale = linear.packed, linear.scale
        elif isinstance(linear, SkinnyLinear) and linear.weight.dtype == self.dtype:
            weight, scale = linear.weight.detach(), None
        else:
            raise ValueError(f"a layer of the kind {type(linear).__name__}")
        out, size = linear.out_features, linear.in_features
        scales = None if scale is None else self._address(scale)
        bias = self._address(linear.bias, out)
        kind = KINDS[weight.dtype]
        return _Matrix(weight=self._address(weight), scale=scales, bias=bias, out=out, in_size=size, kind=kind)

    def _address(self, tensor: Tensor | None, size: int | None = None) -> int | None:
        """Of a contiguous tensor; size: that a vector of the layer's dtype has to have."""
        if tensor is None:
            return None
        if not tensor.is_contiguous() or tensor.device.type != "cpu":
            raise ValueError("a weight that is not contiguous, or not on the CPU")
        if size is not None and (tensor.dtype != self.dtype or tensor.shape != (size,)):
            raise ValueError("a norm or a bias of another type or size than the layer's")
        self._kept.append(tensor.detach())
        return tensor.data_ptr()

    @staticmethod
    def _check(layer: Any) -> None:
        """That products fit together, and that sizes are what the kernel takes at a time."""
        inputs = layer.size * (1 if layer.embedding_norm is None else 2)
        q, k, v, o, gate, up, down = (getattr(layer, name) for name in MATRICES)
        fits = q.in_size == k.in_size == v.in_size == inputs and gate.in_size == up.in_size == layer.size
        fits = fits and q.out == layer.heads * layer.width == o.in_size and k.out == v.out == layer.kv_heads * layer.width
        fits = fits and layer.kv_heads > 0 and layer.heads % layer.kv_heads == 0
        fits = fits and gate.out == up.out == down.in_size and down.out == layer.size
        if not fits:
            raise ValueError("products whose sizes do not fit together")
        if any(size % ops.STRIDE for size in (layer.size, layer.width, gate.out)):
            raise ValueError(f"sizes that are not multiples of {ops.STRIDE}")
        if not q.kind == k.kind == v.kind or gate.kind != up.kind:
            raise ValueError("weights of several kinds beside each other")


def run_layers(
    kernels: Sequence[LayerKernel],
    hidden: Tensor,
    turns: tuple[Tensor, Tensor],
    mask: Tensor,
    starts: Tensor,
    entries: Sequence[tuple[Tensor, Tensor]],
    embedding: Tensor | None = None,
) -> Tensor:
    """A step of layers, each on what the one before it gave; their keys and values are written into the cache's.

    Args:
        kernels: at least one; all of one dtype, size and head width.
        hidden: (slots, tokens, size) of `dtype`.
        turns: cosines and sines of the rotary positions, (slots or 1, tokens, width) of `dtype`.
        mask: (slots or 1, 1, tokens, end) bool, true where a key is attended to.
        starts: (slots,) int64, where each slot's tokens go; start + tokens <= end.
        entries: by layer, keys and values, (slots, kv heads, room, width) of `dtype`, with room for `end`.
        embedding: like hidden, contiguous, for a layer with an `embedding_norm`.

    Returns:
        (slots, tokens, size).
    """
    slots, tokens, _ = hidden.shape
    cosine, sine = turns
    hidden, cosine, sine, mask = (part.contiguous() for part in (hidden, cosine, sine, mask))
    result = torch.empty_like(hidden)
    step = _Step(
        hidden=hidden.data_ptr(),
        embedding=None if embedding is None else embedding.data_ptr(),
        cosine=cosine.data_ptr(),
        sine=sine.data_ptr(),
        turn_step=cosine.stride(0) if len(cosine) > 1 else 0,
        mask=mask.data_ptr(),
        mask_rows=len(mask),
        mask_step=mask.stride(0),
        mask_line=mask.stride(2),
        starts=starts.data_ptr(),
        slots=slots,
        tokens=tokens,
        end=mask.shape[3],
        result=result.data_ptr(),
    )
    layers = (_P * len(kernels))(*(kernel.address for kernel in kernels))
    places = np.array([(keys.data_ptr(), values.data_ptr(), *keys.stride()[:3]) for keys, values in entries])
    loader.decoder_layers()(layers, loader.address(places), len(kernels), ctypes.byref(step))
    return result
