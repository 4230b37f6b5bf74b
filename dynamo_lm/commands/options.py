"""Options that several verbs share, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MACHINE = "Input, output and machine"

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help='DynaMo model: a folder, a hub id, or "story" for the bundled one.')
]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Folder for the results of this model, which `report` reads.", rich_help_panel=MACHINE),
]
Tokenizer = Annotated[
    str | None, typer.Option(help="Tokenizer folder or hub id, if MODEL does not bring its own.", rich_help_panel=MACHINE)
]
Dtype = Annotated[
    str,
    typer.Option(help="Precision to compute in: float32, bfloat16, float16, or auto (as saved).", rich_help_panel=MACHINE),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, .. or auto (a GPU if there is one).", rich_help_panel=MACHINE)]
Threads = Annotated[
    int | None, typer.Option(help="CPU threads to compute with. Default: torch's own choice.", rich_help_panel=MACHINE)
]
Json = Annotated[bool, typer.Option("--json", help="Print the results as JSON.", rich_help_panel=MACHINE)]
