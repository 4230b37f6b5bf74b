"""What a training run would take, without running it: parameters and an estimate of memory.

Everything is read off a model on the "meta" device, which has shapes and no numbers; activations are what autograd
would keep of one forward. An estimate: allocators, kernels and the data loader add to it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dynamo_lm.backbone.attention_mask import AttentionMaskBuilder
from dynamo_lm.backbone.base_model import decoder_layers
from dynamo_lm.model.modeling import DynaMoForCausalLM
from dynamo_lm.training.loss import CHUNK
from dynamo_lm.training.options import TrainingOptions

CPU_ACTIVATIONS = 10**9  # bytes: more rows at a time are no faster on a CPU
GPU_SHARE = 0.8  # of a GPU's memory: the rest is for its allocator and kernels
MIXED = 0.6  # of float32's activations under bf16 autocast: products are halved, norms and softmax are not


def parameters(model: DynaMoForCausalLM, *, frozen: bool, coupling_only: bool = False) -> dict[str, Any]:
    """How many there are and how many learn; the heads' coupling counts as theirs."""
    base = sum(p.numel() for p in model.base.parameters())
    heads = round(model.overhead() * base)
    changes = sum(p.numel() for name, p in model.base.named_parameters() if ".lora_" in name)  # what learns in place of it
    coupling = sum(p.numel() for p in model.coupling.parameters()) if model.coupling is not None else 0
    return {
        "base": base - changes,
        "heads": heads,
        "coupling": coupling,
        "overhead": round(model.overhead(), 5),
        "trained": coupling if coupling_only else heads + (changes or base) * (not frozen),
    }


def memory(
    model: DynaMoForCausalLM, options: TrainingOptions, block_size: int, *, fused: bool, ranks: int = 1
) -> dict[str, int]:
    """Bytes of a rank by purpose, at the fullest moment of a step; `model` is on the meta device.

    Weights are float32, and so are the gradients and AdamW's two moments of what is trained. `fused` attention keeps no
    scores; torch's has such kernels on GPUs, but none for CPUs that takes a mask and trains.
    """
    rows = -(-options.batch_size // (ranks * options.accumulation))
    config = model.config.get_text_config()
    states = model.num_heads * rows * block_size * config.hidden_size * 4
    bytes_ = _without_activations(model, options, ranks)
    bytes_["activations"] = _saved_by_autograd(model, options, rows, block_size, fused) + 2 * states
    return bytes_ | {"total": sum(bytes_.values())}


def fitting_accumulation(
    model: DynaMoForCausalLM,
    options: TrainingOptions,
    block_size: int,
    *,
    fused: bool,
    gpu_memory: int | None = None,
    ranks: int = 1,
) -> int:
    """The fewest forward passes per step that leave a CPU's activations below 1 GB, or fit a GPU; `model` is on "meta".

    As many as a rank has blocks in a step, one each, where nothing fits. A function of the device's kind and size, not of
    what else runs on it, so that a run resumes with the same number.

    Args:
        gpu_memory: bytes of each rank's GPU; None for CPUs.
    """
    blocks = max(1, options.batch_size // ranks)
    of_pass = memory(model, replace(options, accumulation=1), block_size, fused=fused, ranks=ranks)["activations"]
    divisors = [parts for parts in range(1, blocks + 1) if options.batch_size % parts == 0]
    for parts in divisors:
        room = float(CPU_ACTIVATIONS)
        if gpu_memory is not None:
            others = _without_activations(model, replace(options, accumulation=parts), ranks)
            room = GPU_SHARE * gpu_memory - sum(others.values())
        if of_pass / parts <= room:
            return parts
    return divisors[-1]


def _without_activations(model: DynaMoForCausalLM, options: TrainingOptions, ranks: int) -> dict[str, int]:
    """Bytes by purpose that do not depend on the blocks of a pass."""
    count = parameters(model, frozen=options.frozen, coupling_only=options.coupling_only)
    split = ranks if options.shard else 1
    gathered, unreduced = _of_shards(model, options, count["trained"]) if split > 1 else (0, 0)
    vocab_size = model.config.get_text_config().vocab_size
    return {
        "weights": 4 * (count["base"] + count["heads"]) // split + gathered,
        "gradients": 4 * count["trained"] // split + unreduced,
        "optimizer": 8 * count["trained"] // split,
        "logits": (3 if model.coupling is None else 5) * 4 * CHUNK * vocab_size,  # two more for the corrected ones
    }


def _of_shards(model: DynaMoForCausalLM, options: TrainingOptions, trained: int) -> tuple[int, int]:
    """Bytes of weights that a sharded rank has gathered at most, and of gradients before they are reduced.

    As `sharding.sharded` splits: the root in float32, layers and heads in the precision of the forward. Of a frozen base
    two layers at a time are whole, of another all; the gradients of all, in float32, where a step has several passes.
    """
    size = 2 if options.bf16 else 4
    base = [_size(layer) for layer in decoder_layers(model.base)]
    heads = [_size(head) for head in model.heads]
    root = _size(model) - sum(base) - sum(heads)
    layers = 2 * max(base) if options.frozen else sum(base)
    gathered = 4 * root + size * (layers + sum(heads))
    if options.accumulation > 1:
        return gathered, 4 * trained
    last = 2 * max([*heads, *([] if options.frozen else base)])
    return gathered, size * last + (0 if options.frozen else 4 * root)


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _saved_by_autograd(model: DynaMoForCausalLM, options: TrainingOptions, rows: int, block_size: int, fused: bool) -> int:
    if options.coupling_only:
        return 0  # no backward through the model
    if options.frozen:
        model.freeze_base()
    weights = {id(p) for p in model.parameters()}
    kept: dict[int, Tensor] = {}  # kept alive, so that no two share an id
    of_layers: list[int] = []  # bytes kept by each layer that can compute its activations again
    lower = list(decoder_layers(model.base))[:-1] if options.activation_checkpointing else []

    def size() -> int:
        return sum(t.numel() * t.element_size() for t in kept.values())

    def keep(tensor: Tensor) -> Tensor:
        whole = tensor if tensor._base is None else tensor._base
        scores = whole.ndim >= 3 and whole.shape[-2:] == (block_size, block_size)
        if id(whole) not in weights and not (fused and scores):
            kept[id(whole)] = whole
        return tensor

    order = torch.arange(block_size, device="meta").expand(1, -1)
    mask = AttentionMaskBuilder.of(model.base.config, torch.float32).mask(order, order)
    model.train()
    began: list[int] = []
    hooks = [layer.register_forward_pre_hook(lambda *_: began.append(size())) for layer in lower]
    hooks += [layer.register_forward_hook(lambda *_: of_layers.append(size() - began[-1])) for layer in lower]
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            tokens = torch.zeros(1, block_size, dtype=torch.long, device="meta")
            model.hidden(tokens, attention_mask=mask, position_ids=order)
        one_row = size()
        if lower:  # they keep their inputs, and one of them all that it kept before
            inputs = len(lower) * block_size * model.config.get_text_config().hidden_size * 4
            one_row += inputs + max(of_layers) - sum(of_layers)
    except RuntimeError:  # mixtures of experts do not run on "meta"
        one_row = _of_dense_layers(model, options, block_size, fused)
    finally:
        for hook in hooks:
            hook.remove()
    saved = rows * one_row
    return round(saved * (MIXED if options.bf16 else 1.0))


def _of_dense_layers(model: DynaMoForCausalLM, options: TrainingOptions, block_size: int, fused: bool) -> int:
    """Bytes of one block's activations in float32 by the formula for dense layers with an MLP of four times the width.

    Source: Korthikanti et al., Reducing Activation Recomputation in Large Transformer Models, 2022, section 4.1; its bytes
    are those of 16-bit numbers.
    """
    config = model.config.get_text_config()
    layers = model.num_heads + (0 if options.frozen else config.num_hidden_layers - 1)
    scores = 0 if fused else 5 * getattr(config, "num_attention_heads", 1) * block_size
    return 2 * layers * block_size * (34 * config.hidden_size + scores)
