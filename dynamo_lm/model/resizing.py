"""Vocabularies of another size: what the heads hold a row of for every token follows the base's embeddings.

In: a model whose base has its new size already. Out: the same model, its heads with as many rows. Knows no tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dynamo_lm.errors import InputError


@torch.no_grad()
def resize_heads(model: Any) -> None:
    """Gives the heads the base's vocabulary: a new token's row of an own output embedding is the base's, of a coupling 0."""
    size, theirs = model.config.vocab_size, dict(model.base.get_output_embeddings().named_parameters())
    for module in _output_embeddings(model):
        for name, parameter in module.named_parameters():
            module._parameters[name] = _resized(parameter, size, theirs[name][len(parameter) :])
        if isinstance(module, nn.Linear):
            module.out_features = size
    if model.coupling is not None:
        tokens = model.coupling.tokens
        added = tokens.new_zeros(max(0, size - len(tokens)), model.coupling.rank)
        model.coupling.tokens = _resized(tokens, size, added)
    if model.config.draft_vocab_size:
        known = model.sequential_head.t2d
        model.sequential_head.t2d = torch.cat([known[:size], known.new_zeros(max(0, size - len(known)))])


def check_new_size(model: Any, size: int) -> None:
    """Refuses a vocabulary that is smaller than what heads or tables know. Raises InputError."""
    table = model.cooccurrence
    if table is not None and table.vocab_size > size:
        raise InputError(
            f"The tables count {table.vocab_size} tokens and cannot be cut to {size}; set cooccurrence to None and count "
            "again."
        )
    drafted = int(model.sequential_head.draft_ids.max()) if model.config.draft_vocab_size else 0
    if drafted >= size:
        raise InputError(
            f"The head drafts token {drafted}, which a vocabulary of {size} does not have; train a head with another draft "
            "vocabulary."
        )


def check_vocabulary(model: Any) -> None:
    """Refuses a model whose parts have vocabularies of different sizes, which no folder can describe. Raises InputError."""
    size = model.config.vocab_size
    sizes = {len(parameter) for module in _output_embeddings(model) for parameter in module.parameters()}
    if model.coupling is not None:
        sizes.add(len(model.coupling.tokens))
    if model.config.draft_vocab_size:
        sizes.add(len(model.sequential_head.t2d))
    if sizes - {size}:
        raise InputError(
            f"The base has a vocabulary of {size} and the heads have one of {(sizes - {size}).pop()}; call "
            f"resize_token_embeddings({size}) of the model, not of its base."
        )
    check_new_size(model, size)


def _output_embeddings(model: Any) -> Iterator[nn.Module]:
    """The heads' own output embeddings over the whole vocabulary."""
    return (head.output for head in model.heads if hasattr(head, "output"))


def _resized(parameter: nn.Parameter, size: int, added: Tensor) -> nn.Parameter:
    """The first rows of a parameter, and those added for new tokens, `size` in all."""
    return nn.Parameter(torch.cat([parameter[:size], added.to(parameter)]), requires_grad=parameter.requires_grad)
