"""A base model from the outside: its decoder layers, whether it can carry heads, its fingerprint."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from urllib.parse import urlsplit

import torch
from huggingface_hub import constants
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, GgufConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from dynamo_lm.backbone.offloading import loaded
from dynamo_lm.errors import InputError, first_line
from dynamo_lm.kernels.linear import unpacked
from dynamo_lm.private_interfaces import compute_again_in_backward


class PassThrough(nn.Module):
    """Replaces the base's body, or any part of it that the base calls, and returns its input embeddings."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.__dict__["_body"] = body  # not a part of this module

    def forward(self, input_ids: None = None, *, inputs_embeds: Tensor, **_: Any) -> BaseModelOutputWithPast:
        return _OnlyHidden(last_hidden_state=inputs_embeds)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["_body"], name)  # raises where the body has no such thing, too
        return self if isinstance(value, nn.Module) else value  # OPT calls model.decoder


class _OnlyHidden(BaseModelOutputWithPast):
    """A body's output with nothing but the hidden state; router logits, cross attentions, ... are None."""

    def __getattr__(self, name: str) -> None:
        return None


def layer_input(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def copy_attributes(target: nn.Module, layer: nn.Module) -> None:
    """Give a module in a layer's place the attributes that the base's body reads from layers, where it has none itself."""
    for name, value in vars(layer).items():
        if name not in vars(target) and not isinstance(value, (nn.Module, nn.Parameter)):
            setattr(target, name, value)


class InputCapture:
    """A forward pre-hook that keeps the inputs of decoder layers.

    Attributes:
        captured: what each forward gave, (batch, length, hidden * layers).
    """

    def __init__(self, layers: int):
        self.layers, self.captured, self._parts = layers, list[Tensor](), list[Tensor]()

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.keep(layer_input(args, kwargs))

    def keep(self, state: Tensor) -> None:
        """Keeps the input of the next layer, (batch, length, hidden)."""
        self._parts.append(state)
        if len(self._parts) == self.layers:
            self.captured.append(torch.cat(self._parts, -1))
            self._parts.clear()


@contextmanager
def captured_inputs(layers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Yields a list that receives the inputs of these decoder layers, side by side, at each forward of their base.

    layers: in their order; each forward appends (batch, length, hidden * len(layers)).
    """
    capture = InputCapture(len(layers))
    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_pre_hook(capture, with_kwargs=True))
        yield capture.captured


def checkpoint_activations(base: PreTrainedModel) -> None:
    """Lets every decoder layer but the last compute its activations again in the backward pass.

    The last layer keeps its own, because heads run in a hook on it, which is gone by then.

    Raises:
        InputError: the base's class cannot do it.
    """
    for layer in decoder_layers(base)[:-1]:
        if not compute_again_in_backward(layer):
            raise InputError(f"{type(base).__name__} cannot checkpoint activations; leave --activation-checkpointing out.")


def body_name(base: PreTrainedModel) -> str:
    """The name of the base's part that is neither its output embedding nor beside it: embedding, layers, final norm."""
    prefix, output = base.base_model_prefix, base.get_output_embeddings()
    if prefix in base._modules:
        return prefix
    rest = {name: part for name, part in base._modules.items() if part is not None and part is not output}
    return next((name for name, part in rest.items() if any(isinstance(m, nn.ModuleList) for m in part.modules())), prefix)


def decoder_layers(base: PreTrainedModel) -> nn.ModuleList:
    """The base's decoder layers: the ModuleList as long as `num_hidden_layers` says.

    Raises:
        InputError: there is no such list.
    """
    count = base.config.get_text_config().num_hidden_layers
    for module in getattr(base, body_name(base)).modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and all(len(list(m.children())) for m in module):
            return module
    raise InputError(f"{type(base).__name__} has no list of {count} decoder layers, which heads need.")


def check_base(base: PreTrainedModel) -> None:
    """Refuse models that cannot carry heads: encoders, encoder-decoders, models without an output embedding.

    Raises:
        InputError: with the reason.
    """
    config, name = base.config, type(base).__name__
    if config.model_type == "dynamo_lm":
        raise InputError("The base already is a DynaMo model; pass its `.base`, or open it with from_pretrained.")
    if config.is_encoder_decoder:
        raise InputError(f"{name} is an encoder-decoder; DynaMo needs a decoder-only language model.")
    if base.get_output_embeddings() is None or not base.can_generate():
        raise InputError(f"{name} is not a causal language model; DynaMo needs a decoder with an output embedding.")
    if getattr(config, "is_decoder", None) is False and "bert" in config.model_type:
        raise InputError(f"{name} is an encoder; DynaMo needs a decoder-only language model.")
    if getattr(config.get_text_config(), "alibi", False):
        raise InputError(f"{name} uses ALiBi position biases, which DynaMo's attention masks cannot carry.")
    if getattr(config.get_text_config(), "attention_type", None) == "block_sparse":
        raise InputError(
            f"{name} uses block-sparse attention, which DynaMo's attention masks cannot carry; set its attention_type to "
            "original_full."
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not hasattr(config, "auto_map"):
        raise InputError(
            f"transformers does not open {name} by its configuration, {type(config).__name__}, so that a folder with heads "
            "could not be opened either; register them with AutoConfig and AutoModelForCausalLM."
        )
    if config.get_text_config().num_hidden_layers < 2:
        raise InputError(f"{name} has a single decoder layer, so there is no stem to feed heads from; use a deeper base.")
    decoder_layers(base)


def load_base(name: str, **kwargs: Any) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained` (safetensors, or a GGUF file) with one-sentence errors.

    A model that is opened in float16 keeps the fingerprint that it has in its files' precision.

    Args:
        name: a folder, a hub id, or a file that ends in .gguf, whose weights are unpacked, by default to float32.

    Raises:
        InputError: the model cannot be loaded, with the reason.
    """
    if not os.path.exists(name):
        offline_if_unreachable()
    path, damage = name, (OSError, ValueError, KeyError, RuntimeError, SafetensorError)
    if name.endswith(".gguf"):
        path, kwargs = os.path.dirname(name) or ".", gguf_arguments(name, kwargs)
        damage = (Exception,)  # type: ignore[assignment]  # whatever its reader makes of a damaged file
    kwargs.setdefault("use_safetensors", None if "gguf_file" in kwargs else True)
    try:
        if kwargs.get("dtype") not in (torch.float16, "float16"):
            return AutoModelForCausalLM.from_pretrained(path, **kwargs)
        stored = fingerprint(AutoModelForCausalLM.from_pretrained(path, **kwargs | {"dtype": "auto"}))
        return keep_fingerprint(AutoModelForCausalLM.from_pretrained(path, **kwargs), stored)
    except damage as error:
        raise InputError(f'"{name}" could not be opened as a causal language model: {first_line(error)}') from error


def gguf_arguments(file: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What `from_pretrained` takes for a GGUF file beside its folder.

    Raises:
        InputError: there is no such file, or a package is missing.
    """
    if not os.path.isfile(file):
        raise InputError(f'there is no file "{file}"')
    missing = [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]
    if missing:
        raise InputError(f'Reading "{file}" takes packages that are missing: pip install {" ".join(missing)}')
    dtype = kwargs.get("dtype", "auto")
    unpacked = {"gguf_file": os.path.basename(file), "quantization_config": GgufConfig(dequantize=True)}
    return kwargs | unpacked | {"dtype": torch.float32 if dtype == "auto" else dtype}


def offline_if_unreachable() -> None:
    """Without a name server the hub's client would retry for most of a minute; the local cache is still read."""
    if constants.HF_HUB_OFFLINE or any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        return
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True


def fingerprint(base: PreTrainedModel, *, cast: torch.dtype | None = None) -> str:
    """Identity of a base: a hash of its shape and of its last layer's weights rounded to bfloat16, so that the same
    checkpoint opened in another precision is still the same base. 16 hexadecimal digits; "meta" without weights.

    A cast to float16 loses small weights for good: such a base has the fingerprint that `keep_fingerprint` was given.
    With `cast`, the fingerprint that the base would have after a cast to that dtype."""
    config = base.config.get_text_config()
    digest = hashlib.sha256(
        f"{config.model_type} {config.num_hidden_layers} {config.hidden_size} {config.vocab_size}".encode()
    )
    last = decoder_layers(base)[-1]
    with loaded(last):
        for name, tensor in sorted(last.state_dict().items()):
            if tensor.is_meta:
                return "meta"
            digest.update(name.encode())
            rounded = unpacked(tensor).to("cpu", cast).to(torch.bfloat16)
            digest.update(rounded.flatten().view(torch.uint8).numpy().tobytes())
    now = digest.hexdigest()[:16]
    after, stored = vars(base).get("_fingerprints", (None, None))
    return stored if now == after and cast is None else now


def keep_fingerprint(base: PreTrainedModel, stored: str) -> PreTrainedModel:
    """Gives a base whose weights were cast the fingerprint `stored` of before, until its weights change."""
    vars(base)["_fingerprints"] = fingerprint(base), stored
    return base
