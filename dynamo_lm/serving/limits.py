"""What one server carries. Imports nothing slow, so that the command line can declare its options by it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from dynamo_lm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one server carries; a request beyond it is refused with the number in the message.

    Raises:
        InputError: a value out of range.
    """

    PANEL: ClassVar[str] = "Limits"

    max_batch: Annotated[int, "Texts decoded together."] = 16
    max_queue: Annotated[int, "Texts that may wait; more get status 429."] = 64
    max_prompt_tokens: Annotated[int | None, "Longest prompt. Default: the model's context."] = None
    max_tokens: Annotated[int | None, "Longest text. Default: what the context leaves."] = None
    max_seconds: Annotated[float, "Longest time of a request, waiting included."] = 120.0
    max_body: Annotated[int, "Largest request in bytes."] = 2**20

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_queue", "max_prompt_tokens", "max_tokens", "max_body"):
            value, least = getattr(self, name), int(name != "max_queue")
            if value is not None and value < least:
                raise InputError(f"--{name.replace('_', '-')} is {value}; give {least} or more.")
        if not 0 < self.max_seconds < float("inf"):
            raise InputError(f"--max-seconds is {self.max_seconds:g}; give a number above 0.")
