"""Exact verification of drafts: which of them the base model would have produced itself.

Pure functions of the base's logits behind each absorbed token; no model, no tokenizer. Under greedy decoding a draft stays
if it is the base's first choice; under sampling by the rejection rule of speculative sampling (Leviathan et al. 2023,
Chen et al. 2023), after which the emitted tokens have the base's own distribution, whatever the draft was.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Proposal = tuple[Tensor, Tensor]  # candidate ids (k,) int64 and their probabilities (k,)


def accept_greedy(logits: Tensor, drafts: Sequence[int]) -> tuple[int, int]:
    """How many drafts are the base's first choices, and its first choice behind them.

    Args:
        logits: the base's, behind the certain token and behind each draft, (at least drafts + 1, vocabulary).
        drafts: the drafted tokens, in order.

    Returns:
        (kept, token). Ties go to the lowest id, as `torch.argmax` does for the base.
    """
    best = logits[: len(drafts) + 1].argmax(-1).tolist()
    kept = 0
    while kept < len(drafts) and drafts[kept] == best[kept]:
        kept += 1
    return kept, best[kept]


def accept_sampled(
    logits: Tensor, drafts: Sequence[int], proposals: Sequence[Proposal], generator: torch.Generator
) -> tuple[int, int]:
    """The exact rejection rule: how many drafts stay, and the token behind them.

    Args:
        logits: what the base samples from behind the certain token and behind each draft, (at least drafts + 1, vocabulary).
        drafts: the drafted tokens.
        proposals: the distribution that each was drawn from, given the ones before it.
        generator: one uniform number a draft looked at, and one for the token behind.

    Returns:
        (kept, token), so that drafts[:kept] and token are distributed as the base's own samples.
    """
    for position, (token, (ids, probs)) in enumerate(zip(drafts, proposals, strict=True)):
        p = logits[position].double().softmax(-1)
        q = torch.zeros_like(p).index_put_((ids,), probs.double())
        # q <= p: always accept; else with probability p / q
        if torch.rand((), generator=generator, dtype=torch.float64) * q[token] >= p[token]:
            return position, _pick((p - q).clamp(min=0), generator)
    return len(drafts), _pick(logits[len(drafts)].double().softmax(-1), generator)


def _pick(weights: Tensor, generator: torch.Generator) -> int:
    """Inverse CDF of unnormalised weights, (vocabulary,)."""
    total = weights.cumsum(0)
    at = torch.rand((), generator=generator, dtype=torch.float64) * total[-1]
    return min(int(torch.searchsorted(total, at, right=True)), len(weights) - 1)
