"""Where a model's text ends: the context that its configuration states, and its end tokens."""

from __future__ import annotations

from typing import Any

from dynamo_lm.errors import InputError

UNLIMITED = 2**31  # tokens: more than any text has


def stated_context(config: Any) -> int | None:
    """Tokens that a model has positions for, or None where its configuration states no limit."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if limit and limit > 0 else None  # XLNet states -1


def context_limit(config: Any) -> int:
    """Tokens that a model has positions for; where its configuration states no limit, more than any text has."""
    return stated_context(config) or UNLIMITED


def token_ids(value: Any) -> list[int]:
    """Token ids as transformers takes them (one, a list, a tensor or array of 0 or 1 dimensions, None), as distinct ints.

    Raises:
        InputError: something else, such as a fraction or a text.
    """
    values = value.tolist() if hasattr(value, "tolist") else value
    listed = list(values) if isinstance(values, (list, tuple, set, frozenset)) else [values]
    ids = [token.item() if hasattr(token, "item") else token for token in listed if token is not None]
    if any(isinstance(token, bool) or not isinstance(token, int) for token in ids):
        raise InputError(f"The token ids are {value!r}; give whole numbers: one, or a list or tensor of them.")
    return list(dict.fromkeys(ids))


def end_tokens(generation_config: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a text: those of the model's generation configuration, else the tokenizer's."""
    own = generation_config.eos_token_id
    return token_ids(tokenizer.eos_token_id if own is None else own)
