"""FSDP2: a model whose parameters, gradients and optimizer state are split over the ranks.

In: a whole model on every rank. Out: a twin whose parameters are shards (DTensors), which computes what the model computes,
and at the end the trained weights back in the model. Each decoder layer and each head is a unit that is gathered and whose
gradients are reduced by itself; embeddings, final norm and coupling are the root's. Knows no optimizer and no files.

The heads run in a hook on the last layer and the readout is called many times a step: `hidden` is the root's forward, after
which the root stays gathered, and the gradients that the readouts leave at the output embedding are reduced with the root's
others, at the end of the backward that begins at `hidden`.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from dynamo_lm.backbone.base_model import decoder_layers
from dynamo_lm.errors import InputError
from dynamo_lm.model.modeling import DynaMoForCausalLM


def sharded(model: DynaMoForCausalLM, device: torch.device, *, bf16: bool, frozen: bool) -> DynaMoForCausalLM:
    """The twin, on `device`; layer by layer, so that a model that is on the CPU is never whole on a GPU.

    Layers and heads are gathered in bfloat16 under `bf16` and gradients are reduced in float32. The root is gathered in
    float32: the output embedding's gradient is a sum over many chunks of positions. A frozen base's layers are split again
    after each forward, others after the backward (the paper's SHARD_GRAD_OP).

    Raises:
        InputError: adapters, which share a layer's parameters.
    """
    if model.config.adapter_rank:
        raise InputError("Adapters share the last layer's weights and cannot be sharded; leave --shard out (--no-shard).")
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # nothing changes it in place
    twin = _twin(model)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = (
        MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) if bf16 else MixedPrecisionPolicy()
    )
    for layer in decoder_layers(twin.base):
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=frozen)
    for head in twin.heads:
        fully_shard(head, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        if model.config.sequential:
            register_fsdp_forward_method(head, "unroll")
    fully_shard(twin, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(twin, "hidden")
    for module in _units(twin):
        module.set_gradient_divide_factor(1.0)  # losses are divided by the targets of all ranks already
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    return twin


def synchronize(model: nn.Module, last: bool) -> None:
    """Say whether the next backward is the last of its step: only then gradients are reduced and parameters split again."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)
        model.set_is_last_backward(last)


def split_again(model: nn.Module) -> None:
    """Free what forwards without a backward have gathered."""
    for module in _units(model):
        module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A tensor or all of a shard's; every rank calls it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def laid_out(value: Tensor, like: Tensor) -> Tensor:
    """A tensor, whole on every rank or split already, on the device of another and split as that is."""
    if isinstance(like, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return value.to(like.device)


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


@torch.no_grad()
def give_back(twin: nn.Module, model: nn.Module) -> None:
    """Copies the twin's trained parameters into the model on every rank."""
    if twin is not model:
        for shard, parameter in zip(twin.parameters(), model.parameters(), strict=True):
            if parameter.requires_grad:
                parameter.copy_(whole(shard))


def _units(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _twin(model: DynaMoForCausalLM) -> DynaMoForCausalLM:
    """A copy with parameters of its own over the same memory."""
    memo: dict[int, Any] = {id(model.cooccurrence): model.cooccurrence}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.data, requires_grad=parameter.requires_grad)
    return copy.deepcopy(model, memo)
