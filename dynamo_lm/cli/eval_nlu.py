"""`dynamo-lm eval nlu`: benchmarks of understanding, base and DynaMo model side by side."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynamo_lm.cli.options import Device, Dtype, Json, Model, Out, Threads, Tokenizer
from dynamo_lm.errors import InputError

if TYPE_CHECKING:
    from dynamo_lm.evaluation.nlu.harness import Answer, Question

DEFAULT = "arc_challenge,arc_easy,boolq,copa,openbookqa,piqa,winogrande,lambada_openai,blimp"
WHAT, WRITING = "What is asked", "Tasks that write texts (gsm8k, triviaqa, humaneval)"
BLIMP_LIMIT = 100  # of each of its 67 files, where --limit does not say


def nlu(
    context: typer.Context,
    model: Model,
    tasks: Annotated[
        str,
        typer.Option(
            metavar="NAME,NAME,..",
            help="Tasks, or all. Those that write texts are gsm8k, triviaqa and humaneval.",
            rich_help_panel=WHAT,
        ),
    ] = DEFAULT,
    limit: Annotated[
        int | None,
        typer.Option(
            help=f"Ask the first so many documents of each task. Default: all; {BLIMP_LIMIT} of each of BLiMP's 67 files.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option(
            help="Examples before each question. Default: the task's own number, 0 or 5; BLiMP takes none.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the benchmarks. Default: bench in $DYNAMO_DATA, else ../shared/data/bench.", rich_help_panel=WHAT
        ),
    ] = None,
    hub: Annotated[
        bool, typer.Option("--hub", help="Tasks of lm-evaluation-harness itself, from the network.", rich_help_panel=WHAT)
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(
            help="The model that the heads were added to, to put beside it. Default: the recorded one, if it is here.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of examples for --shots.", rich_help_panel=WHAT)] = 0,
    eps_b: Annotated[
        list[float] | None,
        typer.Option(
            "--eps-b",
            help="Settings of the paper's decoding to write with; may be given several times. Default: 0.9 0.7 0.5 0.3.",
            rich_help_panel=WRITING,
        ),
    ] = None,
    run_code: Annotated[
        bool,
        typer.Option(
            "--run-code",
            help="Execute the programs that the model writes for humaneval, with limits but in no sandbox.",
            rich_help_panel=WRITING,
        ),
    ] = False,
    batch_size: Annotated[
        int, typer.Option("--batch-size", help="Answers scored together.", rich_help_panel="Input, output and machine")
    ] = 8,
    out: Out = None,
    tokenizer: Tokenizer = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """What the model knows: ARC, BoolQ, COPA, OpenBookQA, PIQA, WinoGrande, LAMBADA, BLiMP and others.

    lm-evaluation-harness asks the base and the DynaMo model's first head, and states its own standard errors. Without --hub
    nothing is downloaded: questions come from a folder. Tasks that write texts do so one token per step, strict, and with
    the paper's decoding at several eps_b, and show accuracy beside speed-up.

    With --out a stopped run continues behind the last finished task.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise InputError('lm-evaluation-harness is not installed; get it with `pip install "dynamo-lm[eval]"`.') from error
    if limit is not None and limit < 1:
        raise InputError(f"--limit is {limit}; give 1 or more.")
    if shots is not None and shots < 0:
        raise InputError(f"--shots is {shots}; give 0 or more.")
    if batch_size < 1:
        raise InputError(f"--batch-size is {batch_size}; give 1 or more.")
    from dynamo_lm.evaluation import results_file
    from dynamo_lm.evaluation.nlu import generation_tasks, harness
    from dynamo_lm.model.loading import open_for_evaluation, print_json, resolve

    # 1. What to ask, before the wait for the model.
    ways = generation_tasks.arms(eps_b or [0.9, 0.7, 0.5, 0.3])
    names = [name.strip().removeprefix(harness.PREFIX) for name in tasks.split(",") if name.strip()]
    if names == ["all"] and not hub:
        names = list(harness.local_tasks())
    if not names:
        raise InputError(f"--tasks is empty; give one or more of {', '.join(harness.local_tasks())}.")
    asked = harness.questions(names, hub=hub, data=data, run_code=run_code)

    # 2. The model and what it is compared with.
    network, tokens = open_for_evaluation(model, tokenizer=tokenizer, dtype=dtype, device=device, threads=threads)
    beside = harness.original_base(network, resolve(model), base)
    settings = {
        "source": "hub" if hub else "local",
        "limit": limit,
        "shots": shots,
        "base": {"name": beside.name, "same": beside.same, "note": beside.note} if beside.model is not None else None,
        "eps_b": [way.decoding["eps_b"] for way in ways if "eps_b" in way.decoding],
        "run_code": run_code,
    }
    results = results_file.begin("nlu", context.find_root().obj, network, model, seed=seed, settings=settings)
    results |= {"note": beside.note, "tasks": {}, "generation": {}}
    if out is not None:
        results_file.check_folder(out, results["model"])
        _continue(results, results_file.load(out, "nlu"))

    # 3. Ask, one task at a time, each kept as soon as it is answered.
    head1 = harness.DynaMoLM(network, tokens, batch_size=batch_size)
    other = None
    if beside.model is not None and not beside.same:
        other = harness.Head1(beside.model, tokens, context=network.config.max_context, batch_size=batch_size)
    with _bar() as begin:
        for question in asked:
            if question.name in results["tasks"]:
                continue
            most = limit or (BLIMP_LIMIT if question.name == "blimp" else None)
            how: dict[str, Any] = {"limit": most, "shots": shots, "seed": seed, "run_code": run_code}
            theirs: Answer | None = None
            if question.generative:
                answers, rows = generation_tasks.race(head1, question, ways, progress=begin(question.name), **how)
                ours = answers[generation_tasks.STRICT]
                theirs = answers[generation_tasks.ONE]
                results["generation"][question.name] = rows
            else:
                head1.progress = begin(question.name)
                ours = theirs = harness.ask(head1, question, **how)
            if other is not None:
                other.progress = begin(f"{question.name}, base")
                theirs = harness.ask(other, question, **how)
            results["tasks"][question.name] = _entry(theirs if beside.model is not None else None, ours)
            if out is not None:
                results_file.save(out, results)

    # 4. Say it.
    if json:
        print_json(results)
    else:
        _print(results, asked)


def _continue(results: dict[str, Any], before: dict[str, Any] | None) -> None:
    """Takes over the tasks that an earlier run with the same settings answered."""
    if before is None:
        return
    alike = before.get("settings") == results["settings"] and before.get("seed") == results["seed"]
    if alike and before["model"].get("dtype") == results["model"]["dtype"]:
        results["tasks"] |= before.get("tasks", {})
        results["generation"] |= before.get("generation", {})
        print(f"Kept from the run before: {', '.join(results['tasks'])}.", file=sys.stderr)
    else:
        print("The results in this folder were measured with other settings; they will be replaced.", file=sys.stderr)


def _entry(base: Answer | None, dynamo: Answer) -> dict[str, Any]:
    """{"base", "dynamo", "samples"} and, for a group, the same of its members under "parts"."""
    entry: dict[str, Any] = {"base": base.metrics if base is not None else None, "dynamo": dynamo.metrics}
    entry["samples"] = dynamo.samples
    if dynamo.parts:
        entry["parts"] = {
            name: _entry(base.parts[name] if base is not None else None, part) for name, part in dynamo.parts.items()
        }
    return entry


def _print(results: dict[str, Any], asked: list[Question]) -> None:
    tasks = {question.name: results["tasks"][question.name] for question in asked}
    for name, entry in list(tasks.items()):  # phenomena, not their files
        parts = {f"  {part}": found for part, found in entry.get("parts", {}).items() if "/" not in part}
        if parts:
            at = list(tasks).index(name) + 1
            tasks = dict([*list(tasks.items())[:at], *parts.items(), *list(tasks.items())[at:]])
    with_base = results["settings"]["base"] is not None
    width = max(len(name) for name in ("task", *tasks)) + 2
    kinds = [metric for entry in tasks.values() for metric in entry["dynamo"]]
    wide = max(len(kind) for kind in ("metric", *kinds)) + 2
    columns = ("base", "DynaMo") if with_base else ("DynaMo",)
    print(f"{'task':{width}}{'metric':{wide}}{''.join(f'{column:>18}' for column in columns)}{'samples':>10}")
    for name, entry in tasks.items():
        for metric in entry["dynamo"]:
            values = "".join(f"{_number(entry[column.lower()][metric]):>18}" for column in columns)
            print(f"{name:{width}}{metric:{wide}}{values}{entry['samples']:>10,}")
    print(results["note"])
    for name, rows in results["generation"].items():
        if name in tasks:
            _print_race(name, rows, tasks[name]["samples"])


def _print_race(name: str, rows: list[dict[str, Any]], samples: int) -> None:
    print(f"\n{name}, {samples} texts, greedy: {rows[0]['metric']} against speed")
    print(f"{'':16}{'accuracy':>18}{'tokens per step':>18}{'of at most':>12}{'speed-up':>10}{'95 %':>16}{'same text':>11}")
    for row in rows:
        accuracy = _number({"value": row["accuracy"], "stderr": row["stderr"]})
        interval = "{:.2f}..{:.2f}".format(*row["speed_up_interval"]) if row["speed_up_interval"] else ""
        speed = f"{row['tokens_per_step']:>18.2f}{row['ceiling']:>12}{row['speed_up']:>10.2f}{interval:>16}"
        print(f"{row['arm']:16}{accuracy:>18}{speed}{row['same_text']:>11.0%}")
    print("Speed-up: tokens per second, prompts included, against one token per step; all arms interleaved, batch 1.")
    if rows[0]["prompts_cut"]:
        print(f"{rows[0]['prompts_cut']} prompts lost their beginning: they did not fit the model's context.")


def _number(found: dict[str, float | None]) -> str:
    value, stderr = found["value"], found["stderr"]
    return f"{value:,.4g}" if stderr is None else f"{value:,.3f} ± {stderr:,.3f}"


@contextmanager
def _bar() -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """A line on the real stderr, which the harness's own output never reaches: what is asked, answers so far, time."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    screen = Console(file=sys.stderr, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,.0f} answers"))
    options: dict[str, Any] = {"transient": True, "redirect_stdout": False, "redirect_stderr": False}
    with Progress(*columns, TimeRemainingColumn(), console=screen, disable=not screen.is_terminal, **options) as progress:
        line = progress.add_task("", total=None)

        def begin(name: str) -> Callable[[int, int], None]:
            progress.reset(line, description=name, total=None)
            return lambda done, total: progress.update(line, completed=done, total=total)

        yield begin
