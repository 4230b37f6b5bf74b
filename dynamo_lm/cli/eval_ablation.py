"""`dynamo-lm eval ablation`: the ways to build and train heads, side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynamo_lm.cli.options import Device, Json, Out, Threads, Tokenizer
from dynamo_lm.errors import InputError

if TYPE_CHECKING:
    from dynamo_lm.evaluation.ablation import Variant, Watch
    from dynamo_lm.model.modeling import DynaMoForCausalLM
    from dynamo_lm.training.log import Progress

TEXT, LEARNING, LENGTH, MACHINE = "The text", "How they learn", "How long", "Input, output and machine"


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
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to train on and, a share of it, to measure on: files, folders, globs or `datasets` ids; may be "
            "given several times.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    held_out: Annotated[
        float,
        typer.Option("--held-out", help="Share of the documents that is only measured on.", rich_help_panel=TEXT),
    ] = 0.01,
    text_field: Annotated[
        str | None,
        typer.Option(
            "--text-field", help='Field of JSON or Parquet that holds the text. Default: "text".', rich_help_panel=TEXT
        ),
    ] = None,
    variants: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,..",
            help="Which, in this order: t2, t2-h, t2-copy, t2-h-copy, t2-c, t2-np, t2-own, t2-layer-own, t2-lora, "
            "t2-two, t3, t3-h-copy, t4, t1. Default: all. More can be added later.",
        ),
    ] = None,
    lr_b: Annotated[
        float, typer.Option("--lr-b", help="Learning rate of the base, from its own loss.", rich_help_panel=LEARNING)
    ] = 1e-5,
    lr_m: Annotated[float, typer.Option("--lr-m", help="Learning rate of the new heads.", rich_help_panel=LEARNING)] = 1e-3,
    lr_mb: Annotated[
        float, typer.Option("--lr-mb", help="How fast the new heads may change the base.", rich_help_panel=LEARNING)
    ] = 1e-6,
    seed: Annotated[
        int,
        typer.Option(
            help="Of new layers, the order of the text and which documents are held out.", rich_help_panel=LEARNING
        ),
    ] = 0,
    steps: Annotated[int, typer.Option(help="Training steps of each variant.", rich_help_panel=LENGTH)] = 200,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Blocks a step.", rich_help_panel=LENGTH)] = 8,
    block_size: Annotated[
        int, typer.Option("--block-size", help="Tokens that are read together.", rich_help_panel=LENGTH)
    ] = 256,
    tokenizer: Tokenizer = None,
    device: Device = "auto",
    threads: Threads = None,
    out: Out = None,
    keep: Annotated[
        bool,
        typer.Option(
            "--keep",
            help="Save each trained model under OUT/ablation; otherwise only the numbers stay.",
            rich_help_panel=MACHINE,
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Train heads of many kinds on the same text and compare them, as in the paper's Table 10.

    `dynamo-lm eval ablation story --data stories.jsonl --out runs/ablation`

    Each row is a training of its own, so this takes as long as that many; stop it with Ctrl-C, the same command goes on.
    """
    import torch

    from dynamo_lm.backbone.token_limits import context_limit
    from dynamo_lm.cli.progress import tokenizing
    from dynamo_lm.data.packing import Blocks
    from dynamo_lm.data.token_store import tokenize
    from dynamo_lm.evaluation import results_file
    from dynamo_lm.evaluation.ablation import KIND, Settings, begin_or_continue, choose, describe_settings, run
    from dynamo_lm.model.loading import choose_device, open_config, open_tokenizer, print_json, resolve

    # 1. What was asked for: nothing slow yet.
    if not data:
        raise InputError("There is nothing to train on; name a text with --data.")
    if out is None:
        raise InputError("Say where the results go with --out FOLDER.")
    if threads is not None:
        if threads < 1:
            raise InputError(f"--threads is {threads}; give 1 or more.")
        torch.set_num_threads(threads)
    chosen = choose([name.strip() for name in variants.split(",") if name.strip()] if variants is not None else None)
    settings = Settings(
        steps=steps,
        batch_size=batch_size,
        block_size=block_size,
        lr_b=lr_b,
        lr_m=lr_m,
        lr_mb=lr_mb,
        seed=seed,
        validation_fraction=held_out,
    )
    name = resolve(model)
    config = open_config(name)
    longest = context_limit(config)
    if block_size > longest:
        raise InputError(f"--block-size is {block_size}, but the model's context is {longest}; give that or less.")
    where = choose_device(device)

    # 2. The base and the text.
    tokens = open_tokenizer(resolve(tokenizer or name), vocab_size=config.get_text_config().vocab_size)
    whole = _open(name, config, "eager" if where.type == "cpu" else "sdpa").to(where)  # type: ignore[arg-type]
    results_file.check_folder(out, results_file.describe(whole, model))
    with tokenizing() as progress:
        store = tokenize(data, tokens, out / KIND / "tokens", text_field=text_field, progress=progress)
    learn, measured = store.split(held_out, seed)
    blocks = Blocks(store, learn, block_size, seed=seed)
    try:
        validation = Blocks(store, measured, block_size, seed=seed, shuffle=False)
    except InputError as error:
        raise InputError(f"There is too little text to measure on; raise --held-out. {error}") from error

    # 3. The matrix.
    arguments = context.find_root().obj or []
    new = results_file.begin(KIND, arguments, whole, model, seed=seed, settings=describe_settings(settings))
    new["data"] = {
        "sources": [Path(source).name for source in data],
        "fingerprint": store.fingerprint,
        "tokenizer": store.tokenizer,
        "documents": len(store),
        "training_tokens": blocks.total,
        "validation_tokens": validation.total,
    }
    results = begin_or_continue(out, new)
    ready = {row["key"] for row in results["rows"]}
    try:
        results = run(
            results,
            out,
            whole.base,
            blocks,
            validation,
            chosen,
            settings,
            watch=_watch(settings.steps, sum(variant.key not in ready for variant in chosen)),
            end_token=tokens.eos_token_id,
            keep=keep,
        )
    except KeyboardInterrupt:
        typer.echo("dynamo-lm: stopped; the same command goes on from the last checkpoint.", err=True)
        raise typer.Exit(130) from None
    if json:
        print_json(results)
    else:
        _print(results, model)


def _open(name: str, config: Any, attention: str) -> DynaMoForCausalLM:
    """The model as given in float32, a plain base wrapped without heads."""
    import torch

    from dynamo_lm import DynaMoForCausalLM
    from dynamo_lm.model.configuration import DynaMoConfig

    kwargs: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": attention}
    if isinstance(config, DynaMoConfig):
        return DynaMoForCausalLM.from_pretrained(name, **kwargs).eval()
    return DynaMoForCausalLM.from_base(name, num_heads=1, **kwargs).eval()


def _watch(steps: int, left: int) -> Watch:
    """Says which variant trains, its losses, and how long the `left` variants will take."""
    from dynamo_lm.cli.progress import console, training

    screen, started, finished = console(), time.monotonic(), 0

    @contextmanager
    def watch(variant: Variant, number: int, total: int) -> Iterator[Callable[[Progress], None]]:
        nonlocal finished
        each = (time.monotonic() - started) / max(1, finished)
        guess = f"; about {each * (left - finished) / 60:.0f} minutes left" if finished else ""
        screen.print(f"variant {number} of {total}: {variant.name} ({variant.meaning}){guess}", soft_wrap=True)
        with training(steps) as report:
            yield report
        finished += 1

    return watch


def _print(results: dict[str, Any], name: str) -> None:
    """One table on stdout; the best two-head variant of each column is marked."""
    from rich.console import Console
    from rich.table import Table

    rows, settings, data = results["rows"], results["settings"], results["data"]
    pairs = [row for row in rows if len(row["heads"]) == 2]
    columns: dict[str, Callable[[dict], float | None]] = {
        "PPL_1": lambda row: row["heads"][0]["ppl"],
        "PPL_2": lambda row: _at(row["heads"], 1),
        "PPL_1:2": lambda row: _at(row["joint"], 1),
        "PPL_3": lambda row: _at(row["heads"], 2),
        "PPL_4": lambda row: _at(row["heads"], 3),
        "PPL_1:n": lambda row: row["joint"][-1]["ppl"],
        "tokens/step": lambda row: row["strict_tokens_per_step"],
    }
    best = {}
    for column, value in columns.items():
        found = [v for v in map(value, pairs) if v is not None]
        if len(found) > 1:
            best[column] = max(found) if column == "tokens/step" else min(found)
    tokens = next((row["tokens"] for row in rows if row["tokens"]), 0)
    table = Table(
        title=f"Heads on {name}: {tokens:,} tokens each, {data['validation_tokens']:,} held out, seed {results['seed']}"
    )
    table.add_column("variant", no_wrap=True)
    table.add_column("parameters", justify="right")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("PPL_1:2 against T2", justify="right", no_wrap=True)
    table.add_column("seconds", justify="right")
    table.add_column("paper: 1 / 2 / 1:2", justify="right", no_wrap=True, style="dim")
    for row in rows:
        cells = []
        for column, value in columns.items():
            number = value(row)
            said = "" if number is None else f"{number:.2f}"
            marked = row in pairs and number is not None and number == best.get(column)
            cells.append(f"[bold]{said}*[/bold]" if marked else said)
        paper = " / ".join(f"{row['paper'][key]:g}" for key in ("PPL_1", "PPL_2", "PPL_1:2") if key in row["paper"])
        extra = f"+{row['extra_parameters']:,}" if row["extra_parameters"] else ""
        table.add_row(row["variant"], extra, *cells, _change(row), f"{row['seconds']:,.0f}", paper)
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


def _at(values: list[dict[str, Any]], index: int) -> float | None:
    return values[index]["ppl"] if index < len(values) else None


def _change(row: dict[str, Any]) -> str:
    """How much larger or smaller PPL_1:2 is than T2's."""
    found = row.get("against_t2", {}).get("PPL_1:2")
    if found is None or row["key"] == "t2":
        return ""
    error = f" ± {100 * found['se']:.1f}" if found["se"] is not None else ""
    return f"{100 * (found['ratio'] - 1):+.1f}{error} %"
