"""Training with the modified-CLM objective (method.md section 2): head i predicts the token i positions ahead.

In: a model and a store of tokens. Out: the model trained in place, with checkpoints, a log and a provenance file in a
folder. Every batch is a function of the seed and the step, so a run that was stopped resumes to the losses of one that was
not. Knows nothing about text or the command line.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynamo_lm.data.packing import Blocks
from dynamo_lm.errors import InputError
from dynamo_lm.model.modeling import DynaMoForCausalLM
from dynamo_lm.training.checkpoints import latest_checkpoint, load_checkpoint, save_checkpoint
from dynamo_lm.training.feature_cache import FeatureCache
from dynamo_lm.training.log import Progress, _Log
from dynamo_lm.training.loss import heads_loss, loss_vocabulary, target_counts
from dynamo_lm.training.options import TrainingOptions
from dynamo_lm.training.validation import Perplexities, validate

logger = logging.getLogger(__name__)


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


def train(
    model: DynaMoForCausalLM,
    blocks: Blocks,
    validation: Blocks | None,
    options: TrainingOptions,
    folder: Path,
    *,
    features: FeatureCache | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Perplexities | None:
    """Trains `model` in place, resuming from the newest checkpoint in `folder` if there is one.

    Args:
        blocks: training blocks; step s of any run with the same seed sees the same ones.
        validation: blocks for the perplexities, or None.
        folder: for checkpoints, `log.jsonl` and TensorBoard files.
        features: stem states of `blocks` that are known already or to be kept; the base must be frozen.
        report: called after every step.

    Returns:
        The last validation's perplexities.

    Raises:
        InputError: a loss or gradient that is not finite (names the step and the batch), or a checkpoint of another run.
        KeyboardInterrupt: after writing a checkpoint of the last finished step.
    """
    device = model.device
    if options.coupling_only:
        if model.coupling is None:
            raise InputError("There is no coupling to train; add one with dynamo_lm.model.coupling.add_coupling.")
        model.requires_grad_(False)
        model.coupling.requires_grad_(True)
    sequential = model.config.sequential
    if sequential and not options.frozen:
        raise InputError("A sequential head (eagle3) learns from a base that stays as it is; freeze the base (--freeze).")
    if options.frozen:
        model.freeze_base()
    elif features is not None:
        raise InputError("The feature cache keeps what a frozen base computes; freeze the base or train without the cache.")
    _train_mode(model, options)
    groups = parameter_groups(model, options)
    if not groups:
        raise InputError("There is nothing to train: give a learning rate, and a frozen base more than one head.")
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    folder.mkdir(parents=True, exist_ok=True)
    start = 0
    newest = latest_checkpoint(folder)
    if newest is not None:
        start = load_checkpoint(newest, model, optimizer, options)
    trained, coupling = [p for group in optimizer.param_groups for p in group["params"]], _coupling(model)
    clipped = [[p for p in trained if (id(p) in coupling) == of_coupling] for of_coupling in (False, True)]
    vocabulary = model.sequential_head.draft_ids if sequential else None
    if vocabulary is None and options.loss_vocabulary < 1:  # counting reads all of the text
        learned = blocks.learned_counts(model.output_weight().shape[0])
        vocabulary = loss_vocabulary(learned, options.loss_vocabulary)
    last: Perplexities | None = None
    step = start
    with _Log(folder, start) as log, _stop_between_steps() as stopped:
        batches = blocks.batches(start, options.batch_size)
        for step in range(start, options.steps):
            began = time.perf_counter()
            batch = next(batches)
            counts = target_counts(batch["tokens"], batch["segments"], model.num_heads, batch.get("responses"))
            batch = {name: value.to(device) for name, value in batch.items()}
            factor = learning_rate_factor(step, options.steps, options.warmup)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            parts = _split(batch, options.accumulation)
            numbers = iter(range(step * options.batch_size, (step + 1) * options.batch_size))
            sums = torch.zeros(len(counts) + (len(counts) - 1 if coupling else 0))
            for part in parts:
                given: dict[str, Any] = dict(part)
                if features is not None:
                    of_part = [next(numbers) for _ in range(len(part["tokens"]))]
                    given |= {"stem": features.states_of(of_part, part), "above": features.above}
                sums += heads_loss(model, **given, options=options, counts=counts, vocabulary=vocabulary)
            means = counts + counts[1:] if coupling else counts
            losses = tuple((sums / torch.tensor(means).clamp(min=1)).tolist())
            # The coupling by itself, so that its gradient has no say in the length of the heads' step.
            norms = [torch.nn.utils.clip_grad_norm_(some, options.clip or math.inf).item() for some in clipped if some]
            norm = math.hypot(*norms)
            if not math.isfinite(norm) or not all(map(math.isfinite, losses)):
                raise InputError(
                    f"The loss of step {step + 1} is not finite (losses {losses}, gradient norm {norm}; blocks "
                    f"{step * options.batch_size} to {(step + 1) * options.batch_size - 1} of the run): lower the "
                    f"learning rates or look at that text; the last checkpoint is {latest_checkpoint(folder)}."
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            rate = batch["tokens"].numel() / (time.perf_counter() - began)
            n = model.num_heads
            progress = Progress(step + 1, losses[:n], norm, rate, losses[n:])
            done = step + 1 == options.steps
            if validation is not None and (done or (step + 1) % options.validate_every == 0):
                size = max(1, options.batch_size // options.accumulation)
                last, accepted = validate(model, validation, batch_size=size, bf16=options.bf16)
                _train_mode(model, options)
                progress = replace(progress, validation=last, acceptance=accepted)
            log.write(progress, factor)
            report(progress)
            interrupted = bool(stopped)  # read once: a Ctrl-C from here on waits for the next step's checkpoint
            if done or interrupted or (step + 1) % options.checkpoint_every == 0:
                save_checkpoint(folder, step + 1, model, optimizer, options)
                if features is not None:
                    features.save()
            if interrupted:
                raise KeyboardInterrupt
    model.eval()
    return last


def _coupling(model: DynaMoForCausalLM) -> set[int]:
    """Ids of the coupling's parameters."""
    return set() if model.coupling is None else {id(p) for p in model.coupling.parameters()}


def _train_mode(model: DynaMoForCausalLM, options: TrainingOptions) -> None:
    """Training mode for what is trained: no dropout in the rest."""
    model.train()
    if options.frozen:
        model.base.eval()
    if options.coupling_only:
        model.heads.eval()


@contextlib.contextmanager
def _stop_between_steps() -> Iterator[list[int]]:
    """Yields a list that Ctrl-C and SIGTERM append to, so that no step is cut in half; a second signal stops at once.

    SIGTERM is what Slurm, systemd and `docker stop` send: it saves a checkpoint as Ctrl-C does.
    """
    stopped: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def on_interrupt(number: int, frame: object) -> None:
        if stopped:
            raise KeyboardInterrupt
        stopped.append(number)
        logger.warning("Stopping after this step, with a checkpoint; a second signal stops at once.")

    before = {number: signal.signal(number, on_interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _split(batch: dict[str, Tensor], parts: int) -> Iterator[dict[str, Tensor]]:
    for chunks in zip(*(value.chunk(parts) for value in batch.values()), strict=True):
        yield dict(zip(batch, chunks, strict=True))
