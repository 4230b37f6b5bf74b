"""JSON lines on disk that a stopped run continues from: a log of records, and a cache of values by key.

A line ends at "\\n" alone: texts may hold U+2028 and the other separators of `str.splitlines`. A last line without its end
was cut off by a crash and counts as never written.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from dynamo_lm.errors import InputError


class JsonlLog:
    """An append-only file of JSON objects; a record is on disk when `append` returns.

    Attributes:
        records: what the file held when it was opened.
        damaged: how many of its complete lines are not JSON objects.
    """

    def __init__(self, file: Path):
        """Reads `file`, which need not exist yet.

        Raises:
            InputError: it cannot be read, or holds no JSON lines.
        """
        self.file = Path(file)
        try:
            content = self.file.read_bytes() if self.file.exists() else b""
        except OSError as error:
            raise InputError(f'"{file}" cannot be read ({error.strerror}); name another file.') from error
        *lines, torn = content.split(b"\n")
        parsed = [_object(line) for line in lines if line.strip()]
        self.records = [record for record in parsed if record is not None]
        self.damaged = len(parsed) - len(self.records)
        self._whole = len(content) - len(torn) if torn else None  # bytes to keep when the torn line is cut off
        if content and not self.records and not (content.startswith(b"{") and not lines):
            raise InputError(f'"{file}" holds no JSON lines; move it away or name another file.')

    def append(self, record: dict[str, Any]) -> None:
        """Writes one line.

        Raises:
            InputError: the file cannot be written.
        """
        line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode(errors="surrogatepass") + b"\n"
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            if self._whole is not None:
                os.truncate(self.file, self._whole)
                self._whole = None
            with self.file.open("ab", buffering=0) as stream:
                stream.write(line)
        except OSError as error:
            raise InputError(f'"{self.file}" cannot be written: {error.strerror}.') from error


class JsonlCache:
    """A mapping from keys to JSON values that grows in memory and, if it has a file, on disk at the same time.

    A line of the file is {"key": hash of the question, "value": its answer, ...}; questions are not stored.
    """

    def __init__(self, file: Path | None = None):
        """Opens `file`, which need not exist yet; without one, values are kept for this process only.

        Raises:
            InputError: it holds something else, or cannot be read.
        """
        self._log = None if file is None else JsonlLog(file)
        records = [] if self._log is None else self._log.records
        self._values = {record["key"]: record["value"] for record in records if "key" in record and "value" in record}
        if records and not self._values:
            raise InputError(f'"{file}" holds no cached answers; move it away or name another file.')

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __len__(self) -> int:
        return len(self._values)

    def put(self, key: str, value: Any, **details: Any) -> None:
        """Keeps `value`; `details` go to the file only, for people who read it.

        Raises:
            InputError: the file cannot be written.
        """
        self._values[key] = value
        if self._log is not None:
            self._log.append({"key": key, "value": value, **details})


def key_of(*parts: Any) -> str:
    """A hash of JSON values: 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=True).encode()).hexdigest()[:32]


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
