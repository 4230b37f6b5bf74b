"""What a linear layer costs by rows, in the ways `dynamo_lm.few_rows` chooses from.

`python -m benchmarks.rows > results/rows.json`. Every product reads another weight than the one before, as layers do, so
that large weights come from memory. Ratios are to one row of the plain layer in the same run: medians over interleaved
repetitions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dynamo_lm.bench.results import machine
from dynamo_lm.provenance import versions

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


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"plain": plain, "transposed": transposed, "filled to 4": filled}


@torch.inference_mode()
def measure(shape: tuple[int, int], repetitions: int) -> list[dict]:
    """One row of numbers per count of rows: every way's time over that of one plain row."""
    weights = [torch.randn(shape) for _ in range(max(1, int(APART / (4 * shape[0] * shape[1]))))]
    inputs = {rows: torch.randn(rows, shape[1]) for rows in ROWS}
    seconds: dict[tuple[int, str], list[float]] = {}
    for repetition in range(repetitions + 1):
        for rows, x in inputs.items():
            for name, way in WAYS.items():
                began = time.perf_counter()
                for weight in weights:
                    way(weight, x)
                if repetition:  # the first one warms up
                    seconds.setdefault((rows, name), []).append((time.perf_counter() - began) / len(weights))
    one = seconds[1, "plain"]
    found = []
    for rows in ROWS:
        ratios = {name: [a / b for a, b in zip(seconds[rows, name], one, strict=True)] for name in WAYS}
        found.append({"rows": rows} | {name: round(statistics.median(values), 2) for name, values in ratios.items()})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shapes = {name: {"shape": shape, "rows": measure(shape, arguments.repetitions)} for name, shape in SHAPES.items()}
    print(json.dumps({"machine": machine(torch.device("cpu")), "versions": versions(), "shapes": shapes}, indent=1))


if __name__ == "__main__":
    main()
