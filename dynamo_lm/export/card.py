"""The commands that serve an exported head, and the README.md of its folder."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

from dynamo_lm.export.forms import READERS
from dynamo_lm.model.modeling import DynaMoForCausalLM

BASE_GGUF, DRAFT_GGUF = "base.gguf", "draft.gguf"
PYTHON = """python - <<'END'
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("{out}")
model = AutoModelForCausalLM.from_pretrained("{out}", trust_remote_code=True)
text = model.generate(**tokenizer("Once upon a time", return_tensors="pt"), use_mtp=True, max_new_tokens=64)
print(tokenizer.decode(text[0]))
END"""


def serve_commands(
    model: DynaMoForCausalLM, form: str, out: Path, base_gguf: Path | None, base: str | None = None
) -> dict[str, str]:
    """By program, the exact command, with as many drafts as the head was trained for.

    Args:
        base_gguf: the base's file.
        base: the base's folder or hub id as the user named it; None: the recorded one.
    """
    base, drafts = base or model.config.base_hub_id or model.config.base_path or "BASE", model.num_heads - 1
    if form == "gguf":
        files = f"-m {base_gguf or 'BASE.gguf'} -md {out / DRAFT_GGUF}"
        return {"llama.cpp": f"llama-server {files} --spec-type draft-eagle3 --spec-draft-n-max {drafts}"}
    if form == "mtp":
        return {"transformers": PYTHON.format(out=out)}
    speculation = json.dumps({"method": "eagle3", "model": str(out), "num_speculative_tokens": drafts})
    if form == "vllm":
        return {"vLLM": f"vllm serve {base} --enforce-eager --speculative-config '{speculation}'"}
    commands = {"vLLM": f"vllm serve {base} --speculative-config '{speculation}'"}
    if form == "eagle3":
        commands["SGLang (not tested)"] = (
            f"python -m sglang.launch_server --model {base} --speculative-algorithm EAGLE3 --speculative-draft-model-path "
            f"{out} --speculative-num-steps {drafts} --speculative-eagle-topk 1 --speculative-num-draft-tokens {drafts + 1}"
        )
    return commands


def card(model: DynaMoForCausalLM, form: str, commands: dict[str, str]) -> str:
    """README.md of the folder."""
    config, drafts = model.config, model.num_heads - 1
    base = config.base_name or "a model of its own"
    hub_id = f"base_model: {config.base_hub_id}\n" if config.base_hub_id else ""
    count = config.draft_vocab_size
    vocabulary = f"{count:,} of the base's {config.vocab_size:,} tokens" if count else "any of the base's tokens"
    shown = "\n\n".join(f"{program}:\n\n```bash\n{command}\n```" for program, command in commands.items())
    contents = "the head and a copy of the base" if form == "mtp" else "the head alone"
    reads = "read" if " and " in READERS[form][0] else "reads"
    says = (
        f"One decoder layer that reads the states of three layers of {base} and drafts the next tokens one after another. "
        f"It was trained to draft {drafts} a step, from {vocabulary}."
    )
    title, tag = "An EAGLE-3 head", "eagle3"
    if form == "vllm":
        says = f"{drafts} decoder layers beside the last one of {base}; each drafts one of the next {drafts} tokens."
        title, tag, contents = "Parallel heads", "multi-token-prediction", "the heads alone"
    says += " The base verifies every draft, so greedy text is the base's own text up to rounding, and sampled text has the "
    says += "base's distribution."
    holds = (
        f"The folder holds {contents}, in the form that {READERS[form][0]} {reads}. It belongs to this base alone "
        f"(fingerprint {config.base_fingerprint}): with other weights, a fine-tuned copy among them, it drafts worse."
    )
    return f"""---
tags: [{tag}, speculative-decoding]
{hub_id}---

# {title} for {base}

{textwrap.fill(says, 118)}

{textwrap.fill(holds, 118)}

{shown}

Written by `dynamo-lm export --to {form}`.
"""
