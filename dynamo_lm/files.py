"""Files: UTF-8 text in, and files and folders out that are there whole or not at all.

This is the only place that writes under a temporary name and renames.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dynamo_lm.errors import InputError


@contextmanager
def atomic_write(path: str | os.PathLike, *, durable: bool = False) -> Iterator[Path]:
    """Gives a temporary file beside `path` to write to, and renames it to `path` when the block ends without an error.

    Args:
        path: the file to make or replace; its folder must exist.
        durable: wait until the bytes are on the disk before renaming.

    Raises:
        OSError: whatever writing raised; the temporary file is gone and `path` is as it was.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}")
    try:
        temporary.open("xb").close()
        mode = (target if target.exists() else temporary).stat().st_mode & 0o777
        yield temporary
        os.chmod(temporary, mode)  # whatever wrote it may have made a file that only its owner can read
        if durable:
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike, data: bytes, *, durable: bool = False) -> None:
    """Makes or replaces a file, see `atomic_write`."""
    with atomic_write(path, durable=durable) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | os.PathLike, text: str, *, durable: bool = False) -> None:
    """Makes or replaces a UTF-8 file, see `atomic_write`."""
    write_bytes(path, text.encode("utf-8"), durable=durable)


@contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Gives an empty folder `.writing-NAME` beside `path` to fill, and puts it in the place of `path` when the block ends.

    Raises:
        OSError: whatever writing raised; the temporary folder is gone and `path` is as it was.
    """
    target = Path(path)
    temporary = target.with_name(f".writing-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    try:
        temporary.mkdir(parents=True)
        yield temporary
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def atomic_files(folder: str | os.PathLike) -> Iterator[Path]:
    """Gives an empty folder inside `folder` to fill, and moves each of its files up when the block ends.

    `folder` is made if it is missing; its other files stay.

    Raises:
        OSError: whatever writing raised; the temporary folder is gone, and `folder` is as it was unless moving failed.
    """
    target = Path(folder)
    temporary = target / f".writing-{uuid.uuid4().hex[:8]}"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in sorted(temporary.iterdir()):
            os.replace(file, target / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_bytes(path: str | os.PathLike) -> bytes:
    """A file's content.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error


def decode(data: bytes, name: str | os.PathLike, first_line: int = 1) -> str:
    """UTF-8 text without its byte order mark; `name` and the number of its first line are for the error.

    Raises:
        InputError: it is not valid UTF-8.
    """
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        column = error.start - data.rfind(b"\n", 0, error.start)
        raise InputError(f"{name} is not UTF-8: line {line}, byte {column} is 0x{data[error.start]:02x}.") from error


def split_lines(text: str) -> list[str]:
    r"""The lines of a text, which end at "\n" or "\r\n" alone: str.splitlines also cuts at U+2028 and its like."""
    lines = text.split("\n")
    return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]


def is_disk_full(error: BaseException) -> bool:
    """Whether an error of the system or of safetensors says that the disk is full."""
    return getattr(error, "errno", None) == errno.ENOSPC or any(
        words in str(error) for words in ("No space left", "os error 28")
    )
