"""The options that name a judge, for every command that asks one."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from dynamo_lm.errors import InputError

if TYPE_CHECKING:
    from dynamo_lm.evaluation.judges.judges import Judge


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """The judge, if any."""

    PANEL: ClassVar[str] = "Who judges"

    reference: Annotated[
        str | None,
        "A language model as the judge, without a network: folder or hub id of one that is better than MODEL and that was "
        "trained by others. It compares log-likelihoods per byte.",
    ] = None
    endpoint: Annotated[str | None, "URL of an OpenAI-compatible endpoint as the judge; needs --judge-model."] = None
    judge_model: Annotated[str | None, "Name of the model at --endpoint."] = None
    requests_per_minute: Annotated[float | None, "Limit on the requests to --endpoint."] = None
    price_in: Annotated[float | None, "Price of --endpoint per million tokens read."] = None
    price_out: Annotated[float | None, "Price of --endpoint per million tokens written."] = None
    key_from: Annotated[str | None, 'Environment variable with the key of --endpoint; "" for an endpoint without a key.'] = (
        "OPENAI_API_KEY"
    )
    yes: Annotated[bool, "Send requests that cost money without asking first."] = False

    def __post_init__(self) -> None:
        if self.reference is not None and self.endpoint is not None:
            raise InputError("Give one judge: --reference or --endpoint.")

    @property
    def chosen(self) -> bool:
        """Whether a judge is named."""
        return self.reference is not None or self.endpoint is not None

    def open(self, out: Path, device: str) -> Judge | None:
        """The judge, or None if none is named; its answers are cached in `out`.

        Raises:
            InputError: it cannot be opened.
        """
        if self.reference is not None:
            from dynamo_lm.evaluation.judges.judges import ReferenceJudge

            return ReferenceJudge(self.reference, device=device, cache=out / "judge.reference.jsonl")
        if self.endpoint is None:
            return None
        if self.judge_model is None:
            raise InputError("--endpoint needs the name of a model: --judge-model.")
        from dynamo_lm.evaluation.judges.endpoint import EndpointJudge

        return EndpointJudge(
            self.judge_model,
            base_url=self.endpoint,
            key_from=self.key_from or None,
            requests_per_minute=self.requests_per_minute,
            price_in=self.price_in,
            price_out=self.price_out,
            cache=out / "judge.endpoint.jsonl",
        )


def agree(estimate: dict[str, Any], yes: bool) -> None:
    """Print what the requests of `EndpointJudge.estimate` cost at most and, on a terminal, ask whether to send them."""
    message = f"{estimate['requests']:,} questions at most, about {estimate['tokens_in'] + estimate['tokens_out']:,} tokens"
    if estimate["cost"] is not None:
        message += f", {estimate['cost']:.2f} at the prices given"
    if estimate["minutes"] is not None:
        message += f", {estimate['minutes']:.0f} minutes at the rate given"
    typer.echo(f"{message}; verdicts of an earlier run are reused.", err=True)
    if not yes and sys.stdin.isatty() and not typer.confirm("Ask them?", err=True):
        raise typer.Abort
