"""The tokens of a head with a reduced vocabulary: the commonest of a text, and never without bytes and special ones.

Without the bytes rare characters could not be drafted, and without the special tokens no end.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

from dynamo_lm.data.chat_template import special_tokens
from dynamo_lm.errors import InputError

BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def needed_tokens(tokenizer: Any) -> set[int]:
    """Ids of bytes and special tokens."""
    single = set(ByteLevel.alphabet())
    bytes_ = {index for token, index in tokenizer.get_vocab().items() if token in single or BYTE.fullmatch(token)}
    return bytes_ | special_tokens(tokenizer)


def draft_tokens(counts: Tensor, size: int, tokenizer: Any) -> Tensor:
    """The ids of a draft vocabulary, (size,) ascending.

    Args:
        counts: how often each token is learned, (vocabulary,).

    Raises:
        InputError: more tokens than there are, or fewer than bytes and special tokens take.
    """
    needed = sorted(token for token in needed_tokens(tokenizer) if token < len(counts))
    if not len(needed) < size <= len(counts):
        raise InputError(
            f"--draft-vocabulary is {size}; give more than the {len(needed)} bytes and special tokens, and at most the "
            f"{len(counts)} tokens of the vocabulary."
        )
    ranks = counts.double().clone()
    ranks[needed] = torch.inf
    return ranks.argsort(descending=True, stable=True)[:size].sort().values
