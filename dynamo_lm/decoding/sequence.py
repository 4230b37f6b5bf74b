"""The state of one sequence being decoded: how its tokens are chosen, where it stands, and what it cost.

In: options. Out: sequences, which `dynamo_lm.decoding.batch` advances. Knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynamo_lm.decoding.draft_length import AdaptiveDraftLength, Drafts
from dynamo_lm.decoding.options import DecodingOptions
from dynamo_lm.decoding.prompt_lookup import PromptLookup
from dynamo_lm.decoding.statistics import Statistics, TokenLogProb
from dynamo_lm.decoding.token_array import TokenArray
from dynamo_lm.decoding.verification import Proposal


@dataclass(eq=False)
class SequenceState:
    """One sequence being decoded."""

    number: int  # given by the caller of `Batch.join`
    tokens: list[int]  # prompt and everything emitted
    prompt_length: int
    options: DecodingOptions
    generator: torch.Generator
    statistics: Statistics
    input_ids: list[int]  # of the next forward: the prompt, then last step's tokens
    parents: list[int] = field(default_factory=list)  # where in input_ids the token before each of input_ids[1:] is
    draft_length: AdaptiveDraftLength | None = None  # how many drafts a step carries; None: as many as there are heads
    drafts: Drafts = field(default_factory=Drafts)  # what is known of input_ids[1:]
    proposals: list[Proposal] = field(default_factory=list)  # the distributions input_ids[1:] were drafted from
    text: TokenArray = field(default_factory=TokenArray)  # `tokens` as an array
    prompt_lookup: PromptLookup = field(default_factory=PromptLookup)
    looked_up: bool = False  # whether input_ids[1:] are drafts from the text itself
    draft_cache: Any = None  # keys and values in a sequential head's layer
    drafts_freely: bool = False  # whether the number of drafts changes nothing but the time
    unread: list[tuple[Tensor, list[int]]] = field(default_factory=list)  # what `SequentialDrafter.draft` has yet to read
    present: np.ndarray | None = None  # under "off", (vocabulary,) bool: the tokens that are there already
    emitted: list[int] = field(default_factory=list)  # by the last step; empty where it only scored
    scores: list[TokenLogProb] = field(default_factory=list)  # of the new tokens, if requested
    prompt_scores: list[TokenLogProb | None] = field(default_factory=list)  # of the prompt's; nothing precedes the first
    began: float = 0.0  # the clock at its first forward
    ending: str | None = None  # "stop" or "length" once its last token is emitted ..
    finished: str | None = None  # .. and the same once every requested score is there

    @property
    def new_tokens(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    @property
    def branches(self) -> bool:
        """Whether the drafts are a tree, not a chain."""
        return self.parents != list(range(len(self.parents)))

    @property
    def left(self) -> int:
        """Tokens that it may still emit, the context aside."""
        return self.options.max_new_tokens - (len(self.tokens) - self.prompt_length)

    @property
    def regret_budgets(self) -> list[float]:
        """By draft, the nats that all up to it may cost: the budget of the tokens so far less what is spent; or empty."""
        budget = self.options.budget
        if budget == 0:
            return []
        emitted, spent = self.statistics.new_tokens, self.statistics.regret
        return [budget * (emitted + place) - spent for place in range(1, len(self.input_ids))]

    def process_logits(self, logits: Tensor, first: bool) -> Tensor:
        """What the base chooses from after each input token; logits and result: (width, vocabulary)."""
        if not self.options.logits_processors:
            return logits
        tokens = self.tokens if first else self.tokens + self.input_ids[1:]
        result = []
        for position, line in enumerate(logits[: len(tokens) - len(self.tokens) + 1]):
            so_far = torch.tensor(tokens[: len(self.tokens) + position])
            for processor in self.options.logits_processors:
                line = processor(self.number, so_far, line)
            result.append(line)
        return torch.stack(result)

    def emit(self, new: list[int], context: int) -> int:
        """Appends tokens until one ends the sequence; returns how many. context: tokens that the model can hold."""
        self.emitted = []
        for token in new:
            self.tokens.append(token)
            self.emitted.append(token)
            if self.present is not None:
                self.present[token] = True
            stopped = token in self.options.end_tokens
            if stopped or (
                self.options.stopping_criteria
                and any(stop(torch.tensor(self.tokens)) for stop in self.options.stopping_criteria)
            ):
                self.ending = "stop"
            elif self.left <= 0 or len(self.tokens) >= context:
                self.ending = "length"
            if self.ending:
                break
        self.statistics.step_sizes.append(len(self.emitted))
        self.statistics.new_tokens += len(self.emitted)
        return len(self.emitted)
