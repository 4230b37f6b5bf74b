"""The options of a training run, checked when they are made. Knows no model.

Texts in `Annotated` are the help of the command line, whose options these fields are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from dynamo_lm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """What goes for every optimizer step."""

    # Not in the paper; at LR_M the coupling learns several times slower.
    lr_c: Annotated[float, "Learning rate of the heads' coupling."] = 1e-2
    warmup: Annotated[float, "Share of the steps in which the learning rates rise."] = 0.01
    weight_decay: Annotated[float, "Weight decay of matrices."] = 0.01
    clip: Annotated[float, "Largest norm of a step's gradient; 0 for no limit."] = 1.0
    seed: Annotated[int, "Seed of the new heads and of the order of the text."] = 0
    loss_vocabulary: Annotated[
        float,
        "Train heads 2.. over the commonest tokens that make up this share of the text: 0.99 are some thousand tokens, and "
        "less arithmetic. 1 is the whole vocabulary.",
    ] = 1.0


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """How a step is computed, and what happens every so many steps."""

    accumulation: Annotated[int, "Forward passes a step is split into, for less memory and the same result."] = 1
    activation_checkpointing: Annotated[
        bool, "Compute the activations of a base's layers again in the backward pass, for less memory and more time."
    ] = False
    validate_every: Annotated[int, "Steps between measurements on the held-out text."] = 500
    checkpoint_every: Annotated[int, "Steps between checkpoints at most; a stopped run resumes from the newest."] = 500
    checkpoint_minutes: Annotated[
        float, "Minutes of work that a crash may lose at most; a step or a measurement that takes longer is lost whole."
    ] = 10.0


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(ScheduleOptions, OptimizerOptions):
    """How to train. The defaults are the paper's for Pythia-70M (method.md section 2).

    Without help texts: what the command line decides by device, preset and text (`cli/training_options.py`).
    """

    steps: int  # optimizer steps in all
    lr_b: float = 1e-5  # LR_B: head-1 loss into the base; 0 together with lr_mb freezes the base
    lr_m: float = 1e-3  # LR_M: the heads' own layers
    lr_mb: float = 1e-6  # LR_MB: heads 2..n into the base
    batch_size: int = 64  # blocks a step
    bf16: bool = True  # autocast; weights and optimizer stay in float32
    shard: bool = False  # split weights, gradients and optimizer state over the ranks (FSDP2)
    keep: int = 2  # checkpoints kept
    coupling_only: bool = False  # base and heads stay as they are; their coupling alone learns
    kl: float = 0.0  # share of the divergence from the base's own distribution in the loss of heads 2..; the rest: the token

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "validate_every", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; give 1 or more.")
        for name in ("lr_b", "lr_m", "lr_mb", "lr_c", "weight_decay", "clip"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} is {getattr(self, name)}; give 0 or more.")
        if not self.checkpoint_minutes > 0:
            raise InputError(f"checkpoint_minutes is {self.checkpoint_minutes}; give a number above 0.")
        if self.batch_size % self.accumulation:
            raise InputError(f"batch_size {self.batch_size} is not divisible by accumulation {self.accumulation}.")
        if not 0 <= self.kl <= 1:
            raise InputError(f"kl is {self.kl}; give the share of the divergence in the loss, 0 to 1.")
        if not 0 < self.loss_vocabulary <= 1:
            raise InputError(
                f"loss_vocabulary is {self.loss_vocabulary}; give the share of the tokens to cover, above 0 to 1."
            )
        if self.lr_b == 0 and self.lr_mb > 0:
            raise InputError("lr_mb without lr_b has no meaning (one optimizer moves the base); set both or neither.")
        if self.activation_checkpointing and self.frozen:
            raise InputError("A frozen base keeps no activations; leave activation_checkpointing out.")
        if self.coupling_only and self.shard:
            raise InputError("A coupling is small and needs no sharding; leave shard out (--no-shard).")
        if self.coupling_only and self.lr_b > 0:
            raise InputError("coupling_only leaves the base as it is; set lr_b and lr_mb to 0.")

    @property
    def frozen(self) -> bool:
        """Whether the base stays as it is (variant "-H", method.md section 7)."""
        return self.lr_b == 0

    @property
    def gradient_scale(self) -> float:
        """LR_MB / LR_B, the factor on what heads 2..n send into the base (method.md section 6.6).

        The losses of heads 2..n are multiplied by it and the heads' own layers by its inverse, so it cannot be 0 itself; for
        lr_mb = 0 it is a power of two so small that the heads' share vanishes beside head 1's in float32.
        """
        return 1.0 if self.frozen else (self.lr_mb / self.lr_b or 2.0**-40)
