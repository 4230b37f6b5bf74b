"""Lets SmolLM2 write questions for its heads' training: `python -m recipes.smollm2.questions BASE DATA PROMPTS` (resumes).

An instruction-tuned model that is given the beginning of a user's message goes on with a question like those that it was
tuned on (Magpie, arXiv 2406.08464). More than half of the messages begin with an opening of this file, so that tasks of
all kinds occur. A question is kept if it ends within its room, is new, and shares no 13 words with a benchmark prompt.
PROMPTS has the lines that `recipes.smollm2.prompts` writes.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dynamo_lm.data.chat_template import encode_chat
from dynamo_lm.jsonl_cache import JsonlLog
from dynamo_lm.training.self_distill import Question
from recipes.smollm2.answer import answerer_of
from recipes.smollm2.prompts import ANSWER, FOLLOW_UPS, bench_prompts, choices, grams

OPENINGS = """Write|Write a|Write an essay|Explain|Describe|How do|How can|What is|What are|What would|Create a|Compose
a|Imagine|Suppose|Given|Help me|Please|Implement|Write a function|Write a program|Solve|If|A|Compare|Summarize|Give
me|Tell me|You are|Pretend|Read the following|Rewrite|Which|Why|Is it|Design|Consider|Calculate|Find|Discuss|List|
Should|Develop|The|In|Draft|Provide|Analyze|Identify|Edit|Extract|Evaluate|When|Who|Determine|Propose|Outline"""
OPENED = 0.6  # share of the questions that begin with an opening
NEW_TOKENS, LEAST_WORDS = 96, 4
TEMPERATURES = (0.0, 0.0, 0.0, 0.7, 1.0)  # of the answers
FOLLOWED = 0.25  # share of the conversations with a second question
MARK = "\0"


def beginnings(tokenizer: Any) -> Iterator[tuple[str, list[int]]]:
    """Openings and the token ids of a conversation up to them, for ever."""
    rng = random.Random(23)
    before = tokenizer.decode(encode_chat(tokenizer, [{"role": "user", "content": MARK}])).split(MARK)[0]
    openings = choices(OPENINGS)
    while True:
        opening = rng.choice(openings) if rng.random() < OPENED else ""
        yield opening, tokenizer(before + opening, add_special_tokens=False)["input_ids"]


def conversation(number: int, question: str) -> dict[str, Any]:
    """The line of PROMPTS for one question; its random choices depend on its number alone."""
    rng = random.Random(f"own {number}")
    messages: list[dict[str, Any]] = [{"role": "user", "content": question}, ANSWER]
    if rng.random() < FOLLOWED:
        messages += [{"role": "user", "content": rng.choice(choices(FOLLOW_UPS))}, ANSWER]
    return {"id": f"own-{number}", "messages": messages, "temperature": rng.choice(TEMPERATURES)}


class Sieve:
    """Which questions are kept."""

    def __init__(self, data: Path, known: list[str]):
        texts = list(bench_prompts(data))
        self.grams = set().union(*map(grams, texts))
        self.known = {" ".join(text.lower().split()) for text in (*texts, *known)}

    def keeps(self, question: str) -> bool:
        """Whether this question is new and in no benchmark; from now on it is known."""
        plain = " ".join(question.lower().split())
        if len(plain.split()) < LEAST_WORDS or plain in self.known or grams(question) & self.grams:
            return False
        self.known.add(plain)
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base")
    parser.add_argument("data", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--number", type=int, default=4500)
    parser.add_argument("--temperature", type=float, default=0.9)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    answerer = answerer_of(arguments.base, arguments.rows, arguments.temperature)
    tokenizer = answerer.tokenizer
    log = JsonlLog(arguments.prompts)
    asked = {line["id"] for line in log.records}
    sieve = Sieve(arguments.data, [line["messages"][0]["content"] for line in log.records])
    waiting = enumerate(beginnings(tokenizer))
    openings: dict[int, str] = {}  # by number of the question
    began, steps = time.monotonic(), 0
    while len(asked) < arguments.number:
        while len(openings) < arguments.rows:
            number, (opening, ids) = next(waiting)
            if f"own-{number}" not in asked:
                openings[number] = opening
                answerer.ask(Question(number, [], ids, NEW_TOKENS, number))
        for answer in answerer.answers():
            number = answer.question.number
            question = openings.pop(number) + tokenizer.decode(answer.ids, skip_special_tokens=True)
            if answer.finish == "stop" and sieve.keeps(question):
                log.append(conversation(number, question.strip()))
                asked.add(f"own-{number}")
        steps += 1
        if steps % 100 == 0:
            print(f"{len(asked)} questions, {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
