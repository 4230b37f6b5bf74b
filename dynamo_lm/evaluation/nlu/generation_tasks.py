"""Benchmarks whose answer is a text (GSM8K, TriviaQA, HumanEval), decoded at several settings: accuracy against speed.

Every setting ("arm") writes every answer, arms interleaved question by question on the same weights and machine. The prompts
and the scores, with their standard errors, are the harness's. Speed-up is wall clock, prefill included, in tokens per second
over those of one token per step; the ceiling of tokens per step is the number of heads.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class _Output:
    """What an arm wrote for one question."""

    text: str
    tokens: int
    forwards: int
    seconds: float


class Race(LM):
    """A model for the harness that writes each question's text with every arm at the first request, then returns them.

    Attributes:
        arm: whose texts it returns.
        outputs: by arm, an entry for each question.
        cut: prompts whose beginning did not fit the model's context.
    """

    def __init__(self, model: DynaMoLM, arms: Sequence[Arm], progress: Progress = lambda done, total: None):
        super().__init__()
        self.model, self.arms, self.progress = model, arms, progress
        self.arm = arms[0].name
        self.outputs: dict[str, list[_Output]] = {}
        self.cut = 0

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        if not self.outputs:
            self._write([request.args for request in requests])
        return [output.text for output in self.outputs[self.arm]]

    def _write(self, questions: Sequence[tuple[str, dict[str, Any]]]) -> None:
        self.outputs = {arm.name: [] for arm in self.arms}
        context, options = questions[0]
        for arm in self.arms:  # first calls pay for what is set up once
            self.model.complete(context, options | {"max_gen_toks": 8}, **arm.decoding)
        for number, (context, options) in enumerate(questions, start=1):
            self.cut += len(self.model.tok_encode(context)) > self.model.room(options.get("max_gen_toks", TOKENS))
            for arm in self.arms:
                began = time.perf_counter()
                text, counted = self.model.complete(context, options, **arm.decoding)
                seconds = time.perf_counter() - began
                self.outputs[arm.name].append(_Output(text, counted.new_tokens, counted.forwards, seconds))
            self.progress(number * len(self.arms), len(questions) * len(self.arms))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        raise NotImplementedError("texts only")

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError("texts only")


def race(
    model: DynaMoLM,
    question: Question,
    arms: Sequence[Arm],
    *,
    seed: int,
    progress: Progress = lambda done, total: None,
    **options: Any,
) -> tuple[dict[str, Answer], list[dict[str, Any]]]:
    """Answers a generative question with every arm.

    Args:
        arms: the first is the baseline of the speed-ups; see `arms`.
        seed: of the choice of examples and of the intervals.
        progress: called with the number of finished texts and of all.
        **options: of `harness.ask`.

    Returns:
        The answer of each arm by name, and an entry for each arm of the results file: accuracy is the task's first metric.
    """
    runner = Race(model, arms, progress)
    answers: dict[str, Answer] = {}
    for arm in arms:
        runner.arm = arm.name
        answers[arm.name] = ask(runner, question, seed=seed, **options)
    baseline = runner.outputs[arms[0].name]
    entries = []
    for arm in arms:
        outputs = runner.outputs[arm.name]
        metric, result = next(iter(answers[arm.name].metrics.items()))
        tokens = sum(output.tokens for output in outputs)
        same = sum(mine.text == theirs.text for mine, theirs in zip(outputs, baseline, strict=True))
        entries.append(
            {
                "arm": arm.name,
                "metric": metric,
                "accuracy": result["value"],
                "stderr": result["stderr"],
                "tokens_per_step": tokens / sum(output.forwards for output in outputs),
                "speed_up": _rate(outputs) / _rate(baseline),
                "speed_up_interval": _interval(outputs, baseline, seed) if len(outputs) > 1 else None,
                "ceiling": arm.decoding.get("num_heads", model.model.num_heads),
                "same_text": same / len(baseline),
                "tokens": tokens,
                "prompts_cut": runner.cut,
            }
        )
    return answers, entries


def _rate(outputs: Sequence[_Output]) -> float:
    return sum(output.tokens for output in outputs) / sum(output.seconds for output in outputs)


def _interval(outputs: Sequence[_Output], baseline: Sequence[_Output], seed: int) -> list[float]:
    """95 % interval of the speed-up over questions, by resampling them."""
    chosen = np.random.default_rng(seed).integers(len(outputs), size=(RESAMPLES, len(outputs)))
    rates = []
    for arm in (outputs, baseline):
        tokens, seconds = np.array([(output.tokens, output.seconds) for output in arm]).T
        rates.append(tokens[chosen].sum(1) / seconds[chosen].sum(1))
    return [float(end) for end in np.quantile(rates[0] / rates[1], [0.025, 0.975])]
