"""`dynamo-lm eval perplexity`: how well each head, and the heads together, predict a text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar

import typer

from dynamo_lm.cli.dataclass_options import dataclass_options
from dynamo_lm.cli.eval_options import ResultOptions, TextOptions, WindowOptions, table_of
from dynamo_lm.cli.options import Model, ModelOptions, grid


@dataclass(frozen=True, kw_only=True)
class ScoringOptions(WindowOptions):
    """How it is scored."""

    heads: Annotated[int | None, "Score only the first heads, this many. Default: all."] = None
    mask: Annotated[
        bool,
        typer.Option(
            "--mask/--no-mask",
            help="Use the model's co-occurrence tables: to choose steps, and in the masked joint. Default: if it has any.",
        ),
    ] = True


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """How the dynamic steps are chosen; None is the model's own setting."""

    PANEL: ClassVar[str] = "How the dynamic steps are chosen"

    eps_b: Annotated[
        str, 'Values of eps_b for the dynamic perplexity, as 0,0.5,1 or FROM:TO:STEP; "none" leaves it out.'
    ] = "0:1:0.1"
    alpha_c: Annotated[float | None, "Weight of the tables. Default: the model's own, else 1."] = None
    otsu: Annotated[
        bool | None, typer.Option("--otsu/--no-otsu", help="Drop unlikely combinations by Otsu's threshold.")
    ] = None
    blur: Annotated[bool | None, typer.Option("--blur/--no-blur", help="Blur the combinations before that threshold.")] = (
        None
    )
    top_k: Annotated[int | None, "Candidates per head. Default: the model's own, else 50."] = None
    temperature: Annotated[
        float | None, "Temperature of the candidates' probabilities. Default: the model's own, else 0.7."
    ] = None
    repetition_penalty: Annotated[float | None, "Penalty on repeated tokens. Default: the model's own, else 1.1."] = None


@dataclass_options
def perplexity(
    context: typer.Context,
    model: Model,
    text: TextOptions,
    scoring: ScoringOptions,
    steps: StepOptions,
    machine: ModelOptions,
    output: ResultOptions,
) -> None:
    """How well the heads predict a text: each alone (PPL_i), together (PPL_1:m), and in the steps that generation takes.

    A perplexity is comparable between models with the same tokenizer on the same text; lower is better. The first token of
    a document has no context and is not scored, the end-of-text token after it is.

    `dynamo-lm eval perplexity story --data stories.jsonl --max-tokens 20000`
    """
    from dynamo_lm.decoding.settings import algorithm_of
    from dynamo_lm.evaluation.perplexity.scoring import Options

    # 1. Validate everything that needs no text.
    eps_b = () if steps.eps_b == "none" else tuple(grid(steps.eps_b, "--eps-b"))
    network, tokenizer = machine.open(model)
    options = Options.of(
        network,
        num_heads=scoring.heads,
        window=scoring.window,
        stride=scoring.stride,
        batch_size=scoring.batch_size,
        masked=scoring.mask,
        eps_b=eps_b,
        algorithm=algorithm_of(network, asdict(steps) | {"eps_b": None}, network.generation_config),
    )
    settings = options.settings() | {
        name: getattr(text, name) for name in ("validation_fraction", "max_documents", "max_tokens")
    }
    record = output.begin(context, "perplexity", network, model, seed=text.seed, settings=settings)

    # 2. Score, save, print.
    record |= scoring.score(network, tokenizer, text, options).record()
    file = output.save(record)
    output.print(record, show)
    if file is not None and not output.json:
        print(f"{file} written.")


def show(result: dict[str, Any]) -> None:
    """Print the record as tables."""
    from rich.console import Console

    console, text, base = Console(highlight=False), result["text"], result["base"]
    masked = result["joint"][0]["masked_ppl"] is not None
    per_byte = f"{base['bits_per_byte']:.3f} bits per byte" if base["bits_per_byte"] else "no bytes"
    console.print(
        f"{', '.join(text['sources'])}: {text['documents']:,} documents, {text['tokens']:,} tokens, "
        f"{result['heads'][0]['tokens']:,} scored; window {result['window']}, stride {result['stride']}; "
        f"base model {base['ppl']:.2f} ({per_byte})",
        soft_wrap=True,
    )
    rows = [
        (
            f"1:{head['head']}" if head["head"] > 1 else "1",
            _number(head["ppl"], head["se"]),
            _number(joint["ppl"], joint["se"]),
            *([_number(joint["masked_ppl"], joint["masked_se"])] if masked else []),
        )
        for head, joint in zip(result["heads"], result["joint"], strict=True)
    ]
    columns = ["heads", "last head alone", "joint: product", *(["joint: masked"] if masked else [])]
    console.print(table_of(columns, rows, "Perplexity per token, ± standard error by document"))
    if result["dynamic"]:
        console.print(_dynamic(result["dynamic"], result["ceiling"], masked))
    if text["seen"] is not None:
        console.print(
            f"The tables hold {text['seen']:.0%} of this text's longest sequences. Of text they were counted on they hold "
            "nearly all they kept, and masked perplexities say nothing.",
            soft_wrap=True,
        )
    if text["documents"] < 2:
        console.print("One document gives no standard errors.", soft_wrap=True)


def _dynamic(points: list[dict[str, Any]], ceiling: int, masked: bool) -> Any:
    """The table of PPL_d; every eps_b has one entry of the product of heads and, if `masked`, one of the masked joint."""
    by_eps_b: dict[float, list[dict[str, Any]]] = {}
    for point in points:
        by_eps_b.setdefault(point["eps_b"], []).append(point)
    rows = [
        (
            f"{eps_b:g}",
            f"{joints[0]['tokens_per_step']:.2f}",
            *(_number(joint["ppl"], joint["se"]) for joint in joints),
            " ".join(f"{share:.0%}" for share in joints[0]["shares"]),
        )
        for eps_b, joints in by_eps_b.items()
    ]
    sizes = " ".join(map(str, range(1, ceiling + 1)))
    columns = ["eps_b", "tokens/step", "PPL_d: product", *(["PPL_d: masked"] if masked else []), f"steps of {sizes}"]
    return table_of(columns, rows, f"Dynamic perplexity, at most {ceiling} tokens per step")


def _number(value: float, error: float | None) -> str:
    return f"{value:.2f}" if error is None else f"{value:.2f} ± {error:.2f}"
