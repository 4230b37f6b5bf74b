"""The model card that goes into every saved folder."""

from __future__ import annotations

from typing import Any

from dynamo_lm.model.configuration import MEDUSA


def model_card(model: Any, weights: str) -> str:
    """Markdown with the metadata block that model hubs read; `weights` is "full" or "heads"."""
    config = model.config
    base = config.base_name_or_path or "a model of its own"
    table = model.cooccurrence
    counted = "none" if table is None else f"n-grams up to order {table.order}"
    medusa = all(getattr(config, key) == value for key, value in MEDUSA.items())
    where = "of the Medusa kind, behind" if medusa else "beside"
    coupled = ""
    if model.coupling is not None:
        count = sum(p.numel() for p in model.coupling.parameters())
        coupled = f"\nThe heads are joined by a learned coupling of rank {model.coupling.rank} ({count:,} parameters)."
    named = f"base_model: {base}\n" if config.base_name_or_path and "/" in base and not base.startswith((".", "/")) else ""
    return f"""---
library_name: dynamo-lm
pipeline_tag: text-generation
tags: [dynamo, multi-token-prediction, speculative-decoding]
{named}---

# DynaMo heads for {base}

A T{config.num_heads} DynaMo model: {config.num_heads - 1} extra token heads {where} the last decoder layer,
{model.overhead():.2%} more parameters than the base. Weights here: {weights}. Co-occurrence tables: {counted}.{coupled}

```python
from dynamo_lm import DynaMoForCausalLM
from transformers import AutoTokenizer

model = DynaMoForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
prompt = tokenizer("Once upon a time", return_tensors="pt")
tokens = model.generate(**prompt, verify="strict", max_new_tokens=100)  # the base model's own text, in fewer steps
```

Method: Tuli et al., "DynaMo: Accelerating Language Model Inference with Dynamic Multi-Token Sampling", NAACL 2024.
"""
