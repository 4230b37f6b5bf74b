"""`dynamo-lm report`: a page of everything that was measured of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dynamo_lm.cli.dataclass_options import dataclass_options
from dynamo_lm.cli.options import OpeningOptions
from dynamo_lm.errors import InputError

CLOSER = "What needs the model"


@dataclass_options
def report(
    ctx: typer.Context,
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder with the results of one model, as `eval` wrote them.")
    ],
    title: Annotated[str | None, typer.Option(help="Heading of the page. Default: the model's name.")] = None,
    html: Annotated[Path | None, typer.Option(help="The page. Default: DIR/report.html.", metavar="FILE")] = None,
    markdown: Annotated[
        Path | None,
        typer.Option(help="The same as Markdown, with figures/ beside it. Default: DIR/report.md.", metavar="FILE"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help='The model that was measured: a folder, a hub id, or "story". Adds the joint distribution and texts '
            "split into steps; both are kept in DIR for later runs.",
            rich_help_panel=CLOSER,
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            help="Prompt of the joint distribution. Default: the benchmark's first.",
            rich_help_panel=CLOSER,
        ),
    ] = None,
    *,
    opening: OpeningOptions,
) -> None:
    """Make one page of everything that was measured of a model.

    Reads the results in DIR and writes a self-contained HTML page and the same as Markdown. What was not measured is
    listed with the command that would.
    """
    try:
        from dynamo_lm.report import render
        from dynamo_lm.report.assemble import assemble, look_closer
    except ModuleNotFoundError as error:
        raise InputError(f'{error.name} is not installed; install it with `pip install "dynamo-lm[eval]"`.') from error

    targets = {"--html": html or folder / "report.html", "--markdown": markdown or folder / "report.md"}
    if targets["--html"].absolute() == targets["--markdown"].absolute():
        raise InputError("--html and --markdown name the same file; give two names.")
    if prompt is not None and model is None:
        raise InputError("--prompt needs the model that was measured; name it with --model.")
    if prompt is not None and not prompt.strip():
        raise InputError("--prompt is empty; give a few words.")
    page = assemble(folder, title=title)
    if model is not None:
        network, tokens = opening.open(model)
        look_closer(folder, network, tokens, model, command=ctx.find_root().obj, prompt=prompt)
        page = assemble(folder, title=title)
    written = render.write(page, html_file=targets["--html"], markdown_file=targets["--markdown"])
    print("\n".join(map(str, written)))
