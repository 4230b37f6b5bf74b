"""Whether long generation grows the process: `python -m benchmarks.memory --minutes 10 > results/memory.json`.

Texts to the end of the bundled model's context, over and over, strict and off in turn, in batches of 1 and 3. Memory is the
process's own resident set, read between texts; the first quarter of the run is left for the allocator to settle.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from dynamo_lm import DynaMoForCausalLM
from dynamo_lm.assets import bundled

WAYS: tuple[dict[str, Any], ...] = (
    {"verify": "strict"},
    {"verify": "strict", "do_sample": True},
    {"verify": 0.1},
    {"verify": "off", "do_sample": True, "eps_b": 0.1},
)


def resident() -> float:
    """Megabytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * 4096 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = DynaMoForCausalLM.from_pretrained(str(bundled()), dtype=torch.float32).eval()
    context = model.config.max_context or 512
    began, texts, tokens = time.monotonic(), 0, 0
    trace: list[tuple[float, float]] = []
    while (elapsed := time.monotonic() - began) < 60 * arguments.minutes:
        rows = 1 if texts % 2 else 3
        ids = torch.randint(3, model.config.vocab_size, (rows, 8), generator=torch.Generator().manual_seed(texts))
        way = WAYS[texts % len(WAYS)]
        model.generate(ids, max_new_tokens=context - 8, seed=texts, eos_token_id=None, **way)
        texts, tokens = texts + 1, tokens + rows * (context - 8)
        trace.append((round(elapsed, 1), round(resident(), 1)))
    settled = [megabytes for seconds, megabytes in trace if seconds > 15 * arguments.minutes]
    half = len(settled) // 2
    facts = {
        "minutes": arguments.minutes,
        "texts": texts,
        "tokens": tokens,
        "context": context,
        "resident_mb": {
            "third quarter of the run, median": sorted(settled[:half])[half // 2],
            "last quarter, median": sorted(settled[half:])[(len(settled) - half) // 2],
            "least": min(settled),
            "most": max(settled),
        },
        "trace": trace[:: max(1, len(trace) // 60)],
    }
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
