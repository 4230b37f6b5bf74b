"""Makes the bundled story model from `data/stories`: `python -m recipes.story` (hours on two CPU cores; resumes).

Tokenizer (byte-level BPE, 4,096 entries), a 16-layer GPT-NeoX trained from scratch together with heads 2..4 by the
modified-CLM objective, n-gram tables, and the folder that the package ships.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from itertools import count
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GPTNeoXConfig, PreTrainedTokenizerFast

from dynamo_lm import DynaMoForCausalLM
from dynamo_lm.cooccurrence.counting import count as count_ngrams
from dynamo_lm.data.packing import Blocks
from dynamo_lm.data.token_store import TokenStore, documents, tokenize, tokenizer_fingerprint
from dynamo_lm.training.log import Progress
from dynamo_lm.training.loss import perplexities
from dynamo_lm.training.options import TrainingOptions
from dynamo_lm.training.provenance import begin
from dynamo_lm.training.trainer import train

DATA = Path(os.environ.get("DYNAMO_DATA", "../shared/data"))
SOURCES = [str(DATA / "stories" / name) for name in ("tinystories.jsonl", "fables.jsonl", "fairytaleqa.jsonl")]
SIMPLE = SOURCES[:2]  # what the model should sound like: the old tales are only read at first
SWITCH = 1150  # step from which only these are read
END = "<|endoftext|>"
CONTEXT = 1024


def build_tokenizer(folder: Path, vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the stories, saved in `folder`; reused if it is there."""
    if (folder / "tokenizer.json").exists():
        return PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator((text for source in SOURCES for text in documents(source)), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=END, model_max_length=CONTEXT
    )
    fast.save_pretrained(folder)
    return fast


def untrained(vocab_size: int, num_heads: int) -> DynaMoForCausalLM:
    """The story model's shape, deep and narrow so that heads are a small part of a step, with random weights."""
    config = GPTNeoXConfig(
        vocab_size=vocab_size,
        hidden_size=192,
        num_hidden_layers=16,
        num_attention_heads=3,
        intermediate_size=768,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    # On CPUs the plain attention trains 1.5 times as fast as torch's fused one at this size.
    base = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return DynaMoForCausalLM.from_base(base, num_heads=num_heads)


class Curriculum:
    """Blocks of one corpus up to a step, of another after it; still a function of the step alone."""

    def __init__(self, first: Blocks, then: Blocks, switch: int):
        self.first, self.then, self.switch = first, then, switch

    def batches(self, start_step: int, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
        for step in count(start_step):
            yield (self.first if step < self.switch else self.then).batch(step, batch_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/story"))
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--asset", type=Path, default=Path("dynamo_lm/assets/story"))
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    folder = arguments.folder
    tokenizer = build_tokenizer(folder / "tokenizer")
    everything = tokenize(SOURCES, tokenizer, folder / "tokens")
    simple = tokenize(SIMPLE, tokenizer, folder / "simple")
    stages = [Blocks(store, store.split(0.01, seed=0)[0], 256, seed=0) for store in (everything, simple)]
    blocks = Curriculum(*stages, switch=SWITCH)
    validation = Blocks(simple, simple.split(0.01, seed=0)[1], 256, seed=0, shuffle=False)
    model = untrained(len(tokenizer), arguments.heads)
    print(f"{everything.num_tokens:,} tokens, then {simple.num_tokens:,}", flush=True)
    options = TrainingOptions(
        steps=arguments.steps,
        lr_b=2e-3,
        lr_m=2e-3,
        lr_mb=5e-4,
        batch_size=16,
        warmup=0.02,
        weight_decay=0.1,
        seed=0,
        validate_every=200,
        checkpoint_every=100,
    )

    def report(progress: Progress) -> None:
        if progress.step % 20 == 0 or progress.validation:
            losses = " ".join(f"{loss:.3f}" for loss in progress.losses)
            print(f"step {progress.step} losses {losses} {progress.tokens_per_second:.0f} tok/s", flush=True)
            if progress.validation:
                print(progress.validation, flush=True)

    train(model, blocks, validation, options, folder, report=report)
    ship(model, tokenizer, everything, options, arguments.asset)


def ship(
    model: DynaMoForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    store: TokenStore,
    options: TrainingOptions,
    asset: Path,
) -> None:
    """Counts the tables, measures the perplexities of the weights as they ship (bfloat16), and writes the folder."""
    learn, _ = store.split(0.01, seed=0)
    documents_learned = (store.document(int(index)) for index in learn)
    identity = tokenizer_fingerprint(tokenizer)
    model.cooccurrence = count_ngrams(
        documents_learned, vocab_size=len(tokenizer), order=4, tokenizer=identity, description="the training stories"
    )
    model.base.config._attn_implementation = "sdpa"
    model.to(torch.bfloat16).to(torch.float32)  # ships in half the bytes; runs, and is measured, in float32
    found = {}
    for source in SOURCES:
        name = Path(source).stem
        one = tokenize([source], tokenizer, store.folder.parent / name)
        blocks = Blocks(one, one.split(0.01, seed=0)[1], 256, seed=0, shuffle=False)
        measured = perplexities(model, blocks, batch_size=16, bf16=False, limit=10**6)
        found[name] = {"PPL": measured.heads, "PPL_1:n": measured.joint[-1], "blocks": blocks.num_blocks()}
        print(name, measured, flush=True)
    model.to(torch.bfloat16).save_pretrained(str(asset))
    tokenizer.save_pretrained(asset)
    config = asset / "config.json"  # so that opening it gives float32
    config.write_text(
        config.read_text(encoding="utf-8").replace('"dtype": "bfloat16"', '"dtype": "float32"'), encoding="utf-8"
    )
    record = begin([])
    record.update(
        command="python -m recipes.story",
        data={"sources": [Path(source).name for source in SOURCES], "fingerprint": store.fingerprint, "switch": SWITCH}
        | {"training_tokens": int((store.offsets[learn + 1] - store.offsets[learn]).sum())},
        steps=options.steps,
        options=asdict(options),
        perplexities=headline(found["tinystories"]),
        by_corpus=found,
    )
    (asset / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (asset / "README.md").write_text(card(model, store, options, found), encoding="utf-8")


def headline(numbers: dict) -> dict[str, float]:
    """One corpus's perplexities by name, as `dynamo-lm info` prints them."""
    named = {f"PPL_{i}": value for i, value in enumerate(numbers["PPL"], start=1)}
    return named | {f"PPL_1:{len(named)}": numbers["PPL_1:n"]}


def card(model: DynaMoForCausalLM, store: TokenStore, options: TrainingOptions, found: dict) -> str:
    """The bundled model's card."""
    base = sum(parameter.numel() for parameter in model.base.parameters())
    seen = options.steps * options.batch_size * 256
    rows = "\n".join(
        f"| {name} | {' | '.join(f'{value:.1f}' for value in numbers['PPL'])} | {numbers['PPL_1:n']:.1f} |"
        for name, numbers in found.items()
    )
    return f"""---
library_name: dynamo-lm
pipeline_tag: text-generation
language: en
license: apache-2.0
tags: [dynamo, multi-token-prediction, stories]
---

# The dynamo-lm story model

A GPT-NeoX (Pythia-shaped) model of 16 layers x 192, {base / 1e6:.1f}M parameters, vocabulary {model.config.vocab_size:,}
(byte-level BPE), context {CONTEXT}, with DynaMo heads 2..4 ({model.overhead():.1%} more parameters) and n-gram tables up to
order 4. It tells little stories; it is made to show decoding on a laptop, not to know anything.

Trained from scratch, base and heads together by the modified-CLM objective, on {seen / 1e6:.1f}M tokens of TinyStories
(CDLA-Sharing-1.0), TinyFabulist fables (MIT) and, in the first {SWITCH} steps, FairytaleQA tales (Apache-2.0), by
`python -m recipes.story`. Heads 2..4 sent a quarter of their gradient into the base. Weights are stored in bfloat16.

Perplexities on held-out documents (1 % of each corpus, chosen by content hash; all heads at the same positions):

| corpus | PPL_1 | PPL_2 | PPL_3 | PPL_4 | PPL_1:4 |
|---|---|---|---|---|---|
{rows}

Limits: short simple English stories only; it repeats itself under greedy decoding; nothing it says is a fact.
"""


if __name__ == "__main__":
    main()
