"""Tokens per step and quality of the bundled model at several settings: `python -m benchmarks.story > results/story.json`.

Story openings that are in no training text. Counts tokens and forwards, which do not depend on
the machine; for seconds see `dynamo-lm demo`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

from dynamo_lm import DynaMoForCausalLM
from dynamo_lm.assets import bundled
from dynamo_lm.bench.benchmark import open_context
from dynamo_lm.bench.methods import Method, dynamo
from dynamo_lm.bench.prompts import Prompt
from dynamo_lm.bench.race import race
from dynamo_lm.bench.summary import summaries

PROMPTS = Path(__file__).with_name("openings.txt")
ONE = "one token, greedy"
DRAWN = "one token, sampled"
COUNTS = (  # of a summary: one repetition is not a measurement of time
    "name",
    "arguments",
    "baseline",
    "ceiling",
    "tokens_per_step",
    "tokens",
    "steps",
    "histogram",
    "log_likelihood",
    "distinct_bigrams",
    "regret",
    "identical",
)


def methods(num_heads: int) -> list[Method]:
    """Strict greedy at every n and mask strength, as trees and on a budget; Algorithm 1 over eps_b, whole and in parts."""
    listed = [dynamo(ONE, {"verify": "strict", "num_heads": 1})]
    for n in range(2, num_heads + 1):
        for alpha_c in (0.0, 0.5, 1.0):
            name = f"strict, greedy, n={n}, alpha_c={alpha_c}"
            arguments = {"verify": "strict", "num_heads": n, "alpha_c": alpha_c, "tree": 0}
            listed.append(dynamo(name, arguments, identical_to=ONE))
    for drafts in (3, 7, 15):
        name = f"strict, greedy, n={num_heads}, tree of {drafts}"
        listed.append(dynamo(name, {"verify": "strict", "num_heads": num_heads, "tree": drafts}, identical_to=ONE))
    for budget in (0.02, 0.05, 0.1, 0.2, 0.5):
        name = f"budget {budget} nats per token, n={num_heads}"
        listed.append(dynamo(name, {"verify": budget, "num_heads": num_heads}))
    off = {"verify": "off", "do_sample": True}
    listed.append(dynamo(DRAWN, {**off, "num_heads": 1}))
    for n in range(3, num_heads + 1):
        for eps_b in (0.7, 0.5, 0.3, 0.1, 0.0):
            listed.append(dynamo(f"off, n={n}, eps_b={eps_b}", {**off, "num_heads": n, "eps_b": eps_b}))
    for part, change in (("no Otsu", {"otsu": False}), ("no blur", {"blur": False}), ("no mask", {"alpha_c": 0.0})):
        listed.append(dynamo(f"off, n=3, eps_b=0.5, {part}", {**off, "num_heads": 3, "eps_b": 0.5, **change}))
    return listed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=None)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=80)
    parser.add_argument("--only", default="", help="run the methods whose name contains this, and the baselines")
    arguments = parser.parse_args()
    folder = arguments.model or str(bundled())
    model = DynaMoForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()[: arguments.prompts]
    prompts = [Prompt("openings", tuple(tokenizer(line).input_ids)) for line in lines]
    context = open_context(model)
    listed = methods(model.num_heads)
    outcome = race(
        context,
        prompts,
        [method for method in listed if method.name in (ONE, DRAWN) or arguments.only in method.name],
        max_new_tokens=arguments.new_tokens,
        repetitions=1,
        bandwidth_bytes=0,
        warm_up_tokens=8,
        progress=lambda name, done, total: print(f"{done} of {total}: {name}", file=sys.stderr),
    )
    rows = []
    for row in summaries(outcome, context):
        rows.append({name: row[name] for name in COUNTS})
        print(
            f"{row['name']:42s} {row['tokens_per_step']:.2f} of {row['ceiling']}  ll {row['log_likelihood']:.3f}  "
            f"distinct {row['distinct_bigrams']:.2f}  regret {row['regret']:.3f}  {row['identical']}",
            file=sys.stderr,
        )
    print(json.dumps({"prompts": len(prompts), "new_tokens": arguments.new_tokens, "methods": rows}, indent=1))


if __name__ == "__main__":
    main()
