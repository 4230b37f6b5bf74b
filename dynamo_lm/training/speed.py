"""How long a training step takes: measured on a part of one, or the arithmetic of a token."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from dynamo_lm.backbone.base_model import decoder_layers
from dynamo_lm.data.packing import Blocks
from dynamo_lm.model.modeling import DynaMoForCausalLM
from dynamo_lm.training.options import TrainingOptions
from dynamo_lm.training.step import Optimization

ENOUGH = 5.0  # seconds: a first pass that takes longer says enough, and is not repeated warm


def seconds_per_step(model: DynaMoForCausalLM, blocks: Blocks, options: TrainingOptions) -> float:
    """Seconds of one optimizer step: a forward and backward pass, measured, times as many as it takes, and an update.

    The pass is one of the step's own on a GPU. On a CPU, where more rows at a time are no faster, it is of one block.
    Measuring on held-out text and writing checkpoints are not included. Weights change.
    """
    rows = measured_rows(model.device, options)
    optimization = Optimization(model, blocks, replace(options, batch_size=rows, accumulation=1))
    seconds = 0.0
    for _ in range(2):
        begin = _now(model.device)
        optimization.gradients(0, blocks.batch(0, rows))
        middle = _now(model.device)
        optimization.update()
        end = _now(model.device)
        seconds = options.batch_size / rows * (middle - begin) + (end - middle)
        if end - begin > ENOUGH:
            break
    return seconds


def operations_per_token(model: DynaMoForCausalLM, options: TrainingOptions, block_size: int) -> int:
    """Additions and multiplications of a trained token: two for each weight that it is multiplied with in the forward pass,
    and four in the backward pass of what learns or lies above it; attention over half a block; all heads' readouts.

    Experts of a mixture count as if all were used, and layers that compute their activations again do so to the end.
    """
    config = model.config.get_text_config()
    layers = decoder_layers(model.base)
    lower, above = (
        sum(p.numel() for m in part for p in m.parameters()) for part in (layers[:-1], [layers[-1], *model.heads])
    )
    own = sum(
        model.output_weight(head).numel() for head in range(2, model.num_heads + 1) if model.config.own_output_embedding
    )
    above -= own  # counted with the readouts
    attention = 2 * block_size * config.hidden_size  # of a layer: two products over half of the positions
    readout = 2 * model.output_weight().numel()
    lower_forward = 2 * lower + attention * (len(layers) - 1)
    above_forward = 2 * above + attention * model.num_heads
    if options.frozen:
        last = sum(p.numel() for p in layers[-1].parameters())
        learned = above_forward - 2 * last - attention
        return lower_forward + 2 * last + attention + 3 * learned + 2 * readout * (model.num_heads - 1)
    again = lower_forward if options.activation_checkpointing else 0
    return 3 * (lower_forward + above_forward + readout * model.num_heads) + again


def measured_rows(device: torch.device, options: TrainingOptions) -> int:
    """The blocks that `seconds_per_step` runs through the model at once."""
    return 1 if device.type == "cpu" else options.batch_size // options.accumulation


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
