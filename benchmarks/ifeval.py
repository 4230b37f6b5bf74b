"""IFEval through our decoding: what exact, budgeted and dynamic decoding do to the quality of SmolLM2's answers.

    pip install 'lm-eval[ifeval]'
    python -m benchmarks.ifeval models/smollm2-135m-instruct ../shared/data results/smollm2 [--prompts 541]

Prompts whose answers a program can check, scored by lm-eval's own functions (strict and loose). Every mode answers the
same prompts greedily, at most 384 tokens; differences to strict decoding are paired by prompt, with 95 % bootstrap
intervals. Strict decoding writes the base's own text, so its score is the base's. Sentences are counted without nltk's
model of English. Answers stay in runs/, so that a stopped run goes on.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.smollm2 import answered, opened
from dynamo_lm import DynaMoForCausalLM
from dynamo_lm.files import write_text
from dynamo_lm.jsonl_cache import JsonlLog
from recipes.smollm2.prompts import json_lines

NEW_TOKENS, REDRAWS = 384, 10_000
MODES: dict[str, dict[str, Any]] = {
    "strict": {"verify": "strict"},
    "budget 0.05": {"verify": 0.05},
    "budget 0.2": {"verify": 0.2},
    "off": {"verify": "off"},
}


def answer(
    model: DynaMoForCausalLM, tokenizer: Any, prompts: list[dict[str, Any]], mode: str, log: JsonlLog
) -> dict[int, dict[str, Any]]:
    """The answers of one mode by prompt, of the log and new ones, which are appended to it."""
    done = {record["key"]: record for record in log.records if record["mode"] == mode}
    asked = [prompt for prompt in prompts if prompt["key"] not in done]
    settings = {**MODES[mode], "temperature": 0.0, "tree": 0}
    began, tokens = time.monotonic(), 0
    for sequence in answered(model, tokenizer, [prompt["prompt"] for prompt in asked], settings, NEW_TOKENS):
        key, counts = asked[sequence.number]["key"], sequence.statistics
        text = tokenizer.decode(sequence.new_tokens, skip_special_tokens=True)
        record = {"mode": mode, "key": key, "text": text, "tokens": counts.new_tokens, "steps": counts.forwards}
        log.append(record)
        done[key] = record
        tokens += counts.new_tokens
        rate = tokens / (time.monotonic() - began)
        print(f"{mode}: {len(done)} of {len(prompts)} answers, {rate:.0f} tokens/s", flush=True)
    return done


def scores(prompts: list[dict[str, Any]], answers: dict[int, dict[str, Any]]) -> np.ndarray:
    """Whether all instructions of each prompt are followed, strictly and loosely: (prompts, 2) of 0 and 1."""
    from lm_eval.tasks.ifeval import instructions_util, utils

    # The sentence model of English is a download. Capital words are counted the same without it; sentences end at any full
    # stop, question mark or exclamation mark, also after abbreviations, in all modes alike.
    instructions_util._get_sentence_tokenizer = instructions_util.nltk.tokenize.PunktSentenceTokenizer
    instructions_util.nltk.word_tokenize = functools.partial(
        instructions_util.nltk.tokenize.word_tokenize, preserve_line=True
    )
    judges = (utils.test_instruction_following_strict, utils.test_instruction_following_loose)
    rows = []
    for prompt in prompts:
        example = utils.InputExample(prompt["key"], prompt["instruction_id_list"], prompt["prompt"], prompt["kwargs"])
        text = answers[prompt["key"]]["text"]
        rows.append([judge(example, text).follow_all_instructions for judge in judges])
    return np.array(rows, dtype=float)


def summary(found: dict[str, np.ndarray], answers: dict[str, dict[int, dict[str, Any]]]) -> dict[str, Any]:
    """By mode: the shares, their paired differences to strict with intervals, tokens per step, equal texts."""
    result = {}
    draws = np.random.default_rng(0).integers(0, len(found["strict"]), (REDRAWS, len(found["strict"])))
    for mode, values in found.items():
        records, base = answers[mode], answers["strict"]
        difference = values - found["strict"]
        spread = np.quantile(difference[draws].mean(1), (0.025, 0.975), axis=0).round(4)
        result[mode] = {
            "prompts": len(values),
            "strict": round(values[:, 0].mean(), 4),
            "loose": round(values[:, 1].mean(), 4),
            "difference": difference.mean(0).round(4).tolist(),
            "interval_95": spread.T.tolist(),
            "tokens_per_step": round(
                sum(each["tokens"] for each in records.values()) / sum(each["steps"] for each in records.values()), 3
            ),
            "same_text": round(float(np.mean([records[key]["text"] == base[key]["text"] for key in base])), 3),
        }
    return result


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "# IFEval of SmolLM2-135M-Instruct with its heads",
        "",
        "| mode | prompts | all instructions followed | difference to strict, loose | tokens per step | same text |",
        "|---|---|---|---|---|---|",
    ]
    for mode, entry in result.items():
        low, high = (f"{value * 100:+.1f}" for value in entry["interval_95"][1])
        lines.append(
            f"| {mode} | {entry['prompts']} | {entry['strict']:.1%} strict, {entry['loose']:.1%} loose | "
            f"{entry['difference'][1] * 100:+.1f} ({low} to {high}) points | {entry['tokens_per_step']:.2f} | "
            f"{entry['same_text']:.0%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--base", default=None)
    parser.add_argument("--prompts", type=int, default=541)
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=list(MODES))
    parser.add_argument("--answers", type=Path, default=Path("runs/smollm2/ifeval.jsonl"))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = opened(arguments.model, arguments.base)
    prompts = list(json_lines(arguments.data / "bench" / "ifeval.jsonl"))[: arguments.prompts]
    log = JsonlLog(arguments.answers)
    answers = {mode: answer(model, tokenizer, prompts, mode, log) for mode in arguments.modes}
    answers = {mode: {prompt["key"]: of[prompt["key"]] for prompt in prompts} for mode, of in answers.items()}
    result = summary({mode: scores(prompts, of) for mode, of in answers.items()}, answers)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_text(arguments.out / "ifeval.json", json.dumps({"new_tokens": NEW_TOKENS, "modes": result}, indent=1) + "\n")
    write_text(arguments.out / "ifeval.md", table(result))
    print(table(result))


if __name__ == "__main__":
    main()
