"""An exported EAGLE-3 head in llama.cpp against llama.cpp alone: `results/smollm2/llama_cpp.json`.

    dynamo-lm export models/smollm2-135m-instruct-eagle3 --base BASE --to gguf --with-base q8_0 --out served
    python -m benchmarks.elsewhere served/draft.gguf BASE ../shared/data results/smollm2 --gguf served/base.gguf

Greedy, chat prompts of MT-bench, 128 new tokens, one prompt at a time; llama.cpp's own clock. llama.cpp alone, with its
n-gram drafts (7 tokens after 3 that match), with one or three drafts of the head and with both take turns on every prompt;
ratios are to the first, medians over prompts and repetitions with their quartiles. Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from dynamo_lm.data.chat_template import encode_chat
from dynamo_lm.export.llama_cpp import LlamaCpp, facts
from dynamo_lm.files import write_text
from recipes.smollm2.prompts import json_lines

NEW_TOKENS, DRAFT_TOKENS, LOOKUP = 128, (1, 3), (3, 7)


def race(gguf: Path, draft: Path, prompts: list[list[int]], *, threads: int, repetitions: int) -> list[dict[str, Any]]:
    """A row for each way of drafting: seconds by prompt and repetition, in turn."""
    longest = max(map(len, prompts)) + NEW_TOKENS + 64
    common: dict[str, Any] = {"context": longest, "threads": threads, "cache_type": "F16"}
    ways: dict[str, dict[str, Any]] = {"alone": {}, "n-grams": {"lookup": LOOKUP}}
    for count in DRAFT_TOKENS:
        head = {"draft": str(draft), "draft_tokens": count}
        ways |= {f"head, at most {count}": head, f"n-grams and head, at most {count}": head | {"lookup": LOOKUP}}
    engines = {name: LlamaCpp(str(gguf), **common, **how) for name, how in ways.items()}
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    steps, same = dict.fromkeys(ways, 0), dict.fromkeys(ways, 0)
    rates, tokens = [], 0
    try:
        for number, prompt in enumerate(prompts):
            for _ in range(repetitions):
                done = {name: engine.generate(prompt, NEW_TOKENS, []) for name, engine in engines.items()}
                alone, slow = done["alone"]
                rates.append(len(alone) / slow)
                for name, (_, seconds) in done.items():
                    ratios[name].append(slow / seconds)
            tokens += len(alone)
            for name, (text, _) in done.items():
                steps[name] += len(text) - engines[name].accepted
                same[name] += text == alone
            print(f"{gguf.name}: {number + 1} of {len(prompts)} prompts", flush=True)
    finally:
        for engine in engines.values():
            engine.close()
    about = {"file": gguf.name, "threads": threads, "prompts": len(prompts), "repetitions": repetitions}
    about["tokens_per_second_alone"] = round(float(np.median(rates)), 1)
    return [
        {
            **about,
            "drafts": name,
            "ratio": round(float(np.median(ratios[name])), 3),
            "quartiles": np.quantile(ratios[name], (0.25, 0.75)).round(3).tolist(),
            "tokens_per_step": round(tokens / steps[name], 3),
            "same_text": same[name],
        }
        for name in ways
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("draft", type=Path)
    parser.add_argument("base", help="the base's folder, for its tokenizer and chat template")
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--gguf", type=Path, nargs="+", required=True, help="files of the base")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    questions = [record["turns"][0] for record in json_lines(arguments.data / "bench" / "mt_bench.jsonl")]
    step = len(questions) // arguments.prompts
    chosen = questions[::step][: arguments.prompts]
    prompts = [encode_chat(tokenizer, [{"role": "user", "content": question}]) for question in chosen]
    rows = [
        row
        for gguf in arguments.gguf
        for threads in arguments.threads
        for row in race(gguf, arguments.draft, prompts, threads=threads, repetitions=arguments.repetitions)
    ]
    lines = [
        "| base | threads | drafts | ratio to llama.cpp alone | tokens per step | same text |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["quartiles"]
        lines.append(
            f"| {row['file']} | {row['threads']} | {row['drafts']} | {row['ratio']:.2f} ({low:.2f}-{high:.2f}) | "
            f"{row['tokens_per_step']:.2f} | {row['same_text']}/{row['prompts']} |"
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    record = {"llama_cpp": facts(), "new_tokens": NEW_TOKENS, "rows": rows}
    write_text(arguments.out / "llama_cpp.json", json.dumps(record, indent=1) + "\n")
    write_text(arguments.out / "llama_cpp.md", "# An EAGLE-3 head in llama.cpp\n\n" + "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
