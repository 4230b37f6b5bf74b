"""Which texts are the same, bit for bit: strict greedy decoding, one token a step by the same loop, `base.generate`.

    python -m benchmarks.exactness story --new-tokens 48 --out results/exactness.jsonl
    python -m benchmarks.exactness models/smollm2-135m-instruct --base runs/smollm2/base --new-tokens 32 \\
        --out results/exactness.jsonl
    python -m benchmarks.exactness models/smollm2-135m-instruct --base runs/smollm2/base --new-tokens 32 \\
        --dtypes int8 int4 --more ../shared/data/bench/vicuna_bench.jsonl --prompts 0 100 --out results/exactness.jsonl
    python -m benchmarks.exactness --table results/exactness.jsonl

One prompt at a time, by default float32 and bfloat16, all heads, defaults. Where two texts part, the gap between their two
tokens says whether it is a tie: the difference of the base's two logits there, by the base's own forward over the text so
far. The file
gets a line for each prompt; prompts that have one are not decoded again.
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
from dynamo_lm.data.chat_template import encode_chat
from dynamo_lm.kernels import loader
from dynamo_lm.kernels.quantized import FORMATS
from dynamo_lm.model.loading import open_for_evaluation
from dynamo_lm.training.provenance import versions

HERE = Path(__file__).parent
PROMPTS = 20
DTYPES = ("float32", "bfloat16")
OWN, BASE, STRICT = "one token, own loop", "base.generate", "strict"
PAIRS = ((STRICT, OWN), (STRICT, BASE), (OWN, BASE))


def gaps(model: DynaMoForCausalLM, prompt: list[int], new_tokens: int) -> dict[str, float | None]:
    """By pair of ways to decode: the gap where their texts part, None where they are the same."""
    ends = list(token_ids(model.generation_config.eos_token_id))
    greedy: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": ends or None}
    base: Any = model.base
    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        BASE: lambda ids: base.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **greedy),
        OWN: lambda ids: model.generate(ids, num_heads=1, **greedy),
        STRICT: lambda ids: model.generate(ids, **greedy),
    }
    texts = {way: run(torch.tensor([prompt]))[0, len(prompt) :].tolist() for way, run in ways.items()}
    return {f"{one} = {other}": gap(model, prompt, texts[one], texts[other]) for one, other in PAIRS}


@torch.inference_mode()
def gap(model: DynaMoForCausalLM, prompt: list[int], one: list[int], other: list[int]) -> float | None:
    """Where two texts part, how much higher one token's logit is than the other's; None where they do not."""
    place = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    if place is None:
        return None if len(one) == len(other) else float("inf")
    logits = model.base(torch.tensor([prompt + one[:place]])).logits[0, -1].float()
    return round(float((logits[one[place]] - logits[other[place]]).abs()), 5)


def encoded(name: str, tokenizer: Any, more: Path | None) -> list[list[int]]:
    """Openings of stories for the bundled model, questions as chat turns for others; more: JSON lines with "turns"."""
    if name == "story":
        lines = (HERE / "openings.txt").read_text(encoding="utf-8").split("\n")[:PROMPTS]
        return [tokenizer(line).input_ids for line in lines]
    lines = (HERE / "questions.txt").read_text(encoding="utf-8").split("\n")[:PROMPTS]
    if more is not None:
        lines += [json.loads(line)["turns"][0] for line in more.read_text(encoding="utf-8").split("\n") if line]
    return [encode_chat(tokenizer, [{"role": "user", "content": line}]) for line in lines]


def read(file: Path) -> list[dict[str, Any]]:
    """The lines so far."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line] if file.exists() else []


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: a row for each model and precision, a column for each comparison."""
    order = [*DTYPES, *FORMATS]
    kinds = sorted({(Path(line["model"]).name, line["dtype"]) for line in lines}, key=lambda k: (k[0], order.index(k[1])))
    pairs = [f"{one} = {other}" for one, other in PAIRS]
    rows = ["| model | " + " | ".join(pairs) + " |", "|---" * (len(pairs) + 1) + "|"]
    for name, dtype in kinds:
        own = [line["gaps"] for line in lines if (Path(line["model"]).name, line["dtype"]) == (name, dtype)]
        cells = []
        for pair in pairs:
            parted = [each[pair] for each in own if each[pair] is not None]
            widest = f" (gaps to {max(parted):.3g})" if parted else ""
            cells.append(f"{len(own) - len(parted)} of {len(own)}{widest}")
        rows.append(f"| {name}, {dtype} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--base", default=None, help="of folders that hold heads alone")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--dtypes", nargs="*", default=list(DTYPES), help="float32, bfloat16, int8 or int4")
    parser.add_argument("--more", type=Path, default=None, help="further questions for the models that chat")
    parser.add_argument("--prompts", type=int, nargs=2, default=(0, PROMPTS), help="from and to, to share the work")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--table", type=Path, default=None, help="print this results file")
    arguments = parser.parse_args()
    if arguments.table is not None:
        print(table(read(arguments.table)))
        return
    about = {"new_tokens": arguments.new_tokens, "kernels": loader.available(wait=True), "versions": versions()}
    for name in arguments.models:
        for dtype in arguments.dtypes:
            base = None if name == "story" else arguments.base
            how = {"weights": dtype, "dtype": "float32"} if dtype in FORMATS else {"dtype": dtype}
            model, tokenizer = open_for_evaluation(name, tokenizer=None, device="cpu", base=base, **how)
            done = {line["prompt"] for line in read(arguments.out) if (line["model"], line["dtype"]) == (name, dtype)}
            for number, prompt in enumerate(encoded(name, tokenizer, arguments.more)):
                if number in done or not arguments.prompts[0] <= number < arguments.prompts[1]:
                    continue
                line = {"model": name, "dtype": dtype, "prompt": number, "gaps": gaps(model, prompt, arguments.new_tokens)}
                with arguments.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line | about) + "\n")


if __name__ == "__main__":
    main()
