"""`dynamo-lm finetune`: a model and conversations in, a model that answers out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from dynamo_lm.cli.dataclass_options import dataclass_options
from dynamo_lm.cli.judge_options import JudgeOptions
from dynamo_lm.cli.options import scratch_folder
from dynamo_lm.cli.training_options import Defaults, HeadOptions, LearningOptions, LengthOptions, RunOptions, TextOptions
from dynamo_lm.errors import InputError

if TYPE_CHECKING:
    from dynamo_lm.cli.training_run import Run
    from dynamo_lm.model.modeling import DynaMoForCausalLM

BATCH = 16


@dataclass(frozen=True, kw_only=True)
class ConversationOptions(TextOptions):
    data: Annotated[
        list[str] | None,
        "Conversations: a file (.jsonl, .json, .parquet), a folder, a glob or a `datasets` id, in the form of OpenAI "
        "(messages), ShareGPT, Alpaca or Dolly; may be given several times.",
    ] = None
    template: Annotated[
        Path | None,
        "File with a chat template in the form of transformers. Default: the tokenizer's own, else a plain one.",
    ] = None

    def read_template(self) -> str | None:
        """The chat template's text."""
        if self.template is None:
            return None
        try:
            return self.template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f'The chat template "{self.template}" cannot be read; give a text file.') from error


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    PANEL: ClassVar[str] = "Which answers"

    keep: Annotated[
        int | None,
        "Keep only so many conversations, the best as the judge sees them (--reference or --endpoint). "
        "The paper keeps 9229.",
    ] = None
    self_distill: Annotated[
        bool, "Learn MODEL's own answers to the questions, written before tuning, in place of the data's."
    ] = False
    distill_share: Annotated[
        float, "Share of the conversations that MODEL answers itself; the others keep the data's answers."
    ] = 1.0
    distill_tokens: Annotated[int, "Longest such answer; one that does not end is kept up to here."] = 512
    distill_temperature: Annotated[float, "Sampling temperature of these answers; 0 for the likeliest tokens."] = 0.7
    distill_batch: Annotated[int, "Answers per batch."] = 32
    distill_endpoint: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL",
            help="Let an OpenAI-compatible server that holds MODEL (vLLM, llama.cpp) write them, such as "
            "http://localhost:8000/v1; several servers take requests in turn.",
        ),
    ] = None
    distill_model: Annotated[str | None, "Name of the model at that server. Default: MODEL."] = None

    def __post_init__(self) -> None:
        if not 0 < self.distill_share <= 1:
            raise InputError(f"--distill-share is {self.distill_share}; give a share above 0, up to 1.")
        if self.distill_batch < 1:
            raise InputError(f"--distill-batch is {self.distill_batch}; give 1 or more.")


@dataclass(frozen=True, kw_only=True)
class TunedHeadOptions(HeadOptions):
    heads: Annotated[
        int | None,
        "Heads of a base that has none, its own included. Default: 3. 1 tunes the base alone, also that of a DynaMo model: "
        "something to compare with.",
    ] = None
    count: Annotated[
        bool | None,
        typer.Option(
            "--count/--no-count",
            help="Count the answers that are learned and add them to the table. Default: if there is a table.",
        ),
    ] = None
    count_weight: Annotated[int, "How many times these answers are added."] = 1

    def __post_init__(self) -> None:
        if self.count_weight < 1:
            raise InputError(f"--count-weight is {self.count_weight}; give 1 or more, or --no-count.")
        if self.heads == 1 and (self.count or self.tables is not None):
            raise InputError("A table makes heads agree, and --heads 1 has none; leave --tables and --count out.")


@dataclass(frozen=True, kw_only=True)
class TuningOptions(LearningOptions):
    warmup: Annotated[float, "Share of the steps in which the learning rates rise."] = 0.03
    lora_rank: Annotated[
        int | None,
        "Low-rank changes of this rank to the base in place of changing all of it (peft); heads train in full. They are "
        "merged at the end.",
    ] = None
    lr_b: Annotated[
        float | None,
        "Learning rate of the base, from its own loss. Default: 1e-5, with --lora-rank 1e-4 (and --lr-mb 1e-5).",
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.freeze and self.lora_rank is not None:
            raise InputError("--freeze leaves the base as it is and --lora-rank changes it; give one of them.")


@dataclass(frozen=True, kw_only=True)
class TuningLengthOptions(LengthOptions):
    block_size: Annotated[
        int | None,
        "Tokens a block; a longer conversation is cut after an answer or left out. Default: 2048, or the "
        "model's context if shorter.",
    ] = None
    batch_size: Annotated[int, "Blocks per step."] = BATCH
    epochs: Annotated[float | None, "Passes over the conversations, instead of --steps. Default: 3."] = None


@dataclass_options
def finetune(
    context: typer.Context,
    base: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help='The model to tune: a DynaMo folder or hub id, "story" for the bundled one, or a base model, which '
            "gets heads.",
        ),
    ],
    text: ConversationOptions,
    answers: AnswerOptions,
    judge: JudgeOptions,
    heads: TunedHeadOptions,
    learning: TuningOptions,
    length: TuningLengthOptions,
    output: RunOptions,
) -> None:
    """Tune a model on conversations: base and heads together, on the answers only.

    `dynamo-lm finetune story --data conversations.jsonl --out runs/chat`

    Ctrl-C stops it; the same command resumes.
    """
    from dynamo_lm.cli.conversations import account
    from dynamo_lm.cli.dry_run import describe
    from dynamo_lm.cli.training_run import Run, carry_out, load_table
    from dynamo_lm.cli.training_text import read_text
    from dynamo_lm.data.chat_template import chat_template
    from dynamo_lm.data.packing import Blocks
    from dynamo_lm.data.tokenize_chat import tokenize_conversations
    from dynamo_lm.model.loading import open_config, resolve
    from dynamo_lm.model.presets import PAPER
    from dynamo_lm.training import ranks
    from dynamo_lm.training.answer_table import add_answers
    from dynamo_lm.training.lora import TrunkLora

    with output.ranks():
        # 1. Validate arguments.
        output.check_text(text.data)
        if answers.keep is not None and not judge.chosen:
            raise InputError("--keep needs a judge: --reference or --endpoint.")
        if answers.keep is None and judge.chosen:
            raise InputError("A judge needs to know how many conversations to keep: --keep.")
        name = resolve(base)
        config = open_config(name)
        lora_rates = {} if learning.lora_rank is None else {"lr_b": 1e-4, "lr_mb": 1e-5}  # about ten times those of weights
        run = Run.plan(
            base,
            name,
            config,
            {"num_heads": heads.heads, "init": heads.init, **heads.kind(heads.init is not None)},
            learning,
            length,
            output,
            usual=Defaults(block_size=2048, batch_size=BATCH, epochs=3.0, rates=PAPER.rates | lora_rates),
            lora_rank=learning.lora_rank,
        )
        tokenizer = run.open_tokenizer(text.tokenizer)
        chat_template(tokenizer, text.read_template())
        table = load_table(heads.tables, tokenizer, run.vocab_size)

        # 2. Read the conversations: the best of them, with answers of the model's own if so chosen.
        folder = output.out or scratch_folder()
        corpus = model = None
        if text.data:
            sources: list[str] = list(text.data)
            facts: dict[str, Any] = {}
            if not output.dry_run:
                with ranks.first_rank_first("answers"):
                    if ranks.rank() == 0:
                        sources, model, facts = _choose(sources, run, tokenizer, folder, answers, judge, output.device)
                sources, facts = ranks.of_first((sources, facts))
            read = partial(tokenize_conversations, tokenizer=tokenizer, longest=run.block_size)
            corpus = read_text(
                sources, text, read, folder, run.block_size, run.options.seed,
                account=lambda store: typer.echo(f"dynamo-lm: {account(store.facts, run.block_size)}", err=True), **facts,
            )  # fmt: skip
            run = run.of(corpus)

        # 3. Train.
        if output.dry_run:
            if answers.self_distill:
                typer.echo("dynamo-lm: the time below does not include the answers of --self-distill.", err=True)
            describe(run, corpus, output)
            return
        assert corpus is not None
        model = model or run.open_model()
        if table is not None:
            model.cooccurrence = table
        _end_after_turns(model, tokenizer)
        lora = TrunkLora(model, learning.lora_rank) if learning.lora_rank is not None else None

        def finish() -> None:
            if lora is not None:
                lora.merge()
            if model.num_heads > 1 and (heads.count or (heads.count is None and model.cooccurrence is not None)):
                assert isinstance(corpus.blocks, Blocks)
                add_answers(model, corpus.blocks.store, corpus.blocks.documents, heads.count_weight)

        carry_out(context, run, model, tokenizer, corpus, output, finish=finish, try_it="dynamo-lm chat {}")


def _choose(
    sources: list[str],
    run: Run,
    tokenizer: Any,
    folder: Path,
    answers: AnswerOptions,
    judge: JudgeOptions,
    device: str,
) -> tuple[list[str], DynaMoForCausalLM | None, dict[str, Any]]:
    """The conversations to learn, the model if it answered them itself, and facts for the record."""
    from dynamo_lm.cli.conversations import distilled, keep_best
    from dynamo_lm.training.self_distill import Answerer, BatchAnswerer, EndpointAnswerer

    facts: dict[str, Any] = {}
    model = None
    if answers.keep is not None:
        opened = judge.open(folder, device)
        assert opened is not None
        sources = keep_best(sources, opened, answers.keep, folder, judge.yes, facts)
    if answers.self_distill:
        answerer: Answerer
        if not answers.distill_endpoint:
            model = run.open_model()
            answerer = BatchAnswerer(
                model.eval(), tokenizer, temperature=answers.distill_temperature, batch_size=answers.distill_batch
            )
        else:
            name = answers.distill_model or run.name
            answerer = EndpointAnswerer(
                *answers.distill_endpoint,
                model=name,
                temperature=answers.distill_temperature,
                requests=answers.distill_batch,
            )
        sources = distilled(
            sources,
            answerer,
            tokenizer,
            folder,
            facts,
            share=answers.distill_share,
            longest=run.block_size,
            max_new_tokens=answers.distill_tokens,
            seed=run.options.seed,
        )
    return sources, model, facts


def _end_after_turns(model: DynaMoForCausalLM, tokenizer: Any) -> None:
    """End generation where it ended before, if that is a special token, at the end of text and at the end of a turn."""
    from dynamo_lm.backbone.token_limits import token_ids
    from dynamo_lm.data.chat_template import end_of_turn, special_tokens

    special = special_tokens(tokenizer)
    kept = [token for token in token_ids(model.generation_config.eos_token_id) if token in special]
    stops = token_ids([*kept, tokenizer.eos_token_id, end_of_turn(tokenizer)])
    model.generation_config.eos_token_id = stops[0] if len(stops) == 1 else stops
