"""Tokens per step of SmolLM2-135M-Instruct's heads, by task group, with intervals: what `results/smollm2/` holds.

    python -m benchmarks.smollm2 models/smollm2-135m-instruct ../shared/data results/smollm2 [--prompts 24]

Greedy and sampled at temperature 1, verified strictly, chains of drafts, on the six groups of Spec-Bench, on HumanEval,
GSM8K and on Dolly prompts that are in no training line (`recipes.smollm2.prompts` writes them). `--contexts` adds
questions about passages of novels that long; novels are not trained on, either. First turns only; 128 new tokens. Tokens
per step are all tokens over all steps; the interval is a bootstrap over prompts. No time is measured: prompts run in
batches. Finished configurations stay in the results file, so that a stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from dynamo_lm import DynaMoForCausalLM
from dynamo_lm.data.chat_template import encode_chat, end_of_turn
from dynamo_lm.decoding.batch import Batch
from dynamo_lm.decoding.sequence import SequenceState
from dynamo_lm.decoding.settings import resolve
from dynamo_lm.files import write_text
from dynamo_lm.kernels.linear import arrange_for_batches
from recipes.smollm2.prompts import json_lines

NEW_TOKENS = 128
ROWS = 16  # prompts at a time
SPEC_GROUPS = {
    "translation": "translation",
    "summarization": "summarization",
    "qa": "qa",
    "math_reasoning": "math",
    "rag": "rag",
}
LONGEST = 8064  # tokens of a prompt; longer ones keep their end
ROOM = 64  # tokens of a prompt beside its passage
REDRAWS = 2000


def groups(data: Path, held_out: Path, count: int) -> dict[str, list[str]]:
    """Prompts by group, the first `count` of each."""
    bench = data / "bench"
    prompts: dict[str, list[str]] = {"mt_bench": [record["turns"][0] for record in json_lines(bench / "mt_bench.jsonl")]}
    for record in json_lines(bench / "spec_bench.jsonl"):
        if record["category"] in SPEC_GROUPS:
            prompts.setdefault(SPEC_GROUPS[record["category"]], []).append(record["turns"][0])
    prompts["gsm8k"] = [record["question"] for record in json_lines(bench / "gsm8k_test.jsonl")]
    code = json_lines(bench / "HumanEval.jsonl.gz")
    prompts["human_eval"] = ["Complete this Python function.\n\n" + record["prompt"] for record in code]
    prompts["dolly_held_out"] = [record["prompt"] for record in json_lines(held_out)]
    return {name: lines[:count] if name != "mt_bench" else lines for name, lines in prompts.items()}


def contexts(data: Path, tokenizer: Any, lengths: list[int], count: int) -> dict[str, list[str]]:
    """Prompts of so many tokens by group: passages of novels, with a question that is answered from them."""
    novels = sorted((data / "novels").glob("*.txt"))[:count]
    found: dict[str, list[str]] = {f"context_{length}": [] for length in lengths}
    for novel in novels:
        ids = tokenizer(novel.read_text(encoding="utf-8", errors="ignore")[20_000:80_000])["input_ids"]
        for length in lengths:
            passage = tokenizer.decode(ids[: length - ROOM])
            found[f"context_{length}"].append(f"{passage}\n\nDescribe in detail what happens in this passage.")
    return found


def opened(name: str, base: str | None, dtype: str = "bfloat16") -> tuple[DynaMoForCausalLM, Any]:
    """The model in this folder and its tokenizer; base: of heads alone, if it is not where the folder says."""
    kwargs = {"base": base} if base else {}
    model = DynaMoForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype), **kwargs).eval()
    return model, AutoTokenizer.from_pretrained(name)


def answered(
    model: DynaMoForCausalLM, tokenizer: Any, prompts: Sequence[str], settings: dict[str, Any], new_tokens: int
) -> Iterator[SequenceState]:
    """One answer of the model to each prompt, as a chat turn, as they end; `number` is the place of its prompt."""
    ends = [end_of_turn(tokenizer), tokenizer.eos_token_id]
    options = resolve(model, settings, max_new_tokens=new_tokens, end_tokens=ends)
    encoded = [encode_chat(tokenizer, [{"role": "user", "content": text}])[-LONGEST:] for text in prompts]
    waiting = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
    batch = Batch(model, options.num_heads)
    arrange_for_batches(batch.model, ROWS * options.num_heads)
    while waiting or batch.running:
        while waiting and len(batch.running) < ROWS:
            number = waiting.pop()
            batch.join(encoded[number], options, seed=number, number=number)
        yield from (sequence for sequence in batch.step() if sequence.finished)


def per_step(tokens: np.ndarray, steps: np.ndarray) -> dict[str, Any]:
    """All tokens over all steps, (prompts,) each, with a bootstrap interval over prompts."""
    draws = np.random.default_rng(0).integers(0, len(tokens), (REDRAWS, len(tokens)))
    ratios = tokens[draws].sum(1) / steps[draws].sum(1)
    interval = [round(float(q), 3) for q in np.quantile(ratios, (0.025, 0.975))]
    return {"tokens_per_step": round(float(tokens.sum() / steps.sum()), 3), "interval_95": interval}


def run(
    model: DynaMoForCausalLM, tokenizer: Any, prompts: list[str], *, num_heads: int, temperature: float, lookup: int
) -> dict[str, Any]:
    """Tokens and steps of every prompt, and acceptance by head; lookup: drafts from the text itself, at most."""
    settings = {"num_heads": num_heads, "temperature": temperature, "verify": "strict", "tree": 0}
    settings |= {"prompt_lookup_num_tokens": lookup}
    answers = sorted(answered(model, tokenizer, prompts, settings, NEW_TOKENS), key=lambda sequence: sequence.number)
    statistics = [sequence.statistics for sequence in answers]
    tokens = np.array([each.new_tokens for each in statistics], dtype=float)
    steps = np.array([each.forwards for each in statistics], dtype=float)
    proposed = np.sum([each.proposed for each in statistics], axis=0)
    accepted = np.sum([each.accepted for each in statistics], axis=0)
    return {
        "prompts": len(prompts),
        "tokens": int(tokens.sum()),
        **per_step(tokens, steps),
        "acceptance": [round(float(a / max(p, 1)), 3) for a, p in zip(accepted, proposed, strict=True)],
        "looked_up": sum(each.looked_up for each in statistics),
        "lookup_accepted": sum(each.lookup_accepted for each in statistics),
    }


def cell(entry: dict[str, Any]) -> str:
    """Tokens per step with their interval."""
    low, high = entry["interval_95"]
    return f"{entry['tokens_per_step']:.2f} ({low:.2f} to {high:.2f})"


def table(results: dict[str, Any]) -> str:
    """Markdown: a row for each group and configuration."""
    runs = results["runs"]
    lines = ["| group | heads, temperature | tokens per step |", "|---|---|---|"]
    for group in dict.fromkeys(group for groups in runs.values() for group in groups):
        lines += [f"| {group} | {name} | {cell(runs[name][group])} |" for name in runs if group in runs[name]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--base", default=None)
    parser.add_argument("--held-out", type=Path, default=Path("runs/smollm2/heldout.jsonl"))
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--contexts", type=int, nargs="*", default=[], help="tokens of prompts behind passages of novels")
    parser.add_argument("--label", default="", help="before the names of the columns, such as 'eagle3 '")
    parser.add_argument("--only", nargs="*", default=None, help="groups")
    parser.add_argument("--heads", type=int, nargs="*", default=[4])
    parser.add_argument("--temperatures", type=float, nargs="*", default=[0.0, 1.0])
    parser.add_argument("--plain", action="store_true", help="also without tables and coupling")
    parser.add_argument("--prompt-lookup", type=int, default=0, help="drafts from the text itself; at most heads - 1 count")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = opened(arguments.model, arguments.base, arguments.dtype)
    file = arguments.out / "tokens_per_step.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"new_tokens": NEW_TOKENS, "runs": {}}
    prompts = groups(arguments.data, arguments.held_out, arguments.prompts)
    prompts |= contexts(arguments.data, tokenizer, arguments.contexts, arguments.prompts)
    parts = {"": (model.coupling, model.cooccurrence)}
    if arguments.plain:
        parts |= {" heads alone": (None, None)}
        if model.coupling is not None and model.cooccurrence is not None:
            parts |= {" coupling": (model.coupling, None), " tables": (None, model.cooccurrence)}
    for group in arguments.only or prompts:
        for label, (model.coupling, model.cooccurrence) in parts.items():
            for num_heads in arguments.heads:
                for temperature in arguments.temperatures:
                    lookup = " lookup" if arguments.prompt_lookup else ""
                    name = f"{arguments.label}n={num_heads} T={temperature:g}{label}{lookup}"
                    if group in results["runs"].setdefault(name, {}):
                        continue
                    model.runtime = type(model.runtime)()
                    how = {"num_heads": num_heads, "temperature": temperature, "lookup": arguments.prompt_lookup}
                    entry = run(model, tokenizer, prompts[group], **how)
                    results["runs"][name][group] = entry
                    arguments.out.mkdir(parents=True, exist_ok=True)
                    write_text(file, json.dumps(results, indent=1) + "\n")
                    print(f"{group} {name}: {entry}", flush=True)
    write_text(
        arguments.out / "tokens_per_step.md", "# Tokens per step of SmolLM2-135M-Instruct\n\n" + table(results) + "\n"
    )


if __name__ == "__main__":
    main()
