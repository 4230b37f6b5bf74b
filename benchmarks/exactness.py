"""Which texts are the same, bit for bit: strict greedy decoding, one token a step by the same loop, `base.generate`.

    python -m benchmarks.exactness story models/smollm2-135m-instruct --base runs/smollm2/base --out results/exactness.json
    python -m benchmarks.exactness --table results/exactness.json

One prompt at a time, float32 and bfloat16. Where two texts part, the gap between their two tokens says whether it is a tie:
the difference of the base's two logits there, by the base's own forward over the text so far. Runs that are in the results
file are not repeated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dynamo_lm import DynaMoForCausalLM
from dynamo_lm.backbone.token_limits import token_ids
from dynamo_lm.bench.tables import machine
from dynamo_lm.data.chat_template import encode_chat
from dynamo_lm.files import write_text
from dynamo_lm.kernels import loader
from dynamo_lm.model.loading import open_for_evaluation
from dynamo_lm.training.provenance import versions

HERE = Path(__file__).parent
PROMPTS = 20
DTYPES = ("float32", "bfloat16")
OWN, BASE, STRICT, TREES = "one token, own loop", "base.generate", "strict, chains", "strict, trees"
PAIRS = ((STRICT, OWN), (TREES, OWN), (STRICT, BASE), (TREES, BASE), (OWN, BASE))


def texts_of(
    model: DynaMoForCausalLM, prompts: list[list[int]], new: int, told: Callable[[str, int], None]
) -> dict[str, list[list[int]]]:
    """New tokens of every prompt in every way."""
    ends = list(token_ids(model.generation_config.eos_token_id))
    greedy: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "eos_token_id": ends or None}
    trees = 2 * model.num_heads
    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        BASE: lambda ids: model.base.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **greedy),
        OWN: lambda ids: model.generate(ids, num_heads=1, **greedy),
        STRICT: lambda ids: model.generate(ids, tree=0, **greedy),
        TREES: lambda ids: model.generate(ids, tree=trees, **greedy),
    }
    texts: dict[str, list[list[int]]] = {way: [] for way in ways}
    for number, prompt in enumerate(prompts):
        for way, run in ways.items():
            texts[way].append(run(torch.tensor([prompt]))[0, len(prompt) :].tolist())
        told("prompts", number + 1)
    return texts


@torch.inference_mode()
def gap(model: DynaMoForCausalLM, prompt: list[int], one: list[int], other: list[int]) -> float | None:
    """Where two texts part, how much higher one token's logit is than the other's; None where they do not."""
    place = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    if place is None:
        return None if len(one) == len(other) else float("inf")
    logits = model.base(torch.tensor([prompt + one[:place]])).logits[0, -1].float()
    return float((logits[one[place]] - logits[other[place]]).abs())


def compare(model: DynaMoForCausalLM, prompts: list[list[int]], texts: dict[str, list[list[int]]]) -> dict[str, Any]:
    """By pair of ways: texts that are the same, and the gaps where the others part."""
    result = {}
    for one, other in PAIRS:
        gaps = [gap(model, *each) for each in zip(prompts, texts[one], texts[other], strict=True)]
        parted = sorted(round(value, 4) for value in gaps if value is not None)
        result[f"{one} = {other}"] = {"same": len(gaps) - len(parted), "of": len(gaps), "gaps": parted}
    return result


def encoded(name: str, tokenizer: Any) -> list[list[int]]:
    """Openings of stories for the bundled model, questions as chat turns for others."""
    if name == "story":
        lines = (HERE / "openings.txt").read_text(encoding="utf-8").splitlines()[:PROMPTS]
        return [tokenizer(line).input_ids for line in lines]
    lines = (HERE / "questions.txt").read_text(encoding="utf-8").splitlines()[:PROMPTS]
    return [encode_chat(tokenizer, [{"role": "user", "content": line}]) for line in lines]


def table(results: dict[str, Any]) -> str:
    """Markdown: a row for each comparison, a column for each model and precision."""
    columns = {f"{Path(name).name}, {dtype}": run for name, runs in results["models"].items() for dtype, run in runs.items()}
    lines = ["| texts that are the same | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for one, other in PAIRS:
        cells = []
        for run in columns.values():
            entry = run[f"{one} = {other}"]
            widest = f" (gaps up to {entry['gaps'][-1]:g})" if entry["gaps"] else ""
            cells.append(f"{entry['same']} of {entry['of']}{widest}")
        lines.append(f"| {one} = {other} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--base", default=None, help="of folders that hold heads alone")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--table", type=Path, default=None, help="print this results file")
    arguments = parser.parse_args()
    if arguments.table is not None:
        print(table(json.loads(arguments.table.read_text(encoding="utf-8"))))
        return
    out: Path = arguments.out
    facts = {"machine": machine(torch.device("cpu")), "versions": versions(), "new_tokens": arguments.new_tokens}
    facts["kernels"] = loader.available(wait=True)
    results: dict[str, Any] = {**facts, "models": {}}
    if out.exists():
        results["models"] = json.loads(out.read_text(encoding="utf-8"))["models"]
    for name in arguments.models:
        for dtype in DTYPES:
            if dtype in results["models"].setdefault(name, {}):
                continue
            base = None if name == "story" else arguments.base
            model, tokenizer = open_for_evaluation(name, tokenizer=None, dtype=dtype, device="cpu", base=base)
            prompts = encoded(name, tokenizer)
            where = f"{name}, {dtype}"
            told = lambda what, count, where=where: print(f"{where}: {count} {what}", flush=True)  # noqa: E731
            texts = texts_of(model, prompts, arguments.new_tokens, told)
            results["models"][name][dtype] = compare(model, prompts, texts)
            write_text(out, json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
