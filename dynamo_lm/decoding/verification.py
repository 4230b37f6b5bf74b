"""Verification of drafts: which of them the base model would have produced itself, or nearly.

Pure functions of the base's logits after each input token; no model, no tokenizer. Under greedy decoding a draft stays
if it is the base's first choice; under sampling by the rejection rule of speculative sampling (Leviathan et al. 2023,
Chen et al. 2023), after which the emitted tokens have the base's own distribution, whatever the draft was.

With regret budgets a rejected draft is accepted while the log-likelihood that the base loses by it, summed over the tokens
so far, is within the budget at its place. The loss is taken at temperature 1, whatever temperature is sampled at
(docs/method.md section 8).
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dynamo_lm.errors import InputError
from dynamo_lm.kernels import loader

Proposal = tuple[Tensor, Tensor]  # distinct candidate ids (k,) int64 and their probabilities (k,); contiguous, on the CPU


def certain(token: int) -> Proposal:
    """The distribution that a draft which was not drawn at random comes from."""
    return torch.tensor([token]), torch.ones(1, dtype=torch.float64)


class Verification(NamedTuple):
    """The accepted drafts of one step."""

    accepted: int  # drafts, from the first
    token: int  # the base's own, after them
    costs: list[float]  # of each accepted draft: 0 by the exact rule, else the regret in nats
    path: list[int]  # where the accepted drafts are, counted with the verified token as 0: 1, 2, .. unless they are a tree


def accept_greedy(logits: Tensor, drafts: Sequence[int], regret_budgets: Sequence[float] = ()) -> Verification:
    """How many drafts are the base's first choices, and its first choice after them.

    Args:
        logits: the base's, after the verified token and after each draft, (at least drafts + 1, vocabulary).
        drafts: the drafted tokens, in order.
        regret_budgets: by draft, how many nats all drafts up to it may cost together; empty: none, the exact rule alone.

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
            if not _allowed(cost, costs, regret_budgets):
                break
        costs.append(cost)
    return Verification(len(costs), best[len(costs)], costs, _chain(costs))


def accept_tree(
    logits: Tensor, drafts: Sequence[int], parents: Sequence[int], regret_budgets: Sequence[float] = ()
) -> Verification:
    """`accept_greedy` for drafts that are a tree: the base's first choices, as far down as the tree has them.

    Args:
        logits: the base's, after the verified token and after each draft, (at least drafts + 1, vocabulary).
        parents: of each draft, where the token before it is: 0 the verified one, i the i-th draft.
        regret_budgets: by depth. Where no draft is the first choice, the likeliest one may be accepted.
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
        chosen = tokens.get(best[at])
        if chosen is None:
            line = logits[at].double()
            likely = max(tokens, key=line.__getitem__)
            cost = (line[best[at]] - line[likely]).item()
            if not _allowed(cost, costs, regret_budgets):
                break
            chosen = tokens[likely]
        path.append(chosen)
        costs.append(cost)
        at = chosen
    return Verification(len(path), best[at], costs, path)


def check_logits(logits: Tensor, *, sample: bool) -> None:
    """Refuse logits that no token can be chosen from: a text of arbitrary tokens would follow.

    Args:
        logits: what tokens are chosen from, (positions, vocabulary).
        sample: whether tokens are drawn; transformers takes the first token where all are forbidden and none is drawn.

    Raises:
        InputError: a logit is not a number, or with `sample` all are minus infinity.
    """
    highest = logits.numpy().max(-1)  # NaN where any is
    if np.isnan(highest).any():
        raise InputError(
            "The logits are not numbers (NaN); the weights are damaged, or the model needs bfloat16 or float32."
        )
    if sample and np.isneginf(highest).any():
        raise InputError("Logits processors forbid every token, so none can be drawn; allow at least one.")


def accept_sampled(
    logits: Tensor,
    drafts: Sequence[int],
    proposals: Sequence[Proposal],
    generator: torch.Generator,
    regret_budgets: Sequence[float] = (),
    *,
    temperature: float = 1.0,
) -> Verification:
    """The exact rejection rule: how many drafts are accepted, and the token after them.

    Args:
        logits: what the base samples from after the verified token and after each draft, (at least drafts + 1, vocabulary).
        drafts: the drafted tokens.
        proposals: the distribution that each was drawn from, given the ones before it.
        generator: one uniform number a draft looked at, and one for the token after or in place of a rejected draft.
        regret_budgets: as in `accept_greedy`.
        temperature: what the logits were divided by.

    Returns:
        Without regret budgets drafts[:accepted] and token are distributed as the base's own samples. A draft that the rule
        rejects in favour of a token x costs log p(x) - log p(draft), at least 0, with p at temperature 1; it costs infinity
        if it cannot be sampled at all (top-k, top-p).
    """
    fast = loader.sampler_of(logits)
    costs: list[float] = []
    for position, (token, proposal) in enumerate(zip(drafts, proposals, strict=True)):
        line, cost = _Dense(logits[position]) if fast is None else _Compiled(logits[position], fast), 0.0
        if line.is_rejected(token, proposal, _uniform(generator)):
            own, cost = line.sample_residual(token, proposal, _uniform(generator))
            cost *= temperature  # so many times the difference of two logits is the difference before they were divided
            if not _allowed(cost, costs, regret_budgets):
                return Verification(position, own, costs, _chain(costs))
        costs.append(cost)
    line = _Dense(logits[len(drafts)]) if fast is None else _Compiled(logits[len(drafts)], fast)
    return Verification(len(drafts), line.choice(_uniform(generator)), costs, _chain(costs))


def accept_synthetic(logits: Tensor, drafts: Sequence[int], probability: float, generator: torch.Generator) -> Verification:
    """Accepts each draft with this probability, whatever the base makes of it, up to the first that is rejected.

    For tests of all lengths, and to time steps as if heads were accepted so often; the text is worth nothing.

    Args:
        logits: as in `accept_greedy`.
        probability: 0 gives the base's first choices one at a time, 1 accepts every draft.
        generator: one uniform number a draft looked at.

    Returns:
        The base's first choice follows; an accepted draft costs what it costs in `accept_greedy`.
    """
    best = logits[: len(drafts) + 1].numpy().argmax(-1).tolist()
    costs: list[float] = []
    for position, draft in enumerate(drafts):
        if _uniform(generator) >= probability:
            break
        costs.append((logits[position, best[position]].double() - logits[position, draft].double()).item())
    return Verification(len(costs), best[len(costs)], costs, _chain(costs))


class _Dense:
    """What the base samples from after one token, and the rejection rule: by torch, with p and q over all tokens."""

    def __init__(self, line: Tensor):
        """line: logits, (vocabulary,)."""
        self.p = line.double().softmax(-1)

    def _q(self, proposal: Proposal) -> Tensor:
        ids, probs = proposal
        return torch.zeros_like(self.p).index_put_((ids,), probs.double())

    def is_rejected(self, token: int, proposal: Proposal, uniform: float) -> bool:
        """Never where q <= p, else with probability 1 - p / q."""
        return bool(uniform * self._q(proposal)[token] >= self.p[token])

    def sample_residual(self, token: int, proposal: Proposal, uniform: float) -> tuple[int, float]:
        """The base's own token in place of a rejected one, and how much likelier it is, in nats."""
        own = _pick((self.p - self._q(proposal)).clamp(min=0), uniform)
        return own, max(0.0, (self.p[own].log() - self.p[token].log()).item())

    def choice(self, uniform: float) -> int:
        """A token of the base's."""
        return _pick(self.p, uniform)


class _Compiled:
    """`_Dense` by the kernels, which look at q where it is not 0."""

    def __init__(self, line: Tensor, fast: Any):
        self.line, self.fast = (line.data_ptr(), len(line)), fast

    def is_rejected(self, token: int, proposal: Proposal, uniform: float) -> bool:
        ids, probs = proposal[0], proposal[1].double()
        return bool(self.fast.dynamo_lm_refuses(*self.line, ids.data_ptr(), probs.data_ptr(), len(ids), token, uniform))

    def sample_residual(self, token: int, proposal: Proposal, uniform: float) -> tuple[int, float]:
        ids, probs, cost = proposal[0], proposal[1].double(), ctypes.c_double()
        q = ids.data_ptr(), probs.data_ptr(), len(ids)
        return self.fast.dynamo_lm_pick(*self.line, *q, uniform, token, ctypes.addressof(cost)), cost.value

    def choice(self, uniform: float) -> int:
        return self.fast.dynamo_lm_pick(*self.line, None, None, 0, uniform, 0, None)


def _uniform(generator: torch.Generator) -> float:
    return torch.rand((), generator=generator, dtype=torch.float64).item()


def _chain(costs: list[float]) -> list[int]:
    return list(range(1, len(costs) + 1))


def _allowed(cost: float, costs: list[float], regret_budgets: Sequence[float]) -> bool:
    """Whether a draft may be accepted at this cost; one that the base cannot say at all (an infinite cost) never may."""
    return bool(regret_budgets) and cost < math.inf and sum(costs) + cost <= regret_budgets[len(costs)]


def _pick(weights: Tensor, uniform: float) -> int:
    """Inverse CDF of unnormalised weights, (vocabulary,)."""
    total = weights.cumsum(0)
    return min(int(torch.searchsorted(total, uniform * total[-1], right=True)), len(weights) - 1)
