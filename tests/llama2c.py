"""Reads models in llama2.c's legacy format (karpathy/llama2.c, export version 0) and their tokenizer.bin."""

from __future__ import annotations

import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

BOS = 1


def load_model(file: Path) -> LlamaForCausalLM:
    """The checkpoint as a transformers model: seven int32 sizes, then float32 tensors, each for all layers at once."""
    content = file.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, context = struct.unpack("7i", content[:28])
    numbers = torch.from_numpy(np.frombuffer(content, np.float32, offset=28).copy())
    width = dim // heads

    def take(*shape: int) -> Tensor:
        nonlocal numbers
        count = int(np.prod(shape))
        tensor, numbers = numbers[:count].view(shape), numbers[count:]
        return tensor

    def half_split(matrices: Tensor, heads: int) -> Tensor:
        """Rotary pairs lie beside each other in llama2.c, and half a head apart in transformers."""
        return matrices.view(layers, heads, width // 2, 2, dim).transpose(2, 3).reshape(matrices.shape)

    embedding = take(abs(vocab), dim)
    parts = {"input_layernorm": take(layers, dim)}
    parts["self_attn.q_proj"] = half_split(take(layers, dim, dim), heads)
    parts["self_attn.k_proj"] = half_split(take(layers, kv_heads * width, dim), kv_heads)
    parts["self_attn.v_proj"] = take(layers, kv_heads * width, dim)
    parts["self_attn.o_proj"] = take(layers, dim, dim)
    parts["post_attention_layernorm"] = take(layers, dim)
    parts["mlp.gate_proj"] = take(layers, hidden, dim)
    parts["mlp.down_proj"] = take(layers, dim, hidden)
    parts["mlp.up_proj"] = take(layers, hidden, dim)
    weights = {f"model.layers.{i}.{name}.weight": part[i] for name, part in parts.items() for i in range(layers)}
    weights |= {"model.embed_tokens.weight": embedding, "model.norm.weight": take(dim)}
    take(2, context, width // 2)  # rotary tables, which transformers computes itself
    weights["lm_head.weight"] = embedding if vocab > 0 else take(-vocab, dim)
    assert len(numbers) == 0, f"{len(numbers)} numbers are left over"

    config = LlamaConfig(
        vocab_size=abs(vocab),
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=vocab > 0,
    )
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(weights)
    return model


class Pieces:
    """A SentencePiece BPE tokenizer: a float score and a piece per token."""

    def __init__(self, file: Path):
        content, at = file.read_bytes(), 4
        self.pieces: list[bytes] = []
        self.scores: list[float] = []
        while at < len(content):
            score, length = struct.unpack_from("fi", content, at)
            self.scores.append(score)
            self.pieces.append(content[at + 8 : at + 8 + length])
            at += 8 + length
        self.ids = {piece: i for i, piece in enumerate(self.pieces)}

    def encode(self, text: str) -> list[int]:
        """BOS, then greedy merges of the best-scored neighbours; unknown characters as their bytes."""
        tokens = []
        for character in " " + text:
            known = self.ids.get(character.encode())
            tokens += [known] if known is not None else [byte + 3 for byte in character.encode()]  # <0x00> is token 3
        while True:
            merged = [self.ids.get(self.pieces[a] + self.pieces[b]) for a, b in pairwise(tokens)]
            found = [(self.scores[token], -i) for i, token in enumerate(merged) if token is not None]
            if not found:
                return [BOS, *tokens]
            at = -max(found)[1]
            tokens[at : at + 2] = [merged[at]]

    def decode(self, tokens: list[int]) -> str:
        content = b"".join(bytes([t - 3]) if 3 <= t < 259 else self.pieces[t] for t in tokens if t > 2)
        return content.decode(errors="replace").removeprefix(" ")
