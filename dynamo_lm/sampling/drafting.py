"""Drafts for verification: a chain of tokens from heads 2..n, and the distribution each was drawn from."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynamo_lm.cooccurrence.table import Cooccurrence
from dynamo_lm.kernels import loader
from dynamo_lm.sampling.algorithm1 import _choose, _normalised
from dynamo_lm.sampling.options import check_weighting
from dynamo_lm.sampling.top_k import HeadCandidates, PairwiseCorrection


@dataclass(frozen=True)
class Draft:
    """A continuation to be verified, and what it was drawn from."""

    tokens: list[int]  # n - 1 token ids
    ids: Tensor  # (n - 1, k) int64 on the CPU: the candidates of each
    q: Tensor  # (n - 1, k) float64: their probabilities

    @property
    def proposals(self) -> list[tuple[Tensor, Tensor]]:
        """Per token: candidate ids (k,), their probabilities (k,)."""
        return list(zip(self.ids.unbind(), self.q.unbind(), strict=True))


def draft(
    logits: Tensor,
    first: int,
    table: Cooccurrence | None,
    *,
    alpha_c: float,
    top_k: int,
    temperature: float,
    generator: torch.Generator | None,
    greedy: bool,
    pairwise: PairwiseCorrection | None = None,
) -> Draft:
    """Draft the n - 1 tokens after the verified token `first`, with the distribution each was drawn from.

    logits (n - 1, V) are those of heads 2 .. n. Place i is drawn from the masked joint's conditional, normalised over
    head i's k candidates x, given the history h = first, x_2, .. x_{i-1}:

        q(x) ∝ f_i(x) * (p^(h, x) / (p^(h) p^(x)))^alpha_c

    If none of the candidates was seen after h, h loses its oldest token, down to none: the plain f_i. The table's order
    bounds h from the start. With `pairwise` (a learned coupling) f_i(x) is f_i(x | the token before it). Greedy: the
    largest q. Raises InputError for values out of range and non-finite logits.
    """
    check_weighting(alpha_c, top_k, temperature)
    heads, how = HeadCandidates.top(logits, top_k, temperature), {"alpha_c": alpha_c, "temperature": temperature}
    return draft_from(heads, first, table, **how, generator=generator, greedy=greedy, pairwise=pairwise)


def draft_from(
    heads: HeadCandidates,
    first: int,
    table: Cooccurrence | None,
    *,
    alpha_c: float,
    temperature: float,
    generator: torch.Generator | None,
    greedy: bool,
    pairwise: PairwiseCorrection | None = None,
) -> Draft:
    """`draft` from candidates of heads 2 .. n that were already found."""
    fast = loader.sampler()
    if fast is not None and pairwise is None and (generator is None or generator.device.type == "cpu"):
        return _compiled_chain(fast, heads, first, table, alpha_c, generator, greedy)
    history, proposals = [first], np.empty(heads.ids.shape)
    for i, ids in enumerate(heads.ids):
        proposals[i] = conditional(heads, i, history, table, alpha_c, temperature, pairwise)
        history.append(int(ids[_choose(proposals[i], generator, greedy)]))
    return Draft(history[1:], torch.from_numpy(heads.ids), torch.from_numpy(proposals))


def _compiled_chain(
    fast: Any,
    heads: HeadCandidates,
    first: int,
    table: Cooccurrence | None,
    alpha_c: float,
    generator: torch.Generator | None,
    greedy: bool,
) -> Draft:
    """`draft_from` by the kernels."""
    ids = torch.from_numpy(np.ascontiguousarray(heads.ids, np.int64))
    probs = torch.from_numpy(np.ascontiguousarray(heads.probs, np.float64))
    slots, k = ids.shape
    tokens, q = torch.empty(slots, dtype=torch.int64), torch.empty(slots, k, dtype=torch.float64)
    uniforms = None if greedy else torch.rand(slots, dtype=torch.float64, generator=generator)  # as one by one, on a CPU
    fast.dynamo_lm_chain(
        None if table is None or alpha_c == 0 else table.lookup.pointers(table.order),
        0 if table is None else table.order,
        ids.data_ptr(),
        probs.data_ptr(),
        slots,
        k,
        first,
        alpha_c,
        None if uniforms is None else uniforms.data_ptr(),
        tokens.data_ptr(),
        q.data_ptr(),
    )
    return Draft(tokens.tolist(), ids, q)


def conditional(
    heads: HeadCandidates,
    i: int,
    history: list[int],
    table: Cooccurrence | None,
    alpha_c: float,
    temperature: float,
    pairwise: PairwiseCorrection | None,
) -> np.ndarray:
    """q of place i (head i + 2) after `history`, which ends with the token before it; (k,), as `draft` defines it."""
    ids, q, scores = heads.ids[i], heads.probs[i], heads.log_probs[i]
    if pairwise is not None:
        scores = scores + pairwise(i + 2, np.array(history[-1:]), ids)[0] / temperature
        q = _normalised(scores)
    if table is None or alpha_c == 0:
        return q
    lookup = table.lookup
    for length in range(min(lookup.order - 1, len(history)), 0, -1):
        row = lookup.row(history[-length:])
        if row >= 0:
            weight = lookup.log_after(row, ids, length + 1) - np.maximum(lookup.unigram(ids), -1e30)
            weighted = scores + alpha_c * weight
            if weighted.max() > -np.inf:
                return _normalised(weighted)
    return q
