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
from dynamo_lm.sampling.weights import weigh


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
    text: np.ndarray,
    table: Cooccurrence | None,
    *,
    alpha_c: float,
    top_k: int,
    temperature: float,
    generator: torch.Generator | None,
    greedy: bool,
    pairwise: PairwiseCorrection | None = None,
) -> Draft:
    """Draft the n - 1 tokens after the verified tokens `text` (t,), with the distribution each was drawn from.

    logits (n - 1, V) are those of heads 2 .. n. Place i is drawn from head i's k candidates x, weighted by what n-grams of
    the table and of the text say after the text and the drafts before:

        q(x) ∝ f_i(x) * (p~(x | text, x_2 .. x_(i-1)) / p^(x))^alpha_c

    `weights.weigh` defines p~, and the candidates that the text itself adds. With `pairwise` (a learned coupling) f_i(x) is
    f_i(x | the token before it). Greedy: the largest q. Raises InputError for values out of range and non-finite logits.
    """
    check_weighting(alpha_c, top_k, temperature)
    heads, how = HeadCandidates.top(logits, top_k, temperature), {"alpha_c": alpha_c, "temperature": temperature}
    return draft_from(heads, text, table, **how, generator=generator, greedy=greedy, pairwise=pairwise)


def draft_from(
    heads: HeadCandidates,
    text: np.ndarray,
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
        return _compiled_chain(fast, heads, text, table, alpha_c, generator, greedy)
    tokens, candidates, proposals = [], np.empty(heads.ids.shape, np.int64), np.empty(heads.ids.shape)
    for i in range(len(heads.ids)):
        candidates[i], proposals[i] = conditional(heads, i, text, table, alpha_c, temperature, pairwise)
        tokens.append(int(candidates[i, _choose(proposals[i], generator, greedy)]))
        text = np.append(text, tokens[-1])
    return Draft(tokens, torch.from_numpy(candidates), torch.from_numpy(proposals))


def _compiled_chain(
    fast: Any,
    heads: HeadCandidates,
    text: np.ndarray,
    table: Cooccurrence | None,
    alpha_c: float,
    generator: torch.Generator | None,
    greedy: bool,
) -> Draft:
    """`draft_from` by the kernels."""
    ids = torch.from_numpy(np.array(heads.ids, np.int64))  # which the kernel writes over
    probs = torch.from_numpy(np.ascontiguousarray(heads.probs, np.float64))
    text = np.ascontiguousarray(text, np.int64)
    slots, k = ids.shape
    tokens, q = torch.empty(slots, dtype=torch.int64), torch.empty(slots, k, dtype=torch.float64)
    uniforms = None if greedy else torch.rand(slots, dtype=torch.float64, generator=generator)  # as one by one, on a CPU
    fast.dynamo_lm_chain(
        None if table is None or alpha_c == 0 else table.lookup.pointers(table.order),
        0 if table is None else table.order,
        0.0 if table is None else table.lookup.rarest,
        ids.data_ptr(),
        probs.data_ptr(),
        slots,
        k,
        loader.address(text),
        text.size,
        alpha_c,
        None if uniforms is None else uniforms.data_ptr(),
        tokens.data_ptr(),
        q.data_ptr(),
    )
    return Draft(tokens.tolist(), ids, q)


def conditional(
    heads: HeadCandidates,
    i: int,
    text: np.ndarray,
    table: Cooccurrence | None,
    alpha_c: float,
    temperature: float,
    pairwise: PairwiseCorrection | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Candidates of place i (head i + 2) and their q after `text`, which ends with the token before it; (k,) each.

    As `draft` defines them.
    """
    ids, q, scores = heads.ids[i], heads.probs[i], heads.log_probs[i]
    if pairwise is not None:
        scores = scores + pairwise(i + 2, text[-1:], ids)[0] / temperature
        q = _normalised(scores)
    if table is None or alpha_c == 0:
        return ids, q
    return weigh(table.lookup, text, ids, scores, alpha_c)
