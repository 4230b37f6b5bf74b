"""What `train` and `finetune` share: from checked options over the training loop to the finished model's folder."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dynamo_lm.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from dynamo_lm.cooccurrence.table import Cooccurrence
    from dynamo_lm.data.packing import Blocks
    from dynamo_lm.data.token_store import TokenStore
    from dynamo_lm.model.modeling import DynaMoForCausalLM
    from dynamo_lm.model.presets import Preset
    from dynamo_lm.training.options import TrainingOptions


@dataclass(frozen=True)
class Text:
    """What is trained on, and what is measured on."""

    store: TokenStore
    blocks: Blocks
    measured: Blocks | None
    facts: dict[str, Any] = field(default_factory=dict)  # for the record: where it comes from


@dataclass(frozen=True)
class Run:
    """One training run, as asked for."""

    base: str  # as the user named it
    name: str  # its folder or hub id
    config: PreTrainedConfig
    heads: dict[str, Any]  # arguments of `from_base` that were asked for
    where: torch.device
    attention: str
    block_size: int
    options: dict[str, Any]  # of TrainingOptions, without the steps
    save: str  # "heads" or "full"
    lora_rank: int = 0

    @property
    def alone(self) -> bool:
        """Whether the base of a DynaMo model is trained without its heads."""
        return self.heads.get("num_heads") == 1 and getattr(self.config, "num_heads", 1) > 1

    def plan(self, steps: int | None) -> TrainingOptions:
        """Raises InputError for options out of range."""
        from dynamo_lm.training.options import TrainingOptions

        return TrainingOptions(steps=1 if steps is None else steps, **self.options)

    def open(self) -> DynaMoForCausalLM:
        """The model to train, in float32: a base with new heads, or a DynaMo model with its own."""
        import torch

        from dynamo_lm import DynaMoForCausalLM
        from dynamo_lm.model.configuration import DynaMoConfig
        from dynamo_lm.model.coupling import add_coupling

        kwargs: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": self.attention}
        torch.manual_seed(self.options["seed"])
        if not isinstance(self.config, DynaMoConfig):
            model = DynaMoForCausalLM.from_base(self.name, **self.heads, **kwargs)
        else:
            model = DynaMoForCausalLM.from_pretrained(self.name, **kwargs)
            if self.alone:
                model = DynaMoForCausalLM.from_base(model.base, num_heads=1)
            elif model.coupling is None and "coupling_rank" in self.heads:
                add_coupling(model, self.heads["coupling_rank"])
        return model.to(self.where)  # type: ignore[arg-type]


def check_request(
    data: list[str] | None,
    out: Path | None,
    steps: int | None,
    epochs: float | None,
    attention: str | None,
    dry_run: bool,
) -> None:
    """Refuses what can be seen to be wrong at once.

    Raises:
        InputError: with the reason.
    """
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


def heads_asked(base: str, config: PreTrainedConfig, asked: dict[str, Any]) -> dict[str, Any]:
    """What was asked of the heads, without what was not; a finished model's own cannot be changed.

    Raises:
        InputError: it has others. One head is its base alone, and a finished model may get a coupling.
    """
    from dynamo_lm.model.configuration import DynaMoConfig

    asked = {key: value for key, value in asked.items() if value is not None}
    if isinstance(config, DynaMoConfig):
        for key, value in asked.items():
            if (key == "coupling_rank" and config.coupling_rank == 0) or (key == "num_heads" and value == 1):
                continue
            if getattr(config, key) != value:
                raise InputError(f'"{base}" has {key}={getattr(config, key)}, which cannot become {value}; leave it out.')
    return asked


def weights_to_save(save: str | None, freeze: bool, config: PreTrainedConfig) -> str:
    """ "heads" or "full".

    Raises:
        InputError: anything else, or heads of a base that changes.
    """
    from dynamo_lm.model.configuration import DynaMoConfig

    if save is None:
        keeps_base = not isinstance(config, DynaMoConfig) or config.weights == "heads"
        save = "heads" if freeze and keeps_base else "full"
    if save not in ("heads", "full"):
        raise InputError(f'--save is "{save}"; give heads or full.')
    if save == "heads" and not freeze:
        raise InputError("--save heads needs --freeze: training changes the base, so heads alone would not fit it.")
    return save


def rates(
    preset: Preset | None, freeze: bool, lr_b: float | None, lr_m: float | None, lr_mb: float | None
) -> dict[str, float]:
    """The three learning rates: as given, the preset's, or the paper's for Pythia-70M; a frozen base has none."""
    from dynamo_lm.model.presets import PRESETS

    paper = preset or PRESETS["DynaMo-77M-T3"]
    if freeze:
        if lr_b or lr_mb:
            raise InputError("--freeze leaves the base as it is, so --lr-b and --lr-mb have no meaning; leave them out.")
        return {"lr_b": 0.0, "lr_m": paper.lr_m if lr_m is None else lr_m, "lr_mb": 0.0}
    chosen = {"lr_b": lr_b, "lr_m": lr_m, "lr_mb": lr_mb}
    return {key: getattr(paper, key) if value is None else value for key, value in chosen.items()}


def block_length(asked: int | None, usual: int, config: PreTrainedConfig) -> int:
    """Tokens a block: as asked, or as usual, or the model's context if that is shorter.

    Raises:
        InputError: more was asked than the context holds.
    """
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31
    length = asked or min(usual, longest)
    if length > longest:
        raise InputError(f"--block-size is {length}, but the model's context is {longest}; give that or less.")
    return length


def number_of_steps(run: Run, text: Text | None, steps: int | None, epochs: float) -> int | None:
    """As given, or so many that the text is read `epochs` times; None without a text."""
    if steps is not None or text is None:
        return steps
    return max(1, round(epochs * text.blocks.num_blocks() / run.options["batch_size"]))


def cut(
    store: TokenStore, held_out: TokenStore | None, fraction: float, block_size: int, seed: int
) -> tuple[Blocks, Blocks | None]:
    """What is trained on, and what is measured on (None for nothing); conversations stay whole.

    Raises:
        InputError: too little text.
    """
    import numpy as np

    from dynamo_lm.data.packing import Blocks, WholeBlocks

    kind = Blocks if store.responses is None else WholeBlocks
    ids, validation_ids = store.split(0.0 if held_out is not None else fraction, seed)
    blocks = kind(store, ids, block_size, seed=seed)
    if held_out is not None:
        validation_ids, store = np.arange(len(held_out)), held_out
    if len(validation_ids) == 0:
        return blocks, None
    try:
        return blocks, kind(store, validation_ids, block_size, seed=seed, shuffle=False)
    except InputError as error:
        raise InputError(
            f"There is too little text to measure on (--validation-fraction 0 does without). {error}"
        ) from error


def load_table(tables: str | None, tokenizer: Any, vocab_size: int) -> Cooccurrence | None:
    """The table of --tables, if it was counted with this tokenizer.

    Raises:
        InputError: it was not.
    """
    from dynamo_lm.cooccurrence.table import Cooccurrence
    from dynamo_lm.model.loading import check_table, table_file

    if tables is None:
        return None
    table = Cooccurrence.load(table_file(tables))
    check_table(table, tokenizer, vocab_size, tables)
    return table


def describe(run: Run, text: Text | None, steps: int | None) -> dict[str, Any]:
    """The facts of a run that does not take place; the model has shapes only."""
    import torch

    from dynamo_lm import DynaMoForCausalLM
    from dynamo_lm.model.coupling import add_coupling
    from dynamo_lm.model.loading import skeleton
    from dynamo_lm.training.memory_estimate import memory, parameters

    plan = run.plan(steps)
    network = skeleton(run.config)
    with torch.device("meta"):
        if run.alone:
            network = network.base
        model = network if isinstance(network, DynaMoForCausalLM) else DynaMoForCausalLM.from_base(network, **run.heads)
        if model.coupling is None and "coupling_rank" in run.heads:
            add_coupling(model, run.heads["coupling_rank"])
        if run.lora_rank:
            from dynamo_lm.training.lora import TrunkLora

            TrunkLora(model, run.lora_rank)
    model.set_attn_implementation(run.attention)
    fused = run.attention == "sdpa" and run.where.type == "cuda"
    facts: dict[str, Any] = {
        "parameters": parameters(model, frozen=plan.frozen, coupling_only=plan.coupling_only),
        "memory_bytes_estimate": memory(model, plan, run.block_size, fused=fused),
        "tokens_per_step": plan.batch_size * run.block_size,
        "options": asdict(plan) | {"block_size": run.block_size, "attention": run.attention},
        "steps": steps,
    }
    if text is not None:
        facts["documents"], facts["training_tokens"] = len(text.store), text.blocks.total
        facts["validation_tokens"] = text.measured.total if text.measured else 0
    return facts


def print_description(base: str, facts: dict[str, Any]) -> None:
    """`describe`'s facts for a person."""
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


def carry_out(
    context: typer.Context,
    run: Run,
    model: DynaMoForCausalLM,
    tokenizer: Any,
    text: Text,
    plan: TrainingOptions,
    out: Path,
    *,
    finish: Callable[[], None] = lambda: None,
    try_it: str,
    as_json: bool,
) -> None:
    """Trains, or goes on where the same command stopped, and writes the finished model into `out`/model.

    Args:
        context: whose root object is the command line, for the record.
        finish: called between training and saving.
        try_it: a command line that does something with the model, whose folder stands for {}.
    """
    from dynamo_lm.cli.progress import training
    from dynamo_lm.model.loading import print_json
    from dynamo_lm.training import provenance
    from dynamo_lm.training.checkpoints import latest_checkpoint
    from dynamo_lm.training.trainer import train

    # 1. The record of the run, or that of the one that is resumed.
    record = provenance.begin(
        context.obj or [],
        base={"name": run.base, "fingerprint": model.config.base_fingerprint},
        model={key: getattr(model.config, key) for key in provenance.IDENTITY["model"]},
        data=text.facts
        | {
            "fingerprint": text.store.fingerprint,
            "tokenizer": text.store.tokenizer,
            "documents": len(text.store),
            "training_tokens": text.blocks.total,
            "validation_tokens": text.measured.total if text.measured else 0,
            "block_size": run.block_size,
        },
        options=asdict(plan) | {"attention": run.attention, "device": run.where.type, "lora_rank": run.lora_rank},
        steps=plan.steps,
    )
    if latest_checkpoint(out) is not None:
        record["started"] = provenance.check_same_run(out, record) or record["started"]
    provenance.write(out, record)

    # 2. Train; the same command resumes.
    try:
        with training(plan.steps) as report:
            train(model, text.blocks, text.measured, plan, out, report=report)
    except KeyboardInterrupt:
        typer.echo("dynamo-lm: stopped; the same command goes on from the last checkpoint.", err=True)
        raise typer.Exit(130) from None
    finish()

    # 3. The finished model, with what it takes to use it and to know where it comes from.
    target = out / "model"
    if Path(run.name).is_dir():
        model.config.base_name_or_path = _found_from(target, run.name, run.config)
    model.save_pretrained(str(target), weights=run.save)
    tokenizer.save_pretrained(target)
    record |= {"perplexities": _perplexities(out), "finished": provenance.now()}
    provenance.write(out, record)
    provenance.write(target, record)
    if as_json:
        print_json(record | {"model_folder": str(target)})
        return
    for key, value in record["perplexities"].items():
        print(f"{key} {value:.2f}")
    print(f"{target}: {run.save} weights, {plan.steps} steps; try it: {try_it.format(target)}")


def scratch() -> Path:
    """A folder that goes away with the process."""
    import atexit
    import tempfile

    folder = tempfile.TemporaryDirectory(prefix="dynamo-tokens-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _found_from(target: Path, name: str, config: PreTrainedConfig) -> str | None:
    """The local base as seen from the model's folder, so that the two can be moved together and used from anywhere."""
    from dynamo_lm.model.configuration import DynaMoConfig

    if isinstance(config, DynaMoConfig):  # whose own base is recorded in the same way
        recorded = config.base_name_or_path
        found = [path for path in (Path(name) / (recorded or ""), Path(recorded or "")) if recorded and path.is_dir()]
        if not found:
            return recorded  # a hub id, or a model of its own
        name = str(found[0])
    return os.path.relpath(Path(name).resolve(), target.resolve())


def _perplexities(folder: Path) -> dict[str, float]:
    """Of the last validation in the run's log."""
    for line in reversed((folder / "log.jsonl").read_text(encoding="utf-8").split("\n")[:-1]):
        entry = json.loads(line)
        if "ppl" in entry:
            heads = {f"PPL_{i}": value for i, value in enumerate(entry["ppl"], start=1)}
            coupled = {f"PPL_{i}|{i - 1}": value for i, value in enumerate(entry.get("ppl_coupled", ()), start=2)}
            return heads | {f"PPL_1:{len(heads)}": entry["ppl_joint"][-1]} | coupled
    return {}
