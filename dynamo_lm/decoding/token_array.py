"""The tokens of a growing sequence as an array: NumPy and the kernels read them in every step, a list is converted once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass
class TokenArray:
    """The tokens that were converted so far, and room for more."""

    held: np.ndarray = field(default_factory=lambda: np.empty(256, np.int64))
    length: int = 0

    def of(self, tokens: Sequence[int]) -> np.ndarray:
        """(t,) int64, valid until the next call; tokens: a continuation of the last call's."""
        if len(tokens) > self.held.size:
            self.held = np.append(self.held, np.empty(len(tokens), np.int64))
        self.held[self.length : len(tokens)] = tokens[self.length :]
        self.length = len(tokens)
        return self.held[: self.length]
