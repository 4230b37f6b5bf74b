"""The decoder layer of a head of the EAGLE-3 form, and the keys and values that it keeps while it drafts.

Imports nothing of this package: `dynamo-lm export --to mtp` writes a copy of this file beside the weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm


class DraftCache:
    """Keys and values of one sequence's positions in the head's layer."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None  # (1, kv heads, room, size)
        self.values: Tensor | None = None
        self.length = 0  # positions held; a smaller number forgets the rest, which is written over

    def room(self, new: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values with room for so many new positions; like: those of some positions, (1, kv heads, any, size)."""
        if self.keys is None or self.values is None:
            self.keys, self.values = like[:, :, :0], like[:, :, :0]
        lacking = self.length + new - self.keys.shape[2]
        if lacking > 0:
            more = max(self.keys.shape[2], lacking, 64)
            self.keys, self.values = F.pad(self.keys, (0, 0, 0, more)), F.pad(self.values, (0, 0, 0, more))
        return self.keys, self.values

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes new positions, (1, kv heads, new, size) each, and returns all that are held then."""
        start, end = self.length, self.length + keys.shape[2]
        all_keys, all_values = self.room(keys.shape[2], keys)
        all_keys[:, :, start:end], all_values[:, :, start:end] = keys, values
        self.length = end
        return all_keys[:, :, :end], all_values[:, :, :end]


class Eagle3Layer(nn.Module):
    """A decoder layer whose attention reads the embedding of a token and a state side by side."""

    def __init__(self, config: PreTrainedConfig, made: dict[str, Any]):
        super().__init__()
        size, wide = config.hidden_size, config.intermediate_size
        self.heads = config.num_attention_heads
        self.kv_heads = getattr(config, "num_key_value_heads", None) or self.heads
        self.head_size = getattr(config, "head_dim", None) or size // self.heads
        self.scale = self.head_size**-0.5
        self.theta = rope_theta(config)
        self.input_layernorm = norm_of(config, made)
        self.hidden_norm = norm_of(config, made)
        self.self_attn = _linears(
            made,
            q_proj=(2 * size, self.heads * self.head_size),
            k_proj=(2 * size, self.kv_heads * self.head_size),
            v_proj=(2 * size, self.kv_heads * self.head_size),
            o_proj=(self.heads * self.head_size, size),
        )
        self.post_attention_layernorm = norm_of(config, made)
        self.mlp = _linears(made, gate_proj=(size, wide), up_proj=(size, wide), down_proj=(wide, size))

    def project(self, embedding: Tensor, state: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (batch, kv heads, group, length, size), keys and values (batch, kv heads, length, size)."""
        x = torch.cat([self.input_layernorm(embedding), self.hidden_norm(state)], -1)
        q, k, v = (
            self.self_attn[f"{name}_proj"](x).unflatten(-1, (-1, self.head_size)).transpose(1, 2) for name in ("q", "k", "v")
        )
        turns = self.turns(positions, q)
        return _turned(q, turns).unflatten(1, (self.kv_heads, -1)), _turned(k, turns), v

    def finish(self, state: Tensor, mixed: Tensor) -> Tensor:
        """What the layer returns; state: what entered it, mixed: (batch, kv heads, group, length, size)."""
        state = state + self.self_attn["o_proj"](mixed.flatten(1, 2).transpose(1, 2).flatten(2))
        x = self.post_attention_layernorm(state)
        return state + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](x)) * self.mlp["up_proj"](x))

    def advance(self, state: Tensor, embedding: Tensor, cache: DraftCache) -> Tensor:
        """One step over new positions of one sequence, (1, new, hidden) each, after those in the cache, which grows."""
        held, new = cache.length, state.shape[1]
        positions = torch.arange(held, held + new, device=state.device)[None]
        q, k, v = self.project(embedding, state, positions)
        keys, values = cache.append(k, v)
        scores = q @ keys[:, :, None].mT * self.scale  # (1, kv heads, group, new, held + new)
        if new > 1:
            later = torch.ones(new, held + new, dtype=torch.bool, device=state.device).triu(held + 1)
            scores = scores.masked_fill(later, -torch.inf)
        return self.finish(state, scores.float().softmax(-1).to(values.dtype) @ values[:, :, None])

    def turns(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of rotary positions, (batch, 1, length, size)."""
        steps = torch.arange(0, self.head_size, 2, device=like.device, dtype=torch.float32) / self.head_size
        angles = positions[:, None, :, None].float() * self.theta**-steps
        angles = torch.cat([angles, angles], -1)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rope_theta(config: PreTrainedConfig) -> float:
    """The base of the base's rotary positions; those of the head are never scaled, which is what every reader does alike."""
    stated = getattr(config, "rope_parameters", None) or {}
    if not any(isinstance(value, dict) for value in stated.values()):
        return float(stated.get("rope_theta") or 10000.0)
    return float(stated.get("full_attention", {}).get("rope_theta") or 10000.0)


def norm_of(config: PreTrainedConfig, made: dict[str, Any]) -> nn.Module:
    return LlamaRMSNorm(config.hidden_size, eps=rms_norm_eps(config)).to(**made)


def rms_norm_eps(config: PreTrainedConfig) -> float:
    return float(getattr(config, "rms_norm_eps", None) or 1e-5)


def _linears(made: dict[str, Any], **sizes: tuple[int, int]) -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(*size, bias=False, **made) for name, size in sizes.items()})


def _turned(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions: pairs are (i, i + size / 2)."""
    cosine, sine = turns
    low, high = x.chunk(2, -1)
    return x * cosine + torch.cat([-high, low], -1) * sine
