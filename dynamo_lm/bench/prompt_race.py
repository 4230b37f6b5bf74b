"""Several ways of decoding the same prompts, raced in one run: speed as ratios, with the quality measured beside them.

Every way runs on the same weights, prompts, threads and number of new tokens, interleaved and repeated; a ratio is taken
within each repetition, so a machine that is slow for a while is slow for all. Knows nothing about terminals.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dynamo_lm.model.modeling import DynaMoForCausalLM


@dataclass(frozen=True)
class Method:
    """One way of decoding."""

    name: str
    arguments: dict[str, Any]  # of `generate`
    baseline: str  # the way its speed is divided by
    same_text_as: str | None = None  # the way whose tokens it must reproduce


@dataclass
class Result:
    """What a way did over all prompts; lists have one entry a repetition."""

    way: Method
    ceiling: int  # tokens per step at most
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    forwards: list[int] = field(default_factory=list)
    step_sizes: list[int] = field(default_factory=list)  # of all steps
    sequences: list[list[int]] = field(default_factory=list)  # of the first repetition, by prompt, prompts included
    steps: list[list[list[int]]] = field(default_factory=list)  # the same, cut into steps
    log_likelihood: float = 0.0  # nats per new token under the base, all repetitions
    distinct_bigrams: float = 0.0  # different token pairs over pairs, mean over texts
    regret: float = 0.0  # nats per scored token
    speed_ups: list[float] = field(default_factory=list)  # tokens per second over the baseline's, by repetition
    identical: bool | None = None  # to the way it must reproduce

    @property
    def tokens_per_step(self) -> float:
        return sum(self.tokens) / sum(self.forwards)

    @property
    def tokens_per_second(self) -> float:
        return statistics.median(n / s for n, s in zip(self.tokens, self.seconds, strict=True))

    @property
    def speed_up(self) -> float:
        return statistics.median(self.speed_ups)

    def summary(self) -> dict[str, Any]:
        """Plain numbers for a results file."""
        return {
            "name": self.way.name,
            "arguments": self.way.arguments,
            "baseline": self.way.baseline,
            "ceiling": self.ceiling,
            "tokens_per_step": self.tokens_per_step,
            "speed_up": {"median": self.speed_up, "min": min(self.speed_ups), "max": max(self.speed_ups)},
            "tokens_per_second": self.tokens_per_second,
            "tokens": sum(self.tokens),
            "forwards": sum(self.forwards),
            "histogram": [self.step_sizes.count(size) for size in range(1, self.ceiling + 1)],
            "log_likelihood": self.log_likelihood,
            "distinct_bigrams": self.distinct_bigrams,
            "mean_regret": self.regret,
            "identical": self.identical,
        }


def race(
    model: DynaMoForCausalLM,
    prompts: Sequence[Tensor],
    ways: Sequence[Method],
    *,
    max_new_tokens: int,
    repetitions: int,
    seed: int = 0,
    progress: Callable[[str], None] = lambda name: None,
) -> list[Result]:
    """Runs every way on every prompt, one prompt at a time, `repetitions` times.

    Args:
        prompts: token ids, each (1, length).
        ways: a way's baseline must come before it or be itself.
        seed: sampling in repetition r on prompt p starts from the same seed for every way.

    Returns:
        One result a way, in their order. Text may end early at an end token, so speeds are in tokens per second.
    """
    results = {way.name: Result(way, way.arguments.get("num_heads", model.num_heads)) for way in ways}
    scores: dict[str, list[tuple[float, int]]] = {way.name: [] for way in ways}
    distinct: dict[str, list[float]] = {way.name: [] for way in ways}
    regrets: dict[str, list[tuple[float, int]]] = {way.name: [] for way in ways}
    for way in ways:  # first calls pay for what is set up once
        model.generate(prompts[0], max_new_tokens=8, **way.arguments, seed=seed)
    for repetition in range(repetitions):
        for way in ways:
            progress(way.name)
            result, seconds, tokens, forwards = results[way.name], 0.0, 0, 0
            for number, prompt in enumerate(prompts):
                began = time.perf_counter()
                output = model.generate(
                    prompt,
                    max_new_tokens=max_new_tokens,
                    seed=seed + 1000 * repetition + number,
                    return_dict_in_generate=True,
                    **way.arguments,
                )
                seconds += time.perf_counter() - began
                sequence, counted = output.sequences[0], output.statistics[0]
                tokens, forwards = tokens + counted.new_tokens, forwards + counted.forwards
                result.step_sizes += counted.step_sizes
                regrets[way.name].append((counted.regret, counted.scored))
                new = sequence[prompt.shape[1] :].tolist()
                scores[way.name].append((log_likelihood(model, sequence, prompt.shape[1]), len(new)))
                pairs = list(pairwise(new))
                distinct[way.name].append(len(set(pairs)) / max(1, len(pairs)))
                if repetition == 0:
                    result.sequences.append(sequence.tolist())
                    ends = [sum(counted.step_sizes[:i]) for i in range(len(counted.step_sizes) + 1)]
                    result.steps.append([new[a:b] for a, b in pairwise(ends)])
            result.seconds.append(seconds)
            result.tokens.append(tokens)
            result.forwards.append(forwards)
    for way in ways:
        result, baseline = results[way.name], results[way.baseline]
        result.log_likelihood = sum(total for total, _ in scores[way.name]) / sum(n for _, n in scores[way.name])
        result.distinct_bigrams = statistics.mean(distinct[way.name])
        result.regret = sum(r for r, _ in regrets[way.name]) / max(1, sum(n for _, n in regrets[way.name]))
        rates = [n / s for n, s in zip(result.tokens, result.seconds, strict=True)]
        own = [n / s for n, s in zip(baseline.tokens, baseline.seconds, strict=True)]
        result.speed_ups = [rate / other for rate, other in zip(rates, own, strict=True)]
        if way.same_text_as is not None:
            result.identical = result.sequences == results[way.same_text_as].sequences
    return [results[way.name] for way in ways]


@torch.inference_mode()
def log_likelihood(model: DynaMoForCausalLM, sequence: Tensor, prompt_length: int) -> float:
    """Sum over the new tokens of log p under the base at temperature 1, in nats. sequence: (length,)."""
    log_p = model.base(sequence[None]).logits[0, prompt_length - 1 : -1].float().log_softmax(-1)
    return float(log_p.gather(-1, sequence[prompt_length:, None]).sum())
