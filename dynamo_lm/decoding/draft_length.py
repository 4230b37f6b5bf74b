"""How many drafts a step should carry, if any, learned from the time and the acceptance of earlier steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import torch

from dynamo_lm.decoding.options import DecodingOptions
from dynamo_lm.decoding.preconditions import is_sequential
from dynamo_lm.decoding.protocol import MultiHeadLM
from dynamo_lm.kernels.linear import MAX_ROWS

TRIALS = 3  # steps of each size before its time counts
WINDOW = 15  # latest steps of each size, whose median counts
JUDGED_STEPS = 8  # latest steps with heads, by which heads rest
SHORTEST_REST, LONGEST_REST = 24, 96  # steps; each rest after another is twice as long
FORGET_STEPS = 256  # steps with heads, after which all times are measured anew: the machine's load changes
RETRY_STEPS = 96  # of batches, before other numbers are tried
AT_REST = 0  # the size of a step that carries no draft and makes none


@dataclass
class Drafts:
    """What is known of a step's drafts before they are verified."""

    size: int = 0  # tokens in the forward, the verified one included; 0: heads were not asked
    expected: float = 0.0  # how many of the drafts should be accepted
    seconds: float = 0.0  # that making them took


@dataclass
class AdaptiveDraftLength:
    """How many drafts a step should carry, and whether heads should draft at all: what gives the most tokens a second.

    A draft is worth its place if the tokens expected of it exceed those that its time gives elsewhere. Heads whose drafts
    gave less than their time rest: they are not computed, or not asked, for some steps.
    """

    sizes: tuple[int, ...]  # tokens in a forward, the verified one included, ascending; one alone is always taken
    heads: int = 0  # sizes up to so many are tried, larger ones if the times of smaller ones promise something
    seconds: dict[int, deque[float]] = field(default_factory=dict)  # of the latest steps of each size
    recent: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=JUDGED_STEPS))  # size, expected drafts
    expected: float = 0.0  # accepted drafts by the draft probabilities
    accepted: float = 0.0  # accepted drafts
    steps: int = 0  # with heads, since times were forgotten
    rest: int = 0  # steps of rest to come
    next_rest: int = SHORTEST_REST

    def rests(self) -> bool:
        """Whether the step that begins makes no drafts."""
        self.rest = self.rest or self._new_rest()
        if not self.rest:
            return False
        self.rest -= 1
        return True

    def _new_rest(self) -> int:
        """Steps of a rest that begins now, the first of which carries drafts still; 0: none does."""
        if len(self.sizes) == 1 or self.untried is not None:
            return 0
        if len(self.seconds.get(AT_REST, ())) < TRIALS:
            return 1 + TRIALS
        if len(self.recent) < JUDGED_STEPS:
            return 0
        least = self._cost(AT_REST)
        gain = sum(1 + self.trust * expected - self._cost(size) / least for size, expected in self.recent)
        if gain > 0:
            self.next_rest = SHORTEST_REST
            return 0
        length, self.next_rest = self.next_rest, min(2 * self.next_rest, LONGEST_REST)
        self.recent.clear()
        return 1 + length

    def record_rest(self, seconds: float) -> None:
        """Records a step without drafts that made none."""
        self._times(AT_REST).append(seconds)

    def record(self, size: int, seconds: float, expected: float, accepted: int) -> None:
        """Records a step of `size` tokens; `expected` of its drafts should have been accepted, and `accepted` were.

        seconds: of the step and of making its drafts.
        """
        forced = self.untried is not None
        self._times(size).append(seconds)
        if not forced:
            self.recent.append((size, expected))
        self.expected += expected
        self.accepted += accepted
        self.steps += 1
        if self.steps >= FORGET_STEPS:
            self.steps, self.expected, self.accepted = 0, self.expected / 2, self.accepted / 2
            self.seconds.clear()
            self.recent.clear()

    @property
    def trust(self) -> float:
        """Accepted drafts over those expected."""
        return self.accepted / self.expected if self.expected else 1.0

    @property
    def untried(self) -> int | None:
        """A size whose time is not known yet: first as many drafts as there are heads, for short texts."""
        for size in reversed(self.sizes):
            trials = JUDGED_STEPS if size == self.heads else TRIALS
            if size <= self.heads and len(self.seconds.get(size, ())) < trials:
                return size
        return None

    @property
    def rate(self) -> float:
        """Tokens a second that steps with heads give now, or steps at rest if these give more."""
        steps = [(1 + self.trust * expected, self._cost(size)) for size, expected in self.recent]
        tokens, seconds = (sum(column) for column in zip(*steps, strict=True)) if steps else (0.0, 1.0)
        return max(tokens / seconds, 1 / self._cost(AT_REST if AT_REST in self.seconds else self.sizes[0]))

    def choose(self, probabilities: Sequence[float]) -> int:
        """The size that is worth most for drafts of these (falling) path probabilities."""
        if len(self.sizes) == 1:
            return self.sizes[0]
        if self.untried is not None:
            return self.untried
        rate, trust = self.rate, self.trust
        return max(self.sizes, key=lambda size: trust * sum(probabilities[: size - 1]) - rate * self._cost(size))

    def worth(self, probability: float, drafts: int) -> bool:
        """Whether a chain of `drafts` should have one more, if all of them are accepted with this probability."""
        if self.untried is not None:
            return drafts + 2 <= self.untried
        more = self._cost(drafts + 2) - self._cost(drafts + 1)
        return self.trust * probability > self.rate * more

    def _times(self, size: int) -> deque[float]:
        return self.seconds.setdefault(size, deque(maxlen=WINDOW))

    def _cost(self, size: int) -> float:
        """Seconds of a step: measured, or on the line through the two largest sizes below it."""
        if size in self.seconds:
            return median(self.seconds[size])
        low, high = sorted(known for known in self.seconds if AT_REST < known < size)[-2:]
        least, most = median(self.seconds[low]), median(self.seconds[high])
        return most + max(0.0, most - least) / (high - low) * (size - high)


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


def draft_length_of(model: MultiHeadLM, options: DecodingOptions) -> AdaptiveDraftLength | None:
    """What decides how many drafts a step carries, where that cannot change the text, or for a tree of a given size."""
    n = options.num_heads
    if options.tree is not None and options.tree > 0 and not is_sequential(model):
        chains = options.sample or options.off or options.logits_processors or options.synthetic_acceptance is not None
        return None if chains or n == 1 else AdaptiveDraftLength((options.tree + 1,))
    if not drafts_freely(model, options):
        return None
    sequential = is_sequential(model)
    trees = (size for size in {2, 2 * n, 4 * n} if size <= max(n, MAX_ROWS))  # more would round in another order
    sizes = tuple(range(1, n + 1)) if sequential else tuple(sorted({1, n, *trees}))
    key = (sequential, n, torch.get_num_threads(), model.device)
    return model.runtime.draft_lengths.setdefault(key, AdaptiveDraftLength(sizes, n))
