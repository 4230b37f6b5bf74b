"""`dynamo-lm eval perplexity`: how well each head, and the heads together, predict a text."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynamo_lm.cli.options import Device, Dtype, Json, Model, Out, Threads, Tokenizer, grid
from dynamo_lm.errors import InputError

if TYPE_CHECKING:
    from dynamo_lm.evaluation.perplexity.scoring import Options, Text
    from dynamo_lm.model.modeling import DynaMoForCausalLM

TEXT, SCORING, STEPS = "The text", "How it is scored", "How the dynamic steps are chosen"

Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        help="Text to score: a file (.txt, .jsonl, .json, .parquet), a folder, a glob or a `datasets` id; may be given "
        "several times. Best text that neither heads nor tables have seen.",
        rich_help_panel=TEXT,
    ),
]
TextField = Annotated[
    str | None,
    typer.Option(
        "--text-field", help='Field of JSON or Parquet that holds the text. Default: "text".', rich_help_panel=TEXT
    ),
]
ValidationFraction = Annotated[
    float,
    typer.Option(
        "--validation-fraction",
        help="Score only the documents that `train` and `count` leave out of this text with the same share and seed. "
        "0 scores everything.",
        rich_help_panel=TEXT,
    ),
]
MaxDocuments = Annotated[
    int | None, typer.Option("--max-documents", help="Score at most so many documents, the first.", rich_help_panel=TEXT)
]
MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", help="Score at most so many tokens, the first.", rich_help_panel=TEXT)
]
Window = Annotated[
    int | None,
    typer.Option(
        help="Tokens the model sees at once; longer documents are read by overlapping windows. Default: its context, at "
        "most 1024.",
        rich_help_panel=SCORING,
    ),
]
Stride = Annotated[
    int | None,
    typer.Option(
        help="Tokens from one window to the next: smaller gives more context and takes longer. Default: half a window.",
        rich_help_panel=SCORING,
    ),
]
BatchSize = Annotated[
    int, typer.Option("--batch-size", help="Windows computed together; changes speed only.", rich_help_panel=SCORING)
]
HeadCandidates = Annotated[
    int | None,
    typer.Option("--heads", help="Score only the first so many heads. Default: all.", rich_help_panel=SCORING),
]
UseMask = Annotated[
    bool,
    typer.Option(
        "--mask/--no-mask",
        help="Use the model's tables: to choose steps, and in the masked joint. Default: if it has any.",
        rich_help_panel=SCORING,
    ),
]


def perplexity(
    context: typer.Context,
    model: Model,
    data: Data = None,
    text_field: TextField = None,
    validation_fraction: ValidationFraction = 0.0,
    max_documents: MaxDocuments = None,
    max_tokens: MaxTokens = None,
    window: Window = None,
    stride: Stride = None,
    batch_size: BatchSize = 8,
    heads: HeadCandidates = None,
    mask: UseMask = True,
    eps_b: Annotated[
        str,
        typer.Option(
            "--eps-b",
            help='Dials of the dynamic perplexity, as 0,0.5,1 or FROM:TO:STEP; "none" leaves it out.',
            rich_help_panel=STEPS,
        ),
    ] = "0:1:0.1",
    alpha_c: Annotated[
        float | None,
        typer.Option("--alpha-c", help="Weight of the tables. Default: the model's own, else 1.", rich_help_panel=STEPS),
    ] = None,
    otsu: Annotated[
        bool | None,
        typer.Option("--otsu/--no-otsu", help="Drop unlikely combinations by Otsu's threshold.", rich_help_panel=STEPS),
    ] = None,
    blur: Annotated[
        bool | None,
        typer.Option("--blur/--no-blur", help="Blur the combinations before that threshold.", rich_help_panel=STEPS),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option("--top-k", help="Candidates per head. Default: the model's own, else 50.", rich_help_panel=STEPS),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="Of the candidates' probabilities. Default: the model's own, else 0.7.", rich_help_panel=STEPS),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            "--repetition-penalty", help="On repeated tokens. Default: the model's own, else 1.1.", rich_help_panel=STEPS
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the choice that --validation-fraction makes.", rich_help_panel=TEXT)] = 0,
    out: Out = None,
    tokenizer: Tokenizer = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """How well the heads predict a text: each alone (PPL_i), together (PPL_1:m), and in the steps that generation takes.

    A perplexity is comparable between models with the same tokenizer on the same text; lower is better. The first token of
    a document has nothing before it and is not scored, the end-of-text token behind it is.

    `dynamo-lm eval perplexity story --data stories.jsonl --max-tokens 20000`
    """
    from dynamo_lm.decoding.settings import algorithm_of
    from dynamo_lm.evaluation import results_file
    from dynamo_lm.evaluation.perplexity.scoring import Options
    from dynamo_lm.model.loading import open_for_evaluation, print_json

    # 1. What was asked for, checked before the long part.
    dials = () if eps_b == "none" else tuple(grid(eps_b, "--eps-b"))
    network, tokens = open_for_evaluation(model, tokenizer=tokenizer, dtype=dtype, device=device, threads=threads)
    asked = {
        "alpha_c": alpha_c,
        "otsu": otsu,
        "blur": blur,
        "top_k": top_k,
        "temperature": temperature,
        "repetition_penalty": repetition_penalty,
    }
    algorithm = algorithm_of(network, asked, network.generation_config)
    options = Options.of(
        network,
        num_heads=heads,
        window=window,
        stride=stride,
        batch_size=batch_size,
        masked=mask,
        eps_b=dials,
        algorithm=algorithm,
    )
    if out is not None:
        results_file.check_folder(out, results_file.describe(network, model))

    # 2. The text, then the numbers.
    text = read(data, tokens, text_field, validation_fraction, seed, max_documents, max_tokens)
    check_length(text, options, asked=window is not None)
    settings = settings_of(options) | {
        "validation_fraction": validation_fraction,
        "max_documents": max_documents,
        "max_tokens": max_tokens,
    }
    result = results_file.begin("perplexity", context.find_root().obj or [], network, model, seed=seed, settings=settings)
    result |= score(network, text, options).record()

    # 3. Said and kept.
    if out is not None:
        file = results_file.save(out, result)
    if json:
        print_json(result)
    else:
        show(result)
        if out is not None:
            print(f"{file} written.")


def read(
    data: list[str] | None,
    tokenizer: Any,
    text_field: str | None,
    validation_fraction: float,
    seed: int,
    max_documents: int | None,
    max_tokens: int | None,
) -> Text:
    """The text to score, through a temporary token store."""
    from dynamo_lm.cli.progress import tokenizing
    from dynamo_lm.evaluation.perplexity.scoring import read_text

    if not data:
        raise InputError("There is no text to score; name one with --data.")
    with tempfile.TemporaryDirectory(prefix="dynamo-tokens-") as folder, tokenizing() as progress:
        return read_text(
            data,
            tokenizer,
            Path(folder),
            text_field=text_field,
            validation_fraction=validation_fraction,
            seed=seed,
            max_documents=max_documents,
            max_tokens=max_tokens,
            progress=progress,
        )


def check_length(text: Text, options: Options, *, asked: bool) -> None:
    """Refuses a text shorter than a window that the user asked for; says so on stderr where the window is the default."""
    from dynamo_lm.cli.progress import console

    if text.tokens >= options.window:
        return
    few = f"The text has {text.tokens:,} tokens, fewer than the window of {options.window:,}"
    if asked:
        raise InputError(f"{few}; give more text or a smaller --window.")
    console().print(f"{few}: its perplexities rest on little.", soft_wrap=True)


def settings_of(options: Options) -> dict[str, Any]:
    """The options as plain data, for a results file."""
    from dataclasses import asdict

    return {
        key: value for key, value in asdict(options).items() if key not in ("window", "stride", "eps_b", "algorithm")
    } | {key: value for key, value in asdict(options.algorithm).items() if key != "eps_b"}


def score(network: DynaMoForCausalLM, text: Text, options: Options) -> Any:
    """`perplexity.measure` with a bar on stderr."""
    from dynamo_lm.cli.progress import bar
    from dynamo_lm.evaluation.perplexity.scoring import measure

    with bar("scoring", text.tokens - len(text.documents)) as progress:
        return measure(network, text, options, progress=progress)


def show(result: dict[str, Any]) -> None:
    """The record as tables on stdout."""
    from rich.console import Console

    console, text = Console(highlight=False), result["text"]
    scored, ceiling = result["heads"][0]["tokens"], result["ceiling"]
    masked = result["joint"][0]["masked_ppl"] is not None
    per_byte = f"{result['base']['bits_per_byte']:.3f} bits per byte" if result["base"]["bits_per_byte"] else "no bytes"
    console.print(
        f"{', '.join(text['sources'])}: {text['documents']:,} documents, {text['tokens']:,} tokens, {scored:,} scored; "
        f"window {result['window']}, stride {result['stride']}; base model {result['base']['ppl']:.2f} ({per_byte})",
        soft_wrap=True,
    )
    rows = [
        (
            f"1:{head['head']}" if head["head"] > 1 else "1",
            _number(head["ppl"], head["se"]),
            _number(joint["ppl"], joint["se"]),
            *([_number(joint["masked_ppl"], joint["masked_se"])] if masked else []),
        )
        for head, joint in zip(result["heads"], result["joint"], strict=True)
    ]
    columns = ["heads", "last head alone", "joint: product", *(["joint: masked"] if masked else [])]
    console.print(_table("Perplexity per token, ± standard error by document", columns, rows))
    if result["dynamic"]:
        by_dial: dict[float, list[dict[str, Any]]] = {}
        for row in result["dynamic"]:
            by_dial.setdefault(row["eps_b"], []).append(row)
        rows = [
            (
                f"{eps_b:g}",
                f"{same[0]['tokens_per_step']:.2f}",
                *(_number(row["ppl"], row["se"]) for row in same),
                " ".join(f"{share:.0%}" for share in same[0]["shares"]),
            )
            for eps_b, same in by_dial.items()
        ]
        sizes = " ".join(map(str, range(1, ceiling + 1)))
        columns = ["eps_b", "tokens/step", "PPL_d: product", *(["PPL_d: masked"] if masked else []), f"steps of {sizes}"]
        console.print(_table(f"Dynamic perplexity, at most {ceiling} tokens per step", columns, rows))
    if result["text"]["seen"] is not None:
        console.print(
            f"The tables hold {text['seen']:.0%} of this text's longest sequences. Of text they were counted on they hold "
            "nearly all they kept, and masked perplexities say nothing.",
            soft_wrap=True,
        )
    if text["documents"] < 2:
        console.print("One document gives no standard errors.", soft_wrap=True)


def _table(title: str, columns: Iterable[str], rows: Iterable[tuple[str, ...]]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _number(value: float, error: float | None) -> str:
    return f"{value:.2f}" if error is None else f"{value:.2f} ± {error:.2f}"
