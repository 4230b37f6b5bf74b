"""What the evaluation commands share: the text that is scored, the folder of results, tables."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from dynamo_lm.cli.options import MACHINE
from dynamo_lm.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from dynamo_lm.evaluation.perplexity.scoring import Measured, Options, Text
    from dynamo_lm.model.modeling import DynaMoForCausalLM


@dataclass(frozen=True, kw_only=True)
class ResultOptions:
    """Where the results go."""

    PANEL: ClassVar[str] = MACHINE

    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the results of this model, which `report` reads.")
    ] = None
    json: Annotated[bool, "Print the results as JSON."] = False

    def begin(
        self, context: typer.Context, kind: str, model: DynaMoForCausalLM, name: str, *, seed: int, settings: dict[str, Any]
    ) -> dict[str, Any]:
        """A new record of results.

        Raises:
            InputError: `out` holds results of another model.
        """
        from dynamo_lm.evaluation import results_file

        record = results_file.begin(kind, context.find_root().obj or [], model, name, seed=seed, settings=settings)
        if self.out is not None:
            results_file.check_folder(self.out, record["model"])
        return record

    def save(self, record: dict[str, Any]) -> Path | None:
        """Write the record into `out`, if there is one."""
        from dynamo_lm.evaluation import results_file

        return None if self.out is None else results_file.save(self.out, record)

    def print(self, record: dict[str, Any], show: Callable[[dict[str, Any]], None]) -> None:
        """Print the record as JSON or by `show`."""
        from dynamo_lm.model.loading import print_json

        (print_json if self.json else show)(record)


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Which text is scored."""

    PANEL: ClassVar[str] = "The text"

    data: Annotated[
        list[str] | None,
        "Text to score: a file (.txt, .jsonl, .json, .parquet), a folder, a glob or a `datasets` id; may be given several "
        "times. Use text that neither heads nor tables have seen.",
    ] = None
    text_field: Annotated[str | None, 'Field of JSON or Parquet that holds the text. Default: "text".'] = None
    validation_fraction: Annotated[
        float,
        "Score only the documents that `train` and `count` leave out of this text with the same share and seed. "
        "0 scores everything.",
    ] = 0.0
    max_documents: Annotated[int | None, "Score at most this many documents, the first ones."] = None
    max_tokens: Annotated[int | None, "Score at most this many tokens, the first ones."] = None
    seed: Annotated[int, "Seed of all random choices, among them that of --validation-fraction."] = 0

    def read(self, tokenizer: Any) -> Text:
        """The text to score, tokenized through a temporary token store."""
        from dynamo_lm.cli.progress import tokenizing
        from dynamo_lm.evaluation.perplexity.scoring import read_text

        if not self.data:
            raise InputError("There is no text to score; name one with --data.")
        limits = {name: value for name, value in asdict(self).items() if name != "data"}
        with tempfile.TemporaryDirectory(prefix="dynamo-tokens-") as folder, tokenizing() as progress:
            return read_text(self.data, tokenizer, Path(folder), progress=progress, **limits)


@dataclass(frozen=True, kw_only=True)
class WindowOptions:
    """How long texts are cut into windows."""

    PANEL: ClassVar[str] = "How it is scored"

    window: Annotated[
        int | None,
        "Tokens the model sees at once; longer documents are read by overlapping windows. Default: its context, at most "
        "1024.",
    ] = None
    stride: Annotated[
        int | None,
        "Tokens from one window to the next: smaller gives more context and takes longer. Default: half a window.",
    ] = None
    batch_size: Annotated[int, "Windows computed together; changes speed only."] = 8

    def score(self, network: DynaMoForCausalLM, tokenizer: Any, text: TextOptions, options: Options) -> Measured:
        """`perplexity.measure` of a text, with a progress bar on stderr.

        Raises:
            InputError: the text is shorter than a window that the user asked for; a default window gets a warning instead.
        """
        from dynamo_lm.cli.progress import bar, console
        from dynamo_lm.evaluation.perplexity.scoring import check_text, measure

        documents = text.read(tokenizer)
        if documents.tokens < options.window:
            few = f"The text has {documents.tokens:,} tokens, fewer than the window of {options.window:,}"
            if self.window is not None:
                raise InputError(f"{few}; give more text or a smaller --window.")
            console().print(f"{few}: its perplexities are uncertain.", soft_wrap=True)
        check_text(network, documents, options)
        with bar("scoring", documents.tokens - len(documents.documents)) as progress:
            return measure(network, documents, options, progress=progress)


def open_model_or_base(name: str, *, dtype: Any, device: str, **options: Any) -> DynaMoForCausalLM:
    """A DynaMo model, or a plain base as one with head 1 alone.

    Raises:
        InputError: it cannot be opened.
    """
    from dynamo_lm import DynaMoForCausalLM
    from dynamo_lm.model.configuration import DynaMoConfig
    from dynamo_lm.model.loading import choose_device, open_config

    model: Any
    if isinstance(open_config(name), DynaMoConfig):
        model = DynaMoForCausalLM.from_pretrained(name, dtype=dtype, **options)
    else:
        model = DynaMoForCausalLM.from_base(name, num_heads=1, dtype=dtype, **options)
    return model.to(choose_device(device)).eval()


def table_of(columns: Iterable[str], rows: Iterable[Iterable[str]], title: str | None = None) -> Table:
    """A table of numbers, aligned to the right."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table
