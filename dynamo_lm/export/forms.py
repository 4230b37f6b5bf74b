"""What of a sequential head other programs read: its configuration in their words, and what stands in the way.

In: a model with a head of the kind eagle3. Out: dictionaries for config.json, tensors by their names in the files. The
keys and names are those of the releases that LOG.md lists.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dynamo_lm.backbone.eagle3_layer import rms_norm_eps, rope_theta
from dynamo_lm.backbone.feature_layers import feature_layers
from dynamo_lm.data.draft_tokens import needed_tokens
from dynamo_lm.errors import InputError
from dynamo_lm.export import parallel
from dynamo_lm.model.modeling import DynaMoForCausalLM

READERS = {  # form: its programs, and the architectures of bases whose states they hand to a draft
    "eagle3": ("vLLM, SGLang and llama.cpp's converter", ("llama", "mistral", "qwen2", "qwen3")),
    "speculators": ("vLLM", ("llama", "mistral", "qwen2", "qwen3")),
    "gguf": ("llama.cpp", ("llama", "mistral", "qwen3")),
    "mtp": ("transformers", ("llama", "mistral", "qwen2", "qwen3")),
    "vllm": ("vLLM with dynamo-lm beside it", ("llama",)),  # for parallel heads
}


def check(model: DynaMoForCausalLM, name: str, form: str, tokenizer: Any) -> None:
    """Refuses what no program would read.

    Raises:
        InputError: with the reason.
    """
    if form not in READERS:
        raise InputError(f'--to is "{form}"; give {", ".join(READERS)}.')
    config = model.base.config.get_text_config()
    if form == "vllm":
        parallel.check(model, name)
    elif not model.config.sequential:
        raise InputError(
            f'"{name}" has parallel heads, which only --to vllm exports; train a sequential one with `dynamo-lm train BASE '
            "--head eagle3`."
        )
    else:
        feature_layers(config.num_hidden_layers)
    programs, architectures = READERS[form]
    if config.model_type not in architectures:
        raise InputError(
            f"{programs} cannot draft for a base of the architecture {config.model_type}; the form {form} is for "
            f"{', '.join(architectures)}."
        )
    ids = model.sequential_head.draft_ids if model.config.sequential else None
    if ids is not None:
        missing = sorted(token for token in needed_tokens(tokenizer) - set(ids.tolist()) if token < config.vocab_size)
        if missing:
            raise InputError(
                f"The draft vocabulary leaves out {len(missing)} bytes or special tokens, such as "
                f"{tokenizer.convert_ids_to_tokens(missing[0])!r}; train the head with --draft-vocabulary again."
            )


def layer_config(model: DynaMoForCausalLM) -> dict[str, Any]:
    """The shape of the head's layer in Llama's words."""
    config, layer = model.base.config.get_text_config(), model.sequential_head.midlayer
    return {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": layer.heads,
        "num_key_value_heads": layer.kv_heads,
        "head_dim": layer.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": rms_norm_eps(config),
        "rope_theta": rope_theta(config),
        "max_position_embeddings": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": str(model.dtype).removeprefix("torch."),
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
    }


def eagle3_config(model: DynaMoForCausalLM) -> dict[str, Any]:
    """config.json that vLLM, SGLang and llama.cpp's converter read."""
    layers = list(feature_layers(model.base.config.get_text_config().num_hidden_layers))
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        **layer_config(model),
        "draft_vocab_size": model.config.draft_vocab_size or None,
        "norm_before_residual": False,
        "eagle_aux_hidden_state_layer_ids": layers,
    }


def speculators_config(model: DynaMoForCausalLM) -> dict[str, Any]:
    """config.json in the form of the package speculators."""
    config = model.base.config.get_text_config()
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": model.num_heads - 1,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "draft_vocab_size": model.config.draft_vocab_size or config.vocab_size,
        "target_hidden_size": None,
        "norm_before_residual": False,
        "norm_before_fc": False,
        "fc_norm": False,
        "norm_output": False,
        "eagle_aux_hidden_state_layer_ids": list(feature_layers(config.num_hidden_layers)),
        "embed_requires_grad": False,
        "torch_dtype": str(model.dtype).removeprefix("torch."),
        "tie_word_embeddings": False,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {
                "name_or_path": model.config.base_hub_id or model.config.base_name_or_path,
                "architectures": list(model.base.config.architectures or [type(model.base).__name__]),
            },
        },
        "transformer_layer_config": layer_config(model),
    }


def tensors(model: DynaMoForCausalLM, layer: str) -> dict[str, Tensor]:
    """The head's tensors, its one layer named `layer`; without a draft vocabulary the reader takes the base's output."""
    return {
        name.replace("midlayer.", f"{layer}."): tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in model.sequential_head.state_dict().items()
    }


def absolute_ids(offsets: Tensor) -> Tensor:
    """d2t of GGUF, which holds ids; offsets: that of the other files, id less place."""
    return offsets + torch.arange(len(offsets))
