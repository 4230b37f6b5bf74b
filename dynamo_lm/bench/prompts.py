"""What is continued: prompts from a file or from Spec-Bench's six groups, as they are or after a long context of real text.

Everything here is token ids once it is read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from dynamo_lm.data.token_store import documents
from dynamo_lm.errors import InputError
from dynamo_lm.evaluation.completion import prompts as benches

MT_BENCH = ("writing", "reasoning", "math", "humanities", "roleplay", "coding", "stem", "extraction")  # one group of six
LONG = 0.75  # of the model's context


@dataclass(frozen=True)
class Prompt:
    """One text to continue."""

    group: str
    tokens: tuple[int, ...]


def read(file: Path | None, tokenizer: Any, *, limit: int | None = None) -> list[Prompt]:
    """Prompts of one file (one a line, or JSON lines), or the paper's ten.

    Raises:
        InputError: no such file, or no prompts in it.
    """
    name, texts = benches.read(None if file is None else str(file))
    return [Prompt(name, _tokens(text, tokenizer)) for text in texts[:limit]]


def read_spec_bench(file: Path, tokenizer: Any, *, limit: int | None = None) -> list[Prompt]:
    """First turns of Spec-Bench, `limit` of each of its six groups.

    Raises:
        InputError: no such file, or lines without `category` and `turns`.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f'The prompts "{file}" cannot be read; name Spec-Bench\'s question file.') from error
    groups: dict[str, list[Prompt]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            category, text = entry["category"], entry["turns"][0]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise InputError(f'{file}:{number} is not a question of Spec-Bench; it needs "category" and "turns".') from error
        group = "mt-bench" if category in MT_BENCH else category
        own = groups.setdefault(group, [])
        if limit is None or len(own) < limit:
            own.append(Prompt(group, _tokens(text, tokenizer)))
    if not groups:
        raise InputError(f'"{file}" has no prompts; name Spec-Bench\'s question file.')
    return [prompt for group in sorted(groups) for prompt in groups[group]]


def filler(file: Path, tokenizer: Any, tokens: int) -> list[int]:
    """At least `tokens` token ids of running text from a corpus, again from its beginning where it is too short.

    Raises:
        InputError: no such file, or no text in it.
    """
    ids: list[int] = []
    for text in documents(str(file)):
        ids += tokenizer(text, add_special_tokens=False).input_ids
        if len(ids) >= tokens:
            break
    if not ids:
        raise InputError(f'"{file}" has no text to put before the prompts.')
    return list(islice(cycle(ids), max(tokens, len(ids))))


def lengthened(prompts: Sequence[Prompt], length: int, text: Sequence[int]) -> list[Prompt]:
    """Every prompt with text before it, to `length` tokens; each gets another stretch of the text. Longer ones stay."""
    longer, at = [], 0
    for prompt in prompts:
        missing = max(0, length - len(prompt.tokens))
        if missing > len(text):
            raise InputError(f"{missing} tokens of text are needed before a prompt and the filler has {len(text)}.")
        at = at if at + missing <= len(text) else 0
        longer.append(Prompt(prompt.group, (*text[at : at + missing], *prompt.tokens)))
        at += missing
    return longer


def fitted(prompts: Sequence[Prompt], context: int, max_new_tokens: int) -> tuple[list[Prompt], int]:
    """Prompts that leave room for the new tokens: of longer ones the end is kept. Also how many were cut.

    Raises:
        InputError: no room for a prompt at all.
    """
    room = context - max_new_tokens
    if room < 1:
        raise InputError(f"--max-new-tokens {max_new_tokens} leaves no room for prompts in a context of {context} tokens.")
    cut = sum(len(prompt.tokens) > room for prompt in prompts)
    return [Prompt(prompt.group, prompt.tokens[-room:]) for prompt in prompts], cut


def batches(prompts: Sequence[Prompt], size: int) -> list[list[Prompt]]:
    """Prompts in batches of one group each; a batch that is not full takes that group's first prompts again."""
    chunks = []
    for group in dict.fromkeys(prompt.group for prompt in prompts):
        own = [prompt for prompt in prompts if prompt.group == group]
        for start in range(0, len(own), size):
            chunks.append(list(islice(cycle(own[start:] + own[:start]), size)))
    return chunks


def _tokens(text: str, tokenizer: Any) -> tuple[int, ...]:
    return tuple(tokenizer(text).input_ids)
