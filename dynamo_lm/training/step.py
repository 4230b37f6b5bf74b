"""Optimizer steps: a batch in, changed weights and losses out. Knows no files.

With several ranks each takes its share of a step's blocks. Losses are sums divided by the targets of all ranks, so that a
step is the same on any number of them, but for rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from dynamo_lm.backbone.base_model import checkpoint_activations
from dynamo_lm.data.packing import TrainingBlocks
from dynamo_lm.errors import InputError
from dynamo_lm.model.modeling import DynaMoForCausalLM
from dynamo_lm.training import ranks
from dynamo_lm.training.feature_cache import FeatureCache
from dynamo_lm.training.loss import heads_loss, loss_vocabulary, target_counts
from dynamo_lm.training.options import TrainingOptions
from dynamo_lm.training.sharding import give_back, is_sharded, sharded, split_again, synchronize, whole


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up over the first `warmup` share of the steps, then cosine to 0 at the last (method.md section 2)."""
    rise = max(1, round(steps * warmup))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def parameter_groups(model: DynaMoForCausalLM, options: TrainingOptions) -> list[dict]:
    """AdamW groups: the base at LR_B, the heads' own layers at LR_M, their coupling at a rate of its own; weight decay on
    matrices only."""
    base, coupling = {id(p) for p in model.base.parameters()}, _coupling(model)
    named = {id(p): p for p in model.parameters() if p.requires_grad}
    heads = named.keys() - base - coupling
    groups = []
    for part, rate in ((base, options.lr_b), (heads, options.lr_m), (coupling, options.lr_c)):
        for matrices in (True, False):
            chosen = [p for key, p in named.items() if key in part and (p.ndim >= 2) == matrices]
            if chosen and rate > 0:
                decay = options.weight_decay if matrices else 0.0
                groups.append({"params": chosen, "lr": rate, "initial_lr": rate, "weight_decay": decay})
    return groups


class Losses(NamedTuple):
    """What one step reports."""

    losses: tuple[float, ...]  # mean nats per target, by head; 0 for a frozen base's head 1
    coupled: tuple[float, ...]  # of heads 2..n given the true token one place before
    gradient_norm: float
    lr_factor: float

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, (self.gradient_norm, *self.losses, *self.coupled)))


class Optimization:
    """A model with its optimizer, ready for steps.

    Attributes:
        model: the model, or its twin in shards.
        optimizer: AdamW over what trains.
    """

    def __init__(
        self,
        model: DynaMoForCausalLM,
        blocks: TrainingBlocks,
        options: TrainingOptions,
        features: FeatureCache | None = None,
    ):
        """Freezes what does not train.

        Args:
            blocks: whose targets decide which tokens `options.loss_vocabulary` covers.
            features: stem states of `blocks`; the base must be frozen.

        Raises:
            InputError: options that leave nothing to train, or that the model does not allow.
        """
        if options.coupling_only:
            if model.coupling is None:
                raise InputError("There is no coupling to train; add one with dynamo_lm.model.coupling.add_coupling.")
            model.requires_grad_(False)
            model.coupling.requires_grad_(True)
        sequential = model.config.sequential
        if sequential and not options.frozen:
            raise InputError(
                "A sequential head (eagle3) learns from a base that stays as it is; freeze the base (--freeze)."
            )
        if options.loss_vocabulary < 1 and model.config.own_output_embedding and not sequential:
            raise InputError(
                "Heads with an output embedding of their own learn nothing about tokens that the loss leaves out, and would "
                "draft them; train such heads with --loss-vocabulary 1."
            )
        if options.frozen:
            model.freeze_base()
        elif features is not None:
            raise InputError(
                "The feature cache keeps what a frozen base computes; freeze the base or train without the cache."
            )
        passes = ranks.size() * options.accumulation
        if options.batch_size < passes:
            raise InputError(
                f"A step of {options.batch_size} blocks cannot be split into {passes} forward passes, "
                f"{options.accumulation} on each of {ranks.size()} ranks; give a larger --batch-size, a smaller "
                "--accumulation or fewer ranks."
            )
        if options.shard and features is not None:
            raise InputError("The feature cache needs a model that is whole on every rank; leave --shard out (--no-shard).")
        self._whole, self.options, self.features = model, options, features
        if options.shard and ranks.size() > 1:
            model = sharded(model, ranks.device(), bf16=options.bf16, frozen=options.frozen)
        self.model = model
        if options.activation_checkpointing:
            checkpoint_activations(model.base)
        self.train_mode()
        groups = parameter_groups(model, options)
        if not groups:
            raise InputError("There is nothing to train: give a learning rate, and a frozen base more than one head.")
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
        self._trained, coupling = [p for group in groups for p in group["params"]], _coupling(model)
        if not is_sharded(model):
            ranks.copy_from_first(self._trained)
        # The coupling by itself, so that its gradient has no say in the length of the heads' step.
        clipped = [[p for p in self._trained if (id(p) in coupling) == of_coupling] for of_coupling in (False, True)]
        self._clipped = [parameters for parameters in clipped if parameters]
        self._vocabulary = model.sequential_head.draft_ids if sequential else None
        if self._vocabulary is None and options.loss_vocabulary < 1:  # counting reads all of the text
            learned = blocks.learned_counts(model.output_weight().shape[0])
            self._vocabulary = loss_vocabulary(learned, options.loss_vocabulary)

    def train_mode(self) -> None:
        """Training mode for what is trained: no dropout in the rest."""
        split_again(self.model)
        self.model.train()
        if self.options.frozen:
            self.model.base.eval()
        if self.options.coupling_only:
            self.model.heads.eval()

    def gradients(
        self, step: int, batch: dict[str, Tensor], *, after_part: Callable[[float], None] = lambda steps: None
    ) -> Losses:
        """Take the gradients of one step, in `options.accumulation` parts.

        Args:
            step: its number, from 0; sets the learning rates.
            batch: the blocks of the step that are this rank's share, from `Blocks.rows`, on the CPU.
            after_part: called after every part but the last with the steps done, such as 3.25.
        """
        model, options = self.model, self.options
        own = target_counts(batch["tokens"], batch["segments"], model.num_heads, batch.get("responses"))
        counts = ranks.add_up(torch.tensor(own)).tolist()
        batch = {name: value.to(model.device) for name, value in batch.items()}
        factor = learning_rate_factor(step, options.steps, options.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        coupled = model.coupling is not None
        sums = torch.zeros(len(counts) + (len(counts) - 1 if coupled else 0))
        numbers = iter(step_blocks(step, options))
        for part_number, part in enumerate(_split(batch, options.accumulation), start=1):
            synchronize(model, part_number == options.accumulation)
            given: dict[str, Any] = dict(part)
            if self.features is not None:
                of_part = [next(numbers) for _ in range(len(part["tokens"]))]
                given |= {"stem": self.features.states_of(of_part, part), "above": self.features.above}
            sums += heads_loss(model, **given, options=options, counts=counts, vocabulary=self._vocabulary)
            if part_number < options.accumulation:
                after_part(step + part_number / options.accumulation)
        if not is_sharded(model):
            ranks.add_up_gradients(self._trained)
        means = counts + counts[1:] if coupled else counts
        losses = tuple((ranks.add_up(sums) / torch.tensor(means).clamp(min=1)).tolist())
        norms = [whole(clip_grad_norm_(some, options.clip or math.inf)).item() for some in self._clipped]
        return Losses(losses[: model.num_heads], losses[model.num_heads :], math.hypot(*norms), factor)

    def update(self) -> None:
        """Change the weights by the gradients that were taken."""
        self.optimizer.step()
        self.discard()

    def finish(self) -> None:
        """Put the trained weights into the model that was given."""
        give_back(self.model, self._whole)

    def discard(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)


def step_blocks(step: int, options: TrainingOptions) -> range:
    """The numbers of the blocks of a step, counted through the epochs put end to end, that are this rank's share."""
    share, begin = ranks.share(options.batch_size), step * options.batch_size
    return range(begin + share.start, begin + share.stop)


def _coupling(model: DynaMoForCausalLM) -> set[int]:
    """Ids of the coupling's parameters."""
    return set() if model.coupling is None else {id(p) for p in model.coupling.parameters()}


def _split(batch: dict[str, Tensor], parts: int) -> Iterator[dict[str, Tensor]]:
    for chunks in zip(*(value.tensor_split(parts) for value in batch.values()), strict=True):
        yield dict(zip(batch, chunks, strict=True))
