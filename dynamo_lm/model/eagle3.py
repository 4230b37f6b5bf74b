"""A sequential head of the EAGLE-3 form (arXiv 2503.01840): one decoder layer of Llama's form, unrolled on its own outputs.

In: the states that enter three layers of the base, and the embedding of the token after each. Out: a state per position
from which the token after that is read, and which takes the features' place one position on. Names and computation are
those of the weight files that vLLM, SGLang and llama.cpp read. Knows nothing of how tokens are chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from dynamo_lm.backbone.base_model import body_name, decoder_layers
from dynamo_lm.backbone.feature_layers import feature_layers
from dynamo_lm.decoding.sequential import DraftCache
from dynamo_lm.errors import InputError
from dynamo_lm.model.chain_attention import chain_attention


class Eagle3Head(nn.Module):
    """The head.

    With a draft vocabulary it has an output embedding of its own, over those tokens alone: `d2t[k]` is the id of its k-th
    token less k, `t2d` tells which tokens it knows.
    """

    def __init__(self, base: PreTrainedModel, *, init: str = "random", draft_vocab_size: int = 0):
        """init: "random", or "copy" of the base's last layer where that is of the Llama form."""
        super().__init__()
        config = base.config.get_text_config()
        feature_layers(config.num_hidden_layers)
        output = base.get_output_embeddings().weight
        made: dict[str, Any] = {"dtype": output.dtype, "device": output.device}
        size = config.hidden_size
        self.fc = nn.Linear(3 * size, size, bias=False, **made)
        self.midlayer = _Layer(config, made)
        self.norm = _norm(config, made)
        prepare: Any = base._init_weights
        for module in self.modules():
            prepare(module)
        if init == "copy":
            self._copy(base)
        if draft_vocab_size:
            if draft_vocab_size > len(output):
                raise InputError(f"The draft vocabulary of {draft_vocab_size} is larger than the base's {len(output)}.")
            self.lm_head: Any = nn.Linear(size, draft_vocab_size, bias=False, **made)
            self.register_buffer("d2t", torch.zeros(draft_vocab_size, dtype=torch.long, device=output.device))
            self.register_buffer("t2d", torch.zeros(len(output), dtype=torch.bool, device=output.device))
            self.set_draft_vocabulary(torch.arange(draft_vocab_size), output)
        for module in self.modules():
            module._is_hf_initialized = True  # type: ignore[assignment]  # or transformers' post_init draws it anew

    @torch.no_grad()
    def set_draft_vocabulary(self, ids: Tensor, output: Tensor) -> None:
        """Drafts these tokens alone, (draft_vocab_size,) ascending, read with their rows of the base's `output`."""
        ids = ids.to(output.device)
        self.lm_head.weight.copy_(output[ids])
        self.get_buffer("d2t").copy_(ids - torch.arange(len(ids), device=ids.device))
        self.get_buffer("t2d").zero_()[ids] = True

    @property
    def draft_ids(self) -> Tensor | None:
        """The tokens that it can draft, ascending; None for all."""
        if not hasattr(self, "lm_head"):
            return None
        offsets = self.get_buffer("d2t")
        return offsets + torch.arange(len(offsets), device=offsets.device)

    def first(self, features: Tensor) -> Tensor:
        """Features of the three layers, (batch, length, 3 hidden) -> the state that the layer begins with."""
        return self.fc(features)

    def unroll(self, features: Tensor, embedded: Sequence[Tensor], positions: Tensor, visible: Tensor) -> list[Tensor]:
        """The states of each step for every position at which drafting may begin (training-time test).

        Step k of the chain that begins at position i stands at position i + k - 1. It sees what the first step makes of
        positions up to i, where features are known, and its own chain's later steps, whose features are not.

        Args:
            features: (batch, length, 3 hidden).
            embedded: by step, the embedding of the token k positions ahead of each, (batch, length, hidden).
            positions: (batch, length).
            visible: which positions of the first step each position sees, (batch, 1, length, length) bool.

        Returns:
            By step, (batch, length, hidden), normed for the output embedding.

        Source: EAGLE-3, section 3.2 and figure 6.
        """
        layer, state, normed = self.midlayer, self.first(features), []
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for step, embedding in enumerate(embedded):
            q, k, v = layer.project(embedding, state, positions + step)
            keys.append(k)
            values.append(v)
            mixed = chain_attention(q, keys, values, visible, layer.scale)
            state = layer.finish(state, mixed)
            normed.append(self.norm(state))
        return normed

    def advance(self, state: Tensor, embedding: Tensor, cache: DraftCache) -> Tensor:
        """One step over new positions of one sequence, (1, new, hidden) each, after those in the cache, which grows."""
        layer, held, new = self.midlayer, cache.length, state.shape[1]
        positions = torch.arange(held, held + new, device=state.device)[None]
        q, k, v = layer.project(embedding, state, positions)
        keys, values = cache.append(k, v)
        scores = q @ keys[:, :, None].mT * layer.scale  # (1, kv heads, group, new, held + new)
        if new > 1:
            later = torch.ones(new, held + new, dtype=torch.bool, device=state.device).triu(held + 1)
            scores = scores.masked_fill(later, -torch.inf)
        return layer.finish(state, scores.float().softmax(-1).to(values.dtype) @ values[:, :, None])

    @torch.no_grad()
    def _copy(self, base: PreTrainedModel) -> None:
        """The base's last layer, which sees the highest features and nothing of the token's embedding yet."""
        last, size = decoder_layers(base)[-1], self.fc.out_features
        theirs = last.state_dict()
        self.fc.weight.zero_()
        self.fc.weight[:, 2 * size :] = torch.eye(size)
        for name, parameter in self.midlayer.named_parameters():
            source = theirs.get(name.replace("hidden_norm", "input_layernorm"))
            if source is None or source.shape[0] != parameter.shape[0]:
                raise InputError(f'init "copy" of an eagle3 head needs a base of the Llama form, not {type(base).__name__}.')
            if parameter.shape == source.shape:
                parameter.copy_(source)
            else:  # q, k and v: the token's embedding comes first
                parameter.zero_()[:, size:] = source
        norm: Any = getattr(getattr(base, body_name(base)), "norm", None)
        if norm is not None:
            self.norm.get_parameter("weight").copy_(norm.weight)


class _Layer(nn.Module):
    """A decoder layer whose attention reads the embedding of a token and a state side by side."""

    def __init__(self, config: PreTrainedConfig, made: dict[str, Any]):
        super().__init__()
        size, wide = config.hidden_size, config.intermediate_size
        self.heads = config.num_attention_heads
        self.kv_heads = getattr(config, "num_key_value_heads", None) or self.heads
        self.head_size = getattr(config, "head_dim", None) or size // self.heads
        self.scale = self.head_size**-0.5
        self.theta = rope_theta(config)
        self.input_layernorm = _norm(config, made)
        self.hidden_norm = _norm(config, made)
        self.self_attn = _linears(
            made,
            q_proj=(2 * size, self.heads * self.head_size),
            k_proj=(2 * size, self.kv_heads * self.head_size),
            v_proj=(2 * size, self.kv_heads * self.head_size),
            o_proj=(self.heads * self.head_size, size),
        )
        self.post_attention_layernorm = _norm(config, made)
        self.mlp = _linears(made, gate_proj=(size, wide), up_proj=(size, wide), down_proj=(wide, size))

    def project(self, embedding: Tensor, state: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (batch, kv heads, group, length, size), keys and values (batch, kv heads, length, size)."""
        x = torch.cat([self.input_layernorm(embedding), self.hidden_norm(state)], -1)
        q, k, v = (
            self.self_attn[f"{name}_proj"](x).unflatten(-1, (-1, self.head_size)).transpose(1, 2) for name in ("q", "k", "v")
        )
        turns = self._turns(positions, q)
        return _turned(q, turns).unflatten(1, (self.kv_heads, -1)), _turned(k, turns), v

    def finish(self, state: Tensor, mixed: Tensor) -> Tensor:
        """What the layer returns; state: what entered it, mixed: (batch, kv heads, group, length, size)."""
        state = state + self.self_attn["o_proj"](mixed.flatten(1, 2).transpose(1, 2).flatten(2))
        x = self.post_attention_layernorm(state)
        return state + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](x)) * self.mlp["up_proj"](x))

    def _turns(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of rotary positions, (batch, 1, length, size)."""
        steps = torch.arange(0, self.head_size, 2, device=like.device, dtype=torch.float32) / self.head_size
        angles = positions[:, None, :, None].float() * self.theta**-steps
        angles = torch.cat([angles, angles], -1)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def sequential_states(
    head: Eagle3Head,
    embedding: nn.Module,
    tokens: Tensor,
    features: Tensor,
    steps: int,
    *,
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
) -> list[Tensor]:
    """`Eagle3Head.unroll` over a text, (batch, length), whose own tokens stand for the drafts.

    Args:
        attention_mask: of the base, as `AttentionMaskBuilder` makes it, or (batch, length) for padding, or None.

    Returns:
        By step, (batch, length, hidden).
    """
    length = tokens.shape[1]
    if position_ids is None:
        position_ids = torch.arange(length, device=tokens.device)[None]
    with torch.no_grad():
        embedded = [embedding(F.pad(tokens[:, step:], (0, min(step, length)))) for step in range(1, steps + 1)]
    return head.unroll(features, embedded, position_ids, _visible(attention_mask, length, tokens.device))


def rope_theta(config: PreTrainedConfig) -> float:
    """The base of the base's rotary positions; those of the head are never scaled, which is what every reader does alike."""
    stated = getattr(config, "rope_parameters", None) or {}
    if not any(isinstance(value, dict) for value in stated.values()):
        return float(stated.get("rope_theta") or 10000.0)
    return float(stated.get("full_attention", {}).get("rope_theta") or 10000.0)


def _visible(mask: Any, length: int, device: torch.device) -> Tensor:
    """Who sees whom, (batch or 1, 1, length, length) bool."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values())))
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]
    if mask is None:
        return causal
    if mask.ndim == 2:  # padding sees itself, or a softmax over nothing is not a number
        return causal & (mask[:, None, None].bool() | torch.eye(length, dtype=torch.bool, device=device))
    return mask if mask.dtype == torch.bool else mask >= 0


def _norm(config: PreTrainedConfig, made: dict[str, Any]) -> nn.Module:
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
