"""The tokens in a GGUF file: how llama.cpp cuts a text, and what it writes for an id. Needs the package `gguf`.

Three sources: a tokenizer of transformers, the file of the base, or placeholders where only ids are fed and read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dynamo_lm.data.chat_template import special_tokens
from dynamo_lm.data.draft_tokens import BYTE
from dynamo_lm.errors import InputError, first_line

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CUTS = {  # llama.cpp's name of what cuts a text into words, by the parts of a tokenizer's own that do so
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (LLAMA3,): "llama-bpe",
    (LLAMA3.replace("{1,3}", ""),): "qwen2",
}


def add_tokens(writer: Any, tokenizer: Any, size: int) -> None:
    """The tokens of `tokenizer`; ids that it does not use up to `size` are filled up.

    Raises:
        InputError: llama.cpp has no name for how this tokenizer cuts a text.
    """
    import gguf

    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    model, kinds = whole["model"], gguf.TokenType
    if model["type"] != "BPE":
        raise InputError(_unknown(f"the tokenizer is of the kind {model['type']}"))
    pieces = bool(model.get("byte_fallback"))
    texts, special = {index: token for token, index in tokenizer.get_vocab().items()}, special_tokens(tokenizer)
    added = set(tokenizer.added_tokens_decoder)

    def kind(index: int) -> Any:
        if index not in texts:
            return kinds.UNUSED
        if pieces and index == tokenizer.unk_token_id:
            return kinds.UNKNOWN
        if index in special:
            return kinds.CONTROL
        if pieces and BYTE.fullmatch(texts[index]):
            return kinds.BYTE
        return kinds.USER_DEFINED if index in added else kinds.NORMAL

    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    writer.add_tokenizer_pre("default" if pieces else cut(whole))
    writer.add_token_list([texts.get(index, f"[PAD{index}]") for index in range(size)])
    writer.add_token_types([kind(index) for index in range(size)])
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges") or []]
    if pieces:  # the better the score of what two pieces make, the earlier they are merged
        ranks: dict[str, int] = {}
        for rank, merge in enumerate(merges):
            ranks.setdefault("".join(merge), rank)
        writer.add_token_scores([-float(ranks.get(texts.get(index, ""), len(merges))) for index in range(size)])
    else:
        writer.add_token_merges([" ".join(merge) for merge in merges])
    _add_special(writer, tokenizer, texts)


def _add_special(writer: Any, tokenizer: Any, texts: dict[int, str]) -> None:
    """Special ids, what is put before a text, and the chat template."""
    for add, token in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if token is not None:
            add(token)
    plain, wrapped = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and wrapped[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and wrapped[-1] == tokenizer.eos_token_id)
    writer.add_add_space_prefix(texts.get(plain[0], "").startswith(("▁", "Ġ")))
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def cut(tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name of the way in which a byte-level tokenizer cuts a text.

    Args:
        tokenizer: the content of its tokenizer.json.

    Raises:
        InputError: it has none.
    """
    stated = tokenizer["pre_tokenizer"] or {}
    parts: list[str] = []
    for part in stated.get("pretokenizers", [stated]):
        if part.get("type") == "ByteLevel" and part.get("add_prefix_space"):
            raise InputError(_unknown("the tokenizer puts a space before a text"))
        if part.get("type") == "Split":
            parts.append(part["pattern"].get("Regex", "Split"))
        elif part.get("type") == "Digits" and not part["individual_digits"]:
            parts.append("Digits in groups")
        elif part.get("type") != "ByteLevel" or part.get("use_regex", True):
            parts.append(str(part.get("type")))
    normalizer = (tokenizer["normalizer"] or {}).get("type", "NFC")
    if tuple(parts) not in CUTS or normalizer != "NFC":
        raise InputError(_unknown(f"the tokenizer cuts texts by {', '.join([*parts, normalizer])}"))
    return CUTS[tuple(parts)]


def _unknown(why: str) -> str:
    return f"llama.cpp's name for this tokenizer is not known here ({why}); give --base-gguf, whose tokens are copied."


def copy_tokens(writer: Any, base_gguf: Path, size: int, layers: int, width: int) -> None:
    """Everything that the base's file says of its tokens.

    Raises:
        InputError: the file is not one, or is not that of a base of `size` tokens, `layers` and hidden size `width`.
    """
    import gguf

    try:
        fields = gguf.GGUFReader(base_gguf).fields
        kind = fields["general.architecture"].contents()
        found = [len(fields["tokenizer.ggml.tokens"].data)]
        found += [fields[f"{kind}.{key}"].contents() for key in ("block_count", "embedding_length")]
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise InputError(f'"{base_gguf}" is not a whole GGUF file of a language model: {first_line(error)}') from error
    if found != [size, layers, width]:
        raise InputError(
            f'"{base_gguf}" has {found[0]} tokens, {found[1]} layers and hidden size {found[2]}, but the head\'s base has '
            f"{size}, {layers} and {width}; give the file of that base."
        )
    for name, field in fields.items():
        if name.startswith("tokenizer."):
            of = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=of)


def add_placeholders(writer: Any, size: int, **special: int | None) -> None:
    """Tokens without a text, for a benchmark that feeds and reads ids. special: bos, eos."""
    import gguf

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"t{token}" for token in range(size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * size)
    writer.add_token_merges(["t 0"])
    for name, token in special.items():
        if isinstance(token, int):
            getattr(writer, f"add_{name}_token_id")(token)
