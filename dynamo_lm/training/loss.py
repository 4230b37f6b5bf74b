"""The modified-CLM losses of all heads, their gradients, and multi-token perplexities (method.md section 2)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dynamo_lm.backbone.attention_mask import AttentionMaskBuilder
from dynamo_lm.data.packing import IGNORED, Blocks, targets
from dynamo_lm.errors import InputError
from dynamo_lm.model.modeling import DynaMoForCausalLM
from dynamo_lm.training.options import TrainingOptions

CHUNK = 512  # positions whose logits exist at one time, whatever the number of heads; fits a cache, and is faster for it


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
        tokens, segments, positions: (batch, length), from `dynamo_lm.data.packing.Blocks`.
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
    mask = AttentionMaskBuilder.of(model.base.config, model.dtype).mask(
        order, order, query_segments=segments, key_segments=segments
    )
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
