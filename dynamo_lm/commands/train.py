"""`dynamo-lm train`: a base model and text in, a DynaMo model out."""

from __future__ import annotations

import json as json_format
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynamo_lm.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from dynamo_lm.config import Preset
    from dynamo_lm.data import TokenStore
    from dynamo_lm.model import DynaMoForCausalLM
    from dynamo_lm.packing import Blocks
    from dynamo_lm.training import TrainingOptions

TEXT, HEADS, LEARNING, LENGTH, MACHINE = "The text", "The heads", "How they learn", "How long", "Machine and output"
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
    validation: Annotated[
        list[str] | None,
        typer.Option(help="Text to measure on, in the same forms. Default: a share of --data.", rich_help_panel=TEXT),
    ] = None,
    validation_fraction: Annotated[
        float,
        typer.Option(
            "--validation-fraction",
            help="Share of the documents held out to measure on, if there is no --validation; 0 measures nothing.",
            rich_help_panel=TEXT,
        ),
    ] = 0.03,
    text_field: Annotated[
        str | None,
        typer.Option(
            "--text-field", help='Field of JSON or Parquet that holds the text. Default: "text".', rich_help_panel=TEXT
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Tokenizer folder or hub id, if BASE does not bring its own.", rich_help_panel=TEXT),
    ] = None,
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
    init: Annotated[
        str | None,
        typer.Option(
            help="How heads begin: random (the paper; default) or copy (of the last layer; learns faster).",
            rich_help_panel=HEADS,
        ),
    ] = None,
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
    freeze: Annotated[
        bool,
        typer.Option(
            "--freeze/--no-freeze",
            help="Train the new heads only. The base stays as it is, memory and time shrink, and the result is a small "
            "folder of heads.",
            rich_help_panel=LEARNING,
        ),
    ] = False,
    lr_b: Annotated[
        float | None,
        typer.Option(
            "--lr-b", help="Learning rate of the base, from its own loss. Default: 1e-5.", rich_help_panel=LEARNING
        ),
    ] = None,
    lr_m: Annotated[
        float | None,
        typer.Option("--lr-m", help="Learning rate of the new heads. Default: 1e-3.", rich_help_panel=LEARNING),
    ] = None,
    lr_mb: Annotated[
        float | None,
        typer.Option("--lr-mb", help="How fast the new heads may change the base. Default: 1e-6.", rich_help_panel=LEARNING),
    ] = None,
    lr_c: Annotated[
        float, typer.Option("--lr-c", help="Learning rate of the heads' coupling.", rich_help_panel=LEARNING)
    ] = 1e-2,
    warmup: Annotated[
        float, typer.Option(help="Share of the steps in which the rates rise.", rich_help_panel=LEARNING)
    ] = 0.01,
    weight_decay: Annotated[
        float, typer.Option("--weight-decay", help="Pull of matrices towards 0.", rich_help_panel=LEARNING)
    ] = 0.01,
    clip: Annotated[
        float, typer.Option(help="Largest norm of a step's gradient; 0 for no limit.", rich_help_panel=LEARNING)
    ] = 1.0,
    seed: Annotated[
        int,
        typer.Option(help="Of the new heads and the order of the text; same seed, same run.", rich_help_panel=LEARNING),
    ] = 0,
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
    accumulation: Annotated[
        int,
        typer.Option(
            help="Split each step into this many passes, for less memory and the same result.", rich_help_panel=LENGTH
        ),
    ] = 1,
    steps: Annotated[int | None, typer.Option(help="How many steps to train.", rich_help_panel=LENGTH)] = None,
    epochs: Annotated[
        float | None,
        typer.Option(help="How often to read all of the text, instead of --steps. Default: 1.", rich_help_panel=LENGTH),
    ] = None,
    validate_every: Annotated[
        int,
        typer.Option("--validate-every", help="Steps between measurements on the held-out text.", rich_help_panel=LENGTH),
    ] = 500,
    checkpoint_every: Annotated[
        int,
        typer.Option(
            "--checkpoint-every", help="Steps between checkpoints: what a crash costs at most.", rich_help_panel=LENGTH
        ),
    ] = 500,
    bf16: Annotated[
        bool | None,
        typer.Option(
            "--bf16/--fp32",
            help="Compute in bfloat16 or float32; weights are float32 either way. Default: bf16 on GPUs.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option(
            help="sdpa (fused) or eager (plain). Default: eager on CPUs, where it trains faster, sdpa on GPUs.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1, .. or auto (a GPU if there is one).", rich_help_panel=MACHINE)
    ] = "auto",
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Run folder: log, checkpoints, and at the end the finished model in FOLDER/model. The same command on "
            "the same folder resumes.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    save: Annotated[
        str | None,
        typer.Option(
            help="heads (small; the base is fetched by its name) or full. Default: heads if the base was frozen.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Say how large everything is and how long the run, and train nothing.",
            rich_help_panel=MACHINE,
        ),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.", rich_help_panel=MACHINE)] = False,
) -> None:
    """Add heads to a language model and train them on text.

    The quickest useful run, with a base that stays as it is:

    `dynamo-lm train BASE --data stories.jsonl --freeze --init copy --out runs/mine`

    Stop it with Ctrl-C whenever you like; the same command goes on where it stopped.
    """
    import torch

    from dynamo_lm import provenance
    from dynamo_lm.checkpoints import latest_checkpoint
    from dynamo_lm.commands.opening import check_table, choose_device, open_tokenizer, print_json, resolve, table_file
    from dynamo_lm.commands.progress import tokenizing, training
    from dynamo_lm.config import PRESETS, DynaMoConfig
    from dynamo_lm.cooccurrence import Cooccurrence
    from dynamo_lm.data import tokenize
    from dynamo_lm.training import TrainingOptions
    from dynamo_lm.training import train as carry_out

    # 1. What was asked for, and whether it can be: nothing slow yet.
    if not data and not dry_run:
        raise InputError("There is nothing to train on; name a text with --data.")
    if out is None and not dry_run:
        raise InputError("Say where the run goes with --out FOLDER.")
    if steps is not None and epochs is not None:
        raise InputError("Give either --steps or --epochs, not both.")
    if epochs is not None and not 0 < epochs < math.inf:
        raise InputError(f"--epochs is {epochs}; give a number above 0.")
    if attention not in (None, "sdpa", "eager"):
        raise InputError(f'--attention is "{attention}"; give sdpa or eager.')
    preset = PRESETS.get(base)
    name = resolve(preset.base if preset else base)
    config = _config(name, preset, dry_run)
    where = choose_device(device)
    on_gpu = where.type == "cuda"
    attention = attention or ("sdpa" if on_gpu else "eager")
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
    asked = {key: value for key, value in asked.items() if value is not None}
    freeze = freeze or coupling_only
    if isinstance(config, DynaMoConfig):
        for key, value in asked.items():
            if key == "coupling_rank" and config.coupling_rank == 0:
                continue  # a finished model gets one
            if getattr(config, key) != value:
                raise InputError(f'"{base}" has {key}={getattr(config, key)}, which cannot become {value}; leave it out.')
    if save is None:
        keeps_base = not isinstance(config, DynaMoConfig) or config.weights == "heads"
        save = "heads" if freeze and keeps_base else "full"
    if save not in ("heads", "full"):
        raise InputError(f'--save is "{save}"; give heads or full.')
    if save == "heads" and not freeze:
        raise InputError("--save heads needs --freeze: training changes the base, so heads alone would not fit it.")
    rates = _rates(preset, freeze, lr_b, lr_m, lr_mb)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31
    block_size = block_size or min(PAPER_BLOCK if preset else BLOCK, longest)
    if block_size > longest:
        raise InputError(f"--block-size is {block_size}, but the model's context is {longest}; give that or less.")
    options: dict[str, Any] = {
        **rates,
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
    }
    TrainingOptions(steps=steps or 1, **options)  # its own checks, before the text is read

    # 2. The text.
    store = held_out = None
    tokens: Any = None
    if data:
        folder = (out if out is not None else Path(_scratch())) / "tokens"
        tokens = open_tokenizer(resolve(tokenizer or name), vocab_size=config.get_text_config().vocab_size)
        with tokenizing() as progress:
            store = tokenize(data, tokens, folder, text_field=text_field, progress=progress)
            if validation:
                held_out = tokenize(
                    validation, tokens, folder.with_name("validation"), text_field=text_field, progress=progress
                )
        blocks, measured = _blocks(store, held_out, validation_fraction, block_size, seed)
        per_epoch = blocks.num_blocks() / options["batch_size"]
        steps = steps or max(1, round((epochs or 1) * per_epoch))
    plan = TrainingOptions(steps=steps or 1, **options)

    # 3. The model: shapes for a dry run, or weights.
    if dry_run:
        text = (store, blocks, measured) if store is not None else None
        facts = _dry_run(config, asked, attention, on_gpu, plan, block_size, text)
        facts["steps"] = steps
        if json:
            print_json(facts)
        else:
            _print_plan(base, facts)
        return
    assert store is not None and out is not None
    torch.manual_seed(seed)
    model = _open(name, config, asked, attention).to(where)  # type: ignore[arg-type]
    if tables is not None:
        table = Cooccurrence.load(table_file(tables))
        check_table(table, tokens, model.config.vocab_size, tables)
        model.cooccurrence = table
    record = provenance.begin(
        context.obj or [],
        base={"name": base, "fingerprint": model.config.base_fingerprint},
        model={key: getattr(model.config, key) for key in provenance.IDENTITY["model"]},
        data={
            "sources": data,
            "validation_sources": validation or f"{validation_fraction:g} of the documents, seed {seed}",
            "fingerprint": store.fingerprint,
            "tokenizer": store.tokenizer,
            "documents": len(store),
            "training_tokens": blocks.total,
            "validation_tokens": measured.total if measured else 0,
            "block_size": block_size,
        },
        options=asdict(plan) | {"attention": attention, "device": where.type},
        steps=plan.steps,
    )
    if latest_checkpoint(out) is not None:
        record["started"] = provenance.check_same_run(out, record) or record["started"]
    provenance.write(out, record)

    # 4. Train; the same command resumes.
    try:
        with training(plan.steps) as report:
            carry_out(model, blocks, measured, plan, out, report=report)
    except KeyboardInterrupt:
        typer.echo("dynamo-lm: stopped; the same command goes on from the last checkpoint.", err=True)
        raise typer.Exit(130) from None

    # 5. The finished model, with what it takes to use it and to know where it comes from.
    target = out / "model"
    if Path(name).is_dir():
        model.config.base_name_or_path = _found_from(target, name, config)
    model.save_pretrained(str(target), weights=save)
    tokens.save_pretrained(target)
    record |= {"perplexities": _perplexities(out), "finished": provenance.now()}
    provenance.write(out, record)
    provenance.write(target, record)
    if json:
        print_json(record | {"model_folder": str(target)})
        return
    for key, value in record["perplexities"].items():
        print(f"{key} {value:.2f}")
    print(f"{target}: {save} weights, {plan.steps} steps; try it: dynamo-lm generate {target} PROMPT")


def _rates(
    preset: Preset | None, freeze: bool, lr_b: float | None, lr_m: float | None, lr_mb: float | None
) -> dict[str, float]:
    """The three learning rates: as given, the preset's, or the paper's for Pythia-70M; a frozen base has none."""
    from dynamo_lm.config import PRESETS

    paper = preset or PRESETS["DynaMo-77M-T3"]
    if freeze:
        if lr_b or lr_mb:
            raise InputError("--freeze leaves the base as it is, so --lr-b and --lr-mb have no meaning; leave them out.")
        return {"lr_b": 0.0, "lr_m": paper.lr_m if lr_m is None else lr_m, "lr_mb": 0.0}
    chosen = {"lr_b": lr_b, "lr_m": lr_m, "lr_mb": lr_mb}
    return {key: getattr(paper, key) if value is None else value for key, value in chosen.items()}


def _kind(head: str | None, *parts: object) -> dict[str, Any]:
    """Arguments of `DynaMoConfig` for a kind of head; none for the default, whose `parts` have options of their own."""
    from dynamo_lm.config import MEDUSA

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
    from dynamo_lm.config import DynaMoConfig
    from dynamo_lm.coupling import RANK

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
    from dynamo_lm.commands.opening import open_config

    if preset is None or not dry_run:
        return open_config(name)
    return preset.base_config(PAPER_BLOCK)


def _open(name: str, config: PreTrainedConfig, asked: dict[str, Any], attention: str) -> DynaMoForCausalLM:
    """The model to train, in float32: a base with new heads, or a DynaMo model with its own."""
    import torch

    from dynamo_lm import DynaMoForCausalLM
    from dynamo_lm.config import DynaMoConfig
    from dynamo_lm.coupling import add_coupling

    kwargs: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": attention}
    if isinstance(config, DynaMoConfig):
        model = DynaMoForCausalLM.from_pretrained(name, **kwargs)
        if model.coupling is None and "coupling_rank" in asked:
            add_coupling(model, asked["coupling_rank"])
        return model
    return DynaMoForCausalLM.from_base(name, **asked, **kwargs)


def _blocks(
    store: TokenStore, held_out: TokenStore | None, fraction: float, block_size: int, seed: int
) -> tuple[Blocks, Blocks | None]:
    """What is trained on, and what is measured on (None for nothing)."""
    import numpy as np

    from dynamo_lm.packing import Blocks

    ids, validation_ids = store.split(0.0 if held_out is not None else fraction, seed)
    blocks = Blocks(store, ids, block_size, seed=seed)
    if held_out is not None:
        validation_ids, store = np.arange(len(held_out)), held_out
    if len(validation_ids) == 0:
        return blocks, None
    try:
        return blocks, Blocks(store, validation_ids, block_size, seed=seed, shuffle=False)
    except InputError as error:
        raise InputError(
            f"There is too little text to measure on (--validation-fraction 0 does without). {error}"
        ) from error


def _dry_run(
    config: PreTrainedConfig,
    asked: dict[str, Any],
    attention: str,
    on_gpu: bool,
    plan: TrainingOptions,
    block_size: int,
    text: tuple[TokenStore, Blocks, Blocks | None] | None,
) -> dict[str, Any]:
    """The facts of a run that does not take place; the model has shapes only."""
    import torch

    from dynamo_lm import DynaMoForCausalLM
    from dynamo_lm.commands.opening import skeleton
    from dynamo_lm.coupling import add_coupling
    from dynamo_lm.plan import memory, parameters

    network = skeleton(config)
    with torch.device("meta"):
        model = network if isinstance(network, DynaMoForCausalLM) else DynaMoForCausalLM.from_base(network, **asked)
        if model.coupling is None and "coupling_rank" in asked:
            add_coupling(model, asked["coupling_rank"])
    model.set_attn_implementation(attention)
    fused = attention == "sdpa" and on_gpu
    facts: dict[str, Any] = {
        "parameters": parameters(model, frozen=plan.frozen, coupling_only=plan.coupling_only),
        "memory_bytes_estimate": memory(model, plan, block_size, fused=fused),
        "tokens_per_step": plan.batch_size * block_size,
        "options": asdict(plan) | {"block_size": block_size, "attention": attention},
    }
    if text is not None:
        store, blocks, measured = text
        facts["documents"], facts["training_tokens"] = len(store), blocks.total
        facts["validation_tokens"] = measured.total if measured else 0
    return facts


def _print_plan(base: str, facts: dict[str, Any]) -> None:
    count, memory = facts["parameters"], facts["memory_bytes_estimate"]
    print(f"base        {base}: {count['base']:,} parameters")
    coupled = f", {count['coupling']:,} of them the coupling" if count["coupling"] else ""
    print(f"heads       {count['heads']:,} parameters, {count['overhead']:.2%} of the base{coupled}")
    print(f"trained     {count['trained']:,} parameters")
    parts = ", ".join(f"{name} {_size(value)}" for name, value in memory.items() if name != "total")
    print(f"memory      about {_size(memory['total'])} (an estimate): {parts}")
    if 2 * memory["activations"] > memory["total"]:
        print("            a larger --accumulation makes the activations smaller")
    if "training_tokens" in facts:
        held = f", {facts['validation_tokens']:,} held out"
        print(f"text        {facts['documents']:,} documents, {facts['training_tokens']:,} tokens to train on{held}")
        total = facts["steps"] * facts["tokens_per_step"]
        epochs = total / facts["training_tokens"]
        each = f"{facts['steps']:,} of {facts['tokens_per_step']:,} tokens"
        print(f"steps       {each}: {total:,} in all, {epochs:.2f} epochs")
    else:
        print(f"steps       of {facts['tokens_per_step']:,} tokens; name the text with --data to know how many")


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _found_from(target: Path, name: str, config: PreTrainedConfig) -> str | None:
    """The local base as seen from the model's folder, so that the two can be moved together and used from anywhere."""
    from dynamo_lm.config import DynaMoConfig

    if isinstance(config, DynaMoConfig):  # whose own base is recorded in the same way
        recorded = config.base_name_or_path
        found = [path for path in (Path(name) / (recorded or ""), Path(recorded or "")) if recorded and path.is_dir()]
        if not found:
            return recorded  # a hub id, or a model of its own
        name = str(found[0])
    return os.path.relpath(Path(name).resolve(), target.resolve())


def _perplexities(folder: Path) -> dict[str, float]:
    """Of the last validation in the run's log."""
    for line in reversed((folder / "log.jsonl").read_text().splitlines()):
        entry = json_format.loads(line)
        if "ppl" in entry:
            heads = {f"PPL_{i}": value for i, value in enumerate(entry["ppl"], start=1)}
            coupled = {f"PPL_{i}|{i - 1}": value for i, value in enumerate(entry.get("ppl_coupled", ()), start=2)}
            return heads | {f"PPL_1:{len(heads)}": entry["ppl_joint"][-1]} | coupled
    return {}


def _scratch() -> str:
    """A folder that goes away with the process."""
    import atexit
    import tempfile

    folder = tempfile.TemporaryDirectory(prefix="dynamo-tokens-")
    atexit.register(folder.cleanup)
    return folder.name
