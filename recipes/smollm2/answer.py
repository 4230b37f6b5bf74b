"""Lets SmolLM2 answer the prompts of its heads' training: `python -m recipes.smollm2.answer BASE PROMPTS ANSWERS` (resumes).

Many prompts at a time, one token a step, in bfloat16. An answer that runs into a loop ends with its first repetition.
ANSWERS: JSON lines {"id", "turn", "answer_ids", "finish"}, of which `records` makes prompts and answers again. Of the
answers in answers.jsonl.gz beside this file the parallel heads learned the first 4,394 and 1,950 of the others, the EAGLE-3
head the first 7,757.
Prompts whose id begins with "own" are those of questions.jsonl.gz (recipes.smollm2.questions).
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynamo_lm import DynaMoForCausalLM
from dynamo_lm.data.chat_template import encode_chat
from dynamo_lm.jsonl_cache import JsonlLog
from dynamo_lm.training.self_distill import BatchAnswerer, Question
from recipes.smollm2.prompts import json_lines

NEW_TOKENS, LONGEST, LEAST_ROOM = 384, 1024, 32
GROUP = 8  # prompts that are read together, so neighbours are alike in length
PASSAGES = 0.35  # share of the prompts with a passage, which cost as much to read as several answers


class Turn(NamedTuple):
    """One answered turn of a conversation."""

    prompt_ids: list[int]  # everything before the answer
    answer_ids: list[int]
    finish: str


def by_turn(answers: Iterable[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    """Answers by prompt and place in the conversation."""
    return {(answer["id"], answer["turn"]): answer for answer in answers}


def records(prompts: Path, answers: Path, tokenizer: Any) -> Iterator[list[Turn]]:
    """The answered turns of each conversation."""
    answered = by_turn(json_lines(answers))
    for record in json_lines(prompts):
        messages, turns = [], []
        for place, message in enumerate(record["messages"]):
            if message["role"] == "user":
                messages.append(message)
                continue
            answer = answered.get((record["id"], place))
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


def answerer_of(base: str, rows: int, temperature: float = 0.7) -> BatchAnswerer:
    """The base in bfloat16, `rows` texts at a time, one token a step."""
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model, tokenizer = DynaMoForCausalLM.from_base(loaded, 1).eval(), AutoTokenizer.from_pretrained(base)
    return BatchAnswerer(model, tokenizer, temperature=temperature, batch_size=rows)


class Writer:
    """Answers conversations turn by turn and appends each answer to the file as it ends."""

    def __init__(self, base: str, answers: Path, rows: int):
        self.answerer = answerer_of(base, rows)
        self.tokenizer = self.answerer.tokenizer
        self.log = JsonlLog(answers)
        self.answers = by_turn(self.log.records)
        self.requests: dict[int, tuple[dict[str, Any], list[dict[str, str]]]] = {}  # by number of the question
        self.tokens = 0

    def ask(self, record: dict[str, Any], messages: list[dict[str, str]]) -> None:
        """Begins the next turn that has no answer yet, if there is one with room."""
        while len(messages) < len(record["messages"]):
            place = len(messages)
            if record["messages"][place]["role"] == "user":
                messages.append(record["messages"][place])
                continue
            if (earlier := self.answers.get((record["id"], place))) is not None:
                if earlier["finish"] == "loop":
                    return
                text = self.tokenizer.decode(earlier["answer_ids"], skip_special_tokens=True)
                messages.append({"role": "assistant", "content": text})
                continue
            prompt = encode_chat(self.tokenizer, messages)
            room = min(NEW_TOKENS, LONGEST - len(prompt))
            if room >= LEAST_ROOM:
                number = len(self.answers) + len(self.requests)
                seed = random.Random(f"{record['id']} {place}").randrange(2**31)
                self.requests[number] = record, messages
                self.answerer.ask(Question(number, messages, prompt, room, seed), record["temperature"])
            return

    def step(self) -> None:
        """One token of every open answer."""
        for answer in self.answerer.answers():
            record, messages = self.requests.pop(answer.question.number)
            entry = {"id": record["id"], "turn": len(messages), "answer_ids": list(answer.ids), "finish": answer.finish}
            self.log.append(entry)
            self.answers[record["id"], len(messages)] = entry
            self.tokens += answer.tokens
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
    waiting = iter(order(list(json_lines(arguments.prompts))))
    writer, began, steps = Writer(arguments.base, arguments.answers, arguments.rows), time.monotonic(), 0
    more = True
    while (more or writer.requests) and writer.tokens < arguments.tokens:
        while more and len(writer.requests) <= arguments.rows - GROUP:
            for _ in range(GROUP):
                record = next(waiting, None)
                more = more and record is not None
                if record is not None:
                    writer.ask(record, [])
        if writer.requests:
            writer.step()
        steps += 1
        if steps % 100 == 0:
            rate = writer.tokens / (time.monotonic() - began)
            print(f"{len(writer.answers)} answers, {writer.tokens:,} tokens, {rate:.0f} tokens/s", flush=True)


if __name__ == "__main__":
    main()
