"""Writes a sequential head into a folder that another program opens, with the command that serves it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from dynamo_lm.errors import InputError
from dynamo_lm.export import gguf_file
from dynamo_lm.export.forms import check, eagle3_config, speculators_config, tensors
from dynamo_lm.files import atomic_folder
from dynamo_lm.model.modeling import DynaMoForCausalLM

GGUF = "draft.gguf"


def export(
    model: DynaMoForCausalLM, name: str, tokenizer: Any, form: str, out: Path, *, base_gguf: Path | None = None
) -> list[str]:
    """Writes the head of `model` into `out`.

    Args:
        name: of the model, as the user gave it.
        form: "eagle3", "speculators" or "gguf".
        base_gguf: see `gguf_file.write`.

    Returns:
        The commands that serve it.

    Raises:
        InputError: the folder is not empty, or no program would read the result.
        ModuleNotFoundError: the package `gguf` is missing.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f'The folder "{out}" is not empty; name another with --out.')
    check(model, name, form, tokenizer)
    commands = serve_commands(model, form, out, base_gguf)
    with atomic_folder(out) as temporary:
        if form == "gguf":
            gguf_file.write(model, temporary / GGUF, tokenizer, base_gguf)
        else:
            native = form == "eagle3"
            config = eagle3_config(model) if native else speculators_config(model)
            weights = tensors(model, "midlayer" if native else "layers.0")
            save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
            (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (temporary / "README.md").write_text(_card(model, commands), encoding="utf-8")
    return commands


def serve_commands(model: DynaMoForCausalLM, form: str, out: Path, base_gguf: Path | None) -> list[str]:
    """The exact commands, with as many drafts as the head was trained for."""
    base, drafts = model.config.base_hub_id or model.config.base_path or "BASE", model.num_heads - 1
    if form == "gguf":
        return [
            f"llama-server -m {base_gguf or 'BASE.gguf'} -md {out / GGUF} --spec-type draft-eagle3 "
            f"--spec-draft-n-max {drafts}"
        ]
    speculation = json.dumps({"method": "eagle3", "model": str(out), "num_speculative_tokens": drafts})
    commands = [f"vllm serve {base} --speculative-config '{speculation}'"]
    if form == "eagle3":
        commands.append(
            f"python -m sglang.launch_server --model {base} --speculative-algorithm EAGLE3 --speculative-draft-model-path "
            f"{out} --speculative-num-steps {drafts} --speculative-eagle-topk 1 --speculative-num-draft-tokens {drafts + 1}"
        )
    return commands


def _card(model: DynaMoForCausalLM, commands: list[str]) -> str:
    hub_id = f"base_model: {model.config.base_hub_id}\n" if model.config.base_hub_id else ""
    shown = "\n\n".join(commands)
    vocabulary = model.config.draft_vocab_size or "all of the base's"
    return f"""---
tags: [eagle3, speculative-decoding]
{hub_id}---

# An EAGLE-3 head for {model.config.base_name or "a model of its own"}

Drafts {model.num_heads - 1} tokens a step, which the base verifies: the text is the base's own. Draft vocabulary:
{vocabulary}. It was trained for exactly this base (fingerprint {model.config.base_fingerprint}).

```bash
{shown}
```
"""
