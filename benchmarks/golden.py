"""Two hundred generations of the bundled model, written to a file or compared with it: what a refactoring must not change.

usage: python -m benchmarks.golden write|check FILE

Twenty settings (strict, budget and off; greedy and sampled; chains and trees; one prompt and batches) on ten story openings,
40 new tokens each, float32. Texts may differ between machines, because rounding does; within one machine they may not.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from dynamo_lm import DynaMoForCausalLM
from dynamo_lm.assets import bundled

OPENINGS = Path(__file__).with_name("openings.txt")
SETTINGS: list[dict[str, Any]] = [
    {"verify": "strict", "num_heads": 1},
    {"verify": "strict", "num_heads": 2, "tree": 0},
    {"verify": "strict", "num_heads": 3, "tree": 0},
    {"verify": "strict", "num_heads": 4, "tree": 0},
    {"verify": "strict", "num_heads": 4, "tree": 7},
    {"verify": "strict", "num_heads": 4, "tree": 0, "alpha_c": 0.0},
    {"verify": "strict", "num_heads": 4, "do_sample": True, "temperature": 1.0},
    {"verify": "strict", "num_heads": 3, "do_sample": True, "temperature": 0.8, "top_k": 40, "top_p": 0.9},
    {"verify": "strict", "num_heads": 4, "tree": 0, "repetition_penalty": 1.2},
    {"verify": 0.1, "num_heads": 4, "tree": 0},
    {"verify": 0.3, "num_heads": 4, "tree": 7},
    {"verify": 0.2, "num_heads": 4, "do_sample": True, "temperature": 0.7},
    {"verify": "off", "num_heads": 2, "eps_b": 0.3, "do_sample": True},
    {"verify": "off", "num_heads": 3, "eps_b": 0.5, "do_sample": True},
    {"verify": "off", "num_heads": 4, "eps_b": 0.3, "do_sample": True},
    {"verify": "off", "num_heads": 4, "eps_b": 0.0, "do_sample": True},
    {"verify": "off", "num_heads": 4, "eps_b": 0.5, "do_sample": True, "otsu": False},
    {"verify": "off", "num_heads": 4, "eps_b": 0.5, "do_sample": True, "blur": False},
    {"verify": "off", "num_heads": 4, "eps_b": 0.3, "alpha_c": 0.0, "do_sample": True},
    {"verify": "off", "num_heads": 4, "eps_b": 0.2, "do_sample": False},
]


def generations() -> list[dict[str, Any]]:
    """Every setting on every opening; the even settings in one batch of ten rows, the odd ones row by row."""
    torch.set_num_threads(1)
    folder = bundled("story")
    model, tokenizer = DynaMoForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    openings = OPENINGS.read_text(encoding="utf-8").split("\n")[:10]
    written = []
    for number, setting in enumerate(SETTINGS):
        options = {"do_sample": False, **setting, "max_new_tokens": 40, "return_dict_in_generate": True}
        groups = [openings] if number % 2 == 0 else [[opening] for opening in openings]
        for first, group in enumerate(groups):
            inputs = tokenizer(group, return_tensors="pt", padding=True)
            inputs.pop("token_type_ids", None)
            output = model.generate(**inputs, seed=1000 * number + first, **options)
            for ids, statistics in zip(output.sequences, output.statistics, strict=True):
                entry = {"setting": setting, "ids": ids.tolist(), "steps": statistics.step_sizes}
                written.append(entry)
        print(f"{number + 1} of {len(SETTINGS)} settings", file=sys.stderr)
    return written


def main(action: str, file: str) -> int:
    entries = generations()
    if action == "write":
        Path(file).write_text("\n".join(json.dumps(entry) for entry in entries) + "\n", encoding="utf-8")
        return 0
    golden = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").split("\n") if line]
    different = [number for number, pair in enumerate(zip(golden, entries, strict=True)) if pair[0] != pair[1]]
    print(f"{len(golden) - len(different)} of {len(golden)} generations are the same; different: {different}")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
