"""Lets SmolLM2 answer the prompts of its heads' training: `python -m recipes.smollm2.answer BASE PROMPTS ANSWERS` (resumes).

Many prompts at a time, one token a step, in bfloat16. An answer that runs into a loop ends with its first repetition.
ANSWERS: JSON lines {"id", "turn", "answer_ids", "finish"}, of which `records` makes prompts and answers again. The
answers that the shipped heads learned are in answers.jsonl.gz beside this file.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynamo_lm import DynaMoForCausalLM
from dynamo_lm.data.chat_template import encode_chat, end_of_turn
from dynamo_lm.decoding.batch import Batch
from dynamo_lm.decoding.sequence import SequenceState
from dynamo_lm.decoding.settings import resolve
from dynamo_lm.kernels.linear import arrange_for_batches
from dynamo_lm.training.self_distill import LOOK_EVERY, repeated

NEW_TOKENS, LONGEST, LEAST_ROOM = 384, 1024, 32
GROUP = 8  # prompts that are read together, so neighbours are alike in length
PASSAGES = 0.35  # share of the prompts with a passage, which cost as much to read as several answers


class Turn(NamedTuple):
    """One answered turn of a conversation."""

    prompt_ids: list[int]  # everything before the answer
    answer_ids: list[int]
    finish: str


def load(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Answers by prompt and place in the conversation; a line that was cut off counts as never written."""
    known = {}
    if path.exists():
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                if line.endswith("\n"):
                    record = json.loads(line)
                    known[record["id"], record["turn"]] = record
    return known


def records(prompts: Path, answers: Path, tokenizer: Any) -> Iterator[list[Turn]]:
    """The answered turns of each conversation."""
    known = load(answers)
    with prompts.open(encoding="utf-8") as lines:
        for line in lines:
            record, messages, turns = json.loads(line), [], []
            for place, message in enumerate(record["messages"]):
                if message["role"] == "user":
                    messages.append(message)
                    continue
                answer = known.get((record["id"], place))
                if answer is None or not answer["answer_ids"]:
                    break
                turns.append(Turn(encode_chat(tokenizer, messages), answer["answer_ids"], answer["finish"]))
                text = tokenizer.decode(answer["answer_ids"], skip_special_tokens=True)
                messages.append({"role": "assistant", "content": text})
            if turns:
                yield turns


def order(prompts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups of prompts that are alike in length, the groups in random order."""
    rng = random.Random(1)
    chosen = [each for each in prompts if not each["id"].startswith("passage") or rng.random() < PASSAGES]
    chosen.sort(key=lambda each: len(each["messages"][0]["content"]))
    grouped = [chosen[start : start + GROUP] for start in range(0, len(chosen), GROUP)]
    rng.shuffle(grouped)
    return [each for group in grouped for each in group]


class Writer:
    """Answers conversations turn by turn and appends each answer to the file as it ends."""

    def __init__(self, base: str, answers: Path):
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        self.model = DynaMoForCausalLM.from_base(loaded, 1).eval()
        self.batch, self.known = Batch(self.model, 1), load(answers)
        arrange_for_batches(self.batch.model, 64)
        self.ends = [end_of_turn(self.tokenizer), self.tokenizer.eos_token_id]
        self.open: dict[SequenceState, tuple[dict[str, Any], list[dict[str, str]]]] = {}
        self.file = answers.open("a", encoding="utf-8")
        self.tokens = 0

    def ask(self, record: dict[str, Any], messages: list[dict[str, str]]) -> None:
        """Begins the next turn that has no answer yet, if there is one with room."""
        while len(messages) < len(record["messages"]):
            place = len(messages)
            if record["messages"][place]["role"] == "user":
                messages.append(record["messages"][place])
                continue
            if (known := self.known.get((record["id"], place))) is not None:
                if known["finish"] == "loop":
                    return
                text = self.tokenizer.decode(known["answer_ids"], skip_special_tokens=True)
                messages.append({"role": "assistant", "content": text})
                continue
            prompt = encode_chat(self.tokenizer, messages)
            room = min(NEW_TOKENS, LONGEST - len(prompt))
            if room >= LEAST_ROOM:
                settings = {"temperature": record["temperature"], "num_heads": 1}
                options = resolve(self.model, settings, max_new_tokens=room, end_tokens=self.ends)
                sequence = self.batch.join(prompt, options, seed=random.Random(f"{record['id']} {place}").randrange(2**31))
                self.open[sequence] = record, messages
            return

    def step(self, look: bool) -> None:
        """One token of every open answer."""
        for sequence in self.batch.step():
            tokens, finish = sequence.new_tokens, sequence.finished
            if finish is None and look and (extra := repeated(tokens)):
                self.batch.leave(sequence)
                tokens, finish = tokens[:-extra], "loop"
            if finish is None:
                continue
            record, messages = self.open.pop(sequence)
            answer = {"id": record["id"], "turn": len(messages), "answer_ids": tokens, "finish": finish}
            self.file.write(json.dumps(answer) + "\n")
            self.file.flush()
            self.known[record["id"], len(messages)] = answer
            self.tokens += len(tokens)
            self.ask(record, messages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base")
    parser.add_argument("prompts", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=10**9, help="stop after so many")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with arguments.prompts.open(encoding="utf-8") as lines:
        waiting = iter(order([json.loads(line) for line in lines]))
    writer, began, steps = Writer(arguments.base, arguments.answers), time.monotonic(), 0
    more = True
    while (more or writer.batch.running) and writer.tokens < arguments.tokens:
        while more and len(writer.batch.running) <= arguments.rows - GROUP:
            for _ in range(GROUP):
                record = next(waiting, None)
                more = more and record is not None
                if record is not None:
                    writer.ask(record, [])
        if writer.batch.running:
            writer.step(look=steps % LOOK_EVERY == 0)
        steps += 1
        if steps % 100 == 0:
            rate = writer.tokens / (time.monotonic() - began)
            print(f"{len(writer.known)} answers, {writer.tokens:,} tokens, {rate:.0f} tokens/s", flush=True)


if __name__ == "__main__":
    main()
