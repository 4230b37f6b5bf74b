"""`dynamo-lm eval completion`: how much faster at the same quality."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from dynamo_lm.cli.dataclass_options import dataclass_options
from dynamo_lm.cli.eval_options import ResultOptions, open_model_or_base, table_of
from dynamo_lm.cli.judge_options import JudgeOptions, agree
from dynamo_lm.cli.options import Model, OpeningOptions, grid, only_the_first_rank_prints
from dynamo_lm.errors import InputError

if TYPE_CHECKING:
    from dynamo_lm.evaluation.completion.compare import Completions
    from dynamo_lm.evaluation.completion.generate import Arm
    from dynamo_lm.model.modeling import DynaMoForCausalLM


RANK_TIMEOUT = 10.0  # minutes in which all ranks must have met


@dataclass(frozen=True, kw_only=True)
class WritingOptions:
    """What is written."""

    PANEL: ClassVar[str] = "What is written"

    bench: Annotated[
        str | None,
        "vicuna, mt-bench, or a file with one prompt a line (or JSON lines). Default: the paper's ten prompts.",
    ] = None
    data: Annotated[Path | None, "Folder of the question sets. Default: $DYNAMO_DATA/bench."] = None
    seeds: Annotated[int, "Completions of each prompt."] = 10
    eps_b: Annotated[str, "Values of eps_b, as 0,0.5,1 or FROM:TO:STEP."] = "0:1:0.1"
    ablation: Annotated[bool, "Also the paper's Table 9: without blur, Otsu, mask."] = False
    ablation_eps_b: Annotated[str | None, "Values of eps_b for --ablation. Default: --eps-b."] = None
    chat: Annotated[bool, "Send each prompt through the model's chat template, as one user message."] = False
    base: Annotated[
        str | None,
        "A model whose base is compared with, one token per step, in place of MODEL's own: for one that was tuned on the "
        "same data without heads. Any causal language model with the same tokenizer.",
    ] = None
    strict: Annotated[bool, typer.Option("--strict/--no-strict", help="Also strict decoding, sampled.")] = True
    heads: Annotated[int | None, "The most tokens a step may give. Default: all heads."] = None
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Length of a completion in tokens.")] = 100
    seed: Annotated[int, "Seed of all random numbers."] = 0

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise InputError(f"--seeds is {self.seeds}; give 1 or more.")

    def arms(self, num_heads: int) -> list[Arm]:
        """All ways of decoding that are compared."""
        from dynamo_lm.evaluation.completion.generate import METHODS, PAPER, arms

        values = grid(self.eps_b, "--eps-b")
        chosen = arms(num_heads, [PAPER], values, strict=self.strict)
        if self.ablation:
            values = grid(self.ablation_eps_b, "--ablation-eps-b") if self.ablation_eps_b is not None else values
            others = arms(num_heads, [method for method in METHODS if method != PAPER], values, strict=False)
            chosen += [arm for arm in others if arm.role == "candidate"]
        return chosen


@dataclass(frozen=True, kw_only=True)
class CompletionJudge(JudgeOptions):
    """Who judges."""

    mauve: Annotated[bool, "Also MAUVE, with the features of --reference."] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mauve and self.reference is None:
            raise InputError("--mauve needs the features of a --reference model.")


@dataclass_options
def completion(
    context: typer.Context,
    model: Model,
    writing: WritingOptions,
    judging: CompletionJudge,
    machine: OpeningOptions,
    output: ResultOptions,
) -> None:
    """How much faster the model writes at the quality of one token per step.

    Every prompt is continued at every eps_b and by the base model; a judge compares. The win rate against the speed-up gives
    the same-quality speed-up, also against the base model at the same diversity.

    With --out a stopped run continues where it stopped. Under torchrun the ranks share the texts.

    `dynamo-lm eval completion story --reference gpt2-large --out results/story`
    """
    import sacrebleu  # noqa: F401  # used at the very end: a missing package is reported now

    from dynamo_lm.training import ranks

    # 1. Validate arguments.
    if output.out is None:
        raise InputError("Say where the texts and results go with --out FOLDER.")
    writing.arms(1)
    device = ranks.own_device(machine.torch_device())
    with ranks.process_group(device, RANK_TIMEOUT), only_the_first_rank_prints():
        _write_and_compare(context, model, writing, judging, replace(machine, device=str(device)), output, output.out)


def _write_and_compare(
    context: typer.Context,
    model: str,
    writing: WritingOptions,
    judging: CompletionJudge,
    machine: OpeningOptions,
    output: ResultOptions,
    folder: Path,
) -> None:
    """What the command does on each rank."""
    from dynamo_lm.cli.progress import counting
    from dynamo_lm.data.chat_template import chat_template
    from dynamo_lm.evaluation import results_file
    from dynamo_lm.evaluation.completion import prompts as benches
    from dynamo_lm.evaluation.completion.compare import Completions, compare
    from dynamo_lm.evaluation.completion.generate import BASELINE, write_texts
    from dynamo_lm.training import ranks

    name, prompts = benches.read(writing.bench, writing.data)

    # 2. Open the model, and the judge before the long work, so that a wrong name is reported at once.
    network, tokenizer = machine.open(model)
    opponent = None if writing.base is None else _opponent(writing.base, tokenizer, machine)
    table = network.cooccurrence
    widest = network.num_heads if table is None else min(network.num_heads, table.order)
    ceiling = writing.heads or widest
    if not 1 < ceiling <= widest:
        raise InputError(f"--heads is {ceiling}; this model and its tables have 2 to {widest}.")
    kind = "completion" if name == "paper" else f"completion-{name}"
    lengths = {"seeds": writing.seeds, "max_new_tokens": writing.max_new_tokens}
    settings = {"bench": name, **lengths, "heads": ceiling, "eps_b": grid(writing.eps_b, "--eps-b")}
    if opponent is not None:
        settings["base"] = results_file.describe(opponent, str(writing.base))
    if writing.chat:
        chat_template(tokenizer)
        settings["chat_template"] = tokenizer.chat_template
    record = output.begin(context, kind, network, model, seed=writing.seed, settings=settings)
    first = ranks.rank() == 0
    judge = judging.open(folder, machine.device) if first else None

    # 3. Write the texts: each rank its share. The first one then collects them.
    arms = writing.arms(ceiling)
    with counting() as report:
        write = partial(
            write_texts,
            network,
            tokenizer,
            prompts,
            arms,
            folder / f"{kind}.texts.jsonl",
            base=opponent,
            chat=writing.chat,
            identity=record["model"]["identity"],
            seed=writing.seed,
            progress=lambda done, total: report("writing", done, total),
            **lengths,
        )
        if ranks.size() > 1:
            write(part=ranks.rank(), parts=ranks.size())
            ranks.all_done("texts")
        if not first:
            return
        texts = write()
    questions = [f"{prompt}\n\n" if writing.chat else prompt for prompt in prompts]  # what completions are joined to
    completions = Completions.gather(texts, arms, questions, writing.seeds)

    # 4. Judge them.
    if judging.endpoint is not None:
        agree(_estimate(judge, completions), judging.yes)
    with counting() as report:
        compared = compare(completions, judge, ceiling=ceiling, seed=writing.seed, with_mauve=judging.mauve, progress=report)
    baseline = BASELINE if writing.base is None else f"{writing.base}, {BASELINE}"
    record |= {"prompts": prompts, **lengths, "ceiling": ceiling, "baseline": baseline, **compared}
    file = output.save(record)
    output.print(record, _show)
    if not output.json:
        print(f"{file}; make a page of it: dynamo-lm report {folder}")


def _opponent(base: str, tokenizer: Any, machine: OpeningOptions) -> DynaMoForCausalLM:
    """The base to compare with, as a model of one head.

    Raises:
        InputError: it cannot be opened, or its tokenizer is another one.
    """
    from dynamo_lm.data.token_store import tokenizer_fingerprint
    from dynamo_lm.model.loading import open_config, open_tokenizer, resolve

    name = resolve(base)
    open_config(name)
    if tokenizer_fingerprint(open_tokenizer(name)) != tokenizer_fingerprint(tokenizer):
        raise InputError(f'--base "{base}" has another tokenizer than the model; compare models with the same one.')
    return open_model_or_base(name, dtype=machine.dtype, device=machine.device)


def _estimate(judge: Any, completions: Completions) -> dict[str, Any]:
    """What the questions will cost at most."""
    from dynamo_lm.evaluation.completion.compare import duels

    per_arm = len(completions.prompts) * completions.seeds
    pairs = (len(duels(completions, every_rung=False)) + 2) * per_arm  # the sanity check asks two more
    singles = (len(completions.role("candidate")) + 1) * per_arm
    lengths = [len(text.text) for by_prompt in completions.texts.values() for row in by_prompt for text in row]
    return judge.estimate(pairs, singles, sum(lengths) / len(lengths))


def _show(record: dict[str, Any]) -> None:
    """Print the judge's sanity check, a table for each method, and the same-quality speed-ups."""
    from rich.console import Console

    console, ceiling = Console(highlight=False), record["ceiling"]
    _show_judge(console, record["judge"])
    columns = ("eps_b", f"tokens of {ceiling}", "speed-up", "win rate", "matched", "base's temp.")
    for method, results in record["methods"].items():
        console.print(table_of(columns, map(_cells, results["points"]), method))
    for method, results in record["methods"].items():
        for against in ("matched", "plain") if results["same_quality"] else ():
            same = results["same_quality"][against]
            values = [
                f"{_quality(same[kind])} {unit}"
                for kind, unit in (("tokens_per_step", "tokens per step"), ("wall_clock", "in wall clock"))
                if same[kind]["estimate"] is not None
            ]
            if values:
                note = f" ({same['note']})" if same["note"] else ""
                console.print(f"{method}, same-quality speed-up, {against}: {', '.join(values)} of at most {ceiling}{note}")
    console.print(
        f"tokens: per step. Baseline: {record['baseline']}. Win rate: wins over losses, ties shared; matched: against the "
        "base at the temperature at which it is as diverse.",
        style="dim",
    )


def _show_judge(console: Any, judge: dict[str, Any] | None) -> None:
    if judge is None:
        console.print("No judge was named (--reference or --endpoint): speeds and diversity only.")
        return
    sanity = judge["sanity"]
    console.print(f"judge {judge['name']}. {judge['caveat']}")
    for name, pair in (("shuffled", "the base over its own words shuffled"), ("same", "one base sample over another")):
        share = sanity[name]["share"]
        answer = "no verdict" if share is None else f"{share:.0%} {_range(sanity[name]['interval'], '.0%')}"
        console.print(f"  prefers {pair}: {answer}")
    if not sanity["useful"]:
        console.print(f"  [bold]This judge is useless here: {sanity['reason']}[/] Its verdicts are not shown.")


def _cells(point: dict[str, Any]) -> list[str]:
    """One value of eps_b."""
    speed, plain, matched = point["speed_up"], point["plain"], point["matched"]
    return [
        "" if point["eps_b"] is None else f"{point['eps_b']:g}",
        f"{point['tokens_per_step']:.2f}",
        f"{speed['median']:.2f} {_range([speed['low'], speed['high']] if speed['low'] is not None else None)}",
        *(f"{rate['win_rate']:.2f} {_range(rate['interval'])}" if rate else "" for rate in (plain, matched)),
        f"{matched['temperature']:.2f}" if matched else "",
    ]


def _quality(same: dict[str, Any]) -> str:
    theoretical = " (theoretical: beyond the fastest point measured)" if same["theoretical"] else ""
    return f"{same['estimate']:.2f}x {_range(same['interval'])}{theoretical}"


def _range(pair: list[float] | None, form: str = ".2f") -> str:
    return f"({pair[0]:{form}}-{pair[1]:{form}})" if pair else ""
