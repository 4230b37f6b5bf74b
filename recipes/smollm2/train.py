"""Trains SmolLM2's heads on the base's own answers: `python -m recipes.smollm2.train BASE ANSWERS OUT` (resumes).

ANSWERS: JSON lines of recipes.smollm2.answer. Answers that end in a loop keep the first repetition only.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoTokenizer

from dynamo_lm import DynaMoForCausalLM
from dynamo_lm.data.packing import WholeBlocks
from dynamo_lm.data.token_store import TokenStore, build_store, digest
from dynamo_lm.training.feature_cache import FeatureCache
from dynamo_lm.training.log import Progress
from dynamo_lm.training.options import TrainingOptions
from dynamo_lm.training.trainer import train

BATCH = 64  # conversations at a time


def answers(path: Path) -> Iterator[dict]:
    """The records of a file, packed or not; the longest turn of a conversation holds the earlier ones."""
    last: dict[str, dict] = {}
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            if record["answer_ids"]:
                known = last.get(record["id"])
                if known is None or known["turn"] < record["turn"]:
                    if known is not None:
                        record["before"] = [*known.get("before", []), known]
                    last[record["id"]] = record
    yield from last.values()


def encoded(record: dict, longest: int) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation and which of them are answers, (tokens,) each, cut at `longest`."""
    ids = record["prompt_ids"] + record["answer_ids"]
    learned = [False] * len(record["prompt_ids"]) + [True] * len(record["answer_ids"])
    for earlier in record.get("before", []):
        start, end = len(earlier["prompt_ids"]), len(earlier["prompt_ids"]) + len(earlier["answer_ids"])
        if ids[:end] == earlier["prompt_ids"] + earlier["answer_ids"]:
            learned[start:end] = [True] * (end - start)
    return ids[:longest], learned[:longest]


def store_of(path: Path, tokenizer, folder: Path, longest: int) -> TokenStore:
    """The token store of these answers."""

    def batches() -> Iterator[tuple[list[list[int]], list[list[bool]]]]:
        pairs = [encoded(record, longest) for record in answers(path)]
        pairs = [(ids, learned) for ids, learned in pairs if any(learned)]
        for start in range(0, len(pairs), BATCH):
            ids, learned = zip(*pairs[start : start + BATCH], strict=True)
            yield list(ids), list(learned)

    inputs = digest([str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns, longest])
    return build_store(folder, inputs, batches(), tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base")
    parser.add_argument("answers", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--init", default="copy")
    parser.add_argument("--coupling-rank", type=int, default=0)
    parser.add_argument("--from-model", default=None, help="a trained DynaMo folder to go on from")
    parser.add_argument("--coupling-only", action="store_true")
    parser.add_argument("--block-size", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--kl", type=float, default=0.9)
    parser.add_argument("--vocabulary", type=float, default=0.99)
    parser.add_argument("--validate-every", type=int, default=100)
    parser.add_argument("--cache-gb", type=float, default=8.0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    store = store_of(arguments.answers, tokenizer, arguments.out / "tokens", arguments.block_size)
    learn, held_out = store.split(0.02, seed=0)
    blocks = WholeBlocks(store, learn, arguments.block_size, seed=0)
    validation = WholeBlocks(store, held_out, arguments.block_size, seed=0, shuffle=False)
    if arguments.from_model:
        model = DynaMoForCausalLM.from_pretrained(arguments.from_model, base=arguments.base, dtype=torch.float32)
        if arguments.coupling_rank and model.coupling is None:
            from dynamo_lm.model.coupling import add_coupling

            add_coupling(model, arguments.coupling_rank)
    else:
        model = DynaMoForCausalLM.from_base(
            arguments.base,
            arguments.heads,
            init=arguments.init,
            coupling_rank=arguments.coupling_rank,
            dtype=torch.float32,
        )
    model.freeze_base()
    steps = arguments.steps or round(arguments.epochs * blocks.num_blocks() / arguments.batch_size)
    options = TrainingOptions(
        steps=steps,
        lr_b=0.0,
        lr_mb=0.0,
        lr_m=arguments.lr,
        batch_size=arguments.batch_size,
        warmup=0.03,
        kl=arguments.kl,
        loss_vocabulary=arguments.vocabulary,
        coupling_only=arguments.coupling_only,
        validate_every=arguments.validate_every,
        checkpoint_every=50,
    )
    limit = int(arguments.cache_gb * 1e9)
    features = FeatureCache(arguments.out / "features", model, blocks, limit_bytes=limit, bf16=True) if limit else None
    print(f"{blocks.total:,} tokens in {blocks.num_blocks()} blocks, {steps} steps, {len(held_out)} held out", flush=True)

    def report(progress: Progress) -> None:
        losses = " ".join(f"{loss:.3f}" for loss in (*progress.losses[1:], *progress.coupled))
        if progress.step % 5 == 0 or progress.validation:
            print(f"step {progress.step} loss {losses} {progress.tokens_per_second:.0f} tok/s", flush=True)
        if progress.acceptance:
            print(progress.validation, "|", progress.acceptance, flush=True)

    train(model, blocks, validation, options, arguments.out, features=features, report=report)
    model.save_pretrained(str(arguments.out / "model"), weights="heads")
    tokenizer.save_pretrained(arguments.out / "model")


if __name__ == "__main__":
    main()
