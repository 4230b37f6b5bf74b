"""Walking a text with the generator's own choice of step size (method.md section 5, dynamic perplexity).

In: documents, every head's candidates at each position, and log-probabilities of the true tokens. Out: what a walk for
each eps_b scored and how long its steps were. At a position the step size is what `sampling.draw` would emit there, given
the window's tokens as its context; then the true tokens are taken, up to the end of the document.

Whether m tokens are emitted depends on eps_b only through a limit, so each position's joints are computed once for all
eps_b (`limits`). Where thresholds and penalty make the answer depend on more than that, `sampling.survivors` decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dynamo_lm.cooccurrence.table import Cooccurrence
from dynamo_lm.sampling.algorithm1 import survivors
from dynamo_lm.sampling.joint import Joints
from dynamo_lm.sampling.options import Algorithm1, static_threshold
from dynamo_lm.sampling.otsu import ROUNDING
from dynamo_lm.sampling.top_k import HeadCandidates


class Walk:
    """One walk through every document for each value of eps_b; `advance` continues as far as there are candidates.

    Attributes:
        plain, masked: log-probability of the scored tokens, (documents, values), nats.
        tokens: how many were scored, (documents, values).
        sizes: steps of 1, 2, .. n tokens, (values, n); what the end of a document cuts off does not count.
    """

    def __init__(
        self,
        documents: Sequence[np.ndarray],
        plain: Sequence[np.ndarray],
        masked: Sequence[np.ndarray],
        eps_b: Sequence[float],
        algorithm: Algorithm1,
        table: Cooccurrence | None,
    ):
        """plain, masked: per document (n, length), filled in up to where `advance` goes."""
        self.documents, self.log_p = documents, (plain, masked)
        self.eps_b, self.algorithm, self.table = list(eps_b), algorithm, table
        shape = (len(documents), len(self.eps_b))
        self.plain, self.masked, self.tokens = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        self.sizes = np.zeros((len(self.eps_b), len(plain[0])), dtype=np.int64)
        self.next = np.zeros(shape, dtype=np.int64)  # the position each walk stands at

    def advance(self, document: int, heads: Sequence[HeadCandidates], start: int, fresh: int, end: int) -> None:
        """Walks through positions fresh .. end - 1; heads: by head, an entry per position; start: of their context."""
        tokens = self.documents[document]
        plain, masked = (log_p[document] for log_p in self.log_p)
        step_sizes: dict[int, StepSize] = {}  # by position
        for number, eps_b in enumerate(self.eps_b):
            at = int(self.next[document, number])
            while at < end:
                if at not in step_sizes:
                    ids, probs = (np.stack([getattr(head, name)[at - fresh] for head in heads]) for name in ("ids", "probs"))
                    context = tokens[start : at + 1]
                    step_sizes[at] = StepSize(HeadCandidates(ids, probs), context, self.table, self.algorithm)
                size = min(step_sizes[at](eps_b), len(tokens) - 1 - at)
                self.plain[document, number] += plain[:size, at].sum()
                self.masked[document, number] += masked[:size, at].sum()
                self.tokens[document, number] += size
                self.sizes[number, size - 1] += 1
                at += size
            self.next[document, number] = at


class StepSize:
    """How many tokens `sampling.draw` emits at one position, for any eps_b."""

    def __init__(self, heads: HeadCandidates, context: np.ndarray, table: Cooccurrence | None, algorithm: Algorithm1):
        """heads (n, k): the candidates; context (t,): token ids so far."""
        self.heads, self.context, self.table, self.algorithm = heads, context, table, algorithm
        self.limits = limits(heads, context, table, algorithm)

    def __call__(self, eps_b: float) -> int:
        for m in range(1 if eps_b == 1 else len(self.heads.ids), 1, -1):
            surely, possibly = self.limits[m - 2]
            limit = eps_b ** (m - 1) * (1 + ROUNDING)
            if surely > limit or (possibly > limit and self._survives(m, eps_b)):
                return m
        return 1

    def _survives(self, m: int, eps_b: float) -> bool:
        options = replace(self.algorithm, eps_b=eps_b)
        joint = Joints(self.heads, self.table, options.alpha_c, least=static_threshold(eps_b, len(self.heads.ids)))[m]
        present = np.zeros(1 + max(int(self.heads.ids.max()), int(self.context.max())), bool)
        present[self.context] = True
        return bool(survivors(joint, self.heads, present, options, m).cells.size)


def limits(
    heads: HeadCandidates, context: np.ndarray, table: Cooccurrence | None, algorithm: Algorithm1
) -> list[tuple[float, float]]:
    """For m = 2 .. n: m tokens are emitted if the first number exceeds eps_b^(m-1), and only if the second does.

    The first is the largest entry of J after the repetition penalty, which no threshold removes; the second the largest of
    all entries after the penalty, some of which Otsu's threshold may remove.
    """
    n, k = heads.ids.shape
    penalty = algorithm.repetition_penalty
    least = float(heads.probs[:, 0].prod()) / max(penalty, 1.0) ** n * (1 - ROUNDING)  # of the product of heads
    joints = Joints(heads, table, algorithm.alpha_c, least)
    in_context = np.isin(heads.ids, context)  # (n, k)

    def penalised(m: int, cells: np.ndarray, values: np.ndarray) -> np.ndarray:
        ranks = np.unravel_index(cells, (k,) * m)
        tokens = np.stack([heads.ids[i, rank] for i, rank in enumerate(ranks)])  # (m, cells)
        repeats = np.stack([in_context[i, rank] for i, rank in enumerate(ranks)])
        for i in range(1, m):
            repeats[i] |= (tokens[:i] == tokens[i]).any(0)
        return values / penalty ** repeats.sum(0)

    pairs = []
    for m in range(2, n + 1):
        joint = joints[m]
        cells, values = joint.cells, joint.values
        top = float(values.max(initial=0.0))
        if top == 0:
            pairs.append((0.0, 0.0))
            continue
        first = values >= top * (1 - ROUNDING)  # of equal ones any may be the survivor
        surely = min(top, float(penalised(m, cells[first], values[first]).min()))
        if penalty < 1:  # it may lift any entry
            possibly = top / penalty**m
        else:
            rivals = values > surely
            possibly = float(penalised(m, cells[rivals], values[rivals]).max(initial=surely))
        pairs.append((surely, possibly))
    return pairs
