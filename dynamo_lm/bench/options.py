"""What a user may choose about a benchmark, declared once: the command line reads its options from these fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from dynamo_lm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """What is continued."""

    PANEL: ClassVar[str] = "What is continued"

    prompts: Annotated[Path | None, "Prompts, one a line or JSON lines. Default: the paper's ten."] = None
    limit: Annotated[int | None, "Prompts at most."] = None
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Length of a text.")] = 80

    def __post_init__(self) -> None:
        _at_least(1, self.limit, "--limit")
        _at_least(8, self.max_new_tokens, "--max-new-tokens")


@dataclass(frozen=True, kw_only=True)
class RaceOptions:
    """What is raced, and how often."""

    PANEL: ClassVar[str] = "What is raced"

    batch: Annotated[str, "Prompts at a time; several sizes as 1,4,16."] = "1"
    repetitions: Annotated[int, "Repetitions of the whole race."] = 5
    heads: Annotated[int | None, "The most tokens a step may give. Default: all heads."] = None
    gguf: Annotated[Path | None, "The model as a GGUF file, for llama.cpp (needs the package xllamacpp)."] = None
    only: Annotated[list[str], "Race the methods whose name contains this, and the baselines."] = field(default_factory=list)
    synthetic_acceptance: Annotated[
        float | None,
        "Accept each draft by chance, with this probability: what heads that are accepted so often would give on this "
        "machine. A model without heads gets --heads (4) random ones. The texts mean nothing.",
    ] = None
    sampled: Annotated[bool, typer.Option("--sampled/--greedy-only", help="Methods that sample, too.")] = True
    compile: Annotated[bool, typer.Option("--compile/--no-compile", help="Loops that must be compiled first.")] = True
    seed: Annotated[int, "Seed of all random numbers."] = 0

    def __post_init__(self) -> None:
        _at_least(1, self.repetitions, "--repetitions")
        _ = self.batch_sizes
        chance = self.synthetic_acceptance
        if chance is not None and not 0 <= chance <= 1:
            raise InputError(f"--synthetic-acceptance is {chance}; give a probability, 0 to 1.")
        if self.gguf is not None and not self.gguf.is_file():
            raise InputError(f'--gguf is "{self.gguf}", and there is no such file; give a GGUF file of the model.')

    @property
    def batch_sizes(self) -> list[int]:
        try:
            sizes = [int(part) for part in self.batch.split(",")]
        except ValueError:
            sizes = [0]
        if min(sizes) < 1:
            raise InputError(f'--batch is "{self.batch}"; give sizes of 1 or more, as 1,4,16.')
        return sizes


def _at_least(least: int, value: int | None, option: str) -> None:
    if value is not None and value < least:
        raise InputError(f"{option} is {value}; give {least} or more.")
