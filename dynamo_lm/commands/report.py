"""To be written."""

from __future__ import annotations

from dynamo_lm.commands.options import Model
from dynamo_lm.errors import InputError


def report(model: Model) -> None:
    """To be written."""
    raise InputError("not there yet")
