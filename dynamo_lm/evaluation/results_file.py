"""A results file: what was measured, of which model, by which command, with which seed.

A folder holds the results of one model, `KIND.json` for each kind; a folder with results of another model is refused, so
that a report never mixes two.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dynamo_lm.errors import InputError
from dynamo_lm.files import write_text
from dynamo_lm.model.checkpoint import identity
from dynamo_lm.model.modeling import DynaMoForCausalLM
from dynamo_lm.training import provenance


def begin(
    kind: str, command: Sequence[str], model: DynaMoForCausalLM, name: str, *, seed: int, settings: dict[str, Any]
) -> dict[str, Any]:
    """The first keys of a results file; whoever measures adds others before `save`.

    Args:
        command: the arguments of `dynamo-lm`.
        name: the model as the user named it.
    """
    return provenance.begin(command, kind=kind, model=describe(model, name), seed=seed, settings=settings)


def model_name(name: str) -> str:
    """The last part of a hub id or folder; of a folder that training called "model", its run's."""
    path = Path(name).resolve() if Path(name).is_dir() else Path(name)
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def describe(model: DynaMoForCausalLM, name: str) -> dict[str, Any]:
    """What a reader must know of the model that was measured."""
    return {
        "name": model_name(name),
        "path": name,
        "identity": identity(model),
        "architecture": model.base.config.model_type,
        "num_heads": model.num_heads,
        "base_parameters": sum(p.numel() for p in model.base.parameters()),
        "overhead": round(model.overhead(), 5),
        "table_order": model.cooccurrence.order if model.cooccurrence is not None else 0,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "threads": torch.get_num_threads(),
    }


def save(folder: Path, record: dict[str, Any]) -> Path:
    """Writes `record` as `folder/KIND.json`, whole or not at all, with the time it was finished."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{record['kind']}.json"
    content = json.dumps(record | {"finished": provenance.now()}, indent=1, ensure_ascii=False, allow_nan=False)
    write_text(target, content + "\n")
    return target


def load(folder: Path, kind: str) -> dict[str, Any] | None:
    """The record of this kind, or None if the folder has none.

    Raises:
        InputError: the file is not a results file.
    """
    file = folder / f"{kind}.json"
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f'"{file}" is not valid JSON ({error}); delete it and measure again.') from error
    if not isinstance(record, dict) or record.get("kind") != kind or "identity" not in record.get("model", {}):
        raise InputError(f'"{file}" is not a results file of dynamo-lm; give a folder that `dynamo-lm eval` wrote.')
    return record


def load_all(folder: Path) -> dict[str, dict[str, Any]]:
    """Every record in `folder`, by kind, all of the same model.

    Raises:
        InputError: no folder, no results, or results of different models.
    """
    if not folder.is_dir():
        raise InputError(f'"{folder}" is not a folder; give one that `dynamo-lm eval` wrote results into.')
    kinds = [file.stem for file in sorted(folder.glob("*.json"))]
    records = {kind: record for kind in kinds if (record := load(folder, kind)) is not None}
    if not records:
        raise InputError(f'"{folder}" has no results; make some with `dynamo-lm eval ... --out {folder}`.')
    models = {record["model"]["identity"]: kind for kind, record in records.items()}
    if len(models) > 1:
        examples = " and ".join(f"{kind}.json" for kind in list(models.values())[:2])
        raise InputError(f'"{folder}" mixes results of different models ({examples}); keep one folder per model.')
    return records


def check_folder(folder: Path, model: dict[str, Any]) -> None:
    """Refuses to write results of `model` (from `describe`) beside those of another one.

    Raises:
        InputError: the folder has results of another model.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f'"{folder}" is a file; name a folder with --out.')
    for file in sorted(folder.glob("*.json")):
        record = load(folder, file.stem)
        if record is not None and record["model"]["identity"] != model["identity"]:
            raise InputError(
                f'"{folder}" holds results of another model ({record["model"]["name"]}, '
                f"{record['model']['identity']}, not {model['identity']}); use another --out."
            )
