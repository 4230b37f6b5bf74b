"""What a training run would take, without running it: parameters and an estimate of memory.

Everything is read off a model on the "meta" device, which has shapes and no numbers; activations are what autograd
would keep of one forward. An estimate: allocators, kernels and the data loader add to it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dynamo_lm.backbone.attention_mask import AttentionMaskBuilder
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


def memory(model: DynaMoForCausalLM, options: TrainingOptions, block_size: int, *, fused: bool) -> dict[str, int]:
    """Bytes by purpose, at the fullest moment of a step; `model` is on the meta device.

    Weights are float32, and so are the gradients and AdamW's two moments of what is trained. `fused` attention keeps no
    scores; torch's has such kernels on GPUs, but none for CPUs that takes a mask and trains.
    """
    count = parameters(model, frozen=options.frozen, coupling_only=options.coupling_only)
    rows = options.batch_size // options.accumulation
    config = model.config.get_text_config()
    states = model.num_heads * rows * block_size * config.hidden_size * 4
    bytes_ = {
        "weights": 4 * (count["base"] + count["heads"]),
        "gradients": 4 * count["trained"],
        "optimizer": 8 * count["trained"],
        "activations": _saved_by_autograd(model, options, rows, block_size, fused) + 2 * states,
        "logits": (3 if model.coupling is None else 5) * 4 * CHUNK * config.vocab_size,  # two more for the corrected ones
    }
    return bytes_ | {"total": sum(bytes_.values())}


def fitting_accumulation(
    model: DynaMoForCausalLM,
    options: TrainingOptions,
    block_size: int,
    *,
    fused: bool,
    device: torch.device,
    ranks: int = 1,
) -> int:
    """The fewest forward passes per step that leave a CPU's activations below 1 GB, or fit a GPU; `model` is on "meta".

    As many as a rank has blocks in a step, one each, where nothing fits. A function of the device's kind and size, not of
    what else runs on it, so that a run resumes with the same number.
    """
    blocks = max(1, options.batch_size // ranks)
    whole = memory(model, replace(options, batch_size=blocks, accumulation=1), block_size, fused=fused)
    room = float(CPU_ACTIVATIONS)
    if device.type == "cuda":
        room = GPU_SHARE * torch.cuda.get_device_properties(device).total_memory - (whole["total"] - whole["activations"])
    divisors = [parts for parts in range(1, blocks + 1) if options.batch_size % parts == 0]
    return next((parts for parts in divisors if whole["activations"] / parts <= room), divisors[-1])


def _saved_by_autograd(model: DynaMoForCausalLM, options: TrainingOptions, rows: int, block_size: int, fused: bool) -> int:
    if options.coupling_only:
        return 0  # no backward through the model
    if options.frozen:
        model.freeze_base()
    weights = {id(p) for p in model.parameters()}
    kept: dict[int, Tensor] = {}  # kept alive, so that no two share an id

    def keep(tensor: Tensor) -> Tensor:
        whole = tensor if tensor._base is None else tensor._base
        scores = whole.ndim >= 3 and whole.shape[-2:] == (block_size, block_size)
        if id(whole) not in weights and not (fused and scores):
            kept[id(whole)] = whole
        return tensor

    order = torch.arange(block_size, device="meta").expand(1, -1)
    mask = AttentionMaskBuilder.of(model.base.config, torch.float32).mask(order, order)
    model.train()
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            tokens = torch.zeros(1, block_size, dtype=torch.long, device="meta")
            model.hidden(tokens, attention_mask=mask, position_ids=order)
        one_row = sum(t.numel() * t.element_size() for t in kept.values())
    except RuntimeError:  # mixtures of experts do not run on "meta"
        one_row = _of_dense_layers(model, options, block_size, fused)
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
