"""`dynamo-lm bench`: how fast, against everything else that decodes the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynamo_lm.cli.options import MACHINE, Device, Dtype, Json, Model, Threads, Tokenizer
from dynamo_lm.errors import InputError

if TYPE_CHECKING:
    from dynamo_lm.bench.prompts import Prompt
    from dynamo_lm.bench.runners import BenchmarkContext

WIDTH = 128  # columns that the tables need; a narrower terminal wraps them
TEXTS, RACED, SHAPE = "What is continued", "What is raced", "Random weights"


def bench(
    context: typer.Context,
    model: Model,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for bench.json and the pictures.", rich_help_panel=MACHINE),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Prompts, one a line or JSON lines. Default: the paper's ten.", rich_help_panel=TEXTS),
    ] = None,
    spec_bench: Annotated[
        Path | None,
        typer.Option("--spec-bench", help="Spec-Bench's question file: results by its six groups.", rich_help_panel=TEXTS),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts at most (of each group).", rich_help_panel=TEXTS)] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=8, help="Length of a text.", rich_help_panel=TEXTS)
    ] = 80,
    contexts: Annotated[
        str,
        typer.Option(
            "--context",
            help="short (the prompts as they are), long (behind text, to three quarters of the context), or both as "
            "short,long.",
            rich_help_panel=TEXTS,
        ),
    ] = "short",
    context_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a long context.", rich_help_panel=TEXTS)
    ] = None,
    filler: Annotated[
        Path | None,
        typer.Option(help="Text to put before long prompts. Default: the stories of $DYNAMO_DATA.", rich_help_panel=TEXTS),
    ] = None,
    batch: Annotated[str, typer.Option(help="Prompts at a time; several sizes as 1,4,16.", rich_help_panel=RACED)] = "1",
    repetitions: Annotated[int, typer.Option(min=1, help="Of the whole race.", rich_help_panel=RACED)] = 5,
    heads: Annotated[
        int | None, typer.Option(help="The most tokens a step may give. Default: all heads.", rich_help_panel=RACED)
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(help="A smaller model with the same tokenizer, for assisted generation.", rich_help_panel=RACED),
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(help="Another DynaMo model on the same base, decoded strictly, too.", rich_help_panel=RACED),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Race the ways whose name contains this, and the baselines.", rich_help_panel=RACED),
    ] = None,
    sampled: Annotated[
        bool, typer.Option("--sampled/--greedy-only", help="Ways that sample, too.", rich_help_panel=RACED)
    ] = True,
    compiled: Annotated[
        bool,
        typer.Option("--compile/--no-compile", help="The loops that must be compiled first.", rich_help_panel=RACED),
    ] = True,
    profile: Annotated[
        bool, typer.Option("--profile", help="Where a step's time goes, too.", rich_help_panel=RACED)
    ] = False,
    shape: Annotated[
        str | None,
        typer.Option(
            help="Random weights of this shape (pythia-70m, pythia-160m, ..) instead of MODEL's: what a step costs.",
            rich_help_panel=SHAPE,
        ),
    ] = None,
    table_rows: Annotated[
        int, typer.Option(min=0, help="Random triples in the tables of a --shape.", rich_help_panel=SHAPE)
    ] = 5_000_000,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Length of a --shape's random prompts.", rich_help_panel=SHAPE)
    ] = 32,
    seed: Annotated[int, typer.Option(help="Of all random numbers.", rich_help_panel=RACED)] = 0,
    tokenizer: Tokenizer = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """How fast a model writes, against everything else that decodes the same weights.

    In one run: one token per step by three loops, of which the fastest is the baseline; lossless and lossy methods of
    transformers, flashspec and llama.cpp where they are installed; DynaMo in all its modes; and the machine's
    memory-bandwidth floor. Ratios are medians over interleaved repetitions.

    `dynamo-lm bench story --prompts stories.txt --out results/bench`
    """
    from dynamo_lm.bench import methods, peers, plot, race, random_model, step_profile, tables
    from dynamo_lm.bench import prompts as prompt_sets
    from dynamo_lm.bench.runners import open_runner
    from dynamo_lm.cli.progress import counting
    from dynamo_lm.evaluation import results_file as records
    from dynamo_lm.model.loading import print_json

    # 1. What was asked for.
    sizes = _sizes(batch)
    lengths = [part.strip() for part in contexts.split(",")]
    if not set(lengths) <= {"short", "long"}:
        raise InputError(f'--context is "{contexts}"; give short, long or short,long.')
    if prompts is not None and spec_bench is not None:
        raise InputError("Give one source of prompts: --prompts or --spec-bench.")
    if shape is not None and (prompts is not None or spec_bench is not None or also or draft is not None):
        raise InputError("--shape has random weights and prompts: leave out --prompts, --spec-bench, --draft and --also.")
    if out is not None:
        import matplotlib  # noqa: F401  # needed behind the long part: better missed now

    # 2. Models and prompts.
    network, tokens = _open(model, tokenizer, dtype, device, threads, shape, heads, table_rows, seed)
    table = network.cooccurrence
    ceiling = heads or network.num_heads
    if not 1 < ceiling <= network.num_heads:
        raise InputError(f"--heads is {ceiling}; this model has 2 to {network.num_heads}.")
    off_heads = min(ceiling, table.order) if table is not None else 1
    among = _field(network, also or [], draft, tokens)
    eps_b = getattr(network.generation_config, "eps_b", None)
    raced = [
        *methods.ONE_TOKEN,
        *methods.PEERS,
        *(methods.also(name, own.num_heads) for name, own in among.models.items() if name != "model"),
        *methods.dynamo(ceiling, off_heads=off_heads, eps_b=0.3 if eps_b is None else eps_b),
        *methods.ONE_TOKEN_SAMPLED,
    ]
    raced.sort(key=lambda way: (way.kind != "greedy", not way.one_token))
    settings = {
        "shape": shape,
        "repetitions": repetitions,
        "max_new_tokens": max_new_tokens,
        "heads": ceiling,
        "table_rows": [table.num_rows(order) for order in range(1, table.order + 1)] if table is not None else [],
        "also": [name for name in among.models if name != "model"],
        "draft_parameters": among.draft.num_parameters() if among.draft is not None else None,
    }
    command = context.find_root().obj or []
    name = model if shape is None else f"{shape} (random weights)"
    found = records.begin("bench", _without_folders(command), network, name, seed=seed, settings=settings)
    if out is not None:
        records.check_folder(out, found["model"])
    found["machine"] = tables.machine(network.device)
    found["peers"] = {"llama.cpp": peers.llama_cpp_facts()}
    found["versions"] |= peers.versions()

    # 3. The races.
    found["races"], found["profiles"] = [], {}
    try:
        for length in lengths:
            if shape is None:
                texts = _prompts(prompts, spec_bench, tokens, limit)
            else:
                texts = random_model.random_prompts(
                    network.config.vocab_size, count=limit or 4, length=prompt_tokens, seed=seed
                )
            if length == "long":
                texts = _long(texts, among, context_tokens, filler, tokens, max_new_tokens)
            texts, cut = prompt_sets.fitted(texts, among.context, max_new_tokens)
            for size in sizes:
                chosen = methods.choose(raced, batch=size, sampled=sampled, only=only or [])
                left_out = [way for way in chosen if way.compiles and not compiled]
                with counting() as say:
                    one = race.race(
                        among,
                        texts,
                        [way for way in chosen if way not in left_out],
                        batch=size,
                        max_new_tokens=max_new_tokens,
                        repetitions=repetitions,
                        seed=seed,
                        progress=say,
                    )
                row: dict[str, Any] = {"context": length, "batch": size, "prompts": len(texts), "cut_prompts": cut}
                row |= {"ways": race.summaries(one, among, meaningful=shape is None), "skipped": one.skipped}
                row["skipped"] += [race.left_out(way, "Left out with --no-compile.") for way in left_out]
                row["floor"] = race.floor(one, among, max_new_tokens)
                found["races"].append(row)
        if profile:  # on the prompts of the last race
            batched = [[list(prompt.tokens)] for prompt in texts]
            for way in methods.choose(raced, batch=1, sampled=sampled, only=only or []):
                # What is compiled has no functions left to time, and wrapping them would compile it anew.
                if way.engine == methods.DYNAMO and way.model == "model" and not way.compiles:
                    found["profiles"][way.name] = step_profile.profile(
                        open_runner(way, among),
                        batched,
                        max_new_tokens=max_new_tokens,
                        seed=seed,
                        device=network.device,
                    )
    finally:
        for close in among.close:
            close()

    # 4. What is kept and shown.
    pictures: list[str] = []
    if out is not None:
        records.save(out, found)
        for number, raced_once in enumerate(found["races"]):
            heading = f"{found['model']['name']}, {found['model']['dtype']}, {tables.title(raced_once)}."
            suffix = "" if number == 0 else f"-{raced_once['context']}-batch{raced_once['batch']}"
            pictures += plot.save(raced_once, out, f"bench{suffix}", heading=heading)
    if json:
        print_json(found)
        return
    _show(found)
    if out is not None:
        print(f"{out / 'bench.json'} and {', '.join(pictures)}")


def _open(
    model: str,
    tokenizer: str | None,
    dtype: str,
    device: str,
    threads: int | None,
    shape: str | None,
    heads: int | None,
    table_rows: int,
    seed: int,
) -> tuple[Any, Any]:
    """The model, and its tokenizer unless its weights are random."""
    import torch

    from dynamo_lm.bench import random_model
    from dynamo_lm.model.loading import DTYPES, choose_device, open_for_evaluation

    if shape is None:
        return open_for_evaluation(model, tokenizer=tokenizer, dtype=dtype, device=device, threads=threads)
    if dtype not in DTYPES:
        raise InputError(f'--dtype is "{dtype}"; give one of {", ".join(DTYPES)}.')
    if threads is not None:
        if threads < 1:
            raise InputError(f"--threads is {threads}; give 1 or more.")
        torch.set_num_threads(threads)
    precision = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    where = choose_device(device)
    network = random_model.random_model(
        random_model.config(shape), num_heads=heads or 3, dtype=precision, device=where, table_rows=table_rows, seed=seed
    )
    return network, None


def _field(network: Any, also: list[str], draft: str | None, tokens: Any) -> BenchmarkContext:
    """Everything that is raced with, in one precision on one device."""
    from dynamo_lm.backbone.base_model import fingerprint, load_base
    from dynamo_lm.bench.runners import BenchmarkContext
    from dynamo_lm.model.loading import open_model, resolve

    ends = network.generation_config.eos_token_id
    ends = (ends,) if isinstance(ends, int) else tuple(ends or ())
    models = {"model": network}
    precision = str(network.dtype).removeprefix("torch.")
    for folder in also:
        other = open_model(resolve(folder), dtype=precision, device=str(network.device), tokenizer=tokens)
        if fingerprint(other.base) != fingerprint(network.base):
            raise InputError(f'"{folder}" has another base than the model; --also compares heads on the same base.')
        name = Path(folder.rstrip("/")).name
        if name in models:
            raise InputError(f'"{folder}" has the name of another model; give folders with names of their own.')
        models[name] = other
    helper = None
    if draft is not None:
        helper = load_base(resolve(draft), dtype=network.dtype).to(network.device).eval()  # type: ignore[arg-type]
        if helper.config.get_text_config().vocab_size != network.config.vocab_size:
            raise InputError(f'"{draft}" has another vocabulary than the model; --draft needs the same tokenizer.')
    return BenchmarkContext(models, ends, network.config.max_context or 2**31, helper)


def _prompts(file: Path | None, spec_bench: Path | None, tokens: Any, limit: int | None) -> list[Prompt]:
    from dynamo_lm.bench import prompts

    if spec_bench is not None:
        return prompts.read_spec_bench(spec_bench, tokens, limit=limit)
    return prompts.read(file, tokens, limit=limit)


def _long(
    texts: list[Prompt], among: BenchmarkContext, length: int | None, filler: Path | None, tokens: Any, max_new_tokens: int
) -> list[Prompt]:
    """The prompts behind a long context."""
    from dynamo_lm.bench import prompts, random_model
    from dynamo_lm.evaluation.completion.prompts import data_folder

    wanted = length or int(prompts.LONG * among.context)
    if wanted + max_new_tokens > among.context:
        raise InputError(
            f"A context of {wanted} tokens and {max_new_tokens} new ones exceed the model's {among.context}; lower "
            "--context-tokens or --max-new-tokens."
        )
    if tokens is None:
        return random_model.random_prompts(among.model.config.vocab_size, count=len(texts), length=wanted, seed=0)
    file = filler or data_folder().parent / "stories" / "tinystories.jsonl"
    if not file.exists():
        raise InputError(f'There is no "{file}" to put before the prompts; name a text with --filler.')
    return prompts.lengthened(texts, wanted, prompts.filler(file, tokens, wanted * min(len(texts), 64)))


def _sizes(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
        if min(found) < 1:
            raise ValueError
    except ValueError:
        raise InputError(f'--batch is "{text}"; give sizes of 1 or more, as 1,4,16.') from None
    return found


def _without_folders(command: list[str]) -> list[str]:
    """The command line with the last part of every absolute path only, so that a record names no machine's folders."""
    return [Path(word).name if word.startswith(("/", "~")) else word for word in command]


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console

    from dynamo_lm.bench import tables

    console = Console(highlight=False)
    console.width = max(console.width, WIDTH)
    own, machine = found["model"], found["machine"]
    console.print(
        f"{own['name']}, {own['dtype']}, {machine['threads']} threads, {found['settings']['repetitions']} repetitions"
    )
    for race in found["races"]:
        console.print()
        console.print(tables.table(race))
        by_group = tables.groups(race)
        if by_group is not None:
            console.print()
            console.print(by_group)
        for note in tables.notes(race):
            console.print(note, style="dim")
    if found["profiles"]:
        console.print()
        console.print(tables.shares(found["profiles"]))
