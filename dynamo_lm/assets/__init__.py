"""Files that come with the package: the story model."""

from __future__ import annotations

from pathlib import Path

from dynamo_lm.errors import InputError


def bundled(name: str = "story") -> Path:
    """The folder of a bundled model.

    Raises:
        InputError: this installation does not have it.
    """
    folder = Path(__file__).parent / name
    if not (folder / "config.json").is_file():
        raise InputError(f'The bundled model "{name}" is not part of this installation; name a model folder instead.')
    return folder
