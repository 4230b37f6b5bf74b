"""The memory-bandwidth floor: how fast a one-token step could be if reading weights and cache were all it did.

At batch size 1 every weight is used once per step, so a step cannot be faster than reading them takes. The floor is their
bytes over a bandwidth that is measured on the same machine, with the same number of threads, in the same run. It is a floor
of one-token *steps*: a loop that gets several tokens out of a step may be faster per token than it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from dynamo_lm.kernels.quantized import stored_weights
from dynamo_lm.model.modeling import DynaMoForCausalLM

LARGE = 256 * 2**20  # bytes of a tensor that no CPU cache holds


@dataclass(frozen=True)
class Bandwidth:
    """Bytes a second."""

    read: float  # summing a tensor
    copy: float  # copying one into another, bytes read plus bytes written

    @property
    def best(self) -> float:
        return max(self.read, self.copy)


def weight_bytes(base: PreTrainedModel) -> int:
    """Bytes of weights that a one-token step must read.

    All weights of the base but embedding tables, of which a step reads one row; a table that also is the output
    embedding is read whole, once. Of a mixture of experts this counts every expert, which is more than a step reads.
    """
    output = base.get_output_embeddings()
    read_whole = set(map(id, stored_weights(output))) if output is not None else set()
    tables = {id(t) for module in base.modules() if isinstance(module, nn.Embedding) for t in stored_weights(module)}
    return sum(t.nbytes for t in stored_weights(base) if id(t) in read_whole or id(t) not in tables)


def head_bytes(model: DynaMoForCausalLM, num_heads: int) -> int:
    """Bytes of their own weights that heads 2..n add to a step; a shared output embedding read again is not counted."""
    own = set(map(id, stored_weights(model.base)))
    return sum(t.nbytes for t in stored_weights(model.heads[: num_heads - 1]) if id(t) not in own)


def cache_bytes(base: PreTrainedModel, length: float) -> float:
    """Bytes of keys and values of one text of `length` tokens (a mean, so it need not be whole)."""
    config = base.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size * length * base.dtype.itemsize


def floor_seconds(base: PreTrainedModel, length: float, bandwidth: float, *, batch: int = 1) -> float:
    """Least seconds of a one-token step of `batch` texts of `length` tokens each, at so many bytes a second."""
    return (weight_bytes(base) + batch * cache_bytes(base, length)) / bandwidth


def measure_bandwidth(device: torch.device, *, size: int = LARGE, repetitions: int = 3) -> Bandwidth:
    """Bandwidth of the device's memory with torch's current number of threads, median of some repetitions.

    Args:
        size: bytes of the tensor. Less than the caches hold measures the caches.
        repetitions: of each kind; short ones are looped until they take a while.
    """
    source = torch.ones(max(1, size // 4), device=device)
    target = torch.empty_like(source)
    taken = source.numel() * 4
    read = _rate(lambda: source.sum(), taken, device, repetitions)
    copied = _rate(lambda: target.copy_(source), 2 * taken, device, repetitions)
    return Bandwidth(read, copied)


def _rate(action: Callable[[], object], size: int, device: torch.device, repetitions: int) -> float:
    """Bytes a second of an action that moves `size` bytes."""
    rounds = max(1, 2**26 // size)
    action()  # pages are mapped the first time
    rates = []
    for _ in range(repetitions):
        _wait(device)
        began = time.perf_counter()
        for _ in range(rounds):
            action()
        _wait(device)
        rates.append(rounds * size / (time.perf_counter() - began))
    return sorted(rates)[len(rates) // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
