"""The modified-CLM losses of all heads, their gradients, and multi-token perplexities (method.md section 2)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dynamo_lm.backbone.attention_mask import AttentionMaskBuilder
from dynamo_lm.data.packing import IGNORED, targets
from dynamo_lm.model.above_stem import AboveFeatures, AboveStem
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
    vocabulary: Tensor | None = None,
    stem: Tensor | None = None,
    above: AboveStem | AboveFeatures | None = None,
) -> Tensor:
    """The modified-CLM losses of one batch; with `options`, also their gradients.

    Logits exist for `CHUNK` positions of one head at a time: each chunk's gradient with respect to its hidden states is
    taken at once, and one backward through the heads and the base follows.

    With `options.kl` = k the loss of a target is (1 - k) times its negative log-likelihood plus k times the Kullback-Leibler
    divergence from the base's own distribution at the target's place to the head's. That distribution comes from the same
    forward. Head 1 keeps the negative log-likelihood.

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
        vocabulary: ids, (s,) ascending, that heads 2..n are normalised over; other targets do not count. All by default.
        stem: the stem's states of this batch, (batch, length, hidden), if they are known, and `above`, the model without the
            layers that made them.

    Returns:
        Sums of the losses in nats over the valid targets, (num_heads,), float32, without gradient; with a
        coupling (2 num_heads - 1,), the corrected ones of heads 2..n after the others.

    Source: paper, modified-CLM objective; method.md sections 2 and 6.6.
    """
    n, coupling, learn = model.num_heads, model.coupling, options is not None
    alone = options is not None and options.coupling_only
    kl = options.kl if options else 0.0
    counts = counts or target_counts(tokens, segments, n, responses)
    scale = options.gradient_scale if options else 1.0
    autocast = torch.autocast(tokens.device.type, torch.bfloat16, enabled=options is not None and options.bf16)
    with torch.set_grad_enabled(learn and not alone), autocast:
        hidden = packed_hidden(model, tokens, segments, positions, gradient_scale=scale, stem=stem, above=above)
        gradient = torch.zeros_like(hidden) if hidden.requires_grad else None
        sums = torch.zeros(n if coupling is None else 2 * n - 1, device=hidden.device)  # read once, at the end
        states = hidden.flatten(1, 2)  # (n, positions, hidden)
        labels = [targets(tokens, segments, head, responses).flatten() for head in range(1, n + 1)]
        before = [targets(tokens, segments, head).flatten() for head in range(1, n)]  # a prompt's token, too
        read = _Readout(model, vocabulary, frozen=options is not None and options.frozen)
        learned = torch.arange(states.shape[1], device=states.device)
        if responses is not None:  # a prompt's positions have no target, but for its end
            learned = learned[(torch.stack(labels) != IGNORED).any(0)]
        for start in range(0, len(learned), CHUNK):
            chunk = learned[start : start + CHUNK]
            teacher = read.teacher(states[0].detach(), chunk) if kl else None
            for head in range(1, n + 1):
                if options is not None and options.frozen and head == 1:
                    continue
                at_loss, at_states = (1.0 if head == 1 else scale), 1.0
                if model.config.own_output_embedding:  # it learns at its head's full rate: scale what is sent on
                    at_loss, at_states = at_states, at_loss
                count = max(counts[head - 1], 1)
                part = states[head - 1, chunk].detach().requires_grad_(gradient is not None)
                logits = read.logits(part, head)
                goal = read.goal(labels[head - 1][chunk], head, chunk, teacher if head > 1 else None)
                of_kl = kl if head > 1 else 0.0
                sums[head - 1] += goal.backward(logits, of_kl, at_loss / count)
                if gradient is not None:
                    gradient[head - 1].flatten(0, 1)[chunk] = at_states * part.grad  # type: ignore[operator]
                if coupling is not None and head > 1:
                    with torch.set_grad_enabled(learn):
                        read_from = (part.detach(), before[head - 2][chunk], logits.detach())
                        corrected = coupled_logits(model, head, *read_from, read.weight(head))
                        sums[n + head - 2] += goal.backward(corrected, of_kl, 1 / count)
    if gradient is not None:
        hidden.backward(gradient)
    return sums.cpu()


class _Readout:
    """Logits of heads over a vocabulary, and what they are to be."""

    def __init__(self, model: DynaMoForCausalLM, vocabulary: Tensor | None, *, frozen: bool):
        """vocabulary: as in `heads_loss`; frozen: the output embedding does not learn, so its rows may be copied."""
        self.model, self.ids = model, None if vocabulary is None else vocabulary.to(model.device)
        self.rows: Tensor | None = None  # of the output embedding, where logits are their product with the states
        self.own = model.config.own_output_embedding
        if self.ids is not None:
            self.places = torch.full((model.output_weight().shape[0],), IGNORED, device=model.device)
            self.places[self.ids] = torch.arange(len(self.ids), device=model.device)
            if frozen and model.reads_plainly() and getattr(model.get_output_embeddings(), "bias", None) is None:
                self.rows = model.output_weight().detach()[self.ids]
                if torch.is_autocast_enabled(model.device.type):
                    self.rows = self.rows.to(torch.bfloat16)

    def logits(self, states: Tensor, head: int) -> Tensor:
        """(positions, hidden) -> (positions, s); head 1 and models without a vocabulary: all tokens."""
        return self.model.readout(states[None], head)[0] if head == 1 else self._restricted(states, head)

    def _restricted(self, states: Tensor, head: int) -> Tensor:
        """Logits of these tokens alone, of any head: (positions, hidden) -> (positions, s)."""
        if head > 1 and self.own and self.model.config.sequential:
            return self.model.sequential_head.lm_head(states)
        if (rows := self._rows(head)) is not None:
            return F.linear(states, rows)
        logits = self.model.readout(states[None], head)[0]
        return logits if self.ids is None else logits[:, self.ids]

    def _rows(self, head: int) -> Tensor | None:
        """The base's rows where this head reads them."""
        return self.rows if head == 1 or not self.own else None

    def weight(self, head: int) -> Tensor:
        """The output embedding of these tokens, (s, hidden), without gradient."""
        if (rows := self._rows(head)) is not None:
            return rows
        weight = self.model.output_weight(head).detach()
        return weight if self.ids is None else weight[self.ids]

    @torch.no_grad()
    def teacher(self, states: Tensor, chunk: Tensor) -> _Teacher:
        """The base's own distributions at these positions and the n - 1 after each; states: head 1's, at all positions."""
        last = len(states) - 1
        ahead = torch.arange(self.model.num_heads, device=chunk.device)
        places = (chunk[:, None] + ahead).clamp(max=last).unique()
        logp = self._restricted(states[places], 1).float().log_softmax(-1)
        probs = logp.exp()
        return _Teacher(places, probs, (probs * logp).sum(-1))

    def goal(self, labels: Tensor, head: int, chunk: Tensor, teacher: _Teacher | None) -> _Goal:
        """What head `head` is to say at the positions `chunk`, whose labels are token ids, (positions,)."""
        valid = labels != IGNORED
        if self.ids is None or head == 1:
            in_vocabulary, places = valid, labels.clamp(min=0)
        else:
            places = self.places[labels.clamp(min=0)]
            in_vocabulary, places = valid & (places != IGNORED), places.clamp(min=0)
        if teacher is None:
            return _Goal(valid, in_vocabulary, places, None, None)
        index = torch.searchsorted(teacher.places, (chunk + head - 1).clamp(max=int(teacher.places[-1])))
        return _Goal(valid, in_vocabulary, places, teacher.probs[index], teacher.negative_entropy[index])


class _Teacher(NamedTuple):
    """The base's own distributions."""

    places: Tensor  # (m,) positions, ascending
    probs: Tensor  # (m, s) float32
    negative_entropy: Tensor  # (m,)


class _Goal(NamedTuple):
    """Targets of some positions: tokens and, where a base teaches, its distributions."""

    valid: Tensor  # (positions,) bool
    in_vocabulary: Tensor  # (positions,) bool: whether the label is in the vocabulary, too
    labels: Tensor  # (positions,) places in the vocabulary, 0 where there is none
    soft: Tensor | None  # (positions, s) float32
    negative_entropy: Tensor | None  # (positions,)

    def backward(self, logits: Tensor, kl: float, scale: float) -> Tensor:
        """The sum of the losses; sends `scale` times its gradient into `logits`, (positions, s), if they want one.

        kl: the weight of the divergence beside 1 - kl of the negative log-likelihood.
        """
        with torch.no_grad():
            logq = logits.float().log_softmax(-1)
            hard = self.in_vocabulary.float() * (1 - kl)
            losses = -logq.gather(1, self.labels[:, None])[:, 0] * hard
            soft = self.valid.float() * kl
            if self.soft is not None:
                losses = losses + soft * (self.negative_entropy - torch.linalg.vecdot(self.soft, logq))
            if logits.requires_grad:
                gradient = logq.exp_().mul_((hard + soft)[:, None])
                if self.soft is not None:
                    gradient.addcmul_(self.soft, soft[:, None], value=-1)
                gradient.scatter_add_(1, self.labels[:, None], -hard[:, None])
        if logits.requires_grad:
            logits.backward(gradient.mul_(scale).to(logits.dtype))
        return losses.sum()


def loss_vocabulary(counts: Tensor, share: float) -> Tensor | None:
    """The commonest tokens that make up `share` of what is learned: ids, ascending; None for all of them.

    counts: how often each token is a target, (vocabulary,).
    """
    if share >= 1 or not int(counts.sum()):
        return None
    falling, order = counts.double().sort(descending=True, stable=True)
    size = int((falling.cumsum(0) < share * falling.sum()).sum()) + 1
    return order[:size].sort().values


def coupled_logits(
    model: DynaMoForCausalLM, head: int, states: Tensor, before: Tensor, logits: Tensor, weight: Tensor | None = None
) -> Tensor:
    """Head `head`'s logits given the true tokens one place before: (positions, vocabulary), float32.

    Args:
        head: 2..n, of a model with a coupling.
        states: its final hidden states, (positions, hidden).
        before: labels of head `head` - 1, (positions,); where there is none the result has no meaning.
        logits: its own logits, (positions, vocabulary).
        weight: the output embedding of the tokens that the logits are over, (vocabulary, hidden); the head's by default.
    """
    assert model.coupling is not None
    correction = model.coupling.hidden_correction(head, states, before.clamp(min=0))
    return logits + F.linear(correction, model.output_weight(head).detach() if weight is None else weight).float()


def packed_hidden(
    model: DynaMoForCausalLM,
    tokens: Tensor,
    segments: Tensor,
    positions: Tensor,
    *,
    gradient_scale: float = 1.0,
    stem: Tensor | None = None,
    above: AboveStem | AboveFeatures | None = None,
) -> Tensor:
    """`model.hidden` of packed blocks, (batch, length) each, in which no document sees another; from the stem's states on,
    with the model above them, where those are given."""
    kwargs: dict[str, Any] = {"attention_mask": packed_mask(model, segments), "position_ids": positions}
    if stem is not None and above is not None:
        return above.hidden(stem, tokens, **kwargs)
    return model.hidden(tokens, gradient_scale=gradient_scale, **kwargs)


def packed_mask(model: DynaMoForCausalLM, segments: Tensor) -> Tensor | dict[str, Tensor]:
    """The attention mask of packed blocks in which no document sees another; segments: (batch, length)."""
    order = torch.arange(segments.shape[1], device=segments.device)[None]
    builder = AttentionMaskBuilder.of(model.base.config, model.dtype)
    return builder.mask(order, order, query_segments=segments, key_segments=segments)


def target_counts(tokens: Tensor, segments: Tensor, num_heads: int, responses: Tensor | None = None) -> list[int]:
    """How many positions have a target `i` ahead in the same document (and response), for i = 1..num_heads."""
    return [int((targets(tokens, segments, head, responses) != IGNORED).sum()) for head in range(1, num_heads + 1)]
