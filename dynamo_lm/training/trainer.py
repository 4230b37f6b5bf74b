"""Training with the modified-CLM objective (method.md section 2): head i predicts the token i positions ahead.

In: a model and a store of tokens. Out: the model trained in place, with checkpoints, a log and a provenance file in a
folder. Every batch is a function of the seed and the step, so a run that was stopped resumes to the losses of one that was
not, and a run of several ranks (`dynamo_lm.training.ranks`) has those of one process, but for rounding. Knows nothing about
text or the command line.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from dynamo_lm.data.packing import Blocks, TrainingBlocks
from dynamo_lm.errors import InputError
from dynamo_lm.model.modeling import DynaMoForCausalLM
from dynamo_lm.training import ranks
from dynamo_lm.training.checkpoints import (
    CheckpointSchedule,
    latest_checkpoint,
    load_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
)
from dynamo_lm.training.feature_cache import FeatureCache
from dynamo_lm.training.log import Progress, _Log
from dynamo_lm.training.options import TrainingOptions
from dynamo_lm.training.step import Optimization, step_blocks
from dynamo_lm.training.validation import Perplexities, validate

logger = logging.getLogger(__name__)


def train(
    model: DynaMoForCausalLM,
    blocks: TrainingBlocks,
    validation: Blocks | None,
    options: TrainingOptions,
    folder: Path,
    *,
    features: FeatureCache | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
    report_part: Callable[[float], None] = lambda steps: None,
) -> Perplexities | None:
    """Trains `model` in place, resuming from the newest checkpoint in `folder` if there is one.

    Every rank calls it with the same arguments; the folder is one that all of them see, and the first rank writes it.

    Args:
        blocks: training blocks; step s of any run with the same seed sees the same ones.
        validation: blocks for the perplexities, or None.
        folder: for checkpoints, `log.jsonl` and TensorBoard files.
        features: stem states of `blocks` that are known already or to be kept; the base must be frozen.
        report: called after every step.
        report_part: called with the steps done: when the first step begins, and within a step, such as 3.25, after each of
            its parts but the last.

    Returns:
        The last validation's perplexities.

    Raises:
        InputError: a loss or gradient that is not finite (names the step and the batch), or a checkpoint of another run.
        KeyboardInterrupt: on Ctrl-C, SIGTERM or SIGHUP, after writing a checkpoint of the last finished step. A step that
            has parts left is given up by a single process; several ranks finish it.
    """
    optimization = Optimization(model, blocks, options, features)
    training = optimization.model
    folder.mkdir(parents=True, exist_ok=True)
    newest = ranks.of_first(latest_checkpoint(folder))
    start = 0 if newest is None else load_checkpoint(newest, training, optimization.optimizer, options)
    last: Perplexities | None = None
    saved = start
    with _log(folder, start) as log, _stop_between_steps() as stopped:
        schedule = CheckpointSchedule(options, time.monotonic())

        def after_part(steps: float) -> None:
            if stopped and ranks.size() == 1:
                raise _StoppedInStep
            report_part(steps)

        def save(steps: int) -> None:
            save_checkpoint(folder, steps, training, optimization.optimizer, options)
            if features is not None:
                features.save()

        report_part(start)
        for step in range(start, options.steps):
            began = time.perf_counter()
            blocks.prepare(range(step * options.batch_size, (step + 1) * options.batch_size))
            batch, random = blocks.rows(step_blocks(step, options)), random_state(training.device)
            ranks.seed_step(options.seed, step)
            try:
                taken = optimization.gradients(step, batch, after_part=after_part)
            except _StoppedInStep:
                optimization.discard()
                set_random_state(random, training.device)
                if step > saved:
                    save(step)
                raise KeyboardInterrupt from None
            if not taken.finite:
                raise InputError(
                    f"The loss of step {step + 1} is not finite (losses {taken.losses + taken.coupled}, gradient norm "
                    f"{taken.gradient_norm}; blocks {step * options.batch_size} to {(step + 1) * options.batch_size - 1} of "
                    f"the run): lower the learning rates or look at that text; the last checkpoint is "
                    f"{latest_checkpoint(folder)}."
                )
            optimization.update()
            rate = options.batch_size * blocks.block_size / (time.perf_counter() - began)
            progress = Progress(step + 1, taken.losses, taken.gradient_norm, rate, taken.coupled)
            done = step + 1 == options.steps
            if validation is not None and (done or (step + 1) % options.validate_every == 0):
                size = max(1, options.batch_size // options.accumulation)
                last, accepted = validate(training, validation, batch_size=size, bf16=options.bf16)
                optimization.train_mode()
                progress = replace(progress, validation=last, acceptance=accepted)
            if log is not None:
                log.write(progress, taken.lr_factor)
            report(progress)
            # Read once: a Ctrl-C from here on waits for the next step's checkpoint.
            due, interrupted = ranks.any_of(schedule.due(step + 1, time.monotonic()), bool(stopped))
            if due or done or interrupted:
                save(step + 1)
                saved = step + 1
            if interrupted:
                raise KeyboardInterrupt
    optimization.finish()
    model.eval()
    return last


def _log(folder: Path, start: int) -> contextlib.AbstractContextManager[_Log | None]:
    """The log, which the first rank writes."""
    return _Log(folder, start) if ranks.rank() == 0 else contextlib.nullcontext()


class _StoppedInStep(Exception):
    """Between two parts of a step."""


@contextlib.contextmanager
def _stop_between_steps() -> Iterator[list[int]]:
    """Yields a list that Ctrl-C, SIGTERM and SIGHUP append to; a second signal stops at once.

    SIGTERM is what Slurm, systemd and `docker stop` send, SIGHUP what a closed terminal sends, unless it is ignored (nohup).
    """
    stopped: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def on_interrupt(number: int, frame: object) -> None:
        if stopped:
            raise KeyboardInterrupt
        stopped.append(number)
        logger.warning("Stopping after this forward pass, with a checkpoint; a second signal stops at once.")

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, on_interrupt) for number in numbers}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
