"""`dynamo-lm train`: a base model and text in, a DynaMo model out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

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
from dynamo_lm.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from dynamo_lm.model.presets import Preset

PAPER_BLOCK, PAPER_BATCH = 2048, 64  # what goes with a preset (method.md section 2)
BLOCK, BATCH = 512, 16  # for everybody else


def train(
    context: typer.Context,
    base: Annotated[
        str,
        typer.Argument(
            metavar="BASE",
            help="The model to add heads to: a folder or hub id. A DynaMo folder trains its heads further. A name of "
            "the paper's suite (DynaMo-77M-T3 .. DynaMo-7.3B-T3) brings its base and learning rates.",
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to train on: a file (.txt, .jsonl, .json, .parquet), a folder, a glob or a `datasets` id; may "
            "be given several times. Best like what the model will write.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    validation: Validation = None,
    validation_fraction: ValidationFraction = 0.03,
    text_field: Annotated[
        str | None,
        typer.Option(
            "--text-field", help='Field of JSON or Parquet that holds the text. Default: "text".', rich_help_panel=TEXT
        ),
    ] = None,
    tokenizer: Tokenizer = None,
    heads: Annotated[
        int | None,
        typer.Option(
            "--heads",
            help="How many tokens a step may give at most, the base's own included. Default: 3.",
            rich_help_panel=HEADS,
        ),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            help="What a head is: layer (decoder layers beside the last one: the method; default) or medusa (a residual "
            "block and an output embedding of its own on the last layer's state, for comparison).",
            rich_help_panel=HEADS,
        ),
    ] = None,
    layers_per_head: Annotated[
        int | None,
        typer.Option("--layers-per-head", help="Decoder layers of each head, 1 or 2. Default: 1.", rich_help_panel=HEADS),
    ] = None,
    feed: Annotated[
        str | None,
        typer.Option(
            help="What heads read: stem (the penultimate layer; default) or last (the last layer).",
            rich_help_panel=HEADS,
        ),
    ] = None,
    init: Init = None,
    own_output_embedding: Annotated[
        bool,
        typer.Option(
            "--own-output-embedding",
            help="Give each head an output embedding of its own. Large; the paper shares the base's.",
            rich_help_panel=HEADS,
        ),
    ] = False,
    adapter_rank: Annotated[
        int | None,
        typer.Option(
            "--adapter-rank",
            help="Low-rank adapters of this rank on the last layer instead of new layers; 0 for none. Default: 0.",
            rich_help_panel=HEADS,
        ),
    ] = None,
    coupling: Annotated[
        str | None,
        typer.Option(
            help="learned: a small correction that lets each head know the token chosen before its own, trained beside "
            "the heads, which learn as they would without it.",
            rich_help_panel=HEADS,
        ),
    ] = None,
    coupling_rank: Annotated[
        int | None,
        typer.Option("--coupling-rank", help="How large a new coupling is. Default: 64.", rich_help_panel=HEADS),
    ] = None,
    coupling_only: Annotated[
        bool,
        typer.Option(
            "--coupling-only",
            help="Train the coupling of a finished DynaMo model and leave its base and heads as they are. Fast.",
            rich_help_panel=HEADS,
        ),
    ] = False,
    tables: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Put this table, made by `dynamo-lm count`, into the finished model's folder.",
            rich_help_panel=HEADS,
        ),
    ] = None,
    freeze: Freeze = False,
    lr_b: Annotated[
        float | None,
        typer.Option(
            "--lr-b", help="Learning rate of the base, from its own loss. Default: 1e-5.", rich_help_panel=LEARNING
        ),
    ] = None,
    lr_m: LrM = None,
    lr_mb: LrMb = None,
    lr_c: LrC = 1e-2,
    warmup: Warmup = 0.01,
    weight_decay: WeightDecay = 0.01,
    clip: Clip = 1.0,
    seed: Seed = 0,
    block_size: Annotated[
        int | None,
        typer.Option(
            "--block-size",
            help="Tokens that are read together. Default: 512 (2048 with a preset), or the model's context if shorter.",
            rich_help_panel=LENGTH,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", help="Blocks a step. Default: 16 (64 with a preset).", rich_help_panel=LENGTH),
    ] = None,
    accumulation: Accumulation = 1,
    steps: Steps = None,
    epochs: Annotated[
        float | None,
        typer.Option(help="How often to read all of the text, instead of --steps. Default: 1.", rich_help_panel=LENGTH),
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
    """Add heads to a language model and train them on text.

    The quickest useful run, with a base that stays as it is:

    `dynamo-lm train BASE --data stories.jsonl --freeze --init copy --out runs/mine`

    Stop it with Ctrl-C whenever you like; the same command goes on where it stopped.
    """
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
    from dynamo_lm.data.token_store import tokenize
    from dynamo_lm.model.loading import choose_device, open_tokenizer, print_json, resolve
    from dynamo_lm.model.presets import PRESETS

    # 1. What was asked for, and whether it can be: nothing slow yet.
    check_request(data, out, steps, epochs, attention, dry_run)
    preset = PRESETS.get(base)
    name = resolve(preset.base if preset else base)
    config = _config(name, preset, dry_run)
    where = choose_device(device)
    on_gpu = where.type == "cuda"
    freeze = freeze or coupling_only
    asked = {
        "num_heads": heads if heads is not None or preset is None else int(base.rpartition("-T")[2]),
        "layers_per_head": layers_per_head,
        "feed": feed,
        "init": init,
        "own_output_embedding": own_output_embedding or None,
        "adapter_rank": adapter_rank,
        **_kind(head, layers_per_head, feed, init, adapter_rank),
        "coupling_rank": _coupling_rank(base, config, coupling, coupling_rank, coupling_only),
    }
    run = Run(
        base=base,
        name=name,
        config=config,
        heads=heads_asked(base, config, asked),
        where=where,
        attention=attention or ("sdpa" if on_gpu else "eager"),
        block_size=block_length(block_size, PAPER_BLOCK if preset else BLOCK, config),
        save=weights_to_save(save, freeze, config),
        options={
            **rates(preset, freeze, lr_b, lr_m, lr_mb),
            "lr_c": lr_c,
            "batch_size": batch_size or (PAPER_BATCH if preset else BATCH),
            "accumulation": accumulation,
            "warmup": warmup,
            "weight_decay": weight_decay,
            "clip": clip,
            "bf16": on_gpu if bf16 is None else bf16,
            "seed": seed,
            "validate_every": validate_every,
            "checkpoint_every": checkpoint_every,
            "coupling_only": coupling_only,
        },
    )
    run.plan(steps)  # its own checks, before the text is read

    # 2. The text.
    text = None
    tokens: Any = None
    if data:
        folder = (out or scratch()) / "tokens"
        tokens = open_tokenizer(resolve(tokenizer or name), vocab_size=config.get_text_config().vocab_size)
        held_out = None
        with tokenizing() as progress:
            store = tokenize(data, tokens, folder, text_field=text_field, progress=progress)
            if validation:
                held_out = tokenize(
                    validation, tokens, folder.with_name("validation"), text_field=text_field, progress=progress
                )
        blocks, measured = cut(store, held_out, validation_fraction, run.block_size, seed)
        measured_on = validation or f"{validation_fraction:g} of the documents, seed {seed}"
        text = Text(store, blocks, measured, {"sources": data, "validation_sources": measured_on})
    steps = number_of_steps(run, text, steps, epochs or 1)

    # 3. Shapes for a dry run, or weights.
    if dry_run:
        facts = describe(run, text, steps)
        if json:
            print_json(facts)
        else:
            print_description(base, facts)
        return
    assert text is not None and out is not None
    model = run.open()
    if tables is not None:
        model.cooccurrence = load_table(tables, tokens, model.config.vocab_size)
    carry_out(context, run, model, tokens, text, run.plan(steps), out, try_it="dynamo-lm generate {} PROMPT", as_json=json)


def _kind(head: str | None, *parts: object) -> dict[str, Any]:
    """Arguments of `DynaMoConfig` for a kind of head; none for the default, whose `parts` have options of their own."""
    from dynamo_lm.model.configuration import MEDUSA

    if head not in (None, "layer", "medusa"):
        raise InputError(f'--head is "{head}"; give layer or medusa.')
    if head != "medusa":
        return {}
    if any(part is not None for part in parts):
        raise InputError(
            "Heads of the medusa kind have no layers; leave --layers-per-head out, and --feed, --init and --adapter-rank."
        )
    return MEDUSA


def _coupling_rank(base: str, config: PreTrainedConfig, coupling: str | None, rank: int | None, only: bool) -> int | None:
    """The rank of the coupling that the model is to have, or None for what it has."""
    from dynamo_lm.model.configuration import DynaMoConfig
    from dynamo_lm.model.coupling import RANK

    if coupling not in (None, "learned"):
        raise InputError(f'--coupling is "{coupling}"; give learned, or leave it out.')
    if only and not isinstance(config, DynaMoConfig):
        raise InputError(f'--coupling-only needs a model with finished heads, and "{base}" has none; leave it out.')
    if coupling is None and not only:
        if rank is not None:
            raise InputError("--coupling-rank goes with --coupling learned.")
        return None
    if rank is not None and rank < 1:
        raise InputError(f"--coupling-rank is {rank}; give 1 or more.")
    return rank or getattr(config, "coupling_rank", 0) or RANK


def _config(name: str, preset: Preset | None, dry_run: bool) -> PreTrainedConfig:
    """The base's configuration; a dry run of a preset needs no hub, because its shape is known."""
    from dynamo_lm.model.loading import open_config

    if preset is None or not dry_run:
        return open_config(name)
    return preset.base_config(PAPER_BLOCK)
