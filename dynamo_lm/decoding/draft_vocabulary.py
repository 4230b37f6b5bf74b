"""The tokens that the heads draft, where the vocabulary is large: the commonest ones of the counted text.

A draft outside the list costs a missed token and no error, since verification decides what is emitted. Reading heads 2..
over a vocabulary of 50,000 or 250,000 tokens costs a step as much as many layers, and nearly all of those tokens make up a
hundredth of a text. In: a model with a table. Out: ids, and logits of heads over these ids alone, through a copy of their
rows of the output embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from dynamo_lm.cooccurrence.table import Cooccurrence
from dynamo_lm.decoding.protocol import MultiHeadLM
from dynamo_lm.kernels.linear import optimize_modules
from dynamo_lm.kernels.quantized import QuantizedLinear

COVERED = 0.99  # of the counted text
LEAST = 2**11  # tokens of the smallest list
WORTH = 0.5  # of the vocabulary: a longer list saves too little


@dataclass(frozen=True, eq=False)
class DraftVocabulary:
    """Token ids, ascending, and the layer that reads their logits."""

    ids: np.ndarray  # (s,) int64
    output: nn.Linear  # (..., hidden) -> (..., s)


def draft_vocabulary_of(model: MultiHeadLM) -> DraftVocabulary | None:
    """The list of a model that is arranged for decoding; None without a table or where it would save too little.

    It is kept with the model until the table or the output embedding changes.
    """
    table, output = model.cooccurrence, model.base.get_output_embeddings()
    if table is None or not model.plain_readout or model.config.own_output_embedding or not isinstance(output, nn.Linear):
        return None
    weight = output.packed if isinstance(output, QuantizedLinear) else output.weight
    if weight.is_meta:  # offloaded between calls
        return None
    version = 0 if weight.is_inference() else weight._version  # training changes weights in place
    kept = model.runtime.draft_vocabulary
    if kept is None or kept[0] is not table or kept[1] is not weight or kept[2] != version:
        kept = model.runtime.draft_vocabulary = table, weight, version, _draft_vocabulary(table, output)
    return kept[3]


def _draft_vocabulary(table: Cooccurrence, output: nn.Linear) -> DraftVocabulary | None:
    counts = table.counts[0].numpy()
    by_count = np.argsort(-counts, kind="stable")
    covered = np.cumsum(counts[by_count])
    size = max(LEAST, int(np.searchsorted(covered, COVERED * covered[-1])) + 1)
    if covered[-1] == 0 or size > WORTH * output.out_features:
        return None
    ids = np.sort(by_count[:size])
    rows = torch.from_numpy(ids).to(output.weight.device)
    if isinstance(output, QuantizedLinear):
        return DraftVocabulary(ids, output.select(rows))
    short = nn.Linear(output.in_features, size, bias=output.bias is not None, device="meta")
    short.weight = nn.Parameter(output.weight.detach()[rows], requires_grad=False)
    if output.bias is not None:
        short.bias = nn.Parameter(output.bias.detach()[rows], requires_grad=False)
    return DraftVocabulary(ids, optimize_modules(short))
