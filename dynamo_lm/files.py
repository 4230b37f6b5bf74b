"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, (target.stat().st_mode if target.exists() else 0o666 & ~_umask()) & 0o777)
        if durable:
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str, *, durable: bool = False) -> None:
    """Makes or replaces a UTF-8 file, see `atomic_write`."""
    with atomic_write(path, durable=durable) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def is_disk_full(error: BaseException) -> bool:
    """Whether an error of the system or of safetensors says that the disk is full."""
    return getattr(error, "errno", None) == errno.ENOSPC or any(
        words in str(error) for words in ("No space left", "os error 28")
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
