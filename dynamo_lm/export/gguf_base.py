"""A base model as a GGUF file, which llama.cpp reads. Needs the package `gguf` (extra `bench`).

In: a Hugging Face causal language model with weights, and what writes its tokens (`gguf_tokens`). Covers GPT-NeoX, Llama,
Mistral without a window, and Qwen3; any other architecture is refused in one sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dynamo_lm.errors import InputError
from dynamo_lm.export.gguf_tensors import BY_DTYPE, add_file_type, add_tensor, finish, interleaved
from dynamo_lm.export.gguf_tokens import add_placeholders

LLAMA = {  # Hugging Face name within a layer: GGUF name; each has a weight and, if the model has one, a bias
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
LAYER = {
    "gpt_neox": {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "attention.query_key_value": "attn_qkv",
        "attention.dense": "attn_output",
        "mlp.dense_h_to_4h": "ffn_up",
        "mlp.dense_4h_to_h": "ffn_down",
    },
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen3": LLAMA | {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"},
}
NAME = {"gpt_neox": "gptneox", "mistral": "llama"}  # of an architecture in GGUF, where it is another
PAIRED = ("llama", "mistral")  # whose rotary pairs lie side by side in GGUF, and whose graph reads rope_freqs


def write(
    base: PreTrainedModel, path: Path, *, precision: str | None = None, tokens: Callable[[Any], None] | None = None
) -> Path:
    """Writes `base` as GGUF: matrices in `precision`, vectors in float32, as llama.cpp wants.

    Args:
        precision: one of `gguf_tensors.PRECISIONS`; None for the model's own.
        tokens: adds the tokens to a writer; None for placeholders, where only ids are fed and read.

    Raises:
        InputError: an architecture, activation or scaling of positions that this converter does not know.
        ModuleNotFoundError: the package `gguf` is missing.
    """
    check(base)
    import gguf

    config, kind = base.config, base.config.model_type
    precision = precision or BY_DTYPE[base.dtype]
    writer = gguf.GGUFWriter(path, NAME.get(kind, kind))
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_rope_dimension_count(int(head_size * config.rope_parameters.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if kind == "gpt_neox":
        writer.add_parallel_residual(config.use_parallel_residual)
        writer.add_layer_norm_eps(config.layer_norm_eps)
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(head_size)
        writer.add_value_length(head_size)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    add_file_type(writer, precision)
    writer.add_vocab_size(config.vocab_size)
    if tokens is None:
        add_placeholders(writer, config.vocab_size, bos=config.bos_token_id, eos=config.eos_token_id)
    else:
        tokens(writer)
    for name, tensor in tensors(base):
        add_tensor(writer, name, tensor, precision)
    finish(writer)
    return path


def check(base: PreTrainedModel) -> None:
    """Refuses what `write` cannot convert.

    Raises:
        InputError: with the reason.
    """
    config, kind = base.config, base.config.model_type
    if kind not in LAYER:
        raise InputError(f"The architecture {kind} has no GGUF conversion here (only {', '.join(LAYER)} have).")
    expected = "gelu" if kind == "gpt_neox" else "silu"
    if config.hidden_act not in ((expected, "gelu_new", "gelu_fast") if expected == "gelu" else (expected,)):
        raise InputError(f"llama.cpp computes {expected} in this architecture, and the model has {config.hidden_act}.")
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise InputError("A base with sliding windows has no GGUF conversion here.")
    scaling = config.rope_parameters.get("rope_type", "default")
    if scaling not in (("default", "linear", "llama3") if kind in PAIRED else ("default",)):
        raise InputError(f"Rotary positions of a {kind} scaled by {scaling} have no GGUF conversion here.")
    if base.dtype not in BY_DTYPE:
        raise InputError(f"{base.dtype} has no GGUF conversion here (only float32, bfloat16 and float16 have).")


def tensors(base: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """GGUF names and contents of all weights, in llama.cpp's layout, on the CPU."""
    config, kind = base.config, base.config.model_type
    body: Any = getattr(base, base.base_model_prefix)
    heads = {"attn_q": config.num_attention_heads, "attn_k": getattr(config, "num_key_value_heads", 0)}

    def parts(module: Any, name: str) -> Iterator[tuple[str, Tensor]]:
        for part in ("weight", "bias"):
            tensor = getattr(module, part, None)
            if tensor is not None:
                yield f"{name}.{part}", tensor.detach().cpu().contiguous()

    yield from parts(base.get_input_embeddings(), "token_embd")
    if kind == "gpt_neox" or not config.tie_word_embeddings:  # llama.cpp reads tied ones from token_embd
        yield from parts(base.get_output_embeddings(), "output")
    yield from parts(body.get_submodule("final_layer_norm" if kind == "gpt_neox" else "norm"), "output_norm")
    factors = _rope_factors(base)
    if factors is not None:
        yield "rope_freqs.weight", factors
    for number, layer in enumerate(body.layers):
        for own, theirs in LAYER[kind].items():
            for name, tensor in parts(layer.get_submodule(own), f"blk.{number}.{theirs}"):
                if theirs == "attn_qkv":
                    tensor = _by_kind(tensor, config.num_attention_heads)
                elif theirs in heads and kind in PAIRED:
                    tensor = interleaved(tensor, heads[theirs])
                yield name, tensor


def _rope_factors(base: PreTrainedModel) -> Tensor | None:
    """What llama.cpp divides each rotary frequency by, (head size / 2,); None where positions are not scaled."""
    stated = base.config.rope_parameters
    if stated.get("rope_type", "default") == "default":
        return None
    body: Any = getattr(base, base.base_model_prefix)
    scaled = body.rotary_emb.inv_freq.float().cpu()
    steps = torch.arange(len(scaled), dtype=torch.float32) / len(scaled)
    return stated["rope_theta"] ** -steps / scaled


def _by_kind(tensor: Tensor, heads: int) -> Tensor:
    """GPT-NeoX stores (head, q k v, size); llama.cpp reads all q, all k, all v."""
    return tensor.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2).contiguous()
