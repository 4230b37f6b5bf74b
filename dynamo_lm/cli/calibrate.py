"""`dynamo-lm calibrate`: choose the default eps_b of a model folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from dynamo_lm.cli.dataclass_options import dataclass_options
from dynamo_lm.cli.eval_options import ResultOptions, TextOptions, WindowOptions, table_of
from dynamo_lm.cli.options import MACHINE, Model, ModelOptions, grid
from dynamo_lm.errors import InputError

if TYPE_CHECKING:
    from dynamo_lm.evaluation.calibration import Point
    from dynamo_lm.model.modeling import DynaMoForCausalLM

VALUES = {"ppl": "PPL_d / PPL_1", "regret": "more regret than one token at a time, nats", "win-rate": "win rate"}
WEAK = 1.05  # tokens per step: with fewer, the heads do not pay for themselves


@dataclass(frozen=True, kw_only=True)
class ChoiceOptions:
    """What counts as good enough."""

    PANEL: ClassVar[str] = "What counts as good enough"

    criterion: Annotated[
        str,
        "ppl: the perplexity of --data in the steps that generation takes, over the base model's. regret: that of sampled "
        "text over one-token sampling's. win-rate: of a finished `eval completion`.",
    ] = "ppl"
    limit: Annotated[
        float | None,
        "The most that passes: a ratio for ppl (default 1.1); nats per token for regret, by its 95 % interval (default 0).",
    ] = None
    eps_b: Annotated[
        str | None,
        "Values of eps_b to try, as 0,0.5,1 or FROM:TO:STEP. Default: 0:1:0.05 for ppl, 0:1:0.1 for regret.",
    ] = None

    def __post_init__(self) -> None:
        if self.criterion not in VALUES:
            raise InputError(f'--criterion is "{self.criterion}"; give one of {", ".join(VALUES)}.')

    def values(self) -> tuple[float, ...]:
        return tuple(grid(self.eps_b or ("0:1:0.05" if self.criterion == "ppl" else "0:1:0.1"), "--eps-b"))


@dataclass(frozen=True, kw_only=True)
class PerplexityOptions(WindowOptions):
    """With --criterion ppl."""

    masked: Annotated[
        bool,
        typer.Option(
            "--masked/--product",
            help="Score several tokens by the heads with the tables (where the model has any), or by the plain product of "
            "heads, as the paper does.",
        ),
    ] = True


@dataclass(frozen=True, kw_only=True)
class RegretOptions:
    """With --criterion regret."""

    PANEL: ClassVar[str] = "With --criterion regret"

    prompts: Annotated[Path | None, "File with one prompt a line to sample from."] = None
    samples: Annotated[int, typer.Option(min=1, help="Texts for each prompt and eps_b.")] = 4
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Tokens of a text.")] = 64


@dataclass(frozen=True, kw_only=True)
class WinRateOptions:
    """With --criterion win-rate."""

    PANEL: ClassVar[str] = "With --criterion win-rate"

    results: Annotated[Path | None, "Folder that `eval completion` wrote for this model."] = None
    bench: Annotated[
        str | None, "Which benchmark of it: vicuna, mt-bench, or the prompts' file. Default: the paper's ten prompts."
    ] = None
    margin: Annotated[
        float | None, "A value passes if the 95 % interval of its win rate begins at 1 less this or above. Default: 0.2."
    ] = None
    matched: Annotated[
        bool,
        typer.Option("--matched/--plain", help="Win rate against the base at the same diversity, or at its own settings."),
    ] = True


Curve = tuple[list["Point"], dict[str, Any], dict[str, Any]]  # points, settings, and details of the criterion


@dataclass_options
def calibrate(
    context: typer.Context,
    model: Model,
    choice: ChoiceOptions,
    text: TextOptions,
    perplexity: PerplexityOptions,
    regret: RegretOptions,
    win_rate: WinRateOptions,
    machine: ModelOptions,
    output: ResultOptions,
    write: Annotated[
        bool,
        typer.Option(
            "--write/--dry-run", help="Write the choice into the model's folder, or only print it.", rich_help_panel=MACHINE
        ),
    ] = True,
) -> None:
    """Find the fastest setting of a model that is good enough, and make it the default of `generate --verify off`.

    The choice is written as `eps_b` into the folder's generation_config.json; nothing else changes.

    `dynamo-lm calibrate runs/mine/model --data stories.jsonl --max-tokens 20000`
    """
    from dynamo_lm.cli.progress import console
    from dynamo_lm.evaluation import calibration
    from dynamo_lm.model.loading import resolve

    # 1. Validate before the model is opened.
    limit, values, folder = _limit(choice, win_rate.margin), choice.values(), Path(resolve(model))
    option, value = {
        "ppl": ("--data", text.data),
        "regret": ("--prompts", regret.prompts),
        "win-rate": ("--results", win_rate.results),
    }[choice.criterion]
    if not value:
        raise InputError(f"--criterion {choice.criterion} needs {option}; see `dynamo-lm calibrate --help`.")
    if write:
        calibration.check_writable(model, folder)
    network, tokenizer = machine.open(model)
    record = output.begin(context, "calibration", network, model, seed=text.seed, settings={})

    # 2. Measure.
    if choice.criterion == "ppl":
        points, settings, details = _by_perplexity(network, tokenizer, text, perplexity, values, limit)
    elif choice.criterion == "regret":
        points, settings, details = _by_regret(network, tokenizer, regret, values, limit, text.seed)
    else:
        points, settings, details = _by_win_rate(win_rate, limit, record["model"]["identity"])
    record["settings"] = settings
    record |= calibration.outcome(choice.criterion, limit, points, **details)

    # 3. Save, write the default, print.
    output.save(record)
    if not output.json:
        _show(points, record, network.num_heads)
    _warn_of_weak_heads(record["chosen"], network.num_heads)
    if write:
        file = calibration.write_default(folder, record["chosen"]["eps_b"], network)
        console().print(f"{file}: eps_b is {record['chosen']['eps_b']:g} now.", soft_wrap=True, markup=False)
    if output.json:
        output.print(record, lambda record: None)


def _limit(choice: ChoiceOptions, margin: float | None) -> float:
    """The criterion's limit, or its default."""
    from dynamo_lm.evaluation.calibration import CRITERIA

    criterion = choice.criterion
    name, given, other, foreign = "--limit", choice.limit, "--margin", margin
    if criterion == "win-rate":
        name, given, other, foreign = other, foreign, name, given
    if foreign is not None:
        raise InputError(f"{other} does not belong to --criterion {criterion}; use {name}.")
    value = CRITERIA[criterion] if given is None else given
    if not value >= (0 if criterion == "win-rate" else float("-inf")) or (criterion == "ppl" and not value > 0):
        raise InputError(f"{name} is {value:g}; give a {'ratio above 0' if criterion == 'ppl' else 'number from 0 up'}.")
    return value


def _by_perplexity(
    network: DynaMoForCausalLM,
    tokenizer: Any,
    text: TextOptions,
    options: PerplexityOptions,
    values: tuple[float, ...],
    limit: float,
) -> Curve:
    from dynamo_lm.cli.progress import console
    from dynamo_lm.evaluation.calibration import by_perplexity
    from dynamo_lm.evaluation.perplexity.scoring import Options

    scoring = Options.of(network, window=options.window, stride=options.stride, batch_size=options.batch_size, eps_b=values)
    measured = options.score(network, tokenizer, text, scoring)
    masked = options.masked and scoring.masked
    points = by_perplexity(measured, limit, masked=masked)
    if masked and any(point.value < 1 for point in points):
        console().print(
            "Several tokens at once score better than one at a time on this text: the tables were probably counted on it. "
            "Give text they have not seen, as with --validation-fraction.",
            soft_wrap=True,
        )
    record = measured.record()
    settings = {"eps_b": list(values)} | scoring.settings() | {key: record[key] for key in ("text", "window", "stride")}
    return points, settings, {"joint": "masked" if masked else "product", "base": measured.heads[0].perplexity}


def _by_regret(
    network: DynaMoForCausalLM, tokenizer: Any, options: RegretOptions, values: tuple[float, ...], limit: float, seed: int
) -> Curve:
    from dynamo_lm.backbone.token_limits import end_tokens
    from dynamo_lm.cli.progress import counting
    from dynamo_lm.evaluation.calibration import by_regret
    from dynamo_lm.evaluation.completion.prompts import read

    prompts = [tokenizer(text, verbose=False)["input_ids"] for text in read(str(options.prompts))[1]]
    if not all(prompts):
        raise InputError(f"{options.prompts} has a prompt without any tokens; give a few words a line.")
    lengths = {"samples": options.samples, "max_new_tokens": options.max_new_tokens}
    total = len(prompts) * options.samples * (1 + sum(value != 1 for value in values))
    with counting() as report:
        points = by_regret(
            network,
            prompts,
            values,
            limit,
            seed=seed,
            progress=lambda done: report("sampling texts", done, total),
            eos_token_id=end_tokens(network.generation_config, tokenizer) or None,
            **lengths,
        )
    return points, {"eps_b": list(values), "prompts": len(prompts), **lengths}, {}


def _by_win_rate(options: WinRateOptions, margin: float, identity: str) -> Curve:
    from dynamo_lm.evaluation import results_file
    from dynamo_lm.evaluation.calibration import by_win_rate

    folder, bench = options.results, options.bench
    assert folder is not None
    kind = "completion" if bench is None else f"completion-{Path(bench).stem}"
    record = results_file.load(folder, kind)
    if record is None:
        raise InputError(f'"{folder}" has no {kind}.json; make one with `dynamo-lm eval completion --out {folder}`.')
    if record["model"]["identity"] != identity:
        raise InputError(f'"{folder}" holds results of another model ({record["model"]["name"]}); give this model\'s.')
    details = {"rate": "matched" if options.matched else "plain", "judge": (record.get("judge") or {}).get("name")}
    return by_win_rate(record, margin, matched=options.matched), {"bench": bench or "paper"}, details


def _show(points: list[Point], record: dict[str, Any], num_heads: int) -> None:
    """Print the curve with the choice marked."""
    from rich.console import Console

    chosen, criterion = record["chosen"], record["criterion"]
    name, limit = criterion["name"], criterion["limit"]
    rules = {"ppl": f"at most {limit:g}", "regret": f"interval up to {limit:g}", "win-rate": f"interval from {1 - limit:g}"}
    rows = [
        (
            f"{point.eps_b:g}",
            f"{point.tokens_per_step:.2f}",
            f"{point.value:.3f}",
            "none" if point.low is None or point.high is None else f"{point.low:.3f} .. {point.high:.3f}",
            "yes" if point.passes else "no",
            "<- chosen" if chosen["passes"] and point.eps_b == chosen["eps_b"] else "",
        )
        for point in points
    ]
    screen = Console(highlight=False)
    title = f"{VALUES[name]} ({rules[name]} passes); at most {num_heads} tokens per step"
    screen.print(title, style="bold", soft_wrap=True)
    screen.print(table_of(("eps_b", "tokens/step", name, "95 % interval", "passes", ""), rows))
    if chosen["passes"]:
        message = f"Chosen: eps_b {chosen['eps_b']:g}, {chosen['tokens_per_step']:.2f} tokens per step."
    else:
        message = "No eps_b passes; chosen: eps_b 1, one token per step, which is the base model's own sampling."
    screen.print(message, soft_wrap=True)


def _warn_of_weak_heads(chosen: dict[str, Any], num_heads: int) -> None:
    """Print on stderr that no eps_b gives more than one token per step at the quality asked for."""
    from dynamo_lm.cli.progress import console

    if chosen["tokens_per_step"] < WEAK:
        console().print(
            f"The heads are too weak for this limit: the fastest eps_b that passes gives {chosen['tokens_per_step']:.2f} of "
            f"{num_heads} tokens per step. Train them longer, or allow more with --limit or --margin.",
            soft_wrap=True,
        )
