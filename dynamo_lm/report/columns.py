"""Markdown within a number of columns: prose is wrapped, tables that are too wide become several narrower ones."""

from __future__ import annotations

import re
import textwrap
from itertools import groupby

WIDTH = 120
_MARKUP = re.compile(r" (?=(?:[-+*=#>|]+|\d+[.)])(?: |$))")  # a line that begins so would be a list, a heading, a quote


def fit(text: str, width: int = WIDTH) -> str:
    """The same document with no line longer than `width`, unless a word is. Code blocks stay as they are."""
    lines: list[str] = []
    fenced = False
    for table, block in groupby(text.split("\n"), key=lambda line: line.startswith("|")):
        if table and not fenced:
            lines += _table(list(block), width)
            continue
        for line in block:
            fenced ^= line.lstrip().startswith("```")
            lines += [line] if fenced or len(line) <= width else _prose(line, width)
    return "\n".join(lines)


def _prose(line: str, width: int) -> list[str]:
    """A paragraph, list item or quotation. Breaks only where the new line cannot be read as other markup."""
    first = re.match(r"(?:> |\s*(?:[-*]|\d+\.) )?", line)[0]  # type: ignore[index]
    rest = first if first == "> " else " " * len(first)
    kept = _MARKUP.sub("\0", line[len(first) :])
    wrapped = textwrap.wrap(
        kept, width, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
    return [part.replace("\0", " ") for part in wrapped]


def _table(lines: list[str], width: int) -> list[str]:
    """A table by groups of columns that fit, each with the columns that tell rows apart; else its rows as a list."""
    if max(map(len, lines)) <= width:
        return lines
    rows = [re.split(r"(?<!\\)\|", line.strip()[1:-1]) for line in lines]
    columns = [[cell.strip() for cell in column] for column in zip(*rows, strict=True)]
    keys = next(n for n in range(1, len(columns) + 1) if n == len(columns) or _distinct(columns[:n]))
    groups: list[list[list[str]]] = []
    for column in columns[keys:]:
        if groups and _wide([*groups[-1], column]) <= width:
            groups[-1].append(column)
        else:
            groups.append([*columns[:keys], column])
    if not groups or max(map(_wide, groups)) > width:
        return _listed(columns, width)
    tables = [[f"| {' | '.join(row)} |" for row in zip(*group, strict=True)] for group in groups]
    return [line for number, table in enumerate(tables) for line in ([""] if number else []) + table]


def _listed(columns: list[list[str]], width: int) -> list[str]:
    header, _, *rows = zip(*columns, strict=True)
    items = [
        "- " + "; ".join(f"{name}: {cell}" if name else cell for name, cell in zip(header, row, strict=True) if cell)
        for row in rows
    ]
    return [part for item in items for part in _prose(item, width)]


def _distinct(columns: list[list[str]]) -> bool:
    rows = list(zip(*columns, strict=True))[2:]
    return len(set(rows)) == len(rows)


def _wide(columns: list[list[str]]) -> int:
    return max(sum(len(cell) + 3 for cell in row) + 1 for row in zip(*columns, strict=True))
