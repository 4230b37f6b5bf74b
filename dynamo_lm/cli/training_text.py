"""The text of `train` and `finetune`: tokens that are on disk before the first step, or a stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import typer

from dynamo_lm.cli.progress import tokenizing
from dynamo_lm.cli.training_options import TextOptions
from dynamo_lm.data.packing import Blocks, TrainingBlocks, WholeBlocks
from dynamo_lm.data.streaming import TextStream
from dynamo_lm.data.token_store import TokenStore, build_store, digest, token_ids, tokenize, tokenizer_fingerprint
from dynamo_lm.errors import InputError
from dynamo_lm.training import ranks
from dynamo_lm.training.shared_stream import shared_blocks
from dynamo_lm.training.validation import BLOCKS


@dataclass(frozen=True)
class Text:
    """What is trained on, and what is measured on."""

    blocks: TrainingBlocks
    validation: Blocks | None
    identity: dict[str, Any]  # for the record: fingerprint, tokenizer, documents, look_ahead; None of what is not known
    facts: dict[str, Any] = field(default_factory=dict)  # for the record: where it comes from

    @classmethod
    def on_disk(cls, blocks: Blocks, validation: Blocks | None, facts: dict[str, Any]) -> Text:
        """A text that is tokenized."""
        store = blocks.store
        identity = {"fingerprint": store.fingerprint, "tokenizer": store.tokenizer, "documents": len(store)}
        return cls(blocks, validation, identity | {"look_ahead": None}, facts)

    def sizes(self) -> dict[str, int | None]:
        """Tokens to train on, None of a stream, and to measure on."""
        validation_tokens = self.validation.total if self.validation else 0
        return {"training_tokens": getattr(self.blocks, "total", None), "validation_tokens": validation_tokens}


def read_text(
    sources: list[str],
    options: TextOptions,
    tokenize: Callable[..., TokenStore],
    folder: Path,
    block_size: int,
    seed: int,
    *,
    account: Callable[[TokenStore], None] = lambda store: None,
    **facts: Any,
) -> Text:
    """Tokenize `sources`, and hold out a part unless there is a text to measure on; conversations stay whole.

    Where there are several ranks the first tokenizes and the others open what it wrote.

    Args:
        tokenize: takes sources, folder=.., progress=...
        folder: where the tokens are kept.
        account: called with the tokens of `sources` before they are split.
        facts: for the record.

    Raises:
        InputError: too little text.
    """
    held_out = None
    with ranks.first_rank_first("tokens"), tokenizing() as progress:
        store = tokenize(sources, folder=folder / "tokens", progress=progress)
        if options.validation:
            held_out = tokenize(options.validation, folder=folder / "validation", progress=progress)
    account(store)
    kind, documents = (Blocks, "documents") if store.responses is None else (WholeBlocks, "conversations")
    ids, validation_ids = store.split(0.0 if held_out is not None else options.validation_fraction, seed)
    facts = {
        "sources": options.data,
        "validation_sources": options.validation or f"{options.validation_fraction:g} of the {documents}, seed {seed}",
        **facts,
        **store.facts,
    }
    blocks, validation = kind(store, ids, block_size, seed=seed), None
    if held_out is not None:
        validation_ids = np.arange(len(held_out))
    if len(validation_ids) > 0:
        validation = _to_measure_on(kind, held_out or store, validation_ids, block_size, seed)
    return Text.on_disk(blocks, validation, facts)


def read_stream(
    sources: Sequence[str],
    options: TextOptions,
    tokenizer: Any,
    folder: Path,
    block_size: int,
    seed: int,
    *,
    look_ahead: int,
    text_field: str | None = None,
) -> Text:
    """A text that is tokenized while it is trained on, in windows of `look_ahead` tokens.

    The first rank reads, and the others get its windows.

    Args:
        folder: of the run, for what is measured on and for the log of windows.

    Raises:
        InputError: files that cannot be read, or too little text to measure on.
    """
    length = max(1, look_ahead // block_size) * block_size
    held_out = 0.0 if options.validation else options.validation_fraction
    stream = TextStream(sources, tokenizer, length, seed=seed, held_out=held_out, text_field=text_field)
    blocks = shared_blocks(stream, folder, block_size)
    validation = None
    if options.validation or held_out:
        with ranks.first_rank_first("tokens"), tokenizing() as progress:
            if options.validation:
                store = tokenize(
                    options.validation, tokenizer, folder / "validation", text_field=text_field, progress=progress
                )
            else:
                inputs = digest([stream.fingerprint, seed, BLOCKS * block_size])
                rows = ((ids, None) for ids in token_ids(stream.held_out_texts(), tokenizer))
                limit = BLOCKS * block_size
                store = build_store(folder / "validation", inputs, rows, tokenizer, limit_tokens=limit, progress=progress)
        validation = _to_measure_on(Blocks, store, np.arange(len(store)), block_size, seed)
    typer.echo(f"dynamo-lm: reading {length:,} tokens ahead.", err=True)
    return Text(
        blocks,
        validation,
        {"fingerprint": stream.fingerprint, "tokenizer": tokenizer_fingerprint(tokenizer), "documents": None}
        | {"look_ahead": length},
        {
            "sources": options.data,
            "validation_sources": options.validation
            or f"{held_out:g} of the documents, seed {seed}, the first {BLOCKS} blocks of them",
        },
    )


def _to_measure_on(kind: type[Blocks], store: TokenStore, documents: np.ndarray, block_size: int, seed: int) -> Blocks:
    """Blocks of held-out text, in their order.

    Raises:
        InputError: too little text.
    """
    try:
        return kind(store, documents, block_size, seed=seed, shuffle=False)
    except InputError as error:
        raise InputError(
            f"There is too little text to measure on (--validation-fraction 0 does without). {error}"
        ) from error
