"""`dynamo-lm eval ablation`: the ways to build and train heads, side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from dynamo_lm.cli.dataclass_options import dataclass_options
from dynamo_lm.cli.eval_options import ResultOptions, open_model_or_base, table_of
from dynamo_lm.cli.options import MACHINE, ComputeOptions
from dynamo_lm.errors import InputError
from dynamo_lm.evaluation.ablation_variants import VARIANTS, Settings, choose

if TYPE_CHECKING:
    from dynamo_lm.evaluation.ablation import Variant, Watch
    from dynamo_lm.training.log import Progress


@dataclass(frozen=True, kw_only=True)
class TrainingText:
    """The text to train and to measure on."""

    PANEL: ClassVar[str] = "The text"

    data: Annotated[
        list[str] | None,
        "Text to train on and, a share of it, to measure on: files, folders, globs or `datasets` ids; may be given several "
        "times.",
    ] = None
    text_field: Annotated[str | None, 'Field of JSON or Parquet that holds the text. Default: "text".'] = None


@dataclass_options
def ablation(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help='The base: a folder or hub id. Of a DynaMo model ("story" is the bundled one) the base is taken, '
            "its heads are not.",
        ),
    ],
    text: TrainingText,
    settings: Settings,
    machine: ComputeOptions,
    output: ResultOptions,
    variants: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,..",
            help=f"Which, in this order: {', '.join(variant.key for variant in VARIANTS)}. Default: all. More can be added "
            "later.",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Tokenizer folder or hub id, if MODEL does not bring its own.", rich_help_panel=MACHINE),
    ] = None,
    keep: Annotated[
        bool,
        typer.Option(
            "--keep",
            help="Save each trained model under OUT/ablation; otherwise only the numbers stay.",
            rich_help_panel=MACHINE,
        ),
    ] = False,
) -> None:
    """Train heads of many kinds on the same text and compare them, as in the paper's Table 10.

    `dynamo-lm eval ablation story --data stories.jsonl --out runs/ablation`

    Each row is a training of its own, so this takes as long as that many; stop it with Ctrl-C, the same command goes on.
    """
    from dynamo_lm.backbone.token_limits import context_limit
    from dynamo_lm.cli.progress import tokenizing
    from dynamo_lm.data.packing import Blocks
    from dynamo_lm.data.token_store import tokenize
    from dynamo_lm.evaluation.ablation import KIND, begin_or_continue, describe_settings, run
    from dynamo_lm.model.loading import open_config, open_tokenizer, resolve

    # 1. Validate arguments.
    if not text.data:
        raise InputError("There is nothing to train on; name a text with --data.")
    if output.out is None:
        raise InputError("Say where the results go with --out FOLDER.")
    device = machine.torch_device()
    chosen = choose([name.strip() for name in variants.split(",") if name.strip()] if variants is not None else None)
    name, block_size = resolve(model), settings.block_size
    config = open_config(name)
    longest = context_limit(config)
    if block_size > longest:
        raise InputError(f"--block-size is {block_size}, but the model's context is {longest}; give that or less.")

    # 2. Open the base and the text.
    tokens = open_tokenizer(resolve(tokenizer or name), vocab_size=config.get_text_config().vocab_size)
    attention = "eager" if device.type == "cpu" else "sdpa"
    network = open_model_or_base(name, dtype="float32", device=str(device), attn_implementation=attention)
    facts = describe_settings(settings)
    record = output.begin(context, KIND, network, model, seed=settings.seed, settings=facts)
    with tokenizing() as progress:
        store = tokenize(text.data, tokens, output.out / KIND / "tokens", text_field=text.text_field, progress=progress)
    training, held_out = store.split(settings.held_out, settings.seed)
    blocks = Blocks(store, training, block_size, seed=settings.seed)
    try:
        validation = Blocks(store, held_out, block_size, seed=settings.seed, shuffle=False)
    except InputError as error:
        raise InputError(f"There is too little text to measure on; raise --held-out. {error}") from error
    record["data"] = {
        "sources": [Path(source).name for source in text.data],
        "fingerprint": store.fingerprint,
        "tokenizer": store.tokenizer,
        "documents": len(store),
        "training_tokens": blocks.total,
        "validation_tokens": validation.total,
    }

    # 3. Train and measure.
    results = begin_or_continue(output.out, record)
    ready = {row["key"] for row in results["rows"]}
    left = sum(variant.key not in ready for variant in chosen)
    try:
        results = run(
            results,
            output.out,
            network.base,
            blocks,
            validation,
            chosen,
            settings,
            watch=_watch(settings.steps, left),
            end_token=tokens.eos_token_id,
            keep=keep,
        )
    except KeyboardInterrupt:
        typer.echo("dynamo-lm: stopped; the same command goes on from the last checkpoint.", err=True)
        raise typer.Exit(130) from None
    output.print(results, lambda results: _show(results, model))


def _watch(steps: int, left: int) -> Watch:
    """Shows which variant trains, its losses, and how long the `left` variants will take."""
    from dynamo_lm.cli.progress import console, training

    screen, started, finished = console(), time.monotonic(), 0

    @contextmanager
    def watch(variant: Variant, number: int, total: int) -> Iterator[Callable[[Progress], None]]:
        nonlocal finished
        each = (time.monotonic() - started) / max(1, finished)
        guess = f"; about {each * (left - finished) / 60:.0f} minutes left" if finished else ""
        screen.print(f"variant {number} of {total}: {variant.name} ({variant.meaning}){guess}", soft_wrap=True)
        with training(steps) as shown:
            yield shown.step
        finished += 1

    return watch


def _show(results: dict[str, Any], name: str) -> None:
    """Print one table; the best two-head variant of each column is marked."""
    from rich.console import Console

    rows, settings = results["rows"], results["settings"]
    columns = _columns(rows)
    pairs = [index for index, row in enumerate(rows) if len(row["heads"]) == 2]
    best = {}
    for column, values in columns.items():
        numbers = [values[index] for index in pairs if values[index] is not None]
        if len(numbers) > 1:
            best[column] = max(numbers) if column == "tokens/step" else min(numbers)  # type: ignore[type-var]
    lines = []
    for index, row in enumerate(rows):
        cells = []
        for column, values in columns.items():
            value = values[index]
            cell = "" if value is None else f"{value:.2f}"
            marked = index in pairs and value is not None and value == best.get(column)
            cells.append(f"[bold]{cell}*[/bold]" if marked else cell)
        paper = " / ".join(f"{row['paper'][key]:g}" for key in ("PPL_1", "PPL_2", "PPL_1:2") if key in row["paper"])
        extra = f"+{row['extra_parameters']:,}" if row["extra_parameters"] else ""
        lines.append((row["variant"], extra, *cells, _change(row), f"{row['seconds']:,.0f}", paper))
    tokens = next((row["tokens"] for row in rows if row["tokens"]), 0)
    held_out = results["data"]["validation_tokens"]
    title = f"Heads on {name}: {tokens:,} tokens each, {held_out:,} held out, seed {results['seed']}"
    headings = ("variant", "parameters", *columns, "PPL_1:2 against T2", "seconds", "paper: 1 / 2 / 1:2")
    table = table_of(headings, lines, title)
    table.columns[0].justify = "left"
    screen = Console(highlight=False)
    if not screen.is_terminal:
        screen = Console(highlight=False, width=200)
    screen.print(table)
    notes = [
        "* best of those with two heads; ± one standard error of the paired difference over the held-out blocks.",
        "tokens/step: exact greedy decoding without tables. seconds: in training steps, with whatever else the machine did.",
        f"paper: Pythia-70M after far more tokens; only the order can be compared. Steps {settings['steps']}, LR_B "
        f"{settings['lr_b']:g}, LR_M {settings['lr_m']:g}, LR_MB {settings['lr_mb']:g}.",
        *(f"not built: {variant}: {reason}." for variant, reason in results["not_built"].items()),
    ]
    for note in notes:
        screen.print(note, style="dim", soft_wrap=True, markup=False)


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[float | None]]:
    """The measured columns, a value for each row; None where a variant has no such head."""

    def at(name: str, index: int) -> list[float | None]:
        return [row[name][index]["ppl"] if index < len(row[name]) else None for row in rows]

    return {
        "PPL_1": at("heads", 0),
        "PPL_2": at("heads", 1),
        "PPL_1:2": at("joint", 1),
        "PPL_3": at("heads", 2),
        "PPL_4": at("heads", 3),
        "PPL_1:n": at("joint", -1),
        "tokens/step": [row["strict_tokens_per_step"] for row in rows],
    }


def _change(row: dict[str, Any]) -> str:
    """How much larger or smaller PPL_1:2 is than T2's."""
    ratio = row.get("against_t2", {}).get("PPL_1:2")
    if ratio is None or row["key"] == "t2":
        return ""
    error = f" ± {100 * ratio['se']:.1f}" if ratio["se"] is not None else ""
    return f"{100 * (ratio['ratio'] - 1):+.1f}{error} %"
