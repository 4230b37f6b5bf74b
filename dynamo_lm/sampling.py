"""Dynamic multi-token sampling: Algorithm 1 (method.md section 4) and drafts for exact verification.

In: one row's logits of n heads, its context and a co-occurrence table. Out: the next tokens, 1 to n of them. It knows
no model and no tokenizer, and no batch: every row has its own generator. `reference.py` says the same slowly.

Randomness: one `torch.rand(1, dtype=float64)` per choice, and none when greedy. It picks by inverse CDF: the first
entry, in lexicographic order of the grid, at which the cumulative sum exceeds the uniform times the total.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynamo_lm import kernels
from dynamo_lm.cooccurrence import Cooccurrence
from dynamo_lm.errors import InputError
from dynamo_lm.joint import Heads, Joint, Joints, Link
from dynamo_lm.otsu import ROUNDING, foreground

MAX_GRID = 2**26  # entries: 0.5 GB
MAX_COMPILED = 2**17  # tuples without a table: some milliseconds


@dataclass(frozen=True)
class Algorithm1:
    """The knobs of Algorithm 1; the defaults are the paper's. Raises InputError for values out of range."""

    eps_b: float = 0.5  # quality dial: m tokens need a joint probability above eps_b^(m-1); 0: always n, 1: always one
    alpha_c: float = 1.0  # power of the co-occurrence weight; 0 = off
    otsu: bool = True  # drop background entries by Otsu's threshold ..
    blur: bool = True  # .. found on the Gaussian-blurred grid
    top_k: int = 50  # candidates per head
    temperature: float = 0.7  # divides the logits
    repetition_penalty: float = 1.1  # divides an entry once per token that is already there; 1 = off

    def __post_init__(self) -> None:
        if not 0 <= self.eps_b <= 1:
            raise InputError(f"eps_b is a probability: choose it from 0 to 1, not {self.eps_b}.")
        check_weighting(self.alpha_c, self.top_k, self.temperature)
        if not 0 < self.repetition_penalty < math.inf:
            raise InputError(f"repetition_penalty must be above 0 (1 = off), not {self.repetition_penalty}.")


@dataclass(frozen=True)
class Draw:
    """What one step of Algorithm 1 emits."""

    tokens: list[int]  # m token ids
    joint: float  # J of that tuple before thresholds and penalty: its probability among all k^m candidates
    backed_off: int  # n - m


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


def check(options: Algorithm1, n: int, vocab_size: int, table: Cooccurrence | None) -> None:
    """Refuse options that cannot work for drawing up to n tokens from heads over `vocab_size` tokens; call it once.

    Raises InputError if top_k exceeds the vocabulary, if the table is too short or counts other tokens, or if alpha_c
    and eps_b are 0 and the grid is too large to hold.
    """
    k = options.top_k
    if k > vocab_size:
        raise InputError(f"top_k is {k}, but the vocabulary has {vocab_size} tokens; choose a smaller top_k.")
    if table is None or options.alpha_c == 0:
        if options.eps_b == 0 and k**n > MAX_GRID:
            raise InputError(f"A grid of {k}^{n} entries is too large; choose a smaller top_k or an eps_b above 0.")
        return
    if table.order < n and options.eps_b < 1:
        raise InputError(
            f"The model's table has order {table.order} but {n} tokens are drawn; count with --order {n} or set alpha_c=0."
        )
    if table.vocab_size > vocab_size:
        raise InputError(
            f"The table counts {table.vocab_size} tokens but the model has {vocab_size}; "
            "count one with the model's own tokenizer."
        )


def draw(
    logits: Tensor,
    context: Tensor,
    table: Cooccurrence | None,
    options: Algorithm1,
    generator: torch.Generator | None,
    greedy: bool = False,
    link: Link | None = None,
) -> Draw:
    """One step of Algorithm 1 (method.md sections 4 and 6): back off from n tokens to 1, then draw a tuple.

    logits     (n, V), head i's for the token i places ahead; unscaled.
    context    (t,) token ids so far, each below V: what the repetition penalty looks at.
    table      None: the heads' plain product, as alpha_c = 0.
    generator  None: torch's global one.
    greedy     take the largest entry after the penalty (equal ones: the lowest grid index) instead of drawing.
    link       a learned coupling, whose f_i(x | the token before it) replaces the independent f_i(x).

    The options must have passed `check`. Raises InputError for too few tokens for top_k and for non-finite logits.
    """
    present = np.zeros(logits.shape[-1], bool)
    present[context.cpu().numpy()] = True
    heads = Heads.top(logits, options.top_k, options.temperature)
    if link is not None:
        heads = heads.coupled(link, options.temperature)
    return draw_from(heads, present, table, options, generator, greedy)


def draw_from(
    heads: Heads,
    present: np.ndarray,
    table: Cooccurrence | None,
    options: Algorithm1,
    generator: torch.Generator | None,
    greedy: bool = False,
) -> Draw:
    """`draw` from candidates that were already found; present (V,) bool marks the tokens of the context."""
    fast = kernels.sampler()
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


def _compilable(heads: Heads, table: Cooccurrence | None, options: Algorithm1) -> bool:
    """Whether the kernels draw from these: cells fit 64 bits, and the tuples are soon done with, as no other thread gets the
    interpreter meanwhile. What a learned coupling links stays with NumPy."""
    n, k = heads.ids.shape
    if heads.links or k != options.top_k or k**n >= 2**63:
        return False
    if table is not None and options.alpha_c > 0:
        return table.order >= n or options.eps_b == 1
    return k**n <= MAX_COMPILED or MAX_COMPILED * static_threshold(options.eps_b, n) >= 1  # their probabilities sum to 1


def _compiled_draw(
    fast: Any,
    heads: Heads,
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
        kernels.address(ids),
        kernels.address(probs),
        n,
        k,
        kernels.address(present),
        levels,
        options.alpha_c,
        options.eps_b,
        options.otsu + (options.otsu and options.blur),
        options.repetition_penalty,
        -1.0 if greedy else _uniform(generator),
        kernels.address(drawn),
    )
    m, *tokens = drawn.tolist()
    return Draw(tokens[:m], joint, n - m)


def survivors(joint: Joint, heads: Heads, present: np.ndarray, options: Algorithm1, m: int) -> Joint:
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
    link: Link | None = None,
) -> Draft:
    """Draft the n - 1 tokens after the certain token `first`, with the distribution each was drawn from.

    logits (n - 1, V) are those of heads 2 .. n. Slot i is drawn from the masked joint's conditional, normalised over
    head i's k candidates x, given the history h = first, x_2, .. x_{i-1}:

        q(x) ∝ f_i(x) * (p^(h, x) / (p^(h) p^(x)))^alpha_c

    If none of the candidates was seen after h, h loses its oldest token, down to none: the plain f_i. The table's order
    bounds h from the start. With a `link` (a learned coupling) f_i(x) is f_i(x | the token before it). Greedy: the
    largest q. Raises InputError for values out of range and non-finite logits.
    """
    check_weighting(alpha_c, top_k, temperature)
    heads, how = Heads.top(logits, top_k, temperature), {"alpha_c": alpha_c, "temperature": temperature}
    return draft_from(heads, first, table, **how, generator=generator, greedy=greedy, link=link)


def draft_from(
    heads: Heads,
    first: int,
    table: Cooccurrence | None,
    *,
    alpha_c: float,
    temperature: float,
    generator: torch.Generator | None,
    greedy: bool,
    link: Link | None = None,
) -> Draft:
    """`draft` from candidates of heads 2 .. n that were already found."""
    fast = kernels.sampler()
    if fast is not None and link is None and (generator is None or generator.device.type == "cpu"):
        return _compiled_chain(fast, heads, first, table, alpha_c, generator, greedy)
    history, proposals = [first], np.empty(heads.ids.shape)
    for i, ids in enumerate(heads.ids):
        proposals[i] = conditional(heads, i, history, table, alpha_c, temperature, link)
        history.append(int(ids[_choose(proposals[i], generator, greedy)]))
    return Draft(history[1:], torch.from_numpy(heads.ids), torch.from_numpy(proposals))


def _compiled_chain(
    fast: Any,
    heads: Heads,
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
    heads: Heads,
    i: int,
    history: list[int],
    table: Cooccurrence | None,
    alpha_c: float,
    temperature: float,
    link: Link | None,
) -> np.ndarray:
    """q of slot i (head i + 2) behind `history`, which ends with the token before it; (k,), as `draft` defines it."""
    ids, q, scores = heads.ids[i], heads.probs[i], heads.log_probs[i]
    if link is not None:
        scores = scores + link(i + 2, np.array(history[-1:]), ids)[0] / temperature
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


def static_threshold(eps_b: float, m: int) -> float:
    """The static threshold of length m, less rounding."""
    return eps_b ** (m - 1) * (1 - ROUNDING)


def check_weighting(alpha_c: float, top_k: int, temperature: float) -> None:
    """Refuses values out of range with an InputError."""
    if not 0 <= alpha_c < math.inf:
        raise InputError(f"alpha_c must be 0 (no mask) or more, not {alpha_c}.")
    if top_k < 1:
        raise InputError(f"top_k must be at least 1 candidate, not {top_k}.")
    if not 0 < temperature < math.inf:
        raise InputError(f"temperature must be above 0, not {temperature}; for the likeliest tokens decode greedily.")
