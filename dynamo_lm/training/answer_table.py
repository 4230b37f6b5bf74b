"""Co-occurrence tables of what a model is tuned to say: the answers' n-grams beside those of the model's own table."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dynamo_lm.cooccurrence.counting import count
from dynamo_lm.cooccurrence.storage import MAX_ORDER
from dynamo_lm.cooccurrence.table import Cooccurrence
from dynamo_lm.data.token_store import TokenStore
from dynamo_lm.model.modeling import DynaMoForCausalLM


def add_answers(model: DynaMoForCausalLM, store: TokenStore, documents: np.ndarray, weight: int = 1) -> None:
    """Adds the n-grams of the answers in these documents to the model's table, or makes one, up to its number of heads.

    Only answers, because only they are decoded: a question's n-grams would count for tokens that no draft continues.

    Args:
        weight: how often they are added; more makes them matter more beside a table of much text.
    """
    before = model.cooccurrence
    mine = count(
        answers(store, documents),
        vocab_size=model.config.vocab_size,
        order=before.order if before is not None else min(MAX_ORDER, model.num_heads),
        tokenizer=store.tokenizer,
        description=f"answers tuned on, {weight} times",
    )
    model.cooccurrence = Cooccurrence.merge(*([] if before is None else [before]), *[mine] * weight)


def answers(store: TokenStore, documents: np.ndarray) -> Iterator[np.ndarray]:
    """What the assistant says in these documents, each answer as a document of its own, for counting n-grams."""
    assert store.responses is not None
    for index in documents.tolist():
        span = slice(int(store.offsets[index]), int(store.offsets[index + 1]))
        flags = np.concatenate([[False], store.responses[span], [False]]).astype(np.int8)
        edges = np.flatnonzero(np.diff(flags))
        for begin, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            yield store.document(index)[begin:end]
