"""The sentence-completion protocol, second half: what a judge says of the completions, against the speed they came at.

In: completions of every arm (`completion.py`) and a judge. Out: points and same-quality speed-ups of a results file.
Every candidate meets the base twice: as the base is, and at the temperature at which it is as diverse as the candidate. The
second is the honest one: masking and thresholding lower the effective temperature, and a judge that likes likely text likes
that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynamo_lm.evaluation.completion.diversity import mauve, measure, pooled_distinct
from dynamo_lm.evaluation.completion.generate import STRICT, TEMPERATURE, Arm, Text
from dynamo_lm.evaluation.completion.winrates import Points, analyse, matched_rungs, tally
from dynamo_lm.evaluation.judges.judges import Judge, Pair, sanity

Say = Callable[[str, int, int], None]  # what is being done, how much is done, of how much


@dataclass(frozen=True)
class Completions:
    """Texts by arm, prompt and seed."""

    prompts: list[str]
    seeds: int
    arms: list[Arm]
    texts: dict[str, list[list[Text]]]  # [arm][prompt][seed]

    @classmethod
    def gather(cls, texts: Sequence[Text], arms: Sequence[Arm], prompts: Sequence[str], seeds: int) -> Completions:
        found = {(text.arm, text.prompt, text.seed): text for text in texts}
        grouped = {
            arm.name: [[found[arm.name, prompt, seed] for seed in range(seeds)] for prompt in range(len(prompts))]
            for arm in arms
        }
        return cls(list(prompts), seeds, list(arms), grouped)

    def role(self, role: str) -> list[Arm]:
        return [arm for arm in self.arms if arm.role == role]

    @property
    def rungs(self) -> list[Arm]:
        """The base at rising temperatures."""
        return sorted([*self.role("ladder"), *self.role("base")], key=lambda arm: arm.temperature or 0.0)

    def items(self, arm: str) -> list[tuple[str, str]]:
        """(prompt, completion), prompt by prompt."""
        return [(self.prompts[p], text.text) for p, row in enumerate(self.texts[arm]) for text in row]

    def pairs(self, arm: str, other: str) -> list[Pair]:
        return [
            Pair(prompt, mine, theirs)
            for (prompt, mine), (_, theirs) in zip(self.items(arm), self.items(other), strict=True)
        ]

    def total(self, arm: str, value: Callable[[Text], float]) -> np.ndarray:
        """Sums over the seeds of each prompt, (prompts,)."""
        return np.array([sum(value(text) for text in row) for row in self.texts[arm]], float)

    def diversity(self, arm: str) -> np.ndarray:
        """Different token pairs over token pairs in all completions of each prompt together, (prompts,)."""
        return np.array([pooled_distinct([text.tokens for text in row], 2) for row in self.texts[arm]])

    def log_ratio(self, arm: str, baseline: str) -> np.ndarray:
        """Log of tokens per second over the baseline's: medians over the seeds of each prompt, (prompts,)."""
        return np.array(
            [
                np.median([np.log(_rate(mine) / _rate(theirs)) for mine, theirs in zip(row, others, strict=True)])
                for row, others in zip(self.texts[arm], self.texts[baseline], strict=True)
            ]
        )


def duels(completions: Completions, *, every_rung: bool) -> list[tuple[str, str]]:
    """Which arms are compared with which.

    Args:
        every_rung: compare with the base at every temperature, so that the resampling may move the matched one; else only at
            the two around the match, which a judge that costs money is asked for.
    """
    found = []
    rungs = [arm.name for arm in completions.rungs]
    ladder = np.array([[completions.diversity(name).sum() for name in rungs]])  # (1, rungs)
    for arm in completions.role("candidate"):
        if arm.method == STRICT:
            found.append((arm.name, completions.role("own base")[0].name))
            continue
        opponents = set(rungs)
        if not every_rung:
            below, above, _ = matched_rungs(completions.diversity(arm.name).sum(keepdims=True), ladder)
            opponents = {rungs[below[0]], rungs[above[0]]}
        opponents.add(completions.role("base")[0].name)
        found += [(arm.name, name) for name in rungs if name in opponents]
    return found


def describe(completions: Completions) -> dict[str, Any]:
    """Every arm's own measures, which need no judge: {arm: {...}}."""
    return {
        arm.name: {
            "diversity": measure([[(text.tokens, text.text) for text in row] for row in completions.texts[arm.name]])
            | {"mauve": None},
            "log_likelihood_per_byte": None,
            "score": None,
            "mean_tokens": float(completions.total(arm.name, lambda text: len(text.tokens)).mean() / completions.seeds),
        }
        for arm in completions.arms
    }


def compare(
    completions: Completions, judge: Judge | None, *, ceiling: int, seed: int, with_mauve: bool = False, say: Say
) -> dict[str, Any]:
    """Judges and analyses; the keys "judge", "ladder", "base" and "methods" of completion results.

    A judge that fails its sanity check judges nothing: win rates are then absent. The verdicts of a stopped run are in the
    judge's own cache.

    Raises:
        InputError: the judge cannot be asked any more (its cache keeps what it said).
    """
    facts = describe(completions)
    base, again = completions.role("base")[0].name, completions.role("again")[0].name
    verdict: dict[tuple[str, str], np.ndarray] = {}  # (prompts, seeds)
    about: dict[str, Any] | None = None
    if judge is not None:
        say("sanity check of the judge", 0, 1)
        checked = sanity(judge, completions.items(base), completions.items(again), seed=seed)
        about = {"name": judge.name, "caveat": judge.caveat, "sanity": checked}
        _likelihoods(judge, completions, facts, say)
        if checked["useful"]:
            verdict = _verdicts(judge, completions, say)
            _scores(judge, completions, facts, say)
            if with_mauve:
                _mauve(judge, completions, facts, base, say)
    shape = (len(completions.prompts), completions.seeds)
    ladder = [{"temperature": arm.temperature} | facts[arm.name] for arm in completions.rungs]
    methods: dict[str, Any] = {}
    for method in dict.fromkeys(arm.method for arm in completions.role("candidate")):
        chosen = [arm for arm in completions.role("candidate") if arm.method == method]
        points = _points(completions, chosen, verdict, shape)
        found = analyse(points, ceiling, seed=seed)
        for arm, point in zip(chosen, found["points"], strict=True):
            point |= {"eps_b": arm.eps_b, "arm": arm.name, **facts[arm.name], **_cost(completions, arm, ceiling)}
            if method == STRICT:  # exact: the base it equals in distribution is its only opponent
                point["matched"] = point["plain"] | {"temperature": TEMPERATURE}
            if not verdict:
                point["plain"] = point["matched"] = None
        methods[method] = found if verdict else {"points": found["points"], "same_quality": None}
    return {"judge": about, "base": facts[base], "base_again": facts[again], "ladder": ladder, "methods": methods}


def _points(
    completions: Completions, chosen: list[Arm], verdict: dict[tuple[str, str], np.ndarray], shape: tuple[int, int]
) -> Points:
    """One method's measurements as arrays; without verdicts the counts are 0."""
    rungs = [arm.name for arm in completions.rungs]
    base = completions.role("own base" if chosen[0].method == STRICT else "base")[0].name
    unknown = np.full(shape, np.nan)
    matched = []
    for arm in chosen:
        asked = [index for index, name in enumerate(rungs) if (arm.name, name) in verdict]
        nearest = [min(asked, key=lambda i, r=r: abs(i - r)) if asked else r for r in range(len(rungs))]  # type: ignore[misc]
        matched.append([tally(verdict.get((arm.name, rungs[index]), unknown)) for index in nearest])
    return Points(
        tokens=np.stack([completions.total(arm.name, lambda text: len(text.tokens)) for arm in chosen]),
        forwards=np.stack([completions.total(arm.name, lambda text: text.forwards) for arm in chosen]),
        log_ratio=np.stack([completions.log_ratio(arm.name, base) for arm in chosen]),
        plain=np.stack([tally(verdict.get((arm.name, base), unknown)) for arm in chosen]),
        matched=np.array(matched),
        diversity=np.stack([completions.diversity(arm.name) for arm in chosen]),
        ladder=np.stack([completions.diversity(name) for name in rungs]),
        temperatures=[arm.temperature or 0.0 for arm in completions.rungs],
    )


def _cost(completions: Completions, arm: Arm, ceiling: int) -> dict[str, Any]:
    """Step sizes and regret of one arm."""
    rows = [text for row in completions.texts[arm.name] for text in row]
    sizes = [size for text in rows for size in text.step_sizes]
    unverified = sum(text.unverified for text in rows)
    return {
        "shares": [sizes.count(size) / max(1, len(sizes)) for size in range(1, ceiling + 1)],
        "regret": sum(text.regret for text in rows) / unverified if unverified else 0.0,
    }


def _likelihoods(judge: Judge, completions: Completions, facts: dict[str, Any], say: Say) -> None:
    """Adds nats per byte under the reference, if the judge has one."""
    score = getattr(judge, "log_likelihoods", None)
    if score is None:
        return
    for number, arm in enumerate(completions.arms):
        items = completions.items(arm.name)
        progress = _within(say, "likelihood under the reference", number, len(completions.arms), len(items))
        found = [value for value in score(items, progress=progress) if value is not None]
        facts[arm.name]["log_likelihood_per_byte"] = float(np.mean(found)) if found else None


def _verdicts(judge: Judge, completions: Completions, say: Say) -> dict[tuple[str, str], np.ndarray]:
    free = hasattr(judge, "log_likelihoods")  # computed once a text, whatever it is compared with
    found = {}
    asked = duels(completions, every_rung=free)
    for number, (arm, other) in enumerate(asked):
        pairs = completions.pairs(arm, other)
        values = judge.pairs(pairs, progress=_within(say, "comparing", number, len(asked), len(pairs)))
        filled = [np.nan if value is None else float(value) for value in values]
        found[arm, other] = np.array(filled).reshape(len(completions.prompts), completions.seeds)
    return found


def _scores(judge: Judge, completions: Completions, facts: dict[str, Any], say: Say) -> None:
    chosen = [*completions.role("base"), *completions.role("candidate")]
    for number, arm in enumerate(chosen):
        items = completions.items(arm.name)
        values = judge.singles(items, progress=_within(say, "scoring", number, len(chosen), len(items)))
        found = [value for value in values if value is not None]
        facts[arm.name]["score"] = float(np.mean(found)) if found else None


def _mauve(judge: Judge, completions: Completions, facts: dict[str, Any], base: str, say: Say) -> None:
    features = getattr(judge, "features", None)
    if features is None:
        return
    chosen = [*completions.role("again"), *completions.role("ladder"), *completions.role("candidate")]
    own = features(completions.items(base))
    for number, arm in enumerate(chosen):
        say("MAUVE", number, len(chosen))
        facts[arm.name]["diversity"]["mauve"] = mauve(features(completions.items(arm.name)), own)


def _within(say: Say, what: str, number: int, rounds: int, each: int) -> Callable[[int], None]:
    """Progress of round `number` of so many, as progress of the whole."""
    return lambda done: say(what, number * each + done, rounds * each)


def _rate(text: Text) -> float:
    return max(1, len(text.tokens)) / max(text.seconds, 1e-9)
