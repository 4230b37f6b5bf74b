"""`dynamo-lm bench` with what only this repository has: `python -m benchmarks.race MODEL --out results/bench-story`.

Beside the options of `dynamo-lm bench`: flashspec and llama.cpp (converted, so without --gguf) are raced where they are
installed, --profile says where a step's time goes, --shape races random weights of a Pythia's shape, and --out gets a
picture (see `race_plot`). Needs the extra `bench`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import typer

from dynamo_lm.bench.options import PromptOptions, RaceOptions
from dynamo_lm.cli.bench import show
from dynamo_lm.cli.dataclass_options import dataclass_options
from dynamo_lm.cli.options import Json, Model, ModelOptions, Out
from dynamo_lm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ShapeOptions:
    """Random weights instead of MODEL's: what a step costs."""

    PANEL: ClassVar[str] = "Random weights"

    shape: Annotated[str | None, "Random weights of this shape (pythia-70m, pythia-160m, ..) instead of MODEL's."] = None
    table_rows: Annotated[int, "Random triples in the tables of a --shape."] = 5_000_000
    prompt_tokens: Annotated[int, "Length of a --shape's random prompts."] = 32


@dataclass_options
def main(
    model: Model,
    prompts: PromptOptions,
    race: RaceOptions,
    shape: ShapeOptions,
    compute: ModelOptions,
    profile: Annotated[bool, "Where a step's time goes, too."] = False,
    out: Out = None,
    json: Json = False,
) -> None:
    """Race a model against everything else that decodes the same weights."""
    from benchmarks import other_programs, race_plot, random_model, step_profile
    from dynamo_lm.bench.benchmark import all_methods, open_context, read_texts, run
    from dynamo_lm.bench.prompts import fitted
    from dynamo_lm.cli.progress import counting
    from dynamo_lm.evaluation import results_file
    from dynamo_lm.model.loading import print_json

    name, texts = model, None
    if shape.shape is None:
        network, tokenizer = compute.open(model)
    else:
        if prompts.prompts or prompts.spec_bench or race.also or race.draft or "long" in prompts.lengths:
            raise InputError(
                "--shape has random weights and prompts: leave out --prompts, --spec-bench, --context, --draft and --also."
            )
        network, tokenizer = (
            random_model.open_shape(shape.shape, race.heads or 3, compute, shape.table_rows, race.seed),
            None,
        )
        size, count = network.config.vocab_size, prompts.limit or 4
        texts = random_model.random_prompts(size, count=count, length=shape.prompt_tokens, seed=race.seed)
        name = f"{shape.shape} (random weights)"
    context = open_context(network, tokenizer, race)
    command = ["benchmarks.race", *sys.argv[1:]]
    more = other_programs.add()
    with counting() as progress:
        record = run(
            context,
            tokenizer,
            prompts,
            race,
            name=name,
            command=command,
            out=out,
            more=more,
            texts=texts,
            progress=progress,
        )
    record["settings"]["shape"] = shape.shape
    record["versions"] |= other_programs.versions()
    if profile:
        own = texts or read_texts(prompts, context, tokenizer, prompts.lengths[-1])
        fitting, _ = fitted(own, context.length, prompts.max_new_tokens)
        methods = all_methods(context, race)
        record["profiles"] = step_profile.profiles(context, methods, race, fitting, prompts.max_new_tokens)
    pictures: list[str] = []
    if out is not None:
        results_file.save(out, record)
        pictures = race_plot.save_all(record, out)
    if json:
        print_json(record)
        return
    show(record)
    if profile:
        step_profile.show(record["profiles"])
    if out is not None:
        print(f"{out / 'bench.json'} and {', '.join(pictures)}")


def application() -> Any:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    return app


if __name__ == "__main__":
    try:
        application()()
    except InputError as error:
        sys.exit(f"benchmarks.race: {error}")
