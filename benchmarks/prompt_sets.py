"""Prompts that only this repository races: Spec-Bench's six groups, and prompts after a long context of real text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from dynamo_lm.bench.prompts import Prompt
from dynamo_lm.data.token_store import documents
from dynamo_lm.errors import InputError
from dynamo_lm.evaluation.completion.prompts import data_folder

MT_BENCH = ("writing", "reasoning", "math", "humanities", "roleplay", "coding", "stem", "extraction")  # one group of six
LONG = 0.75  # of the model's context


def read_spec_bench(file: Path, tokenizer: Any, *, limit: int | None = None) -> list[Prompt]:
    """First turns of Spec-Bench, `limit` of each of its six groups.

    Raises:
        InputError: no such file, or lines without `category` and `turns`.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
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
            own.append(Prompt(group, tuple(tokenizer(text).input_ids)))
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


def after_long_context(
    texts: Sequence[Prompt], tokenizer: Any, context: int, max_new_tokens: int, length: int | None, file: Path | None
) -> list[Prompt]:
    """Every prompt with text before it.

    Args:
        context: of the model, in tokens.
        length: of the prompts then; by default three quarters of the context.
        file: the text; by default the stories of $DYNAMO_DATA.
    """
    wanted = length or int(LONG * context)
    if wanted + max_new_tokens > context:
        raise InputError(
            f"A context of {wanted} tokens and {max_new_tokens} new ones exceed the model's {context}; lower "
            "--context-tokens or --max-new-tokens."
        )
    file = file or data_folder().parent / "stories" / "tinystories.jsonl"
    if not file.exists():
        raise InputError(f'There is no "{file}" to put before the prompts; name a text with --filler.')
    return lengthened(texts, wanted, filler(file, tokenizer, wanted * min(len(texts), 64)))
