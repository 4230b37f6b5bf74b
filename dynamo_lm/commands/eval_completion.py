"""`dynamo-lm eval completion`: how much faster at the same quality."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynamo_lm.commands.options import Device, Dtype, Json, Model, Threads, Tokenizer, grid
from dynamo_lm.errors import InputError

if TYPE_CHECKING:
    from dynamo_lm.evaluation.comparison import Completions
    from dynamo_lm.evaluation.judges import Judge

TEXTS, JUDGE = "What is written", "Who judges"


def completion(
    context: typer.Context,
    model: Model,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for the texts and results; the same command goes on where it stopped."),
    ] = None,
    bench: Annotated[
        str | None,
        typer.Option(
            help="vicuna, mt-bench, or a file with one prompt a line (or JSON lines). Default: the paper's ten prompts.",
            rich_help_panel=TEXTS,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of the question sets. Default: $DYNAMO_DATA/bench.", rich_help_panel=TEXTS),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Completions of each prompt.", rich_help_panel=TEXTS)] = 10,
    eps_b: Annotated[
        str,
        typer.Option("--eps-b", help="Settings of the dial, as 0,0.5,1 or FROM:TO:STEP.", rich_help_panel=TEXTS),
    ] = "0:1:0.1",
    ablation: Annotated[
        bool,
        typer.Option("--ablation", help="The paper's Table 9, too: without blur, Otsu, mask.", rich_help_panel=TEXTS),
    ] = False,
    ablation_eps_b: Annotated[
        str | None,
        typer.Option("--ablation-eps-b", help="Settings of the dial for these. Default: --eps-b.", rich_help_panel=TEXTS),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict/--no-strict", help="Strict decoding, sampled, too.", rich_help_panel=TEXTS)
    ] = True,
    heads: Annotated[
        int | None, typer.Option(help="The most tokens a step may give. Default: all heads.", rich_help_panel=TEXTS)
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", help="Length of a completion in tokens.", rich_help_panel=TEXTS)
    ] = 100,
    reference: Annotated[
        str | None,
        typer.Option(
            help="A language model as the judge, without a network: folder or hub id of one that is better than MODEL and "
            "that was trained by others. It compares log-likelihoods per byte.",
            rich_help_panel=JUDGE,
        ),
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(
            help="URL of an OpenAI-compatible endpoint as the judge; needs --judge-model.",
            rich_help_panel=JUDGE,
        ),
    ] = None,
    judge_model: Annotated[
        str | None, typer.Option("--judge-model", help="Name of the model behind --endpoint.", rich_help_panel=JUDGE)
    ] = None,
    requests_per_minute: Annotated[
        float | None,
        typer.Option("--requests-per-minute", help="At most so many questions to --endpoint.", rich_help_panel=JUDGE),
    ] = None,
    price_in: Annotated[
        float | None, typer.Option("--price-in", help="Its price per million tokens read.", rich_help_panel=JUDGE)
    ] = None,
    price_out: Annotated[
        float | None, typer.Option("--price-out", help="Its price per million tokens written.", rich_help_panel=JUDGE)
    ] = None,
    key_from: Annotated[
        str | None,
        typer.Option(
            "--key-from", help='Environment variable with its key; "" for an endpoint without.', rich_help_panel=JUDGE
        ),
    ] = "OPENAI_API_KEY",
    yes: Annotated[
        bool, typer.Option("--yes", help="Do not ask before questions to --endpoint cost money.", rich_help_panel=JUDGE)
    ] = False,
    mauve: Annotated[
        bool, typer.Option("--mauve", help="MAUVE with the features of --reference, too.", rich_help_panel=JUDGE)
    ] = False,
    seed: Annotated[int, typer.Option(help="Of all random numbers.", rich_help_panel=TEXTS)] = 0,
    tokenizer: Tokenizer = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """How much faster the model writes at the quality of one token per step.

    Every prompt is continued at every setting of the dial and by the base model; a judge compares. The win rate against
    the speed-up gives the same-quality speed-up, also against the base model at the same diversity.

    `dynamo-lm eval completion story --reference gpt2-large --out results/story`
    """
    import sacrebleu  # noqa: F401  # needed behind the long part: better missed now

    from dynamo_lm.commands.opening import open_for_evaluation, print_json
    from dynamo_lm.commands.progress import counting
    from dynamo_lm.evaluation import prompts as benches
    from dynamo_lm.evaluation import record as records
    from dynamo_lm.evaluation.comparison import Completions, compare
    from dynamo_lm.evaluation.completion import BASELINE, METHODS, PAPER, arms, write_texts

    # 1. What was asked for.
    if out is None:
        raise InputError("Say where the texts and results go with --out FOLDER.")
    if seeds < 1:
        raise InputError(f"--seeds is {seeds}; give 1 or more.")
    if reference is not None and endpoint is not None:
        raise InputError("Give one judge: --reference or --endpoint.")
    if mauve and reference is None:
        raise InputError("--mauve needs the features of a --reference model.")
    dial = grid(eps_b, "--eps-b")
    other_dial = grid(ablation_eps_b, "--ablation-eps-b") if ablation_eps_b is not None else dial
    name, prompts = benches.read(bench, data)

    # 2. The model, and the judge before the long work, so that a wrong name is told at once.
    network, tokens = open_for_evaluation(model, tokenizer=tokenizer, dtype=dtype, device=device, threads=threads)
    table = network.cooccurrence
    widest = network.num_heads if table is None else min(network.num_heads, table.order)
    ceiling = heads or widest
    if not 1 < ceiling <= widest:
        raise InputError(f"--heads is {ceiling}; this model and its tables have 2 to {widest}.")
    kind = "completion" if name == "paper" else f"completion-{name}"
    settings = {"bench": name, "seeds": seeds, "max_new_tokens": max_new_tokens, "heads": ceiling, "eps_b": dial}
    command = context.find_root().obj or []
    found = records.begin(kind, command, network, model, seed=seed, settings=settings)
    records.check_folder(out, found["model"])
    judge = _judge(out, reference, endpoint, judge_model, requests_per_minute, price_in, price_out, key_from, device)

    # 3. The texts.
    chosen = arms(ceiling, [PAPER], dial, strict=strict)
    if ablation:
        others = arms(ceiling, [method for method in METHODS if method != PAPER], other_dial, strict=False)
        chosen += [arm for arm in others if arm.role == "candidate"]
    with counting() as say:
        texts = write_texts(
            network,
            tokens,
            prompts,
            chosen,
            out / f"{kind}.texts.jsonl",
            identity=found["model"]["identity"],
            seeds=seeds,
            seed=seed,
            max_new_tokens=max_new_tokens,
            progress=lambda done, total: say("writing", done, total),
        )
    completions = Completions.gather(texts, chosen, prompts, seeds)

    # 4. The verdicts.
    if endpoint is not None:
        _agree(judge, completions, yes)
    with counting() as say:
        compared = compare(completions, judge, ceiling=ceiling, seed=seed, with_mauve=mauve, say=say)
    found |= {
        "prompts": prompts,
        "seeds": seeds,
        "max_new_tokens": max_new_tokens,
        "ceiling": ceiling,
        "baseline": BASELINE,
        **compared,
    }
    file = records.save(out, found)
    if json:
        print_json(found)
        return
    _show(found)
    print(f"{file}; make a page of it: dynamo-lm report {out}")


def _judge(
    out: Path,
    reference: str | None,
    endpoint: str | None,
    judge_model: str | None,
    requests_per_minute: float | None,
    price_in: float | None,
    price_out: float | None,
    key_from: str | None,
    device: str,
) -> Judge | None:
    if reference is not None:
        from dynamo_lm.evaluation.judges import ReferenceJudge

        return ReferenceJudge(reference, device=device, cache=out / "judge.reference.jsonl")
    if endpoint is None:
        return None
    if judge_model is None:
        raise InputError("--endpoint needs the name of a model: --judge-model.")
    from dynamo_lm.evaluation.endpoint import EndpointJudge

    return EndpointJudge(
        judge_model,
        base_url=endpoint,
        key_from=key_from or None,
        requests_per_minute=requests_per_minute,
        price_in=price_in,
        price_out=price_out,
        cache=out / "judge.endpoint.jsonl",
    )


def _agree(judge: Any, completions: Completions, yes: bool) -> None:
    """Says what the questions will cost at most and, where someone can answer, asks."""
    import sys

    from dynamo_lm.evaluation.comparison import duels

    every = len(completions.prompts) * completions.seeds
    pairs = (len(duels(completions, every_rung=False)) + 2) * every  # the sanity check asks two more
    singles = (len(completions.role("candidate")) + 1) * every
    lengths = [len(text.text) for rows in completions.texts.values() for row in rows for text in row]
    estimate = judge.estimate(pairs, singles, sum(lengths) / len(lengths))
    said = f"{estimate['requests']:,} questions at most, about {estimate['tokens_in'] + estimate['tokens_out']:,} tokens"
    if estimate["cost"] is not None:
        said += f", {estimate['cost']:.2f} at the prices given"
    if estimate["minutes"] is not None:
        said += f", {estimate['minutes']:.0f} minutes at the rate given"
    typer.echo(f"{said}; verdicts of an earlier run are not asked for again.", err=True)
    if not yes and sys.stdin.isatty() and not typer.confirm("Ask them?", err=True):
        raise typer.Abort


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    judge = found["judge"]
    if judge is None:
        console.print("No judge was named (--reference or --endpoint): speeds and diversity only.")
    else:
        checked = judge["sanity"]
        console.print(f"judge {judge['name']}. {judge['caveat']}")
        for name, asked in (("shuffled", "the base over its own words shuffled"), ("same", "one base sample over another")):
            share = checked[name]["share"]
            answer = "no verdict" if share is None else f"{share:.0%} {_range(checked[name]['interval'], '.0%')}"
            console.print(f"  prefers {asked}: {answer}")
        if not checked["useful"]:
            console.print(f"  [bold]This judge is useless here: {checked['reason']}[/] Its verdicts are not shown.")
    for method, results in found["methods"].items():
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1), title=method, title_justify="left")
        for heading in ("eps_b", f"tokens\nof {found['ceiling']}", "speed-up", "win rate", "win rate,\nmatched"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("base's\ntemp.", justify="right")
        for point in results["points"]:
            table.add_row(*_cells(point))
        console.print(table)
    for method, results in found["methods"].items():
        for against in ("matched", "plain") if results["same_quality"] else ():
            same = results["same_quality"][against]
            said = [
                f"{_quality(same[kind])} {unit}"
                for kind, unit in (("tokens_per_step", "tokens per step"), ("wall_clock", "in wall clock"))
                if same[kind]["estimate"] is not None
            ]
            if said:
                note = f" ({same['note']})" if same["note"] else ""
                console.print(
                    f"{method}, same-quality speed-up, {against}: {', '.join(said)} of at most {found['ceiling']}{note}"
                )
    console.print(
        f"tokens: per step. Baseline: {found['baseline']}. Win rate: wins over losses, ties shared; matched: against the "
        "base at the temperature at which it is as diverse.",
        style="dim",
    )


def _cells(point: dict[str, Any]) -> list[str]:
    """One setting of the dial."""
    speed, plain, matched = point["speed_up"], point["plain"], point["matched"]
    return [
        "" if point["eps_b"] is None else f"{point['eps_b']:g}",
        f"{point['tokens_per_step']:.2f}",
        f"{speed['median']:.2f} {_range([speed['low'], speed['high']] if speed['low'] is not None else None, '.2f')}",
        f"{plain['win_rate']:.2f} {_range(plain['interval'], '.2f')}" if plain else "",
        f"{matched['win_rate']:.2f} {_range(matched['interval'], '.2f')}" if matched else "",
        f"{matched['temperature']:.2f}" if matched else "",
    ]


def _quality(same: dict[str, Any]) -> str:
    theoretical = " (theoretical: beyond the fastest point measured)" if same["theoretical"] else ""
    return f"{same['estimate']:.2f}x {_range(same['interval'], '.2f')}{theoretical}"


def _range(pair: list[float] | None, form: str) -> str:
    return f"({pair[0]:{form}}-{pair[1]:{form}})" if pair else ""
