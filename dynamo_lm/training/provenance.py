"""Where a trained model comes from: `training.json`, a plain record beside its weights.

Knows no tensors. Paths are recorded as the user gave them.
"""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dynamo_lm.errors import InputError
from dynamo_lm.files import write_text

FILE = "training.json"
PACKAGES = ("dynamo-lm", "torch", "transformers", "safetensors", "numpy")
IDENTITY = {  # in what a resumed run must agree with the one it resumes; the trainer itself compares its options
    "base": ("fingerprint",),
    "model": (
        "num_heads",
        "head",
        "draft_vocab_size",
        "layers_per_head",
        "feed",
        "init",
        "own_output_embedding",
        "adapter_rank",
        "residual_block",
        "coupling_rank",
    ),
    "data": ("look_ahead", "fingerprint", "tokenizer", "training_tokens", "validation_tokens", "block_size"),
}
BEFORE = {  # values for records that are older than these keys
    "residual_block": False,
    "coupling_rank": 0,
    "head": "parallel",
    "draft_vocab_size": 0,
    "look_ahead": None,
}


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that decide a run's numbers."""
    result = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            result[package] = version(package)
        except PackageNotFoundError:  # run from a checkout
            result[package] = "unknown"
    return result


def begin(command: Sequence[str], **facts: Any) -> dict[str, Any]:
    """A record of a run that starts now; `command` are the arguments of `dynamo-lm`."""
    return {"command": shlex.join(["dynamo-lm", *command]), "versions": versions(), **facts, "started": now()}


def now() -> str:
    """UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def check_same_run(folder: Path, record: dict[str, Any]) -> str | None:
    """When the run in `folder` began, or None if there is none.

    Raises:
        InputError: it is a run on other data or of another model than `record`.
    """
    before = read(folder)
    if before is None:
        return None
    for part, keys in IDENTITY.items():
        for key in keys:
            old, new = before.get(part, {}).get(key, BEFORE.get(key)), record[part][key]
            if old != new:
                raise InputError(
                    f'"{folder}" holds a run with other {part} ({key} {old}, not {new}); '
                    "use the same options to resume it, or another --out for a new run."
                )
    return before.get("started")


def read(folder: Path) -> dict[str, Any] | None:
    """The record in `folder`, or None if there is none that can be read."""
    try:
        record = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def write(folder: Path, record: dict[str, Any]) -> None:
    """Writes the record into `folder`, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / FILE, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
