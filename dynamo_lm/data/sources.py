"""Files, folders and data sets in, texts and records out, one at a time.

`documents` gives the text of each record, `records` the record itself, `shards` the parts that can be read by themselves.
Knows no tokens.
"""

from __future__ import annotations

import glob
import importlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from dynamo_lm.errors import InputError, first_line
from dynamo_lm.files import decode, read_bytes

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
VALUE = re.compile(r"\S")  # its first character
ROWS = 1000  # of a Parquet file that are in memory at once


def documents(source: str, *, text_field: str | None = None) -> Iterator[str]:
    """The documents of `source` in a fixed order, without those that are empty or whitespace only.

    `source` is a file (.txt: one document; .jsonl or .json: one per object; .parquet: one per row), a folder (all such
    files in it, recursively, sorted, hidden ones left out), a glob, or the id of a `datasets` data set ("owner/name" or
    "owner/name:split", streamed). `text_field` names the field that holds the text; without it that is "text" or else
    the only string field, as the first object of each file has it.
    """
    paths = files(source)  # outside the generator, so that a wrong path is reported at once
    return _non_empty(source, _texts(_hub_rows(source), text_field) if paths is None else _read_all(paths, text_field))


@dataclass(frozen=True)
class Shard:
    """A part of a source: a file, or one of the files of a data set on the hub."""

    source: str
    file: Path | None = None  # None: of a data set
    number: int = 0  # of a data set's files
    of: int = 1

    def texts(self, text_field: str | None = None, start: int = 0) -> Iterator[str]:
        """The texts of its records in order, from record `start` on; those of the records before it are read, too.

        Unlike `documents`, this gives empty texts, so that records keep their numbers.
        """
        texts = (
            _read_all([self.file], text_field) if self.file is not None else _texts(_hub_rows(self.source, self), text_field)
        )
        return islice(texts, start, None)


def shards(source: str) -> list[Shard]:
    """The shards of `source`, in the order in which `documents` reads them.

    Raises:
        InputError: nothing to read there.
    """
    paths = files(source)
    if paths is not None:
        return [Shard(source, path) for path in paths]
    with _hub_errors(source):
        count = _open_hub(source).num_shards
    return [Shard(source, None, number, count) for number in range(count)]


def records(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, record) for each record of `source`: as `documents`, with all fields and without plain text.

    Raises:
        InputError: nothing to read there, or something other than a record.
    """
    paths = files(source)
    return _hub_rows(source) if paths is None else _all_records(paths)


def _all_records(paths: Iterable[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    for file in paths:
        suffix = file.suffix.lower()
        if suffix == ".txt":
            raise InputError(f"{file} is plain text; records come as .jsonl, .json or .parquet.")
        if suffix == ".parquet":
            for row, batch in _parquet_batches(file, lambda names, strings: None):
                for number, record in enumerate(batch.to_pylist(), row + 1):
                    yield f"{file}, row {number}", record
            continue
        for where, record in _json_objects(file):
            if not isinstance(record, dict):
                raise InputError(f"{where}: expected an object, found {type(record).__name__}.")
            yield where, record


def _non_empty(source: str, texts: Iterable[str]) -> Iterator[str]:
    empty = True
    for text in texts:
        if text.strip():
            empty = False
            yield text
    if empty:
        raise InputError(f"{source} holds no document with any text.")


def files(source: str) -> list[Path] | None:
    """The files that `source` names, sorted; None if it can only be a hub id."""
    path, readable = Path(source), f"files that can be read end in {', '.join(SUFFIXES)}"
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise InputError(f"{source} has a type that cannot be read; {readable}.")
        return [path]
    if path.is_dir() and source:  # an empty name is not the current folder
        inside = (file.relative_to(path) for file in path.rglob("*"))
        matches = [path / file for file in inside if not any(part.startswith(".") for part in file.parts)]
    elif glob.has_magic(source):
        matches = [Path(name) for name in glob.glob(source, recursive=True)]
    elif re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(:\w[\w.-]*)?", source) and path.suffix.lower() not in SUFFIXES:
        return None
    else:
        raise InputError(f'"{source}" does not exist; give a file, a folder, a glob or the id of a data set (owner/name).')
    paths = sorted(file for file in matches if file.suffix.lower() in SUFFIXES and file.is_file())
    if not paths:
        raise InputError(f"{source} matches no file to read; {readable}.")
    return paths


def _read_all(paths: Iterable[Path], text_field: str | None) -> Iterator[str]:
    for file in paths:
        suffix = file.suffix.lower()
        if suffix == ".txt":
            yield decode(read_bytes(file), file).replace("\r\n", "\n").replace("\r", "\n")
        elif suffix == ".parquet":
            yield from _parquet(file, text_field)
        else:
            yield from _texts(_json_objects(file), text_field)


def _json_objects(file: Path) -> Iterator[tuple[str, Any]]:
    """(where it stands, value) for each line of a .jsonl file, and each value, or element of the array, of a .json file."""
    try:
        with open(file, "rb") as lines:  # in bytes: only \n ends a line, so that line numbers are an editor's
            if file.suffix.lower() == ".json" and _spans_lines(lines, file):
                yield from _values(decode(lines.read(), file), file)
            for number, line in enumerate(lines, 1):
                text = decode(line, file, number)
                if text.strip():
                    with _parsing(file, number):
                        value = json.loads(text.rstrip())
                    yield f"{file}, line {number}", value
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}.") from error


def _spans_lines(file: BinaryIO, name: Path) -> bool:
    """Whether a .json file begins with an array, or with a value that its first line does not end; reads none of it."""
    text = ""
    for number, line in enumerate(file, 1):
        text = decode(line, name, number).strip()
        if text:
            break
    file.seek(0)
    if not text or text.startswith("["):
        return bool(text)
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return True
    return False


def _values(text: str, file: Path) -> list[tuple[str, Any]]:
    """(where it stands, value) for each value of a text, or for each element if the only value is an array."""
    decoder, end, line = json.JSONDecoder(), 0, 1
    values: list[tuple[str, Any]] = []
    with _parsing(file, 1):
        while match := VALUE.search(text, end):
            start = match.start()
            line += text.count("\n", end, start)
            value, end = decoder.raw_decode(text, start)
            values.append((f"{file}, line {line}", value))
            line += text.count("\n", start, end)
    if len(values) == 1 and isinstance(values[0][1], list):
        return [(f"{file}, element {number}", value) for number, value in enumerate(values[0][1], 1)]
    return values


@contextmanager
def _parsing(file: Path, first_line: int) -> Iterator[None]:
    try:
        yield
    except json.JSONDecodeError as error:
        form = "; a .jsonl file has one value a line" if file.suffix.lower() == ".jsonl" else ""
        raise InputError(f"{file} is not JSON at line {first_line + error.lineno - 1}: {error.msg}{form}.") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or nesting as deep
        raise InputError(f"{file} holds JSON that cannot be read, from line {first_line} on: {error}.") from error


def _texts(records: Iterable[tuple[str, Any]], text_field: str | None) -> Iterator[str]:
    """The text of each (where, record). The first record decides the field for all that follow."""
    field: str | None = None
    for where, record in records:
        if not isinstance(record, dict):
            raise InputError(f"{where}: expected an object with a text field, found {type(record).__name__}.")
        if field is None:
            field = _text_field(where, list(record), [k for k, v in record.items() if isinstance(v, str)], text_field)
        if field not in record:
            raise InputError(f"{where}: no field {field!r}; its fields are {_names(record)}.")
        yield text_of(where, field, record[field])


def _text_field(where: str, fields: Sequence[str], strings: Sequence[str], text_field: str | None) -> str:
    name = text_field or "text"
    if name in fields:
        return name
    if text_field is None and len(strings) == 1:
        return strings[0]
    hint = "" if text_field else "; name the one with the text with --text-field"
    raise InputError(f"{where}: no field {name!r}; its fields are {_names(fields)}{hint}.")


def _names(fields: Iterable[str]) -> str:
    return ", ".join(map(repr, fields)) or "none"


def text_of(where: str, field: str, value: Any) -> str:
    """A record's field as text without a byte order mark, "" for a null; `where` and `field` are for the error.

    Raises:
        InputError: it is not text.
    """
    if value is None:  # a null is an empty document
        return ""
    if not isinstance(value, str):
        raise InputError(f"{where}: the field {field!r} is {type(value).__name__}, not text.")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # "\ud800" in JSON: tokenizers refuse it
        raise InputError(f"{where}: the field {field!r} holds half a surrogate pair, which is not text.") from error
    return value.removeprefix("\ufeff")  # of the file that the text was once


def _parquet(file: Path, text_field: str | None) -> Iterator[str]:
    field = ""

    def choose(names: Sequence[str], strings: Sequence[str]) -> list[str]:
        nonlocal field
        field = _text_field(str(file), names, strings, text_field)
        return [field]

    for row, batch in _parquet_batches(file, choose):
        for number, value in enumerate(batch.column(0).to_pylist(), row + 1):
            yield text_of(f"{file}, row {number}", field, value)


def _parquet_batches(
    file: Path, choose: Callable[[Sequence[str], Sequence[str]], list[str] | None]
) -> Iterator[tuple[int, Any]]:
    """(rows before it, batch) with the columns that `choose` takes of all names and of those that hold text."""
    pyarrow, parquet = _extra("pyarrow"), _extra("pyarrow.parquet")
    unreadable = (pyarrow.ArrowException, OSError, UnicodeDecodeError)
    try:
        table = parquet.ParquetFile(file)
    except unreadable as error:
        raise InputError(f"{file} is not a readable Parquet file: {first_line(error).rstrip('.')}.") from error
    with table:
        schema, types = table.schema_arrow, pyarrow.types
        kinds = [column.type.value_type if types.is_dictionary(column.type) else column.type for column in schema]
        is_text = [types.is_string(kind) or types.is_large_string(kind) for kind in kinds]
        strings = [name for name, text in zip(schema.names, is_text, strict=True) if text]
        columns, rows = choose(schema.names, strings), 0
        try:
            for batch in table.iter_batches(batch_size=ROWS, columns=columns):
                yield rows, batch
                rows += len(batch)
        except unreadable as error:
            raise InputError(f"{file} is damaged after row {rows}: {first_line(error).rstrip('.')}.") from error


def _hub_rows(source: str, shard: Shard | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, record) of a data set or of one of its shards."""
    part = "" if shard is None else f", file {shard.number + 1} of {shard.of}"
    with _hub_errors(source):
        rows = _open_hub(source)
        if shard is not None:
            rows = rows.shard(shard.of, shard.number)
        for number, row in enumerate(rows, 1):
            yield f"{source}{part}, row {number}", dict(row)


def _open_hub(source: str) -> Any:
    name, _, split = source.partition(":")
    return _extra("datasets").load_dataset(name, split=split or "train", streaming=True)


@contextmanager
def _hub_errors(source: str) -> Iterator[None]:
    datasets = _extra("datasets")
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"{source} is neither a file nor a data set that can be read: {first_line(error)}.") from error


def _extra(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise InputError(f"This source needs the package {package}: pip install 'dynamo-lm[train]'.") from error
