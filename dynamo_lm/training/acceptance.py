"""Tokens per step that heads are to reach, estimated on held-out text without decoding: what a user waits for in training.

At each position all heads draft from what they see there, and the base's own distribution at every later place is known from
the same forward. Greedy: head i's draft stands where it is the base's most likely token after the text so far. Sampled: it
stands with the probability sum_x min(p(x), q_i(x)), which is what the exact rejection rule keeps. A draft counts if all
before it stand. On text that the base wrote itself this is what verified decoding meets; chains only, without tables.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dynamo_lm.data.packing import Blocks
from dynamo_lm.model.modeling import DynaMoForCausalLM
from dynamo_lm.training.loss import coupled_logits, visit_scored


@dataclass(frozen=True)
class Acceptance:
    """Shares of the drafts that stand where all before them do, by head from head 2 on."""

    greedy: tuple[float, ...]
    sampled: tuple[float, ...]

    @staticmethod
    def tokens_per_step(shares: tuple[float, ...]) -> float:
        """1 + a_2 + a_2 a_3 + ..."""
        total, chain = 1.0, 1.0
        for share in shares:
            chain *= share
            total += chain
        return total

    def __str__(self) -> str:
        greedy, sampled = (self.tokens_per_step(shares) for shares in (self.greedy, self.sampled))
        by_head = ", ".join(f"head {i} {share:.0%}" for i, share in enumerate(self.greedy, start=2))
        return f"{greedy:.2f} tokens per step expected when greedy ({by_head}), {sampled:.2f} when sampled"


def acceptance(model: DynaMoForCausalLM, blocks: Blocks, *, batch_size: int, bf16: bool, limit: int = 32) -> Acceptance:
    """Acceptance by head on the first `limit` blocks; with a coupling, drafts know the token before their own.

    Raises:
        InputError: no document has as many tokens as the model has heads.
    """
    stands = torch.zeros(2, model.num_heads)  # greedy and sampled; entry 0 counts the positions

    def visit(states: Tensor, places: Tensor, labels: list[Tensor]) -> None:
        stands.add_(_chains(model, states, places, labels))

    visit_scored(model, blocks, visit, batch_size=batch_size, bf16=bf16, limit=limit)
    shares = stands[:, 1:] / stands[:, :-1].clamp(min=1e-9)
    return Acceptance(*(tuple(line) for line in shares.tolist()))


def _chains(model: DynaMoForCausalLM, states: Tensor, places: Tensor, labels: list[Tensor]) -> Tensor:
    """(2, n): how many positions there are, and how many drafts of heads 2.. stand, greedy and in expectation.

    Arguments as `visit_scored` hands them out.
    """
    n = len(states)
    count = torch.zeros(2, n)
    count[:, 0] = len(places)
    greedy = torch.ones(len(places), dtype=torch.bool, device=states.device)
    sampled = torch.ones(len(places), device=states.device)
    for head in range(2, n + 1):
        base = model.readout(states[0, places + head - 1][None])[0].float()
        drafts = model.readout(states[head - 1, places][None], head)[0].float()
        if model.coupling is not None:
            drafts = coupled_logits(model, head, states[head - 1, places], labels[head - 2][places], drafts)
        greedy &= drafts.argmax(-1) == base.argmax(-1)
        sampled = sampled * torch.minimum(F.softmax(base, -1), F.softmax(drafts, -1)).sum(-1)
        count[0, head - 1], count[1, head - 1] = greedy.sum(), sampled.sum()
    return count
