"""Trains a small draft model for the bundled story model: `python -m recipes.draft` (ten minutes on one CPU core; resumes).

A GPT-NeoX of a few narrow layers with the story model's own tokenizer, on the same simple stories. It is what assisted
generation needs, so that `python -m benchmarks.race story --draft runs/draft/model` can measure DynaMo against it.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig

from dynamo_lm import DynaMoForCausalLM
from dynamo_lm.assets import bundled
from dynamo_lm.data.packing import Blocks
from dynamo_lm.data.token_store import tokenize
from dynamo_lm.training.log import Progress
from dynamo_lm.training.options import TrainingOptions
from dynamo_lm.training.trainer import train

DATA = Path(os.environ.get("DYNAMO_DATA", "../shared/data"))
SOURCES = [str(DATA / "stories" / name) for name in ("tinystories.jsonl", "fables.jsonl")]
CONTEXT = 1024  # the story model's


def untrained(vocab_size: int, layers: int, hidden: int) -> DynaMoForCausalLM:
    """A narrow GPT-NeoX with tied embeddings and no extra heads: the ordinary next-token objective."""
    config = GPTNeoXConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 32),
        intermediate_size=4 * hidden,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    base = AutoModelForCausalLM.from_config(config, attn_implementation="eager")  # trains faster than the fused one
    return DynaMoForCausalLM.from_base(base, num_heads=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/draft"))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(bundled())
    store = tokenize(SOURCES, tokenizer, arguments.folder / "tokens")
    learn, held_out = store.split(0.01, seed=0)
    options = TrainingOptions(
        steps=arguments.steps,
        lr_b=3e-3,
        batch_size=arguments.batch_size,
        warmup=0.02,
        weight_decay=0.1,
        validate_every=250,
        checkpoint_every=250,
        keep=1,
        bf16=False,  # nothing to gain at this width
    )

    def report(progress: Progress) -> None:
        if progress.step % 50 == 0 or progress.validation:
            line = f"step {progress.step} loss {progress.losses[0]:.3f} {progress.tokens_per_second:.0f} tok/s"
            print(line, progress.validation or "", flush=True)

    model = untrained(len(tokenizer), arguments.layers, arguments.hidden)
    validation = Blocks(store, held_out, 256, seed=0, shuffle=False)
    train(model, Blocks(store, learn, 256, seed=0), validation, options, arguments.folder, report=report)
    model.base.config._attn_implementation = "sdpa"
    model.base.save_pretrained(str(arguments.folder / "model"))
    tokenizer.save_pretrained(arguments.folder / "model")


if __name__ == "__main__":
    main()
