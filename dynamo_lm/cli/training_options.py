"""Options of the verbs that train, declared once: `train` and `finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

TEXT, HEADS, LEARNING, LENGTH, MACHINE = "The text", "The heads", "How they learn", "How long", "Machine and output"

Validation = Annotated[
    list[str] | None,
    typer.Option(help="Text to measure on, in the same forms. Default: a share of --data.", rich_help_panel=TEXT),
]
ValidationFraction = Annotated[
    float,
    typer.Option(
        "--validation-fraction",
        help="Share of the documents held out to measure on, if there is no --validation; 0 measures nothing.",
        rich_help_panel=TEXT,
    ),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(help="Tokenizer folder or hub id, if BASE does not bring its own.", rich_help_panel=TEXT),
]
Init = Annotated[
    str | None,
    typer.Option(
        help="How heads begin: random (the paper; default) or copy (of the last layer; learns faster).",
        rich_help_panel=HEADS,
    ),
]
Freeze = Annotated[
    bool,
    typer.Option(
        "--freeze/--no-freeze",
        help="Train the new heads only. The base stays as it is, memory and time shrink, and the result is a small "
        "folder of heads.",
        rich_help_panel=LEARNING,
    ),
]
LrM = Annotated[
    float | None,
    typer.Option("--lr-m", help="Learning rate of the new heads. Default: 1e-3.", rich_help_panel=LEARNING),
]
LrMb = Annotated[
    float | None,
    typer.Option("--lr-mb", help="How fast the new heads may change the base. Default: 1e-6.", rich_help_panel=LEARNING),
]
LrC = Annotated[float, typer.Option("--lr-c", help="Learning rate of the heads' coupling.", rich_help_panel=LEARNING)]
Warmup = Annotated[float, typer.Option(help="Share of the steps in which the rates rise.", rich_help_panel=LEARNING)]
WeightDecay = Annotated[float, typer.Option("--weight-decay", help="Pull of matrices towards 0.", rich_help_panel=LEARNING)]
Clip = Annotated[float, typer.Option(help="Largest norm of a step's gradient; 0 for no limit.", rich_help_panel=LEARNING)]
Seed = Annotated[
    int,
    typer.Option(help="Of the new heads and the order of the text; same seed, same run.", rich_help_panel=LEARNING),
]
Accumulation = Annotated[
    int,
    typer.Option(help="Split each step into this many passes, for less memory and the same result.", rich_help_panel=LENGTH),
]
Steps = Annotated[int | None, typer.Option(help="How many steps to train.", rich_help_panel=LENGTH)]
ValidateEvery = Annotated[
    int,
    typer.Option("--validate-every", help="Steps between measurements on the held-out text.", rich_help_panel=LENGTH),
]
CheckpointEvery = Annotated[
    int,
    typer.Option(
        "--checkpoint-every", help="Steps between checkpoints: what a crash costs at most.", rich_help_panel=LENGTH
    ),
]
Bf16 = Annotated[
    bool | None,
    typer.Option(
        "--bf16/--fp32",
        help="Compute in bfloat16 or float32; weights are float32 either way. Default: bf16 on GPUs.",
        rich_help_panel=MACHINE,
    ),
]
Attention = Annotated[
    str | None,
    typer.Option(
        help="sdpa (fused) or eager (plain). Default: eager on CPUs, where it trains faster, sdpa on GPUs.",
        rich_help_panel=MACHINE,
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, .. or auto (a GPU if there is one).", rich_help_panel=MACHINE)]
RunFolder = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Run folder: log, checkpoints, and at the end the finished model in FOLDER/model. The same command on "
        "the same folder resumes.",
        rich_help_panel=MACHINE,
    ),
]
Save = Annotated[
    str | None,
    typer.Option(
        help="heads (small; the base is fetched by its name) or full. Default: heads if the base was frozen.",
        rich_help_panel=MACHINE,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Say how large everything is and how long the run, and train nothing.",
        rich_help_panel=MACHINE,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.", rich_help_panel=MACHINE)]
