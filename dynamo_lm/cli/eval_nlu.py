"""`dynamo-lm eval nlu`: benchmarks of understanding, base and DynaMo model side by side."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from dynamo_lm.cli.dataclass_options import dataclass_options
from dynamo_lm.cli.eval_options import ResultOptions
from dynamo_lm.cli.options import MACHINE, Model, OpeningOptions
from dynamo_lm.errors import InputError

if TYPE_CHECKING:
    from dynamo_lm.evaluation.nlu.generation_tasks import Arm
    from dynamo_lm.evaluation.nlu.harness import Answer, Question

DEFAULT = "arc_challenge,arc_easy,boolq,copa,openbookqa,piqa,winogrande,lambada_openai,blimp"
EPS_B = (0.9, 0.7, 0.5, 0.3)
BLIMP_LIMIT = 100  # of each of its 67 files, where --limit does not say

Begin = Callable[[str], Callable[[int, int], None]]  # a task's name -> its progress


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Tasks and documents."""

    PANEL: ClassVar[str] = "Tasks"

    tasks: Annotated[
        str,
        typer.Option(
            metavar="NAME,NAME,..", help="Tasks, or all. Those that write texts are gsm8k, triviaqa and humaneval."
        ),
    ] = DEFAULT
    limit: Annotated[
        int | None,
        f"Ask only the first documents of each task, this many. Default: all; {BLIMP_LIMIT} of each of BLiMP's 67 files.",
    ] = None
    shots: Annotated[
        int | None, "Examples before each question. Default: the task's own number, 0 or 5; BLiMP takes none."
    ] = None
    data: Annotated[Path | None, "Folder of the benchmarks. Default: bench in $DYNAMO_DATA, else ../shared/data/bench."] = (
        None
    )
    hub: Annotated[bool, "Tasks of lm-evaluation-harness itself, from the network."] = False
    base: Annotated[
        str | None,
        "The model that the heads were added to, to compare with. Default: the recorded one, if it is on this machine.",
    ] = None
    seed: Annotated[int, "Seed of the choice of examples for --shots."] = 0

    def __post_init__(self) -> None:
        for name, least in (("limit", 1), ("shots", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"--{name} is {value}; give {least} or more.")


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """Tasks that write texts."""

    PANEL: ClassVar[str] = "Tasks that write texts (gsm8k, triviaqa, humaneval)"

    eps_b: Annotated[
        list[float] | None,
        "Values of eps_b to write with; may be given several times. Default: 0.9 0.7 0.5 0.3.",
    ] = None
    run_code: Annotated[bool, "Execute the programs that the model writes for humaneval, with limits but in no sandbox."] = (
        False
    )


@dataclass_options
def nlu(
    context: typer.Context,
    model: Model,
    tasks: TaskOptions,
    answers: AnswerOptions,
    machine: OpeningOptions,
    output: ResultOptions,
    batch_size: Annotated[int, typer.Option(help="Answers scored together.", rich_help_panel=MACHINE)] = 8,
) -> None:
    """What the model knows: ARC, BoolQ, COPA, OpenBookQA, PIQA, WinoGrande, LAMBADA, BLiMP and others.

    lm-evaluation-harness asks the base and the DynaMo model's first head, and states its own standard errors. Without --hub
    nothing is downloaded: questions come from a folder. Tasks that write texts do so one token per step, strict, and with
    the paper's decoding at several eps_b, and show accuracy beside speed-up.

    With --out a stopped run continues after the last finished task.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise InputError('lm-evaluation-harness is not installed; get it with `pip install "dynamo-lm[eval]"`.') from error
    if batch_size < 1:
        raise InputError(f"--batch-size is {batch_size}; give 1 or more.")
    from dynamo_lm.evaluation.nlu import generation_tasks, harness
    from dynamo_lm.model.loading import resolve

    # 1. Look the tasks up before the wait for the model.
    arms = generation_tasks.arms(answers.eps_b or EPS_B)
    names = [name.strip().removeprefix(harness.PREFIX) for name in tasks.tasks.split(",") if name.strip()]
    if names == ["all"] and not tasks.hub:
        names = list(harness.local_tasks())
    if not names:
        raise InputError(f"--tasks is empty; give one or more of {', '.join(harness.local_tasks())}.")
    questions = harness.questions(names, hub=tasks.hub, data=tasks.data, run_code=answers.run_code)

    # 2. Open the model and what it is compared with.
    network, tokenizer = machine.open(model)
    base = harness.original_base(network, resolve(model), tasks.base)
    settings = {
        "source": "hub" if tasks.hub else "local",
        "limit": tasks.limit,
        "shots": tasks.shots,
        "base": {"name": base.name, "same": base.same, "note": base.note} if base.model is not None else None,
        "eps_b": [arm.decoding["eps_b"] for arm in arms if "eps_b" in arm.decoding],
        "run_code": answers.run_code,
    }
    record = output.begin(context, "nlu", network, model, seed=tasks.seed, settings=settings)
    record |= {"note": base.note, "tasks": {}, "generation": {}}
    if output.out is not None:
        _continue(record, output.out)

    # 3. Ask one task at a time and save each at once.
    head1 = harness.DynaMoLM(network, tokenizer, batch_size=batch_size)
    other = None
    if base.model is not None and not base.same:
        other = harness.Head1(base.model, tokenizer, context=network.config.max_context, batch_size=batch_size)
    with _bar() as begin:
        for question in questions:
            if question.name not in record["tasks"]:
                ours, theirs, texts = _ask(question, head1, other, arms, tasks, answers.run_code, begin)
                if texts:
                    record["generation"][question.name] = texts
                record["tasks"][question.name] = _entry(theirs if base.model is not None else None, ours)
                output.save(record)
    output.print(record, lambda record: _show(record, [question.name for question in questions]))


def _ask(
    question: Question, head1: Any, other: Any, arms: list[Arm], tasks: TaskOptions, run_code: bool, begin: Begin
) -> tuple[Answer, Answer, list[dict[str, Any]]]:
    """The model's answer, the base's, and what a results file says of the arms of a task that writes texts."""
    from dynamo_lm.evaluation.nlu import generation_tasks, harness

    limit = tasks.limit or (BLIMP_LIMIT if question.name == "blimp" else None)
    options: dict[str, Any] = {"limit": limit, "shots": tasks.shots, "seed": tasks.seed, "run_code": run_code}
    texts: list[dict[str, Any]] = []
    if question.generative:
        answers, texts = generation_tasks.race(head1, question, arms, progress=begin(question.name), **options)
        ours, theirs = answers[generation_tasks.STRICT], answers[generation_tasks.ONE]
    else:
        head1.progress = begin(question.name)
        ours = theirs = harness.ask(head1, question, **options)
    if other is not None:
        other.progress = begin(f"{question.name}, base")
        theirs = harness.ask(other, question, **options)
    return ours, theirs, texts


def _continue(record: dict[str, Any], folder: Path) -> None:
    """Take over the tasks that an earlier run with the same settings answered."""
    from dynamo_lm.evaluation import results_file

    before = results_file.load(folder, "nlu")
    if before is None:
        return
    same_settings = all(before.get(key) == record[key] for key in ("settings", "seed"))
    if same_settings and before["model"].get("dtype") == record["model"]["dtype"]:
        for key in ("tasks", "generation"):
            record[key] |= before.get(key, {})
        print(f"Kept from the run before: {', '.join(record['tasks'])}.", file=sys.stderr)
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


def _show(record: dict[str, Any], names: list[str]) -> None:
    """Print a line for each metric of the tasks `names` and of the phenomena of a group, then the tables of texts."""
    entries: dict[str, dict[str, Any]] = {}
    for name in names:
        entries[name] = record["tasks"][name]
        parts = entries[name].get("parts", {}).items()
        entries |= {f"  {part}": entry for part, entry in parts if "/" not in part}  # phenomena, not their files
    columns = ("base", "DynaMo") if record["settings"]["base"] is not None else ("DynaMo",)
    width = max(map(len, ("task", *entries))) + 2
    metric_width = max(map(len, ("metric", *(metric for entry in entries.values() for metric in entry["dynamo"])))) + 2
    print(f"{'task':{width}}{'metric':{metric_width}}{''.join(f'{column:>18}' for column in columns)}{'samples':>10}")
    for name, entry in entries.items():
        for metric in entry["dynamo"]:
            values = "".join(f"{_number(**entry[column.lower()][metric]):>18}" for column in columns)
            print(f"{name:{width}}{metric:{metric_width}}{values}{entry['samples']:>10,}")
    print(record["note"])
    for name, arms in record["generation"].items():
        if name in entries:
            _show_texts(name, arms, entries[name]["samples"])


def _show_texts(name: str, arms: list[dict[str, Any]], samples: int) -> None:
    print(f"\n{name}, {samples} texts, greedy: {arms[0]['metric']} against speed")
    print(f"{'':16}{'accuracy':>18}{'tokens per step':>18}{'of at most':>12}{'speed-up':>10}{'95 %':>16}{'same text':>11}")
    for arm in arms:
        accuracy = _number(arm["accuracy"], arm["stderr"])
        interval = "{:.2f}..{:.2f}".format(*arm["speed_up_interval"]) if arm["speed_up_interval"] else ""
        speed = f"{arm['tokens_per_step']:>18.2f}{arm['ceiling']:>12}{arm['speed_up']:>10.2f}{interval:>16}"
        print(f"{arm['arm']:16}{accuracy:>18}{speed}{arm['same_text']:>11.0%}")
    print("Speed-up: tokens per second, prompts included, against one token per step; all arms interleaved, batch 1.")
    if arms[0]["prompts_cut"]:
        print(f"{arms[0]['prompts_cut']} prompts lost their beginning: they did not fit the model's context.")


def _number(value: float, stderr: float | None) -> str:
    return f"{value:,.4g}" if stderr is None else f"{value:,.3f} ± {stderr:,.3f}"


@contextmanager
def _bar() -> Iterator[Begin]:
    """A progress bar on the real stderr, which the harness's own output never reaches."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    from dynamo_lm.cli.progress import TimeLeft

    screen = Console(file=sys.stderr, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,.0f} answers{task.fields[left]}"))
    options: dict[str, Any] = {"transient": True, "redirect_stdout": False, "redirect_stderr": False}
    with Progress(*columns, console=screen, disable=not screen.is_terminal, **options) as progress:
        line = progress.add_task("", total=None, left="")

        def begin(name: str) -> Callable[[int, int], None]:
            progress.reset(line, description=name, total=None, left="")
            left = TimeLeft()
            return lambda done, total: progress.update(line, completed=done, total=total, left=left.after(done, total))

        yield begin
