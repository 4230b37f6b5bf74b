"""The options of `dynamo-lm demo`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What the demo writes, and with what."""

    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The text to continue. Default: four beginnings of stories.")
    ] = None
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="How many tokens to write for each prompt.")
    ] = 120
    eps_b: Annotated[
        float | None, "The dynamic row's threshold, 0 (fastest) to 1 (one token at a time). Default: the model's."
    ] = None
    heads: Annotated[int | None, "The most tokens a step may give. Default: all heads the model has."] = None
    seed: Annotated[int, "Seed of the random numbers; the same seed gives the same texts."] = 0
    threads: Annotated[int | None, "CPU threads. Default: as many as are fastest here, measured for some seconds."] = None
    time_limit: Annotated[
        float, "Seconds after which the demo ends with what it has, loading PyTorch and the model included."
    ] = 180
    delay: Annotated[
        bool, typer.Option("--delay/--no-delay", help="Show the texts at the speed they were written with.")
    ] = True
    repetitions: int = 3
