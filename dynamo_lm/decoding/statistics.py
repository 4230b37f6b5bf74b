"""Cost and quality of one sequence, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass
class Statistics:
    """Cost and quality of one sequence.

    Speed-ups follow from `tokens_per_step`, whose ceiling is `ceiling`, against one token per step (the same loop with one
    head). Log-likelihood and regret are the base's own, at temperature 1, in nats.
    """

    ceiling: int  # the most tokens a step can emit: n, or with drafts from the text one more than those
    forwards: int = 0  # of the model, the prompt's included
    new_tokens: int = 0
    step_sizes: list[int] = field(default_factory=list)  # tokens emitted by each step, in order
    proposed: list[int] = field(default_factory=list)  # drafts of heads 2..n that were verified, by head
    accepted: list[int] = field(default_factory=list)  # of those, accepted
    looked_up: int = 0  # drafts from the text itself that were verified
    lookup_accepted: int = 0  # of those, accepted
    log_likelihood: float = 0.0  # of the emitted tokens that were scored
    scored: int = 0  # emitted tokens whose base distribution was seen; the last step's drafts never are
    regret: float = 0.0  # what unverified tokens cost: log p(the base's choice) - log p(the token), summed; on a budget
    # p is after penalties and a user's own logits processors, which are part of the base then
    unverified: int = 0  # scored tokens that were emitted without verification, or in spite of it (on a budget)
    seconds: float = 0.0  # from the first forward to this sequence's end; shared by the sequences of a batch

    def record_drafts(self, count: int, accepted: int, *, looked_up: bool) -> None:
        """Counts a step's drafts; after a rejected one none is verified."""
        if looked_up:
            self.looked_up += min(count, accepted + 1)
            self.lookup_accepted += accepted
            return
        for position in range(count):
            self.proposed[position] += position <= accepted
            self.accepted[position] += position < accepted

    @property
    def tokens_per_step(self) -> float:
        return self.new_tokens / self.forwards if self.forwards else 0.0

    @property
    def histogram(self) -> list[int]:
        """How many steps emitted 1, 2, .. n tokens."""
        return [self.step_sizes.count(size) for size in range(1, self.ceiling + 1)]

    @property
    def acceptance(self) -> list[float]:
        """Share of the drafts of heads 2..n that were accepted, where any was verified."""
        return [
            accepted / proposed if proposed else 0.0 for accepted, proposed in zip(self.accepted, self.proposed, strict=True)
        ]

    @property
    def mean_log_likelihood(self) -> float:
        """Nats per scored token."""
        return self.log_likelihood / self.scored if self.scored else 0.0

    @property
    def mean_regret(self) -> float:
        """Nats per scored token: what a budget bounds."""
        return self.regret / self.scored if self.scored else 0.0


class TokenLogProb(NamedTuple):
    """The base model's score of one token, over its whole vocabulary at temperature 1, in nats."""

    log_prob: float
    top: list[tuple[int, float]]  # the likeliest tokens and their log-probabilities, as many as requested
