"""Writes heads into a folder that another program opens, with the command that serves it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from dynamo_lm.errors import InputError
from dynamo_lm.export import gguf_base, gguf_head, mtp
from dynamo_lm.export.card import BASE_GGUF, DRAFT_GGUF, card, serve_commands
from dynamo_lm.export.forms import check, eagle3_config, speculators_config, tensors
from dynamo_lm.export.gguf_tensors import DRAFT_PRECISION, PRECISIONS
from dynamo_lm.export.gguf_tokens import add_tokens, copy_tokens
from dynamo_lm.export.parallel import parallel_config, parallel_tensors
from dynamo_lm.files import atomic_folder
from dynamo_lm.kernels.quantized import is_quantized
from dynamo_lm.model.modeling import DynaMoForCausalLM


def export(
    model: DynaMoForCausalLM,
    name: str,
    tokenizer: Any,
    form: str,
    out: Path,
    *,
    base_gguf: Path | None = None,
    with_base: str | None = None,
    draft_precision: str | None = None,
    base: str | None = None,
) -> dict[str, str]:
    """Writes the heads of `model` into `out`.

    Args:
        name: of the model, as the user gave it.
        form: one of `forms.READERS`.
        base_gguf: the base's file, for "gguf": the tokens are copied from it.
        with_base: for "gguf": writes the base, too, in this precision, one of `gguf_tensors.PRECISIONS`.
        draft_precision: for "gguf": of the head's matrices, one of the same; None for q8_0.
        base: the base's folder or hub id as the user named it, for the commands; None: the recorded one.

    Returns:
        The commands that serve it, by program.

    Raises:
        InputError: the folder is not empty, or no program would read the result.
        ModuleNotFoundError: the package `gguf` is missing.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f'The folder "{out}" is not empty; name another with --out.')
    check_request(model, name, tokenizer, form, {"--with-base": with_base, "--draft-precision": draft_precision})
    if base_gguf is not None and form != "gguf":
        raise InputError(f"--base-gguf is for --to gguf, and --to is {form}; leave it out.")
    commands = serve_commands(model, form, out, out / BASE_GGUF if with_base else base_gguf, base)
    with atomic_folder(out) as temporary:
        if form == "gguf":
            tokens = _tokens(model, tokenizer, base_gguf)
            gguf_head.write(model, temporary / DRAFT_GGUF, tokens, draft_precision or DRAFT_PRECISION)
            if with_base:
                gguf_base.write(model.base, temporary / BASE_GGUF, precision=with_base, tokens=tokens)
        elif form == "mtp":
            mtp.write(model, temporary, tokenizer)
        else:
            config, weights = _PARTS[form](model)
            save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
            (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (temporary / "README.md").write_text(card(model, form, commands), encoding="utf-8")
    return commands


_PARTS: dict[str, Callable[[DynaMoForCausalLM], tuple[dict[str, Any], dict[str, Tensor]]]] = {
    "eagle3": lambda model: (eagle3_config(model), tensors(model, "midlayer")),
    "speculators": lambda model: (speculators_config(model), tensors(model, "layers.0")),
    "vllm": lambda model: (parallel_config(model), parallel_tensors(model)),
}  # config.json and model.safetensors, by form


def check_request(model: DynaMoForCausalLM, name: str, tokenizer: Any, form: str, precisions: dict[str, str | None]) -> None:
    """Refuses what no program would read, and files that cannot be written.

    Args:
        precisions: of GGUF files, by the option that asks for each.

    Raises:
        InputError: with the reason.
    """
    check(model, name, form, tokenizer)
    if is_quantized(model):
        raise InputError(
            f'"{name}" has weights of 8 or 4 bits in a form of its own; export the model that it was made from, without '
            "--weights."
        )
    for option, precision in precisions.items():
        if precision is None:
            continue
        if form != "gguf":
            raise InputError(f"{option} is for --to gguf, and --to is {form}; leave it out.")
        if precision not in PRECISIONS:
            raise InputError(f'{option} is "{precision}"; give {", ".join(PRECISIONS)}.')
    if precisions["--with-base"] is not None:
        gguf_base.check(model.base)


def _tokens(model: DynaMoForCausalLM, tokenizer: Any, base_gguf: Path | None) -> Callable[[Any], None]:
    """Adds the base's tokens to a GGUF writer."""
    config = model.base.config.get_text_config()
    if base_gguf is None:
        return lambda writer: add_tokens(writer, tokenizer, config.vocab_size)
    sizes = config.vocab_size, config.num_hidden_layers, config.hidden_size
    return lambda writer: copy_tokens(writer, base_gguf, *sizes)
