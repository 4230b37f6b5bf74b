"""Options that `train` and `finetune` share, beside those that `TrainingOptions` declares itself."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from dynamo_lm.cli.options import ComputeOptions, Tokenizer, only_the_first_rank_prints
from dynamo_lm.errors import InputError
from dynamo_lm.training.options import OptimizerOptions, ScheduleOptions

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What goes for options that are left out; the command decides."""

    block_size: int
    batch_size: int
    epochs: float
    rates: Mapping[str, float]  # lr_b, lr_m, lr_mb


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """What to train on, and what to measure on."""

    PANEL: ClassVar[str] = "The text"

    data: Annotated[
        list[str] | None,
        "Text to train on: a file (.txt, .jsonl, .json, .parquet), a folder, a glob or a `datasets` id; may be given "
        "several times. Use text like that which the model will write.",
    ] = None
    validation: Annotated[list[str] | None, "Text to measure on, in the same forms. Default: a share of --data."] = None
    validation_fraction: Annotated[
        float, "Share of the documents held out to measure on, if there is no --validation; 0 measures nothing."
    ] = 0.03
    tokenizer: Tokenizer = None


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """The heads of a model that has none, and the table of the finished one."""

    PANEL: ClassVar[str] = "The heads"

    heads: Annotated[
        int | None, "Number of heads, the base's own included: the most tokens a step can give. Default: 3."
    ] = None
    head: Annotated[
        str | None,
        "Kind of head: layer (decoder layers beside the last one: the method; default), medusa (a residual block and an "
        "output embedding of its own on the last layer's state, for comparison) or eagle3 (one sequential head, whose steps "
        "see each other's tokens; other programs can serve it, see `dynamo-lm export`; the base is frozen).",
    ] = None
    draft_vocabulary: Annotated[
        int | None,
        "Tokens that an eagle3 head can draft: the commonest of the text, and all bytes and special tokens. Default: all.",
    ] = None
    init: Annotated[
        str | None, "Initial weights of new heads: random (the paper; default) or copy (of the last layer; learns faster)."
    ] = None
    tables: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Put this table, made by `dynamo-lm count`, into the finished model, in place of any of its own.",
        ),
    ] = None

    def kind(self, has_layer_options: bool) -> dict[str, Any]:
        """Arguments of `DynaMoConfig` for a kind of head; none for the default, whose parts have options of their own."""
        from dynamo_lm.model.configuration import MEDUSA

        if self.head not in (None, "layer", "medusa", "eagle3"):
            raise InputError(f'--head is "{self.head}"; give layer, medusa or eagle3.')
        if self.draft_vocabulary is not None and self.head != "eagle3":
            raise InputError("--draft-vocabulary goes with --head eagle3, for new heads; those that are there keep theirs.")
        if self.head == "eagle3":
            return {"head": "eagle3", "num_heads": self.heads or 4, "draft_vocab_size": self.draft_vocabulary}
        if self.head != "medusa":
            return {}
        if has_layer_options:
            raise InputError(
                "Heads of the medusa kind have no layers; leave --layers-per-head out, and --feed, --init and "
                "--adapter-rank."
            )
        return MEDUSA


@dataclass(frozen=True, kw_only=True)
class LearningOptions(OptimizerOptions):
    """Which weights learn, and how fast. Rates that are None depend on the model and on what else was chosen."""

    PANEL: ClassVar[str] = "How they learn"

    freeze: Annotated[
        bool,
        typer.Option(
            "--freeze/--no-freeze",
            help="Train the new heads only. The base does not change, training takes less memory and time, and the "
            "result is a small folder of heads.",
        ),
    ] = False
    lr_b: Annotated[float | None, "Learning rate of the base, from its own loss. Default: 1e-5."] = None
    lr_m: Annotated[float | None, "Learning rate of the new heads. Default: 1e-3."] = None
    lr_mb: Annotated[float | None, "Learning rate of the base, from the new heads' losses. Default: 1e-6."] = None
    kl: Annotated[
        float | None,
        "Share of the loss of heads 2.. that is the divergence from the base's own distribution at the predicted place; the "
        "rest is the text's token. Default: 0, which is the paper; of the kind eagle3 1.",
    ] = None

    def __post_init__(self) -> None:
        if self.freeze and (self.lr_b or self.lr_mb):
            raise InputError("--freeze leaves the base as it is, so --lr-b and --lr-mb have no meaning; leave them out.")

    def rates(self, usual: Mapping[str, float]) -> dict[str, float]:
        """lr_b, lr_m and lr_mb: as given, else as usual; 0 for a frozen base."""
        given = vars(self) | ({"lr_b": 0.0, "lr_mb": 0.0} if self.freeze else {})
        return {name: rate if given[name] is None else given[name] for name, rate in usual.items()}


@dataclass(frozen=True, kw_only=True)
class LengthOptions(ScheduleOptions):
    """How large a step is, and how many there are."""

    PANEL: ClassVar[str] = "How long"

    block_size: Annotated[
        int | None,
        "Tokens a block. Default: 512 (2048 with a preset), or the model's context if shorter.",
    ] = None
    batch_size: Annotated[int | None, "Blocks per step. Default: 16 (64 with a preset)."] = None
    accumulation: Annotated[
        int | None,
        "Forward passes a step is split into, for less memory and, but for rounding, the same result. Default: the fewest "
        "that keep the activations of a pass below 1 GB, or that fit a GPU.",
    ] = None  # type: ignore[assignment]  # the command decides by memory
    shard: Annotated[
        bool | None,
        typer.Option(
            "--shard/--no-shard",
            help="With torchrun: split weights, gradients and optimizer state over the ranks (FSDP2), or keep all on each. "
            "Default: split where the base learns.",
        ),
    ] = None
    steps: Annotated[int | None, "Number of optimizer steps."] = None
    epochs: Annotated[float | None, "Passes over the text, instead of --steps. Default: 1."] = None

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise InputError("Give either --steps or --epochs, not both.")
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise InputError(f"--epochs is {self.epochs}; give a number above 0.")


@dataclass(frozen=True, kw_only=True)
class RunOptions(ComputeOptions):
    """What to compute with, and what to write."""

    PANEL: ClassVar[str] = "Machine and output"

    bf16: Annotated[
        bool | None,
        typer.Option(
            "--bf16/--fp32",
            help="Compute in bfloat16 or float32; weights are float32 either way. Default: bf16 on GPUs.",
        ),
    ] = None
    attention: Annotated[
        str | None, "sdpa (fused) or eager (plain). Default: eager on CPUs, where it trains faster, sdpa on GPUs."
    ] = None
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Run folder: log, checkpoints, and at the end the finished model in FOLDER/model. The same command on "
            "the same folder resumes.",
        ),
    ] = None
    feature_cache: Annotated[
        float | None,
        typer.Option(
            metavar="GB",
            help="With --freeze, conversations and several epochs: keep what the base computes on disk, in FOLDER/features, "
            "up to this size, so that later epochs cost the heads alone.",
        ),
    ] = None
    rank_timeout: Annotated[
        float, "With torchrun: minutes that a rank waits for the others, before the job ends with a message."
    ] = 10.0
    save: Annotated[
        str | None, "heads (small; the base is fetched by its name) or full. Default: heads if the base was frozen."
    ] = None
    dry_run: Annotated[
        bool, "Print parameters, memory, steps and, with --data, hours (one pass of a step is measured); train nothing."
    ] = False
    plan: Annotated[
        str | None,
        typer.Option(
            metavar="GPUSxGB",
            help="With --dry-run: for so many GPUs of so much memory, such as 8x80, in place of this machine; --bf16 and "
            "--attention sdpa by default.",
        ),
    ] = None
    plan_tokens: Annotated[float | None, "With --plan: how long so many tokens take, such as 10e9."] = None
    plan_tflops: Annotated[
        float,
        "With --plan-tokens: 10^12 operations per second that a GPU sustains; 400 are 40 % of an H100's peak in bfloat16.",
    ] = 400.0
    json: Annotated[bool, "Print the result as JSON."] = False

    def __post_init__(self) -> None:
        if self.attention not in (None, "sdpa", "eager"):
            raise InputError(f'--attention is "{self.attention}"; give sdpa or eager.')
        if self.planned_gpus is not None and not self.dry_run:
            raise InputError("--plan goes with --dry-run.")
        if self.plan_tokens is not None and (self.plan is None or not 0 < self.plan_tokens < math.inf):
            raise InputError("--plan-tokens goes with --plan and is a number above 0.")
        if not self.plan_tflops > 0:
            raise InputError(f"--plan-tflops is {self.plan_tflops}; give a number above 0.")
        if not self.rank_timeout > 0:
            raise InputError(f"--rank-timeout is {self.rank_timeout}; give minutes above 0.")
        if self.feature_cache is not None and not self.feature_cache > 0:
            raise InputError(f"--feature-cache is {self.feature_cache}; give a size in GB above 0.")

    @property
    def planned_gpus(self) -> tuple[int, int] | None:
        """Number and bytes of --plan."""
        if self.plan is None:
            return None
        count, _, size = self.plan.partition("x")
        try:
            gpus, memory = int(count), int(float(size) * 1e9)
        except ValueError:
            gpus = memory = 0
        if gpus < 1 or memory < 1:
            raise InputError(f'--plan is "{self.plan}"; give GPUs and GB of each, such as 8x80.')
        return gpus, memory

    def torch_device(self) -> torch.device:
        from dynamo_lm.training import ranks

        return ranks.own_device(super().torch_device())

    @contextmanager
    def ranks(self) -> Iterator[None]:
        """The group of the ranks that torchrun started, of which the first alone prints."""
        from dynamo_lm.training import ranks

        with ranks.process_group(self.torch_device(), self.rank_timeout), only_the_first_rank_prints():
            yield

    def check_text(self, data: list[str] | None) -> None:
        """Raises InputError for a run without a text or a folder; a dry run needs neither."""
        if not data and not self.dry_run:
            raise InputError("There is nothing to train on; name a text with --data.")
        if self.out is None and not self.dry_run:
            raise InputError("Say where the run goes with --out FOLDER.")
