"""Task files for lm-evaluation-harness that read benchmarks from a folder instead of the hub, and the function that reads.

`NAME.yaml` is the task `local_NAME`. The folder holds what the `bench` folder of this project's data holds: `nlu/*.jsonl`
(multiple choice as query, choices, gold), `blimp/*.jsonl`, `gsm8k_test.jsonl` and `HumanEval.jsonl.gz`. Each task file says
in its first line where it asks other than the harness's own task. Knows no models.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

from dynamo_lm.errors import InputError
from dynamo_lm.evaluation.completion.prompts import data_folder, parse

FOLDER = Path(__file__).parent


def bench_folder(data: str | Path | None = None) -> Path:
    """The folder of the benchmarks: `data`, else `bench` in the folder that the environment variable DYNAMO_DATA names, or
    in ../shared/data.

    Raises:
        InputError: there is no such folder.
    """
    folder = Path(data) if data is not None else data_folder()
    if not folder.is_dir():
        raise InputError(f'There is no folder "{folder}" with the benchmarks; name the one with nlu/ and blimp/ by --data.')
    return folder


def read(*, file: str, data: str | Path | None = None, **_: Any) -> dict[str, Any]:
    """{"test": datasets.Dataset} of one file of JSON lines, gzipped or not, in memory; called by the harness.

    Raises:
        InputError: no such file, or a line that is not a JSON object.
    """
    from datasets import Dataset

    path = bench_folder(data) / file
    opener: Any = gzip.open if path.suffix == ".gz" else open
    documents: list[dict[str, Any]] = []
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    documents.append(parse(line, f'Line {number} of "{path}"'))
    except (OSError, UnicodeDecodeError, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f'"{path}" cannot be read ({reason}); name the folder of the benchmarks by --data.') from error
    if not documents:
        raise InputError(f'"{path}" is empty; name the folder of the benchmarks by --data.')
    return {"test": Dataset.from_list(documents)}
