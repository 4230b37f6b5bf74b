"""Writes the folder that ships: `python -m recipes.smollm2.publish RUN TABLE models/smollm2-135m-instruct [BASE]`.

RUN is the folder of recipes.smollm2.train (RUN/model its heads, RUN/log.jsonl their log), or one that ships already, which
gets the table and a new card. TABLE is the file of recipes.smollm2.table. Heads are stored in bfloat16, the base as the
folder that `make chat` makes. The model card takes its numbers from the run and, where it exists, from
results/smollm2/tokens_per_step.json. What the run's validations measured goes beside that file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from dynamo_lm import DynaMoForCausalLM
from dynamo_lm.cooccurrence.table import Cooccurrence
from dynamo_lm.files import write_text
from dynamo_lm.training import provenance
from recipes.smollm2.base import HUB_ID
from recipes.smollm2.prompts import json_lines

BASE = "../../runs/smollm2-135m-instruct"  # seen from the folder that ships
RESULTS = Path("results/smollm2/tokens_per_step.json")


def learned_tokens(runs: list[dict[str, Any]]) -> str:
    """What the heads read, run by run."""
    return ",\nthen on ".join(f"{each['answer_tokens']:,} tokens of answers, {each['epochs']:.1f} times" for each in runs)


def acceptance_table(label: str) -> str:
    """Tokens per step by group, in Markdown; label: of the columns, as benchmarks.smollm2 names them."""
    if not RESULTS.exists():
        return "Not measured yet."
    runs: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))["runs"]
    columns = {"n=4 T=0": "greedy", "n=4 T=1": "temperature 1"}
    columns |= {f"{column} lookup": f"{title}, with prompt lookup" for column, title in columns.items()}
    titles = {f"{label}{column}": title for column, title in columns.items() if f"{label}{column}" in runs}
    names = list(titles)
    if not names:
        return "Not measured yet."
    lines = ["| prompts | " + " | ".join(titles.values()) + " |", "|---" * (1 + len(names)) + "|"]
    for group in runs[names[0]]:
        cells = [runs[name].get(group) for name in names]
        texts = [
            f"{c['tokens_per_step']:.2f} ({c['interval_95'][0]:.2f} to {c['interval_95'][1]:.2f})" if c else ""
            for c in cells
        ]
        count = runs[names[0]][group]["prompts"]
        lines.append(f"| {group}, {count} prompts | " + " | ".join(texts) + " |")
    return "\n".join(lines)


PARALLEL = """# DynaMo heads for SmolLM2-135M-Instruct

{count} extra token heads beside the last decoder layer, {more} more parameters than the base. With
`verify="strict"` the text is the base's own, in fewer forward passes.

## Use

```
make chat
```

or `DynaMoForCausalLM.from_pretrained("{folder}")`, with the base that
`python -m recipes.smollm2.base` makes."""
SEQUENTIAL = """# EAGLE-3 head for SmolLM2-135M-Instruct

One sequential head that drafts {count} tokens, {more} more parameters than the base. It drafts {listed:,} of the base's
tokens. With `verify="strict"` the text is the base's own, in fewer forward passes.

## Use

`DynaMoForCausalLM.from_pretrained("{folder}")`, with the base that
`python -m recipes.smollm2.base` makes. For llama.cpp, vLLM and SGLang see `dynamo-lm export`
(docs/serving-elsewhere.md)."""


def card(model: DynaMoForCausalLM, runs: list[dict[str, Any]], folder: Path) -> str:
    """The model card of the heads in `folder`; runs: what each one read."""
    sequential = model.config.sequential
    what = (SEQUENTIAL if sequential else PARALLEL).format(
        count=model.num_heads - 1,
        more=f"{model.overhead():.1%}",
        folder=folder,
        listed=model.config.draft_vocab_size or model.output_weight().shape[0],
    )
    loss = "the divergence" if sequential else "0.9 of the divergence"
    rest = "" if sequential else " and 0.1 of the log-likelihood"
    return f"""---
library_name: dynamo-lm
pipeline_tag: text-generation
license: apache-2.0
base_model: {HUB_ID}
tags: [dynamo, multi-token-prediction, speculative-decoding]
---

{what} The heads were trained beside the base's Q4_1 weights. Beside the hub's bfloat16
weights they need `allow_base_mismatch=True`, and fewer drafts are accepted.

## Training

On {learned_tokens(runs)}.
The base wrote the answers itself, greedily and at temperatures 0.7 and 1. The questions
are Databricks Dolly's (CC-BY-SA-3.0), passages of public-domain fairy-tale books, templates of this project and
questions of the base itself. No benchmark prompt is among them: prompts that share 13 words in a row with one were
left out (`recipes/smollm2/prompts.py`, `questions.py`). The table counts all such answers, also those that the heads
did not learn, Dolly's own answers, fables (MIT) and fairy tales (Apache-2.0; `recipes/smollm2/table.py`).
The base stayed frozen. The loss is {loss} from the base's own
distribution{rest}
(`recipes/smollm2/train.py`). Two CPU cores trained it.

## Tokens per step

Strict, chains of {model.num_heads - 1} drafts, first turns, 128 new tokens, bfloat16; 95 % intervals by prompt
(`python -m benchmarks.smollm2`).

{acceptance_table("eagle3 " if sequential else "")}

## Limits

English. The base is small: its answers are often wrong, and greedy ones often end in repetition, which makes drafts
easy. The heads saw contexts of up to 1,024 tokens.

Method: Tuli et al., "DynaMo: Accelerating Language Model Inference with Dynamic Multi-Token Sampling", NAACL 2024.
"""


def expected_tokens(run: Path, number: int, file: Path) -> str:
    """JSON lines: the tokens per step to expect that each validation measured, from the run's log.

    number: of the run; those before it, which it went on from, stay as they are in `file`.
    """
    lines = [record for record in (json_lines(file) if file.exists() else ()) if record["run"] < number]
    for record in json_lines(run / "log.jsonl"):
        if "tokens_per_step" in record:
            lines.append({"run": number, **{key: record[key] for key in ("step", "acceptance", "tokens_per_step")}})
    return "".join(json.dumps(line) + "\n" for line in lines)


def main() -> None:
    run, table, target = map(Path, sys.argv[1:4])
    trained = (run / "model").exists()
    source = run / "model" if trained else run
    where = {"base": sys.argv[4]} if len(sys.argv) > 4 else {}
    model = DynaMoForCausalLM.from_pretrained(str(source), dtype=torch.float32, **where)
    model.cooccurrence = Cooccurrence.load(table)
    model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(str(target), weights="heads")
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    file = target / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config |= {"base_name_or_path": BASE, "base_hub_id": HUB_ID, "base_path": None}
    config["base_config"]["_name_or_path"] = HUB_ID
    write_text(file, json.dumps(config, indent=2) + "\n")
    record = run / "facts.json" if trained else run / provenance.FILE
    facts = {key: value for key, value in json.loads(record.read_text(encoding="utf-8")).items() if key != "data"}
    write_text(target / "README.md", card(model, facts["runs"], target))
    sources = ["answers of the base itself (recipes.smollm2.answer)"]
    data = {"sources": sources, "training_tokens": sum(each["answer_tokens"] for each in facts["runs"])}
    provenance.write(target, {"data": data, **facts})
    if trained:
        file = RESULTS.with_name(f"{target.name}.jsonl")
        write_text(file, expected_tokens(run, len(facts["runs"]), file))
    size = sum(path.stat().st_size for path in target.iterdir())
    print(f"{target}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
