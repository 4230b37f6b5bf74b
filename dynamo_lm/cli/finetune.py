"""`dynamo-lm finetune`: a model and conversations in, a model that answers out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dynamo_lm.cli.judge_options import (
    Endpoint,
    JudgeModel,
    KeyFrom,
    PriceIn,
    PriceOut,
    Reference,
    RequestsPerMinute,
    Yes,
    open_judge,
)
from dynamo_lm.cli.training_options import (
    HEADS,
    LEARNING,
    LENGTH,
    TEXT,
    Accumulation,
    Attention,
    Bf16,
    CheckpointEvery,
    Clip,
    Device,
    DryRun,
    Freeze,
    Init,
    Json,
    LrC,
    LrM,
    LrMb,
    RunFolder,
    Save,
    Seed,
    Steps,
    Tokenizer,
    ValidateEvery,
    Validation,
    ValidationFraction,
    Warmup,
    WeightDecay,
)
from dynamo_lm.data.chat_template import end_of_turn, special_tokens
from dynamo_lm.errors import InputError

CHOICE = "Which answers"
BLOCK, BATCH, EPOCHS = 2048, 16, 3.0
LORA_RATES = {"lr_b": 1e-4, "lr_mb": 1e-5}  # of low-rank changes, which want about ten times the rates of the weights


def finetune(
    context: typer.Context,
    base: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help='The model to tune: a DynaMo folder or hub id, "story" for the bundled one, or a base model, which gets '
            "heads on the way.",
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Conversations: a file (.jsonl, .json, .parquet), a folder, a glob or a `datasets` id, in the form of "
            "OpenAI (messages), ShareGPT, Alpaca or Dolly; may be given several times.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    validation: Validation = None,
    validation_fraction: ValidationFraction = 0.03,
    template: Annotated[
        Path | None,
        typer.Option(
            help="File with a chat template in the form of transformers. Default: the tokenizer's own, else a plain one.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    tokenizer: Tokenizer = None,
    keep: Annotated[
        int | None,
        typer.Option(
            help="Keep only so many conversations, the best as the judge sees them (--reference or --endpoint). "
            "The paper keeps 9229.",
            rich_help_panel=CHOICE,
        ),
    ] = None,
    self_distill: Annotated[
        bool,
        typer.Option(
            "--self-distill",
            help="Learn MODEL's own answers to the questions, decoded strictly before tuning, in place of the data's.",
            rich_help_panel=CHOICE,
        ),
    ] = False,
    distill_tokens: Annotated[
        int,
        typer.Option(
            "--distill-tokens", help="Longest such answer; one that does not end is left out.", rich_help_panel=CHOICE
        ),
    ] = 512,
    distill_temperature: Annotated[
        float,
        typer.Option(
            "--distill-temperature", help="What they are sampled at; 0 for the likeliest tokens.", rich_help_panel=CHOICE
        ),
    ] = 0.7,
    reference: Reference = None,
    endpoint: Endpoint = None,
    judge_model: JudgeModel = None,
    requests_per_minute: RequestsPerMinute = None,
    price_in: PriceIn = None,
    price_out: PriceOut = None,
    key_from: KeyFrom = "OPENAI_API_KEY",
    yes: Yes = False,
    heads: Annotated[
        int | None,
        typer.Option(
            "--heads",
            help="Heads of a base that has none, its own included. Default: 3. 1 tunes the base alone, also that of a "
            "DynaMo model: something to compare with.",
            rich_help_panel=HEADS,
        ),
    ] = None,
    init: Init = None,
    tables: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Put this table, made by `dynamo-lm count`, into the finished model in place of its own.",
            rich_help_panel=HEADS,
        ),
    ] = None,
    count: Annotated[
        bool | None,
        typer.Option(
            "--count/--no-count",
            help="Count the answers that are learned and add them to the table. Default: if there is a table.",
            rich_help_panel=HEADS,
        ),
    ] = None,
    count_weight: Annotated[
        int,
        typer.Option("--count-weight", help="How often they are added.", rich_help_panel=HEADS),
    ] = 1,
    freeze: Freeze = False,
    lora_rank: Annotated[
        int | None,
        typer.Option(
            "--lora-rank",
            help="Low-rank changes of this rank to the base in place of changing all of it (peft); heads train in full. "
            "They are merged at the end.",
            rich_help_panel=LEARNING,
        ),
    ] = None,
    lr_b: Annotated[
        float | None,
        typer.Option(
            "--lr-b",
            help="Learning rate of the base, from its own loss. Default: 1e-5, with --lora-rank 1e-4 (and --lr-mb 1e-5).",
            rich_help_panel=LEARNING,
        ),
    ] = None,
    lr_m: LrM = None,
    lr_mb: LrMb = None,
    lr_c: LrC = 1e-2,
    warmup: Warmup = 0.03,
    weight_decay: WeightDecay = 0.01,
    clip: Clip = 1.0,
    seed: Seed = 0,
    block_size: Annotated[
        int | None,
        typer.Option(
            "--block-size",
            help="Tokens that are read together; a longer conversation is cut behind an answer or left out. "
            "Default: 2048, or the model's context if shorter.",
            rich_help_panel=LENGTH,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Blocks a step.", rich_help_panel=LENGTH)] = BATCH,
    accumulation: Accumulation = 1,
    steps: Steps = None,
    epochs: Annotated[
        float | None,
        typer.Option(help="How often to read all conversations, instead of --steps. Default: 3.", rich_help_panel=LENGTH),
    ] = None,
    validate_every: ValidateEvery = 500,
    checkpoint_every: CheckpointEvery = 500,
    bf16: Bf16 = None,
    attention: Attention = None,
    device: Device = "auto",
    out: RunFolder = None,
    save: Save = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Tune a model on conversations: base and heads together, on the answers only.

    `dynamo-lm finetune story --data conversations.jsonl --out runs/chat`

    Stop it with Ctrl-C whenever you like; the same command goes on where it stopped.
    """
    from dynamo_lm.cli.conversations import account, distilled, keep_best
    from dynamo_lm.cli.progress import tokenizing
    from dynamo_lm.cli.training_run import (
        Run,
        Text,
        block_length,
        carry_out,
        check_request,
        cut,
        describe,
        heads_asked,
        load_table,
        number_of_steps,
        print_description,
        rates,
        scratch,
        weights_to_save,
    )
    from dynamo_lm.data.chat_template import chat_template
    from dynamo_lm.data.tokenize_chat import tokenize_conversations
    from dynamo_lm.model.loading import choose_device, open_config, open_tokenizer, print_json, resolve
    from dynamo_lm.training.answer_table import add_answers
    from dynamo_lm.training.lora import TrunkLora

    # 1. What was asked for, and whether it can be: nothing slow yet.
    check_request(data, out, steps, epochs, attention, dry_run)
    if keep is not None and reference is None and endpoint is None:
        raise InputError("--keep needs a judge: --reference or --endpoint.")
    if keep is None and (reference is not None or endpoint is not None):
        raise InputError("A judge needs to know how many conversations to keep: --keep.")
    if count_weight < 1:
        raise InputError(f"--count-weight is {count_weight}; give 1 or more, or --no-count.")
    if freeze and lora_rank is not None:
        raise InputError("--freeze leaves the base as it is and --lora-rank changes it; give one of them.")
    name = resolve(base)
    config = open_config(name)
    where = choose_device(device)
    on_gpu = where.type == "cuda"
    usual = LORA_RATES if lora_rank is not None else {}
    lr_b, lr_mb = (usual.get(key) if rate is None else rate for key, rate in (("lr_b", lr_b), ("lr_mb", lr_mb)))
    run = Run(
        base=base,
        name=name,
        config=config,
        heads=heads_asked(base, config, {"num_heads": heads, "init": init}),
        where=where,
        attention=attention or ("sdpa" if on_gpu else "eager"),
        block_size=block_length(block_size, BLOCK, config),
        save=weights_to_save(save, freeze, config),
        lora_rank=lora_rank or 0,
        options={
            **rates(None, freeze, lr_b, lr_m, lr_mb),
            "lr_c": lr_c,
            "batch_size": batch_size,
            "accumulation": accumulation,
            "warmup": warmup,
            "weight_decay": weight_decay,
            "clip": clip,
            "bf16": on_gpu if bf16 is None else bf16,
            "seed": seed,
            "validate_every": validate_every,
            "checkpoint_every": checkpoint_every,
        },
    )
    run.plan(steps)  # its own checks, before the text is read
    tokens = open_tokenizer(resolve(tokenizer or name), vocab_size=config.get_text_config().vocab_size)
    chat_template(tokens, _read(template))
    vocab_size = config.get_text_config().vocab_size
    own_table = load_table(tables, tokens, vocab_size)
    if heads == 1 and (count or own_table is not None):
        raise InputError("A table makes heads agree, and --heads 1 has none; leave --tables and --count out.")

    # 2. The conversations: the best of them, with answers of the model's own if so asked.
    folder = out or scratch()
    model = None
    text = None
    if data:
        chosen = list(data)
        facts: dict[str, Any] = {}
        if not dry_run and keep is not None:
            judge = open_judge(
                folder,
                reference=reference,
                endpoint=endpoint,
                judge_model=judge_model,
                requests_per_minute=requests_per_minute,
                price_in=price_in,
                price_out=price_out,
                key_from=key_from,
                device=device,
            )
            assert judge is not None
            chosen = keep_best(chosen, judge, keep, folder, yes, facts)
        if not dry_run and self_distill:
            model = run.open()
            chosen = distilled(
                chosen, model, tokens, folder, facts,
                longest=run.block_size, max_new_tokens=distill_tokens, temperature=distill_temperature, seed=seed,
            )  # fmt: skip
        held_out = None
        with tokenizing() as progress:
            store = tokenize_conversations(chosen, tokens, folder / "tokens", longest=run.block_size, progress=progress)
            if validation:
                held_out = tokenize_conversations(
                    validation, tokens, folder / "validation", longest=run.block_size, progress=progress
                )
        typer.echo(f"dynamo-lm: {account(store.facts, run.block_size)}", err=True)
        blocks, measured = cut(store, held_out, validation_fraction, run.block_size, seed)
        measured_on = validation or f"{validation_fraction:g} of the conversations, seed {seed}"
        text = Text(store, blocks, measured, {"sources": data, "validation_sources": measured_on} | facts | store.facts)
    steps = number_of_steps(run, text, steps, epochs or EPOCHS)

    # 3. Shapes for a dry run, or weights.
    if dry_run:
        described = describe(run, text, steps)
        if json:
            print_json(described | ({} if text is None else text.store.facts))
        else:
            print_description(base, described)
        return
    assert text is not None and out is not None
    model = model or run.open()
    if own_table is not None:
        model.cooccurrence = own_table
    stops = _stops(model.generation_config.eos_token_id, tokens)
    model.generation_config.eos_token_id = stops[0] if len(stops) == 1 else stops
    lora = TrunkLora(model, lora_rank) if lora_rank is not None else None

    def finish() -> None:
        if lora is not None:
            lora.merge()
        if model.num_heads > 1 and (count or (count is None and model.cooccurrence is not None)):
            add_answers(model, text.store, text.blocks.documents, count_weight)

    carry_out(
        context, run, model, tokens, text, run.plan(steps), out, finish=finish, try_it="dynamo-lm chat {}", as_json=json
    )


def _stops(before: int | list[int] | None, tokenizer: Any) -> list[int]:
    """Where generation ends: where it did, if that is no text, at the end of text and at the end of a turn."""
    known = [] if before is None else [before] if isinstance(before, int) else before
    special = special_tokens(tokenizer)
    both = [tokenizer.eos_token_id, end_of_turn(tokenizer)]
    return list(dict.fromkeys([*(token for token in known if token in special), *both]))


def _read(template: Path | None) -> str | None:
    if template is None:
        return None
    try:
        return template.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f'The chat template "{template}" cannot be read; give a text file.') from error
