"""What a linear layer costs by rows, in the ways `dynamo_lm.kernels.linear` chooses from.

`python -m benchmarks.rows --threads 1 > results/rows.json`. Every product reads another weight than the one before, as
layers do, so that large weights come from memory. Ratios are to one row of torch's product in the same type and run: medians
over interleaved repetitions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dynamo_lm.bench.tables import machine
from dynamo_lm.kernels import loader
from dynamo_lm.training.provenance import versions

SHAPES = {
    "story, up": (768, 192),
    "story, output embedding": (4096, 192),
    "Pythia-70M, up": (2048, 512),
    "Pythia-160M, query-key-value": (2304, 768),
    "Pythia-160M, up": (3072, 768),
    "Pythia-160M, output embedding": (50304, 768),
    "Pythia-410M, up": (4096, 1024),
}
ROWS = (1, 2, 3, 4, 5, 6, 8, 16)
APART = 96e6  # bytes of weights that a measurement goes through


def plain(weight: Tensor, x: Tensor) -> Tensor:
    return F.linear(x, weight)


def transposed(weight: Tensor, x: Tensor) -> Tensor:
    return (weight @ x.t()).t()


def filled(weight: Tensor, x: Tensor) -> Tensor:
    """Transposed, with zeros up to the next multiple of four rows."""
    return (weight @ F.pad(x, (0, 0, 0, -len(x) % 4)).t()).t()[: len(x)]


def kernel(weight: Tensor, x: Tensor) -> Tensor:
    return torch.ops.dynamo_lm.skinny_matmul(x, weight, None)


WAYS: dict[torch.dtype, dict[str, Callable[[Tensor, Tensor], Tensor]]] = {
    torch.float32: {"plain": plain, "transposed": transposed, "filled to 4": filled, "kernel": kernel},
    torch.bfloat16: {"plain": plain, "kernel": kernel},
}


@torch.inference_mode()
def measure(shape: tuple[int, int], dtype: torch.dtype, repetitions: int) -> list[dict]:
    """One row of numbers per count of rows: every way's time over that of one plain row."""
    ways = WAYS[dtype]
    weights = [torch.randn(shape).to(dtype) for _ in range(max(1, int(APART / (4 * shape[0] * shape[1]))))]
    inputs = {rows: torch.randn(rows, shape[1]).to(dtype) for rows in ROWS}
    seconds: dict[tuple[int, str], list[float]] = {}
    for repetition in range(repetitions + 1):
        for rows, x in inputs.items():
            for name, way in ways.items():
                began = time.perf_counter()
                for weight in weights:
                    way(weight, x)
                if repetition:  # the first one warms up
                    seconds.setdefault((rows, name), []).append((time.perf_counter() - began) / len(weights))
    plain = seconds[1, "plain"]
    lines = []
    for rows in ROWS:
        ratios = {name: [a / b for a, b in zip(seconds[rows, name], plain, strict=True)] for name in ways}
        lines.append({"rows": rows} | {name: round(statistics.median(values), 2) for name, values in ratios.items()})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not loader.available(wait=True):
        raise SystemExit("The kernel cannot be built here; it needs a C++ compiler.")
    facts: dict[str, Any] = {"machine": machine(torch.device("cpu")), "versions": versions(), "threads": arguments.threads}
    for dtype in WAYS:
        measured = {name: measure(shape, dtype, arguments.repetitions) for name, shape in SHAPES.items()}
        facts[str(dtype)] = {name: {"shape": SHAPES[name], "rows": rows} for name, rows in measured.items()}
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
