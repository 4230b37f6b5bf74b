"""`dynamo-lm demo`: one token at a time beside several at a time, on the same prompts, with what it gains and costs."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.status import Status
from rich.table import Table
from rich.text import Text

from dynamo_lm.bench.benchmark import open_context
from dynamo_lm.bench.methods import Method, dynamo
from dynamo_lm.bench.prompts import Prompt
from dynamo_lm.bench.race import race
from dynamo_lm.bench.runners import BenchmarkContext, Output, open_runner
from dynamo_lm.bench.summary import summaries
from dynamo_lm.bench.tables import ratio_and_spread
from dynamo_lm.cli.demo_options import DemoOptions
from dynamo_lm.errors import InputError
from dynamo_lm.evaluation.results_file import model_name
from dynamo_lm.model.loading import open_for_evaluation, set_threads
from dynamo_lm.model.modeling import DynaMoForCausalLM

PROMPTS = (
    "Once upon a time, there was a little fox who",
    "Lily and her dad went to the park. They saw",
    "One day, a small bird found a shiny red button.",
    "Tom was sad because his toy boat was lost.",
)
COLOURS = ("#29b6f6", "#ffa726", "#ec407a", "#66bb6a")
ONE, STRICT, DRAWN, DYNAMIC = "one token, greedy", "strict, greedy", "one token, sampled", "dynamic, sampled"
PAUSE = 10.0  # seconds between lines of progress in a file
WARM_UP = 8  # tokens
SHORTEST = 16  # tokens of a text that still says something


def demo(
    model: str,
    options: DemoOptions,
    *,
    began: float | None = None,
    json_output: bool = False,
    console: Console | None = None,
    save: Path | None = None,
) -> None:
    """Race one-token, strict and dynamic decoding; print texts coloured by step and a table, or JSON.

    `began` is the time (of `time.monotonic`) from which the time limit counts, by default now; `console` is where to print,
    `save` a file for the numbers.

    Raises:
        InputError: no such model, an empty prompt, options that do not fit.
    """
    console = console or Console(stderr=json_output, highlight=False)
    began = time.monotonic() if began is None else began
    with _progress(console) as (progress, status):
        network, tokenizer = open_for_evaluation(model, tokenizer=None, dtype="float32", device="cpu")
        methods = demo_methods(network, options.eps_b, options.heads)
        texts = [options.prompt] if options.prompt is not None else list(PROMPTS)
        prompts = [Prompt("demo", tuple(tokenizer(text).input_ids)) for text in texts]
        if not all(prompt.tokens for prompt in prompts):
            raise InputError("The prompt is empty; give a few words to begin with.")
        context = open_context(network)

        # 1. Threads, and a length of texts that leaves time for one prompt at least.
        status.update("getting ready")
        open_runner(methods[0], context)([prompts[0].tokens], WARM_UP, 0)  # the kernels are built once
        rates = measure_threads(context, methods[0], prompts[0], options.threads)
        threads = max(rates, key=lambda count: rates[count])
        set_threads(threads)
        left = options.time_limit - (time.monotonic() - began)
        most = max(SHORTEST, int(left / 2 * rates[threads] / len(methods)))
        length = min(options.max_new_tokens, most)
        measured = ", ".join(f"{count}: {rate:.0f}" for count, rate in rates.items())
        console.print(f"Threads: {threads} (tokens a second, one token per step, by threads: {measured}).")
        shorter = "" if length == options.max_new_tokens else ", shorter than asked for, to end in time"
        console.print(
            f"Race: {len(methods)} methods, {len(prompts)} prompt(s) of {length} new tokens{shorter}, "
            f"{options.repetitions} repetitions, at most {options.time_limit:g} s."
        )

        # 2. The race. The first prompt's texts are shown as they come.
        def show(method: Method, number: int, output: Output) -> None:
            if number == 0 and not json_output and (not method.one_token or method.name == ONE):
                status.stop()
                _show(console, tokenizer, prompts[0], method, output, options.delay and console.is_terminal)
                status.start()

        done = race(
            context,
            prompts,
            methods,
            max_new_tokens=length,
            repetitions=options.repetitions,
            seed=options.seed,
            bandwidth_bytes=0,
            warm_up_tokens=WARM_UP,
            time_limit=left,
            progress=progress,
            show=show,
        )
        status.update("scoring the texts")
        rows = summaries(done, context)

    # 3. Numbers.
    record = {
        "model": model_name(model),
        "prompts": texts[: len(done.prompts)],
        "max_new_tokens": length,
        "repetitions": done.repetitions,
        "stopped": done.stopped,
        "threads": threads,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "methods": rows,
    }
    numbers = json.dumps(record, indent=1)
    if save is not None:
        save.write_text(numbers + "\n", encoding="utf-8")
    if json_output:
        print(numbers)
        return
    console.print(table(rows, done.repetitions))
    if done.stopped:
        console.print(
            f"Stopped after {options.time_limit:g} s: {done.repetitions} of {options.repetitions} repetitions, "
            f"{len(done.prompts)} of {len(prompts)} prompts. --time-limit gives it more time."
        )
    console.print(
        "Each colour change is one forward pass. Speed-up: tokens per second over the one-token row of the same kind, "
        "same loop, same run. Log-likelihood: nats per token under the base model; higher can also mean duller, so "
        "distinct token pairs stand beside it.",
        style="dim",
    )


def demo_methods(model: DynaMoForCausalLM, eps_b: float | None, num_heads: int | None) -> list[Method]:
    """Greedy and sampled one-token decoding, and what is raced against each."""
    if num_heads is not None and not 1 <= num_heads <= model.num_heads:
        raise InputError(f"--heads is {num_heads}, but the model has {model.num_heads}.")
    heads = num_heads or model.num_heads
    tabled = heads if model.cooccurrence is None else min(heads, model.cooccurrence.order)
    off: dict[str, Any] = {"verify": "off", "do_sample": True}
    dynamic = {**off, "num_heads": tabled, **({} if eps_b is None else {"eps_b": eps_b})}
    return [
        dynamo(ONE, {"verify": "strict", "num_heads": 1}),
        dynamo(STRICT, {"verify": "strict", "num_heads": heads}, identical_to=ONE, one_token=False),
        dynamo(DRAWN, {**off, "num_heads": 1}),
        dynamo(DYNAMIC, dynamic, one_token=False),
    ]


def measure_threads(
    context: BenchmarkContext, method: Method, prompt: Prompt, threads: int | None, *, seconds: float = 4.0
) -> dict[int, float]:
    """Tokens a second by number of threads, or of the number that was given.

    A larger number is listed only if it is 5 % faster than the smaller ones: on a busy machine fewer threads do less harm.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    counts = [threads] if threads is not None else sorted({*(2**i for i in range(cores.bit_length())), cores})
    runner, began = open_runner(method, context), time.monotonic()
    rates: dict[int, list[float]] = {count: [] for count in counts}
    while not rates[counts[0]] or (time.monotonic() - began < seconds and len(rates[counts[0]]) < 5):
        for count in counts:
            set_threads(count)
            output = runner([prompt.tokens], 2 * WARM_UP, 0)
            rates[count].append(len(output.texts[0]) / output.seconds)
    medians: dict[int, float] = {}
    for count in counts:
        median = statistics.median(rates[count])
        if all(median > 1.05 * other for other in medians.values()):
            medians[count] = median
    return medians


def table(rows: list[dict[str, Any]], repetitions: int) -> Table:
    """A line per method; every speed-up with its ceiling, its spread and the quality measured with it."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1))
    table.add_column("")
    speed = "speed-up\n(one run)" if repetitions == 1 else "speed-up\n(spread)"
    headings = ("tokens\nper s", "forward\npasses", "tokens\nper step", speed, "same\ntext", "log-like-\nlihood")
    for heading in (*headings, "distinct\npairs"):
        table.add_column(heading, justify="right")
    for row in rows:
        same = row["identical"]
        table.add_row(
            row["name"],
            f"{row['tokens_per_second']['median']:.0f}",
            str(row["steps"]),
            f"{row['tokens_per_step']:.2f} of {row['ceiling']}",
            "baseline" if row["one_token"] else ratio_and_spread(row["ratio"], repetitions, "x"),
            "" if same is None else "yes" if same["texts"] == same["of"] else "NO",
            f"{row['log_likelihood']:.3f}",
            f"{row['distinct_bigrams']:.2f}",
        )
    return table


@contextmanager
def _progress(console: Console) -> Iterator[tuple[Callable[[str, int, int], None], Status]]:
    """Tells how far the race is: on one line of a terminal, in a file by a line now and then."""
    last = time.monotonic()
    with console.status("loading the model") as status:

        def report(what: str, done: int, total: int) -> None:
            nonlocal last
            status.update(f"{what}: {done} of {total}")
            if not console.is_terminal and time.monotonic() - last >= PAUSE:
                console.print(f"{done} of {total} texts written; now {what}.")
                last = time.monotonic()

        yield report, status


def _show(console: Console, tokenizer: Any, prompt: Prompt, method: Method, output: Output, animate: bool) -> None:
    """One text, each step's tokens in one colour; animated at the speed it was decoded with."""
    tokens, sizes = list(prompt.tokens), output.step_sizes[0]
    ends = [sum(sizes[:number]) for number in range(len(sizes) + 1)]
    shown = tokenizer.decode(tokens)
    text = Text(shown, style="dim")

    def panel() -> Panel:
        title = f"[bold]{method.name}[/]  {len(output.texts[0]) / output.steps:.2f} tokens per step"
        return Panel(text, title=title, title_align="left")

    def grow() -> Iterator[None]:
        nonlocal shown
        for number, (start, end) in enumerate(pairwise(ends)):
            tokens.extend(output.texts[0][start:end])
            whole = tokenizer.decode(tokens, skip_special_tokens=True)
            if not whole.endswith("\ufffd"):  # incomplete UTF-8: the next step completes it
                text.append(whole[len(shown) :], style=COLOURS[number % len(COLOURS)])
                shown = whole
            yield

    if not animate:
        for _ in grow():
            pass
        console.print(panel())
        return
    with Live(panel(), console=console, refresh_per_second=30) as live:
        for _ in grow():
            live.update(panel())
            time.sleep(output.seconds / output.steps)
