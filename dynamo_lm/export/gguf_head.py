"""A sequential head as a GGUF file, which llama.cpp drafts with (`--spec-type draft-eagle3`). Needs the package `gguf`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dynamo_lm.backbone.feature_layers import feature_layers
from dynamo_lm.export.forms import absolute_ids, layer_config, tensors
from dynamo_lm.export.gguf_tensors import add_file_type, add_tensor, finish, interleaved
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


def write(model: DynaMoForCausalLM, path: Path, tokens: Callable[[Any], None], precision: str) -> None:
    """Writes the head: matrices in `precision`, vectors in float32.

    Args:
        tokens: adds the base's tokens to a writer; llama.cpp compares them with those of the base's file.

    Raises:
        ModuleNotFoundError: the package `gguf` is missing.
    """
    import gguf

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
    add_file_type(writer, precision)
    writer.add_array("eagle3.target_layers", list(feature_layers(model.base.config.get_text_config().num_hidden_layers)))
    writer.add_uint32("eagle3.target_hidden_size", config["hidden_size"])
    writer.add_bool("eagle3.norm_before_residual", False)
    writer.add_bool("eagle3.norm_before_fc", False)
    tokens(writer)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, tensor in tensors(model, "layer").items():
        matrix = name.split(".")[-2] if "." in name else ""
        if name == "d2t":
            writer.add_tensor(name, absolute_ids(tensor).numpy())
        elif name != "t2d":
            add_tensor(writer, NAMES[name], interleaved(tensor, heads[matrix]) if matrix in heads else tensor, precision)
    finish(writer)
