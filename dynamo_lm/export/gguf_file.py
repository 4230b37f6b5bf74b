"""A sequential head as a GGUF file, which llama.cpp drafts with (`--spec-type draft-eagle3`). Needs the package `gguf`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynamo_lm.backbone.feature_layers import feature_layers
from dynamo_lm.data.chat_template import special_tokens
from dynamo_lm.errors import InputError, first_line
from dynamo_lm.export.forms import absolute_ids, interleaved, layer_config, tensors
from dynamo_lm.model.modeling import DynaMoForCausalLM

NAMES = {
    "fc.weight": "fc.weight",
    "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "d2t": "d2t",
    "layer.input_layernorm.weight": "blk.0.attn_norm.weight",
    "layer.hidden_norm.weight": "blk.0.attn_norm_2.weight",
    "layer.self_attn.q_proj.weight": "blk.0.attn_q.weight",
    "layer.self_attn.k_proj.weight": "blk.0.attn_k.weight",
    "layer.self_attn.v_proj.weight": "blk.0.attn_v.weight",
    "layer.self_attn.o_proj.weight": "blk.0.attn_output.weight",
    "layer.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
    "layer.mlp.gate_proj.weight": "blk.0.ffn_gate.weight",
    "layer.mlp.up_proj.weight": "blk.0.ffn_up.weight",
    "layer.mlp.down_proj.weight": "blk.0.ffn_down.weight",
}


def write(model: DynaMoForCausalLM, path: Path, tokenizer: Any, base_gguf: Path | None) -> None:
    """Writes the head: matrices in its dtype (float32, bfloat16 or float16), vectors in float32.

    Args:
        tokenizer: whose tokens the file lists, as the base's file does.
        base_gguf: the base's file, from which the tokens are copied instead.

    Raises:
        ModuleNotFoundError: the package `gguf` is missing.
        InputError: the base's file is not one, or lists another number of tokens.
    """
    import gguf

    kinds = gguf.GGMLQuantizationType
    precision = {torch.bfloat16: kinds.BF16, torch.float16: kinds.F16}.get(model.dtype, kinds.F32)
    config = layer_config(model)
    writer = gguf.GGUFWriter(path, "eagle3")
    writer.add_name(f"eagle3 head for {model.config.base_name or 'a base'}")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(1)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    files = gguf.LlamaFileType
    writer.add_file_type({kinds.BF16: files.MOSTLY_BF16, kinds.F16: files.MOSTLY_F16}.get(precision, files.ALL_F32))
    writer.add_array("eagle3.target_layers", list(feature_layers(model.base.config.get_text_config().num_hidden_layers)))
    writer.add_uint32("eagle3.target_hidden_size", config["hidden_size"])
    writer.add_bool("eagle3.norm_before_residual", False)
    writer.add_bool("eagle3.norm_before_fc", False)
    if base_gguf is None:
        _add_tokens(writer, tokenizer, config["vocab_size"])
    else:
        _copy_tokens(writer, base_gguf, config["vocab_size"])
    for name, tensor in tensors(model, "layer").items():
        if name == "t2d":
            continue
        if name == "d2t":
            writer.add_tensor(name, absolute_ids(tensor).numpy())
            continue
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            tensor = interleaved(tensor, heads)
        _add(writer, NAMES[name], tensor, precision, gguf)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: Any, name: str, tensor: Tensor, precision: Any, gguf: Any) -> None:
    if tensor.ndim == 1 or precision == gguf.GGMLQuantizationType.F32:
        writer.add_tensor(name, tensor.float().numpy())
    elif precision == gguf.GGMLQuantizationType.F16:
        writer.add_tensor(name, tensor.half().numpy())
    else:
        writer.add_tensor(name, tensor.view(torch.uint16).numpy().view("uint8"), raw_dtype=precision)


def _copy_tokens(writer: Any, base_gguf: Path, size: int) -> None:
    """Everything that the base's file says of its tokens."""
    import gguf

    try:
        fields = gguf.GGUFReader(base_gguf).fields
        count = len(fields["tokenizer.ggml.tokens"].data)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise InputError(f'"{base_gguf}" is not a GGUF file of a language model: {first_line(error)}') from error
    if count != size:
        raise InputError(f'"{base_gguf}" has {count} tokens, but the head\'s base has {size}; give the file of that base.')
    for name, field in fields.items():
        if name.startswith("tokenizer."):
            of = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=of)


def _add_tokens(writer: Any, tokenizer: Any, size: int) -> None:
    """The tokens by their ids. llama.cpp compares them with the base's and never cuts text by the draft's."""
    import json

    import gguf

    backend = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    texts, special = {index: token for token, index in tokenizer.get_vocab().items()}, special_tokens(tokenizer)
    kinds = gguf.TokenType
    writer.add_tokenizer_model("llama" if backend.get("byte_fallback") else "gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([texts.get(index, f"[PAD{index}]") for index in range(size)])
    writer.add_token_types(
        [kinds.CONTROL if index in special else kinds.NORMAL if index in texts else kinds.UNUSED for index in range(size)]
    )
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in backend.get("merges") or []]
    if backend.get("byte_fallback"):
        writer.add_token_scores([-float(index) for index in range(size)])
    else:
        writer.add_token_merges(merges)
    for add, token in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
    ):
        if token is not None:
            add(token)
