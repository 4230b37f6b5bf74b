"""A model whose linear layers take the shape that a few rows are fastest in, on a CPU in float32.

A decoding step hands each layer one row per new token. In float32 a library's x @ weight^T with 2 to 4 rows takes 1.4 to
3.4 times what it takes with one, although the weight is read once in both; weight @ x^T has a kernel for exactly 4 columns
that takes 1.1 to 1.75 times that (`benchmarks/rows.py`). In: a model. Out: a shallow twin that shares every tensor
with it and only multiplies differently, up to rounding. The model itself is never touched.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

LARGE = 2**14  # entries of a weight whose product outweighs what it takes to transpose it
HUGE = 2**23  # entries from which on up to eight rows are better transposed; output embeddings, mostly

M = TypeVar("M", bound=nn.Module)


class FewRows(nn.Linear):
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


def few_rows(model: M) -> M:
    """A shallow copy of a tree of modules, with `FewRows` for linear layers where those help: on a CPU, in float32."""
    return _twin(model, {})


def _twin(module: M, made: dict[int, nn.Module]) -> M:
    if id(module) in made:  # what is shared stays shared
        return made[id(module)]  # type: ignore[return-value]
    if parametrize.is_parametrized(module):  # an adapter: it cannot be copied, and computes its weight anew each time
        return module
    twin = made[id(module)] = copy.copy(module)
    if type(twin) is nn.Linear and twin.weight.device.type == "cpu" and twin.weight.dtype == torch.float32:
        twin.__class__ = FewRows  # type: ignore[assignment]  # of this copy: same attributes, another product
    twin._modules = {name: child if child is None else _twin(child, made) for name, child in module._modules.items()}
    return twin
