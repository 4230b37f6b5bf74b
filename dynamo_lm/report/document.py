"""What a report consists of: headed sections of prose, tables, figures and texts, in no particular format.

The builders make these, the two templates show them; neither knows the other. All strings are plain text: escaping is the
templates' business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from dynamo_lm.errors import InputError

DASH = "\N{EN DASH}"
Columns = dict[str, Callable[..., str]]  # of a table: heading, and the cell of a row


@dataclass(frozen=True)
class Block:
    """What stands in a section; a template shows it by its `kind`."""

    @property
    def kind(self) -> str:
        """The name of its class in lower case."""
        return type(self).__name__.lower()


@dataclass(frozen=True)
class Prose(Block):
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Banner(Block):
    """A paragraph that must not be overlooked."""

    title: str
    text: str


@dataclass(frozen=True)
class Table(Block):
    """Cells as text; the first column names the row. `folded`: shown on request, beside a figure that shows the same."""

    caption: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""
    folded: bool = False

    @classmethod
    def of(cls, caption: str, columns: Columns, rows: Iterable[Any], **options: Any) -> Table:
        """A table from what its columns make of each of `rows`; `options` are the other fields."""
        return cls(caption, list(columns), [[cell(row) for cell in columns.values()] for row in rows], **options)


@dataclass(frozen=True)
class Figure:
    """A picture, drawn when it is first needed.

    name: its file's stem and the prefix of its ids; label: its description for those who do not see it.
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
                f'The figure "{self.name}" cannot be drawn ({error}); delete the results it shows and measure again.'
            ) from error


@dataclass(frozen=True)
class Gallery(Block):
    """Pictures side by side with one caption, and their numbers. `columns`: how many fit a desktop's width."""

    figures: list[Figure]
    caption: str
    numbers: Table | None = None
    columns: int = 2


@dataclass(frozen=True)
class Step:
    """The text of one forward pass, and how many tokens it is."""

    text: str
    size: int


@dataclass(frozen=True)
class Text:
    """A completion; `steps` is None where it was not split."""

    arm: str
    summary: str
    text: str
    steps: list[Step] | None = None


@dataclass(frozen=True)
class Texts(Block):
    """Completions of a prompt."""

    prompt: str
    texts: list[Text]

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
    blocks: Sequence[Block]
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
    headlines: list[Headline] = field(default_factory=list)
    lead: list[str] = field(default_factory=list)
    banners: list[Banner] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
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
    return number(value, digits) + ("" if error is None or value is None else f" ± {error:.{digits}f}")


def interval(bounds: Sequence[float], digits: int = 2) -> str:
    """A 95 % interval."""
    return f"{bounds[0]:,.{digits}f} to {bounds[1]:,.{digits}f}"


def within(value: float | None, bounds: Sequence[float] | None, digits: int = 2) -> str:
    """A value with its interval in parentheses."""
    return number(value, digits) + ("" if bounds is None or value is None else f" ({interval(bounds, digits)})")


def percent(value: float | None) -> str:
    """A share."""
    return DASH if value is None else f"{value:.0%}"


def share(shares: Sequence[float] | None, size: int) -> str:
    """The share of the steps of `size` tokens, of `shares` of the steps of 1, 2, .. tokens."""
    return percent(shares[size - 1]) if shares and size <= len(shares) else DASH
