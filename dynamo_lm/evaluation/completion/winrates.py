"""Win rates, the base model at matched diversity, and the speed-up at which quality is the same (method.md section 5).

In: how often a candidate's completions won, tied and lost, by prompt. Out: rates, regressions and 95 % intervals. The unit
of resampling is the prompt: completions of one prompt resemble each other. Knows no judge, no model and no text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LEAST_PROMPTS = 5  # below it a percentile interval over prompts means nothing, so none is given
RESAMPLES = 2000


@dataclass(frozen=True)
class Line:
    """log(win rate) as a straight line in the speed-up, for the estimate (row 0) and every resample: (rows,) each."""

    intercept: np.ndarray
    slope: np.ndarray

    def at(self, x: np.ndarray) -> np.ndarray:
        """log win rate at speed-ups x (points,): (rows, points)."""
        return self.intercept[:, None] + self.slope[:, None] * x


def resamples(prompts: int, seed: int, count: int = RESAMPLES) -> np.ndarray:
    """How often each prompt counts: (1 + count, prompts) int64. Row 0 is the sample itself; the others draw with
    replacement. With fewer than `LEAST_PROMPTS` prompts there is row 0 alone."""
    itself = np.ones((1, prompts), np.int64)
    if prompts < LEAST_PROMPTS:
        return itself
    drawn = np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), size=count)
    return np.concatenate([itself, drawn])


def interval(values: np.ndarray) -> list[float] | None:
    """The middle 95 % of the resamples of an estimate, (1 + count,), or None without resamples."""
    if len(values) < 2:
        return None
    return [float(value) for value in np.quantile(values[1:], [0.025, 0.975])]


def win_rate(counts: np.ndarray) -> np.ndarray:
    """Wins over losses; counts: (..., 3) wins, ties, losses; result: (...).

    The paper's wins/losses, with ties given half to each side and half a win and a loss added to both, so that it exists
    where nothing was lost; it is 1 exactly where wins equal losses, as the paper's.
    """
    wins, ties, losses = np.moveaxis(counts, -1, 0)
    return (wins + ties / 2 + 0.5) / (losses + ties / 2 + 0.5)


def tally(verdicts: np.ndarray) -> np.ndarray:
    """Counts of wins, ties, losses; verdicts: (..., seeds) of 1, 0, -1 and nan for none; result: (..., 3)."""
    return np.stack([(verdicts == value).sum(-1) for value in (1, 0, -1)], axis=-1)


def matched_rungs(candidate: np.ndarray, ladder: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where on the ladder of temperatures the base is as diverse as the candidate.

    Args:
        candidate: (rows,) diversity of the candidate, by resample.
        ladder: (rows, rungs) diversity of the base at rising temperatures.

    Returns:
        (below, above, weight), (rows,) each: diversity lies at rung `below` + weight * (`above` - `below`). Off the ladder's
        ends it is the end. The ladder is first made to rise (running maximum): noise may bend it down.
    """
    rising = np.maximum.accumulate(ladder, axis=1)
    above = (rising < candidate[:, None]).sum(1).clip(max=ladder.shape[1] - 1)
    below = np.where(rising[:, 0] >= candidate, 0, above - 1).clip(min=0)
    rows = np.arange(len(candidate))
    gap = rising[rows, above] - rising[rows, below]
    weight = np.where(gap > 0, (candidate - rising[rows, below]) / np.where(gap > 0, gap, 1), 1.0)
    return below, above, weight.clip(0, 1)


def fit(x: np.ndarray, rates: np.ndarray) -> Line:
    """Least squares of log(rate) on speed-up; x, rates: (rows, points). With one speed-up only, a level line."""
    y = np.log(rates)
    mean_x, mean_y = x.mean(1), y.mean(1)
    spread = ((x - mean_x[:, None]) ** 2).sum(1)
    slope = np.where(
        spread > 1e-12, ((x - mean_x[:, None]) * (y - mean_y[:, None])).sum(1) / np.where(spread > 1e-12, spread, 1), 0.0
    )
    return Line(mean_y - slope * mean_x, slope)


def same_quality(line: Line, ceiling: np.ndarray) -> np.ndarray:
    """The largest speed-up in [1, ceiling] at which the line is still at win rate 1 or above; ceiling, result: (rows,).

    1 where it is below everywhere: no speed-up comes at the same quality.
    """
    at_one, at_end = line.intercept + line.slope, line.intercept + line.slope * ceiling
    with np.errstate(divide="ignore", invalid="ignore"):
        crossing = -line.intercept / line.slope
    return np.where(at_end >= 0, ceiling, np.where(at_one < 0, 1.0, np.clip(crossing, 1.0, ceiling)))


def speed_up_at_same_quality(x: np.ndarray, rates: np.ndarray, ceiling: np.ndarray) -> dict[str, Any]:
    """The paper's same-quality speed-up for one measure of speed; x, rates: (rows, points), ceiling: (rows,).

    "theoretical": the line had to be followed beyond the fastest point measured. "capped": it is at win rate 1 or above all
    the way to the ceiling.
    """
    speed_ups = same_quality(fit(x, rates), ceiling)
    estimate = float(speed_ups[0])
    return {
        "estimate": estimate,
        "interval": interval(speed_ups),
        "theoretical": bool(estimate > x[0].max() + 1e-3),
        "capped": bool(estimate >= ceiling[0]),
    }


def band(x: np.ndarray, rates: np.ndarray, ceiling: int, points: int = 41) -> dict[str, Any]:
    """The regression line with its 95 % band, for plots; x, rates: (rows, points)."""
    at = np.linspace(1.0, ceiling, points)
    values = np.exp(fit(x, rates).at(at))  # (rows, points)
    low, high = np.quantile(values[1:], [0.025, 0.975], axis=0) if len(values) > 1 else (None, None)
    return {
        "x": at.tolist(),
        "win_rate": values[0].tolist(),
        "low": None if low is None else low.tolist(),
        "high": None if high is None else high.tolist(),
    }


def rate_record(counts: np.ndarray) -> dict[str, Any]:
    """A win rate for a results file; counts: (rows, 3), row 0 the estimate."""
    rates = win_rate(counts)
    wins, ties, losses = (round(float(value), 3) for value in counts[0])
    return {"wins": wins, "ties": ties, "losses": losses, "win_rate": float(rates[0]), "interval": interval(rates)}


@dataclass(frozen=True)
class Points:
    """What was measured of a method at each eps_b: J points, P prompts, R temperatures of the base."""

    tokens: np.ndarray  # (J, P) emitted
    forwards: np.ndarray  # (J, P)
    log_ratio: np.ndarray  # (J, P) log of tokens per second over the baseline's
    plain: np.ndarray  # (J, P, 3) wins, ties, losses against the base
    matched: np.ndarray  # (J, R, P, 3) against the base at each temperature
    diversity: np.ndarray  # (J, P)
    ladder: np.ndarray  # (R, P) diversity of the base at rising temperatures
    temperatures: Sequence[float]  # (R,)


def analyse(points: Points, ceiling: int, *, seed: int) -> dict[str, Any]:
    """The results of one method.

    Returns:
        {"points": a dictionary for each (tokens_per_step, speed_up, plain, matched), "same_quality": {"plain", "matched"}},
        as results files hold them; intervals are None with fewer than `LEAST_PROMPTS` prompts.
    """
    weights = resamples(points.tokens.shape[1], seed)  # (B, P)
    per_step = (weights @ points.tokens.T) / (weights @ points.forwards.T)  # (B, J)
    wall = np.exp((weights @ points.log_ratio.T) / weights.sum(1, keepdims=True))  # (B, J)
    plain = np.einsum("bp,jpc->bjc", weights, points.plain)
    ladder = weights @ points.ladder.T  # (B, R), sums over the same prompts: comparable
    temperatures = np.asarray(points.temperatures)
    rows = np.arange(len(weights))
    matched, at = np.empty_like(plain, dtype=float), np.empty(plain.shape[:2])
    for j in range(len(points.tokens)):
        below, above, weight = matched_rungs(weights @ points.diversity[j], ladder)
        counts = np.einsum("bp,rpc->brc", weights, points.matched[j])  # (B, R, 3)
        mix = weight[:, None]
        matched[:, j] = (1 - mix) * counts[rows, below] + mix * counts[rows, above]
        at[:, j] = (1 - weight) * temperatures[below] + weight * temperatures[above]
    results = [
        {
            "tokens_per_step": float(per_step[0, j]),
            "tokens_per_step_interval": interval(per_step[:, j]),
            "speed_up": {"median": float(wall[0, j])} | _ends(interval(wall[:, j])),
            "plain": rate_record(plain[:, j]),
            "matched": rate_record(matched[:, j]) | {"temperature": float(at[0, j])},
        }
        for j in range(len(points.tokens))
    ]
    return {
        "points": results,
        "same_quality": {
            name: quality(per_step, wall, win_rate(counts), ceiling)
            for name, counts in (("plain", plain), ("matched", matched))
        },
    }


def quality(per_step: np.ndarray, wall: np.ndarray, rates: np.ndarray, ceiling: int) -> dict[str, Any]:
    """Same-quality speed-ups in tokens per step and in wall clock; all (rows, points)."""
    if per_step.shape[1] < 3:
        nothing = {"estimate": None, "interval": None, "theoretical": False, "capped": False}
        note = "fewer than three values of eps_b: no regression"
        return {"tokens_per_step": nothing, "wall_clock": nothing, "band": None, "note": note}
    rows, fastest = np.arange(len(wall)), wall.argmax(1)
    most = np.full(len(wall), float(ceiling))
    at_most = wall[rows, fastest] * ceiling / per_step[rows, fastest]  # steps of the fastest setting, n tokens in each
    few = "" if len(rates) > 1 else f"fewer than {LEAST_PROMPTS} prompts: no interval"
    return {
        "tokens_per_step": speed_up_at_same_quality(per_step, rates, most),
        "wall_clock": speed_up_at_same_quality(wall, rates, at_most.clip(1, ceiling)),
        "band": band(per_step, rates, ceiling),
        "note": few,
    }


def _ends(pair: list[float] | None) -> dict[str, float | None]:
    low, high = pair if pair is not None else (None, None)
    return {"low": low, "high": high}
