"""Options that several commands share; `dataclass_options` says how a command takes them."""

from __future__ import annotations

import atexit
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from dynamo_lm.errors import InputError

if TYPE_CHECKING:
    import torch

    from dynamo_lm.model.modeling import DynaMoForCausalLM

MACHINE = "Input, output and machine"

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help='DynaMo model: a folder, a hub id, or "story" for the bundled one.')
]
Tokenizer = Annotated[str | None, "Tokenizer folder or hub id, if the model does not bring its own."]
Json = Annotated[bool, typer.Option("--json", help="Print the results as JSON.", rich_help_panel=MACHINE)]


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """What to compute with."""

    PANEL: ClassVar[str] = MACHINE

    device: Annotated[str, "cpu, cuda, cuda:1, .. or auto (a GPU if there is one)."] = "auto"
    threads: Annotated[int | None, "CPU threads; default: torch's own."] = None

    def torch_device(self) -> torch.device:
        """The device, once torch computes with as many CPU threads as were given.

        Raises:
            InputError: there is no such device, or fewer than one thread.
        """
        from dynamo_lm.model.loading import choose_device, set_threads

        set_threads(self.threads)
        return choose_device(self.device)


@dataclass(frozen=True, kw_only=True)
class OpeningOptions(ComputeOptions):
    """How to open a DynaMo model, whose base is the recorded one. A subclass may add `trust_remote_code`."""

    dtype: Annotated[str, "Precision to compute in: float32, bfloat16, float16, or auto (as saved)."] = "auto"
    tokenizer: Tokenizer = None

    def open(self, model: str, *, random_heads: int | None = None) -> tuple[DynaMoForCausalLM, Any]:
        """The model and its tokenizer; random_heads: see `open_for_evaluation`.

        Raises:
            InputError: it cannot be opened, or has no heads.
        """
        from dynamo_lm.model.loading import open_for_evaluation

        return open_for_evaluation(model, random_heads=random_heads, **asdict(self))


@dataclass(frozen=True, kw_only=True)
class ModelOptions(OpeningOptions):
    """How to open a DynaMo model on a base of the user's choice."""

    base: Annotated[str | None, "Base of a MODEL that holds heads alone: a folder or hub id; default: as recorded."] = None
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="int8|int4", help="Round the weights of base and heads to so many bits, for a CPU. Default: as saved."
        ),
    ] = None
    allow_base_mismatch: Annotated[
        bool, "Take a base with other weights than the heads were trained for, such as another quantisation."
    ] = False


@dataclass(frozen=True, kw_only=True)
class DecodingModelOptions(ModelOptions):
    """How to open a DynaMo model that answers."""

    adapt_threads: Annotated[
        bool, "On a CPU: use as many of the threads as decode fastest now, which steps show; not with --compile."
    ] = False


@contextmanager
def only_the_first_rank_prints() -> Iterator[None]:
    """Other ranks print nothing while the block runs."""
    from dynamo_lm.training import ranks

    if ranks.rank() == 0:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def scratch_folder() -> Path:
    """A folder that goes away with the process."""
    folder = tempfile.TemporaryDirectory(prefix="dynamo-tokens-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def verification(text: str) -> str | float:
    """The value of --verify: "strict", "off" or a budget in nats per token.

    Raises:
        InputError: anything else.
    """
    from dynamo_lm.decoding.options import check_verify

    verify: str | float = text
    with suppress(ValueError):
        verify = float(text)
    check_verify(verify)
    return verify


def grid(text: str, option: str) -> list[float]:
    """Numbers as "0,0.5,1" or, from, to and by, as "0:1:0.1".

    Raises:
        InputError: anything else.
    """
    try:
        if ":" in text:
            start, end, step = (float(part) for part in text.split(":"))
            if step <= 0 or end < start:
                raise ValueError
            values = [round(start + index * step, 10) for index in range(int((end - start) / step + 1e-9) + 1)]
        else:
            values = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f'{option} is "{text}"; give numbers as 0,0.5,1 or as FROM:TO:STEP.') from None
    if any(not 0 <= value <= 1 for value in values):
        raise InputError(f'{option} is "{text}"; every number must lie from 0 to 1.')
    return sorted(set(values))
