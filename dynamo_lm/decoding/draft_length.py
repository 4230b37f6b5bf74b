"""How many drafts a step should carry, learned from the time and the acceptance of earlier steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

TRIALS = 3  # steps of each size before the times are believed


WINDOW = 15  # latest steps of each size, whose median counts


PATIENCE, RARELY = 24, 0.75  # after so many steps with fewer kept drafts each, steps without drafts are tried, too


@dataclass
class AdaptiveDraftLength:
    """How many drafts a step should carry: what steps of each size took, and how far draft probabilities can be trusted."""

    sizes: tuple[int, ...]  # tokens in a forward, the certain one included, ascending
    seconds: dict[int, deque[float]] = field(default_factory=dict)  # of the latest steps of each size
    steps: int = 0
    expected: float = 0.0  # tokens that the probabilities promised
    kept: int = 0  # and that were kept

    def record(self, size: int, seconds: float, expected: float, kept: int) -> None:
        """A step with `size` tokens took so long; its drafts promised `expected` kept tokens, and `kept` were."""
        self.seconds.setdefault(size, deque(maxlen=WINDOW)).append(seconds)
        self.steps += 1
        self.expected += expected
        self.kept += kept

    @property
    def considered(self) -> tuple[int, ...]:
        """The sizes, and no draft at all where so few were kept that this may be faster."""
        rare = self.steps >= PATIENCE and self.kept < RARELY * self.steps
        return (1, *self.sizes) if rare and len(self.sizes) > 1 else self.sizes

    def choose(self, probabilities: Sequence[float]) -> int:
        """The size with the most tokens a second for drafts of these (falling) path probabilities."""
        for size in self.considered:
            if len(self.seconds.get(size, ())) < TRIALS:
                return size
        trust = self.kept / self.expected if self.expected else 1.0

        def rate(size: int) -> float:
            return (1 + trust * sum(probabilities[: size - 1])) / float(np.median(self.seconds[size]))

        return max(self.considered, key=rate)
