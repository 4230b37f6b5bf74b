"""The base model's view of emitted tokens: log-likelihood, regret, and scores of single tokens if requested.

In: the base's logits after every input token of a forward. Out: numbers, added to sequences. However the tokens were chosen,
these are the base's own, at temperature 1 over the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dynamo_lm.decoding.sequence import SequenceState
from dynamo_lm.decoding.statistics import TokenLogProb


class LogProbs:
    """The base's log-probabilities of tokens, from its logits after each input token."""

    def __init__(self, logits: Tensor):
        """logits: (sequences, width, vocabulary) float32 on the CPU."""
        self.tensor, self.logits = logits, logits.numpy()
        self._normalisers: dict[tuple[int, int], float] = {}  # of lines that were asked for, which are few

    def normaliser(self, r: int, place: int) -> float:
        """The logarithm of the sum of exponentials of the r-th sequence's logits after input token `place`."""
        if (r, place) not in self._normalisers:
            self._normalisers[r, place] = float(self.tensor[r, place].logsumexp(-1))
        return self._normalisers[r, place]

    def of(self, sequence: SequenceState, r: int, token: int, place: int) -> TokenLogProb:
        """The score of a token after the r-th sequence's input token `place`."""
        line, normaliser = self.logits[r, place], self.normaliser(r, place)
        best = torch.from_numpy(line).topk(min(sequence.options.logprobs or 0, len(line)))
        top = [(token, value - normaliser) for token, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
        return TokenLogProb(float(line[token]) - normaliser, top)

    def add(
        self,
        sequence: SequenceState,
        r: int,
        tokens: Sequence[int],
        *,
        after: Sequence[int] | None = None,
        costs: Sequence[float] | None = None,
    ) -> None:
        """Adds the log-likelihood and the regret of tokens[i] after input token after[i] (or i) of the r-th sequence.

        `costs` are the regrets of tokens that were verified; without them the regret is against the base's first choice.
        """
        statistics = sequence.statistics
        for i, token in enumerate(tokens):
            place = i if after is None else after[i]
            line = self.logits[r, place]
            statistics.log_likelihood += float(line[token]) - self.normaliser(r, place)
            statistics.scored += 1
            regret = float(line.max() - line[token]) if costs is None else costs[i]
            statistics.regret += regret
            statistics.unverified += costs is None or regret > 0
            if sequence.options.logprobs is not None:
                sequence.scores.append(self.of(sequence, r, token, place))
