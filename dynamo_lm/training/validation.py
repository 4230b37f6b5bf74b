"""What training measures on held-out text: multi-token perplexities, and the tokens per step that heads are to reach.

Perplexities are those of method.md section 5. Tokens per step are what a user waits for: at each position all heads draft
from what they see there, and the base's own distribution at every later place is known from the same forward. Greedy: head
i's draft stands where it is the base's most likely token after the text so far. Sampled: it stands with the probability
sum_x min(p(x), q_i(x)), which is what the exact rejection rule keeps. A draft counts if all before it stand. On text that
the base wrote itself this is what verified decoding meets; chains only, without tables.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dynamo_lm.data.packing import IGNORED, Blocks, targets
from dynamo_lm.errors import InputError
from dynamo_lm.model.modeling import DynaMoForCausalLM
from dynamo_lm.training import ranks
from dynamo_lm.training.loss import CHUNK, coupled_logits, packed_hidden

BLOCKS = 64  # of held-out text that are measured on, at most


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
        parts = [f"PPL_{i} {p:.2f}" for i, p in enumerate(self.heads, start=1)] + [f"PPL_1:{n} {self.joint[-1]:.2f}"]
        if self.coupled:
            parts += [f"PPL_{i}|{i - 1} {p:.2f}" for i, p in enumerate(self.coupled, start=2)]
            parts += [f"coupled PPL_1:{n} {self.coupled_joint:.2f}"]
        return "  ".join(parts)


@dataclass(frozen=True)
class Acceptance:
    """Shares of the drafts that stand where all before them do, by head from head 2 on."""

    greedy: tuple[float, ...]
    sampled: tuple[float, ...]

    @staticmethod
    def tokens_per_step(shares: tuple[float, ...]) -> float:
        """1 + a_2 + a_2 a_3 + ..."""
        total, chain = 1.0, 1.0
        for share in shares:
            chain *= share
            total += chain
        return total

    def __str__(self) -> str:
        greedy, sampled = (self.tokens_per_step(shares) for shares in (self.greedy, self.sampled))
        by_head = ", ".join(f"head {i} {share:.0%}" for i, share in enumerate(self.greedy, start=2))
        return f"{greedy:.2f} tokens per step expected when greedy (drafts accepted: {by_head}), {sampled:.2f} when sampled"


class Scored:
    """Some positions of a batch, all of which have targets of every head, and what the base says there and after them."""

    def __init__(self, model: DynaMoForCausalLM, states: Tensor, places: Tensor, labels: list[Tensor]):
        """states: final hidden states of a batch, (n, all positions, hidden); places: the positions, (positions,); labels:
        by head, of all positions, (all positions,)."""
        self.model, self.states, self.places, self.labels = model, states, places, labels
        ahead = torch.arange(len(states), device=places.device)
        self._known = (places[:, None] + ahead).clamp(max=states.shape[1] - 1).unique()
        parts = self._known.split(CHUNK)
        self._base = torch.cat([self._logits(1, part).log_softmax(-1) for part in parts])
        self._first = self._base.argmax(-1)

    def base(self, ahead: int) -> tuple[Tensor, Tensor]:
        """Head 1 `ahead` positions on: its log-probabilities (positions, vocabulary) and most likely tokens (positions,)."""
        index = torch.searchsorted(self._known, self.places + ahead)
        return self._base[index], self._first[index]

    def drafts(self, head: int) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities of head 2 or later, and those given the true token one place before, (positions, vocabulary)."""
        logits, coupled = self._logits(head, self.places), None
        if self.model.coupling is not None:
            own = self.states[head - 1, self.places]
            coupled = coupled_logits(self.model, head, own, self.label(head - 1), logits).log_softmax(-1)
        return logits.log_softmax(-1), coupled

    def label(self, head: int) -> Tensor:
        """(positions,)."""
        return self.labels[head - 1][self.places]

    def _logits(self, head: int, places: Tensor) -> Tensor:
        return self.model.readout(self.states[head - 1, places][None], head)[0].float()


class Measure(Protocol):
    """Something that is summed over scored positions, head by head: logits of one head exist at a time."""

    totals: tuple[Tensor, ...]  # what is summed, on the CPU

    def add(self, scored: Scored, head: int, logp: Tensor, coupled: Tensor | None) -> None:
        """The log-probabilities of each head in turn, (positions, vocabulary), head 1 first."""


class PerplexityMeasure:
    """Multi-token perplexities.

    A head with a draft vocabulary cannot say the other tokens: its perplexity is over the targets that it can.
    """

    def __init__(self, model: DynaMoForCausalLM):
        self.n, self.drafts_some = model.num_heads, bool(model.config.draft_vocab_size)
        lines = self.n if model.coupling is None else 2 * self.n - 1  # as in heads_loss
        self.sums, self.hits, self.counts = torch.zeros(3, lines, dtype=torch.float64)
        self.total = torch.zeros((), dtype=torch.float64)
        self.totals: tuple[Tensor, ...] = (self.sums, self.hits, self.counts, self.total)

    def add(self, scored: Scored, head: int, logp: Tensor, coupled: Tensor | None) -> None:
        self.total += len(scored.places) if head == 1 else 0
        self._score(head - 1, logp, scored.label(head))
        if coupled is not None:
            self._score(self.n + head - 2, coupled, scored.label(head))

    def _score(self, line: int, logp: Tensor, labels: Tensor) -> None:
        chosen = logp.gather(1, labels[:, None])[:, 0]
        if self.drafts_some:
            chosen = chosen[chosen > -torch.inf]
        self.sums[line] -= chosen.double().sum().cpu()
        self.counts[line] += len(chosen)
        self.hits[line] += (logp.argmax(-1) == labels).sum().cpu()

    def result(self) -> Perplexities:
        n, means = self.n, self.sums / self.counts.clamp(min=1)
        joint = means[:n].cumsum(0) / torch.arange(1, n + 1)
        ppl, top1 = tuple(means.exp().tolist()), tuple((self.hits / self.total).tolist())
        return Perplexities(ppl[:n], tuple(joint.exp().tolist()), top1[:n], ppl[n:], top1[n:])


class AcceptanceMeasure:
    """Acceptance by head; with a coupling, drafts know the token before their own."""

    def __init__(self, model: DynaMoForCausalLM):
        self.stands = torch.zeros(2, model.num_heads)  # greedy and sampled; entry 0 counts the positions
        self.totals: tuple[Tensor, ...] = (self.stands,)

    def add(self, scored: Scored, head: int, logp: Tensor, coupled: Tensor | None) -> None:
        if head == 1:
            self.greedy = torch.ones(len(scored.places), dtype=torch.bool, device=scored.places.device)
            self.sampled = self.greedy.float()
        else:
            base, first = scored.base(head - 1)
            drafts = logp if coupled is None else coupled
            self.greedy &= drafts.argmax(-1) == first
            self.sampled *= torch.minimum(base, drafts).exp_().sum(-1)
        self.stands[0, head - 1] += self.greedy.sum().cpu()
        self.stands[1, head - 1] += self.sampled.sum().cpu()

    def result(self) -> Acceptance:
        shares = self.stands[:, 1:] / self.stands[:, :-1].clamp(min=1e-9)
        return Acceptance(*(tuple(line) for line in shares.tolist()))


@torch.no_grad()
def measure(
    model: DynaMoForCausalLM, blocks: Blocks, measures: Sequence[Measure], *, batch_size: int, bf16: bool, limit: int
) -> None:
    """Adds to `measures` the positions of the first `limit` blocks where all n targets exist in the same document and, in
    conversations, all are of the response. Ranks take blocks in turn, and every one gets the sums of all.

    Raises:
        InputError: there is no such position.
    """
    was_training, n, device, any_scored = model.training, model.num_heads, model.device, False
    model.eval()
    total = min(limit, blocks.num_blocks(0))
    most = -(-total // ranks.size())  # blocks of a rank; one with fewer joins in the forwards that it has no block for
    for start in range(0, most, batch_size):
        numbers = [ranks.rank() + ranks.size() * i for i in range(start, min(start + batch_size, most))]
        own = [number for number in numbers if number < total]
        batch = {name: value.to(device) for name, value in blocks.rows(own or [0]).items()}
        tokens, segments, positions = (batch[name] for name in ("tokens", "segments", "positions"))
        places = scored_positions(tokens, segments, n, batch.get("responses")).flatten().nonzero()[:, 0]
        places = places if own else places[:0]
        labels = [targets(tokens, segments, head).flatten() for head in range(1, n + 1)]
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            states = packed_hidden(model, tokens, segments, positions).flatten(1, 2)
            for chunk in places.split(CHUNK) if len(places) else ():
                any_scored, scored = True, Scored(model, states, chunk, labels)
                for head in range(1, n + 1):
                    logp_and_coupled = (scored.base(0)[0], None) if head == 1 else scored.drafts(head)
                    for each in measures:
                        each.add(scored, head, *logp_and_coupled)
    model.train(was_training)
    for tensor in (tensor for each in measures for tensor in each.totals):
        ranks.add_up(tensor)
    if not ranks.any_of(any_scored)[0]:
        raise InputError("The validation text has no document with as many tokens as the model has heads.")


def perplexities(
    model: DynaMoForCausalLM, blocks: Blocks, *, batch_size: int, bf16: bool, limit: int = BLOCKS
) -> Perplexities:
    """PPL_1..PPL_n and PPL_1:1..PPL_1:n on the first `limit` blocks, and PPL_i|i-1 of a model with a coupling.

    Comparable between models with the same tokenizer, heads and blocks.
    """
    measured = PerplexityMeasure(model)
    measure(model, blocks, [measured], batch_size=batch_size, bf16=bf16, limit=limit)
    return measured.result()


def validate(
    model: DynaMoForCausalLM, blocks: Blocks, *, batch_size: int, bf16: bool, limit: int = BLOCKS
) -> tuple[Perplexities, Acceptance | None]:
    """Both over the same forwards; acceptance needs more than one head.

    Raises:
        InputError: no document has as many tokens as the model has heads.
    """
    perplexity, accepted = PerplexityMeasure(model), AcceptanceMeasure(model)
    measures: list[Measure] = [perplexity, accepted] if model.num_heads > 1 else [perplexity]
    measure(model, blocks, measures, batch_size=batch_size, bf16=bf16, limit=limit)
    return perplexity.result(), accepted.result() if model.num_heads > 1 else None
