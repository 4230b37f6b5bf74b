"""The learned coupling of heads: a correction of head i's logits by the token one place before the one it predicts.

Heads are independent; the co-occurrence mask (method.md section 3) corrects their product by counts, this by a low-rank
function that also sees the context. In: final hidden states of head i >= 2, the tokens chosen one place before, and the
head's output embedding. Out: what to add to the head's final logits. Additive on the *final* logits by definition, after
soft-caps and scales, so that it means the same for every architecture. Knows no sampling and no training.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynamo_lm.decoding.protocol import MultiHeadLM
from dynamo_lm.errors import InputError

RANK = 64  # of the prototype: enough there, and 6 % of the story model


class Coupling(nn.Module):
    """logits_i(c | x) = logits_i(c) + <u, W[c]>, with u = B_i (E[x] * sigmoid(G_i h_i + b_i)).

    h_i is head i's final (normed) hidden state at the position, x the token one place before the one that head i predicts,
    W the head's output embedding. E is shared by the heads. B_i is zero at the start, so a new coupling changes nothing.

    Attributes:
        tokens: E, (vocabulary, rank).
        gates, biases, ups: G_i (rank, hidden), b_i (rank,) and B_i (hidden, rank); entry 0 is head 2's.
    """

    # Bare parameters: the bases' own initialisers, which transformers runs over all modules, leave them alone.

    def __init__(self, num_heads: int, rank: int, output_weight: Tensor):
        """`output_weight`, (vocabulary, hidden), gives sizes, precision and device."""
        super().__init__()
        (vocabulary, hidden), like = output_weight.shape, {"dtype": output_weight.dtype, "device": output_weight.device}
        extra = range(num_heads - 1)
        self.tokens = nn.Parameter(torch.randn(vocabulary, rank, **like))  # type: ignore[call-overload]
        self.gates = nn.ParameterList(torch.randn(rank, hidden, **like) / hidden**0.5 for _ in extra)  # type: ignore
        self.biases = nn.ParameterList(torch.zeros(rank, **like) for _ in extra)  # type: ignore[call-overload]
        self.ups = nn.ParameterList(torch.zeros(hidden, rank, **like) for _ in extra)  # type: ignore[call-overload]

    @property
    def rank(self) -> int:
        return self.tokens.shape[1]

    def hidden_correction(self, head: int, hidden: Tensor, tokens: Tensor) -> Tensor:
        """u, what to add to head `head`'s final hidden state as its output embedding sees it.

        Args:
            head: 2..n.
            hidden: the head's final hidden states, (..., hidden).
            tokens: the tokens one place before the predicted ones, (...).

        Returns:
            (..., hidden).
        """
        return F.linear(self.tokens[tokens] * self._gate(head, hidden), self.ups[head - 2])

    def correction(self, head: int, hidden: Tensor, previous: Tensor, candidates: Tensor, output_weight: Tensor) -> Tensor:
        """What to add to the logits of each candidate after each previous token, at one position.

        Args:
            head: 2..n.
            hidden: the head's final hidden state, (..., hidden); leading dimensions are positions of their own.
            previous: candidates for the place before, (..., p).
            candidates: candidates for head `head`'s own place, (..., k).
            output_weight: the head's output embedding, (vocabulary, hidden); k rows of it are read.

        Returns:
            (..., p, k).
        """
        rows, gates = self.low_rank_factors(hidden[None], candidates[None], [output_weight], first=head)
        return (self.tokens[previous] * gates[0][..., None, :]) @ rows[0].mT

    def low_rank_factors(
        self, hidden: Tensor, candidates: Tensor, output_weights: Sequence[Tensor], first: int = 2
    ) -> tuple[Tensor, Tensor]:
        """The part of `correction` for heads first, first + 1, .. that does not depend on the tokens one place before.

        Args:
            hidden: their final hidden states, (heads, ..., hidden).
            candidates: theirs, (heads, ..., k).
            output_weights: by head, (vocabulary, hidden).

        Returns:
            Two factors over `rank` dimensions: the candidates', (heads, ..., k, rank), and the gates on the previous
            tokens' E, (heads, ..., rank).
        """
        heads = range(first, first + len(hidden))
        rows = [weight[ids] @ self.ups[i - 2] for i, weight, ids in zip(heads, output_weights, candidates, strict=True)]
        return torch.stack(rows), self.gates_of(hidden, first)

    def gates_of(self, hidden: Tensor, first: int = 2) -> Tensor:
        """The gates on the previous tokens' E, (heads, ..., rank); hidden: of heads first, .., (heads, ..., hidden)."""
        return torch.stack([self._gate(i, states) for i, states in enumerate(hidden, start=first)])

    def _gate(self, head: int, hidden: Tensor) -> Tensor:
        return torch.sigmoid(F.linear(hidden, self.gates[head - 2], self.biases[head - 2]))  # (..., rank)


def add_coupling(model: MultiHeadLM, rank: int = RANK) -> Coupling:
    """Gives a finished model a new coupling, which changes nothing until it is trained; returns it.

    Raises:
        InputError: the model has a coupling already or no extra head, or the rank is not positive.
    """
    if model.coupling is not None:
        raise InputError(f"The model already has a coupling of rank {model.coupling.rank}; train that one further.")
    if model.num_heads < 2:
        raise InputError("A coupling joins heads, but this model has only the base's own; add heads first.")
    if rank < 1:
        raise InputError(f"The rank of a coupling is {rank}; give 1 or more.")
    model.config.coupling_rank = rank
    model.coupling = Coupling(model.num_heads, rank, model.output_weight())
    return model.coupling
