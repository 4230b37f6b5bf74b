"""What tests of several ranks share: small runs, and processes that carry them out together.

    torchrun --nproc-per-node 3 tests/ranks.py FOLDER RUN ..

carries some of them out with as many ranks as wanted.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import signal
import sys
import time
from dataclasses import dataclass, field, replace
from datetime import timedelta
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from threading import Thread, Timer
from types import SimpleNamespace
from typing import Any

import numpy as np
import processes
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dynamo_lm import DynaMoForCausalLM
from dynamo_lm.data.packing import Blocks
from dynamo_lm.data.streaming import StreamedBlocks, TextStream
from dynamo_lm.training import ranks
from dynamo_lm.training.options import TrainingOptions
from dynamo_lm.training.shared_stream import shared_blocks
from dynamo_lm.training.trainer import train

VOCABULARY, STEPS = 50, 20
FULL = TrainingOptions(
    steps=STEPS, lr_b=1e-3, lr_m=1e-2, lr_mb=2.5e-4, batch_size=7, bf16=False, validate_every=STEPS, checkpoint_every=10
)
FROZEN = replace(FULL, lr_b=0.0, lr_mb=0.0)


@dataclass(frozen=True)
class Run:
    """A training run that any number of ranks may carry out."""

    options: TrainingOptions
    heads: dict[str, Any] = field(default_factory=dict)
    layers: int = 3
    stop_at: int | None = None  # a signal reaches the last rank while this step is reported
    kill_in: str = ""  # the last rank is killed while this checkpoint is written
    hang_at: int | None = None  # the last rank stops, and never goes on, while this step is reported
    streamed: bool = False  # the text is tokenized while it is trained on


RUNS = {
    "frozen": Run(FROZEN, {"coupling_rank": 4}),
    "full": Run(replace(FULL, batch_size=6, accumulation=2), {"coupling_rank": 4, "own_output_embedding": True}),
    "frozen shards": Run(replace(FROZEN, shard=True), {"coupling_rank": 4}),
    "full shards": Run(
        replace(FULL, shard=True, batch_size=6, accumulation=2, activation_checkpointing=True),
        {"coupling_rank": 4, "own_output_embedding": True},
    ),
    "eagle3 shards": Run(replace(FROZEN, shard=True), {"head": "eagle3", "num_heads": 3}, layers=7),
    "eagle3": Run(FROZEN, {"head": "eagle3", "num_heads": 3}, layers=7),
    "streamed": Run(FROZEN, streamed=True),
    "stopped": Run(FULL, stop_at=7),
    "resumed": Run(FULL),
    "stopped shards": Run(replace(FULL, shard=True), stop_at=7),
    "resumed shards": Run(replace(FULL, shard=True)),
    "any time": Run(replace(FULL, shard=True, checkpoint_every=2)),
    "any time streamed": Run(replace(FROZEN, checkpoint_every=1), streamed=True),
    "hung": Run(FULL, hang_at=4),
    "killed": Run(replace(FULL, shard=True, checkpoint_every=5), kill_in="step-00000010"),  # ends the processes
}


@functools.cache
def base(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, **shape, tie_word_embeddings=layers == 3)
    )


def blocks(seed: int, shuffle: bool = True) -> Blocks:
    random = np.random.default_rng(seed)
    offsets = np.cumsum([0, *random.integers(1, 40, size=30)])
    store: Any = SimpleNamespace(tokens=random.integers(0, VOCABULARY, size=offsets[-1]), offsets=offsets, responses=None)
    return Blocks(store, np.arange(30), 16, seed=seed, shuffle=shuffle)


def stream(folder: Path) -> StreamedBlocks:
    """Blocks of three shards, one of which is empty, of which seven steps are an epoch."""
    text = folder.parent / "text"
    vocabulary = {"<unk>": 0, "<eos>": 1, **{f"w{number}": number for number in range(2, VOCABULARY)}}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    if ranks.rank() == 0:
        text.mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng(0)
        for shard, documents in enumerate((12, 0, 18)):
            words = [random.integers(2, VOCABULARY, size=size).tolist() for size in random.integers(1, 50, size=documents)]
            lines = [json.dumps({"text": " ".join(f"w{word}" for word in line)}) + "\n" for line in words]
            (text / f"{shard}.jsonl").write_text("".join(lines))
    ranks.meet()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
    return shared_blocks(TextStream([str(text)], tokenizer, 5 * 16, seed=0), folder, 16)


def killed_in(checkpoint: Path) -> None:
    """Kills this process when the checkpoint is being written."""
    while not checkpoint.with_name(f".writing-{checkpoint.name}").exists():
        time.sleep(0.0005)
    os.kill(os.getpid(), signal.SIGKILL)


def carry_out(run: Run, folder: Path, kill: tuple[int, int, float] | None = None) -> dict[str, list[float]]:
    """Train in `folder`; returns the trained weights, flat, by name.

    Args:
        kill: a rank, a step, and how many seconds after that step the rank is killed.
    """

    timers: list[Timer] = []

    def report(progress) -> None:
        if kill is not None and (ranks.rank(), progress.step) == kill[:2]:
            timers.append(Timer(kill[2], os.kill, [os.getpid(), signal.SIGKILL]))
            timers[0].start()
        if timers and progress.step == run.options.steps:
            timers[0].join()  # never done before
        if progress.step == run.hang_at and ranks.size() > 1:
            torch.distributed.distributed_c10d._set_pg_timeout(
                timedelta(seconds=2)
            )  # from here on; starting may take longer
            if ranks.rank() == ranks.size() - 1:
                os.kill(os.getpid(), signal.SIGSTOP)
        if progress.step == run.stop_at and ranks.rank() == ranks.size() - 1:
            signal.raise_signal(signal.SIGTERM)

    if run.kill_in and 0 < ranks.rank() == ranks.size() - 1:
        Thread(target=killed_in, args=[folder / "checkpoints" / run.kill_in], daemon=True).start()
    own_base = copy.deepcopy(base(run.layers))
    torch.manual_seed(1)
    model = DynaMoForCausalLM.from_base(own_base, **run.heads)
    train(model, stream(folder) if run.streamed else blocks(0), blocks(1, shuffle=False), run.options, folder, report=report)
    return {name: p.flatten().tolist() for name, p in model.named_parameters()}


def start(folder: Path, *runs: str, count: int = 2, kill: tuple[int, int, float] | None = None) -> list[ForkServerProcess]:
    """Starts so many ranks that carry out these runs one after the other, each in a folder of its name.

    Args:
        kill: as `carry_out` takes it, in the last run.
    """
    environment = {"KILL": json.dumps(kill)} if kill else {}
    return processes.start_ranks(count, main, str(folder), *runs, folder=folder, environment=environment)


def main(where: str, *names: str) -> None:
    """Carry out these runs as one of the ranks; their trained weights go into a file of each."""
    folder = Path(where)
    torch.set_num_threads(1)
    with ranks.process_group(torch.device("cpu"), 5):
        for name in names:
            try:
                kill = json.loads(os.environ.get("KILL", "null")) if name == names[-1] else None
                weights = carry_out(RUNS[name], folder / name, kill and tuple(kill))
            except KeyboardInterrupt:
                continue
            (folder / f"{name}-{ranks.rank()}.json").write_text(json.dumps(weights))


if __name__ == "__main__":
    main(*sys.argv[1:])
