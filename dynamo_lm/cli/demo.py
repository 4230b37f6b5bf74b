"""`dynamo-lm demo`."""

from __future__ import annotations

from typing import Annotated

import typer


def demo(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="DynaMo model: a folder or hub id. Default: the bundled story model."),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The text to continue. Default: four beginnings of stories.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="How many tokens to write for each prompt.")
    ] = 120,
    eps_b: Annotated[
        float | None,
        typer.Option(
            "--eps-b", help="The dynamic row's dial, 0 (fastest) to 1 (one token at a time). Default: the model's."
        ),
    ] = None,
    heads: Annotated[
        int | None, typer.Option("--heads", help="The most tokens a step may give. Default: all heads the model has.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the random numbers; the same seed gives the same texts.")] = 0,
    delay: Annotated[
        bool, typer.Option("--delay/--no-delay", help="Show the texts at the speed they were written with.")
    ] = True,
    json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON instead of texts and table.")] = False,
) -> None:
    """Watch a model write one token at a time, and several at a time.

    Races three ways of writing the same text: one token per step, **strict** (several per step, exactly the same text)
    and **dynamic** (the paper's sampling, faster still). Then a table: speed, its ceiling, and the quality
    measured with it.
    """
    from dynamo_lm.cli.demo_view import demo as race
    from dynamo_lm.model.loading import resolve

    race(
        None if model is None else resolve(model),
        prompt,
        max_new_tokens=max_new_tokens,
        eps_b=eps_b,
        num_heads=heads,
        seed=seed,
        delay=delay,
        json_output=json,
    )
