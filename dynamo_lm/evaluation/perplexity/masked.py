"""The masked joint of a text's true tokens: what the tables add to the heads, as a proper distribution.

In: one head's log-probabilities at many positions and the true tokens between each position and its target. Out: the
target's log-probability.

J of method.md section 3 cannot be normalised over V^m, so this is a chain over the full vocabulary at temperature 1:

    q(x_i | h) ∝ f_i(x_i) * (p^(h, x_i) / (p^(h) p^(x_i)))^alpha_c,    h = the true x_1 .. x_{i-1}

where h loses its oldest token while the tables hold no continuation of it, and x_1 is head 1's alone. For the last token of
a tuple this is J's own conditional; the chain leaves out that J also reweights earlier tokens by what can follow them.
Unseen tokens have q = 0, so each token's probability is smoothing * f_i + (1 - smoothing) * q. That sums to 1 over the
vocabulary, so its perplexity is comparable with that of the product of heads (smoothing = 1), token for token.

On text that the tables were counted on, the mask has seen the answers and its perplexity says nothing; see `coverage`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from dynamo_lm.cooccurrence.table import Cooccurrence

SMOOTHING = 0.1


def coverage(table: Cooccurrence, documents: Sequence[np.ndarray], order: int) -> float | None:
    """Share of the documents' n-grams, of `order` tokens or of the table's if that is shorter, that the table holds."""
    order = min(order, table.order)
    held = total = 0
    for document in documents:
        tokens = torch.from_numpy(document)
        grams = tokens[: max(0, len(tokens) - order + 1)]  # indices of n-grams in the table, -1 for none
        for length in range(2, order + 1):
            grams = table.extend(grams, tokens[length - 1 : length - 1 + len(grams)], length)
        held, total = held + int((grams >= 0).sum()), total + len(grams)
    return held / total if total else None


class Mask:
    """smoothing * f + (1 - smoothing) * q of this module's docstring, for many positions at once."""

    def __init__(self, table: Cooccurrence, alpha_c: float, smoothing: float):
        self.table, self.smoothing = table, smoothing
        self.weights: list[np.ndarray] = []  # by order from 2: (rows,) alpha_c * log(p^(h, x) / p^(x))
        alone = table.log_frequencies[0].double()
        for order in range(2, table.order + 1):
            last = table.keys[order - 1] % table.vocab_size
            self.weights.append((alpha_c * (table.log_frequencies[order - 1].double() - alone[last])).numpy())

    def __call__(self, log_f: np.ndarray, history: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """log(smoothing * f(x) + (1 - smoothing) * q(x | h)), (rows,) float64.

        log_f (rows, vocabulary) is the head's, history (rows, i - 1) the tokens between its context and its target x.
        """
        alone = log_f[np.arange(len(targets)), targets].astype(float)
        log_q = alone.copy()  # without any history in the tables: the head itself
        left = np.arange(len(targets))
        for length in range(min(self.table.order - 1, history.shape[1]), 0, -1):
            continued, values = self._after(log_f[left], history[left, -length:], targets[left], alone[left])
            log_q[left[continued]] = values
            left = left[~continued]
        with np.errstate(divide="ignore"):
            mixed = np.log1p(-self.smoothing) + log_q
        return np.logaddexp(math.log(self.smoothing) + alone, mixed)

    def _after(
        self, log_f: np.ndarray, history: np.ndarray, targets: np.ndarray, alone: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Which histories, all of one length, the tables continue, (rows,) bool, and log q of their targets."""
        table, order = self.table, history.shape[1] + 1
        extended = torch.from_numpy(history[:, 0])
        for length in range(2, order):
            extended = table.extend(extended, torch.from_numpy(history[:, length - 1]), length)
        offsets, parent = table.lookup.offsets(order), extended.numpy()
        parent = np.where(parent < table.num_rows(order - 1), parent, -1)
        start = offsets[parent]
        size = np.where(parent >= 0, offsets[parent + 1] - start, 0)
        continued = size > 0
        start, size, parent = start[continued], size[continued], parent[continued]
        if not len(size):
            return continued, np.empty(0)
        # Every child of every history, one after the other: (children,)
        ends = np.cumsum(size)
        child = np.repeat(start - ends + size, size) + np.arange(ends[-1])
        row = np.repeat(np.flatnonzero(continued), size)
        token = table.keys[order - 1].numpy()[child] - np.repeat(parent * table.vocab_size, size)
        score = log_f[row, token] + self.weights[order - 2][child]
        top = np.maximum.reduceat(score, ends - size)
        total = top + np.log(np.add.reduceat(np.exp(score - np.repeat(top, size)), ends - size))
        entry = table.extend(torch.from_numpy(parent), torch.from_numpy(targets[continued]), order).numpy()
        with np.errstate(invalid="ignore"):
            values = alone[continued] + self.weights[order - 2][entry] - total
        return continued, np.where(entry >= 0, values, -np.inf)
