"""Parallel heads in a folder that vLLM opens where this package is installed beside it (`dynamo_lm.vllm`).

In: a model with parallel heads. Out: a dictionary for config.json, tensors by the names that the reader knows.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dynamo_lm.errors import InputError
from dynamo_lm.model.modeling import DynaMoForCausalLM
from dynamo_lm.vllm import ARCHITECTURE


def check(model: DynaMoForCausalLM, name: str) -> None:
    """Refuses what the reader does not know.

    Raises:
        InputError: with the reason.
    """
    config = model.config
    if config.sequential:
        raise InputError(f'"{name}" has a sequential head, which vLLM reads by itself; give --to eagle3.')
    if config.num_heads < 2:
        raise InputError(f'"{name}" has only the base\'s own head, which drafts nothing; add heads first.')
    if (config.layers_per_head, config.feed, config.adapter_rank, config.own_output_embedding) != (1, "stem", 0, False):
        raise InputError(
            f'The heads of "{name}" are of another kind than vLLM reads; it reads heads of one layer each (--head layer) on '
            "the stem's state, with the base's output embedding."
        )


def parallel_config(model: DynaMoForCausalLM) -> dict[str, Any]:
    """config.json: the base's own, but that its hidden states are packed states and its layers are the heads."""
    base = model.base.config.get_text_config()
    size, heads = base.hidden_size, model.num_heads - 1
    stated = {key: value for key, value in base.to_dict().items() if key not in ("_name_or_path", "dtype")}
    return stated | {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "num_hidden_layers": heads,
        "hidden_size": max(1, heads - 1) * size,
        "stem_size": size,
        "head_dim": getattr(base, "head_dim", None) or size // base.num_attention_heads,
        "coupling_rank": 0 if model.coupling is None else model.coupling.rank,
        "eagle_aux_hidden_state_layer_ids": [base.num_hidden_layers - 1],
        "tie_word_embeddings": False,
        "torch_dtype": str(model.dtype).removeprefix("torch."),
    }


def parallel_tensors(model: DynaMoForCausalLM) -> dict[str, Tensor]:
    """The layers of heads 2..n, the base's final norm and the coupling."""
    named = {
        f"layers.{place}.{name}": tensor
        for place, head in enumerate(model.heads)
        for name, tensor in head.layers[0].state_dict().items()  # type: ignore[index, union-attr]
    }
    named["norm.weight"] = model.body.norm.weight  # type: ignore[union-attr]
    if model.coupling is not None:
        named |= {f"coupling.{name}": tensor for name, tensor in model.coupling.state_dict().items()}
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in named.items()}
