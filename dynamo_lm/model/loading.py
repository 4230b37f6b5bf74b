"""Opening what the user named: configurations, tokenizers and models, with one sentence for each way that can fail."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from dynamo_lm.assets import bundled
from dynamo_lm.backbone.base_model import offline_if_unreachable
from dynamo_lm.data.token_store import tokenizer_fingerprint
from dynamo_lm.decoding.thread_choice import AdaptiveThreads
from dynamo_lm.errors import InputError, first_line
from dynamo_lm.model.checkpoint import TABLE_FILE
from dynamo_lm.model.configuration import DynaMoConfig
from dynamo_lm.model.modeling import DynaMoForCausalLM

DTYPES = ("auto", "float32", "bfloat16", "float16")


def resolve(name: str) -> str:
    """A folder or hub id; the word "story" is the bundled model, and an unreachable hub is asked only once."""
    if name == "story" and not Path(name).exists():
        return str(bundled())
    if not name:
        raise InputError("The name of the model is empty; give a folder or a hub id such as EleutherAI/pythia-70m.")
    if not Path(name).exists():
        offline_if_unreachable()
    return name


def open_config(name: str) -> PreTrainedConfig:
    """The configuration of a folder or hub id, DynaMo or not.

    Raises:
        InputError: there is none.
    """
    path = Path(name)
    if path.is_file():
        raise InputError(f'"{name}" is a file; give the folder of a model.')
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f'"{name}" is not a model folder: it has no config.json.')
    try:
        return AutoConfig.from_pretrained(name)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = "has a config.json that cannot be read" if path.is_dir() else "is neither a folder nor available from the hub"
        raise InputError(f'"{name}" {what}: {first_line(error)}') from error


def open_tokenizer(name: str, *, vocab_size: int | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder or hub id; code that comes with it runs only if it is trusted.

    Raises:
        InputError: there is none, or it has ids at or beyond `vocab_size`.
    """
    files = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model", "vocab.txt")
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in files):
        raise InputError(f'"{name}" has no tokenizer; name one with --tokenizer, or save the model\'s own there.')
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        largest = max(tokenizer.get_vocab().values())
    except Exception as error:  # whatever a tokenizer's own code makes of broken files
        raise InputError(f'The tokenizer of "{name}" could not be opened: {first_line(error)}') from error
    if vocab_size is not None and largest >= vocab_size:
        raise InputError(
            f'The tokenizer of "{name}" has token ids up to {largest}, but the model\'s vocabulary ends at '
            f"{vocab_size - 1}; use the model's own tokenizer."
        )
    return tokenizer


def open_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    tokenizer: Any = None,
    base: str | None = None,
    weights: str | None = None,
    allow_base_mismatch: bool = False,
    trust_remote_code: bool = False,
) -> DynaMoForCausalLM:
    """A DynaMo model ready to generate; code that comes with it runs only if it is trusted.

    Args:
        base: for a folder that holds heads alone, the base to use instead of the recorded one: a folder or hub id.
        weights: "int8" or "int4" to round the weights of base and heads to; None leaves them as they are.
        allow_base_mismatch: take a base with other weights than the heads were trained for, with a warning.

    Raises:
        InputError: no such model, damaged files, or tables that were counted with another tokenizer.
    """
    if dtype not in DTYPES:
        raise InputError(f'--dtype is "{dtype}"; give one of {", ".join(DTYPES)}.')
    where = choose_device(device)
    if weights is not None and where.type != "cpu":
        raise InputError(f"--weights {weights} is for CPUs, and this would run on {where.type}; add --device cpu.")
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if base is not None:
        options["base"] = resolve(base)
    model = DynaMoForCausalLM.from_pretrained(name, allow_base_mismatch=allow_base_mismatch, weights=weights, **options)
    if tokenizer is not None:
        check_table(model.cooccurrence, tokenizer, model.config.vocab_size, name)
    return model.to(where).eval()  # type: ignore[arg-type]


def open_for_evaluation(
    model: str,
    *,
    tokenizer: str | None,
    dtype: str,
    device: str,
    threads: int | None = None,
    base: str | None = None,
    weights: str | None = None,
    allow_base_mismatch: bool = False,
    trust_remote_code: bool = False,
    adapt_threads: bool = False,
    random_heads: int | None = None,
) -> tuple[DynaMoForCausalLM, Any]:
    """A DynaMo model and its tokenizer; sets the number of CPU threads if one is given. See `open_model` for the others.

    Args:
        adapt_threads: let steps of decoding show how many threads, at most `threads`, are fastest.
        random_heads: a model without heads gets random ones, so many in all, head 1 included; None refuses it.

    Raises:
        InputError: as the functions above, or a model without heads.
    """
    set_threads(threads)
    name = resolve(model)
    config = open_config(name)
    plain = not isinstance(config, DynaMoConfig)
    if plain and random_heads is None:
        raise InputError(f'"{model}" has no DynaMo heads; add some with `dynamo-lm train {model} --data ...`.')
    vocab_size = config.get_text_config().vocab_size
    tokens = open_tokenizer(tokenizer or name, vocab_size=vocab_size, trust_remote_code=trust_remote_code)
    if plain:
        options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
        with_heads = DynaMoForCausalLM.from_base(name, num_heads=cast(int, random_heads), **options)
        return with_heads.to(choose_device(device)).eval(), tokens  # type: ignore[arg-type]
    network = open_model(
        name,
        dtype=dtype,
        device=device,
        tokenizer=tokens,
        base=base,
        weights=weights,
        allow_base_mismatch=allow_base_mismatch,
        trust_remote_code=trust_remote_code,
    )
    if adapt_threads and network.device.type == "cpu":
        network.runtime.threads = AdaptiveThreads.of_this_machine()
    return network, tokens


def check_table(table: Any, tokenizer: Any, vocab_size: int, name: str) -> None:
    """Refuses a co-occurrence table that counts other tokens than `tokenizer`'s, or for another vocabulary size."""
    if table is None:
        return
    expected = tokenizer_fingerprint(tokenizer)
    if table.tokenizer and table.tokenizer != expected:
        raise InputError(
            f'The table in "{name}" was counted with another tokenizer ({table.tokenizer}, not {expected}); '
            "count again with `dynamo-lm count` and this model."
        )
    if table.vocab_size > vocab_size:
        raise InputError(
            f'The table in "{name}" was counted for a vocabulary of {table.vocab_size}, but the model has '
            f"{vocab_size}; count again with `dynamo-lm count` and this model."
        )


def table_file(path: str) -> Path:
    """A table's own file, or the one in a model folder."""
    inside = Path(path) / TABLE_FILE
    file = inside if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise InputError(f'"{path}" is neither a table nor a folder with one; make one with `dynamo-lm count`.')
    return file


def choose_device(device: str) -> torch.device:
    """ "auto" is the first GPU if there is one, else the CPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f'--device "{device}" cannot be used: {first_line(error)}') from error


def set_threads(threads: int | None) -> None:
    """Compute with this many CPU threads; None leaves torch's own number."""
    if threads is not None:
        if threads < 1:
            raise InputError(f"--threads is {threads}; give 1 or more.")
        torch.set_num_threads(threads)


def skeleton(config: PreTrainedConfig, *, device: str | torch.device = "meta") -> Any:
    """The model of a configuration in float32: shapes alone (on the "meta" device), or random weights.

    Raises:
        InputError: it is not a causal language model.
    """
    try:
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except InputError:
        raise
    except (ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise InputError(f'"{config.model_type}" is not a causal language model: {first_line(error)}') from error


def print_json(value: Any, *, indent: int | None = 1) -> None:
    """One JSON document on stdout, on one line without `indent`; other characters than ASCII are escaped where stdout's
    encoding may lack them."""
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    print(json.dumps(value, indent=indent, ensure_ascii=not utf8), flush=True)
