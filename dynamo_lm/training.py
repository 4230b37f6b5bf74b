"""Training with the modified-CLM objective (method.md section 2): head i predicts the token i positions ahead.

In: a model and a store of tokens. Out: the model trained in place, with checkpoints, a log and a provenance file in a
folder. Every batch is a function of the seed and the step, so a run that was stopped resumes to the losses of one that was
not. Knows nothing about text or the command line.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dynamo_lm.checkpoints import latest_checkpoint, load_checkpoint, save_checkpoint
from dynamo_lm.errors import InputError
from dynamo_lm.masks import MaskForm
from dynamo_lm.model import DynaMoForCausalLM
from dynamo_lm.packing import IGNORED, Blocks, targets

CHUNK = 512  # positions whose logits exist at one time, whatever the number of heads; fits a cache, and is faster for it


@dataclass(frozen=True)
class TrainingOptions:
    """How to train. The defaults are the paper's for Pythia-70M (method.md section 2)."""

    steps: int  # optimizer steps in all
    lr_b: float = 1e-5  # LR_B: head-1 loss into the base; 0 together with lr_mb freezes the base
    lr_m: float = 1e-3  # LR_M: the heads' own layers
    lr_mb: float = 1e-6  # LR_MB: heads 2..n into the base
    lr_c: float = 1e-2  # the heads' coupling, if any (not in the paper; at LR_M it learns several times slower)
    batch_size: int = 64  # blocks a step
    accumulation: int = 1  # forward passes a step is split into
    warmup: float = 0.01  # share of the steps
    weight_decay: float = 0.01  # on matrices only
    clip: float = 1.0  # largest gradient norm, 0 for none
    bf16: bool = True  # autocast; weights and optimizer stay in float32
    seed: int = 0
    validate_every: int = 500  # steps
    checkpoint_every: int = 500  # steps
    keep: int = 2  # checkpoints kept
    coupling_only: bool = False  # base and heads stay as they are; their coupling alone learns

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "validate_every", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; give 1 or more.")
        for name in ("lr_b", "lr_m", "lr_mb", "lr_c", "weight_decay", "clip"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} is {getattr(self, name)}; give 0 or more.")
        if self.batch_size % self.accumulation:
            raise InputError(f"batch_size {self.batch_size} is not divisible by accumulation {self.accumulation}.")
        if self.lr_b == 0 and self.lr_mb > 0:
            raise InputError("lr_mb without lr_b has no meaning (one optimizer moves the base); set both or neither.")
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


def heads_loss(
    model: DynaMoForCausalLM,
    tokens: Tensor,
    segments: Tensor,
    positions: Tensor,
    responses: Tensor | None = None,
    *,
    options: TrainingOptions | None = None,
    counts: list[int] | None = None,
) -> Tensor:
    """The modified-CLM losses of one batch; with `options`, also their gradients.

    Logits exist for `CHUNK` positions of one head at a time: each chunk's gradient with respect to its hidden states is
    taken at once, and one backward through the heads and the base follows.

    A coupling adds one loss for each extra head: that of its corrected logits given the true token one place before. It
    sends no gradient beyond the coupling, neither into hidden states nor into the output embedding: heads and base learn
    exactly what they would learn without it, and stay usable alone.

    Args:
        tokens, segments, positions: (batch, length), from `dynamo_lm.packing.Blocks`.
        responses: (batch, length), from `WholeBlocks`: only these tokens are targets, of any head; None for all.
        options: take gradients, scaled for `options.gradient_scale`; a frozen base skips head 1's loss (its entry is 0).
            Under `coupling_only` nothing but the coupling gets any, and there is no backward through the heads.
            Without options there are no gradients and the model computes in its own precision.
        counts: targets of each head that the loss is a mean over (all accumulated batches); this batch's by default.

    Returns:
        Sums of the negative log-likelihood in nats over the valid targets, (num_heads,), float32, without gradient; with a
        coupling (2 num_heads - 1,), the corrected ones of heads 2..n behind the others.

    Source: paper, modified-CLM objective; method.md sections 2 and 6.6.
    """
    n, coupling, learn = model.num_heads, model.coupling, options is not None
    alone = options is not None and options.coupling_only
    counts = counts or target_counts(tokens, segments, n, responses)
    scale = options.gradient_scale if options else 1.0
    autocast = torch.autocast(tokens.device.type, torch.bfloat16, enabled=options is not None and options.bf16)
    with torch.set_grad_enabled(learn and not alone), autocast:
        hidden = packed_hidden(model, tokens, segments, positions, gradient_scale=scale)
        gradient = torch.zeros_like(hidden) if hidden.requires_grad else None
        sums = torch.zeros(n if coupling is None else 2 * n - 1, device=hidden.device)  # read once, at the end
        for head in range(1, n + 1):
            if options is not None and options.frozen and head == 1:
                continue
            labels = targets(tokens, segments, head, responses).flatten()
            at_loss, at_states = (1.0 if head == 1 else scale), 1.0
            if model.config.own_output_embedding:  # it learns at its head's full rate: scale what is sent on
                at_loss, at_states = at_states, at_loss
            states, count = hidden[head - 1].flatten(0, 1), max(counts[head - 1], 1)
            for start in range(0, len(labels), CHUNK):
                here = slice(start, start + CHUNK)
                chunk = states[here].detach().requires_grad_(gradient is not None)
                logits = model.readout(chunk[None], head)[0].float()  # (chunk, vocabulary)
                loss = F.cross_entropy(logits, labels[here], ignore_index=IGNORED, reduction="sum")
                sums[head - 1] += loss.detach()
                if loss.requires_grad:
                    (loss * (at_loss / count)).backward()
                if gradient is not None:
                    gradient[head - 1].flatten(0, 1)[here] = at_states * chunk.grad  # type: ignore[operator]
                if coupling is not None and head > 1:
                    before = targets(tokens, segments, head - 1).flatten()[here]  # a prompt's token, too
                    with torch.set_grad_enabled(learn):
                        corrected = coupled_logits(model, head, chunk.detach(), before, logits.detach())
                        loss = F.cross_entropy(corrected, labels[here], ignore_index=IGNORED, reduction="sum")
                        sums[n + head - 2] += loss.detach()
                        if learn:
                            (loss / count).backward()
    if gradient is not None:
        hidden.backward(gradient)
    return sums.cpu()


def coupled_logits(model: DynaMoForCausalLM, head: int, states: Tensor, before: Tensor, logits: Tensor) -> Tensor:
    """Head `head`'s logits given the true tokens one place before: (positions, vocabulary), float32.

    Args:
        head: 2..n, of a model with a coupling.
        states: its final hidden states, (positions, hidden).
        before: labels of head `head` - 1, (positions,); where there is none the result has no meaning.
        logits: its own logits, (positions, vocabulary).
    """
    assert model.coupling is not None
    shift = model.coupling.shift(head, states, before.clamp(min=0))
    return logits + F.linear(shift, model.output_weight(head).detach()).float()


def packed_hidden(
    model: DynaMoForCausalLM, tokens: Tensor, segments: Tensor, positions: Tensor, *, gradient_scale: float = 1.0
) -> Tensor:
    """`model.hidden` of packed blocks, (batch, length) each, in which no document sees another."""
    order = torch.arange(tokens.shape[1], device=tokens.device)[None]
    mask = MaskForm.of(model.base.config, model.dtype).mask(order, order, query_segments=segments, key_segments=segments)
    return model.hidden(tokens, attention_mask=mask, position_ids=positions, gradient_scale=gradient_scale)


def target_counts(tokens: Tensor, segments: Tensor, num_heads: int, responses: Tensor | None = None) -> list[int]:
    """How many positions have a target `i` ahead in the same document (and response), for i = 1..num_heads."""
    return [int((targets(tokens, segments, head, responses) != IGNORED).sum()) for head in range(1, num_heads + 1)]


def scored_positions(tokens: Tensor, segments: Tensor, num_heads: int, responses: Tensor | None = None) -> Tensor:
    """Where every head has a target: bool (batch, length)."""
    each = [targets(tokens, segments, head, responses) != IGNORED for head in range(1, num_heads + 1)]
    return torch.stack(each).all(0)


@dataclass(frozen=True)
class Perplexities:
    """Multi-token perplexities over the same positions: those with all n targets (method.md section 5)."""

    heads: tuple[float, ...]  # PPL_1 .. PPL_n
    joint: tuple[float, ...]  # PPL_1:1 .. PPL_1:n, the product of heads as the joint, per token
    top1: tuple[float, ...]  # share of the targets that are head i's most likely token
    coupled: tuple[float, ...] = ()  # PPL_2|1 .. PPL_n|n-1: heads 2..n given the true token one place before
    coupled_top1: tuple[float, ...] = ()

    @property
    def coupled_joint(self) -> float:
        """PPL_1:n per token with the coupled heads as a chain."""
        chain = (self.heads[0], *self.coupled)
        return math.exp(sum(map(math.log, chain)) / len(chain))

    def __str__(self) -> str:
        n = len(self.joint)
        said = [f"PPL_{i} {p:.2f}" for i, p in enumerate(self.heads, start=1)] + [f"PPL_1:{n} {self.joint[-1]:.2f}"]
        if self.coupled:
            said += [f"PPL_{i}|{i - 1} {p:.2f}" for i, p in enumerate(self.coupled, start=2)]
            said += [f"coupled PPL_1:{n} {self.coupled_joint:.2f}"]
        return "  ".join(said)


@torch.no_grad()
def perplexities(model: DynaMoForCausalLM, blocks: Blocks, *, batch_size: int, bf16: bool, limit: int = 64) -> Perplexities:
    """PPL_1..PPL_n and PPL_1:1..PPL_1:n on the first `limit` blocks, and PPL_i|i-1 of a model with a coupling.

    Comparable between models with the same tokenizer, heads and blocks: every head is scored at the positions where all n
    targets exist in the same document and, in conversations, all are of the response.
    """
    was_training, n = model.training, model.num_heads
    model.eval()
    lines = n if model.coupling is None else 2 * n - 1  # as in heads_loss
    sums, hits, count = torch.zeros(lines, dtype=torch.float64), torch.zeros(lines, dtype=torch.float64), 0

    def score(line: int, logits: Tensor, labels: Tensor) -> None:
        sums[line] += F.cross_entropy(logits, labels, reduction="sum").double().cpu()
        hits[line] += (logits.argmax(-1) == labels).sum().cpu()

    device = model.device
    total = min(limit, blocks.num_blocks(0))
    for start in range(0, total, batch_size):
        batch = {name: value.to(device) for name, value in blocks.rows(range(start, min(start + batch_size, total))).items()}
        tokens, segments, positions = (batch[name] for name in ("tokens", "segments", "positions"))
        scored = scored_positions(tokens, segments, n, batch.get("responses")).flatten()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            hidden = packed_hidden(model, tokens, segments, positions)
            for head in range(1, n + 1):
                states, labels = hidden[head - 1].flatten(0, 1)[scored], targets(tokens, segments, head).flatten()[scored]
                for at in range(0, len(labels), CHUNK):
                    here = slice(at, at + CHUNK)
                    logits = model.readout(states[here][None], head)[0].float()
                    score(head - 1, logits, labels[here])
                    if model.coupling is not None and head > 1:
                        before = targets(tokens, segments, head - 1).flatten()[scored][here]
                        score(n + head - 2, coupled_logits(model, head, states[here], before, logits), labels[here])
        count += int(scored.sum())
    model.train(was_training)
    if count == 0:
        raise InputError("The validation text has no document with as many tokens as the model has heads.")
    means, shares = sums / count, (hits / count).tolist()
    joint = means[:n].cumsum(0) / torch.arange(1, n + 1)
    ppl = means.exp().tolist()
    return Perplexities(tuple(ppl[:n]), tuple(joint.exp().tolist()), tuple(shares[:n]), tuple(ppl[n:]), tuple(shares[n:]))


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


@dataclass
class Progress:
    """What a step reports."""

    step: int  # steps done
    losses: tuple[float, ...]  # mean nats per target, by head; 0 for a frozen base's head 1
    gradient_norm: float
    tokens_per_second: float
    coupled: tuple[float, ...] = ()  # of heads 2..n given the true token one place before
    validation: Perplexities | None = None


def train(
    model: DynaMoForCausalLM,
    blocks: Blocks,
    validation: Blocks | None,
    options: TrainingOptions,
    folder: Path,
    *,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Perplexities | None:
    """Trains `model` in place, resuming from the newest checkpoint in `folder` if there is one.

    Args:
        blocks: training blocks; step s of any run with the same seed sees the same ones.
        validation: blocks for the perplexities, or None.
        folder: for checkpoints, `log.jsonl` and TensorBoard files.
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
            raise InputError("There is no coupling to train; add one with dynamo_lm.coupling.add_coupling.")
        model.requires_grad_(False)
        model.coupling.requires_grad_(True)
    if options.frozen:
        model.freeze_base()
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
            sums = torch.stack([heads_loss(model, **part, options=options, counts=counts) for part in parts]).sum(0)
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
                last = perplexities(model, validation, batch_size=size, bf16=options.bf16)
                _train_mode(model, options)
                progress = replace(progress, validation=last)
            log.write(progress, factor)
            report(progress)
            interrupted = bool(stopped)  # asked once: a Ctrl-C from here on waits for the next step's checkpoint
            if done or interrupted or (step + 1) % options.checkpoint_every == 0:
                save_checkpoint(folder, step + 1, model, optimizer, options)
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
    """Yields a list that a Ctrl-C appends to, so that no step is cut in half; a second Ctrl-C stops at once."""
    stopped: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def on_interrupt(number: int, frame: object) -> None:
        if stopped:
            raise KeyboardInterrupt
        stopped.append(number)

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


def _split(batch: dict[str, Tensor], parts: int) -> Iterator[dict[str, Tensor]]:
    for chunks in zip(*(value.chunk(parts) for value in batch.values()), strict=True):
        yield dict(zip(batch, chunks, strict=True))


class _Log:
    """`log.jsonl` (one line a step) and, where tensorboard is installed, its event files."""

    def __init__(self, folder: Path, start: int):
        self.path, self.board = folder / "log.jsonl", None
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() and start else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= start]
        self.path.write_text("".join(kept))  # steps after the checkpoint will be taken again
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start)

    def __enter__(self) -> _Log:
        self.file = self.path.open("a")
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()

    def write(self, progress: Progress, factor: float) -> None:
        line: dict = {"step": progress.step, "losses": progress.losses, "gradient_norm": progress.gradient_norm}
        line |= {"tokens_per_second": round(progress.tokens_per_second, 1), "lr_factor": factor}
        scalars = {f"loss/head_{i}": loss for i, loss in enumerate(progress.losses, start=1)}
        scalars |= {"train/gradient_norm": progress.gradient_norm, "train/lr_factor": factor}
        if progress.coupled:
            line["coupled_losses"] = progress.coupled
            scalars |= {f"loss/head_{i}_given_{i - 1}": loss for i, loss in enumerate(progress.coupled, start=2)}
        if progress.validation is not None:
            line |= {"ppl": progress.validation.heads, "ppl_joint": progress.validation.joint}
            scalars |= {f"validation/PPL_{i}": p for i, p in enumerate(progress.validation.heads, start=1)}
            scalars |= {f"validation/PPL_1:{i}": p for i, p in enumerate(progress.validation.joint, start=1)}
            line |= {"top1": progress.validation.top1}
            if progress.validation.coupled:
                line |= {"ppl_coupled": progress.validation.coupled, "top1_coupled": progress.validation.coupled_top1}
                scalars |= {f"validation/PPL_{i}|{i - 1}": p for i, p in enumerate(progress.validation.coupled, start=2)}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in scalars.items():
                self.board.add_scalar(name, value, progress.step)
