"""Algorithm 1 and drafts as method.md states them: one grid entry at a time, in dictionaries. What the tests believe.

Same arguments, results, errors and use of the generator as `sampling.py`, for a handful of candidates. Values that
differ by less than a relative `ROUNDING` count as equal.
"""

import math
from itertools import product
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from dynamo_lm.cooccurrence.table import Cooccurrence
from dynamo_lm.sampling.algorithm1 import Draw
from dynamo_lm.sampling.drafting import Draft
from dynamo_lm.sampling.options import Algorithm1
from dynamo_lm.sampling.otsu import BINS, ROUNDING
from dynamo_lm.sampling.top_k import PairwiseCorrection

Head: TypeAlias = list[tuple[int, float]]  # (token, probability) of the k candidates, the likeliest first
Grid: TypeAlias = dict[tuple[int, ...], float]  # (rank of head 1's candidate, .., head m's) -> value, all k^m of them


def draw(
    logits: Tensor,
    context: Tensor,
    table: Cooccurrence | None,
    options: Algorithm1,
    generator: torch.Generator | None,
    greedy: bool = False,
    pairwise: PairwiseCorrection | None = None,
) -> Draw:
    """Back off from m = n to 1; emit the first m that has survivors (method.md section 4)."""
    heads = [candidates(row, options.top_k, options.temperature) for row in logits.tolist()]
    for m in range(len(heads), 0, -1):
        joint = joint_grid(heads[:m], table, options.alpha_c, pairwise, options.temperature)
        left = survivors(joint, heads, context.tolist(), options)
        if left:
            break
    cells = sorted(left)
    cell = cells[choose([left[cell] for cell in cells], generator, greedy)]
    tokens = [head[rank][0] for head, rank in zip(heads, cell, strict=False)]
    return Draw(tokens, joint[cell], len(heads) - m)


def survivors(joint: Grid, heads: list[Head], context: list[int], options: Algorithm1) -> Grid:
    """The entries above 0 after thresholds and penalty; empty if m is to be backed off from."""
    m = len(next(iter(joint)))
    if m > 1 and options.eps_b == 1:
        return {}
    limit = options.eps_b ** (m - 1) if m > 1 else 0.0
    grid = {cell: 0.0 if value < limit * (1 - ROUNDING) else value for cell, value in joint.items()}
    if m > 1 and options.otsu:
        judged = blur(grid) if options.blur else grid
        best = largest(grid)
        threshold = otsu_threshold(list(judged.values()))
        grid = {cell: value if cell == best or judged[cell] >= threshold else 0.0 for cell, value in grid.items()}
    for cell in grid:
        seen = list(context)
        for head, rank in zip(heads, cell, strict=False):
            if head[rank][0] in seen:
                grid[cell] /= options.repetition_penalty
            seen.append(head[rank][0])
    if max(grid.values()) <= limit * (1 + ROUNDING):
        return {}
    return {cell: value for cell, value in grid.items() if value > 0}


def candidates(logits: list[float], k: int, temperature: float) -> Head:
    """The k largest logits of a head, softmaxed; equal ones by token id."""
    tokens = sorted(range(len(logits)), key=lambda token: (-logits[token], token))[:k]
    powers = [math.exp((logits[token] - logits[tokens[0]]) / temperature) for token in tokens]
    return [(token, power / sum(powers)) for token, power in zip(tokens, powers, strict=True)]


def coupled(head: Head, number: int, previous: int, pairwise: PairwiseCorrection | None, temperature: float) -> Head:
    """Head `number`'s candidates, as a learned coupling sees them behind the token `previous`."""
    if pairwise is None:
        return head
    bonus = pairwise(number, np.array([previous]), np.array([token for token, _ in head]))[0]
    powers = [probability * math.exp(more / temperature) for (_, probability), more in zip(head, bonus, strict=True)]
    return [(token, power / sum(powers)) for (token, _), power in zip(head, powers, strict=True)]


def joint_grid(
    heads: list[Head],
    table: Cooccurrence | None,
    alpha_c: float,
    pairwise: PairwiseCorrection | None = None,
    temperature: float = 1.0,
) -> Grid:
    """J: the heads' product times the co-occurrence weight, normalised over the grid; all 0 if nothing was seen."""
    grid = {}
    for cell in product(*(range(len(head)) for head in heads)):
        chosen = [heads[0][cell[0]]]
        for number, (head, rank) in enumerate(zip(heads[1:], cell[1:], strict=True), start=2):
            chosen.append(coupled(head, number, chosen[-1][0], pairwise, temperature)[rank])
        grid[cell] = math.prod(probability for _, probability in chosen)
        if table is not None and alpha_c > 0 and len(heads) > 1:
            tokens = [token for token, _ in chosen]
            independent = sum(log_frequency(table, [token]) for token in tokens)
            together = log_frequency(table, tokens)
            grid[cell] *= math.exp(alpha_c * (together - independent)) if together > -math.inf else 0.0
    total = sum(grid.values())
    return {cell: value / total if total else 0.0 for cell, value in grid.items()}


def log_frequency(table: Cooccurrence, tokens: list[int]) -> float:
    """log p^ of an n-gram; -inf if it was never counted."""
    row = torch.tensor(tokens[0])
    for order, token in enumerate(tokens[1:], start=2):
        row = table.extend(row, torch.tensor(token), order)
    return table.log_p(row, len(tokens)).item()


def log_weight(table: Cooccurrence, tuples: Tensor) -> Tensor:
    """Log of the mask, p^(x_1..x_m) / (p^(x_1) .. p^(x_m)), of tuples (..., m), before the power alpha_c; -inf if unseen."""
    rows = tuples[..., 0]
    for order in range(2, tuples.shape[-1] + 1):
        rows = table.extend(rows, tuples[..., order - 1], order)
    joint, independent = table.log_p(rows, tuples.shape[-1]), table.log_p(tuples, 1).sum(-1)
    return (joint - independent).where(joint > -torch.inf, -torch.inf)


def blur(grid: Grid) -> Grid:
    """Every entry becomes the mean of its 3^m neighbours, weights 1/4, 1/2, 1/4 per axis, reflect-101 at the border."""
    k, m = max(max(cell) for cell in grid) + 1, len(next(iter(grid)))
    if k == 1:
        return grid
    blurred = {}
    for cell in grid:
        blurred[cell] = 0.0
        for steps in product((-1, 0, 1), repeat=m):
            moved = [rank + step for rank, step in zip(cell, steps, strict=True)]
            neighbour = tuple(1 if rank == -1 else k - 2 if rank == k else rank for rank in moved)
            blurred[cell] += grid[neighbour] * math.prod(0.5 if step == 0 else 0.25 for step in steps)
    return blurred


def otsu_threshold(values: list[float]) -> float:
    """The lower edge of the bin that best parts the 256-bin histogram of `values`; -inf if they are all equal.

    As defined in `otsu.above_threshold`. The edge is lowered by 1e-9 of a bin, so that >= admits a value on it.
    """
    lo, hi = min(values), max(values)
    if hi - lo <= ROUNDING * hi:
        return -math.inf
    width = (hi - lo) / BINS
    bins = [min(max(math.floor((value - lo) / (hi - lo) * BINS + ROUNDING), 0), BINS - 1) for value in values]
    spreads = []
    for t in range(1, BINS):
        below, above = [b for b in bins if b < t], [b for b in bins if b >= t]
        distance = sum(below) / len(below) - sum(above) / len(above)
        spreads.append(len(below) * len(above) * distance**2)
    best = max(spreads)
    t = 1 + next(i for i, spread in enumerate(spreads) if spread >= best * (1 - ROUNDING))
    return lo + (t - ROUNDING) * width


def choose(values: list[float], generator: torch.Generator | None, greedy: bool) -> int:
    """The first of the largest values, or the first whose cumulative sum exceeds a uniform times the total."""
    if greedy:
        return next(i for i, value in enumerate(values) if value >= max(values) * (1 - ROUNDING))
    target = torch.rand(1, dtype=torch.float64, generator=generator).item() * sum(values)
    return next(i for i in range(len(values)) if sum(values[: i + 1]) > target)


def largest(grid: Grid) -> tuple[int, ...]:
    """The cell of the largest value; of equal ones the first in lexicographic order."""
    cells = sorted(grid)
    return cells[choose([grid[cell] for cell in cells], None, greedy=True)]


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
    """Token by token from f_i(x) * (p~(x | text) / p^(x))^alpha_c."""
    so_far, ids, proposals = text.tolist(), [], []
    for number, row in enumerate(logits.tolist(), start=2):
        head = coupled(candidates(row, top_k, temperature), number, so_far[-1], pairwise, temperature)
        if table is not None and alpha_c != 0:
            head = with_followers(head, so_far)
            head = [(x, f * (mixed(table, so_far, x) / alone(table, x)) ** alpha_c) for x, f in head]
        total = sum(q for _, q in head)
        q = [value / total for _, value in head]
        so_far.append(head[choose(q, generator, greedy)][0])
        ids.append([token for token, _ in head])
        proposals.append(q)
    return Draft(so_far[len(text) :], torch.tensor(ids), torch.tensor(proposals, dtype=torch.float64))


def with_followers(head: Head, text: list[int]) -> Head:
    """The candidates with what followed the last two tokens before in place of the least likely others."""
    following = list(dict.fromkeys(reversed(followers(text, 2))))
    new = [token for token in following if token not in [known for known, _ in head]]
    least = min(probability for _, probability in head if probability > 0)
    head = list(head)
    for token in new[: len(head) // 2]:
        others = [place for place, (known, _) in enumerate(head) if known not in following]
        if not others:
            break
        place = min(others, key=lambda place: (head[place][1], -place))
        head[place] = (token, least)
    return head


def alone(table: Cooccurrence, token: int) -> float:
    """p^ of a token, half a count where it was never counted."""
    known = log_frequency(table, [token]) if token < table.vocab_size else -math.inf
    return max(math.exp(known), 0.5 / max(table.totals[0], 1))


def mixed(table: Cooccurrence, text: list[int], token: int) -> float:
    """p~(token | text): longer n-grams as far as they were seen, the rest shorter ones."""
    p = alone(table, token)
    for length in range(1, min(table.order - 1, len(text)) + 1):
        history = text[-length:]
        if max(history) >= table.vocab_size or (log_h := log_frequency(table, history)) == -math.inf:
            break
        logs = [log_frequency(table, [*history, x]) for x in range(table.vocab_size)]
        shares = {x: math.exp(log - log_h) for x, log in enumerate(logs) if log > -math.inf}
        if not shares:
            break
        seen = math.exp(log_h) * table.totals[length]
        weight = seen / (seen + 0.3 * len(shares))
        p = weight * shares.get(token, 0.0) + (1 - weight * min(1.0, sum(shares.values()))) * p
    for length in range(2, 9):
        after = followers(text, length)
        if not after:
            break
        weight = len(after) / (len(after) + 0.3 * len(set(after)))
        p = weight * after.count(token) / len(after) + (1 - weight) * p
    return p


def followers(text: list[int], length: int) -> list[int]:
    """What stood after the earlier places of the last `length` tokens, among the latest 256 of the last two."""
    places = [at for at in range(2, len(text)) if text[at - 2 : at] == text[-2:]][-256:]
    return [text[at] for at in places if at >= length and text[at - length : at] == text[-length:]]
