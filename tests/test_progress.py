"""What a person who waits is told: how far a run is, and how long the rest takes, also in a file."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from dynamo_lm.cli import progress
from dynamo_lm.cli.progress import TimeLeft, bar, counting, duration, training
from dynamo_lm.training.log import Progress


class Clock:
    """A clock that goes on when it is told to."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    own = Clock()
    monkeypatch.setattr("time.monotonic", own)
    return own


@pytest.fixture
def file(monkeypatch) -> StringIO:
    """Stderr that is a file."""
    written = StringIO()
    monkeypatch.setattr(progress, "console", lambda: Console(file=written, highlight=False))
    return written


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.34, "0.3 s"),
        (41.2, "41 s"),
        (89.4, "89 s"),
        (90, "2 min"),
        (3599, "1 h 0 min"),
        (12_000, "3 h 20 min"),
        (400_000, "4.6 days"),
    ],
)
def test_a_duration_in_words(seconds, text):
    assert duration(seconds) == text


def test_the_time_left_follows_from_what_was_done_since_the_first_call(clock):
    left = TimeLeft()
    assert left.after(100, 500) == ""  # a resumed run has taken 100 steps in no time
    clock.seconds = 60
    assert left.after(101, 500) == ", about 6 h 39 min left"  # 399 minutes
    clock.seconds = 90
    assert left.after(103, 500) == ", about 3 h 18 min left"  # 397 steps at 30 s
    assert left.after(500, 500) == ""


def test_the_first_lines_of_a_training_log_tell_the_time_left_within_the_first_step(clock, file):
    with training(10) as shown:
        shown.part(0)
        clock.seconds = 20
        shown.part(0.25)
        clock.seconds = 40
        shown.part(0.5)
        clock.seconds = 80
        shown.step(Progress(1, (0.0, 2.5, 3.5), 1.0, 1234.0))
    assert file.getvalue().splitlines() == [
        "step 0/10  25% of step 1, about 13 min left",
        "step 0/10  50% of step 1, about 13 min left",
        "step 1/10  loss in nats of heads 2-3: 2.500 3.500 (the base is frozen)  1,234 tok/s, about 12 min left",
    ]


def test_a_long_count_tells_the_time_left_in_a_file(clock, file):
    with bar("counting", 1000) as update:
        clock.seconds = 20
        update(100)
        clock.seconds = 21
        update(110)  # too soon after the last line
    assert file.getvalue().splitlines() == [
        "counting: 0 of 1,000 tokens",
        "counting: 100 of 1,000 tokens, about 3 min left",
    ]


def test_what_is_done_next_begins_a_new_estimate(clock, file):
    with counting() as report:
        for what in ("writing", "judging"):
            report(what, 0, 10)
            clock.seconds += 30
            report(what, 5, 10)
            clock.seconds += 30
    assert [line for line in file.getvalue().splitlines() if "left" in line] == [
        "writing: 5 of 10, about 30 s left",
        "judging: 5 of 10, about 30 s left",
    ]
