"""The race: every method on every prompt, interleaved and repeated.

Methods take turns at every prompt, beginning with another one each time, and a ratio is taken within a repetition, so a
machine that is slow for a while is slow for all. Knows no terminals, no files and no tokenizer.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dynamo_lm.bench.methods import Method
from dynamo_lm.bench.prompts import Prompt, batches
from dynamo_lm.bench.roofline import LARGE, Bandwidth, measure_bandwidth, weight_bytes
from dynamo_lm.bench.runners import BenchmarkContext, Output, Runner, open_runner
from dynamo_lm.errors import InputError


@dataclass
class Tally:
    """What one repetition of one method did, over prompts of one group."""

    seconds: float = 0.0
    tokens: int = 0
    steps: int = 0

    def add(self, other: Tally) -> None:
        self.seconds += other.seconds
        self.tokens += other.tokens
        self.steps += other.steps

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


@dataclass
class Result:
    """What a method did."""

    method: Method
    setup_seconds: float = 0.0  # opening and first calls: conversions, compilation
    groups: list[dict[str, Tally]] = field(default_factory=list)  # by repetition
    outputs: list[list[Output]] = field(default_factory=list)  # by repetition, by batch

    def tally(self, repetition: int | None = None, group: str | None = None) -> Tally:
        """Of one repetition or of all, of one group or of all."""
        total = Tally()
        for groups in self.groups if repetition is None else [self.groups[repetition]]:
            for name, tally in groups.items():
                if group in (None, name):
                    total.add(tally)
        return total

    def rates(self, group: str | None = None) -> list[float]:
        """Tokens a second, by repetition."""
        return [self.tally(repetition, group).rate for repetition in range(len(self.groups))]

    def texts(self, repetition: int = 0) -> list[list[int]]:
        return [text for output in self.outputs[repetition] for text in output.texts]


@dataclass
class Race:
    """One context length and batch size."""

    results: list[Result]
    skipped: list[dict[str, Any]]  # see `left_out`
    prompts: list[list[Prompt]]  # in batches
    bandwidths: list[Bandwidth]  # of memory, by repetition
    resident: list[Bandwidth]  # of a buffer as large as the weights, by repetition
    stopped: bool = False  # by its time limit, before all repetitions were done

    @property
    def repetitions(self) -> int:
        return len(self.results[0].groups)

    def baseline(self, kind: str) -> Result:
        """The fastest method of one token per step, by the median of its speeds."""
        candidates = [result for result in self.results if result.method.one_token and result.method.kind == kind]
        return max(candidates, key=lambda result: statistics.median(result.rates()))

    def result(self, name: str | None) -> Result | None:
        return next((result for result in self.results if result.method.name == name), None)


def race(
    context: BenchmarkContext,
    prompts: Sequence[Prompt],
    methods: Sequence[Method],
    *,
    batch: int = 1,
    max_new_tokens: int,
    repetitions: int,
    seed: int = 0,
    bandwidth_bytes: int = LARGE,
    warm_up_tokens: int | None = None,
    time_limit: float | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    show: Callable[[Method, int, Output], None] = lambda method, number, output: None,
) -> Race:
    """Run every method on every prompt, `repetitions` times.

    Args:
        prompts: those that fit the context (see `prompts.fitted`).
        methods: those that run at this batch size (see `methods.choose`).
        seed: sampling in repetition r on batch b starts from the same seed for every method.
        bandwidth_bytes: size of the tensor that memory bandwidth is measured with, by default beyond all caches; 0 measures
            none.
        warm_up_tokens: length of each method's first texts, by default `max_new_tokens`, which sizes buffers.
        time_limit: seconds, setting up included. The race ends before a batch that would exceed it, judged by the slowest
            one before. A first repetition keeps the batches that all methods have done, a later one counts only if it is
            whole.
        progress: called with the current activity, the calls done and their total number.
        show: is given every output of the first repetition, with the number of its batch.

    Raises:
        InputError: nothing is left to race, or an uncompiled method of DynaMo's own cannot run.
    """
    deadline = None if time_limit is None else time.monotonic() + time_limit
    chunks = batches(prompts, batch)
    runners, skipped = _set_up(context, chunks, methods, warm_up_tokens or max_new_tokens, seed, progress)
    slowest = 0.0  # seconds of a batch
    race = Race([result for result, _ in runners], skipped, chunks, [], [])
    done, total = 0, repetitions * len(runners) * len(chunks)
    for repetition in range(repetitions):
        if bandwidth_bytes:
            race.bandwidths.append(measure_bandwidth(context.model.device, size=bandwidth_bytes))
            race.resident.append(measure_bandwidth(context.model.device, size=weight_bytes(context.model.base)))
        for result, _ in runners:
            result.groups.append({})
            result.outputs.append([])
        for number, chunk in enumerate(chunks):
            began = time.monotonic()
            if deadline is not None and began + slowest > deadline and (repetition or number):
                race.stopped = True
                break
            start = (repetition + number) % len(runners)
            for result, runner in runners[start:] + runners[:start]:
                progress(result.method.name, done, total)
                output = runner(_ids(chunk), max_new_tokens, seed + 1000 * repetition + number)
                group = result.groups[-1].setdefault(chunk[0].group, Tally())
                group.add(Tally(output.seconds, sum(map(len, output.texts)), output.steps))
                result.outputs[-1].append(output)
                done += 1
                if repetition == 0:
                    show(result.method, number, output)
            slowest = max(slowest, time.monotonic() - began)
        if race.stopped:
            if repetition == 0:
                race.prompts = chunks[: len(race.results[0].outputs[0])]
            else:
                for result in race.results:
                    del result.groups[-1], result.outputs[-1]
            break
    return race


def _set_up(
    context: BenchmarkContext,
    chunks: list[list[Prompt]],
    methods: Sequence[Method],
    max_new_tokens: int,
    seed: int,
    progress: Callable[[str, int, int], None],
) -> tuple[list[tuple[Result, Runner]], list[dict[str, Any]]]:
    """Every method with its runner, after its first calls, and those that cannot run."""
    runners: list[tuple[Result, Runner]] = []
    skipped: list[dict[str, Any]] = []
    longest = max(chunks, key=lambda chunk: max(len(prompt.tokens) for prompt in chunk))
    for number, method in enumerate(methods):
        progress(f"setting up {method.name}", number, len(methods))
        result = Result(method)
        try:
            runner = open_runner(method, context)
            calls = [runner(_ids(chunk), max_new_tokens, seed) for chunk in (longest, chunks[0])]  # longest: sizes buffers
            result.setup_seconds = sum(output.seconds for output in calls)
        except Exception as error:  # whatever another library makes of this model and machine
            if method.engine == "dynamo" and not method.compiles:
                raise
            skipped.append(left_out(method, reason(error)))
            continue
        runners.append((result, runner))
    return runners, skipped


def left_out(method: Method, why: str) -> dict[str, Any]:
    """What a record keeps of a method that was not raced."""
    return {"name": method.name, "reason": why, "one_token": method.one_token}


def reason(error: Exception) -> str:
    """One sentence on why a method does not run here."""
    if isinstance(error, ModuleNotFoundError):
        return f"The package {error.name} is not installed; `pip install {error.name}` brings it."
    if isinstance(error, InputError):
        return str(error)
    first = (str(error).strip().splitlines() or [""])[0][:200]
    return f"It failed: {type(error).__name__}{': ' if first else ''}{first}"


def _ids(chunk: Sequence[Prompt]) -> list[list[int]]:
    return [list(prompt.tokens) for prompt in chunk]
