"""Benchmarks whose answer is a text (GSM8K, TriviaQA, HumanEval), written by our own decoding at several settings, so that
accuracy can be seen against speed.

Every setting ("arm") writes every answer, arms interleaved question by question on the same weights and machine. The prompts
and the scores, with their standard errors, are the harness's. Speed-up is wall clock, the prompt's forward included, in
tokens per second over those of one token per step; tokens per step have the number of heads as their ceiling.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from dynamo_lm.errors import InputError
from dynamo_lm.evaluation.nlu.harness import TOKENS, Answer, DynaMoLM, Progress, Question, ask

ONE, STRICT = "one token", "strict"
RESAMPLES = 1000


@dataclass(frozen=True)
class Arm:
    """One way of writing the answers."""

    name: str
    decoding: dict[str, Any]  # arguments of `DynaMoForCausalLM.generate`


def arms(eps_b: Sequence[float], alpha_c: float | None = None) -> list[Arm]:
    """One token per step, strict, and Algorithm 1 at several `eps_b`, all greedy: the most likely token, or tuple.

    Raises:
        InputError: an `eps_b` outside 0..1.
    """
    for value in eps_b:
        if not 0 <= value <= 1:
            raise InputError(f"--eps-b is {value}; give numbers from 0 to 1.")
    off = [Arm(f"off, eps_b {value:g}", {"verify": "off", "eps_b": value}) for value in sorted(set(eps_b), reverse=True)]
    return [Arm(ONE, {"verify": "strict", "num_heads": 1}), Arm(STRICT, {"verify": "strict"}), *off]


@dataclass
class _Written:
    """What an arm wrote; one entry a question."""

    texts: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    forwards: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


class Race(LM):
    """A model for the harness that writes each question's text with every arm when first asked, then reads them out.

    Attributes:
        arm: whose texts it gives.
        cut: prompts whose beginning did not fit the model's context.
    """

    def __init__(self, model: DynaMoLM, ways: Sequence[Arm], progress: Progress = lambda done, total: None):
        super().__init__()
        self.model, self.ways, self.progress = model, ways, progress
        self.arm = ways[0].name
        self.written: dict[str, _Written] = {}
        self.cut = 0

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        if not self.written:
            self._write([request.args for request in requests])
        return self.written[self.arm].texts

    def _write(self, questions: Sequence[tuple[str, dict[str, Any]]]) -> None:
        self.written = {way.name: _Written() for way in self.ways}
        context, asked = questions[0]
        for way in self.ways:  # first calls pay for what is set up once
            self.model.complete(context, asked | {"max_gen_toks": 8}, **way.decoding)
        for number, (context, asked) in enumerate(questions, start=1):
            room = self.model.room(asked.get("max_gen_toks", TOKENS))
            self.cut += len(self.model.tok_encode(context)) > room
            for way in self.ways:
                began = time.perf_counter()
                text, statistics = self.model.complete(context, asked, **way.decoding)
                written = self.written[way.name]
                written.seconds.append(time.perf_counter() - began)
                written.texts.append(text)
                written.tokens.append(statistics.new_tokens)
                written.forwards.append(statistics.forwards)
            self.progress(number * len(self.ways), len(questions) * len(self.ways))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        raise NotImplementedError("texts only")

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError("texts only")


def race(
    model: DynaMoLM,
    question: Question,
    ways: Sequence[Arm],
    *,
    limit: int | None,
    shots: int | None,
    seed: int,
    run_code: bool = False,
    progress: Progress = lambda done, total: None,
) -> tuple[dict[str, Answer], list[dict[str, Any]]]:
    """Answers one generative question with every arm.

    Args:
        ways: the first is the baseline of the speed-ups; see `arms`.
        progress: told how many texts were written, and how many there will be.

    Returns:
        The answer of each arm by name, and a row a arm for the results file: accuracy is the task's first metric.
    """
    runner = Race(model, ways, progress)
    answers: dict[str, Answer] = {}
    for way in ways:
        runner.arm = way.name
        answers[way.name] = ask(runner, question, limit=limit, shots=shots, seed=seed, run_code=run_code)
    baseline = runner.written[ways[0].name]
    rows = []
    for way in ways:
        written, metrics = runner.written[way.name], answers[way.name].metrics
        first = next(iter(metrics))
        low, high = _interval(written, baseline, seed)
        rows.append(
            {
                "arm": way.name,
                "metric": first,
                "accuracy": metrics[first]["value"],
                "stderr": metrics[first]["stderr"],
                "tokens_per_step": sum(written.tokens) / sum(written.forwards),
                "speed_up": _rate(written) / _rate(baseline),
                "speed_up_interval": [low, high] if len(written.texts) > 1 else None,
                "ceiling": way.decoding.get("num_heads", model.model.num_heads),
                "same_text": sum(a == b for a, b in zip(written.texts, baseline.texts, strict=True)) / len(baseline.texts),
                "tokens": sum(written.tokens),
                "prompts_cut": runner.cut,
            }
        )
    return answers, rows


def _rate(written: _Written) -> float:
    return sum(written.tokens) / sum(written.seconds)


def _interval(written: _Written, baseline: _Written, seed: int) -> tuple[float, float]:
    """95 % interval of the speed-up over questions, by resampling them."""
    rows = np.random.default_rng(seed).integers(len(written.texts), size=(RESAMPLES, len(written.texts)))
    tokens, seconds, others, clock = (
        np.asarray(values)[rows].sum(1) for values in (written.tokens, written.seconds, baseline.tokens, baseline.seconds)
    )
    low, high = np.quantile(tokens / seconds / (others / clock), [0.025, 0.975])
    return float(low), float(high)
