"""The prompts of the completion benchmarks: the paper's ten, the question sets of `data/bench`, or the user's file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dynamo_lm.errors import InputError

PAPER = {  # prompt: kind of sentence (method.md section 5)
    "I am a student at the": "simple declarative",
    "This is going to be a very": "simple declarative",
    "He wanted to play, but": "compound declarative",
    "How can we": "W/H interrogative",
    "What will": "W/H interrogative",
    "Will you": "Y/N interrogative",
    "Please explain": "affirmative imperative",
    "Do not": "negative imperative",
    "Wow! I can't believe that": "exclamatory",
    "This is amazing! We": "exclamatory",
}
BENCHES = {"vicuna": "vicuna_bench.jsonl", "mt-bench": "mt_bench.jsonl"}  # first turns


def data_folder() -> Path:
    """The folder of the benchmarks: `$DYNAMO_DATA/bench`, else `../shared/data/bench`."""
    return Path(os.environ.get("DYNAMO_DATA", "../shared/data")) / "bench"


def read(bench: str | None, data: Path | None = None) -> tuple[str, list[str]]:
    """The name of a benchmark and its prompts.

    Args:
        bench: None for the paper's ten, "vicuna" or "mt-bench", or a file: JSON lines with `prompt`, `text`, `question` or
            `turns`, or plain text with one prompt a line.
        data: the folder of the question sets.

    Raises:
        InputError: no such file, or a line without a prompt.
    """
    if bench is None:
        return "paper", list(PAPER)
    file = (data or data_folder()) / BENCHES[bench] if bench in BENCHES else Path(bench)
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        hint = "name its folder with --data" if bench in BENCHES else f"give {', '.join(BENCHES)} or a text file"
        raise InputError(f'The prompts "{file}" cannot be read; {hint}.') from error
    prompts = [_prompt(line, f"{file}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise InputError(f'"{file}" has no prompts; give one a line.')
    return bench if bench in BENCHES else file.stem, prompts


def _prompt(line: str, where: str) -> str:
    if not line.lstrip().startswith("{"):
        return line
    entry = parse(line, where)
    for key in ("prompt", "text", "question", "turns"):
        value = entry.get(key)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, str) and value.strip():
            return value
    raise InputError(f'{where} has no prompt; give it as "prompt", "text", "question" or "turns".')


def parse(line: str, where: str) -> dict[str, Any]:
    """The JSON object of a line; `where` is for the error.

    Raises:
        InputError: it is not one.
    """
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where} is not valid JSON: {error}.") from error
    if not isinstance(entry, dict):
        raise InputError(f"{where} is not a JSON object.")
    return entry
