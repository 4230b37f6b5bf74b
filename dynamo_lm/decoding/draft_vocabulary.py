"""The tokens that the heads draft, where the vocabulary is large: the commonest ones of the counted text.

A draft outside the list costs a missed token and no error, since verification decides what is emitted. Reading heads 2..
over a vocabulary of 50,000 or 250,000 tokens costs a step as much as many layers, and nearly all of those tokens make up a
hundredth of a text. In: a model with a table. Out: ids, and logits of heads over these ids alone, through a copy of their
rows of the output embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dynamo_lm.cooccurrence.table import Cooccurrence
from dynamo_lm.decoding.protocol import MultiHeadLM
from dynamo_lm.kernels.linear import optimize_modules
from dynamo_lm.kernels.quantized import QuantizedLinear

COVERED = 0.99  # of the counted text
LEAST = 2**11  # tokens of the smallest list
CHUNK = 2**12  # rows of the output embedding that are multiplied at a time
WORTH = 0.5  # of the vocabulary: a longer list saves too little


@dataclass(frozen=True, eq=False)
class DraftVocabulary:
    """Token ids, ascending, and the layer that reads their logits."""

    ids: np.ndarray  # (s,) int64
    output: nn.Linear  # (..., hidden) -> (..., s)
    rows: Tensor | None  # a coupling's rows of these tokens, (n-1, s, rank) bfloat16: it only weights drafts


def draft_vocabulary_of(model: MultiHeadLM) -> DraftVocabulary | None:
    """The list of a model that is arranged for decoding; None without a table or where it would save too little.

    It is kept with the model until the table, the output embedding or the coupling changes.
    """
    table, output = model.cooccurrence, model.base.get_output_embeddings()
    if table is None or not model.plain_readout or model.config.own_output_embedding or not isinstance(output, nn.Linear):
        return None
    weight = output.packed if isinstance(output, QuantizedLinear) else output.weight
    if weight.is_meta:  # offloaded between calls
        return None
    parts = [weight, *([] if model.coupling is None else model.coupling.ups)]
    versions = [0 if part.is_inference() else part._version for part in parts]  # training changes weights in place
    made_of = [table, *parts]
    kept = model.runtime.draft_vocabulary
    if kept is None or kept[1] != versions or any(old is not new for old, new in zip(kept[0], made_of, strict=True)):
        kept = model.runtime.draft_vocabulary = made_of, versions, _draft_vocabulary(table, output, parts[1:])
    return kept[2]


def _draft_vocabulary(table: Cooccurrence, output: nn.Linear, ups: Sequence[Tensor]) -> DraftVocabulary | None:
    counts = table.counts[0].numpy()
    by_count = np.argsort(-counts, kind="stable")
    covered = np.cumsum(counts[by_count])
    size = max(LEAST, int(np.searchsorted(covered, COVERED * covered[-1])) + 1)
    if covered[-1] == 0 or size > WORTH * output.out_features:
        return None
    ids = np.sort(by_count[:size])
    rows = torch.from_numpy(ids).to(output.weight.device)
    short: nn.Linear
    if isinstance(output, QuantizedLinear):
        short = output.select(rows)
    else:
        short = nn.Linear(output.in_features, size, bias=output.bias is not None, device="meta")
        short.weight = nn.Parameter(output.weight.detach()[rows], requires_grad=False)
        if output.bias is not None:
            short.bias = nn.Parameter(output.bias.detach()[rows], requires_grad=False)
        short = optimize_modules(short)
    with torch.no_grad():
        coupled = [torch.cat([(part @ up).bfloat16() for part in output.weight[rows].split(CHUNK)]) for up in ups]
    return DraftVocabulary(ids, short, torch.stack(coupled) if coupled else None)
