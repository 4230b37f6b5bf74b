"""What a report consists of: headed sections of prose, tables, figures and texts, in no particular format.

The builders make these, the two templates show them; neither knows the other. All strings are plain text: escaping is the
templates' business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from dynamo_lm.errors import InputError

DASH = "\N{EN DASH}"


@dataclass(frozen=True)
class Prose:
    """A paragraph."""

    text: str
    kind: ClassVar[str] = "prose"


@dataclass(frozen=True)
class Banner:
    """A paragraph that must not be overlooked."""

    title: str
    text: str
    kind: ClassVar[str] = "banner"


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column names the row. `folded`: shown on request, beside a figure that shows the same."""

    caption: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""
    folded: bool = False
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Figure:
    """One picture, drawn when it is first looked at.

    name: its file's stem and the prefix of its ids; label: what it says to those who do not see it.
    """

    name: str
    title: str
    label: str
    draw: Callable[[], str]

    @cached_property
    def svg(self) -> str:
        """The picture itself.

        Raises:
            InputError: numbers that cannot be drawn.
        """
        try:
            return self.draw()
        except (TypeError, ValueError, IndexError) as error:
            raise InputError(
                f'The figure "{self.name}" cannot be drawn ({error}); delete the results behind it and measure again.'
            ) from error


@dataclass(frozen=True)
class Gallery:
    """Pictures side by side with one caption, and their numbers. `columns`: how many fit a desktop's width."""

    figures: list[Figure]
    caption: str
    numbers: Table | None = None
    columns: int = 2
    kind: ClassVar[str] = "gallery"


@dataclass(frozen=True)
class Step:
    """What one forward pass gave: text, and how many tokens it was."""

    text: str
    size: int


@dataclass(frozen=True)
class Text:
    """One completion. Without `steps` nobody has split it."""

    arm: str
    summary: str
    text: str
    steps: list[Step] | None = None


@dataclass(frozen=True)
class Texts:
    """Completions of one prompt."""

    prompt: str
    texts: list[Text]
    kind: ClassVar[str] = "texts"

    @property
    def most(self) -> int:
        """The largest step."""
        return max((step.size for text in self.texts for step in text.steps or []), default=1)


@dataclass(frozen=True)
class Source:
    """Where a section's numbers come from."""

    command: str
    facts: list[tuple[str, str]]


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    id: str
    title: str
    blocks: list[Any]
    source: Source | None = None


@dataclass(frozen=True)
class Headline:
    """A number that the page begins with."""

    value: str
    unit: str
    detail: str
    small: bool = False


@dataclass(frozen=True)
class Page:
    """The whole report."""

    title: str
    facts: list[tuple[str, str]]
    headlines: list[Headline]
    lead: list[str]
    banners: list[Banner]
    sections: list[Section]
    missing: list[tuple[str, str]] = field(default_factory=list)  # what was not measured, and the command that would

    def figures(self) -> list[Figure]:
        """Every picture of the page, in order."""
        blocks = [block for section in self.sections for block in section.blocks]
        return [figure for block in blocks if isinstance(block, Gallery) for figure in block.figures]


def number(value: float | int | None, digits: int = 2) -> str:
    """With so many decimals; a dash for None."""
    return DASH if value is None else f"{value:,.{digits}f}"


def spread(value: float | None, error: float | None, digits: int = 2) -> str:
    """A value with its standard error."""
    return number(value, digits) if error is None or value is None else f"{value:,.{digits}f} ± {error:.{digits}f}"


def interval(bounds: Sequence[float] | None, digits: int = 2) -> str:
    """A 95 % interval; a dash where there were too few samples for one."""
    return DASH if bounds is None else f"{bounds[0]:,.{digits}f} to {bounds[1]:,.{digits}f}"


def within(value: float | None, bounds: Sequence[float] | None, digits: int = 2) -> str:
    """A value with its interval behind it."""
    text = number(value, digits)
    return text if bounds is None or value is None else f"{text} ({interval(bounds, digits)})"


def percent(value: float | None) -> str:
    """A share."""
    return DASH if value is None else f"{value:.0%}"
