"""What the compiled sampler saves of a whole step: `python -m benchmarks.sampler > results/sampler.json`.

The sampler (top-k, drafting, look-ups, verification, draws of Algorithm 1) exists twice in the product: compiled, and in
NumPy and torch. A second copy has to earn 5 % of a step on a model that people run. Here both decode the same prompts in
turn, within one process, on the shape of SmolLM2-135M with random weights and a synthetic table, and on the bundled story
model. Reported are milliseconds of processor time per step of each, the median over repetitions of the saving within a
repetition, and its range. With --functions: microseconds of single functions.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from transformers import LlamaConfig

from benchmarks.random_model import random_model, random_prompts, random_table
from dynamo_lm import DynaMoForCausalLM
from dynamo_lm.assets import bundled
from dynamo_lm.decoding.verification import accept_sampled
from dynamo_lm.kernels import loader
from dynamo_lm.sampling.algorithm1 import draw_from
from dynamo_lm.sampling.drafting import draft_from
from dynamo_lm.sampling.options import Algorithm1
from dynamo_lm.sampling.top_k import HeadCandidates

SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
MODES: dict[str, dict[str, Any]] = {
    "strict, greedy, n=3": {"verify": "strict", "num_heads": 3, "tree": 0},
    "strict, sampled, n=3": {"verify": "strict", "num_heads": 3, "do_sample": True},
    "strict, greedy, n=4": {"verify": "strict", "num_heads": 4, "tree": 0},
    "off, eps_b=0.3, n=3": {"verify": "off", "num_heads": 3, "do_sample": True, "eps_b": 0.3},
    "off, eps_b=0, n=3": {"verify": "off", "num_heads": 3, "do_sample": True, "eps_b": 0.0},
}


def measure(model: DynaMoForCausalLM, prompt: torch.Tensor, options: dict[str, Any], tokens: int, repetitions: int) -> dict:
    """Milliseconds per step with the compiled sampler and without, alternating."""
    compiled = loader.sampler()
    times: dict[bool, list[float]] = {True: [], False: []}
    try:
        for repetition in range(repetitions + 1):  # the first one warms up
            for use in (True, False):
                loader._sampler = compiled if use else None
                began = time.process_time()
                output = model.generate(
                    prompt, max_new_tokens=tokens, seed=repetition, return_dict_in_generate=True, **options
                )
                if repetition:
                    times[use].append(1000 * (time.process_time() - began) / output.statistics[0].forwards)
    finally:
        loader._sampler = compiled
    savings = [1 - fast / slow for fast, slow in zip(times[True], times[False], strict=True)]
    return {
        "ms_compiled": statistics.median(times[True]),
        "ms_numpy": statistics.median(times[False]),
        "saved": {"median": statistics.median(savings), "min": min(savings), "max": max(savings)},
    }


def functions() -> dict[str, tuple[float, float]]:
    """Microseconds of processor time of single functions, compiled and not."""
    result: dict[str, tuple[float, float]] = {}
    generator = torch.Generator().manual_seed(0)

    def add(name: str, call: Callable[[], Any], calls: int = 50) -> None:
        medians = []
        for used in (loader.sampler(), None):
            with patch.object(loader, "_sampler", used):
                call()
                times = []
                for _ in range(calls):
                    began = time.thread_time_ns()
                    call()
                    times.append(time.thread_time_ns() - began)
            medians.append(statistics.median(times) / 1000)
        result[name] = medians[0], medians[1]

    for vocabulary in (4096, 49152):
        logits = 2 * torch.randn(4, vocabulary, generator=generator)
        add(f"candidates of 3 heads, vocabulary {vocabulary}", lambda: HeadCandidates.top(logits[:3], 50, 0.7))  # noqa: B023
        ids, q = logits[:3].topk(50).indices, torch.full((3, 50), 1 / 50, dtype=torch.float64)
        step = logits, ids[:, 0].tolist(), list(zip(ids, q, strict=True)), generator
        add(f"rejection rule, 3 drafts, vocabulary {vocabulary}", lambda: accept_sampled(*step))  # noqa: B023
    table, present = random_table(49152, 1_000_000, seed=0), np.zeros(49152, bool)
    likely = 3 / (1 + torch.arange(49152) / 200)  # low ids are the table's frequent tokens
    heads = [HeadCandidates.top(1.5 * torch.randn(3, 49152, generator=generator) + likely, 50, 0.7) for _ in range(12)]
    turn = itertools.cycle(heads)
    for eps_b in (0.5, 0.3, 0.0):
        options = Algorithm1(eps_b=eps_b)
        add(f"draw, eps_b {eps_b}", lambda: draw_from(next(turn), present, table, options, generator))  # noqa: B023
    how: dict[str, Any] = {"alpha_c": 0.5, "temperature": 1.0, "generator": generator, "greedy": False}
    text = torch.randint(300, (500,), generator=generator).numpy()
    add("chain of drafts", lambda: draft_from(next(turn).of(1, 3), text, table, **how))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--functions", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not loader.available(wait=True):
        raise SystemExit("The kernels cannot be built here, so there is nothing to compare.")
    if arguments.functions:
        json.dump(functions(), sys.stdout, indent=1)
        return
    dtype = torch.bfloat16
    shape: Any = LlamaConfig(**SMOLLM2)
    large = random_model(shape, num_heads=4, dtype=dtype, device="cpu", table_rows=2_000_000, seed=0)
    prompt = torch.tensor([random_prompts(SMOLLM2["vocab_size"], count=1, length=32, seed=0)[0].tokens])
    story = DynaMoForCausalLM.from_pretrained(bundled(), dtype=dtype).eval()
    story_prompt = torch.arange(5, 17)[None]
    result: dict[str, Any] = {"threads": arguments.threads, "dtype": "bfloat16", "rows": []}
    for name, model, ids in (("SmolLM2-135M shape", large, prompt), ("story", story, story_prompt)):
        for mode, options in MODES.items():
            options = {"do_sample": False, **options}
            row = measure(model, ids, options, arguments.tokens, arguments.repetitions)
            result["rows"].append({"model": name, "mode": mode, **row})
            print(f"{name}, {mode}: {row}", file=sys.stderr)
    json.dump(result, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
