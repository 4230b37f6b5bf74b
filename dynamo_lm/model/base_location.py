"""The base of a heads-only folder: where it is, recorded when the folder is saved, and found again when it is opened."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from dynamo_lm.backbone.base_model import fingerprint, load_base
from dynamo_lm.errors import InputError
from dynamo_lm.model.configuration import DynaMoConfig

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
HUB_CACHE = re.compile(r"models--([^/\\]+)[/\\]snapshots[/\\]")
logger = logging.getLogger(__name__)


def describe_base(config: DynaMoConfig, folder: Path) -> dict[str, str | None]:
    """What the configuration of a heads-only model in `folder` records of its base: `base_hub_id` and `base_path`."""
    name, hub_id = config.base_name_or_path, config.base_hub_id
    if not name:
        return {}
    path = next(filter(_is_base, (folder / name, Path(name), Path(config.base_path or name))), None)
    if path is None:
        return {"base_hub_id": hub_id or _hub_id(name), "base_path": config.base_path}
    cached = HUB_CACHE.search(str(path.absolute()))
    return {"base_hub_id": cached[1].replace("--", "/", 1) if cached else hub_id, "base_path": os.path.realpath(path)}


def base_sources(name: str, config: DynaMoConfig) -> list[str]:
    """Where the base of the heads in `name` may be: folders that exist, then its hub id."""
    recorded, folder = config.base_name_or_path, Path(name)
    if not recorded:
        return []
    path = Path(config.base_path or recorded)
    places = (folder / recorded, path, folder.parent / path.name, folder / path.name, Path(recorded))
    sources = dict.fromkeys(os.path.realpath(place) for place in places if _is_base(place))
    hub_id = config.base_hub_id or (_hub_id(recorded) if config.base_path is None else None)
    return [*sources, *([hub_id] if hub_id else [])]


def open_base(
    name: str, config: DynaMoConfig, base: str | PreTrainedModel | None, *, allow_mismatch: bool, **kwargs: Any
) -> PreTrainedModel:
    """The base of the heads in `name`: `base`, opened if it is a name, else the first of the recorded places that fits.

    Args:
        allow_mismatch: take a base of the same shape with other weights, such as another quantisation, with a warning.
            One that transformers quantised while it opened it is taken so in any case.
        **kwargs: handed to `load_base`.

    Raises:
        InputError: there is none, or it is not the base that the heads were trained for.
    """
    others: list[tuple[str, PreTrainedModel]] = []
    for source in base_sources(name, config) if base is None else [base]:
        if not isinstance(source, str):
            loaded, source = source, type(source).__name__
        else:
            try:
                loaded = load_base(source, **kwargs)
            except InputError as error:
                raise InputError(f'The base of the heads in "{name}": {error}; name another with --base.') from error
        if config.base_fingerprint in (known := fingerprint(loaded), fingerprint(loaded, cast=torch.float16)):
            config.base_fingerprint = known  # the heads may have been added to a base that was cast to float16
            if Path(source).is_dir():
                config.base_path = os.path.realpath(source)
            return loaded
        others.append((source, loaded))
    if not others:
        raise InputError(
            f'The base of the heads in "{name}" could not be opened: "{config.base_name}" (fingerprint '
            f'{config.base_fingerprint}) is not at "{config.base_path or config.base_name_or_path}" and not beside the '
            "heads; name its folder or hub id with --base."
        )
    source, loaded = others[0]
    trained = f'The heads in "{name}" were trained for the base {config.base_fingerprint} ("{config.base_name}")'
    given = f'"{source}" is {fingerprint(loaded)}'
    if _shape(config.get_text_config()) != _shape(loaded.config.get_text_config()):
        raise InputError(f"{trained}, but {given}, a model of another shape; open them with that base.")
    if not allow_mismatch and getattr(loaded.config, "quantization_config", None) is None:
        hint = "or, if this is another quantisation of it, with --allow-base-mismatch"
        raise InputError(f"{trained}, but {given}; open them with that base, {hint}.")
    logger.warning("%s and are used with another: %s. Texts are this base's own, but may take more steps.", trained, given)
    return loaded


def _hub_id(name: str) -> str | None:
    return name if HUB_ID.fullmatch(name) else None


def _shape(config: Any) -> list[Any]:
    return [getattr(config, key, None) for key in ("model_type", "num_hidden_layers", "hidden_size", "vocab_size")]


def _is_base(folder: Path) -> bool:
    try:
        return json.loads((folder / "config.json").read_bytes())["model_type"] != DynaMoConfig.model_type
    except (OSError, ValueError, KeyError, TypeError):
        return False
