"""Linear layers and attention for the few rows of a decoding step, on a CPU.

A step passes each layer one row per new token. With 2 to 4 rows a library's x @ weight^T takes 1.5 to 4.7 times as long as
with one, although the weight is read once in both cases (`benchmarks/rows.py`). This package's kernel takes 0.4 to 1.0 times
as long as the library with one row, in float32 and bfloat16, and gives a row the same result in any batch. Where it is not
built, weight @ x^T helps in float32: libraries have a kernel for exactly 4 columns. In: a model. Out: a shallow copy that
shares every tensor with it and multiplies differently, up to rounding. The model itself is not changed.
"""

from __future__ import annotations

import copy
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedConfig

from dynamo_lm.errors import InputError
from dynamo_lm.kernels import attention, loader, ops
from dynamo_lm.private_interfaces import arranged_product, arranged_weight, multiplies_bfloat16

MAX_ROWS = 16  # with more a library is as fast in float32
LARGE = 2**14  # entries of a weight from which a product outweighs transposing the rows
HUGE = 2**23  # entries of a weight from which up to eight rows are faster transposed; output embeddings, mostly

M = TypeVar("M", bound=nn.Module)


class SkinnyLinear(nn.Linear):
    """A linear layer that multiplies few rows with the kernel."""

    max_rows: int  # up to which it is faster than torch's product

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if not 0 < x.numel() <= self.max_rows * self.in_features or torch.is_grad_enabled() or x.dtype != self.weight.dtype:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.dynamo_lm.skinny_matmul(x, self.weight, self.bias)


class ArrangedLinear(SkinnyLinear):
    """A linear layer that multiplies many rows with a copy of its weight in oneDNN's layout.

    With a weight as torch keeps it, oneDNN rearranges it in every call, which takes longer than the product itself up to
    some hundred rows: a step of 64 rows through SmolLM2 takes half the time (LOG.md).
    """

    arranged: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if x.numel() <= self.max_rows * self.in_features or torch.is_grad_enabled() or x.dtype != self.weight.dtype:
            return super().forward(x)
        return arranged_product(x, self.arranged, self.bias)


class TransposedLinear(nn.Linear):
    """A linear layer that multiplies 2 to 4 rows (8, if the weight is huge) as weight @ x^T, 3 of them filled up to 4."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        size = self.weight.numel()
        rows = x.numel() // self.in_features
        if not 1 < rows <= (8 if size >= HUGE else 4) or size < LARGE or torch.is_grad_enabled():
            return F.linear(x, self.weight, self.bias)
        flat, bias = x.reshape(rows, self.in_features), self.bias
        columns = (F.pad(flat, (0, 0, 0, 1)) if rows % 4 == 3 else flat).t()  # (in, rows): filled up, then transposed
        out = self.weight @ columns if bias is None else torch.addmm(bias[:, None], self.weight, columns)
        return out[:, :rows].t().contiguous().unflatten(0, x.shape[:-1])


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is stored number by number, not by a class of its own as torchao's quantised weights are."""
    return type(tensor) in (Tensor, nn.Parameter)


def unpacked(tensor: Tensor) -> Tensor:
    """The numbers of a weight that need not be plain.

    Raises:
        InputError: it is of a kind that cannot be unpacked.
    """
    if is_plain(tensor):
        return tensor.detach()
    if tensor.is_floating_point():  # what it stands for; others, as bitsandbytes' weights, are what is stored
        return tensor.detach().dequantize()
    raise InputError(
        f"The base's weights are of the kind {type(tensor).__name__}, which heads cannot read; quantise it with torchao, or "
        "open it without quantization_config."
    )


def optimize_modules(model: M) -> M:
    """A shallow copy of a tree of modules with products and attention for few rows, where those help: on a CPU."""
    return _twin(model, {}, {})


def arrange_for_batches(model: nn.Module, rows: int) -> None:
    """Let an optimized model multiply batches of about so many rows faster, for a second copy of its weights.

    In bfloat16 on CPUs that multiply it; elsewhere nothing changes.
    """
    for layer in model.modules():
        if type(layer) is SkinnyLinear and layer.weight.dtype == torch.bfloat16 and multiplies_bfloat16():
            arranged = arranged_weight(layer.weight, rows)
            if arranged is not None:
                layer.__class__ = ArrangedLinear  # type: ignore[assignment]
                layer.arranged = arranged


def _twin(module: M, made: dict[int, nn.Module], configs: dict[int, PreTrainedConfig]) -> M:
    if id(module) in made:  # shared modules stay shared
        return made[id(module)]  # type: ignore[return-value]
    if parametrize.is_parametrized(module):  # an adapter, which cannot be copied and computes its weight in each call
        return module
    if "forward" in vars(module):  # accelerate's, or a user's own: from a copy it would call the original's parts
        return module
    twin = made[id(module)] = copy.copy(module)
    if type(twin) is nn.Linear and twin.weight.device.type == "cpu":
        _replace_linear(cast(nn.Linear, twin))
    attention.patch_attention(twin, configs)
    twin._modules = {
        name: child if child is None else _twin(child, made, configs) for name, child in module._modules.items()
    }
    return twin


def _replace_linear(layer: nn.Linear) -> None:
    """Give a layer of a copy the class that suits its weight: same attributes, another product."""
    weight = layer.weight
    if not is_plain(weight):
        return
    fits = layer.in_features % ops.STRIDE == 0 and weight.is_contiguous() and weight.dtype in ops.DTYPES
    if fits and loader.available():
        layer.__class__ = SkinnyLinear  # type: ignore[assignment]
        slow = weight.dtype == torch.bfloat16 and not multiplies_bfloat16()
        layer.max_rows = 2**31 if slow else MAX_ROWS  # type: ignore[assignment]
    elif weight.dtype == torch.float32:
        layer.__class__ = TransposedLinear  # type: ignore[assignment]
