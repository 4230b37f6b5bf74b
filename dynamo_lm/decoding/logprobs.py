"""What the base model says of emitted tokens: log-likelihood, regret, and scores of single tokens if asked for.

In: the base's logits behind every token that a forward absorbed. Out: numbers, added to rows. Whatever chose the tokens,
these are the base's own, at temperature 1 over the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dynamo_lm.decoding.sequence import SequenceState
from dynamo_lm.decoding.statistics import TokenLogProb
from dynamo_lm.kernels import loader


def normalisers(logits: Tensor) -> Tensor:
    """logits.logsumexp(-1) of float32 on the CPU, (..., vocabulary) -> (...)."""
    fast = loader.sampler_of(logits)
    if fast is None:
        return logits.logsumexp(-1)
    result = torch.empty(logits.shape[:-1])
    fast.dynamo_lm_normalisers(logits.data_ptr(), result.numel(), logits.shape[-1], result.data_ptr())
    return result


class LogProbs:
    """What the base says of tokens, from its logits behind each absorbed one."""

    def __init__(self, logits: Tensor):
        """logits: (rows, width, vocabulary) float32 on the CPU."""
        self.logits, self.normaliser = logits.numpy(), normalisers(logits).numpy()

    def of(self, row: SequenceState, r: int, token: int, place: int) -> TokenLogProb:
        """The score of a token behind the r-th row's absorbed token `place`."""
        line, normaliser = self.logits[r, place], float(self.normaliser[r, place])
        best = torch.from_numpy(line).topk(min(row.options.logprobs or 0, len(line)))
        top = [(token, value - normaliser) for token, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
        return TokenLogProb(float(line[token]) - normaliser, top)

    def add(
        self,
        row: SequenceState,
        r: int,
        tokens: Sequence[int],
        *,
        behind: Sequence[int] | None = None,
        costs: Sequence[float] | None = None,
    ) -> None:
        """Adds the log-likelihood and the regret of tokens[i] behind absorbed token behind[i] (or i) of the r-th row.

        `costs` are the regrets of tokens that were verified; without them nobody looked, and the regret is against the
        base's first choice.
        """
        statistics = row.statistics
        for i, token in enumerate(tokens):
            place = i if behind is None else behind[i]
            line = self.logits[r, place]
            statistics.log_likelihood += float(line[token] - self.normaliser[r, place])
            statistics.scored += 1
            regret = float(line.max() - line[token]) if costs is None else costs[i]
            statistics.regret += regret
            statistics.unverified += costs is None or regret > 0
            if row.options.logprobs is not None:
                row.scores.append(self.of(row, r, token, place))
