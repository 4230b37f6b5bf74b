"""Trains SmolLM2's heads on the base's own answers: `python -m recipes.smollm2.train BASE PROMPTS ANSWERS OUT` (resumes).

PROMPTS are those of recipes.smollm2.prompts, ANSWERS those of recipes.smollm2.answer. OUT/model is the heads-only folder,
with a table of the answers' n-grams.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from dynamo_lm import DynaMoForCausalLM
from dynamo_lm.data.draft_tokens import draft_tokens
from dynamo_lm.data.packing import WholeBlocks
from dynamo_lm.data.token_store import TokenStore, build_store, digest
from dynamo_lm.files import write_text
from dynamo_lm.model.configuration import MEDUSA
from dynamo_lm.model.coupling import add_coupling
from dynamo_lm.private_interfaces import multiplies_bfloat16
from dynamo_lm.training import provenance
from dynamo_lm.training.answer_table import add_answers
from dynamo_lm.training.feature_cache import FeatureCache
from dynamo_lm.training.log import Progress
from dynamo_lm.training.options import TrainingOptions
from dynamo_lm.training.trainer import train
from recipes.smollm2.answer import Turn, records


def encoded(turns: list[Turn], longest: int) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation and which of them are answers, (tokens,) each, cut at `longest`."""
    ids = turns[-1].prompt_ids + turns[-1].answer_ids
    learned = [False] * len(ids)
    for turn in turns:
        start, end = len(turn.prompt_ids), len(turn.prompt_ids) + len(turn.answer_ids)
        if ids[:end] == turn.prompt_ids + turn.answer_ids:  # a template may write earlier turns in another way
            learned[start:end] = [True] * (end - start)
    return ids[:longest], learned[:longest]


def some(documents: list[tuple[list[int], list[bool]]], answer_tokens: int) -> list[tuple[list[int], list[bool]]]:
    """Documents drawn at random until their answers have so many tokens; 0: all of them."""
    if not answer_tokens:
        return documents
    drawn: list[tuple[list[int], list[bool]]] = []
    for document in random.Random(0).sample(documents, len(documents)):
        if answer_tokens <= 0:
            break
        drawn.append(document)
        answer_tokens -= sum(document[1])
    return drawn


def store_of(prompts: Path, answers: Path, tokenizer: Any, folder: Path, longest: int, answer_tokens: int) -> TokenStore:
    """The token store of these answers, or of `some`."""
    pairs = (encoded(turns, longest) for turns in records(prompts, answers, tokenizer))
    documents = some([(ids, learned) for ids, learned in pairs if any(learned)], answer_tokens)
    inputs = digest([[str(path.resolve()), path.stat().st_size] for path in (prompts, answers)] + [longest, answer_tokens])
    return build_store(folder, inputs, documents, tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base")
    parser.add_argument("prompts", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head", default="parallel", choices=["parallel", "eagle3", "medusa"])
    parser.add_argument("--draft-vocabulary", type=int, default=0, help="tokens that an eagle3 head drafts; 0 for all")
    parser.add_argument("--init", default="copy")
    parser.add_argument("--coupling-rank", type=int, default=0)
    parser.add_argument("--from-model", default=None, help="a trained DynaMo folder to go on from")
    parser.add_argument("--coupling-only", action="store_true")
    parser.add_argument("--block-size", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--answer-tokens", type=int, default=0, help="of conversations drawn at random; 0 for all")
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
    answers = arguments.prompts, arguments.answers
    store = store_of(*answers, tokenizer, arguments.out / "tokens", arguments.block_size, arguments.answer_tokens)
    learn, held_out = store.split(0.02, seed=0)
    blocks = WholeBlocks(store, learn, arguments.block_size, seed=0)
    validation = WholeBlocks(store, held_out, arguments.block_size, seed=0, shuffle=False)
    if arguments.from_model:
        model = DynaMoForCausalLM.from_pretrained(arguments.from_model, base=arguments.base, dtype=torch.float32)
        if arguments.coupling_rank and model.coupling is None:
            add_coupling(model, arguments.coupling_rank)
    else:
        kind: dict[str, Any] = MEDUSA if arguments.head == "medusa" else {"head": arguments.head}
        model = DynaMoForCausalLM.from_base(
            arguments.base,
            arguments.heads,
            **kind,
            draft_vocab_size=arguments.draft_vocabulary,
            init=arguments.init,
            coupling_rank=arguments.coupling_rank,
            dtype=torch.float32,
        )
    model.freeze_base()
    counts = blocks.learned_counts(model.output_weight().shape[0])
    if arguments.draft_vocabulary and not arguments.from_model:
        ids = draft_tokens(counts, arguments.draft_vocabulary, tokenizer)
        model.sequential_head.set_draft_vocabulary(ids, model.output_weight())
    steps = arguments.steps or round(arguments.epochs * blocks.num_blocks() / arguments.batch_size)
    bf16 = multiplies_bfloat16()
    options = TrainingOptions(
        steps=steps,
        lr_b=0.0,
        lr_mb=0.0,
        lr_m=arguments.lr,
        batch_size=arguments.batch_size,
        warmup=0.03,
        kl=arguments.kl,
        loss_vocabulary=1.0 if model.config.own_output_embedding and not model.config.sequential else arguments.vocabulary,
        coupling_only=arguments.coupling_only,
        bf16=bf16,
        validate_every=arguments.validate_every,
        checkpoint_every=50,
    )
    before = provenance.read(Path(arguments.from_model)) if arguments.from_model else None
    run = {"answer_tokens": int(counts.sum()), "epochs": steps * arguments.batch_size / blocks.num_blocks()}
    facts = {"runs": [*(before or {"runs": []})["runs"], run], "steps": (before or {"steps": 0})["steps"] + steps}
    write_text(arguments.out / "facts.json", json.dumps(facts) + "\n")
    limit = int(arguments.cache_gb * 1e9)
    features = FeatureCache(arguments.out / "features", model, blocks, limit_bytes=limit, bf16=bf16) if limit else None
    print(f"{blocks.total:,} tokens in {blocks.num_blocks()} blocks, {steps} steps, {len(held_out)} held out", flush=True)

    def report(progress: Progress) -> None:
        losses = " ".join(f"{loss:.3f}" for loss in (*progress.losses[1:], *progress.coupled))
        if progress.step % 5 == 0 or progress.validation:
            print(f"step {progress.step} loss {losses} {progress.tokens_per_second:.0f} tok/s", flush=True)
        if progress.acceptance:
            print(progress.validation, "|", progress.acceptance, flush=True)

    train(model, blocks, validation, options, arguments.out, features=features, report=report)
    if model.cooccurrence is None:
        add_answers(model, store, learn)
    model.save_pretrained(str(arguments.out / "model"), weights="heads")
    tokenizer.save_pretrained(arguments.out / "model")


if __name__ == "__main__":
    main()
