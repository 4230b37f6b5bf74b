"""`dynamo-lm calibrate`: chooses the default quality dial of a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynamo_lm.cli.eval_perplexity import (
    SCORING,
    BatchSize,
    Data,
    MaxDocuments,
    MaxTokens,
    Stride,
    TextField,
    ValidationFraction,
    Window,
    check_length,
    read,
    score,
    settings_of,
)
from dynamo_lm.cli.options import MACHINE, Device, Dtype, Json, Model, Out, Threads, Tokenizer, grid
from dynamo_lm.errors import InputError

if TYPE_CHECKING:
    from dynamo_lm.evaluation.calibration import Point
    from dynamo_lm.model.modeling import DynaMoForCausalLM

CHOICE, REGRET, WIN_RATE = "What counts as good enough", "With --criterion regret", "With --criterion win-rate"
VALUES = {"ppl": "PPL_d / PPL_1", "regret": "more regret than one token at a time, nats", "win-rate": "win rate"}


def calibrate(
    context: typer.Context,
    model: Model,
    criterion: Annotated[
        str,
        typer.Option(
            help="ppl: the perplexity of --data in the steps that generation takes, over the base model's. "
            "regret: that of sampled text over one-token sampling's. win-rate: of a finished `eval completion`.",
            rich_help_panel=CHOICE,
        ),
    ] = "ppl",
    limit: Annotated[
        float | None,
        typer.Option(
            help="The most that passes: a ratio for ppl (default 1.1); nats per token for regret, by its 95 % "
            "interval (default 0).",
            rich_help_panel=CHOICE,
        ),
    ] = None,
    eps_b: Annotated[
        str | None,
        typer.Option(
            "--eps-b",
            help="Dials to try, as 0,0.5,1 or FROM:TO:STEP. Default: 0:1:0.05 for ppl, 0:1:0.1 for regret.",
            rich_help_panel=CHOICE,
        ),
    ] = None,
    data: Data = None,
    text_field: TextField = None,
    validation_fraction: ValidationFraction = 0.0,
    max_documents: MaxDocuments = None,
    max_tokens: MaxTokens = None,
    window: Window = None,
    stride: Stride = None,
    batch_size: BatchSize = 8,
    masked: Annotated[
        bool,
        typer.Option(
            "--masked/--product",
            help="Score several tokens by the heads with the tables (where the model has any), or by the plain product of "
            "heads, as the paper does.",
            rich_help_panel=SCORING,
        ),
    ] = True,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="File with one prompt a line to sample from.", rich_help_panel=REGRET)
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Texts a prompt and dial.", rich_help_panel=REGRET)] = 4,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="Tokens a text.", rich_help_panel=REGRET)
    ] = 64,
    results: Annotated[
        Path | None,
        typer.Option("--results", help="Folder that `eval completion` wrote for this model.", rich_help_panel=WIN_RATE),
    ] = None,
    bench: Annotated[
        str | None,
        typer.Option(
            help="Which benchmark of it: vicuna, mt-bench, or the prompts' file. Default: the paper's ten prompts.",
            rich_help_panel=WIN_RATE,
        ),
    ] = None,
    margin: Annotated[
        float | None,
        typer.Option(
            help="A dial passes if the 95 % interval of its win rate begins at 1 less this or above. Default: 0.2.",
            rich_help_panel=WIN_RATE,
        ),
    ] = None,
    matched: Annotated[
        bool,
        typer.Option(
            "--matched/--plain",
            help="Win rate against the base at the same diversity, or at its own settings.",
            rich_help_panel=WIN_RATE,
        ),
    ] = True,
    write: Annotated[
        bool,
        typer.Option(
            "--write/--dry-run", help="Write the choice into the model's folder, or only print it.", rich_help_panel=MACHINE
        ),
    ] = True,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn at random.", rich_help_panel=CHOICE)] = 0,
    out: Out = None,
    tokenizer: Tokenizer = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Find the fastest setting of a model that is good enough, and make it the default of `generate --verify off`.

    The choice is written as `eps_b` into the folder's generation_config.json; nothing else changes.

    `dynamo-lm calibrate runs/mine/model --data stories.jsonl --max-tokens 20000`
    """
    from dynamo_lm.backbone.token_limits import end_tokens
    from dynamo_lm.cli.progress import console, counting
    from dynamo_lm.evaluation import calibration, results_file
    from dynamo_lm.evaluation.perplexity.scoring import Options
    from dynamo_lm.model.loading import open_for_evaluation, print_json, resolve

    # 1. What was asked for, checked before the long part.
    most = _limit(criterion, limit, margin)
    needed = {"ppl": ("--data", data), "regret": ("--prompts", prompts), "win-rate": ("--results", results)}[criterion]
    if not needed[1]:
        raise InputError(f"--criterion {criterion} needs {needed[0]}; see `dynamo-lm calibrate --help`.")
    dials = tuple(grid(eps_b or ("0:1:0.05" if criterion == "ppl" else "0:1:0.1"), "--eps-b"))
    folder = Path(resolve(model))
    if write:
        calibration.check_writable(model, folder)
    network, tokens = open_for_evaluation(model, tokenizer=tokenizer, dtype=dtype, device=device, threads=threads)
    about = results_file.describe(network, model)
    if out is not None:
        results_file.check_folder(out, about)
    settings: dict[str, Any] = {"eps_b": list(dials)}
    more: dict[str, Any] = {}

    # 2. The curve.
    if criterion == "ppl":
        options = Options.of(network, window=window, stride=stride, batch_size=batch_size, eps_b=dials)
        text = read(data, tokens, text_field, validation_fraction, seed, max_documents, max_tokens)
        check_length(text, options, asked=window is not None)
        measured = score(network, text, options)
        masked = masked and options.masked
        curve = calibration.by_perplexity(measured, most, masked=masked)
        if masked and any(point.value < 1 for point in curve):
            console().print(
                "Several tokens at once score better than one at a time here: the tables were probably counted on this "
                "text. Give text they have not seen, as with --validation-fraction.",
                soft_wrap=True,
            )
        more = {"joint": "masked" if masked else "product", "base": measured.heads[0].perplexity}
        settings |= settings_of(options) | {key: measured.record()[key] for key in ("text", "window", "stride")}
    elif criterion == "regret":
        encoded = _encoded(prompts, tokens)
        arguments = {"eos_token_id": end_tokens(network.generation_config, tokens) or None}
        texts = len(encoded) * samples
        total = texts * (1 + sum(dial != 1 for dial in dials))
        with counting() as progress:
            curve = calibration.by_regret(
                network,
                encoded,
                dials,
                most,
                max_new_tokens=max_new_tokens,
                samples=samples,
                seed=seed,
                progress=lambda done: progress("sampling texts", done, total),
                **arguments,
            )
        settings |= {"prompts": len(encoded), "samples": samples, "max_new_tokens": max_new_tokens}
    else:
        assert results is not None
        kind = "completion" if bench is None else f"completion-{Path(bench).stem}"
        before = results_file.load(results, kind)
        if before is None:
            raise InputError(f'"{results}" has no {kind}.json; make one with `dynamo-lm eval completion --out {results}`.')
        if before["model"]["identity"] != about["identity"]:
            raise InputError(f'"{results}" holds results of another model ({before["model"]["name"]}); give this model\'s.')
        curve = calibration.by_win_rate(before, most, matched=matched)
        more = {"rate": "matched" if matched else "plain", "judge": (before.get("judge") or {}).get("name")}
        settings = {"bench": bench or "paper"}
    result = results_file.begin("calibration", context.find_root().obj or [], network, model, seed=seed, settings=settings)
    result |= calibration.outcome(criterion, most, curve, **more)

    # 3. Said, kept, and made the default.
    if not json:
        _show(curve, result, network)
    chosen = result["chosen"]["eps_b"]
    if out is not None:
        results_file.save(out, result)
    if write:
        file = calibration.write_default(folder, chosen, network)
        console().print(f"{file}: eps_b is {chosen:g} now.", soft_wrap=True, markup=False)
    if json:
        print_json(result)


def _limit(criterion: str, limit: float | None, margin: float | None) -> float:
    """The criterion's limit, or its default."""
    from dynamo_lm.evaluation.calibration import CRITERIA

    if criterion not in CRITERIA:
        raise InputError(f'--criterion is "{criterion}"; give one of {", ".join(CRITERIA)}.')
    asked, other = (margin, limit) if criterion == "win-rate" else (limit, margin)
    names = ("--margin", "--limit") if criterion == "win-rate" else ("--limit", "--margin")
    if other is not None:
        raise InputError(f"{names[1]} does not belong to --criterion {criterion}; use {names[0]}.")
    value = CRITERIA[criterion] if asked is None else asked
    if not value >= (0 if criterion == "win-rate" else float("-inf")) or (criterion == "ppl" and not value > 0):
        raise InputError(f"{names[0]} is {value:g}; give a {'ratio above 0' if criterion == 'ppl' else 'number from 0 up'}.")
    return value


def _encoded(prompts: Path | None, tokenizer: Any) -> list[list[int]]:
    from dynamo_lm.evaluation.completion.prompts import read as read_prompts

    encoded = [tokenizer(text, verbose=False)["input_ids"] for text in read_prompts(str(prompts))[1]]
    if not all(encoded):
        raise InputError(f"{prompts} has a prompt without any tokens; give a few words a line.")
    return encoded


def _show(curve: list[Point], result: dict[str, Any], network: DynaMoForCausalLM) -> None:
    """The curve, the choice marked, on stdout."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    chosen, criterion = result["chosen"], result["criterion"]
    name, limit = criterion["name"], criterion["limit"]
    rules = {"ppl": f"at most {limit:g}", "regret": f"interval up to {limit:g}", "win-rate": f"interval from {1 - limit:g}"}
    title = f"{VALUES[name]} ({rules[name]} passes); at most {network.num_heads} tokens per step"
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("eps_b", "tokens/step", name, "95 % interval", "passes", ""):
        table.add_column(column, justify="right", no_wrap=True)
    for point in curve:
        within = "none" if point.low is None or point.high is None else f"{point.low:.3f} .. {point.high:.3f}"
        mark = "<- chosen" if chosen["passes"] and point.eps_b == chosen["eps_b"] else ""
        passes = "yes" if point.passes else "no"
        table.add_row(f"{point.eps_b:g}", f"{point.tokens_per_step:.2f}", f"{point.value:.3f}", within, passes, mark)
    screen = Console(highlight=False)
    screen.print(title, style="bold", soft_wrap=True)
    screen.print(table)
    if chosen["passes"]:
        said = f"Chosen: eps_b {chosen['eps_b']:g}, {chosen['tokens_per_step']:.2f} tokens per step."
    else:
        said = "No dial passes; chosen: eps_b 1, one token per step, which is the base model's own sampling."
    screen.print(said, soft_wrap=True)
