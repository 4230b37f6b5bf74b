"""`dynamo-lm train`: a base model and text in, a DynaMo model out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynamo_lm.cli.dataclass_options import dataclass_options
from dynamo_lm.cli.options import scratch_folder
from dynamo_lm.cli.training_options import Defaults, HeadOptions, LearningOptions, LengthOptions, RunOptions, TextOptions
from dynamo_lm.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from dynamo_lm.model.presets import Preset

PAPER_BLOCK = 2048  # method.md section 2


@dataclass(frozen=True, kw_only=True)
class TrainTextOptions(TextOptions):
    text_field: Annotated[str | None, 'Field of JSON or Parquet that holds the text. Default: "text".'] = None
    streaming: Annotated[
        bool,
        "Tokenize the text while training reads it, not before the first step. Needs --steps; epochs follow each other.",
    ] = False
    look_ahead: Annotated[int, "With --streaming: tokens that are read ahead, and shuffled among each other."] = 2**22

    def __post_init__(self) -> None:
        if self.look_ahead < 1:
            raise InputError(f"--look-ahead is {self.look_ahead}; give the number of tokens to read ahead, 1 or more.")

    def check_stream(self, steps: int | None, dry_run: bool) -> None:
        """Raises InputError for options that need to know the whole text."""
        if self.streaming and dry_run:
            raise InputError("A dry run with --data measures the whole text; leave --streaming out, or --dry-run.")
        if self.streaming and steps is None:
            raise InputError("A stream does not tell how long it is; give --steps with --streaming.")


@dataclass(frozen=True, kw_only=True)
class NewHeadOptions(HeadOptions):
    layers_per_head: Annotated[int | None, "Decoder layers of each head, 1 or 2. Default: 1."] = None
    feed: Annotated[str | None, "Input of the heads: stem (the penultimate layer; default) or last (the last layer)."] = None
    own_output_embedding: Annotated[
        bool, "Give each head an output embedding of its own. Large; the paper shares the base's."
    ] = False
    adapter_rank: Annotated[
        int | None, "Low-rank adapters of this rank on the last layer instead of new layers; 0 for none. Default: 0."
    ] = None
    coupling: Annotated[
        str | None,
        "learned: low-rank factors that correct each head's logits by the token chosen before its own. They are trained "
        "beside the heads and do not change how those learn.",
    ] = None
    coupling_rank: Annotated[int | None, "Rank of a new coupling. Default: 64."] = None
    coupling_only: Annotated[
        bool, "Train the coupling of a finished DynaMo model and leave its base and heads as they are."
    ] = False

    def arguments(self, base: str, config: PreTrainedConfig, preset: Preset | None) -> dict[str, Any]:
        """Arguments of `DynaMoForCausalLM.from_base`; None for what was not chosen."""
        own = {
            "layers_per_head": self.layers_per_head,
            "feed": self.feed,
            "init": self.init,
            "adapter_rank": self.adapter_rank,
        }
        return {
            "num_heads": int(base.rpartition("-T")[2]) if preset and self.heads is None else self.heads,
            "own_output_embedding": self.own_output_embedding or None,
            **own,
            **self.kind(any(value is not None for value in own.values())),
            "coupling_rank": self._coupling_rank(base, config),
        }

    def _coupling_rank(self, base: str, config: PreTrainedConfig) -> int | None:
        """The rank of the coupling that the model is to have, or None for what it has."""
        from dynamo_lm.model.configuration import DynaMoConfig
        from dynamo_lm.model.coupling import RANK

        if self.coupling not in (None, "learned"):
            raise InputError(f'--coupling is "{self.coupling}"; give learned, or leave it out.')
        if self.coupling_only and not isinstance(config, DynaMoConfig):
            raise InputError(f'--coupling-only needs a model with finished heads, and "{base}" has none; leave it out.')
        if self.coupling is None and not self.coupling_only:
            if self.coupling_rank is not None:
                raise InputError("--coupling-rank goes with --coupling learned.")
            return None
        if self.coupling_rank is not None and self.coupling_rank < 1:
            raise InputError(f"--coupling-rank is {self.coupling_rank}; give 1 or more.")
        return self.coupling_rank or getattr(config, "coupling_rank", 0) or RANK


@dataclass_options
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
    text: TrainTextOptions,
    heads: NewHeadOptions,
    learning: LearningOptions,
    length: LengthOptions,
    output: RunOptions,
) -> None:
    """Add heads to a language model and train them on text.

    The quickest useful run, which does not change the base:

    `dynamo-lm train BASE --data stories.jsonl --freeze --init copy --out runs/mine`

    Ctrl-C stops it; the same command resumes.
    """
    from dynamo_lm.cli.dry_run import describe
    from dynamo_lm.cli.training_run import Run, carry_out, load_table
    from dynamo_lm.cli.training_text import read_stream, read_text
    from dynamo_lm.data.token_store import tokenize
    from dynamo_lm.model.loading import open_config, resolve
    from dynamo_lm.model.presets import PAPER, PRESETS

    with output.ranks():
        # 1. Validate arguments. The shape of a preset is known, so a dry run of one needs no hub.
        output.check_text(text.data)
        text.check_stream(length.steps, output.dry_run)
        if text.streaming and output.feature_cache is not None:
            raise InputError("--feature-cache keeps blocks that come again, which those of a stream do not; leave it out.")
        preset = PRESETS.get(base)
        name = resolve(preset.base if preset else base)
        config = preset.base_config(PAPER_BLOCK) if preset and output.dry_run else open_config(name)
        run = Run.plan(
            base,
            name,
            config,
            heads.arguments(base, config, preset),
            replace(learning, freeze=learning.freeze or heads.coupling_only),
            length,
            output,
            usual=Defaults(
                block_size=PAPER_BLOCK if preset else 512,
                batch_size=64 if preset else 16,
                epochs=1.0,
                rates=(preset or PAPER).rates,
            ),
            coupling_only=heads.coupling_only,
        )

        # 2. Read the text.
        corpus = tokenizer = table = None
        if text.data:
            tokenizer = run.open_tokenizer(text.tokenizer)
            table = load_table(heads.tables, tokenizer, run.vocab_size)
            folder = output.out or scratch_folder()
            if text.streaming:
                corpus = read_stream(
                    text.data,
                    text,
                    tokenizer,
                    folder,
                    run.block_size,
                    run.options.seed,
                    look_ahead=text.look_ahead,
                    text_field=text.text_field,
                )
            else:
                read = partial(tokenize, tokenizer=tokenizer, text_field=text.text_field)
                corpus = read_text(text.data, text, read, folder, run.block_size, run.options.seed)
            run = run.of(corpus)

        # 3. Train.
        if output.dry_run:
            describe(run, corpus, output)
            return
        assert corpus is not None
        carry_out(context, run, run.open_model(table), tokenizer, corpus, output, try_it="dynamo-lm generate {} PROMPT")
