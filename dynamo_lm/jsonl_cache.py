"""What a judge has said, on disk: append-only JSON lines, so that a stopped run asks nothing twice.

A line is {"key": hash of who was asked and what, "value": the answer, ...}; texts are not stored. A line that was cut off by
a crash counts as never written. Knows nothing about judges.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dynamo_lm.errors import InputError


class Verdicts:
    """A mapping from keys to JSON values that grows in memory and, if it has a file, at once on disk, too."""

    def __init__(self, file: Path | None = None):
        """Opens `file`, which need not exist yet; without one, answers are kept for this process only.

        Raises:
            InputError: it holds something else, or cannot be read.
        """
        self.file = None if file is None else Path(file)
        self._values: dict[str, Any] = {}
        self._torn = False  # the last line has no end, so that the next one must not be glued to it
        if self.file is None:
            return
        try:
            content = self.file.read_bytes() if self.file.exists() else b""
        except OSError as error:
            raise InputError(f'The verdicts in "{file}" cannot be read ({error.strerror}); name another file.') from error
        self._values = dict(_lines(content))
        self._torn = bool(content) and not content.endswith(b"\n")
        if content.count(b"\n") and not self._values:
            raise InputError(f'"{file}" holds no verdicts of a judge; move it away or name another file.')

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __len__(self) -> int:
        return len(self._values)

    def put(self, key: str, value: Any, **about: Any) -> None:
        """Keeps `value`; `about` goes to the file only, for whoever reads it.

        Raises:
            InputError: the file cannot be written.
        """
        self._values[key] = value
        if self.file is None:
            return
        line = json.dumps({"key": key, "value": value, **about}, ensure_ascii=True, allow_nan=False) + "\n"
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("ab", buffering=0) as stream:
                stream.write(("\n" + line if self._torn else line).encode())
        except OSError as error:
            raise InputError(f'The verdicts cannot be written to "{self.file}": {error.strerror}.') from error
        self._torn = False


def key_of(*parts: Any) -> str:
    """A hash of JSON values: 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=True).encode()).hexdigest()[:32]


def _lines(content: bytes) -> Iterator[tuple[str, Any]]:
    for line in content.splitlines():
        try:
            found = json.loads(line)
            yield found["key"], found["value"]
        except (ValueError, TypeError, KeyError):  # torn
            continue
