"""`dynamo-lm export`: heads for vLLM, SGLang, llama.cpp or transformers."""

from __future__ import annotations

import sys
import textwrap
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
        "eagle3 (a folder for vLLM, SGLang and llama.cpp's converter), speculators (a folder for vLLM), gguf (a file for "
        "llama.cpp) or mtp (base, head and code in one folder for transformers' `generate(use_mtp=True)`). For parallel "
        "heads: vllm (a folder for vLLM with dynamo-lm installed beside it).",
    ]
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder to write; it must be empty or not exist.")]
    base_gguf: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --to gguf: the base's file, from which the draft takes its list of tokens."),
    ] = None
    with_base: Annotated[
        str | None,
        typer.Option(metavar="PRECISION", help="With --to gguf: write the base, too, as f32, bf16, f16 or q8_0."),
    ] = None
    draft_precision: Annotated[
        str | None,
        typer.Option(metavar="PRECISION", help="With --to gguf: of the head's matrices, as above. Default: q8_0."),
    ] = None
    check: Annotated[
        bool,
        "Then write a few texts with the program that the files are for, and compare text and accepted drafts with the same "
        "head here; exit status 1 if they differ. Takes xllamacpp for gguf, vllm for eagle3, speculators and vllm.",
    ] = False
    check_only: Annotated[bool, "Check a folder that is there, and write nothing."] = False
    base: Annotated[str | None, "Base of the head, if it is not where the head's folder says: a folder or hub id."] = None
    tokenizer: Tokenizer = None
    dtype: Annotated[str, "Precision of other files than GGUF: float32, bfloat16, float16, or auto (the model's)."] = "auto"


@dataclass_options
def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A model with an eagle3 head (`dynamo-lm train --head eagle3`); with parallel ones for vllm.",
        ),
    ],
    files: ExportOptions,
) -> None:
    """Write heads in the form that other programs serve.

    `dynamo-lm export runs/mine/model --to gguf --with-base q8_0 --out drafts --check`
    """
    from dynamo_lm.export.card import BASE_GGUF
    from dynamo_lm.export.check import check_export, check_reader
    from dynamo_lm.export.export import export as write
    from dynamo_lm.model.loading import open_for_evaluation

    check = files.check or files.check_only
    own = files.out / BASE_GGUF
    base_gguf = own if files.with_base or (files.check_only and own.exists()) else files.base_gguf
    if check:
        check_reader(files.to, base_gguf)
    network, tokenizer = open_for_evaluation(
        model, tokenizer=files.tokenizer, dtype=files.dtype, device="cpu", base=files.base
    )
    if not files.check_only:
        commands = write(
            network,
            model,
            tokenizer,
            files.to,
            files.out,
            base_gguf=files.base_gguf,
            with_base=files.with_base,
            draft_precision=files.draft_precision,
            base=files.base,
        )
        print(f"{files.out}: written; serve it with:")
        for program, command in commands.items():
            print(f"{program}:\n{textwrap.indent(command, '  ')}")
    if check:
        result = check_export(network, tokenizer, files.to, files.out, base_gguf)
        print(result)
        if not result.passed:
            print("The texts or the accepted drafts differ.", file=sys.stderr)
            raise typer.Exit(1)
