"""Progress on stderr: bars on a terminal; in a file at most a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from dynamo_lm.training.log import Progress as Step

PAUSE = 15.0  # seconds between lines of a log


def console() -> Console:
    """Standard error."""
    return Console(stderr=True, highlight=False)


@contextmanager
def tokenizing() -> Iterator[Callable[[int, int], None]]:
    """Documents and tokens so far; how many there will be is not known."""
    with console().status("reading text") as status:
        yield lambda documents, tokens: status.update(f"reading text: {documents:,} documents, {tokens:,} tokens")


@contextmanager
def bar(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar of the work done."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,} of {task.total:,} tokens"))
    with Progress(*columns, TimeRemainingColumn(), console=console(), transient=True) as progress:
        task = progress.add_task(name, total=total)
        yield lambda done: progress.update(task, completed=min(done, total))


@contextmanager
def counting() -> Iterator[Callable[..., None]]:
    """A bar: the current activity, the amount done, the total and perhaps a note, such as a rate. In a file: a line now
    and then."""
    screen = console()
    done_of = TextColumn("{task.completed:,} of {task.total:,}{task.fields[note]}")
    columns = (TextColumn("{task.description}"), BarColumn(), done_of)
    last = time.monotonic() - PAUSE
    with Progress(
        *columns, TimeRemainingColumn(), console=screen, transient=True, disable=not screen.is_terminal
    ) as progress:
        task = progress.add_task("", total=None, note="")
        name = ""

        def report(what: str, done: int, total: int, note: str = "") -> None:
            nonlocal last, name
            if what != name:
                progress.reset(task, description=what, total=total)
                name = what
            progress.update(task, completed=done, total=total, note=note)
            if not screen.is_terminal and time.monotonic() - last >= PAUSE:
                screen.print(f"{what}: {done:,} of {total:,}{note}", soft_wrap=True)
                last = time.monotonic()

        yield report


@contextmanager
def training(steps: int) -> Iterator[Callable[[Step], None]]:
    """Losses by head, speed, time left; every validation stays as a line. In a file: a line now and then."""
    screen = console()
    columns = (TextColumn("{task.completed}/{task.total}"), BarColumn(bar_width=20), TextColumn("{task.description}"))
    last = time.monotonic() - PAUSE

    with Progress(
        *columns, TimeRemainingColumn(), console=screen, transient=True, disable=not screen.is_terminal
    ) as progress:
        task = progress.add_task("", total=steps)

        def report(step: Step) -> None:
            nonlocal last
            text = f"{_losses(step)}  {step.tokens_per_second:,.0f} tok/s"
            progress.update(task, completed=step.step, description=text)
            due = not screen.is_terminal and time.monotonic() - last >= PAUSE
            if step.validation is not None:
                screen.print(f"step {step.step}/{steps}  {text}  {step.validation}", soft_wrap=True)
                if step.acceptance is not None:
                    screen.print(f"step {step.step}/{steps}  {step.acceptance}", soft_wrap=True)
            elif due or (step.step == steps and not screen.is_terminal):
                screen.print(f"step {step.step}/{steps}  {text}", soft_wrap=True)
            if due:
                last = time.monotonic()

        yield report


def _losses(step: Step) -> str:
    """By head, and of coupled heads 2.. given the token before; of a coupling that learns alone only those get better."""
    first = 2 if step.losses[0] == 0 else 1  # a frozen base has no loss of head 1
    plain = _by_head(first, step.losses[first - 1 :]) + (" (the base is frozen)" if first == 2 else "")
    return f"loss of {plain}  coupled: {_by_head(2, step.coupled)}" if step.coupled else f"loss of {plain}"


def _by_head(first: int, losses: Sequence[float]) -> str:
    last = first + len(losses) - 1
    heads = f"heads {first}-{last}" if last > first else f"head {first}"
    return f"{heads}: {' '.join(f'{loss:.3f}' for loss in losses)}"
