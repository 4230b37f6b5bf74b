"""`dynamo-lm demo`; `demo_view` runs it."""

from __future__ import annotations

import os
import sys
import time
from typing import Annotated

import typer

from dynamo_lm.cli.dataclass_options import dataclass_options
from dynamo_lm.cli.demo_options import DemoOptions

# Threads that wait for each other sleep instead of spinning, so that another busy program costs its share and no more.
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}


@dataclass_options
def demo(
    options: DemoOptions,
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="DynaMo model: a folder or hub id. Default: the bundled story model."),
    ] = None,
    json: Annotated[bool, "Print the numbers as JSON instead of texts and table."] = False,
) -> None:
    """Watch a model write one token at a time, and several at a time.

    Races three ways of writing the same text: one token per step, **strict** (several per step, exactly the same text)
    and **dynamic** (the paper's sampling, faster still). Then a table: speed, its ceiling, and the quality
    measured with it.
    """
    began = time.monotonic()
    for name, value in PASSIVE.items():  # before torch is loaded, which reads them once
        os.environ.setdefault(name, value)
    print("Loading PyTorch and the model.", file=sys.stderr, flush=True)
    from dynamo_lm.cli.demo_view import demo as race

    race(model or "story", options, began=began, json_output=json)
