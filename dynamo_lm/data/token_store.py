"""Text in, tokens on disk out.

`tokenize` streams the texts of `dynamo_lm.data.sources` through a Hugging Face tokenizer into a `TokenStore`: one flat
memory-mapped file and the documents' borders, so that a corpus may be larger than memory (a single document may not).
`packing` cuts a store into blocks; `tokenize_chat` makes one of conversations.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock  # comes with torch

from dynamo_lm.data.sources import documents
from dynamo_lm.data.sources import files as files_of
from dynamo_lm.errors import InputError, first_line
from dynamo_lm.files import write_text

FORMAT = 1  # of a store's folder; another number is rebuilt
BATCH_DOCUMENTS, BATCH_CHARACTERS = 1000, 4_000_000  # a batch for the tokenizer is full at either

Document = tuple[list[int], list[bool] | None]  # its ids and, of conversations, which of them are learned
Progress = Callable[[int, int], None]  # is given the documents and the tokens so far


class TokenStore:
    """The tokens of a corpus: iterating yields each document's as an array, `len` counts the documents.

    Its folder holds `tokens-*.bin` (little-endian, nothing else), `offsets-*.npy` and `store.json`, which names the
    other two and is written last: a folder holds a whole store or none. Opening checks the sizes, not every token. A
    store of conversations has `responses-*.bin`, too, a byte per token.
    """

    tokens: np.memmap  # (num_tokens,) uint16 where the vocabulary fits, otherwise uint32
    offsets: np.ndarray  # (documents + 1,) int64: document i is tokens[offsets[i]:offsets[i + 1]]
    responses: np.ndarray | None  # (num_tokens,) bool: the assistant's tokens, which are learned; None for plain text
    vocab_size: int  # 1 + the largest id of the tokenizer
    fingerprint: str  # sha256 over the tokens' bytes, and those of `responses`
    tokenizer: str  # `tokenizer_fingerprint` of the tokenizer that made it
    inputs: str  # sha256 over what it was made from
    facts: dict[str, Any]  # more about it, from whoever built it

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            about = json.loads((self.folder / "store.json").read_text(encoding="utf-8"))
            if about["format"] != FORMAT:
                raise ValueError(f"format {about['format']}")
            self.vocab_size, self.fingerprint = int(about["vocab_size"]), str(about["fingerprint"])
            self.tokenizer, self.inputs = str(about["tokenizer"]), str(about["inputs"])
            self.facts = dict(about.get("facts", {}))
            tokens, offsets, responses = _store_files(self.folder, self.inputs)
            self.offsets = np.load(offsets, allow_pickle=False)
            self.tokens = np.memmap(tokens, dtype=token_dtype(self.vocab_size), mode="r")
            self.responses = np.memmap(responses, dtype=np.bool_, mode="r") if about.get("responses") else None
            if self.responses is not None and len(self.responses) != len(self.tokens):
                raise ValueError("responses and tokens disagree")
            if self.offsets.dtype != np.int64 or self.offsets.ndim != 1 or len(self.offsets) < 2:
                raise ValueError("offsets of another kind")
            if self.offsets[0] != 0 or self.offsets[-1] != len(self.tokens) or (np.diff(self.offsets) < 0).any():
                raise ValueError("offsets and tokens disagree")
        except (OSError, EOFError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{self.folder} is not a usable token store: {first_line(error)}.") from error
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
    progress: Progress | None = None,
) -> TokenStore:
    """The store in `folder` of all documents of `sources`; what is there is reused if it was made from the same inputs.

    Each document becomes `tokenizer(text)`, with the special tokens it adds itself, and ends in one end-of-text token.
    `limit_tokens` cuts the corpus after that many, in the middle of a document. `progress(documents, tokens)` is called
    with the totals so far after each batch. Local files count as the same while path, size and time are, a data set
    while its id is. Processes that ask for one folder at the same time wait for each other.
    """
    sources = [sources] if isinstance(sources, str) else list(map(str, sources))
    folder = Path(folder)
    check_end_token(tokenizer)
    if limit_tokens is not None and limit_tokens < 1:
        raise InputError(f"The token limit must be at least 1, not {limit_tokens}.")
    inputs = digest(
        {"sources": identities(sources), "tokenizer": tokenizer_fingerprint(tokenizer), "text_field": text_field}
        | {"limit_tokens": limit_tokens, "eos": tokenizer.eos_token_id, "format": FORMAT}
    )
    texts = chain.from_iterable(documents(source, text_field=text_field) for source in sources)
    rows = ((ids, None) for ids in token_ids(texts, tokenizer))
    return build_store(folder, inputs, rows, tokenizer, limit_tokens=limit_tokens, progress=progress)


def build_store(
    folder: Path,
    inputs: str,
    documents: Iterable[Document],
    tokenizer: Any,
    *,
    facts: dict[str, Any] | None = None,
    limit_tokens: int | None = None,
    progress: Progress | None = None,
) -> TokenStore:
    """The store in `folder`, made of `documents` unless the one that is there has the same `inputs`.

    Args:
        inputs: a hash of all that decides the content.
        documents: read only if needed.
        facts: kept in the store; read after the documents, so that their maker may fill it meanwhile.
    """
    if store := _reusable(folder, inputs):  # before the lock: a finished store may lie on a read-only disk
        return store
    with _locked(folder):
        if store := _reusable(folder, inputs):
            return store
        _build(folder, inputs, documents, tokenizer, facts, limit_tokens, progress)
    return TokenStore(folder)


def check_end_token(tokenizer: Any) -> None:
    """Raises InputError for a tokenizer that cannot mark where a document ends."""
    if tokenizer.eos_token_id is None:
        raise InputError("The tokenizer has no end-of-text token, which marks where documents end; set its eos_token.")


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """16 hex digits of the vocabulary and, for fast tokenizers, of the whole pipeline except truncation and padding."""
    about: dict[str, Any] = {"vocabulary": sorted(tokenizer.get_vocab().items())}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # merges, normalization, the special tokens it adds
        about["backend"] = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    return digest(about)[:16]


def identities(sources: Sequence[str]) -> list[Any]:
    """What tells sources apart: path, size and time of local files, the id of a data set."""
    named: list[Any] = []
    for source in sources:
        files = files_of(source)
        facts = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files or ()]
        named.append(source if files is None else facts)
    return named


def digest(value: Any) -> str:
    """sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _reusable(folder: Path, inputs: str) -> TokenStore | None:
    try:
        store = TokenStore(folder)
    except InputError:  # none there, an old format, or a damaged one
        return None
    return store if store.inputs == inputs else None


def _store_files(folder: Path, inputs: str) -> tuple[Path, Path, Path]:
    """Named after the inputs, so that a new store never touches the old one's files before it is complete."""
    name = inputs[:16]
    return folder / f"tokens-{name}.bin", folder / f"offsets-{name}.npy", folder / f"responses-{name}.bin"


def token_dtype(vocab_size: int) -> np.dtype:
    """What token ids are kept as: two bytes where the vocabulary fits, else four."""
    return np.dtype("<u2" if vocab_size <= 65536 else "<u4")


def token_ids(texts: Iterable[str], tokenizer: Any) -> Iterator[list[int]]:
    """The ids of each text, ending in the end-of-text token whether or not the tokenizer adds it; reads ahead by a batch."""
    for batch in _batched(texts):
        rows = tokenizer(batch, return_attention_mask=False, return_token_type_ids=False, verbose=False)["input_ids"]
        for ids in rows:
            yield ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]


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
    documents: Iterable[Document],
    tokenizer: Any,
    facts: dict[str, Any] | None,
    limit_tokens: int | None,
    progress: Progress | None,
) -> None:
    """Write a store into `folder`. Until `store.json` is replaced, the store that was there before is intact."""
    vocab_size = 1 + max(tokenizer.get_vocab().values())
    tokens_file, offsets_file, responses_file = files = _store_files(folder, inputs)
    ends: list[int] = [0]
    sha, flags_sha, flagged = hashlib.sha256(), hashlib.sha256(), False
    try:
        # 1. The tokens, document by document.
        with _writing(folder), open(tokens_file, "wb") as file, open(responses_file, "wb") as responses:
            for ids, learned in documents:
                row = np.array(ids, dtype=token_dtype(vocab_size))[
                    : None if limit_tokens is None else limit_tokens - ends[-1]
                ]
                file.write(row.data)
                sha.update(row.data)
                if learned is not None:
                    flags = np.array(learned, dtype=np.bool_)
                    responses.write(flags.data)
                    flags_sha.update(flags.data)
                    flagged = True
                ends.append(ends[-1] + len(row))
                if progress and (len(ends) - 1) % BATCH_DOCUMENTS == 0:
                    progress(len(ends) - 1, ends[-1])
                if ends[-1] == limit_tokens:
                    break
            _to_disk(file)
            _to_disk(responses)
        if ends[-1] == 0:
            raise InputError("There is no source to read tokens from; give at least one.")
        if progress and (len(ends) - 1) % BATCH_DOCUMENTS:
            progress(len(ends) - 1, ends[-1])
        if flagged:
            sha.update(flags_sha.digest())
        else:
            responses_file.unlink()
        # 2. The borders, then the description that makes the store valid.
        about = {
            "format": FORMAT,
            "inputs": inputs,
            "vocab_size": vocab_size,
            "fingerprint": sha.hexdigest(),
            "tokenizer": tokenizer_fingerprint(tokenizer),
        }
        about |= {"responses": True, "facts": facts or {}} if flagged else {}
        with _writing(folder):
            with open(offsets_file, "wb") as file:
                np.save(file, np.array(ends, dtype=np.int64))
                _to_disk(file)
            write_text(folder / "store.json", json.dumps(about, indent=1), durable=True)
    except BaseException:  # also an interrupt: leave no gigabytes of half a store
        for path in files:
            path.unlink(missing_ok=True)
        raise
    # 3. What no store uses any more.
    for path in (*folder.glob("tokens-*.bin"), *folder.glob("offsets-*.npy"), *folder.glob("responses-*.bin")):
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
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
