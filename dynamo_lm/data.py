"""Text in, tokens on disk out.

`documents` reads text from files, folders and the hub, one string at a time. `tokenize` streams such strings through a
Hugging Face tokenizer into a `TokenStore`: one flat memory-mapped file and the documents' borders, so that a corpus may
be larger than memory (a single document may not). Nothing here knows models; cutting a store into blocks is `packing`.
"""

from __future__ import annotations

import glob
import hashlib
import importlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from dynamo_lm.errors import InputError

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
FORMAT = 1  # of a store's folder; another number is rebuilt
BATCH_DOCUMENTS, BATCH_CHARACTERS = 1000, 4_000_000  # a batch for the tokenizer is full at either


# --- text -----------------------------------------------------------------------


def documents(source: str, *, text_field: str | None = None) -> Iterator[str]:
    """The documents of `source` in a fixed order, without those that are empty or whitespace only.

    `source` is a file (.txt: one document; .jsonl or .json: one per object; .parquet: one per row), a folder (all such
    files in it, recursively, sorted, hidden ones left out), a glob, or the id of a `datasets` data set ("owner/name" or
    "owner/name:split", streamed). `text_field` names the field that holds the text; without it that is "text" or else
    the only string field, as the first object of each file has it.
    """
    files = _files(source)  # here and not in the generator: a wrong path is reported at once
    return _non_empty(source, _hub(source, text_field) if files is None else _read_all(files, text_field))


def _non_empty(source: str, texts: Iterable[str]) -> Iterator[str]:
    found = False
    for text in texts:
        if text.strip():
            found = True
            yield text
    if not found:
        raise InputError(f"{source} holds no document with any text.")


def _files(source: str) -> list[Path] | None:
    """The files that `source` names, sorted; None if it can only be a hub id."""
    path, readable = Path(source), f"files that can be read end in {', '.join(SUFFIXES)}"
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise InputError(f"{source} is no kind of text known here; {readable}.")
        return [path]
    if path.is_dir() and source:  # an empty name is not the current folder
        inside = (file.relative_to(path) for file in path.rglob("*"))
        found = [path / file for file in inside if not any(part.startswith(".") for part in file.parts)]
    elif glob.has_magic(source):
        found = [Path(name) for name in glob.glob(source, recursive=True)]
    elif re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(:\w[\w.-]*)?", source) and path.suffix.lower() not in SUFFIXES:
        return None
    else:
        raise InputError(f'"{source}" does not exist; give a file, a folder, a glob or the id of a data set (owner/name).')
    files = sorted(file for file in found if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise InputError(f"{source} matches no file to read; {readable}.")
    return files


def _read_all(files: Iterable[Path], text_field: str | None) -> Iterator[str]:
    for file in files:
        suffix = file.suffix.lower()
        if suffix == ".txt":
            yield _decode(_bytes(file), file).replace("\r\n", "\n").replace("\r", "\n")
        elif suffix == ".parquet":
            yield from _parquet(file, text_field)
        else:
            yield from _texts(_json_objects(file), text_field)


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error


def _decode(data: bytes, file: Path, first_line: int = 1) -> str:
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        column = error.start - data.rfind(b"\n", 0, error.start)
        raise InputError(f"{file} is not UTF-8: line {line}, byte {column} is 0x{data[error.start]:02x}.") from error


def _json_objects(file: Path) -> Iterator[tuple[str, Any]]:
    """(where it stands, value) for each line of a .jsonl file and each line or array element of a .json file."""
    try:
        with open(file, "rb") as lines:  # in bytes: only \n ends a line, so that line numbers are an editor's
            start = lines.peek().removeprefix(b"\xef\xbb\xbf").lstrip()
            if file.suffix.lower() == ".json" and start.startswith(b"["):
                for number, value in enumerate(_parse(_decode(lines.read(), file), file, 1), 1):
                    yield f"{file}, element {number}", value
            for number, line in enumerate(lines, 1):
                text = _decode(line, file, number)
                if text.strip():
                    yield f"{file}, line {number}", _parse(text.rstrip(), file, number)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error


def _parse(text: str, file: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{file} is not JSON at line {first_line + error.lineno - 1}: {error.msg}.") from error
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
        yield _text(where, field, record[field])


def _text_field(where: str, fields: Sequence[str], strings: Sequence[str], text_field: str | None) -> str:
    wanted = text_field or "text"
    if wanted in fields:
        return wanted
    if text_field is None and len(strings) == 1:
        return strings[0]
    hint = "" if text_field else "; name the one with the text with --text-field"
    raise InputError(f"{where}: no field {wanted!r}; its fields are {_names(fields)}{hint}.")


def _names(fields: Iterable[str]) -> str:
    return ", ".join(map(repr, fields)) or "none"


def _text(where: str, field: str, value: Any) -> str:
    if value is None:  # a null is an empty document
        return ""
    if not isinstance(value, str):
        raise InputError(f"{where}: the field {field!r} is no text but {type(value).__name__}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # "\ud800" in JSON: tokenizers refuse it
        raise InputError(f"{where}: the field {field!r} holds half a surrogate pair, which is no text.") from error
    return value


def _parquet(file: Path, text_field: str | None) -> Iterator[str]:
    pyarrow, parquet = _extra("pyarrow"), _extra("pyarrow.parquet")
    unreadable = (pyarrow.ArrowException, OSError, UnicodeDecodeError)
    try:
        table = parquet.ParquetFile(file)
    except unreadable as error:
        raise InputError(f"{file} is not a readable Parquet file: {_first_line(error)}.") from error
    with table:
        schema, types = table.schema_arrow, pyarrow.types
        kinds = [column.type.value_type if types.is_dictionary(column.type) else column.type for column in schema]
        is_text = [types.is_string(kind) or types.is_large_string(kind) for kind in kinds]
        strings = [name for name, text in zip(schema.names, is_text, strict=True) if text]
        field = _text_field(str(file), schema.names, strings, text_field)
        rows = 0
        try:
            for batch in table.iter_batches(batch_size=BATCH_DOCUMENTS, columns=[field]):
                for value in batch.column(0).to_pylist():
                    rows += 1
                    yield _text(f"{file}, row {rows}", field, value)
        except unreadable as error:
            raise InputError(f"{file} is damaged after row {rows}: {_first_line(error)}.") from error


def _hub(source: str, text_field: str | None) -> Iterator[str]:
    datasets = _extra("datasets")
    name, _, split = source.partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "train", streaming=True)
        yield from _texts(((f"{source}, row {number}", dict(row)) for number, row in enumerate(rows, 1)), text_field)
    except InputError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"{source} is no file and no data set that can be read: {_first_line(error)}.") from error


def _extra(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise InputError(f"This source needs the package {package}: pip install 'dynamo-lm[train]'.") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# --- tokens on disk -------------------------------------------------------------


class TokenStore:
    """The tokens of a corpus: iterating yields each document's as an array, `len` counts the documents.

    Its folder holds `tokens-*.bin` (little-endian, nothing else), `offsets-*.npy` and `store.json`, which names the
    other two and is written last: a folder holds a whole store or none. Opening checks the sizes, not every token.
    """

    tokens: np.memmap  # (num_tokens,) uint16 where the vocabulary fits, otherwise uint32
    offsets: np.ndarray  # (documents + 1,) int64: document i is tokens[offsets[i]:offsets[i + 1]]
    vocab_size: int  # 1 + the largest id of the tokenizer
    fingerprint: str  # sha256 over the tokens' bytes
    tokenizer: str  # `tokenizer_fingerprint` of the tokenizer that made it
    inputs: str  # sha256 over what it was made from

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            about = json.loads((self.folder / "store.json").read_text(encoding="utf-8"))
            if about["format"] != FORMAT:
                raise ValueError(f"format {about['format']}")
            self.vocab_size, self.fingerprint = int(about["vocab_size"]), str(about["fingerprint"])
            self.tokenizer, self.inputs = str(about["tokenizer"]), str(about["inputs"])
            tokens, offsets = _store_files(self.folder, self.inputs)
            self.offsets = np.load(offsets, allow_pickle=False)
            self.tokens = np.memmap(tokens, dtype=_dtype(self.vocab_size), mode="r")
            if self.offsets.dtype != np.int64 or self.offsets.ndim != 1 or len(self.offsets) < 2:
                raise ValueError("offsets of another kind")
            if self.offsets[0] != 0 or self.offsets[-1] != len(self.tokens) or (np.diff(self.offsets) < 0).any():
                raise ValueError("offsets and tokens disagree")
        except (OSError, EOFError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{self.folder} holds no usable token store: {_first_line(error)}.") from error
        self._tokens = np.asarray(self.tokens)  # the same memory map, without memmap's cost per slice

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def document(self, index: int) -> np.ndarray:
        """The tokens of one document, (length,), read-only and not copied."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        return self._tokens[self.offsets[index] : self.offsets[index + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self.document, range(len(self)))

    def split(self, validation_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """(training ids, validation ids), both int64 ascending: a fraction of the documents held out, at least one.

        The side is drawn from the seed and the document's tokens, so equal documents are never on both sides.
        """
        if not 0 <= validation_fraction < 1:
            raise InputError(f"The validation fraction must be at least 0 and below 1, not {validation_fraction}.")
        if validation_fraction == 0:
            return np.arange(len(self)), np.arange(0)
        key = str(seed).encode()
        digests = b"".join(hashlib.blake2b(document.data, digest_size=8, key=key).digest() for document in self)
        draws = np.frombuffer(digests, dtype="<u8")  # (documents,)
        held_out = max(1, round(validation_fraction * len(self)))
        validation = draws <= np.partition(draws, held_out - 1)[held_out - 1]
        if validation.all():
            raise InputError(
                f"Holding out {validation_fraction:g} of {len(self):,} document(s) leaves none to train on; "
                f"give more documents that differ or a validation fraction of 0."
            )
        return np.flatnonzero(~validation), np.flatnonzero(validation)


def tokenize(
    sources: Sequence[str],
    tokenizer: Any,
    folder: str | Path,
    *,
    text_field: str | None = None,
    limit_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TokenStore:
    """The store in `folder` of all documents of `sources`; what is there is reused if it was made from the same inputs.

    Each document becomes `tokenizer(text)`, with the special tokens it adds itself, and ends in one end-of-text token.
    `limit_tokens` cuts the corpus after that many, in the middle of a document. `progress(documents, tokens)` is called
    with the totals so far after each batch. Local files count as the same while path, size and time are, a data set
    while its id is. Processes that ask for one folder at the same time wait for each other.
    """
    sources = [sources] if isinstance(sources, str) else list(map(str, sources))
    folder = Path(folder)
    if tokenizer.eos_token_id is None:
        raise InputError("The tokenizer has no end-of-text token, which marks where documents end; set its eos_token.")
    if limit_tokens is not None and limit_tokens < 1:
        raise InputError(f"The token limit must be at least 1, not {limit_tokens}.")
    inputs = _inputs(sources, tokenizer, text_field, limit_tokens)
    if store := _reusable(folder, inputs):  # before the lock: a finished store may lie on a read-only disk
        return store
    with _locked(folder):
        if store := _reusable(folder, inputs):
            return store
        texts = chain.from_iterable(documents(source, text_field=text_field) for source in sources)
        _build(folder, inputs, _tokenized(texts, tokenizer), tokenizer, limit_tokens, progress)
    return TokenStore(folder)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """16 hex digits of the vocabulary and, for fast tokenizers, of the whole pipeline except truncation and padding."""
    about: dict[str, Any] = {"vocabulary": sorted(tokenizer.get_vocab().items())}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # merges, normalization, the special tokens it adds
        about["backend"] = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    return _digest(about)[:16]


def _inputs(sources: Sequence[str], tokenizer: Any, text_field: str | None, limit_tokens: int | None) -> str:
    """What decides a store's content, as a sha256."""
    named: list[Any] = []
    for source in sources:
        files = _files(source)
        facts = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files or ()]
        named.append(source if files is None else facts)
    options = {"text_field": text_field, "limit_tokens": limit_tokens, "eos": tokenizer.eos_token_id, "format": FORMAT}
    return _digest({"sources": named, "tokenizer": tokenizer_fingerprint(tokenizer), **options})


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _reusable(folder: Path, inputs: str) -> TokenStore | None:
    try:
        store = TokenStore(folder)
    except InputError:  # none there, an old format, or a damaged one
        return None
    return store if store.inputs == inputs else None


def _store_files(folder: Path, inputs: str) -> tuple[Path, Path]:
    """Named after the inputs, so that a new store never touches the old one's files before it is complete."""
    return folder / f"tokens-{inputs[:16]}.bin", folder / f"offsets-{inputs[:16]}.npy"


def _dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 65536 else "<u4")


def _tokenized(texts: Iterable[str], tokenizer: Any) -> Iterator[list[list[int]]]:
    """Batches of documents as ids, each ending in the end-of-text token, whether or not the tokenizer adds it."""
    for batch in _batched(texts):
        rows = tokenizer(batch, return_attention_mask=False, return_token_type_ids=False, verbose=False)["input_ids"]
        yield [ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id] for ids in rows]


def _batched(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _build(
    folder: Path,
    inputs: str,
    batches: Iterable[list[list[int]]],
    tokenizer: Any,
    limit_tokens: int | None,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Write a store into `folder`. Until `store.json` is replaced, what was there before stays whole."""
    vocab_size = 1 + max(tokenizer.get_vocab().values())
    tokens_file, offsets_file = files = _store_files(folder, inputs)
    new_about = folder / "store.json.new"
    ends: list[int] = [0]
    sha = hashlib.sha256()
    try:
        # 1. The tokens, batch by batch.
        with _writing(folder), open(tokens_file, "wb") as file:
            for rows in batches:
                flat = np.fromiter(chain.from_iterable(rows), dtype=_dtype(vocab_size))
                if limit_tokens is not None:
                    flat = flat[: limit_tokens - ends[-1]]
                file.write(flat.data)
                sha.update(flat.data)
                last = ends[-1] + len(flat)
                for row in rows:
                    if ends[-1] < last:  # documents beyond the limit are not there
                        ends.append(min(ends[-1] + len(row), last))
                if progress:
                    progress(len(ends) - 1, last)
                if last == limit_tokens:
                    break
            _to_disk(file)
        if ends[-1] == 0:
            raise InputError("There is no source to read tokens from; give at least one.")
        # 2. The borders, then the description that makes the store valid.
        about = {
            "format": FORMAT,
            "inputs": inputs,
            "vocab_size": vocab_size,
            "fingerprint": sha.hexdigest(),
            "tokenizer": tokenizer_fingerprint(tokenizer),
        }
        with _writing(folder):
            with open(offsets_file, "wb") as file:
                np.save(file, np.array(ends, dtype=np.int64))
                _to_disk(file)
            with open(new_about, "wb") as file:
                file.write(json.dumps(about, indent=1).encode())
                _to_disk(file)
            os.replace(new_about, folder / "store.json")
    except BaseException:  # also an interrupt: leave no gigabytes of half a store behind
        for path in (*files, new_about):
            path.unlink(missing_ok=True)
        raise
    # 3. What no store uses any more.
    for path in (*folder.glob("tokens-*.bin"), *folder.glob("offsets-*.npy")):
        if path not in files:
            path.unlink(missing_ok=True)


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"The token store cannot be written to {folder}: {error.strerror or error}.") from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    from filelock import FileLock  # comes with torch

    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
