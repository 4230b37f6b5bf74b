"""The race itself: every way on every prompt, interleaved and repeated, and what follows from it.

Ways take turns at every prompt, beginning with another one each time, and a ratio is taken within a repetition, so a machine
that is slow for a while is slow for all. Texts are scored when all clocks have stopped. Knows no terminals, no files and no
tokenizer.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from dynamo_lm.bench.methods import Method
from dynamo_lm.bench.prompt_race import log_likelihood
from dynamo_lm.bench.prompts import Prompt, batches
from dynamo_lm.bench.roofline import Bandwidth, floor_seconds, head_bytes, measure_bandwidth, weight_bytes
from dynamo_lm.bench.runners import BenchmarkContext, Output, Runner, open_runner
from dynamo_lm.errors import InputError


@dataclass
class Tally:
    """What one repetition of one way did, over prompts of one group."""

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
    """What a way did."""

    way: Method
    setup_seconds: float = 0.0  # opening and first calls: conversions, compilation
    groups: list[dict[str, Tally]] = field(default_factory=list)  # by repetition
    written: list[list[Output]] = field(default_factory=list)  # by repetition, by batch

    def tally(self, repetition: int, group: str | None = None) -> Tally:
        """Of one group, or of all."""
        if group is not None:
            return self.groups[repetition][group]
        total = Tally()
        for tally in self.groups[repetition].values():
            total.add(tally)
        return total

    def rates(self, group: str | None = None) -> list[float]:
        return [self.tally(repetition, group).rate for repetition in range(len(self.groups))]

    def texts(self, repetition: int = 0) -> list[list[int]]:
        return [text for written in self.written[repetition] for text in written.texts]


@dataclass
class Race:
    """One context length and batch size."""

    results: list[Result]
    skipped: list[dict[str, Any]]  # see `left_out`
    prompts: list[list[Prompt]]  # in batches
    bandwidths: list[Bandwidth]  # of memory, by repetition
    resident: list[Bandwidth]  # of a buffer as large as the weights, by repetition

    def baseline(self, kind: str) -> Result:
        """The fastest way of one token per step, by the median of its speeds."""
        own = [result for result in self.results if result.way.one_token and result.way.kind == kind]
        return max(own, key=lambda result: statistics.median(result.rates()))

    def of(self, name: str | None) -> Result | None:
        return next((result for result in self.results if result.way.name == name), None)


def race(
    among: BenchmarkContext,
    prompts: Sequence[Prompt],
    ways: Sequence[Method],
    *,
    batch: int,
    max_new_tokens: int,
    repetitions: int,
    seed: int = 0,
    bandwidth_bytes: int | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Race:
    """Runs every way on every prompt, `repetitions` times.

    Args:
        prompts: those that fit the context (see `inputs.fitted`).
        ways: those that run at this batch size (see `ways.choose`).
        seed: sampling in repetition r on batch b starts from the same seed for every way.
        bandwidth_bytes: size of the tensor that memory bandwidth is measured with; the default is beyond all caches.
        progress: told what is going on, how many calls are done and how many there are.

    Raises:
        InputError: nothing is left to race, or a way of DynaMo's own cannot run.
    """
    chunks = batches(prompts, batch)
    runners: list[tuple[Result, Runner]] = []
    skipped: list[dict[str, Any]] = []
    longest = max(chunks, key=lambda chunk: max(len(prompt.tokens) for prompt in chunk))
    for way in ways:
        progress(f"setting up {way.name}", 0, 1)
        result = Result(way)
        try:
            runner = open_runner(way, among)
            tally = [runner(_ids(chunk), max_new_tokens, seed) for chunk in (longest, chunks[0])]  # longest: sizes buffers
            result.setup_seconds = sum(written.seconds for written in tally)
        except Exception as error:  # whatever another library makes of this model and machine
            if way.engine == "dynamo" and not way.compiles:
                raise
            skipped.append(left_out(way, reason(error)))
            continue
        runners.append((result, runner))
    size = weight_bytes(among.model.base)
    found = Race([result for result, _ in runners], skipped, chunks, [], [])
    done, total = 0, repetitions * len(runners) * len(chunks)
    for repetition in range(repetitions):
        more = {} if bandwidth_bytes is None else {"size": bandwidth_bytes}
        found.bandwidths.append(measure_bandwidth(among.model.device, **more))
        found.resident.append(measure_bandwidth(among.model.device, size=size))
        for result, _ in runners:
            result.groups.append({})
            result.written.append([])
        for number, chunk in enumerate(chunks):
            start = (repetition + number) % len(runners)
            for result, runner in runners[start:] + runners[:start]:
                progress(result.way.name, done, total)
                written = runner(_ids(chunk), max_new_tokens, seed + 1000 * repetition + number)
                new = sum(map(len, written.texts))
                group = result.groups[-1].setdefault(chunk[0].group, Tally())
                group.add(Tally(written.seconds, new, written.steps))
                result.written[-1].append(written)
                done += 1
    return found


def summaries(found: Race, among: BenchmarkContext, *, meaningful: bool = True) -> list[dict[str, Any]]:
    """Plain numbers of every way, in order.

    Args:
        meaningful: whether the weights are trained, so that texts and their likelihoods mean something.
    """
    scores: dict[tuple[int, tuple[int, ...]], float] = {}
    return [_summary(found, result, among, scores if meaningful else None) for result in found.results]


def _summary(found: Race, result: Result, among: BenchmarkContext, scores: dict | None) -> dict[str, Any]:
    way, baseline = result.way, found.baseline(result.way.kind)
    repetitions = range(len(result.groups))
    total, ours = Tally(), Tally()
    for repetition in repetitions:
        total.add(result.tally(repetition))
        ours.add(baseline.tally(repetition))
    per_step = total.tokens / total.steps
    ratio = spread(_ratios(result, baseline))
    calls = [call for written in result.written for call in written]
    texts = [text for repetition in repetitions for text in result.texts(repetition)]
    pairs = [list(pairwise(text)) for text in texts]
    same, other = found.of(way.identical_to), result.texts()
    row = {
        "name": way.name,
        "engine": way.engine,
        "model": way.model,
        "arguments": way.arguments,
        "kind": way.kind,
        "lossless": way.lossless,
        "one_token": way.one_token,
        "baseline": baseline.way.name,
        "ceiling": way.ceiling,
        "tokens_per_second": spread(result.rates()),
        "ratio": ratio,
        "tokens_per_step": per_step,
        "efficiency": ratio["median"] / per_step,
        "efficiency_ceiling": _efficiency_ceiling(way, among),
        "step_seconds": total.seconds / total.steps * _rows(found),
        "step_cost": (total.seconds / total.steps) / (ours.seconds / ours.steps),
        "tokens": total.tokens,
        "steps": total.steps,
        "setup_seconds": result.setup_seconds,
        "identical_to": way.identical_to,
        "identical": agreement(other, same.texts()) if same is not None else None,
        "identical_to_baseline": agreement(other, baseline.texts()) if way.kind == "greedy" else None,
        "regret": sum(call.regret for call in calls) / max(1, sum(call.scored for call in calls)),
        "distinct_bigrams": statistics.mean(len(set(own)) / max(1, len(own)) for own in pairs),
        "log_likelihood": None,
        "groups": {
            group: {
                "tokens_per_second": spread(result.rates(group)),
                "ratio": spread(_ratios(result, baseline, group)),
                "tokens_per_step": sum(result.tally(r, group).tokens for r in repetitions)
                / sum(result.tally(r, group).steps for r in repetitions),
            }
            for group in result.groups[0]
        },
    }
    if scores is not None:
        row["log_likelihood"] = _likelihood(found, result, among, scores)
    return row


def _efficiency_ceiling(way: Method, among: BenchmarkContext) -> float | None:
    """What would be left of the tokens per step if reading weights, each of them once, were all that steps took."""
    if way.engine != "dynamo" or way.one_token:
        return None
    read = weight_bytes(among.model.base)
    return read / (read + head_bytes(among.models[way.model], way.arguments["num_heads"]))


def floor(found: Race, among: BenchmarkContext, max_new_tokens: int) -> dict[str, Any]:
    """The machine's floor for this race, as tokens a second, and every one-token way's time as a multiple of it."""
    base, rows = among.model.base, _rows(found)
    lengths = [len(prompt.tokens) + max_new_tokens / 2 for chunk in found.prompts for prompt in chunk]
    length = statistics.mean(lengths)
    memory = statistics.median(bandwidth.best for bandwidth in found.bandwidths)
    resident = statistics.median(bandwidth.best for bandwidth in found.resident)
    seconds = floor_seconds(base, length, memory, batch=rows)
    speed = rows / seconds
    return {
        "name": "memory-bandwidth floor",
        "weight_bytes": weight_bytes(base),
        "mean_length": length,
        "bytes_per_second": {
            "read": statistics.median(bandwidth.read for bandwidth in found.bandwidths),
            "copy": statistics.median(bandwidth.copy for bandwidth in found.bandwidths),
            "resident": resident,  # of a buffer of the weights' size: more, where the CPU's caches hold the weights
        },
        "step_seconds": seconds,
        "tokens_per_second": speed,
        "resident_tokens_per_second": rows / floor_seconds(base, length, resident, batch=rows),
        "ratio": speed / statistics.median(found.baseline("greedy").rates()),
        "multiples": {
            result.way.name: speed / statistics.median(result.rates()) for result in found.results if result.way.one_token
        },
    }


def left_out(way: Method, why: str) -> dict[str, Any]:
    """What a record keeps of a way that was not raced."""
    return {"name": way.name, "reason": why, "one_token": way.one_token}


def agreement(texts: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> dict[str, Any]:
    """How many texts are identical, of how many, and the share of tokens before the first difference."""
    same = sum(list(text) == list(other) for text, other in zip(texts, others, strict=True))
    shared = 0
    for text, other in zip(texts, others, strict=True):
        differing = (i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b)
        shared += next(differing, min(len(text), len(other)))
    return {"texts": same, "of": len(texts), "tokens": shared / max(1, sum(map(len, others)))}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def reason(error: Exception) -> str:
    """One sentence on why a way does not run here."""
    if isinstance(error, ModuleNotFoundError):
        return f'The package {error.name} is not installed; pip install "dynamo-lm[bench]" brings it.'
    if isinstance(error, InputError):
        return str(error)
    first = (str(error).strip().splitlines() or [""])[0][:200]
    return f"It failed: {type(error).__name__}{': ' if first else ''}{first}"


def _ratios(result: Result, baseline: Result, group: str | None = None) -> list[float]:
    return [own / other for own, other in zip(result.rates(group), baseline.rates(group), strict=True)]


def _rows(found: Race) -> int:
    return len(found.prompts[0])


@torch.inference_mode()
def _likelihood(found: Race, result: Result, among: BenchmarkContext, scores: dict) -> float:
    """Nats per new token under the base at temperature 1, over all repetitions; a text that was met is not scored again."""
    total, count = 0.0, 0
    prompts = [prompt.tokens for chunk in found.prompts for prompt in chunk]
    for repetition in range(len(result.groups)):
        for number, text in enumerate(result.texts(repetition)):
            key = (number, tuple(text))
            if key not in scores:
                sequence = torch.tensor([*prompts[number], *text], device=among.model.device)
                scores[key] = log_likelihood(among.model, sequence, len(prompts[number]))
            total, count = total + scores[key], count + len(text)
    return total / max(1, count)


def _ids(chunk: Sequence[Prompt]) -> list[list[int]]:
    return [list(prompt.tokens) for prompt in chunk]
