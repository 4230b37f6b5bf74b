"""Tokens per step and quality of the bundled model over the dial: `python -m benchmarks.story > results/story.json`.

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
from dynamo_lm.bench.prompt_race import Method, race

PROMPTS = Path(__file__).with_name("openings.txt")
ONE = "one token, greedy"
DRAWN = "one token, sampled"


def ways(num_heads: int) -> list[Method]:
    """Strict greedy at every n and mask strength, as trees and on a budget; Algorithm 1 over eps_b, whole and in parts."""
    found = [Method(ONE, {"verify": "strict", "num_heads": 1}, ONE)]
    for n in range(2, num_heads + 1):
        for alpha_c in (0.0, 0.5, 1.0):
            name = f"strict, greedy, n={n}, alpha_c={alpha_c}"
            arguments = {"verify": "strict", "num_heads": n, "alpha_c": alpha_c, "tree": 0}
            found.append(Method(name, arguments, ONE, same_text_as=ONE))
    for drafts in (3, 7, 15):
        name = f"strict, greedy, n={num_heads}, tree of {drafts}"
        found.append(Method(name, {"verify": "strict", "num_heads": num_heads, "tree": drafts}, ONE, same_text_as=ONE))
    for budget in (0.02, 0.05, 0.1, 0.2, 0.5):
        name = f"budget {budget} nats per token, n={num_heads}"
        found.append(Method(name, {"verify": budget, "num_heads": num_heads}, ONE))
    found.append(Method(DRAWN, {"verify": "off", "do_sample": True, "num_heads": 1}, DRAWN))
    off = {"verify": "off", "do_sample": True}
    for n in range(3, num_heads + 1):
        for eps_b in (0.7, 0.5, 0.3, 0.1, 0.0):
            name = f"off, n={n}, eps_b={eps_b}"
            found.append(Method(name, {**off, "num_heads": n, "eps_b": eps_b}, DRAWN))
    for eps_b in (0.5,):
        for part, change in (("no Otsu", {"otsu": False}), ("no blur", {"blur": False}), ("no mask", {"alpha_c": 0.0})):
            found.append(
                Method(f"off, n=3, eps_b={eps_b}, {part}", {**off, "num_heads": 3, "eps_b": eps_b, **change}, DRAWN)
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=None)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=80)
    parser.add_argument("--only", default="", help="run the ways whose name contains this, and the baselines")
    arguments = parser.parse_args()
    folder = arguments.model or str(bundled())
    model = DynaMoForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = PROMPTS.read_text().splitlines()[: arguments.prompts]
    prompts = [tokenizer(line, return_tensors="pt").input_ids for line in lines]
    chosen = [way for way in ways(model.num_heads) if way.name in (ONE, DRAWN) or arguments.only in way.name]
    results = race(
        model,
        prompts,
        chosen,
        max_new_tokens=arguments.new_tokens,
        repetitions=1,
        progress=lambda name: print(name, file=sys.stderr),
    )
    rows = []
    for result in results:
        row = result.summary()
        del row["speed_up"], row["tokens_per_second"]  # one repetition: not a measurement of time
        rows.append(row)
        print(
            f"{row['name']:42s} {row['tokens_per_step']:.2f} of {row['ceiling']}  ll {row['log_likelihood']:.3f}  "
            f"distinct {row['distinct_bigrams']:.2f}  regret {row['mean_regret']:.3f}  {row['identical']}",
            file=sys.stderr,
        )
    print(json.dumps({"prompts": len(prompts), "new_tokens": arguments.new_tokens, "ways": rows}, indent=1))


if __name__ == "__main__":
    main()
