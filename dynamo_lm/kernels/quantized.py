"""Linear layers and embeddings whose weights have 8 or 4 bits.

A step of decoding reads every weight, so bits per weight decide how long it takes. Groups of 32 entries of a row share a
scale in float16, and with 4 bits an offset. Rows of x are rounded to 16 bits by the same groups and multiplied in whole
numbers, so that a row's result does not depend on the rows beside it (csrc/quantized_matmul.cpp). llama.cpp's Q8_0 and Q4_1
hold the same numbers: what was read from such a file comes out as it was in the file, as does Q4_0 with 4 bits. In: a model.
Out: the same model, its layers replaced. Its weights cannot be trained any more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dynamo_lm.kernels import loader
from dynamo_lm.kernels.ops import BESIDE, DTYPES, GROUP

FORMATS = {"int8": 8, "int4": 4}
MOST = 2**15 - 1  # the largest entry of x in the kernel
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8)  # of a group's range, that the 16 numbers of 4 bits are tried to span


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight (out, in) in the kernel's order: 16 rows side by side, four entries of each.

    Attributes:
        packed: (blocks, in / 4, 16, 4) int8, or (blocks, in / 8, 16, 4) uint8: 0 to 15, of eight the first four in the
            low halves of the bytes. Rows beyond `out` are 0.
        scale: (blocks, in / 32, 1 or 2, 16): with 4 bits scale and offset. The bits of float16 as int16, which no
            conversion of a model touches.
        shape: (out, in).
        dtype: of the rows that are read.
    """

    packed: Tensor
    scale: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype

    @classmethod
    def of(cls, weight: Tensor, bits: int) -> QuantizedWeight:
        """The nearest that such a weight comes to a float one, (out, in)."""
        out, size = weight.shape
        rows = F.pad(weight.detach(), (0, 0, 0, -out % BESIDE)).unflatten(1, (-1, GROUP))  # (rows, groups, 32)
        parts = [round_groups(part.float(), bits) for part in rows.split(2**8)]
        entries, scale = (torch.cat([part[i] for part in parts]) for i in (0, 1))
        return cls._pack(entries.flatten(1), scale, bits, (out, size), weight.dtype)

    @classmethod
    def _pack(cls, entries: Tensor, scale: Tensor, bits: int, shape: tuple[int, int], dtype: torch.dtype) -> QuantizedWeight:
        """entries: (rows, in) int8, scale: (rows, groups, 1 or 2) float16, in the order of rows."""
        blocks = len(entries) // BESIDE
        if bits == 4:
            eight = entries.to(torch.uint8).view(len(entries), -1, 2, 4)
            entries = eight[:, :, 0] | eight[:, :, 1] << 4  # (rows, in / 8, 4)
        packed = entries.reshape(blocks, BESIDE, -1, 4).transpose(1, 2).contiguous()
        beside = scale.view(torch.int16).unflatten(0, (blocks, BESIDE)).permute(0, 2, 3, 1).contiguous()
        return cls(packed, beside, shape, dtype)

    @property
    def bits(self) -> int:
        return 8 if self.packed.dtype == torch.int8 else 4

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    def entries(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Rows as they are stored: (..., in) int8, and scales (..., groups, 1 or 2) float16."""
        block, lane = ids // BESIDE, ids % BESIDE
        entries, scale = self.packed[block, :, lane], self.scale[block, ..., lane]
        if self.bits == 4:
            entries = torch.stack([entries & 15, entries >> 4], -2).to(torch.int8)  # (..., in / 8, 2, 4)
        return entries.reshape(*ids.shape, self.shape[1]), scale.contiguous().view(torch.float16)

    def __getitem__(self, ids: Tensor) -> Tensor:
        """Rows of the weight, (...) -> (..., in)."""
        entries, scale = self.entries(ids)
        return from_groups(entries.unflatten(-1, (-1, GROUP)), scale).flatten(-2).to(self.dtype)

    def dense(self) -> Tensor:
        """The whole weight, (out, in)."""
        return self[torch.arange(self.shape[0], device=self.device)]

    def select(self, ids: Tensor) -> QuantizedWeight:
        """The weight of these rows alone, ids: (count,)."""
        filled = F.pad(ids, (0, -len(ids) % BESIDE), value=int(ids[0]))
        return self._pack(*self.entries(filled), self.bits, (len(ids), self.shape[1]), self.dtype)


def round_groups(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Numbers (..., 32) in so many bits: int8 (..., 32) in -127 .. 127 or 0 .. 15, and scales (..., 1 or 2) float16.

    With 8 bits the largest magnitude becomes 127. With 4 bits several scales and offsets are tried, and those with the least
    square error stay: the range from the least to the largest (as in Q4_1), smaller ones about the same middle, and the one
    about 0 whose end is the largest magnitude (as in Q4_0).
    """
    if bits == 8:
        scale = (groups.abs().amax(-1, keepdim=True) / 127).half()
        return _whole(groups, scale, -127, 127), scale
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    largest = torch.where(high > -low, high, low)
    ranges = [((high - low) * (share / 15), low + (high - low) * ((1 - share) / 2)) for share in SHARES]
    best = torch.full_like(low, torch.inf)
    entries, kept = torch.zeros_like(groups, dtype=torch.int8), groups.new_zeros((*groups.shape[:-1], 2)).half()
    for step, start in (*ranges, (largest / -8, largest)):
        scale, offset = step.half(), start.half()
        tried, scales = _whole(groups - offset.float(), scale, 0, 15), torch.cat([scale, offset], -1)
        error = (from_groups(tried, scales) - groups).square().sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        entries, kept = torch.where(better, tried, entries), torch.where(better, scales, kept)
        if best.max() == 0:  # as where the numbers come from such a file
            break
    return entries, kept


def from_groups(entries: Tensor, scale: Tensor) -> Tensor:
    """What `round_groups` stands for, (..., 32) float32."""
    numbers = entries.float() * scale[..., :1].float()
    return numbers if scale.shape[-1] == 1 else numbers + scale[..., 1:].float()


def _whole(groups: Tensor, scale: Tensor, least: int, most: int) -> Tensor:
    inverse = torch.where(scale == 0, 0.0, 1 / scale.float())
    return (groups * inverse).round_().clamp_(least, most).to(torch.int8)


def rounded(x: Tensor) -> Tensor:
    """What the kernel makes of x (..., in) before it multiplies: whole numbers to MOST, a float32 scale for every 32."""
    groups = x.float().unflatten(-1, (-1, GROUP))
    largest = groups.abs().amax(-1, keepdim=True)
    # MOST / largest, which torch would round twice; beyond float32 the group is as good as zeros
    factor = torch.where(largest > 0, largest.new_tensor(float(MOST)) / largest, 0.0)
    factor = torch.where(factor == torch.inf, 0.0, factor)
    return ((groups * factor).round() * (largest / MOST)).flatten(-2)


class _Quantized(nn.Module):
    """A layer whose weight is a `QuantizedWeight`."""

    packed: Tensor
    scale: Tensor
    like: Tensor  # empty; has the dtype of the layer's results
    shape: tuple[int, int]

    @property
    def weight(self) -> QuantizedWeight:
        return QuantizedWeight(self.packed, self.scale, self.shape, self.like.dtype)

    def hold(self, weight: QuantizedWeight) -> None:
        """Take a weight in place of the float one."""
        self._parameters.pop("weight", None)
        self.register_buffer("packed", weight.packed)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("like", torch.empty(0, dtype=weight.dtype, device=weight.device), persistent=False)
        self.shape = weight.shape


class QuantizedLinear(_Quantized, nn.Linear):  # type: ignore[misc]  # its weight is no tensor
    """A linear layer with such a weight, for any number of rows."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if x.is_cpu and loader.available():
            if x.dtype not in DTYPES:
                return self._in_float32(x)
            return torch.ops.dynamo_lm.quantized_matmul(x, self.packed, self.scale, self.bias, self.out_features)
        return F.linear(rounded(x).to(x.dtype), self.weight.dense().to(x.dtype), self.bias)

    def _in_float32(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        product = torch.ops.dynamo_lm.quantized_matmul(x.float(), self.packed, self.scale, bias, self.out_features)
        return product.to(x.dtype)

    def select(self, ids: Tensor) -> QuantizedLinear:
        """The layer that gives these outputs alone."""
        short = nn.Linear(self.in_features, len(ids), bias=self.bias is not None, device="meta")
        if self.bias is not None:
            short.bias = nn.Parameter(self.bias.detach()[ids], requires_grad=False)
        return _quantized(short, self.weight.select(ids))


class QuantizedEmbedding(_Quantized, nn.Embedding):  # type: ignore[misc]  # its weight is no tensor
    """An embedding with such a weight."""

    def forward(self, ids: Tensor) -> Tensor:
        """(...) -> (..., hidden)."""
        if ids.is_cpu and ids.numel() and not torch.compiler.is_compiling():  # whose graph would break here
            least, most = ids.aminmax()
            if least < 0 or most >= self.num_embeddings:
                raise IndexError(f"index out of range: the embedding has {self.num_embeddings} tokens.")
        return self.weight[ids]


def _quantized(layer: nn.Linear, weight: QuantizedWeight) -> QuantizedLinear:
    layer.__class__ = QuantizedLinear  # type: ignore[assignment]
    made = cast(QuantizedLinear, layer)
    made.hold(weight)
    return made


def quantize_modules(model: nn.Module, bits: int) -> None:
    """Replace the linear layers of a model, and embeddings that share their weights, in place; no gradients from here on.

    Output embeddings, and what shares their weights, have 8 bits at least, which quality needs (LOG.md). Layers whose inner
    size is not a multiple of 32 stay as they are.
    """
    model.requires_grad_(False)
    vocabulary = max((module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)), default=0)
    made: dict[int, QuantizedWeight] = {}  # by the identity of the float weight, so that what is shared stays so
    kept: list[Tensor] = []  # alive, so that no identity is used again
    for layer in list(_linear_layers(model)):
        kept.append(layer.weight)
        if id(layer.weight) not in made:
            made[id(layer.weight)] = QuantizedWeight.of(layer.weight, 8 if layer.out_features == vocabulary else bits)
        _quantized(layer, made[id(layer.weight)])
    for module in list(model.modules()):
        if isinstance(module, nn.Embedding) and not isinstance(module, _Quantized) and id(module.weight) in made:
            weight, kind = made[id(module.weight)], type(module)
            # A subclass that changes what an embedding gives, as by a factor, calls this class for it.
            module.__class__ = (
                QuantizedEmbedding if kind is nn.Embedding else type(kind.__name__, (kind, QuantizedEmbedding), {})
            )
            cast(QuantizedEmbedding, module).hold(weight)


def is_quantized(model: nn.Module) -> bool:
    """Whether any of its layers has such a weight."""
    return any(isinstance(layer, _Quantized) for layer in model.modules())


def stored_weights(model: nn.Module) -> list[Tensor]:
    """The tensors that hold a model's weights, every shared one once: parameters, and what rounded layers have instead."""
    rounded_ones = (t for layer in model.modules() if isinstance(layer, _Quantized) for t in (layer.packed, layer.scale))
    return list({id(tensor): tensor for tensor in (*model.parameters(), *rounded_ones)}.values())


def _linear_layers(model: nn.Module) -> Iterator[nn.Linear]:
    for module in model.modules():
        if type(module) is nn.Linear and not parametrize.is_parametrized(module) and module.in_features % GROUP == 0:
            yield module
