"""How many drafts a step should carry, if any, learned from the time and the acceptance of earlier steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

import numpy as np
import torch

from dynamo_lm.decoding.options import DecodingOptions
from dynamo_lm.decoding.preconditions import is_sequential
from dynamo_lm.decoding.protocol import MultiHeadLM

TRIALS = 3  # steps of each size before the times count
WINDOW = 15  # latest steps of each size, whose median counts
WARM_UP_STEPS = 24  # before steps without drafts are tried, too ..
RETRY_STEPS = 96  # without drafts, of which the last ones try them again
MIN_ACCEPTED = 0.75  # .. and only if fewer drafts a step were accepted
IDLE_STEPS = 8  # in a row without drafts, after which heads are not read ..
REST_STEPS = 24  # .. for so many steps


@dataclass
class AdaptiveDraftLength:
    """How many drafts a step should carry, by the time of steps of each size and the drafts that were accepted."""

    sizes: tuple[int, ...]  # tokens in a forward, the verified one included, ascending
    seconds: dict[int, deque[float]] = field(default_factory=dict)  # of the latest steps of each size
    steps: int = 0
    expected: float = 0.0  # accepted drafts by the draft probabilities
    accepted: int = 0  # accepted drafts
    idle: int = 0  # latest choices that were no draft at all, and steps in which nothing was chosen

    @property
    def resting(self) -> bool:
        """Whether the step in progress does without drafts unseen, because those of the last ones were not worth it."""
        return IDLE_STEPS <= self.idle < IDLE_STEPS + REST_STEPS

    def rests(self) -> bool:
        """`resting`, and counts the step."""
        rests = self.resting
        self.idle = self.idle + 1 if rests else min(self.idle, IDLE_STEPS - 1)
        return rests

    def record(self, size: int, seconds: float, expected: float, accepted: int) -> None:
        """Records a step of `size` tokens; `expected` of its drafts should have been accepted, and `accepted` were."""
        self.seconds.setdefault(size, deque(maxlen=WINDOW)).append(seconds)
        self.steps += 1
        self.expected += expected
        self.accepted += accepted

    @property
    def candidates(self) -> tuple[int, ...]:
        """The sizes, and no draft at all where so few were accepted that this may be faster."""
        rare = self.steps >= WARM_UP_STEPS and self.accepted < MIN_ACCEPTED * self.steps
        return (1, *self.sizes) if rare and len(self.sizes) > 1 else self.sizes

    def choose(self, probabilities: Sequence[float]) -> int:
        """The size with the most tokens a second for drafts of these (falling) path probabilities."""
        for size in self.candidates:
            if len(self.seconds.get(size, ())) < TRIALS:
                return size
        trust = self.accepted / self.expected if self.expected else 1.0

        def rate(size: int) -> float:
            return (1 + trust * sum(probabilities[: size - 1])) / median(self.seconds[size])

        best = max(self.candidates, key=rate)
        self.idle = self.idle + 1 if best == 1 else 0
        return best


@dataclass
class DraftingPays:
    """Whether a sequential head should draft at all, by the time and the tokens of steps with and without drafts."""

    seconds: dict[bool, deque[float]] = field(default_factory=lambda: {kind: deque(maxlen=WINDOW) for kind in (True, False)})
    accepted: deque[int] = field(default_factory=lambda: deque(maxlen=2 * WARM_UP_STEPS))  # by step with drafts
    without: int = 0  # steps since it last paid

    def record(self, drafted: bool, seconds: float, accepted: int) -> None:
        """Records a step: whether its tokens were drafted, as are those of the next, and how many were accepted."""
        self.seconds[drafted].append(seconds)
        if drafted:
            self.accepted.append(accepted)

    def choose(self) -> bool:
        """Whether the next step carries drafts: until enough is known, where they pay, and now and then to find out."""
        if len(self.accepted) < WARM_UP_STEPS:
            return True
        if len(self.seconds[False]) < TRIALS:
            return False
        cost = median(self.seconds[True]) / median(self.seconds[False])
        if 1 + fmean(self.accepted) >= cost:
            self.without = 0
            return True
        self.without += 1
        return self.without % RETRY_STEPS >= RETRY_STEPS - TRIALS


@dataclass
class BatchDraftLength:
    """How many drafts each sequence of a batch should carry, by the tokens of a step over its time ("goodput").

    Batches of 8 to 15 sequences, say, count as one size. Source: SmartSpec, arXiv 2406.14066.
    """

    most: int  # drafts of a sequence
    seconds: dict[tuple[int, int], deque[float]] = field(default_factory=dict)  # of the latest steps, by size and drafts
    accepted: list[deque[bool]] = field(init=False)  # of the latest drafts at each place
    since: int = 0  # steps since other numbers were tried

    def __post_init__(self) -> None:
        self.accepted = [deque(maxlen=16 * WINDOW) for _ in range(self.most)]

    def choose(self, sequences: int) -> int:
        """Drafts of each sequence in the next step."""
        size = sequences.bit_length()
        times = {drafts: self.seconds.get((size, drafts), deque()) for drafts in range(self.most + 1)}
        for drafts in reversed(times):  # the most first: acceptance becomes known at every place
            if len(times[drafts]) < TRIALS:
                return drafts
        tokens = np.cumsum([1.0, *(np.mean(place) if place else 0.0 for place in self.accepted)])
        best = max(times, key=lambda drafts: tokens[drafts] / median(times[drafts]))
        self.since += 1
        if self.since >= RETRY_STEPS:
            self.since = 0
            for drafts in {best - 1, best + 1} & times.keys():
                times[drafts].clear()
        return best

    def record(self, drafts: int, seconds: float, drafted: Sequence[int], accepted: Sequence[int]) -> None:
        """Records a step: its drafts by choice, its time, and by sequence how many there were and how many were accepted."""
        self.seconds.setdefault((len(drafted).bit_length(), drafts), deque(maxlen=WINDOW)).append(seconds)
        for many, good in zip(drafted, accepted, strict=True):
            for place in range(min(many, self.most)):
                self.accepted[place].append(good > place)


def batch_draft_length_of(model: MultiHeadLM, num_heads: int, device: torch.device) -> BatchDraftLength:
    """What the batches of a model share; device: the model's, which is asked for once, because it walks over all modules."""
    key = ("batch", num_heads, torch.get_num_threads(), device)
    return model.runtime.draft_lengths.setdefault(key, BatchDraftLength(num_heads - 1))


def drafts_freely(model: MultiHeadLM, options: DecodingOptions) -> bool:
    """Whether the number of drafts changes nothing but the time.

    It changes the rounding: harmless in float32, not where close calls are ties. A number that is asked for stays.
    """
    chosen = options.sample or options.off or options.logits_processors or options.synthetic_acceptance is not None
    exact = options.budget == 0 and model.dtype == torch.float32 and not options.compile
    return exact and not chosen and options.num_heads > 1 and options.tree is None


def drafting_pays_of(model: MultiHeadLM, options: DecodingOptions) -> DraftingPays | None:
    """What decides whether a sequential head drafts, where that cannot change the text; None: it always does."""
    if not is_sequential(model) or not drafts_freely(model, options):
        return None
    key = ("sequential", options.num_heads, torch.get_num_threads(), model.device)
    return model.runtime.draft_lengths.setdefault(key, DraftingPays())


def draft_length_of(model: MultiHeadLM, options: DecodingOptions) -> AdaptiveDraftLength | None:
    """How many drafts a step carries, if they are a tree: for greedy choices without logits processors."""
    n = options.num_heads
    chains = options.sample or options.off or options.logits_processors or options.synthetic_acceptance is not None
    if chains or n == 1 or options.tree == 0 or is_sequential(model):
        return None
    if options.tree is not None:
        return AdaptiveDraftLength((options.tree + 1,))
    if not drafts_freely(model, options):
        return None
    key = (n, torch.get_num_threads(), model.device)
    return model.runtime.draft_lengths.setdefault(key, AdaptiveDraftLength((n, 2 * n, 4 * n)))
