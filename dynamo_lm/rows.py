"""What one sequence being decoded is: how its tokens are chosen, where it stands, and what it cost (method.md section 4).

In: options. Out: rows for `dynamo_lm.decoding`, which moves them on. Knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dynamo_lm.errors import InputError
from dynamo_lm.sampling import Algorithm1
from dynamo_lm.tree import Pace
from dynamo_lm.verification import Proposal

Warp = Callable[[int, Tensor, Tensor], Tensor]  # row, tokens so far (t,), logits (vocabulary,) -> logits to sample from
Stop = Callable[[Tensor], bool]  # tokens so far (t,), prompt included -> whether the row ends here


@dataclass(frozen=True)
class DecodingOptions:
    """How to choose tokens."""

    max_new_tokens: int
    num_heads: int  # heads used, 1..n: the ceiling on tokens per step
    verify: str | float = "strict"  # or "off", or a budget in nats per token, of which 0 is "strict"
    sample: bool = False  # else the most likely: of the base under "strict", of the joint under "off"
    algorithm: Algorithm1 = field(default_factory=Algorithm1)  # under "off"; its alpha_c and top_k shape drafts, too
    compile: bool = False  # steps of one fixed shape, compiled: one row, a C++ compiler on CPUs, a minute the first time
    tree: int | None = None  # greedy, verified: drafts a forward carries as a tree; 0: a chain; None: measured, if exact
    draft_temperature: float = 1.0  # under "strict" with sampling: near the temperature that the base samples at
    end_tokens: frozenset[int] = frozenset()
    warps: tuple[Warp, ...] = ()  # under "strict": what turns the base's logits into those it samples from
    stops: tuple[Stop, ...] = ()
    logprobs: int | None = None  # score every new token, with so many alternatives beside it; None: no scores
    prompt_logprobs: bool = False  # with logprobs: score the prompt's tokens, too

    def __post_init__(self) -> None:
        check_verify(self.verify)
        least = 0 if self.prompt_logprobs else 1
        if self.max_new_tokens < least:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}; give {least} or more.")
        if self.logprobs is not None and self.logprobs < 0:
            raise InputError(f"logprobs is {self.logprobs}; give the number of alternatives, 0 or more.")
        if self.prompt_logprobs and self.logprobs is None:
            raise InputError("prompt_logprobs scores the prompt as well; it goes with logprobs.")
        if self.tree is not None and not 0 <= self.tree < 64:
            raise InputError(f"tree is {self.tree}; give the number of drafts, up to 63, 0 for a chain.")

    @property
    def off(self) -> bool:
        """Whether Algorithm 1 decides, and nobody verifies."""
        return self.verify == "off"

    @property
    def budget(self) -> float:
        """Nats per token that drafts may cost."""
        return 0.0 if isinstance(self.verify, str) else float(self.verify)


def check_verify(verify: str | float) -> None:
    """Refuses what is no place on the dial. Raises InputError."""
    if verify in ("strict", "off"):
        return
    if isinstance(verify, (str, bool)) or not 0 <= verify < math.inf:
        raise InputError(
            f'verify is "{verify}"; give "strict" (exact), "off" (the paper\'s Algorithm 1) or a budget in nats per token, '
            "such as 0.1 (0 = exact)."
        )


@dataclass
class Statistics:
    """What one row cost and what it is worth.

    Speed-ups follow from `tokens_per_step`, whose ceiling is `ceiling`, against one token per step (the same loop with one
    head). Log-likelihood and regret are the base's own, at temperature 1, in nats.
    """

    ceiling: int  # n, the most tokens a step can emit
    forwards: int = 0  # of the trunk, the prompt's included
    new_tokens: int = 0
    step_sizes: list[int] = field(default_factory=list)  # tokens emitted by each step, in order
    proposed: list[int] = field(default_factory=list)  # drafts of heads 2..n that were verified, by head
    accepted: list[int] = field(default_factory=list)  # of those, kept
    log_likelihood: float = 0.0  # of the emitted tokens that were scored
    scored: int = 0  # emitted tokens whose base distribution was seen; the last step's drafts never are
    regret: float = 0.0  # what unverified tokens cost: log p(the base's choice) - log p(the token), summed
    unverified: int = 0  # scored tokens that were emitted without verification, or in spite of it (on a budget)
    seconds: float = 0.0  # from the first forward to this row's end; shared by the rows of a batch

    @property
    def tokens_per_step(self) -> float:
        return self.new_tokens / self.forwards if self.forwards else 0.0

    @property
    def histogram(self) -> list[int]:
        """How many steps emitted 1, 2, .. n tokens."""
        return [self.step_sizes.count(size) for size in range(1, self.ceiling + 1)]

    @property
    def acceptance(self) -> list[float]:
        """Share of the drafts of heads 2..n that were kept, where any was verified."""
        return [kept / tried if tried else 0.0 for kept, tried in zip(self.accepted, self.proposed, strict=True)]

    @property
    def mean_log_likelihood(self) -> float:
        """Nats per scored token."""
        return self.log_likelihood / self.scored if self.scored else 0.0

    @property
    def mean_regret(self) -> float:
        """Nats per scored token: what a budget bounds."""
        return self.regret / self.scored if self.scored else 0.0


class TokenScore(NamedTuple):
    """What the base model says of one token, over its whole vocabulary at temperature 1, in nats."""

    log_prob: float
    top: list[tuple[int, float]]  # the likeliest tokens and their log-probabilities, as many as were asked for


@dataclass(eq=False)
class Row:
    """One sequence being decoded."""

    number: int  # in the batch that was asked for
    tokens: list[int]  # prompt and everything emitted
    prompt_length: int
    options: DecodingOptions
    generator: torch.Generator
    statistics: Statistics
    pending: list[int]  # what the next forward absorbs: the prompt, then last step's tokens
    parents: list[int] = field(default_factory=list)  # where in pending the token before each of pending[1:] is
    pace: Pace | None = None  # how large its trees of drafts are; None: chains
    size: int = 0  # tokens of the step, if a tree of drafts was to fill it
    promise: float = 0.0  # how many of that tree's drafts should be kept
    proposals: list[Proposal] = field(default_factory=list)  # the distributions pending[1:] were drafted from
    present: np.ndarray | None = None  # under "off", (vocabulary,) bool: the tokens that are there already
    emitted: list[int] = field(default_factory=list)  # by the last step; empty where it only scored
    scores: list[TokenScore] = field(default_factory=list)  # of the new tokens, if asked for
    prompt_scores: list[TokenScore | None] = field(default_factory=list)  # of the prompt's; nothing precedes the first
    began: float = 0.0  # the clock at its first forward
    ending: str | None = None  # "stop" or "length" once its last token is emitted ..
    finished: str | None = None  # .. and the same once every score that was asked for is there

    @property
    def new_tokens(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    @property
    def branches(self) -> bool:
        """Whether the pending tokens are a tree and no chain."""
        return self.parents != list(range(len(self.parents)))

    @property
    def left(self) -> int:
        """Tokens that it may still emit, the context aside."""
        return self.options.max_new_tokens - (len(self.tokens) - self.prompt_length)

    @property
    def allowance(self) -> list[float]:
        """By draft, the nats that all up to it may cost: the budget of the tokens so far less what is spent; or empty."""
        budget = self.options.budget
        if budget == 0:
            return []
        emitted, spent = self.statistics.new_tokens, self.statistics.regret
        return [budget * (emitted + place) - spent for place in range(1, len(self.pending))]

    def emit(self, new: list[int], context: int) -> int:
        """Appends tokens until one ends the row; returns how many. context: tokens that the model can hold."""
        self.emitted = []
        for token in new:
            self.tokens.append(token)
            self.emitted.append(token)
            if self.present is not None:
                self.present[token] = True
            stopped = token in self.options.end_tokens
            if stopped or (self.options.stops and any(stop(torch.tensor(self.tokens)) for stop in self.options.stops)):
                self.ending = "stop"
            elif self.left <= 0 or len(self.tokens) >= context:
                self.ending = "length"
            if self.ending:
                break
        self.statistics.step_sizes.append(len(self.emitted))
        self.statistics.new_tokens += len(self.emitted)
        return len(self.emitted)
