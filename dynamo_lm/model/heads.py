"""The modules that a token head is made of: decoder layers, or an adapter on the base's last layer, or a residual block."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from dynamo_lm.backbone.base_model import decoder_layers
from dynamo_lm.backbone.offloading import forget_hooks, is_hooked, shared_hooks
from dynamo_lm.errors import InputError
from dynamo_lm.kernels.linear import is_plain, unpacked
from dynamo_lm.model.configuration import DynaMoConfig


class TokenHead(nn.Module):
    """One extra head: `layers_per_head` decoder layers of the base's last layer's class, or an adapter on that layer."""

    def __init__(self, config: DynaMoConfig, base: PreTrainedModel, last_layer: nn.Module, index: int):
        super().__init__()
        cache_index = len(decoder_layers(base)) + index * config.layers_per_head
        layers = []
        if config.adapter_rank and is_hooked(last_layer):
            raise InputError(
                "Adapters share the last layer's weights, which accelerate moves; use heads with layers of their own, or "
                "open the base on one device."
            )
        for offset in range(config.layers_per_head):
            shared = {id(module.config): module.config for module in last_layer.modules() if hasattr(module, "config")}
            shared |= shared_hooks(last_layer)
            layer = copy.deepcopy(last_layer, shared)  # one configuration, so that attention is switched for all
            _forget_hooks(layer)
            _unpack(layer)
            for module in layer.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = cache_index + offset  # type: ignore[assignment]  # its own entry in the shared cache
            if config.adapter_rank:
                _adapt(layer, last_layer, config.adapter_rank)
            elif config.init == "random":
                for module in layer.modules():
                    base._init_weights(module)
            layers.append(layer.requires_grad_(True) if not config.adapter_rank else layer)
        self.layers = nn.ModuleList(layers)
        if config.own_output_embedding:
            output = base.get_output_embeddings()
            self.output = copy.deepcopy(output, shared_hooks(output)).requires_grad_(True)
            _forget_hooks(self.output)
        self.block = ResidualBlock(base.get_output_embeddings().weight) if config.residual_block else nn.Identity()

    def forward(self, state: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """(batch, length, hidden) -> the same; args and kwargs are what the base passed to its last layer."""
        for layer in self.layers:
            output = layer(state, *args[1:], **{k: v for k, v in kwargs.items() if k != "hidden_states"})
            state = output[0] if isinstance(output, tuple) else output
        return state


class ResidualBlock(nn.Module):
    """x + SiLU(W x + b), the identity at the start; acts on a head's final (normed) state in `readout`.

    Source: Medusa, arXiv 2401.10774, section 2.1.1.
    """

    def __init__(self, output_weight: Tensor):
        super().__init__()
        size, like = output_weight.shape[1], {"dtype": output_weight.dtype, "device": output_weight.device}
        self.weight = nn.Parameter(torch.zeros(size, size, **like))  # type: ignore[call-overload]
        self.bias = nn.Parameter(torch.zeros(size, **like))  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.silu(nn.functional.linear(x, self.weight, self.bias))


class ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient * ctx.factor, None


class _LowRank(nn.Module):
    """weight + B A, with B zero at the start (LoRA)."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        rows, columns = weight.shape
        self.a = nn.Parameter(torch.randn(rank, columns, dtype=weight.dtype, device=weight.device) / rank**0.5)
        self.b = nn.Parameter(torch.zeros(rows, rank, dtype=weight.dtype, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight.detach() + self.b @ self.a


class _Detached(nn.Module):
    """The shared tensor as it is, without a way back for gradients."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.detach()


def _adapt(layer: nn.Module, last_layer: nn.Module, rank: int) -> None:
    """Makes `layer` share every parameter of `last_layer`, with a low-rank adapter on each matrix."""
    sources = dict(last_layer.named_modules())
    for name, module in list(layer.named_modules()):
        for key, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[key] = getattr(sources[name], key)
                change = _LowRank(parameter, rank) if parameter.ndim == 2 else _Detached()
                parametrize.register_parametrization(module, key, change, unsafe=True)


def _unpack(layer: nn.Module) -> None:
    """Gives a copied layer plain weights in place of those that transformers quantised while it opened the base."""
    for module in layer.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and not is_plain(parameter):
                module._parameters[name] = nn.Parameter(unpacked(parameter), requires_grad=False)


def _forget_hooks(layer: nn.Module) -> None:
    forget_hooks(layer)
    for module in layer.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
