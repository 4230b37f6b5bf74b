"""The sentence-completion protocol, second half: a judge's verdicts on the completions against their speed.

In: completions of every arm (`generate.py`) and a judge. Out: points and same-quality speed-ups of a results file.
Every candidate is compared with the base twice: as the base is, and at the temperature at which it is as diverse as the
candidate. The second comparison is the fair one: masking and thresholding lower the effective temperature, and a judge
that prefers likely text prefers that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynamo_lm.evaluation.completion.diversity import mauve, mean, measure, pooled_distinct
from dynamo_lm.evaluation.completion.generate import STRICT, TEMPERATURE, Arm, Text
from dynamo_lm.evaluation.completion.winrates import Points, analyse, matched_rungs, tally
from dynamo_lm.evaluation.judges.judges import Judge, Pair, sanity

Progress = Callable[[str, int, int], None]  # what is being done, how much is done, of how much


@dataclass(frozen=True)
class Completions:
    """Texts by arm, prompt and seed."""

    prompts: list[str]
    seeds: int
    arms: list[Arm]
    texts: dict[str, list[list[Text]]]  # [arm][prompt][seed]

    @classmethod
    def gather(cls, texts: Sequence[Text], arms: Sequence[Arm], prompts: Sequence[str], seeds: int) -> Completions:
        by_key = {(text.arm, text.prompt, text.seed): text for text in texts}
        grouped = {
            arm.name: [[by_key[arm.name, prompt, seed] for seed in range(seeds)] for prompt in range(len(prompts))]
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
            the two around the match, for a judge that costs money.
    """
    pairs = []
    rungs = [arm.name for arm in completions.rungs]
    base = completions.role("base")[0].name
    ladder = np.array([[completions.diversity(name).sum() for name in rungs]])  # (1, rungs)
    for arm in completions.role("candidate"):
        if arm.method == STRICT:
            pairs.append((arm.name, completions.role("own base")[0].name))
            continue
        opponents = set(rungs)
        if not every_rung:
            below, above, _ = matched_rungs(completions.diversity(arm.name).sum(keepdims=True), ladder)
            opponents = {rungs[below[0]], rungs[above[0]], base}
        pairs += [(arm.name, name) for name in rungs if name in opponents]
    return pairs


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
    completions: Completions, judge: Judge | None, *, ceiling: int, seed: int, with_mauve: bool = False, progress: Progress
) -> dict[str, Any]:
    """Judge and analyse; the keys "judge", "ladder", "base" and "methods" of completion results.

    A judge that fails its sanity check judges nothing: win rates are then absent. The verdicts of a stopped run are in the
    judge's own cache.

    Raises:
        InputError: the judge does not answer any more; its answers so far are cached.
    """
    facts = describe(completions)
    base, again = completions.role("base")[0].name, completions.role("again")[0].name
    verdicts: dict[tuple[str, str], np.ndarray] = {}  # (prompts, seeds)
    judge_record: dict[str, Any] | None = None
    if judge is not None:
        progress("sanity check of the judge", 0, 1)
        checked = sanity(judge, completions.items(base), completions.items(again), seed=seed)
        judge_record = {"name": judge.name, "caveat": judge.caveat, "sanity": checked}
        verdicts = _judge(judge, completions, facts, base, with_mauve, progress, useful=checked["useful"])
    ladder = [{"temperature": arm.temperature} | facts[arm.name] for arm in completions.rungs]
    methods: dict[str, Any] = {}
    for method in dict.fromkeys(arm.method for arm in completions.role("candidate")):
        chosen = [arm for arm in completions.role("candidate") if arm.method == method]
        analysis = analyse(_points(completions, chosen, verdicts), ceiling, seed=seed)
        for arm, point in zip(chosen, analysis["points"], strict=True):
            point |= {"eps_b": arm.eps_b, "arm": arm.name, **facts[arm.name], **_cost(completions, arm, ceiling)}
            if method == STRICT:  # exact: the base it equals in distribution is its only opponent
                point["matched"] = point["plain"] | {"temperature": TEMPERATURE}
            if not verdicts:
                point["plain"] = point["matched"] = None
        methods[method] = analysis if verdicts else {"points": analysis["points"], "same_quality": None}
    return {"judge": judge_record, "base": facts[base], "base_again": facts[again], "ladder": ladder, "methods": methods}


def _judge(
    judge: Any,
    completions: Completions,
    facts: dict[str, Any],
    base: str,
    with_mauve: bool,
    progress: Progress,
    *,
    useful: bool,
) -> dict[tuple[str, str], np.ndarray]:
    """Fills in `facts` and returns verdicts, (prompts, seeds) for each pair of arms; none of a judge that is not useful."""

    def ask(what: str, question: Callable[..., list], batches: Mapping[Any, Sequence[Any]]) -> dict[Any, list]:
        total, before, answers = sum(map(len, batches.values())), 0, {}
        for key, items in batches.items():
            answers[key] = question(items, progress=lambda done, before=before: progress(what, before + done, total))
            before += len(items)
        return answers

    items = {arm.name: completions.items(arm.name) for arm in completions.arms}
    is_reference = hasattr(judge, "log_likelihoods")  # computed once for each text, whatever it is compared with
    if is_reference:
        for arm, values in ask("likelihood under the reference", judge.log_likelihoods, items).items():
            facts[arm]["log_likelihood_per_byte"] = mean(values)
    if not useful:
        return {}
    pairs = {(arm, other): completions.pairs(arm, other) for arm, other in duels(completions, every_rung=is_reference)}
    shape = len(completions.prompts), completions.seeds
    verdicts = {
        key: np.array([np.nan if value is None else float(value) for value in values]).reshape(shape)
        for key, values in ask("comparing", judge.pairs, pairs).items()
    }
    scored = {arm.name: items[arm.name] for role in ("base", "candidate") for arm in completions.role(role)}
    for arm, values in ask("scoring", judge.singles, scored).items():
        facts[arm]["score"] = mean(values)
    if with_mauve and hasattr(judge, "features"):
        others = [arm.name for role in ("again", "ladder", "candidate") for arm in completions.role(role)]
        own = judge.features(items[base])
        for number, arm in enumerate(others):
            progress("MAUVE", number, len(others))
            facts[arm]["diversity"]["mauve"] = mauve(judge.features(items[arm]), own)
    return verdicts


def _points(completions: Completions, chosen: list[Arm], verdicts: dict[tuple[str, str], np.ndarray]) -> Points:
    """One method's measurements as arrays; without verdicts the counts are 0."""
    rungs = [arm.name for arm in completions.rungs]
    base = completions.role("own base" if chosen[0].method == STRICT else "base")[0].name
    unknown = np.full((len(completions.prompts), completions.seeds), np.nan)
    matched = []
    for arm in chosen:
        judged = [index for index, name in enumerate(rungs) if (arm.name, name) in verdicts] or range(len(rungs))
        nearest = [min(judged, key=lambda index, rung=rung: abs(index - rung)) for rung in range(len(rungs))]  # type: ignore[misc]
        matched.append([tally(verdicts.get((arm.name, rungs[index]), unknown)) for index in nearest])
    return Points(
        tokens=np.stack([completions.total(arm.name, lambda text: len(text.tokens)) for arm in chosen]),
        forwards=np.stack([completions.total(arm.name, lambda text: text.forwards) for arm in chosen]),
        log_ratio=np.stack([completions.log_ratio(arm.name, base) for arm in chosen]),
        plain=np.stack([tally(verdicts.get((arm.name, base), unknown)) for arm in chosen]),
        matched=np.array(matched),
        diversity=np.stack([completions.diversity(arm.name) for arm in chosen]),
        ladder=np.stack([completions.diversity(name) for name in rungs]),
        temperatures=[arm.temperature or 0.0 for arm in completions.rungs],
    )


def _cost(completions: Completions, arm: Arm, ceiling: int) -> dict[str, Any]:
    """Step sizes and regret of one arm."""
    texts = [text for row in completions.texts[arm.name] for text in row]
    sizes = [size for text in texts for size in text.step_sizes]
    unverified = sum(text.unverified for text in texts)
    return {
        "shares": [sizes.count(size) / max(1, len(sizes)) for size in range(1, ceiling + 1)],
        "regret": sum(text.regret for text in texts) / unverified if unverified else 0.0,
    }


def _rate(text: Text) -> float:
    return max(1, len(text.tokens)) / max(text.seconds, 1e-9)
