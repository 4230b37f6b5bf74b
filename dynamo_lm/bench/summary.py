"""What follows from a race, as plain numbers: speeds and their ratios, agreement of texts, likelihoods, the floor.

Texts are scored when all clocks have stopped.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dynamo_lm.bench.methods import Method
from dynamo_lm.bench.race import Race, Result
from dynamo_lm.bench.roofline import floor_seconds, head_bytes, weight_bytes
from dynamo_lm.bench.runners import BenchmarkContext
from dynamo_lm.model.modeling import DynaMoForCausalLM

Scores = dict[tuple[int, tuple[int, ...]], float]  # of a prompt's number and a text


def summaries(race: Race, context: BenchmarkContext, *, trained: bool = True) -> list[dict[str, Any]]:
    """Plain numbers of every method, in order.

    Args:
        trained: whether the weights are, so that texts and their likelihoods mean something.
    """
    scores: Scores = {}
    return [_summary(race, result, context, scores if trained else None) for result in race.results]


def _summary(race: Race, result: Result, context: BenchmarkContext, scores: Scores | None) -> dict[str, Any]:
    meaningful = not result.method.synthetic
    method, baseline = result.method, race.baseline(result.method.kind)
    total, base = result.tally(), baseline.tally()
    per_step = total.tokens / total.steps
    ratio = spread(_ratios(result, baseline))
    outputs = [output for repetition in result.outputs for output in repetition]
    pairs = [list(pairwise(text)) for output in outputs for text in output.texts]
    same, texts = race.result(method.identical_to), result.texts()
    sizes = [size for output in outputs for steps in output.step_sizes for size in steps]
    return {
        "name": method.name,
        "engine": method.engine,
        "model": method.model,
        "arguments": method.arguments,
        "kind": method.kind,
        "lossless": method.lossless,
        "one_token": method.one_token,
        "baseline": baseline.method.name,
        "ceiling": method.ceiling,
        "tokens_per_second": spread(result.rates()),
        "ratio": ratio,
        "tokens_per_step": per_step,
        "histogram": [sizes.count(size) for size in range(1, max(sizes, default=0) + 1)],
        "efficiency": ratio["median"] / per_step,
        "efficiency_ceiling": _efficiency_ceiling(method, context),
        "step_seconds": total.seconds / total.steps * len(race.prompts[0]),
        "step_cost": (total.seconds / total.steps) / (base.seconds / base.steps),
        "tokens": total.tokens,
        "steps": total.steps,
        "setup_seconds": result.setup_seconds,
        "identical_to": method.identical_to,
        "identical": agreement(texts, same.texts()) if same is not None else None,
        "synthetic": method.synthetic,
        "identical_to_baseline": agreement(texts, baseline.texts()) if method.kind == "greedy" and meaningful else None,
        "regret": sum(output.regret for output in outputs) / max(1, sum(output.scored for output in outputs))
        if meaningful
        else None,
        "distinct_bigrams": statistics.mean(len(set(text)) / max(1, len(text)) for text in pairs) if meaningful else None,
        "log_likelihood": _likelihood(race, result, context, scores) if scores is not None else None,
        "groups": {
            group: {
                "tokens_per_second": spread(result.rates(group)),
                "ratio": spread(_ratios(result, baseline, group)),
                "tokens_per_step": result.tally(group=group).tokens / result.tally(group=group).steps,
            }
            for group in result.groups[0]
        },
    }


def floor(race: Race, context: BenchmarkContext, max_new_tokens: int) -> dict[str, Any]:
    """The machine's floor for this race, as tokens a second, and every one-token method's time as a multiple of it."""
    base, batch = context.model.base, len(race.prompts[0])
    length = statistics.mean(len(prompt.tokens) + max_new_tokens / 2 for chunk in race.prompts for prompt in chunk)
    memory = statistics.median(bandwidth.best for bandwidth in race.bandwidths)
    resident = statistics.median(bandwidth.best for bandwidth in race.resident)
    seconds = floor_seconds(base, length, memory, batch=batch)
    speed = batch / seconds
    return {
        "name": "memory-bandwidth floor",
        "weight_bytes": weight_bytes(base),
        "mean_length": length,
        "bytes_per_second": {
            "read": statistics.median(bandwidth.read for bandwidth in race.bandwidths),
            "copy": statistics.median(bandwidth.copy for bandwidth in race.bandwidths),
            "resident": resident,  # of a buffer of the weights' size: more, where the CPU's caches hold the weights
        },
        "step_seconds": seconds,
        "tokens_per_second": speed,
        "resident_tokens_per_second": batch / floor_seconds(base, length, resident, batch=batch),
        "ratio": speed / statistics.median(race.baseline("greedy").rates()),
        "multiples": {
            result.method.name: speed / statistics.median(result.rates())
            for result in race.results
            if result.method.one_token
        },
    }


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


@torch.inference_mode()
def log_likelihood(model: DynaMoForCausalLM, sequence: Tensor, prompt_length: int) -> float:
    """Sum over the new tokens of log p under the base at temperature 1, in nats. sequence: (length,)."""
    log_p = model.base(sequence[None]).logits[0, prompt_length - 1 : -1].float().log_softmax(-1)
    return float(log_p.gather(-1, sequence[prompt_length:, None]).sum())


def _ratios(result: Result, baseline: Result, group: str | None = None) -> list[float]:
    return [own / other for own, other in zip(result.rates(group), baseline.rates(group), strict=True)]


def _efficiency_ceiling(method: Method, context: BenchmarkContext) -> float | None:
    """What would be left of the tokens per step if reading weights, each of them once, were all that steps took."""
    if method.engine != "dynamo" or method.one_token:
        return None
    read = weight_bytes(context.model.base)
    return read / (read + head_bytes(context.models[method.model], method.arguments["num_heads"]))


def _likelihood(race: Race, result: Result, context: BenchmarkContext, scores: Scores) -> float:
    """Nats per new token under the base at temperature 1, over all repetitions; every different text is scored once."""
    total, count = 0.0, 0
    prompts = [prompt.tokens for chunk in race.prompts for prompt in chunk]
    for repetition in range(race.repetitions):
        for number, text in enumerate(result.texts(repetition)):
            key = (number, tuple(text))
            if key not in scores:
                sequence = torch.tensor([*prompts[number], *text], device=context.model.device)
                scores[key] = log_likelihood(context.model, sequence, len(prompts[number]))
            total, count = total + scores[key], count + len(text)
    return total / max(1, count)
