"""Makes an instruction set from `data/stories` and `data/instruct`: `python -m recipes.instruct OUT`.

Conversations in OpenAI's form, one a line: `OUT/train.jsonl` and `OUT/validation.jsonl`. Fables come with a question made of
the parts that their prompts name (a third of them with the whole prompt, which is long), Dolly's pairs as they are. What
does not fit the block of the model that is to learn it is left out and counted.

Licences: fables MIT, Dolly CC-BY-SA-3.0. `--research` adds Alpaca pairs under CC-BY-NC-4.0, for weights that never ship.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoTokenizer

from dynamo_lm.data.chat_template import chat_template
from dynamo_lm.data.conversations import Messages, conversations
from dynamo_lm.data.tokenize_chat import encode
from dynamo_lm.model.loading import resolve

DATA = Path(os.environ.get("DYNAMO_DATA", "../shared/data"))
FABLES = DATA / "stories" / "fables.jsonl"
DOLLY = [DATA / "instruct" / "dolly_3k.json", DATA / "instruct" / "dolly_hhrlhf_train_small.jsonl"]
RESEARCH = [DATA / "instruct" / "claude_t45.json"]
PARTS = ("Main Character", "Setting", "Challenge", "Outcome", "Teaching")
QUESTIONS = (  # short ways to ask for the same fable
    "Write a fable about {character}.",
    "Tell me a story about {character} and {challenge}.",
    "Write a short fable about {character} in {setting}. It should teach that {teaching}.",
    "I would like a story with a moral: {teaching}.",
    "Please tell a fable. Main character: {character}. Challenge: {challenge}. Outcome: {outcome}.",
    "Can you tell me a story that takes place in {setting}?",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="story", help="whose tokenizer counts")
    parser.add_argument("--block-size", type=int, default=1024, help="tokens that a conversation may have")
    parser.add_argument("--dolly", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--research", action="store_true", help="with pairs that are for research only")
    parser.add_argument("--held-out", type=float, default=0.05)
    options = parser.parse_args()
    sources = {"fables": fables()}
    if options.dolly:
        sources["dolly"] = pairs(DOLLY)
    if options.research:
        sources["research"] = pairs(RESEARCH)
    tokenizer = chat_template(AutoTokenizer.from_pretrained(resolve(options.model)))
    sides: dict[str, list[Messages]] = {"train": [], "validation": []}
    seen: set[str] = set()
    for name, found in sources.items():
        counts = dict.fromkeys(("read", "repeated", "too long", "train", "validation"), 0)
        for messages in found:
            counts["read"] += 1
            question = messages[-2]["content"]
            key = question if name != "fables" else messages[-1]["content"]  # many fables answer one question
            if key in seen or not messages[-1]["content"].strip():
                counts["repeated"] += 1
                continue
            seen.add(key)
            if any(len(ids) > options.block_size for ids, _ in encode(messages, tokenizer)):
                counts["too long"] += 1
                continue
            side = "validation" if draw(key, "side") < options.held_out else "train"
            counts[side] += 1
            sides[side].append(messages)
        print(f"{name}: " + ", ".join(f"{value:,} {what}" for what, value in counts.items()))
    options.out.mkdir(parents=True, exist_ok=True)
    for side, rows in sides.items():
        rows.sort(key=lambda messages: draw(json.dumps(messages), "order"))
        lines = (json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in rows)
        (options.out / f"{side}.jsonl").write_text("".join(lines), encoding="utf-8")


def fables() -> Iterator[Messages]:
    """Each fable with a question, the same one every time."""
    for line in FABLES.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        prompt = html.unescape(record["prompt"]).strip()
        parts = dict(re.findall(r"- (Main Character|Setting|Challenge|Outcome|Teaching): (.+)", prompt))
        if len(parts) < len(PARTS) or draw(record["text"], "whole") < 1 / 3:
            question = prompt
        else:
            character, setting, challenge, outcome, teaching = (parts[name].strip() for name in PARTS)
            form = QUESTIONS[int(draw(record["text"], "form") * len(QUESTIONS))]
            question = form.format(
                character=re.sub(r"^a (?=[aeiou])", "an ", character),
                setting=setting.removesuffix(" where our story unfolds"),
                challenge=challenge,
                outcome=outcome,
                teaching=teaching,
            )
        yield [{"role": "user", "content": question}, {"role": "assistant", "content": record["text"].strip()}]


def pairs(files: list[Path]) -> Iterator[Messages]:
    for _, messages in conversations([str(file) for file in files]):
        yield messages


def draw(text: str, purpose: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(f"{purpose} {text}".encode(), digest_size=8).digest(), "big") / 2**64


if __name__ == "__main__":
    main()
