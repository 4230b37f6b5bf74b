"""Bases to test on: fourteen tiny architectures with random weights, and a Markov chain of known probabilities."""

from __future__ import annotations

import copy
from functools import cache

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from dynamo_lm import DynaMoForCausalLM

VOCABULARY = 97
CONTEXT = 128
EOS = 96  # given to generate, since the configurations' own ids lie outside this vocabulary

_sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
_positions = {"max_position_embeddings": CONTEXT}
_llama = {**_sizes, **_positions, "intermediate_size": 48, "num_key_value_heads": 2}
_gpt2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT}

CONFIGS: dict[str, PreTrainedConfig] = {
    "gpt_neox": GPTNeoXConfig(**_sizes, **_positions, intermediate_size=64),
    "gpt2": GPT2Config(**_gpt2),
    "llama": LlamaConfig(**_llama),
    "mistral": MistralConfig(**_llama, sliding_window=8),
    "qwen2": Qwen2Config(**_llama),
    "qwen3": Qwen3Config(**_llama, head_dim=8),
    "gemma2": Gemma2Config(**_llama, head_dim=8, sliding_window=8),
    "gemma3": Gemma3TextConfig(**_llama, head_dim=8, sliding_window=8),
    "phi3": Phi3Config(**_llama, pad_token_id=0),
    "opt": OPTConfig(**_sizes, **_positions, ffn_dim=64, word_embed_proj_dim=16),
    "falcon": FalconConfig(**_sizes, **_positions, new_decoder_architecture=True, num_kv_heads=2),
    "olmo2": Olmo2Config(**_llama),
    "granite": GraniteConfig(**_llama, logits_scaling=3.0),
    "qwen3_moe": Qwen3MoeConfig(**_llama, head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2),
}
NAMES = list(CONFIGS)


@cache
def _base(name: str) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).eval()
    for parameter in base.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(3)  # at the usual scale of 0.02 all tokens are nearly alike
    return base


def base_of(name: str) -> PreTrainedModel:
    """A fresh copy of the tiny base of this architecture, always with the same weights."""
    return copy.deepcopy(_base(name))


def dynamo_of(name: str, num_heads: int = 3, **options) -> DynaMoForCausalLM:
    """That base with heads, in evaluation mode."""
    return DynaMoForCausalLM.from_base(base_of(name), num_heads=num_heads, **options).eval()


def random_tokens(*shape: int, seed: int = 1) -> Tensor:
    """Ids that are neither padding (0) nor the end (EOS)."""
    return torch.randint(3, EOS, shape, generator=torch.Generator().manual_seed(seed))


def markov_base(transition: Tensor, context: int = CONTEXT) -> PreTrainedModel:
    """A Llama whose next-token distribution behind token x is exactly `transition[x]`, (vocabulary, vocabulary).

    Its layers add nothing, embeddings are one-hot and the output embedding holds log-probabilities. The vocabulary size
    must be even. Probabilities of 0 become e^-60.
    """
    size = len(transition)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=size,
        intermediate_size=4,
        num_hidden_layers=2,
        num_attention_heads=1,
        max_position_embeddings=context,
        rms_norm_eps=1e-12,
        bos_token_id=None,
        eos_token_id=None,
    )
    base = AutoModelForCausalLM.from_config(config).eval()
    for layer in base.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    base.model.embed_tokens.weight.data = torch.eye(size)
    base.model.norm.weight.data.fill_(size**-0.5)  # the norm multiplies a one-hot vector by sqrt(size)
    base.lm_head.weight.data = _log(transition).T.contiguous()
    return base


def markov_dynamo(transition: Tensor, *ahead: Tensor, context: int = CONTEXT) -> DynaMoForCausalLM:
    """That chain with heads 2.. whose distributions behind token x are exactly `ahead[0][x]`, `ahead[1][x]`, .."""
    base = markov_base(transition, context)
    options = {"layers_per_head": 0, "feed": "last", "own_output_embedding": True}
    model = DynaMoForCausalLM.from_base(base, num_heads=1 + len(ahead), **options).eval()
    for head, probabilities in zip(model.heads, ahead, strict=True):
        head.output.weight.data = _log(probabilities).T.contiguous()
    return model


def cycle(size: int, step: int = 1) -> Tensor:
    """The chain x -> x + step (modulo size), which is nearly certain."""
    return torch.eye(size).roll(step, 1) * 0.9 + 0.1 / size


def _log(probabilities: Tensor) -> Tensor:
    return probabilities.double().log().clamp(min=-60).float()
