"""A base model as a GGUF file at its own precision, so that llama.cpp can be raced on the same weights.

In: a Hugging Face causal language model with weights. Out: one file, token ids in and token ids out: the vocabulary in it is
a list of placeholders, because a benchmark feeds ids. Covers GPT-NeoX and Llama; any other architecture is refused in one
sentence, which the benchmark reports as the reason. Needs the package `gguf` (extra `bench`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dynamo_lm.errors import InputError

LAYER = {
    "gpt_neox": {  # Hugging Face name within a layer: GGUF name; each has a weight and, if the model has one, a bias
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "attention.query_key_value": "attn_qkv",
        "attention.dense": "attn_output",
        "mlp.dense_h_to_4h": "ffn_up",
        "mlp.dense_4h_to_h": "ffn_down",
    },
    "llama": {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    },
}
NORM = {"gpt_neox": "final_layer_norm", "llama": "norm"}
NAME = {"gpt_neox": "gptneox", "llama": "llama"}


def write(base: PreTrainedModel, path: Path) -> Path:
    """Writes `base` as GGUF: matrices in the model's dtype (float32 or bfloat16), vectors in float32, as llama.cpp wants.

    Raises:
        InputError: an architecture, activation, scaling of positions or dtype that this converter does not know.
        ModuleNotFoundError: the package `gguf` is missing.
    """
    check(base)
    import gguf

    config = base.config
    kind = config.model_type
    precision = gguf.GGMLQuantizationType.BF16 if base.dtype == torch.bfloat16 else gguf.GGMLQuantizationType.F32
    writer = gguf.GGUFWriter(path, NAME[kind])
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    positions = config.rope_parameters
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_rope_dimension_count(int(head_size * positions.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(positions["rope_theta"])
    if kind == "gpt_neox":
        writer.add_parallel_residual(config.use_parallel_residual)
        writer.add_layer_norm_eps(config.layer_norm_eps)
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    file_type = gguf.LlamaFileType.MOSTLY_BF16 if base.dtype == torch.bfloat16 else gguf.LlamaFileType.ALL_F32
    writer.add_file_type(file_type)

    # A vocabulary of placeholders: ids are fed and read, never text.
    size = config.vocab_size
    writer.add_vocab_size(size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"t{token}" for token in range(size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * size)
    writer.add_token_merges(["t 0"])
    for add, token in ((writer.add_bos_token_id, config.bos_token_id), (writer.add_eos_token_id, config.eos_token_id)):
        if isinstance(token, int):
            add(token)

    for name, tensor in tensors(base):
        if tensor.ndim == 1 or precision == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, tensor.float().numpy())
        else:
            writer.add_tensor(name, tensor.view(torch.uint16).numpy().view("uint8"), raw_dtype=precision)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def check(base: PreTrainedModel) -> None:
    """Refuses what `write` cannot convert.

    Raises:
        InputError: with the reason.
    """
    config = base.config
    if config.model_type not in LAYER:
        raise InputError(f"The architecture {config.model_type} has no GGUF conversion here (only GPT-NeoX and Llama have).")
    expected = "gelu" if config.model_type == "gpt_neox" else "silu"
    if config.hidden_act not in ((expected, "gelu_new", "gelu_fast") if expected == "gelu" else (expected,)):
        raise InputError(f"llama.cpp computes {expected} in this architecture, and the model has {config.hidden_act}.")
    if config.rope_parameters.get("rope_type", "default") != "default":
        raise InputError("Scaled rotary positions have no GGUF conversion here.")
    if base.dtype not in (torch.float32, torch.bfloat16):
        raise InputError(f"{base.dtype} has no GGUF conversion here (only float32 and bfloat16 have).")


def tensors(base: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """GGUF names and contents of all weights, in llama.cpp's layout, on the CPU."""
    config = base.config
    kind = config.model_type
    body: Any = getattr(base, base.base_model_prefix)
    heads = config.num_attention_heads

    def parts(module: Any, name: str) -> Iterator[tuple[str, Tensor]]:
        for part in ("weight", "bias"):
            tensor = getattr(module, part, None)
            if tensor is not None:
                yield f"{name}.{part}", tensor.detach().cpu().contiguous()

    yield from parts(base.get_input_embeddings(), "token_embd")
    yield from parts(base.get_output_embeddings(), "output")  # tied or not: llama.cpp wants it for GPT-NeoX
    yield from parts(body.get_submodule(NORM[kind]), "output_norm")
    for number, layer in enumerate(body.layers):
        for own, theirs in LAYER[kind].items():
            for name, tensor in parts(layer.get_submodule(own), f"blk.{number}.{theirs}"):
                if theirs == "attn_qkv":
                    tensor = _by_kind(tensor, heads)
                elif theirs in ("attn_q", "attn_k") and kind == "llama":
                    tensor = _interleaved(tensor, heads if theirs == "attn_q" else config.num_key_value_heads)
                yield name, tensor


def _by_kind(tensor: Tensor, heads: int) -> Tensor:
    """GPT-NeoX stores (head, q k v, size); llama.cpp reads all q, all k, all v."""
    split = tensor.unflatten(0, (heads, 3, -1))
    return split.transpose(0, 1).flatten(0, 2).contiguous()


def _interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Llama's rotary pairs are (i, i + size/2) in Hugging Face and (2i, 2i + 1) in GGUF."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()
