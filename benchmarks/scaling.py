"""Memory of a training step against the dry run's, and what tokenizing costs: `python -m benchmarks.scaling BASE`.

Writes results/scaling.json.

Memory: SmolLM2-135M (BASE is its folder, `python -m recipes.smollm2.base BASE`) with two heads more takes two steps of
random tokens on two ranks of this machine, in blocks of 256, float32, plain attention. Measured is the peak of a rank's
resident memory, less what it holds before it opens the model and, where the model is sharded, less the whole model, which
stays in the memory of the rank's machine. Estimated is what `train --dry-run` prints for the same options.

Tokenizing: the first tokens of the novels of the folder that DYNAMO_DATA names, with BASE's tokenizer and with Pythia's,
into a token store and through a stream; processor seconds of all threads. Resuming: the processor seconds until a stream
gives its last window again, from its log and from the beginning.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from benchmarks.counting import DATA, open_tokenizer, resident
from dynamo_lm import DynaMoForCausalLM
from dynamo_lm.bench.tables import machine
from dynamo_lm.data.packing import Blocks
from dynamo_lm.data.streaming import TextStream, WindowLog
from dynamo_lm.data.token_store import tokenize
from dynamo_lm.files import write_text
from dynamo_lm.model.loading import open_config, skeleton
from dynamo_lm.training import ranks
from dynamo_lm.training.memory_estimate import memory
from dynamo_lm.training.options import TrainingOptions
from dynamo_lm.training.provenance import versions
from dynamo_lm.training.step import Optimization, step_blocks

RESULTS = Path(__file__).parent.parent / "results" / "scaling.json"
RANKS, BLOCK, HEADS = 2, 256, 3
FULL = TrainingOptions(steps=100, batch_size=4, bf16=False)
SETTINGS = {
    "--no-shard": FULL,
    "--shard": replace(FULL, shard=True),
    "--shard --activation-checkpointing": replace(FULL, shard=True, activation_checkpointing=True),
    "--freeze": replace(FULL, lr_b=0.0, lr_mb=0.0),
}
TOKENS, WINDOW = 2_000_000, 250_000


def measure_step(base: str, options: TrainingOptions) -> dict[str, int]:
    """Bytes of this rank: the peak of two steps, and of the model that it opens first."""
    torch.set_num_threads(1)
    with ranks.process_group(torch.device("cpu"), 10):
        before = resident("VmRSS")
        model = DynaMoForCausalLM.from_base(base, num_heads=HEADS, dtype=torch.float32, attn_implementation="eager")
        whole = sum(parameter.numel() * 4 for parameter in model.parameters())
        tokens = np.random.default_rng(0).integers(0, 1000, size=100 * BLOCK)
        store: Any = SimpleNamespace(tokens=tokens, offsets=np.arange(0, len(tokens) + 1, BLOCK), responses=None)
        blocks = Blocks(store, np.arange(100), BLOCK, seed=0)
        optimization = Optimization(model, blocks, options)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # opening a model is not training
        for step in range(2):
            optimization.gradients(step, blocks.rows(step_blocks(step, options)))
            optimization.update()
        return {"peak": resident("VmHWM") - before, "whole_model": whole}


def memory_of(base: str, name: str) -> dict[str, Any]:
    """Estimated and measured bytes of each rank."""
    options = SETTINGS[name]
    with torch.device("meta"):
        model = DynaMoForCausalLM.from_base(skeleton(open_config(base), device="meta"), num_heads=HEADS)
    model.set_attn_implementation("eager")
    estimate = memory(model, options, BLOCK, fused=False, ranks=RANKS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
    line = [sys.executable, "-m", "benchmarks.scaling", base, f"--as-rank={name}"]
    started = [
        subprocess.Popen(line, env=os.environ | where | {"RANK": str(rank)}, stdout=subprocess.PIPE, encoding="utf-8")
        for rank in range(RANKS)
    ]
    measured = [json.loads(process.communicate()[0]) for process in started]
    bytes_ = [each["peak"] - (each["whole_model"] if options.shard else 0) for each in measured]
    return {"options": name, "estimated": estimate, "measured": bytes_, "whole_model": measured[0]["whole_model"]}


def processor_seconds(work: Any) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def tokenizing(name: str, tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Tokens a processor second into a store and through a stream, and what a stream that resumes costs."""
    text = [str(DATA / "novels")]
    stored = processor_seconds(lambda: tokenize(text, tokenizer, folder / "store", limit_tokens=TOKENS))
    windows, last = folder / "stream.jsonl", TOKENS // WINDOW - 1

    def read(resume: bool, numbers: range) -> None:
        log = WindowLog(TextStream(text, tokenizer, WINDOW, seed=0), windows, resume=resume)
        for number in numbers:
            log.window(number)
        assert log._ahead is not None
        log._ahead[1].result()  # the window after it counts, too

    streamed = processor_seconds(lambda: read(False, range(last)))
    resumed = processor_seconds(lambda: read(True, range(last - 1, last)))
    return {
        "tokenizer": name,
        "tokens": TOKENS,
        "stored_per_second": round(TOKENS / stored),
        "streamed_per_second": round(TOKENS / streamed),
        "window": WINDOW,
        "resumed_seconds": round(resumed, 2),
        "from_the_beginning_seconds": round(streamed, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("--as-rank", choices=SETTINGS, help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=("memory", "tokenizing"))
    arguments = parser.parse_args()
    if arguments.as_rank:
        with contextlib.redirect_stdout(sys.stderr):
            measured = measure_step(arguments.base, SETTINGS[arguments.as_rank])
        print(json.dumps(measured))
        return
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    results |= {"versions": versions(), "machine": machine(torch.device("cpu"))}
    if arguments.only != "tokenizing":
        shape = {"ranks": RANKS, "block_size": BLOCK, "heads": HEADS, "batch_size": FULL.batch_size}
        results["memory"] = shape | {"settings": []}
        for name in SETTINGS:
            results["memory"]["settings"].append(memory_of(arguments.base, name))
            write_text(RESULTS, json.dumps(results, indent=1) + "\n")
    if arguments.only != "memory":
        named = {"SmolLM2": AutoTokenizer.from_pretrained(arguments.base), "Pythia": open_tokenizer("pythia")}
        results["tokenizing"] = []
        for name, tokenizer in named.items():
            with tempfile.TemporaryDirectory() as folder:
                results["tokenizing"].append(tokenizing(name, tokenizer, Path(folder)))
    write_text(RESULTS, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
