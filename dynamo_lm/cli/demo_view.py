"""`dynamo-lm demo`: one token at a time beside several at a time, on the same prompts, with what it gains and costs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import AutoTokenizer

from dynamo_lm.assets import bundled
from dynamo_lm.bench.prompt_race import Method, Result, race
from dynamo_lm.errors import InputError
from dynamo_lm.model.modeling import DynaMoForCausalLM

PROMPTS = (
    "Once upon a time, there was a little fox who",
    "Lily and her dad went to the park. They saw",
    "One day, a small bird found a shiny red button.",
    "Tom was sad because his toy boat was lost.",
)
COLOURS = ("#29b6f6", "#ffa726", "#ec407a", "#66bb6a")


def demo(
    model: str | None,
    prompt: str | None,
    *,
    max_new_tokens: int,
    eps_b: float | None,
    num_heads: int | None,
    seed: int,
    delay: bool,
    json_output: bool,
    repetitions: int = 3,
    console: Console | None = None,
    save: Path | None = None,
) -> None:
    """Races one-token, strict and dynamic decoding; prints texts coloured by step and a table, or JSON.

    `console` is where to print, `save` a file for the numbers; see `dynamo-lm demo --help` for the rest.

    Raises:
        InputError: no such model, an empty prompt, options that do not fit.
    """
    folder = str(bundled()) if model in (None, "story") else str(model)
    network = DynaMoForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if num_heads is not None and not 1 <= num_heads <= network.num_heads:
        raise InputError(f"--heads is {num_heads}, but the model has {network.num_heads}.")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [prompt] if prompt is not None else list(PROMPTS)
    prompts = [tokenizer(text, return_tensors="pt").input_ids for text in texts]
    if any(ids.shape[1] == 0 for ids in prompts):
        raise InputError("The prompt is empty; give a few words to begin with.")
    ways = contenders(network, eps_b, num_heads)
    console = console or Console(stderr=json_output, highlight=False)
    with console.status("warming up") as status:
        results = race(
            network,
            prompts,
            ways,
            max_new_tokens=max_new_tokens,
            repetitions=repetitions,
            seed=seed,
            progress=lambda name: status.update(f"{name}, {len(prompts)} prompt(s) x {max_new_tokens} tokens"),
        )
    numbers = json.dumps(report(folder, texts, max_new_tokens, repetitions, results), indent=1)
    if save is not None:
        save.write_text(numbers + "\n")
    if json_output:
        print(numbers)
        return
    for result in results:
        if result.way.baseline != result.way.name or result is results[0]:
            _show(console, tokenizer, result, len(prompts[0][0]), delay and console.is_terminal)
    console.print(table(results))
    console.print(
        "Each colour change is one forward pass. Speed-up: tokens per second over the one-token row of the same kind, "
        "same loop, same run. Log-likelihood: nats per token under the base model; higher can also mean duller, so "
        "distinct token pairs stand beside it.",
        style="dim",
    )


def contenders(model: DynaMoForCausalLM, eps_b: float | None, num_heads: int | None) -> list[Method]:
    """Greedy and sampled one-token decoding, and what is raced against each."""
    exact = {} if num_heads is None else {"num_heads": num_heads}
    table = model.cooccurrence
    widest = model.num_heads if table is None else min(model.num_heads, table.order)
    heads = min(num_heads or widest, widest)
    dynamic: dict = {"verify": "off", "do_sample": True, "num_heads": heads}
    if eps_b is not None:
        dynamic["eps_b"] = eps_b
    one, drawn = "one token, greedy", "one token, sampled"
    return [
        Method(one, {"verify": "strict", "num_heads": 1}, one),
        Method("strict, greedy", {"verify": "strict", **exact}, one, same_text_as=one),
        Method(drawn, {"verify": "off", "do_sample": True, "num_heads": 1}, drawn),
        Method("dynamic, sampled", dynamic, drawn),
    ]


def report(folder: str, texts: list[str], max_new_tokens: int, repetitions: int, results: list[Result]) -> dict:
    """The race as plain data."""
    return {
        "model": Path(folder).name,
        "prompts": texts,
        "max_new_tokens": max_new_tokens,
        "repetitions": repetitions,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "ways": [result.summary() for result in results],
    }


def table(results: list[Result]) -> Table:
    """One row a way; every speed-up with its ceiling, its spread and the quality measured with it."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1))
    table.add_column("")
    for name in (
        "tokens\nper s",
        "forward\npasses",
        "tokens\nper step",
        "speed-up\n(spread)",
        "same\ntext",
        "log-like-\nlihood",
        "distinct\npairs",
    ):
        table.add_column(name, justify="right")
    for result in results:
        base = result.way.baseline == result.way.name
        same = {None: "", True: "yes", False: "NO"}[result.identical]
        spread = f"{result.speed_up:.2f}x ({min(result.speed_ups):.2f}-{max(result.speed_ups):.2f})"
        table.add_row(
            result.way.name,
            f"{result.tokens_per_second:.0f}",
            str(sum(result.forwards)),
            f"{result.tokens_per_step:.2f} of {result.ceiling}",
            "baseline" if base else spread,
            same,
            f"{result.log_likelihood:.3f}",
            f"{result.distinct_bigrams:.2f}",
        )
    return table


def _show(console: Console, tokenizer: object, result: Result, prompt_length: int, animate: bool) -> None:
    """One text, each step's tokens in one colour; animated at the speed it was decoded with."""
    pause = result.seconds[0] / result.forwards[0] if animate else 0.0
    tokens = result.sequences[0][:prompt_length]
    said = tokenizer.decode(tokens)  # type: ignore[attr-defined]
    text = Text(said, style="dim")

    def panel() -> Panel:
        title = f"[bold]{result.way.name}[/]  {result.tokens_per_step:.2f} tokens per step"
        return Panel(text, title=title, title_align="left")

    def grow() -> Iterator[None]:
        nonlocal tokens, said
        for number, step in enumerate(result.steps[0]):
            tokens = tokens + step
            now = tokenizer.decode(tokens, skip_special_tokens=True)  # type: ignore[attr-defined]
            if now.endswith("\ufffd"):
                continue  # half a character: the next step completes it
            text.append(now[len(said) :], style=COLOURS[number % len(COLOURS)])
            said = now
            yield

    if not animate:
        for _ in grow():
            pass
        console.print(panel())
        return
    with Live(panel(), console=console, refresh_per_second=30) as live:
        for _ in grow():
            live.update(panel())
            time.sleep(pause)
