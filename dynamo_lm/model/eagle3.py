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
from transformers import PreTrainedModel

from dynamo_lm.backbone.base_model import body_name, decoder_layers
from dynamo_lm.backbone.eagle3_layer import DraftCache, Eagle3Layer, norm_of
from dynamo_lm.backbone.feature_layers import feature_layers
from dynamo_lm.errors import InputError
from dynamo_lm.kernels.linear import unpacked
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
        self.midlayer = Eagle3Layer(config, made)
        self.norm = norm_of(config, made)
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
        """See `Eagle3Layer.advance`."""
        return self.midlayer.advance(state, embedding, cache)

    @torch.no_grad()
    def _copy(self, base: PreTrainedModel) -> None:
        """The base's last layer, which sees the highest features and nothing of the token's embedding yet."""
        last, size = decoder_layers(base)[-1], self.fc.out_features
        theirs = last.state_dict()
        self.fc.weight.zero_()
        self.fc.weight[:, 2 * size :] = torch.eye(size)
        for name, parameter in self.midlayer.named_parameters():
            source = theirs.get(name.replace("hidden_norm", "input_layernorm"))
            source = None if source is None else unpacked(source)
            if source is None or source.shape[0] != parameter.shape[0]:
                raise InputError(f'init "copy" of an eagle3 head needs a base of the Llama form, not {type(base).__name__}.')
            if parameter.shape == source.shape:
                parameter.copy_(source)
            else:  # q, k and v: the token's embedding comes first
                parameter.zero_()[:, size:] = source
        norm: Any = getattr(getattr(base, body_name(base)), "norm", None)
        if norm is not None:
            self.norm.get_parameter("weight").copy_(norm.weight)


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
