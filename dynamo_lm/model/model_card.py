"""The model card that goes into every saved folder."""

from __future__ import annotations

from typing import Any

from dynamo_lm.model.configuration import MEDUSA


def model_card(model: Any) -> str:
    """Markdown with the metadata block that model hubs read."""
    config = model.config
    base = config.base_name or "a model of its own"
    table = model.cooccurrence
    tables = "none" if table is None else f"n-grams up to order {table.order}"
    more = model.overhead()
    medusa = all(getattr(config, key) == value for key, value in MEDUSA.items())
    where = "of the Medusa kind, after" if medusa else "beside"
    coupled = ""
    if model.coupling is not None:
        count = sum(p.numel() for p in model.coupling.parameters())
        coupled = f"\nThe heads are joined by a learned coupling of rank {model.coupling.rank} ({count:,} parameters)."
    hub_id = f"base_model: {config.base_hub_id}\n" if config.base_hub_id else ""
    return f"""---
library_name: dynamo-lm
pipeline_tag: text-generation
tags: [dynamo, multi-token-prediction, speculative-decoding]
{hub_id}---

# DynaMo heads for {base}

A T{config.num_heads} DynaMo model: {config.num_heads - 1} extra token heads {where} the last decoder layer,
{more:.2%} more parameters than the base. Weights here: {config.weights}. Co-occurrence tables: {tables}.{coupled}

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
