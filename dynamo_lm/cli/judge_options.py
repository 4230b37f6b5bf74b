"""Naming a judge on the command line: options and opening, for every verb that asks one."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynamo_lm.errors import InputError

if TYPE_CHECKING:
    from dynamo_lm.evaluation.judges.judges import Judge

JUDGE = "Who judges"

Reference = Annotated[
    str | None,
    typer.Option(
        help="A language model as the judge, without a network: folder or hub id of one that is better than MODEL and "
        "that was trained by others. It compares log-likelihoods per byte.",
        rich_help_panel=JUDGE,
    ),
]
Endpoint = Annotated[
    str | None,
    typer.Option(help="URL of an OpenAI-compatible endpoint as the judge; needs --judge-model.", rich_help_panel=JUDGE),
]
JudgeModel = Annotated[
    str | None, typer.Option("--judge-model", help="Name of the model behind --endpoint.", rich_help_panel=JUDGE)
]
RequestsPerMinute = Annotated[
    float | None,
    typer.Option("--requests-per-minute", help="At most so many questions to --endpoint.", rich_help_panel=JUDGE),
]
PriceIn = Annotated[
    float | None, typer.Option("--price-in", help="Its price per million tokens read.", rich_help_panel=JUDGE)
]
PriceOut = Annotated[
    float | None, typer.Option("--price-out", help="Its price per million tokens written.", rich_help_panel=JUDGE)
]
KeyFrom = Annotated[
    str | None,
    typer.Option("--key-from", help='Environment variable with its key; "" for an endpoint without.', rich_help_panel=JUDGE),
]
Yes = Annotated[
    bool, typer.Option("--yes", help="Do not ask before questions to --endpoint cost money.", rich_help_panel=JUDGE)
]


def open_judge(
    out: Path,
    *,
    reference: str | None,
    endpoint: str | None,
    judge_model: str | None,
    requests_per_minute: float | None,
    price_in: float | None,
    price_out: float | None,
    key_from: str | None,
    device: str,
) -> Judge | None:
    """The judge that was named, or None; what it says is kept in `out`.

    Raises:
        InputError: it cannot be opened.
    """
    if reference is not None and endpoint is not None:
        raise InputError("Give one judge: --reference or --endpoint.")
    if reference is not None:
        from dynamo_lm.evaluation.judges.judges import ReferenceJudge

        return ReferenceJudge(reference, device=device, cache=out / "judge.reference.jsonl")
    if endpoint is None:
        return None
    if judge_model is None:
        raise InputError("--endpoint needs the name of a model: --judge-model.")
    from dynamo_lm.evaluation.judges.endpoint import EndpointJudge

    return EndpointJudge(
        judge_model,
        base_url=endpoint,
        key_from=key_from or None,
        requests_per_minute=requests_per_minute,
        price_in=price_in,
        price_out=price_out,
        cache=out / "judge.endpoint.jsonl",
    )


def agree(estimate: dict[str, Any], yes: bool) -> None:
    """Says what the questions of `EndpointJudge.estimate` will cost at most and, where someone can answer, asks."""
    said = f"{estimate['requests']:,} questions at most, about {estimate['tokens_in'] + estimate['tokens_out']:,} tokens"
    if estimate["cost"] is not None:
        said += f", {estimate['cost']:.2f} at the prices given"
    if estimate["minutes"] is not None:
        said += f", {estimate['minutes']:.0f} minutes at the rate given"
    typer.echo(f"{said}; verdicts of an earlier run are not asked for again.", err=True)
    if not yes and sys.stdin.isatty() and not typer.confirm("Ask them?", err=True):
        raise typer.Abort


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """Who judges."""

    reference: Reference = None
    endpoint: Endpoint = None
    judge_model: JudgeModel = None
    requests_per_minute: RequestsPerMinute = None
    price_in: PriceIn = None
    price_out: PriceOut = None
    key_from: KeyFrom = "OPENAI_API_KEY"
    yes: Yes = False

    @property
    def chosen(self) -> bool:
        """Whether a judge was named."""
        return self.reference is not None or self.endpoint is not None

    def open(self, out: Path, device: str) -> Judge | None:
        """The judge that was named, or None; its verdicts are kept in `out`.

        Raises:
            InputError: it cannot be opened.
        """
        options = asdict(self)
        del options["yes"]
        return open_judge(out, device=device, **options)
