"""What `train` and `finetune` share: from their options over the training loop to the finished model's folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import typer

from dynamo_lm.backbone.token_limits import context_limit
from dynamo_lm.cli.progress import training
from dynamo_lm.cli.training_options import Defaults, LearningOptions, LengthOptions, RunOptions
from dynamo_lm.cli.training_text import Text
from dynamo_lm.cooccurrence.table import Cooccurrence
from dynamo_lm.data.draft_tokens import draft_tokens
from dynamo_lm.data.packing import Blocks
from dynamo_lm.devices import device_memory
from dynamo_lm.errors import InputError
from dynamo_lm.jsonl_cache import JsonlLog
from dynamo_lm.model.base_location import base_sources
from dynamo_lm.model.configuration import DynaMoConfig
from dynamo_lm.model.coupling import add_coupling
from dynamo_lm.model.loading import check_table, open_tokenizer, print_json, resolve, skeleton, table_file
from dynamo_lm.model.modeling import DynaMoForCausalLM
from dynamo_lm.training import provenance, ranks
from dynamo_lm.training.checkpoints import latest_checkpoint, step_of
from dynamo_lm.training.feature_cache import FeatureCache
from dynamo_lm.training.memory_estimate import fitting_accumulation
from dynamo_lm.training.options import TrainingOptions
from dynamo_lm.training.trainer import train

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Run:
    """One training run, with all that its options leave open decided; only the steps may depend on the text."""

    base: str  # as the user named it
    name: str  # its folder or hub id
    config: PreTrainedConfig
    heads: dict[str, Any]  # arguments of `from_base`
    device: torch.device
    attention: str
    block_size: int
    options: TrainingOptions  # of one step until the number of steps is known
    steps: int | None
    epochs: float
    save: str  # "heads" or "full"
    lora_rank: int = 0
    ranks: int = 1
    gpu_memory: int | None = None  # bytes of each rank's

    @classmethod
    def plan(
        cls,
        base: str,
        name: str,
        config: PreTrainedConfig,
        heads: dict[str, Any],
        learning: LearningOptions,
        length: LengthOptions,
        output: RunOptions,
        *,
        usual: Defaults,
        coupling_only: bool = False,
        lora_rank: int | None = None,
    ) -> Run:
        """Decide by device, model and preset what was left open.

        Args:
            usual: what goes for options that are left out.

        Raises:
            InputError: options out of range, or that the model does not allow.
        """
        if heads.get("head") == "eagle3" or getattr(config, "sequential", False):
            learning = replace(learning, freeze=True, kl=1.0 if learning.kl is None else learning.kl)
        if output.feature_cache is not None and not learning.freeze:
            raise InputError("--feature-cache keeps what a frozen base computes; give --freeze as well.")
        device = output.torch_device()
        count, gpu_memory = output.planned_gpus or (ranks.size(), device_memory(device))
        on_gpu, full = gpu_memory is not None, not learning.freeze and lora_rank is None
        decided: dict[str, Any] = {
            **learning.rates(usual.rates),
            "batch_size": usual.batch_size if length.batch_size is None else length.batch_size,
            "bf16": on_gpu if output.bf16 is None else output.bf16,
            "steps": 1 if length.steps is None else length.steps,
            "coupling_only": coupling_only,
            "kl": learning.kl or 0.0,
            "shard": count > 1 and (full if length.shard is None else length.shard),
            "accumulation": 1 if length.accumulation is None else length.accumulation,
        }
        given = asdict(learning) | asdict(length) | decided
        run = cls(
            base=base,
            name=name,
            config=config,
            heads=check_heads(base, config, heads),
            device=device,
            attention=output.attention or ("sdpa" if on_gpu else "eager"),
            block_size=block_length(length.block_size, usual.block_size, config),
            options=TrainingOptions(
                **{each.name: given[each.name] for each in fields(TrainingOptions) if each.name in given}
            ),
            steps=length.steps,
            epochs=usual.epochs if length.epochs is None else length.epochs,
            save=weights_to_save(output.save, learning.freeze, config),
            lora_rank=lora_rank or 0,
            ranks=count,
            gpu_memory=gpu_memory,
        )
        if length.accumulation is not None:
            return run
        fitting = fitting_accumulation(
            run.model_of(), run.options, run.block_size, fused=run.fused, gpu_memory=gpu_memory, ranks=count
        )
        return replace(run, options=replace(run.options, accumulation=fitting))

    @property
    def fused(self) -> bool:
        """Whether attention keeps no scores for its backward."""
        return self.attention == "sdpa" and self.gpu_memory is not None

    def of(self, text: Text) -> Run:
        """The run with as many steps as it takes to read `text` for its epochs, unless their number was given."""
        if self.steps is not None:
            return self
        assert isinstance(text.blocks, Blocks)
        steps = max(1, round(self.epochs * text.blocks.num_blocks() / self.options.batch_size))
        return replace(self, steps=steps, options=replace(self.options, steps=steps))

    @property
    def base_only(self) -> bool:
        """Whether the base of a DynaMo model is trained without its heads."""
        return self.heads.get("num_heads") == 1 and getattr(self.config, "num_heads", 1) > 1

    @property
    def vocab_size(self) -> int:
        return self.config.get_text_config().vocab_size

    def open_tokenizer(self, name: str | None) -> Any:
        """The tokenizer called `name`, or the model's own."""
        return open_tokenizer(resolve(name or self.name), vocab_size=self.vocab_size)

    def open_model(self, table: Cooccurrence | None = None) -> DynaMoForCausalLM:
        """The model to train, in float32: a base with new heads, or a DynaMo model with its own."""
        kwargs: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": self.attention}
        torch.manual_seed(self.options.seed)
        if isinstance(self.config, DynaMoConfig):
            model = self._with_changes(DynaMoForCausalLM.from_pretrained(self.name, **kwargs))
        else:
            model = DynaMoForCausalLM.from_base(self.name, **self.heads, **kwargs)
        if table is not None:
            model.cooccurrence = table
        return model if self.options.shard else model.to(self.device)  # type: ignore[arg-type]  # shards go there

    def model_of(self, device: str | torch.device = "meta") -> DynaMoForCausalLM:
        """The model to train without its weights: shapes alone on the "meta" device, elsewhere random numbers."""
        network = skeleton(self.config, device=device)
        with torch.device(device):
            if isinstance(network, DynaMoForCausalLM):
                model = self._with_changes(network)
            else:
                model = DynaMoForCausalLM.from_base(network, **self.heads)
            if self.lora_rank:
                from dynamo_lm.training.lora import TrunkLora

                TrunkLora(model, self.lora_rank)
        model.set_attn_implementation(self.attention)
        return model

    def _with_changes(self, model: DynaMoForCausalLM) -> DynaMoForCausalLM:
        """A DynaMo model, or its base alone, or it with a new coupling."""
        if self.base_only:
            return DynaMoForCausalLM.from_base(model.base, num_heads=1)
        if model.coupling is None and "coupling_rank" in self.heads:
            add_coupling(model, self.heads["coupling_rank"])
        return model


def check_heads(base: str, config: PreTrainedConfig, heads: dict[str, Any]) -> dict[str, Any]:
    """The arguments for heads that are not None.

    Raises:
        InputError: a finished model has others, which cannot be changed. One head is its base alone, and a finished model
            without a coupling may get one.
    """
    heads = {key: value for key, value in heads.items() if value is not None}
    if isinstance(config, DynaMoConfig):
        for key, value in heads.items():
            if (key == "coupling_rank" and config.coupling_rank == 0) or (key == "num_heads" and value == 1):
                continue
            if getattr(config, key) != value:
                raise InputError(f'"{base}" has {key}={getattr(config, key)}, which cannot become {value}; leave it out.')
    return heads


def weights_to_save(save: str | None, freeze: bool, config: PreTrainedConfig) -> str:
    """ "heads" or "full".

    Raises:
        InputError: anything else, or heads of a base that changes.
    """
    if save is None:
        keeps_base = not isinstance(config, DynaMoConfig) or config.weights == "heads"
        save = "heads" if freeze and keeps_base else "full"
    if save not in ("heads", "full"):
        raise InputError(f'--save is "{save}"; give heads or full.')
    if save == "heads" and not freeze:
        raise InputError("--save heads needs --freeze: training changes the base, so heads alone would not fit it.")
    return save


def block_length(given: int | None, usual: int, config: PreTrainedConfig) -> int:
    """Tokens a block: as given, else the usual number, or the model's context if that is shorter.

    Raises:
        InputError: more than the context holds.
    """
    longest = context_limit(config)
    length = given or min(usual, longest)
    if length > longest:
        raise InputError(f"--block-size is {length}, but the model's context is {longest}; give that or less.")
    return length


def load_table(path: str | None, tokenizer: Any, vocab_size: int) -> Cooccurrence | None:
    """The table of --tables.

    Raises:
        InputError: it was counted with another tokenizer.
    """
    if path is None:
        return None
    table = Cooccurrence.load(table_file(path))
    check_table(table, tokenizer, vocab_size, path)
    return table


def carry_out(
    context: typer.Context,
    run: Run,
    model: DynaMoForCausalLM,
    tokenizer: Any,
    text: Text,
    output: RunOptions,
    *,
    finish: Callable[[], None] = lambda: None,
    try_it: str,
) -> None:
    """Train, or go on where the same command stopped, and write the finished model into the run folder's "model".

    Args:
        context: whose root object is the command line, for the record.
        finish: called between training and saving.
        try_it: a command line that does something with the model, whose folder stands for {}.
    """
    out = output.out
    assert out is not None
    if model.config.draft_vocab_size and not isinstance(run.config, DynaMoConfig):
        counts = text.blocks.learned_counts(run.vocab_size)
        ids = draft_tokens(counts, model.config.draft_vocab_size, tokenizer)
        model.sequential_head.set_draft_vocabulary(ids, model.output_weight())
    features = None
    if output.feature_cache is not None:
        limit = int(output.feature_cache * 1e9)
        assert isinstance(text.blocks, Blocks)
        features = FeatureCache(out / "features", model, text.blocks, limit_bytes=limit, bf16=run.options.bf16)
    # 1. The record of the run, or that of the one that is resumed; the first rank keeps it.
    record = provenance.begin(
        context.obj or [],
        base={"name": run.base, "fingerprint": model.config.base_fingerprint},
        model={key: getattr(model.config, key) for key in provenance.IDENTITY["model"]},
        data={**text.facts, **text.identity, **text.sizes(), "block_size": run.block_size},
        options=asdict(run.options)
        | {"attention": run.attention, "device": run.device.type, "lora_rank": run.lora_rank}
        | {"ranks": ranks.size()},
        steps=run.steps,
    )
    if ranks.rank() == 0:
        if latest_checkpoint(out) is not None:
            record["started"] = provenance.check_same_run(out, record) or record["started"]
        provenance.write(out, record)

    # 2. Train; the same command resumes.
    try:
        with training(run.options.steps) as shown:
            train(
                model, text.blocks, text.validation, run.options, out,
                features=features, report=shown.step, report_part=shown.part,
            )  # fmt: skip
    except KeyboardInterrupt:
        newest = latest_checkpoint(out)
        if newest is None:
            message = "stopped before the first checkpoint; the same command begins again."
        else:
            message = f"stopped with a checkpoint of step {step_of(newest):,}; the same command goes on from there."
        typer.echo(f"dynamo-lm: {message}", err=True)
        raise typer.Exit(130) from None
    if ranks.rank() > 0:
        return
    finish()

    # 3. The finished model, with what it takes to use it and to know where it comes from.
    target = out / "model"
    if Path(run.name).is_dir():
        model.config.base_name_or_path = _path_to_base(target, run.name, run.config)
    model.save_pretrained(str(target), weights=run.save)
    tokenizer.save_pretrained(target)
    record |= {"perplexities": _perplexities(out), "finished": provenance.now()}
    provenance.write(out, record)
    provenance.write(target, record)
    if output.json:
        print_json(record | {"model_folder": str(target)})
        return
    if record["perplexities"]:
        print("Perplexities on held-out text, by head; PPL_1:n is per token of n heads together:")
    for key, value in record["perplexities"].items():
        print(f"{key} {value:.2f}")
    print(f"{target}: {run.save} weights, {run.steps} steps; try it: {try_it.format(target)}")


def _path_to_base(target: Path, name: str, config: PreTrainedConfig) -> str | None:
    """The local base relative to the model's folder, so that the two can be moved together and used from anywhere."""
    if isinstance(config, DynaMoConfig):  # whose own base is recorded in the same way
        folders = [source for source in base_sources(name, config) if Path(source).is_dir()]
        if not folders:
            return config.base_name_or_path  # a hub id, or a model of its own
        name = folders[0]
    return os.path.relpath(Path(name).resolve(), target.resolve())


def _perplexities(folder: Path) -> dict[str, float]:
    """Of the last validation in the run's log."""
    for entry in reversed(JsonlLog(folder / "log.jsonl").records):
        if "ppl" in entry:
            heads = {f"PPL_{i}": value for i, value in enumerate(entry["ppl"], start=1)}
            coupled = {f"PPL_{i}|{i - 1}": value for i, value in enumerate(entry.get("ppl_coupled", ()), start=2)}
            return heads | {f"PPL_1:{len(heads)}": entry["ppl_joint"][-1]} | coupled
    return {}
