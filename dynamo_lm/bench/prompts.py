"""What is continued: prompts of a file as token ids, cut to the context and put into batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from dynamo_lm.errors import InputError
from dynamo_lm.evaluation.completion import prompts as benches


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
    return [Prompt(name, tuple(tokenizer(text).input_ids)) for text in texts[:limit]]


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
