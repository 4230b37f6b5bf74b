"""A tiny model with random weights of the same class as a base, on which the base's code can be tried in milliseconds.

In: a base, or its class and configuration. Out: a model that runs the same code with narrower layers, fewer of them, short
windows and sharp weights. Knows widths and counts by the names that transformers' configurations share, and no architecture.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from dynamo_lm.private_interfaces import attention_implementation, model_from_config

WIDTH = 64  # of hidden states and inner layers
VOCABULARY = 512
WINDOW = 5  # tokens of every sliding window and chunk
INNER = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "d_ff", "dim_ff", "shared_expert_size")
WINDOWS = ("sliding_window", "window_size", "attention_chunk_size", "sliding_window_size", "attention_window_size")


def tiny_config(config: PreTrainedConfig, *, narrow: bool = True) -> PreTrainedConfig:
    """A copy of a configuration with few layers and, if `narrow`, small widths and a small vocabulary.

    The layers are the first ones that hold every kind of layer and end with the kind that the base ends with.
    """
    tiny = copy.deepcopy(config)
    text = tiny.get_text_config()
    layers = text.num_hidden_layers
    kept = _kept_layers(text, layers)
    for name, value in list(vars(text).items()):
        if name.startswith("_"):
            continue
        if isinstance(value, (list, tuple)) and len(value) == layers > 1:
            vars(text)[name] = value[:kept]
        elif "layers" in name and value == layers:  # decoder_layers beside encoder_layers
            vars(text)[name] = kept
        elif name in WINDOWS and isinstance(value, int) and value > WINDOW:
            vars(text)[name] = WINDOW
    _set(text, "num_hidden_layers", kept)
    for part in vars(tiny).values():  # towers for images and sound
        if isinstance(part, PreTrainedConfig) and part is not text and isinstance(_get(part, "num_hidden_layers"), int):
            _set(part, "num_hidden_layers", 1)
    if narrow:
        _narrow(text)
    return tiny


def tiny_base(base_class: type[PreTrainedModel], config: PreTrainedConfig, *, narrow: bool = True) -> PreTrainedModel:
    """A model of this class and a `tiny_config` of this configuration, with sharp random weights, float32, on the CPU.

    Torch's global random numbers are as before.

    Raises:
        Exception: whatever the class raises where the smaller configuration does not make sense to it.
    """
    tiny = tiny_config(config, narrow=narrow)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        model = model_from_config(base_class, tiny, attention_implementation(config), torch.float32).eval()
        sharpen(model)
    return model


@torch.no_grad()
def sharpen(model: nn.Module) -> None:
    """Draws weights at which every token's logits depend on all tokens before it and on their order; at an initialiser's
    usual scale of 0.02 they hardly do."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and parameter.is_floating_point():
            fan_in = parameter.shape[-1]
            embedding = "embed" in name or name.endswith(("wte.weight", "wpe.weight"))
            parameter.normal_(0, 0.5 if embedding else 1.2 / fan_in**0.5)


def _kept_layers(text: PreTrainedConfig, layers: int) -> int:
    """How many of the first layers show every kind of layer that lists by layer name, and end as the base does."""
    listed = [v for k, v in vars(text).items() if isinstance(v, (list, tuple)) and len(v) == layers and k[0] != "_"]
    kinds = [str([values[i] for values in listed]) for i in range(layers)]
    fewest = min(3, layers)
    for kept in range(fewest, layers):
        if set(kinds[:kept]) == set(kinds) and kinds[kept - 1] == kinds[-1]:
            return kept
    return layers


def _narrow(text: PreTrainedConfig) -> None:
    heads, hidden = _get(text, "num_attention_heads"), _get(text, "hidden_size")
    groups = _get(text, "num_key_value_heads")
    stated = _get(text, "head_dim")
    if heads and hidden:
        kept_groups = min(groups, 2) if groups else 2
        kept_heads = min(heads, kept_groups * min(2, heads // groups) if groups else 2)
        width = WIDTH if "head_dim" in vars(text) and stated else kept_heads * (hidden // heads)
        _set(text, "num_attention_heads", kept_heads)
        if groups:
            _set(text, "num_key_value_heads", kept_groups)
        for name, value in list(vars(text).items()):  # one width under several names, such as d_model
            if isinstance(value, int) and not isinstance(value, bool) and value == hidden and name[0] != "_":
                vars(text)[name] = width
            elif name.endswith("attention_heads") and value == heads:
                vars(text)[name] = kept_heads
        _set(text, "hidden_size", width)
    elif hidden and hidden > WIDTH:  # no attention at all
        for name, value in list(vars(text).items()):
            if value == hidden and not isinstance(value, bool) and name[0] != "_":
                vars(text)[name] = WIDTH
    for name, value in list(vars(text).items()):
        if not any(name.endswith(inner) for inner in INNER):
            continue
        if isinstance(value, int) and not isinstance(value, bool) and value > WIDTH:
            vars(text)[name] = WIDTH
        elif isinstance(value, (list, tuple)) and value and all(isinstance(each, int) for each in value):
            vars(text)[name] = [min(each, WIDTH) for each in value]
    vocabulary = _get(text, "vocab_size")
    if isinstance(vocabulary, int) and vocabulary > VOCABULARY:
        _set(text, "vocab_size", VOCABULARY)
        for name, value in list(vars(text).items()):
            if name.endswith("_token_id") and isinstance(value, int) and value >= VOCABULARY:
                vars(text)[name] = VOCABULARY - 1


def _get(config: PreTrainedConfig, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # one that differs from layer to layer
        return None


def _set(config: PreTrainedConfig, name: str, value: Any) -> None:
    setattr(config, name, value)
