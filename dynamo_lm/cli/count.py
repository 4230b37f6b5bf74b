"""`dynamo-lm count`: text in, a co-occurrence table out."""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynamo_lm.errors import InputError

if TYPE_CHECKING:
    from dynamo_lm.cooccurrence.table import Cooccurrence

TEXT, TABLE = "The text", "The table"


def count(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL",
            help="The model (folder or hub id) whose tokens are counted. With --merge: two or more tables instead.",
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to count: a file (.txt, .jsonl, .json, .parquet), a folder, a glob or a `datasets` id; may be "
            "given several times. Best the text that the heads are trained on.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    text_field: Annotated[
        str | None,
        typer.Option(
            "--text-field", help='Field of JSON or Parquet that holds the text. Default: "text".', rich_help_panel=TEXT
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Tokenizer folder or hub id, if MODEL does not bring its own.", rich_help_panel=TEXT),
    ] = None,
    validation_fraction: Annotated[
        float,
        typer.Option(
            "--validation-fraction",
            help="Share of the documents to leave out: with the same value and seed, those that `train` holds out, so "
            "that what is measured on them stays honest. 0 counts everything.",
            rich_help_panel=TEXT,
        ),
    ] = 0.03,
    seed: Annotated[int, typer.Option(help="Which documents that share is.", rich_help_panel=TEXT)] = 0,
    tokens: Annotated[
        Path | None,
        typer.Option(
            "--tokens",
            help="Folder to keep the tokenized text in, for the next count. Default: a temporary one.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    order: Annotated[
        int,
        typer.Option(
            min=2,
            max=4,
            help="Longest sequence counted: 2 pairs, 3 triples, 4 quadruples. As many as the heads you use.",
            rich_help_panel=TABLE,
        ),
    ] = 3,
    min_count: Annotated[
        str,
        typer.Option(
            "--min-count",
            help='Drop sequences seen fewer times than this: one number, or by length, as "2:1,3:2" (pairs from 1, '
            "triples from 2). Higher makes a smaller table.",
            rich_help_panel=TABLE,
        ),
    ] = "1",
    memory_mb: Annotated[
        float,
        typer.Option(
            "--memory-mb",
            help="Working memory in MB; text of any size is counted in it, with temporary files. The table itself "
            "comes on top.",
            rich_help_panel=TABLE,
        ),
    ] = 1024,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where the table goes: a DynaMo model folder, or a file ending in .safetensors. Default: MODEL, if "
            "it is a DynaMo folder.",
            rich_help_panel=TABLE,
        ),
    ] = None,
    merge: Annotated[
        bool,
        typer.Option(
            "--merge",
            help="Add up tables that were counted separately, as in --merge A B --out C.",
            rich_help_panel=TABLE,
        ),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print what was counted as JSON.")] = False,
) -> None:
    """Count which tokens follow each other, for the mask that makes the heads agree.

    A table belongs to a tokenizer: `generate` finds it in the model's folder and refuses one made for another.

    `dynamo-lm count runs/mine/model --data stories.jsonl`
    """
    from dynamo_lm.cli.info import summary
    from dynamo_lm.cooccurrence.table import Cooccurrence
    from dynamo_lm.model.loading import print_json

    began = time.perf_counter()
    counted = 0
    if merge:
        from dynamo_lm.model.loading import table_file

        if len(names) < 2:
            raise InputError("--merge adds up two or more tables; name them, as in `dynamo-lm count --merge A B --out C`.")
        if data:
            raise InputError("--merge takes tables, not --data; count the text first.")
        if out is None:
            raise InputError("Say where the merged table goes with --out.")
        table = Cooccurrence.merge(*(Cooccurrence.load(table_file(name)) for name in names))
        minimum = minimum_counts(min_count, table.order)
        if minimum != 1:
            table = table.prune(minimum)
        target = destination(out, table)
    else:
        if len(names) != 1:
            raise InputError(f"Name one model, not {len(names)}; several tables are added up with --merge.")
        if not data:
            raise InputError("There is nothing to count; name a text with --data.")
        table, target = _count(
            names[0], data, text_field, tokenizer, validation_fraction, seed, tokens, order, min_count, memory_mb, out
        )
        counted = table.totals[0]
    table.save(target)
    seconds = time.perf_counter() - began
    facts: dict[str, Any] = {"file": str(target)} | summary(table, target)
    facts |= {"seconds": round(seconds, 2), "tokens_per_second": round(counted / seconds)}
    if json:
        print_json(facts)
        return
    for m, name in enumerate(("tokens", "pairs", "triples", "quadruples")[: table.order], start=1):
        least = f", seen {table.min_counts[m - 1]} times or more" if table.min_counts[m - 1] > 1 else ""
        pruned = f", pruned mass {table.pruned_mass[m - 1]:.2%}" if m > 1 else ""
        print(f"{name}: {table.num_rows(m):,} kept of {table.totals[m - 1]:,} counted{least}{pruned}")
    rate = f", {facts['tokens_per_second']:,} tokens/s" if counted else ""
    print(f"{target}: {facts['megabytes']} MB in {seconds:.1f} s{rate}")


def minimum_counts(text: str, order: int) -> dict[int, int] | int:
    """ "2" -> 2; "2:1,3:2" -> {2: 1, 3: 2}."""
    try:
        if ":" not in text:
            value: dict[int, int] | int = int(text)
        else:
            value = {int(key): int(least) for key, least in (part.split(":") for part in text.split(","))}
    except ValueError as error:
        raise InputError(f'--min-count is "{text}"; give a number, or numbers by length as in "2:1,3:2".') from error
    from dynamo_lm.cooccurrence.table import check_min_counts

    check_min_counts(value, order)
    return value


def destination(out: Path, table: Cooccurrence | None = None, tokenizer: Any = None) -> Path:
    """The file that a table goes to; a model folder must be one that the table, or its tokenizer, fits.

    Raises:
        InputError: a folder without a DynaMo model, or one with another tokenizer or vocabulary.
    """
    from dynamo_lm.data.token_store import tokenizer_fingerprint
    from dynamo_lm.model.checkpoint import TABLE_FILE
    from dynamo_lm.model.configuration import DynaMoConfig
    from dynamo_lm.model.loading import check_table, open_config, open_tokenizer

    if not out.is_dir():
        if out.suffix != ".safetensors":
            raise InputError(f'"{out}" is no model folder; give one, or a file name that ends in .safetensors.')
        if not out.parent.is_dir():
            raise InputError(f'"{out.parent}" does not exist; make that folder first.')
        return out
    config = open_config(str(out))
    if not isinstance(config, DynaMoConfig):
        raise InputError(f'"{out}" has no DynaMo heads; add some with `dynamo-lm train`, or give a file name.')
    own = open_tokenizer(str(out), vocab_size=config.vocab_size)
    if table is not None:
        check_table(table, own, config.vocab_size, str(out))
    elif tokenizer_fingerprint(own) != tokenizer_fingerprint(tokenizer):
        raise InputError(f'The model in "{out}" has another tokenizer than the one to count with; use its own.')
    return out / TABLE_FILE


def _count(
    name: str,
    data: list[str],
    text_field: str | None,
    tokenizer_name: str | None,
    validation_fraction: float,
    seed: int,
    tokens: Path | None,
    order: int,
    min_count: str,
    memory_mb: float,
    out: Path | None,
) -> tuple[Cooccurrence, Path]:
    from dynamo_lm.cli.progress import bar, tokenizing
    from dynamo_lm.cooccurrence.counting import count as count_ngrams
    from dynamo_lm.data.token_store import tokenize
    from dynamo_lm.model.configuration import DynaMoConfig
    from dynamo_lm.model.loading import open_config, open_tokenizer, resolve

    # 1. Whose tokens, and where to: checked before the long part.
    minimum = minimum_counts(min_count, order)
    folder = resolve(name)
    config = open_config(folder)
    tokenizer = open_tokenizer(resolve(tokenizer_name or folder), vocab_size=config.get_text_config().vocab_size)
    if out is None:
        if not (isinstance(config, DynaMoConfig) and Path(folder).is_dir()):
            raise InputError(f'"{name}" is no DynaMo folder to put the table into; say where it goes with --out.')
        out = Path(folder)
    target = destination(out, tokenizer=tokenizer)

    # 2. Text to tokens, tokens to counts.
    with ExitStack() as stack:
        where = tokens or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dynamo-tokens-")))
        with tokenizing() as progress:
            store = tokenize(data, tokenizer, where, text_field=text_field, progress=progress)
        documents = store.split(validation_fraction, seed)[0]
        total = int((store.offsets[documents + 1] - store.offsets[documents]).sum())
        left_out = f" without {validation_fraction:g} of the documents (seed {seed})" if validation_fraction else ""
        with bar("counting", total) as update:
            table = count_ngrams(
                (store.document(index) for index in documents.tolist()),
                vocab_size=config.get_text_config().vocab_size,
                order=order,
                min_counts=minimum,
                tokenizer=store.tokenizer,
                description=", ".join(data) + f"{left_out}: {total:,} tokens",
                memory_mb=memory_mb,
                progress=update,
            )
    return table, target
