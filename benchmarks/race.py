"""`dynamo-lm bench` with what only this repository has: `python -m benchmarks.race MODEL --out results/bench-story`.

Beside the options of `dynamo-lm bench`: assisted generation with --draft, other heads with --also, Spec-Bench, long
contexts; flashspec and llama.cpp (converted, so without --gguf) are raced where they are installed. --profile tells where a
step's time goes, --shape races random weights of a Pythia's shape, --out gets a picture. Needs the extra `bench`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from dynamo_lm.bench.options import PromptOptions, RaceOptions
from dynamo_lm.cli.bench import show
from dynamo_lm.cli.dataclass_options import dataclass_options
from dynamo_lm.cli.options import Json, Model, ModelOptions
from dynamo_lm.errors import InputError

if TYPE_CHECKING:
    from dynamo_lm.bench.methods import Method
    from dynamo_lm.bench.prompts import Prompt
    from dynamo_lm.bench.runners import BenchmarkContext


@dataclass(frozen=True, kw_only=True)
class TextOptions(PromptOptions):
    """What is continued."""

    spec_bench: Annotated[Path | None, "Spec-Bench's question file: results by its six groups, --limit of each."] = None
    context: Annotated[
        str,
        "short (the prompts as they are), long (after other text, to three quarters of the context), or both as short,long.",
    ] = "short"
    context_tokens: Annotated[int | None, "Tokens of a long context."] = None
    filler: Annotated[Path | None, "Text to put before long prompts. Default: the stories of $DYNAMO_DATA."] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not set(self.lengths) <= {"short", "long"}:
            raise InputError(f'--context is "{self.context}"; give short, long or short,long.')
        if self.prompts is not None and self.spec_bench is not None:
            raise InputError("Give one source of prompts: --prompts or --spec-bench.")

    @property
    def lengths(self) -> list[str]:
        return [part.strip() for part in self.context.split(",")]

    def read(self, tokenizer: Any, context: int) -> dict[str, list[Prompt]]:
        """The prompts by context length."""
        from benchmarks import prompt_sets
        from dynamo_lm.bench import prompts

        if self.spec_bench is not None:
            texts = prompt_sets.read_spec_bench(self.spec_bench, tokenizer, limit=self.limit)
        else:
            texts = prompts.read(self.prompts, tokenizer, limit=self.limit)
        more = (context, self.max_new_tokens, self.context_tokens, self.filler)
        return {
            length: texts if length == "short" else prompt_sets.after_long_context(texts, tokenizer, *more)
            for length in self.lengths
        }


@dataclass(frozen=True, kw_only=True)
class OtherOptions:
    """Other models and random ones."""

    PANEL: ClassVar[str] = "Other models"

    draft: Annotated[str | None, "A smaller model with the same tokenizer, for assisted generation."] = None
    also: Annotated[list[str], "Another DynaMo model on the same base, decoded strictly, too."] = field(default_factory=list)
    shape: Annotated[str | None, "Random weights of this shape (pythia-70m, pythia-160m, ..) instead of MODEL's."] = None
    table_rows: Annotated[int, "Random triples in the tables of a --shape."] = 5_000_000
    prompt_tokens: Annotated[int, "Length of a --shape's random prompts."] = 32


@dataclass_options
def main(
    model: Model,
    prompts: TextOptions,
    race: RaceOptions,
    other: OtherOptions,
    compute: ModelOptions,
    profile: Annotated[bool, "Where a step's time goes, too."] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the results, which `report` reads.")] = None,
    json: Json = False,
) -> None:
    """Race a model against everything else that decodes the same weights."""
    from benchmarks import other_programs, race_plot, random_model, step_profile
    from dynamo_lm.bench.benchmark import all_methods, open_context, run
    from dynamo_lm.bench.prompts import fitted
    from dynamo_lm.cli.progress import counting
    from dynamo_lm.evaluation import results_file
    from dynamo_lm.model.loading import print_json

    # 1. Models, prompts and methods.
    name = model
    if other.shape is None:
        network, tokenizer = compute.open(model)
        context = open_context(network)
        more = [*other_programs.add(), *open_others(context, tokenizer, other)]
        texts = prompts.read(tokenizer, context.length)
    else:
        if prompts.prompts or prompts.spec_bench or prompts.context != "short" or other.also or other.draft:
            raise InputError(
                "--shape has random weights and prompts: leave out --prompts, --spec-bench, --context, --draft and --also."
            )
        network = random_model.open_shape(other.shape, race.heads or 3, compute, other.table_rows, race.seed)
        context, more = open_context(network), list(other_programs.add())
        size, count = network.config.vocab_size, prompts.limit or 4
        texts = {"short": random_model.random_prompts(size, count=count, length=other.prompt_tokens, seed=race.seed)}
        name = f"{other.shape} (random weights)"

    # 2. The races.
    with counting() as progress:
        record = run(
            context,
            texts,
            race,
            max_new_tokens=prompts.max_new_tokens,
            name=name,
            command=["benchmarks.race", *sys.argv[1:]],
            out=out,
            more=more,
            trained=other.shape is None,
            progress=progress,
        )
    record["settings"]["shape"] = other.shape
    record["versions"] |= other_programs.versions()
    if profile:  # on the prompts of the last race
        fitting, _ = fitted(texts[prompts.lengths[-1]], context.length, prompts.max_new_tokens)
        methods = all_methods(context, race)
        record["profiles"] = step_profile.profiles(context, methods, race, fitting, prompts.max_new_tokens)

    # 3. What is kept and shown.
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


def open_others(context: BenchmarkContext, tokenizer: Any, options: OtherOptions) -> list[Method]:
    """Adds the models of --also and --draft to the context; the methods of the former.

    Raises:
        InputError: a model that does not fit.
    """
    from dynamo_lm.backbone.base_model import fingerprint, load_base
    from dynamo_lm.bench.methods import ONE, dynamo
    from dynamo_lm.model.loading import open_model, resolve

    model, methods = context.model, []
    precision = str(model.dtype).removeprefix("torch.")
    for folder in options.also:
        other = open_model(resolve(folder), dtype=precision, device=str(model.device), tokenizer=tokenizer)
        if fingerprint(other.base) != fingerprint(model.base):
            raise InputError(f'"{folder}" has another base than the model; --also compares heads on the same base.')
        name = Path(folder.rstrip("/")).name
        if name in context.models:
            raise InputError(f'"{folder}" has the name of another model; give folders with names of their own.')
        context.models[name] = other
        arguments = {"verify": "strict", "num_heads": other.num_heads}
        methods.append(dynamo(f"{name} strict, n={other.num_heads}", arguments, batched=True, identical_to=ONE, model=name))
    if options.draft is not None:
        draft = load_base(resolve(options.draft), dtype=model.dtype).to(model.device).eval()  # type: ignore[arg-type]
        if draft.config.get_text_config().vocab_size != model.config.vocab_size:
            raise InputError(f'"{options.draft}" has another vocabulary than the model; --draft needs the same tokenizer.')
        context.draft = draft
    return methods


def application() -> Any:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    return app


if __name__ == "__main__":
    try:
        application()()
    except InputError as error:
        sys.exit(f"benchmarks.race: {error}")
