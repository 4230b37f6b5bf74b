"""`dynamo-lm export`: a sequential head for vLLM, SGLang or llama.cpp."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from dynamo_lm.cli.dataclass_options import dataclass_options
from dynamo_lm.cli.options import Tokenizer


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    PANEL: ClassVar[str] = "The files"

    to: Annotated[
        str,
        "eagle3 (a folder for vLLM, SGLang and llama.cpp's converter), speculators (a folder for vLLM) or gguf (a file for "
        "llama.cpp).",
    ]
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder to write; it must be empty or not exist.")]
    base_gguf: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --to gguf: the base's file, from which the draft takes its list of tokens."),
    ] = None
    base: Annotated[str | None, "Base of the head, if it is not where the head's folder says: a folder or hub id."] = None
    tokenizer: Tokenizer = None
    dtype: Annotated[str, "Precision of the files: float32, bfloat16, float16, or auto (the model's own)."] = "auto"


@dataclass_options
def export(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A model with an eagle3 head (`dynamo-lm train --head eagle3`)."),
    ],
    files: ExportOptions,
) -> None:
    """Write a sequential head in the form that other programs serve.

    `dynamo-lm export runs/mine/model --to gguf --base-gguf base.gguf --out drafts`
    """
    from dynamo_lm.export.export import export as write
    from dynamo_lm.model.loading import open_for_evaluation

    network, tokenizer = open_for_evaluation(
        model, tokenizer=files.tokenizer, dtype=files.dtype, device="cpu", base=files.base
    )
    commands = write(network, model, tokenizer, files.to, files.out, base_gguf=files.base_gguf)
    print(f"{files.out}: written; serve it with:")
    for command in commands:
        print(f"  {command}")
