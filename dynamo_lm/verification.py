"""Verification of drafts: which of them the base model would have produced itself, or nearly.

Pure functions of the base's logits behind each absorbed token; no model, no tokenizer. Under greedy decoding a draft stays
if it is the base's first choice; under sampling by the rejection rule of speculative sampling (Leviathan et al. 2023,
Chen et al. 2023), after which the emitted tokens have the base's own distribution, whatever the draft was.

With an allowance (architecture.md, the budget dial) a draft that fails stays all the same while the log-likelihood that
the base loses by it, summed over the tokens so far, is within what is allowed at its place.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynamo_lm import kernels

Proposal = tuple[Tensor, Tensor]  # distinct candidate ids (k,) int64 and their probabilities (k,); contiguous, on the CPU


class Verdict(NamedTuple):
    """What one step keeps."""

    kept: int  # drafts that stay, from the first
    token: int  # the base's own, behind them
    costs: list[float]  # of each kept draft: 0 if the exact rule kept it, else the regret in nats
    path: list[int]  # where the kept drafts are, counted with the certain token as 0: 1, 2, .. unless they are a tree


def accept_greedy(logits: Tensor, drafts: Sequence[int], allowance: Sequence[float] = ()) -> Verdict:
    """How many drafts are the base's first choices, and its first choice behind them.

    Args:
        logits: the base's, behind the certain token and behind each draft, (at least drafts + 1, vocabulary).
        drafts: the drafted tokens, in order.
        allowance: by draft, how many nats all drafts up to it may cost together; empty: none, the exact rule alone.

    Returns:
        Ties go to the lowest id, as `torch.argmax` does for the base. A draft that is not the first choice x costs
        log p(x) - log p(draft).
    """
    best = logits[: len(drafts) + 1].numpy().argmax(-1).tolist()
    costs: list[float] = []
    for position, draft in enumerate(drafts):
        cost = 0.0
        if draft != best[position]:
            cost = (logits[position, best[position]].double() - logits[position, draft].double()).item()
            if not _allowed(cost, costs, allowance):
                break
        costs.append(cost)
    return Verdict(len(costs), best[len(costs)], costs, _chain(costs))


def accept_tree(logits: Tensor, drafts: Sequence[int], parents: Sequence[int], allowance: Sequence[float] = ()) -> Verdict:
    """`accept_greedy` for drafts that are a tree: the base's first choices, as far down as the tree has them.

    Args:
        logits: the base's, behind the certain token and behind each draft, (at least drafts + 1, vocabulary).
        parents: of each draft, where the token before it is: 0 the certain one, i the i-th draft.
        allowance: by depth. Where no draft is the first choice, the likeliest one may stay.
    """
    best = logits[: len(drafts) + 1].numpy().argmax(-1).tolist()
    children: dict[int, list[int]] = {}
    for index, parent in enumerate(parents, start=1):
        children.setdefault(parent, []).append(index)
    path: list[int] = []
    costs: list[float] = []
    at = 0
    while at in children:
        cost, tokens = 0.0, {drafts[index - 1]: index for index in children[at]}
        found = tokens.get(best[at])
        if found is None:
            line = logits[at].double()
            likely = max(tokens, key=line.__getitem__)
            cost = (line[best[at]] - line[likely]).item()
            if not _allowed(cost, costs, allowance):
                break
            found = tokens[likely]
        path.append(found)
        costs.append(cost)
        at = found
    return Verdict(len(path), best[at], costs, path)


def accept_sampled(
    logits: Tensor,
    drafts: Sequence[int],
    proposals: Sequence[Proposal],
    generator: torch.Generator,
    allowance: Sequence[float] = (),
) -> Verdict:
    """The exact rejection rule: how many drafts stay, and the token behind them.

    Args:
        logits: what the base samples from behind the certain token and behind each draft, (at least drafts + 1, vocabulary).
        drafts: the drafted tokens.
        proposals: the distribution that each was drawn from, given the ones before it.
        generator: one uniform number a draft looked at, and one for the token behind or in place of a refused draft.
        allowance: as in `accept_greedy`.

    Returns:
        Without an allowance drafts[:kept] and token are distributed as the base's own samples. A draft that the rule refuses
        in favour of a token x costs log p(x) - log p(draft), at least 0.
    """
    fast = kernels.sampler_of(logits)
    if fast is None:
        return _dense(logits, drafts, proposals, generator, allowance)
    return _compiled(fast, logits, drafts, proposals, generator, allowance)


def _dense(
    logits: Tensor,
    drafts: Sequence[int],
    proposals: Sequence[Proposal],
    generator: torch.Generator,
    allowance: Sequence[float],
) -> Verdict:
    """`accept_sampled` by torch, with p and q over the whole vocabulary."""
    costs: list[float] = []
    for position, (token, (ids, probs)) in enumerate(zip(drafts, proposals, strict=True)):
        p = logits[position].double().softmax(-1)
        q = torch.zeros_like(p).index_put_((ids,), probs.double())
        cost = 0.0
        # q <= p: always accept; else with probability p / q
        if torch.rand((), generator=generator, dtype=torch.float64) * q[token] >= p[token]:
            own = _pick((p - q).clamp(min=0), generator)
            cost = max(0.0, (p[own].log() - p[token].log()).item())
            if not _allowed(cost, costs, allowance):
                return Verdict(position, own, costs, _chain(costs))
        costs.append(cost)
    token = _pick(logits[len(drafts)].double().softmax(-1), generator)
    return Verdict(len(drafts), token, costs, _chain(costs))


def _compiled(
    fast: Any,
    logits: Tensor,
    drafts: Sequence[int],
    proposals: Sequence[Proposal],
    generator: torch.Generator,
    allowance: Sequence[float],
) -> Verdict:
    """`accept_sampled` by the kernels, which look at q where it is not 0."""
    costs: list[float] = []
    size, regret = logits.shape[-1], ctypes.c_double()
    lines = range(logits.data_ptr(), logits.data_ptr() + logits.nbytes, logits.element_size() * size)
    for position, (token, (ids, probs)) in enumerate(zip(drafts, proposals, strict=True)):
        probs = probs.double()
        q = ids.data_ptr(), probs.data_ptr(), len(ids)
        cost = 0.0
        if fast.dynamo_lm_refuses(lines[position], size, *q, token, _uniform(generator)):
            own = fast.dynamo_lm_pick(lines[position], size, *q, _uniform(generator), token, ctypes.addressof(regret))
            cost = regret.value
            if not _allowed(cost, costs, allowance):
                return Verdict(position, own, costs, _chain(costs))
        costs.append(cost)
    token = fast.dynamo_lm_pick(lines[len(drafts)], size, None, None, 0, _uniform(generator), 0, None)
    return Verdict(len(drafts), token, costs, _chain(costs))


def _uniform(generator: torch.Generator) -> float:
    return torch.rand((), generator=generator, dtype=torch.float64).item()


def _chain(costs: list[float]) -> list[int]:
    return list(range(1, len(costs) + 1))


def _allowed(cost: float, costs: list[float], allowance: Sequence[float]) -> bool:
    """Whether a draft may stay at this cost; one that the base cannot say at all (an infinite cost) never may."""
    return bool(allowance) and cost < math.inf and sum(costs) + cost <= allowance[len(costs)]


def _pick(weights: Tensor, generator: torch.Generator) -> int:
    """Inverse CDF of unnormalised weights, (vocabulary,)."""
    total = weights.cumsum(0)
    at = torch.rand((), generator=generator, dtype=torch.float64) * total[-1]
    return min(int(torch.searchsorted(total, at, right=True)), len(weights) - 1)
