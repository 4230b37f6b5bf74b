"""Options that several verbs share, declared once."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from dynamo_lm.errors import InputError

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


def verification(text: str) -> str | float:
    """The dial of --verify: "strict", "off" or a budget in nats per token.

    Raises:
        InputError: anything else.
    """
    from dynamo_lm.decoding.options import check_verify

    dial: str | float = text
    with suppress(ValueError):
        dial = float(text)
    check_verify(dial)
    return dial


def grid(text: str, option: str) -> list[float]:
    """Numbers as "0,0.5,1" or, from, to and by, as "0:1:0.1".

    Raises:
        InputError: anything else.
    """
    try:
        if ":" in text:
            start, end, step = (float(part) for part in text.split(":"))
            if step <= 0 or end < start:
                raise ValueError
            found = [round(start + index * step, 10) for index in range(int((end - start) / step + 1e-9) + 1)]
        else:
            found = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f'{option} is "{text}"; give numbers as 0,0.5,1 or as FROM:TO:STEP.') from None
    if any(not 0 <= value <= 1 for value in found):
        raise InputError(f'{option} is "{text}"; every number must lie from 0 to 1.')
    return sorted(set(found))
