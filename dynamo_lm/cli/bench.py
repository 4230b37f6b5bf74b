"""`dynamo-lm bench`: how fast a model writes, compared with everything else that decodes the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dynamo_lm.bench.options import PromptOptions, RaceOptions
from dynamo_lm.cli.dataclass_options import dataclass_options
from dynamo_lm.cli.options import MACHINE, Json, Model, ModelOptions

RANDOM_HEADS = 4  # of a model that has none, with --synthetic-acceptance
WIDTH = 128  # columns that the tables need; a narrower terminal wraps them


@dataclass_options
def bench(
    command_line: typer.Context,
    model: Model,
    prompts: PromptOptions,
    race: RaceOptions,
    compute: ModelOptions,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for bench.json.", rich_help_panel=MACHINE)] = None,
    json: Json = False,
) -> None:
    """How fast a model writes, compared with everything else that decodes the same weights.

    In one run: one token per step by four loops, of which the fastest is the baseline; transformers' prompt lookup;
    llama.cpp with --gguf; DynaMo in all its modes; and the machine's memory-bandwidth floor. Ratios are
    medians over interleaved repetitions.

    With --synthetic-acceptance: what heads would give on this machine before any are trained, and nothing on quality.

    `dynamo-lm bench story --prompts stories.txt --out results/bench`
    """
    from dynamo_lm.bench.benchmark import open_context, run
    from dynamo_lm.bench.prompts import read
    from dynamo_lm.cli.progress import counting
    from dynamo_lm.model.loading import print_json

    untrained = None if race.synthetic_acceptance is None else race.heads or RANDOM_HEADS
    network, tokenizer = compute.open(model, random_heads=untrained)
    texts = read(prompts.prompts, tokenizer, limit=prompts.limit)
    command = command_line.find_root().obj or []
    with counting() as progress:
        record = run(
            open_context(network),
            {"short": texts},
            race,
            max_new_tokens=prompts.max_new_tokens,
            name=model,
            command=command,
            out=out,
            progress=progress,
        )
    if json:
        print_json(record)
        return
    show(record)
    if out is not None:
        print(out / "bench.json")


def show(record: dict[str, Any]) -> None:
    """The record as tables on stdout."""
    from rich.console import Console

    from dynamo_lm.bench import tables

    console = Console(highlight=False)
    console.width = max(console.width, WIDTH)
    model, threads, repetitions = record["model"], record["machine"]["threads"], record["settings"]["repetitions"]
    console.print(f"{model['name']}, {model['dtype']}, {threads} threads, {repetitions} repetitions")
    for race in record["races"]:
        console.print()
        console.print(tables.table(race))
        by_group = tables.groups(race)
        if by_group is not None:
            console.print()
            console.print(by_group)
        for note in tables.notes(race):
            console.print(note, style="dim")
