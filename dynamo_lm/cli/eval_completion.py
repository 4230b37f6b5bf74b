"""`dynamo-lm eval completion`: how much faster at the same quality."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynamo_lm.cli.judge_options import (
    JUDGE,
    Endpoint,
    JudgeModel,
    KeyFrom,
    PriceIn,
    PriceOut,
    Reference,
    RequestsPerMinute,
    Yes,
    agree,
    open_judge,
)
from dynamo_lm.cli.options import Device, Dtype, Json, Model, Threads, Tokenizer, grid
from dynamo_lm.errors import InputError

if TYPE_CHECKING:
    from dynamo_lm.evaluation.completion.compare import Completions
    from dynamo_lm.model.modeling import DynaMoForCausalLM

TEXTS = "What is written"


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
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="Ask the prompts through the model's chat template, as one user message each.",
            rich_help_panel=TEXTS,
        ),
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(
            help="A model whose base is compared with, one token per step, in place of MODEL's own: for one that was tuned "
            "on the same data without heads. Any causal language model with the same tokenizer.",
            rich_help_panel=TEXTS,
        ),
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
    reference: Reference = None,
    endpoint: Endpoint = None,
    judge_model: JudgeModel = None,
    requests_per_minute: RequestsPerMinute = None,
    price_in: PriceIn = None,
    price_out: PriceOut = None,
    key_from: KeyFrom = "OPENAI_API_KEY",
    yes: Yes = False,
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

    from dynamo_lm.cli.progress import counting
    from dynamo_lm.data.chat_template import chat_template
    from dynamo_lm.evaluation import results_file as records
    from dynamo_lm.evaluation.completion import prompts as benches
    from dynamo_lm.evaluation.completion.compare import Completions, compare
    from dynamo_lm.evaluation.completion.generate import BASELINE, METHODS, PAPER, arms, write_texts
    from dynamo_lm.model.loading import open_for_evaluation, print_json

    # 1. What was asked for.
    if out is None:
        raise InputError("Say where the texts and results go with --out FOLDER.")
    if seeds < 1:
        raise InputError(f"--seeds is {seeds}; give 1 or more.")
    if reference is not None and endpoint is not None:  # before the model is opened
        raise InputError("Give one judge: --reference or --endpoint.")
    if mauve and reference is None:
        raise InputError("--mauve needs the features of a --reference model.")
    dial = grid(eps_b, "--eps-b")
    other_dial = grid(ablation_eps_b, "--ablation-eps-b") if ablation_eps_b is not None else dial
    name, prompts = benches.read(bench, data)

    # 2. The model, and the judge before the long work, so that a wrong name is told at once.
    network, tokens = open_for_evaluation(model, tokenizer=tokenizer, dtype=dtype, device=device, threads=threads)
    opponent = None if base is None else _opponent(base, tokens, dtype=dtype, device=device)
    if chat:
        chat_template(tokens)
    table = network.cooccurrence
    widest = network.num_heads if table is None else min(network.num_heads, table.order)
    ceiling = heads or widest
    if not 1 < ceiling <= widest:
        raise InputError(f"--heads is {ceiling}; this model and its tables have 2 to {widest}.")
    kind = "completion" if name == "paper" else f"completion-{name}"
    settings: dict[str, Any] = {"bench": name, "seeds": seeds, "max_new_tokens": max_new_tokens}
    settings |= {"heads": ceiling, "eps_b": dial}
    if opponent is not None:
        settings["base"] = records.describe(opponent, str(base))
    if chat:
        settings["chat_template"] = tokens.chat_template
    command = context.find_root().obj or []
    found = records.begin(kind, command, network, model, seed=seed, settings=settings)
    records.check_folder(out, found["model"])
    judge = open_judge(
        out,
        reference=reference,
        endpoint=endpoint,
        judge_model=judge_model,
        requests_per_minute=requests_per_minute,
        price_in=price_in,
        price_out=price_out,
        key_from=key_from,
        device=device,
    )

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
            base=opponent,
            chat=chat,
            identity=found["model"]["identity"],
            seeds=seeds,
            seed=seed,
            max_new_tokens=max_new_tokens,
            progress=lambda done, total: say("writing", done, total),
        )
    questions = [f"{prompt}\n\n" if chat else prompt for prompt in prompts]  # a completion goes on where its prompt ends
    completions = Completions.gather(texts, chosen, questions, seeds)

    # 4. The verdicts.
    if endpoint is not None:
        agree(_estimate(judge, completions), yes)
    with counting() as say:
        compared = compare(completions, judge, ceiling=ceiling, seed=seed, with_mauve=mauve, say=say)
    found |= {
        "prompts": prompts,
        "seeds": seeds,
        "max_new_tokens": max_new_tokens,
        "ceiling": ceiling,
        "baseline": BASELINE if base is None else f"{base}, {BASELINE}",
        **compared,
    }
    file = records.save(out, found)
    if json:
        print_json(found)
        return
    _show(found)
    print(f"{file}; make a page of it: dynamo-lm report {out}")


def _opponent(base: str, tokenizer: Any, *, dtype: str, device: str) -> DynaMoForCausalLM:
    """The base to compare with, as a model of one head.

    Raises:
        InputError: there is none, or its tokenizer is another one.
    """
    from dynamo_lm import DynaMoForCausalLM
    from dynamo_lm.data.token_store import tokenizer_fingerprint
    from dynamo_lm.model.configuration import DynaMoConfig
    from dynamo_lm.model.loading import choose_device, open_config, open_model, open_tokenizer, resolve

    name = resolve(base)
    config = open_config(name)
    if tokenizer_fingerprint(open_tokenizer(name)) != tokenizer_fingerprint(tokenizer):
        raise InputError(f'--base "{base}" has another tokenizer than the model; compare models with the same one.')
    if isinstance(config, DynaMoConfig):
        return open_model(name, dtype=dtype, device=device)
    return DynaMoForCausalLM.from_base(name, num_heads=1, dtype=dtype).to(choose_device(device)).eval()  # type: ignore[arg-type]


def _estimate(judge: Any, completions: Completions) -> dict[str, Any]:
    """What the questions will cost at most."""
    from dynamo_lm.evaluation.completion.compare import duels

    every = len(completions.prompts) * completions.seeds
    pairs = (len(duels(completions, every_rung=False)) + 2) * every  # the sanity check asks two more
    singles = (len(completions.role("candidate")) + 1) * every
    lengths = [len(text.text) for rows in completions.texts.values() for row in rows for text in row]
    return judge.estimate(pairs, singles, sum(lengths) / len(lengths))


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
