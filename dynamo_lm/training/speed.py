"""How long a training step takes, measured on a part of one."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

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


def measured_rows(device: torch.device, options: TrainingOptions) -> int:
    """The blocks that `seconds_per_step` runs through the model at once."""
    return 1 if device.type == "cpu" else options.batch_size // options.accumulation


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
