"""Counts the table of SmolLM2's heads: `python -m recipes.smollm2.table BASE DATA PROMPTS ANSWERS TABLE`.

The base's own answers count twice, because they are what is decoded; Dolly's answers and stories (fables, fairy tales) add
words that a million tokens of the base's own do not have. The held-out Dolly prompts' answers are left out. Pairs and
triples of one place in the text of others are dropped, and so are quadruples of one answer or of two such places: drafts
believe n-grams as far as they were seen, so rare ones are of use, but quadruples are most of the file.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from dynamo_lm.cooccurrence.counting import count
from dynamo_lm.cooccurrence.table import Cooccurrence
from dynamo_lm.training.answer_table import answers
from recipes.smollm2.prompts import SEED, json_lines, split_dolly
from recipes.smollm2.train import store_of

ORDER, WEIGHT, LONGEST = 4, 2, 1024
LEAST = {2: WEIGHT, 3: WEIGHT, 4: WEIGHT + 1}  # counts of n-grams that are kept, by order


def texts(data: Path) -> Iterator[str]:
    """Text of others."""
    held_out = split_dolly(data, random.Random(SEED))[0]
    for record in json.loads((data / "instruct/dolly_3k.json").read_text(encoding="utf-8")):
        if not any(text.startswith(record["instruction"].strip()) for text in held_out):
            yield record["output"]
    for record in json_lines(data / "instruct/dolly_hhrlhf_train_small.jsonl"):
        if not any(text.split("\n\n")[0] in record["prompt"] for text in held_out):
            yield record["response"]
    for name in ("fables", "fairytaleqa"):
        for record in json_lines(data / f"stories/{name}.jsonl"):
            yield record["text"]


def main() -> None:
    base, data, prompts, answered, table = sys.argv[1], *map(Path, sys.argv[2:6])
    tokenizer = AutoTokenizer.from_pretrained(base)
    store = store_of(prompts, answered, tokenizer, table.parent / "tokens", LONGEST)
    how = {"vocab_size": len(tokenizer), "order": ORDER, "tokenizer": store.tokenizer}
    own = answers(store, np.arange(len(store.offsets) - 1))
    mine = count(own, description="answers of the base", **how)
    ids = (np.array(tokenizer(text.strip())["input_ids"]) for text in texts(data))
    others = count(ids, description="Dolly's answers, fables and fairy tales", **how)
    merged = Cooccurrence.merge(*[mine] * WEIGHT, others)
    merged.prune(LEAST).save(table)
    print(f"{mine.total(1):,} tokens of answers, {others.total(1):,} of others, {table.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
