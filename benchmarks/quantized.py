"""Weights of 8 and 4 bits beside float ones: perplexity of the base, and processor time of a step's products by rows.

`python -m benchmarks.quantized BASE --text FILE --out results/quantized.json`. The products are those of one step through
all linear layers, so that weights come from memory. Contenders take turns; ratios to the bfloat16 kernel are medians over
turns. torch rounds the same weights by rows (8 bits) or by groups of 32 (4 bits).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dynamo_lm.bench.tables import machine
from dynamo_lm.files import write_text
from dynamo_lm.kernels import loader
from dynamo_lm.kernels.quantized import FORMATS, QuantizedWeight, quantize_modules
from dynamo_lm.training.provenance import versions

ROWS = (1, 2, 3, 4, 8)
Product = Callable[[Tensor], Tensor]


def contenders(weight: Tensor, *, output_embedding: bool) -> dict[str, Product]:
    """By name, x (rows, in) bfloat16 @ weight^T; an output embedding has 8 bits in this package's int4, as in its models."""
    half, ops = weight.bfloat16(), torch.ops.dynamo_lm
    eight, four = (QuantizedWeight.of(half, bits) for bits in (8, 8 if output_embedding else 4))
    scale = weight.abs().amax(1) / 127
    whole, row_scale = (weight / scale[:, None]).round().to(torch.int8), scale.bfloat16()
    groups = weight.unflatten(1, (-1, 32))
    least, step = groups.amin(-1), ((groups.amax(-1) - groups.amin(-1)) / 15).clamp(min=1e-8)
    nibbles = ((groups - least[..., None]) / step[..., None]).round().clamp(0, 15).int().flatten(1)
    packed = torch._convert_weight_to_int4pack_for_cpu(nibbles, 1)
    affine = torch.stack([step, least + 8 * step], -1).transpose(0, 1).contiguous().bfloat16()
    return {
        "bfloat16": lambda x: ops.skinny_matmul(x, half, None),
        "bfloat16, torch": lambda x: F.linear(x, half),
        "int8": lambda x: ops.quantized_matmul(x, eight.packed, eight.scale, None, eight.shape[0]),
        "int8, torch": lambda x: torch._weight_int8pack_mm(x, whole, row_scale),
        "int4": lambda x: ops.quantized_matmul(x, four.packed, four.scale, None, four.shape[0]),
        "int4, torch": lambda x: torch._weight_int4pack_mm_for_cpu(x, packed, 32, affine),
    }


def products(base: PreTrainedModel, repetitions: int) -> list[dict[str, Any]]:
    """By rows and contender: milliseconds of one step's products, and their ratio to the bfloat16 kernel's."""
    output = base.get_output_embeddings()
    layers = [
        (m.in_features, contenders(m.weight.detach(), output_embedding=m is output))
        for m in base.modules()
        if type(m) is nn.Linear
    ]
    names, lines = list(layers[0][1]), []
    for rows in ROWS:
        x = {size: torch.randn(rows, size).bfloat16() for size, _ in layers}
        times: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(repetitions):
            for name in names:
                start = time.thread_time()
                for size, ways in layers:
                    ways[name](x[size])
                times[name].append((time.thread_time() - start) * 1e3)
        for name in names:
            ratios = [t / own for t, own in zip(times[name], times["bfloat16"], strict=True)]
            line = {"rows": rows, "weights": name, "ms": statistics.median(times[name]), "ratio": statistics.median(ratios)}
            lines.append(line | {"ratio_range": [min(ratios), max(ratios)]})
            print(line, flush=True)
    return lines


def perplexity(base: nn.Module, ids: Tensor) -> float:
    """Of windows of tokens, (windows, length)."""
    losses = [base(input_ids=window[None], labels=window[None]).loss.double() for window in ids]
    return torch.stack(losses).mean().exp().item()


def main() -> None:
    """Measure and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=16, help="of 512 tokens, from the start of the text")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not loader.available(wait=True):
        parser.error(f"the kernels are {loader.status()}")
    record: dict[str, Any] = {
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
        "text": arguments.text.name,
        "perplexity": {},
    }
    text = arguments.text.read_text(encoding="utf-8")
    ids = torch.tensor(AutoTokenizer.from_pretrained(arguments.base)(text, verbose=False)["input_ids"])
    ids = ids[: arguments.windows * 512].view(-1, 512)

    def opened(dtype: torch.dtype) -> Any:
        return AutoModelForCausalLM.from_pretrained(arguments.base, dtype=dtype).eval()

    with torch.inference_mode():
        for name in ("float32", "bfloat16", *FORMATS) if arguments.windows else ():
            base = opened(torch.bfloat16 if name == "bfloat16" else torch.float32)
            if name in FORMATS:
                quantize_modules(base, FORMATS[name])
            record["perplexity"][name] = perplexity(base, ids)
            print(name, record["perplexity"][name], flush=True)
        if arguments.repetitions:
            record["products"] = products(opened(torch.float32), arguments.repetitions)
    if arguments.out is not None:
        write_text(arguments.out, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
