"""`dynamo-lm count`: text in, a co-occurrence table out."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from dynamo_lm.cli.dataclass_options import dataclass_options
from dynamo_lm.cli.options import Tokenizer, scratch_folder
from dynamo_lm.errors import InputError

if TYPE_CHECKING:
    from dynamo_lm.cooccurrence.counting import Engine
    from dynamo_lm.cooccurrence.table import Cooccurrence


@dataclass(frozen=True, kw_only=True)
class CountedTextOptions:
    """What to count."""

    PANEL: ClassVar[str] = "The text"

    data: Annotated[
        list[str] | None,
        "Text to count: a file (.txt, .jsonl, .json, .parquet), a folder, a glob or a `datasets` id; may be given several "
        "times. Use the text that the heads are trained on.",
    ] = None
    text_field: Annotated[str | None, 'Field of JSON or Parquet that holds the text. Default: "text".'] = None
    tokenizer: Tokenizer = None
    validation_fraction: Annotated[
        float,
        "Share of the documents to leave out: with the same value and seed, those that `train` holds out, so that "
        "nothing is measured on text that was counted. 0 counts everything.",
    ] = 0.03
    seed: Annotated[int, "Seed of the choice of these documents."] = 0
    tokens: Annotated[Path | None, "Folder to keep the tokenized text in, for the next count. Default: none."] = None


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """How to count, and where to."""

    PANEL: ClassVar[str] = "The table"

    order: Annotated[
        int,
        typer.Option(
            min=2,
            max=4,
            help="Longest sequence counted: 2 pairs, 3 triples, 4 quadruples. As many as the heads you use.",
        ),
    ] = 3
    min_count: Annotated[
        str,
        'Drop sequences seen fewer times than this: one number, or by length, as "2:1,3:2" (pairs from 1, triples from 2). '
        "Higher makes a smaller table.",
    ] = "1"
    max_mb: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Raise the minimum counts until the file of the table takes at most this many MB. Default: any size.",
        ),
    ] = None
    memory_mb: Annotated[
        float,
        "Working memory in MB; text of any size is counted in it, with temporary files. The table itself comes on top. With "
        "--engine ray: of each worker.",
    ] = 1024
    engine: Annotated[
        str,
        "Who counts: threads (of this process), or ray: the Ray cluster that RAY_ADDRESS names or that runs here, else one "
        "of this machine with --threads workers. The table is the same.",
    ] = "threads"
    out: Annotated[
        Path | None,
        "Where the table goes: a DynaMo model folder, or a file ending in .safetensors. Default: MODEL, if it is a DynaMo "
        "folder.",
    ] = None
    merge: Annotated[bool, "Add up tables that were counted separately, as in --merge A B --out C."] = False


@dataclass_options
def count(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL",
            help="The model (folder or hub id) whose tokens are counted. With --merge: two or more tables instead.",
        ),
    ],
    text: CountedTextOptions,
    options: TableOptions,
    threads: Annotated[int | None, "CPU threads; default: torch's own."] = None,
    json: Annotated[bool, "Print what was counted as JSON."] = False,
) -> None:
    """Count which tokens follow each other, for the mask that makes the heads agree.

    A table belongs to a tokenizer: `generate` finds it in the model's folder and refuses a table made for another tokenizer.

    `dynamo-lm count runs/mine/model --data stories.jsonl`
    """
    from dynamo_lm.cli.info import summary
    from dynamo_lm.model.loading import print_json, set_threads

    set_threads(threads)
    start = time.perf_counter()
    table, target = _merge(names, text.data, options) if options.merge else _count(names, text, options, threads)
    counted = 0 if options.merge else table.totals[0]
    table.save(target)
    seconds = time.perf_counter() - start
    rate = round(counted / seconds)
    if json:
        measured = {"seconds": round(seconds, 2), "tokens_per_second": rate}
        print_json({"file": str(target)} | summary(table, target) | measured)
        return
    for m, name in enumerate(("tokens", "pairs", "triples", "quadruples")[: table.order], start=1):
        least = f", seen {table.min_counts[m - 1]} times or more" if table.min_counts[m - 1] > 1 else ""
        pruned = f", pruned mass {table.pruned_mass[m - 1]:.2%}" if m > 1 else ""
        print(f"{name}: {table.num_rows(m):,} kept of {table.totals[m - 1]:,} counted{least}{pruned}")
    speed = f", {rate:,} tokens/s" if counted else ""
    print(f"{target}: {target.stat().st_size / 1e6:.2f} MB in {seconds:.1f} s{speed}")


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
            raise InputError(
                f'"{out}" is not a model folder; give a model folder, or a file name that ends in .safetensors.'
            )
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


def _merge(names: list[str], data: list[str] | None, options: TableOptions) -> tuple[Cooccurrence, Path]:
    """The sum of tables, and the file that it goes to."""
    import numpy as np

    from dynamo_lm.cooccurrence.ngrams import MAX_COUNT
    from dynamo_lm.cooccurrence.storage import minimum_for_size
    from dynamo_lm.cooccurrence.table import Cooccurrence, check_min_counts
    from dynamo_lm.model.loading import table_file

    if len(names) < 2:
        raise InputError("--merge adds up two or more tables; name them, as in `dynamo-lm count --merge A B --out C`.")
    if data:
        raise InputError("--merge takes tables, not --data; count the text first.")
    if options.out is None:
        raise InputError("Say where the merged table goes with --out.")
    table = Cooccurrence.merge(*(Cooccurrence.load(table_file(name)) for name in names))
    minimum = check_min_counts(minimum_counts(options.min_count, table.order), table.order)
    if options.max_mb is not None:
        histograms = [np.bincount(np.minimum(counts.numpy(), MAX_COUNT)) for counts in table.counts]
        minimum = minimum_for_size(table.vocab_size, histograms, minimum, options.max_mb * 1e6)
    if max(minimum) > 1:
        table = table.prune(dict(enumerate(minimum, start=1)))
    return table, destination(options.out, table)


def _engine(name: str, workers: int | None) -> Engine | None:
    """What `counting.count` takes for --engine.

    Raises:
        InputError: no such engine, or it is not installed.
    """
    from dynamo_lm.cooccurrence.ray_engine import RayEngine

    if name not in ("threads", "ray"):
        raise InputError(f'--engine is "{name}"; give threads or ray.')
    return RayEngine(workers) if name == "ray" else None


def _count(
    names: list[str], text: CountedTextOptions, options: TableOptions, threads: int | None
) -> tuple[Cooccurrence, Path]:
    """The table of a text, and the file that it goes to."""
    from dynamo_lm.cli.progress import bar, tokenizing
    from dynamo_lm.cooccurrence.counting import count as count_ngrams
    from dynamo_lm.data.token_store import tokenize
    from dynamo_lm.model.configuration import DynaMoConfig
    from dynamo_lm.model.loading import open_config, open_tokenizer, resolve

    # 1. Validate arguments.
    if len(names) != 1:
        raise InputError(f"Name one model, not {len(names)}; several tables are added up with --merge.")
    if not text.data:
        raise InputError("There is nothing to count; name a text with --data.")
    minimum = minimum_counts(options.min_count, options.order)
    engine = _engine(options.engine, threads)
    name = resolve(names[0])
    config = open_config(name)
    vocab_size = config.get_text_config().vocab_size
    tokenizer = open_tokenizer(resolve(text.tokenizer or name), vocab_size=vocab_size)
    out = options.out
    if out is None:
        if not (isinstance(config, DynaMoConfig) and Path(name).is_dir()):
            raise InputError(f'"{names[0]}" is not a DynaMo folder; say where the table goes with --out.')
        out = Path(name)
    target = destination(out, tokenizer=tokenizer)

    # 2. Text to tokens, tokens to counts.
    folder = text.tokens or scratch_folder()
    with tokenizing() as progress:
        store = tokenize(text.data, tokenizer, folder, text_field=text.text_field, progress=progress)
    documents = store.split(text.validation_fraction, text.seed)[0]
    total = int((store.offsets[documents + 1] - store.offsets[documents]).sum())
    share = f"{text.validation_fraction:g} of the documents (seed {text.seed})"
    left_out = f" without {share}" if text.validation_fraction else ""
    with bar("counting", total) as update:
        table = count_ngrams(
            (store.document(index) for index in documents.tolist()),
            vocab_size=vocab_size,
            order=options.order,
            min_counts=minimum,
            max_bytes=None if options.max_mb is None else options.max_mb * 1e6,
            tokenizer=store.tokenizer,
            description=", ".join(text.data) + f"{left_out}: {total:,} tokens",
            memory_mb=options.memory_mb,
            progress=update,
            engine=engine,
        )
    return table, target
