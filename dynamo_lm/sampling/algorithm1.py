"""Dynamic multi-token sampling: Algorithm 1 (method.md section 4) and drafts for exact verification.

In: one sequence's logits of n heads, its context and a co-occurrence table. Out: the next tokens, 1 to n of them. It knows
no model and no tokenizer, and no batch: every sequence has its own generator. `tests/reference.py` computes the same slowly.

Randomness: one `torch.rand(1, dtype=float64)` per choice, and none when greedy. It picks by inverse CDF: the first
entry, in lexicographic order of the grid, at which the cumulative sum exceeds the uniform times the total.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynamo_lm.cooccurrence.table import Cooccurrence
from dynamo_lm.kernels import loader
from dynamo_lm.sampling.joint import Joint, Joints
from dynamo_lm.sampling.options import Algorithm1, static_threshold
from dynamo_lm.sampling.otsu import ROUNDING, foreground
from dynamo_lm.sampling.top_k import HeadCandidates, PairwiseCorrection

MAX_COMPILED = 2**17  # tuples without a table: some milliseconds


@dataclass(frozen=True)
class Draw:
    """What one step of Algorithm 1 emits."""

    tokens: list[int]  # m token ids
    joint: float  # J of that tuple before thresholds and penalty: its probability among all k^m candidates
    backed_off: int  # n - m


def draw(
    logits: Tensor,
    context: Tensor,
    table: Cooccurrence | None,
    options: Algorithm1,
    generator: torch.Generator | None,
    greedy: bool = False,
    pairwise: PairwiseCorrection | None = None,
) -> Draw:
    """One step of Algorithm 1 (method.md sections 4 and 6): back off from n tokens to 1, then draw a tuple.

    logits     (n, V), head i's for the token i places ahead; unscaled.
    context    (t,) token ids so far, each below V: what the repetition penalty looks at.
    table      None: the heads' plain product, as alpha_c = 0.
    generator  None: torch's global one.
    greedy     take the largest entry after the penalty (equal ones: the lowest grid index) instead of drawing.
    pairwise       a learned coupling, whose f_i(x | the token before it) replaces the independent f_i(x).

    The options must have passed `check`. Raises InputError for too few tokens for top_k and for non-finite logits.
    """
    present = np.zeros(logits.shape[-1], bool)
    present[context.cpu().numpy()] = True
    heads = HeadCandidates.top(logits, options.top_k, options.temperature)
    if pairwise is not None:
        heads = heads.coupled(pairwise, options.temperature)
    return draw_from(heads, present, table, options, generator, greedy)


def draw_from(
    heads: HeadCandidates,
    present: np.ndarray,
    table: Cooccurrence | None,
    options: Algorithm1,
    generator: torch.Generator | None,
    greedy: bool = False,
) -> Draw:
    """`draw` from candidates that were already found; present (V,) bool marks the tokens of the context."""
    fast = loader.sampler()
    if fast is not None and _compilable(heads, table, options):
        return _compiled_draw(fast, heads, present, table, options, generator, greedy)
    n = len(heads.ids)
    widest = 1 if options.eps_b == 1 else n  # a penalty below 1 may lift an entry above 1, but 1 means: one token
    joints = Joints(heads, table, options.alpha_c, least=static_threshold(options.eps_b, n))
    for m in range(widest, 0, -1):
        joint = joints[m]
        left = survivors(joint, heads, present, options, m)
        if left.cells.size:
            break
    slot = _choose(left.values, generator, greedy)
    ranks = np.unravel_index(left.cells[slot], (options.top_k,) * m)
    value = joint.values[joint.cells == left.cells[slot]]
    return Draw([int(heads.ids[i, rank]) for i, rank in enumerate(ranks)], float(value[0]), n - m)


def _compilable(heads: HeadCandidates, table: Cooccurrence | None, options: Algorithm1) -> bool:
    """Whether the kernels draw from these: cells fit 64 bits, and the tuples are soon done with, as no other thread gets the
    interpreter meanwhile. What a learned coupling conditionals stays with NumPy."""
    n, k = heads.ids.shape
    if heads.conditionals or k != options.top_k or k**n >= 2**63:
        return False
    if table is not None and options.alpha_c > 0:
        return table.order >= n or options.eps_b == 1
    return k**n <= MAX_COMPILED or MAX_COMPILED * static_threshold(options.eps_b, n) >= 1  # their probabilities sum to 1


def _compiled_draw(
    fast: Any,
    heads: HeadCandidates,
    present: np.ndarray,
    table: Cooccurrence | None,
    options: Algorithm1,
    generator: torch.Generator | None,
    greedy: bool,
) -> Draw:
    """`draw_from` by the kernels."""
    n, k = heads.ids.shape
    ids, probs = np.ascontiguousarray(heads.ids, np.int64), np.ascontiguousarray(heads.probs, np.float64)
    present, drawn = np.ascontiguousarray(present, bool), np.empty(n + 1, np.int64)
    # One token needs no mask, and perhaps the table is too short for more.
    levels = table.lookup.pointers(n) if table is not None and options.alpha_c > 0 and options.eps_b < 1 else None
    joint = fast.dynamo_lm_draw(
        loader.address(ids),
        loader.address(probs),
        n,
        k,
        loader.address(present),
        levels,
        options.alpha_c,
        options.eps_b,
        options.otsu + (options.otsu and options.blur),
        options.repetition_penalty,
        -1.0 if greedy else _uniform(generator),
        loader.address(drawn),
    )
    m, *tokens = drawn.tolist()
    return Draw(tokens[:m], joint, n - m)


def survivors(joint: Joint, heads: HeadCandidates, present: np.ndarray, options: Algorithm1, m: int) -> Joint:
    """The entries of length m that may be emitted: thresholded and penalised, not renormalised, by ascending cell.

    present (V,) bool marks the tokens of the context. None survive if m must be backed off from. For m = 1 there are
    no thresholds, only the penalty: ordinary top-k sampling.
    """
    # 1. Static threshold: eps_b^(m-1), which is also what the largest entry must exceed.
    k, penalty = options.top_k, options.repetition_penalty
    limit = options.eps_b ** (m - 1) * (1 + ROUNDING) if m > 1 else 0.0
    if not joint.values.size or (penalty >= 1 and joint.values.max() <= limit):  # such a penalty only lowers it
        return Joint(joint.cells[:0], joint.values[:0])
    joint = joint.at_least(static_threshold(options.eps_b, m) if m > 1 else 0.0)
    cells, values = joint.cells, joint.values
    if not cells.size:
        return joint

    # 2. Otsu; the largest entry always survives, so one entry needs no threshold.
    if options.otsu and m > 1 and cells.size > 1:
        keep = foreground(cells, values, k, m, blur=options.blur)
        keep[_largest(values)] = True
        cells, values = cells[keep], values[keep]

    # 3. Repetition penalty: one factor per position whose token is in the context or earlier in the tuple.
    if penalty != 1:
        tokens = np.stack([heads.ids[i, rank] for i, rank in enumerate(np.unravel_index(cells, (k,) * m))])  # (m, h)
        repeats = present[tokens]
        for i in range(1, m):
            repeats[i] |= (tokens[:i] == tokens[i]).any(0)
        values = values / penalty ** repeats.sum(0)

    # 4. Back off unless some entry strictly exceeds the limit.
    if values.max() <= limit:
        return Joint(cells[:0], values[:0])
    return Joint(cells, values)


def _normalised(scores: np.ndarray) -> np.ndarray:
    """Softmax of log weights (k,), of which one at least is finite."""
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def _choose(values: np.ndarray, generator: torch.Generator | None, greedy: bool) -> int:
    """The slot of the largest of `values` (h,) >= 0, or one drawn in proportion to them."""
    if greedy:
        return _largest(values)
    cumulative = np.cumsum(values)
    slot = int(np.searchsorted(cumulative, _uniform(generator) * cumulative[-1], side="right"))
    return min(slot, int(np.flatnonzero(values)[-1]))  # a product that rounds up to the total


def _uniform(generator: torch.Generator | None) -> float:
    """A number from 0 to 1, below 1."""
    device = "cpu" if generator is None else generator.device
    return torch.rand(1, dtype=torch.float64, generator=generator, device=device).item()


def _largest(values: np.ndarray) -> int:
    """The slot of the largest value; of equal ones (up to rounding) the first."""
    return int(np.argmax(values >= values.max() * (1 - ROUNDING)))
