"""Progress on stderr: bars on a terminal; in a file at most a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

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


def duration(seconds: float) -> str:
    """A time in words, such as "40 s", "12 min" or "3 h 20 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


class TimeLeft:
    """Estimates the time left from the time that the work so far took."""

    def __init__(self) -> None:
        self.first: tuple[float, float] | None = None  # time and work done when measuring began

    def after(self, done: float, total: float) -> str:
        """ ", about 3 h 20 min left"; nothing at the first call, which begins the measuring, and at the end."""
        now = time.monotonic()
        if self.first is None:
            self.first = now, done
        then, before = self.first
        if done <= before or done >= total:
            return ""
        return f", about {duration((now - then) / (done - before) * (total - done))} left"


@contextmanager
def bar(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar of the tokens done."""
    with counting() as report:
        report(name, 0, total, " tokens")
        yield lambda done: report(name, min(done, total), total, " tokens")


@contextmanager
def counting() -> Iterator[Callable[..., None]]:
    """A bar: the current activity, the amount done, the total and perhaps a note, such as a rate. In a file: a line now
    and then."""
    screen = console()
    done_of = TextColumn("{task.completed:,} of {task.total:,}{task.fields[note]}")
    columns = (TextColumn("{task.description}"), BarColumn(), done_of)
    last = time.monotonic() - PAUSE
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as progress:
        task = progress.add_task("", total=None, note="")
        name, left = "", TimeLeft()

        def report(what: str, done: int, total: int, note: str = "") -> None:
            nonlocal last, name, left
            if what != name:
                progress.reset(task, description=what, total=total)
                name, left = what, TimeLeft()
            note += left.after(done, total)
            progress.update(task, completed=done, total=total, note=note)
            if not screen.is_terminal and time.monotonic() - last >= PAUSE:
                screen.print(f"{what}: {done:,} of {total:,}{note}", soft_wrap=True)
                last = time.monotonic()

        yield report


class TrainingScreen:
    """Losses by head, speed and time left; every validation stays as a line. In a file: a line now and then."""

    def __init__(self, steps: int, screen: Console, progress: Progress):
        self.steps, self.screen, self.progress = steps, screen, progress
        self.task = progress.add_task("", total=steps)
        self.left, self.last = TimeLeft(), time.monotonic() - PAUSE

    def part(self, steps: float) -> None:
        """Show that so many steps are done: a whole number when a run begins, else within a step."""
        left = self.left.after(steps, self.steps)
        done = f"{steps % 1:.0%} of step {int(steps) + 1}{left}"
        self.progress.update(self.task, completed=steps, description=done)
        if steps % 1 and self._due():
            self._print(f"step {int(steps)}/{self.steps}  {done}")

    def step(self, step: Step) -> None:
        """Show a step."""
        left = self.left.after(step.step, self.steps)
        text = f"{_losses(step)}  {step.tokens_per_second:,.0f} tok/s{left}"
        name = f"step {step.step}/{self.steps}"
        self.progress.update(self.task, completed=step.step, description=text)
        if step.validation is not None:
            self._print(f"{name}  {text}  {step.validation}")
            if step.acceptance is not None:
                self._print(f"{name}  {step.acceptance}")
        elif self._due() or (step.step == self.steps and not self.screen.is_terminal):
            self._print(f"{name}  {text}")

    def _due(self) -> bool:
        return not self.screen.is_terminal and time.monotonic() - self.last >= PAUSE

    def _print(self, line: str) -> None:
        self.screen.print(line, soft_wrap=True)
        self.last = time.monotonic()


@contextmanager
def training(steps: int) -> Iterator[TrainingScreen]:
    """Where a training run of so many steps shows how far it is."""
    screen = console()
    columns = (TextColumn("{task.completed:.0f}/{task.total}"), BarColumn(bar_width=20), TextColumn("{task.description}"))
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as progress:
        yield TrainingScreen(steps, screen, progress)


def _losses(step: Step) -> str:
    """By head, and of coupled heads 2.. given the token before; of a coupling that learns alone only those get better."""
    first = 2 if step.losses[0] == 0 else 1  # a frozen base has no loss of head 1
    plain = _by_head(first, step.losses[first - 1 :]) + (" (the base is frozen)" if first == 2 else "")
    return f"loss in nats of {plain}  coupled: {_by_head(2, step.coupled)}" if step.coupled else f"loss in nats of {plain}"


def _by_head(first: int, losses: Sequence[float]) -> str:
    last = first + len(losses) - 1
    heads = f"heads {first}-{last}" if last > first else f"head {first}"
    return f"{heads}: {' '.join(f'{loss:.3f}' for loss in losses)}"
