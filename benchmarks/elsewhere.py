"""An exported EAGLE-3 head in llama.cpp against llama.cpp alone: `results/smollm2/llama_cpp.json`.

    dynamo-lm export models/smollm2-135m-instruct-eagle3 --base BASE --to gguf --with-base q8_0 --out served
    python -m benchmarks.elsewhere served/draft.gguf BASE ../shared/data results/smollm2 --gguf served/base.gguf

Greedy, chat prompts of MT-bench, 128 new tokens, one prompt at a time; llama.cpp's own clock. With and without the head take
turns on every prompt; the ratio is the median over prompts and repetitions, with its quartiles. Needs the extra `bench`.
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

NEW_TOKENS, DRAFT_TOKENS = 128, 3


def race(gguf: Path, draft: Path, prompts: list[list[int]], *, threads: int, repetitions: int) -> dict[str, Any]:
    """Seconds of both by prompt and repetition, in turn."""
    longest = max(map(len, prompts)) + NEW_TOKENS + 64
    common: dict[str, Any] = {"context": longest, "threads": threads, "cache_type": "F16"}
    plain = LlamaCpp(str(gguf), **common)
    drafted = LlamaCpp(str(gguf), **common, draft=str(draft), draft_tokens=DRAFT_TOKENS)
    ratios, rates, steps, tokens, same = [], [], 0, 0, 0
    try:
        for prompt in prompts:
            for _ in range(repetitions):
                (alone, slow), (with_head, fast) = (each.generate(prompt, NEW_TOKENS, []) for each in (plain, drafted))
                ratios.append(slow / fast)
                rates.append(len(alone) / slow)
            same += alone == with_head
            print(
                f"{gguf.name}: {len(rates)} of {len(prompts) * repetitions} pairs, ratio {np.median(ratios):.2f}", flush=True
            )
            tokens, steps = tokens + len(with_head), steps + len(with_head) - drafted.accepted
    finally:
        plain.close()
        drafted.close()
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75)).round(3).tolist()
    return {
        "file": gguf.name,
        "threads": threads,
        "prompts": len(prompts),
        "repetitions": repetitions,
        "ratio": middle,
        "quartiles": [low, high],
        "tokens_per_second_alone": round(float(np.median(rates)), 1),
        "tokens_per_step": round(tokens / steps, 3),
        "same_text": same,
    }


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
        race(gguf, arguments.draft, prompts, threads=threads, repetitions=arguments.repetitions)
        for gguf in arguments.gguf
        for threads in arguments.threads
    ]
    lines = [
        "| base | threads | llama.cpp alone | with the head | tokens per step | same text |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["quartiles"]
        lines.append(
            f"| {row['file']} | {row['threads']} | {row['tokens_per_second_alone']} tokens/s | "
            f"{row['ratio']:.2f} ({low:.2f}-{high:.2f}) | {row['tokens_per_step']:.2f} of {DRAFT_TOKENS + 1} | "
            f"{row['same_text']}/{row['prompts']} |"
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    record = {"llama_cpp": facts(), "new_tokens": NEW_TOKENS, "rows": rows}
    write_text(arguments.out / "llama_cpp.json", json.dumps(record, indent=1) + "\n")
    write_text(arguments.out / "llama_cpp.md", "# An EAGLE-3 head in llama.cpp\n\n" + "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
