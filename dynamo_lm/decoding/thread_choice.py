"""How many CPU threads steps of decoding use, learned from the time of the steps.

The best number depends on the model, on the memory, and on what else the machine does: beside one busy process, two threads
on two cores take more than twice as long as one, because each waits for the other at every product (LOG.md).
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch

TRIALS = 3  # steps with each number before their times count, after one that does not count
WINDOW = 15  # latest steps with each number, whose median counts
AGAIN = 192  # steps after which the other numbers are tried again ..
LATEST, SLOWER = 5, 2.0  # .. or at once, if the latest steps take so many times as long as those before
READING = 6  # tokens whose products take as long as reading the weights: steps of a few tokens are compared by that
GAIN = 0.95  # of the time: more threads have to be so much faster than fewer, because they take other programs' time


@dataclass
class AdaptiveThreads:
    """The number of threads with the fastest steps, tried again now and then."""

    most: int
    seconds: dict[int, deque[float]] = field(default_factory=dict)  # of the latest steps, by number, of a token's width
    since: int = 0  # steps since all numbers were tried
    warm: bool = False  # whether threads of the number that is being tried exist

    @classmethod
    def of_this_machine(cls) -> AdaptiveThreads:
        """Up to torch's own number, or what this process may use."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return cls(min(torch.get_num_threads(), cores))

    @property
    def counts(self) -> list[int]:
        """The numbers that are tried, ascending: powers of two, and `most`."""
        return sorted({*(2**i for i in range(self.most.bit_length()) if 2**i <= self.most), self.most})

    def choose(self) -> int:
        """For the next step: what is not known yet, else the fastest."""
        unknown = (count for count in self.counts if len(self.seconds.get(count, ())) < TRIALS)
        return next(unknown, None) or self.best()

    def best(self) -> int:
        """The fastest number, once all have been tried."""
        medians = {count: float(np.median(self.seconds[count])) for count in self.counts}
        best, *others = self.counts
        for count in others:
            if medians[count] < GAIN * medians[best]:
                best = count
        return best

    def record(self, count: int, seconds: float, tokens: int) -> None:
        """Records a step with so many threads and so many tokens of all sequences."""
        times = self.seconds.setdefault(count, deque(maxlen=WINDOW))
        trying = len(times) < TRIALS
        if trying and not self.warm:  # the threads are made in the first step
            self.warm = True
            return
        times.append(seconds / (READING + tokens))
        self.warm = trying and len(times) < TRIALS
        self.since = 0 if trying else self.since + 1
        before, latest = list(times)[:-LATEST], list(times)[-LATEST:]
        slower = len(times) == WINDOW and np.median(latest) > SLOWER * np.median(before)
        if self.since >= AGAIN or slower:
            self.seconds.clear()
            self.since = 0
