"""Drafts of a sequential head: each token is drafted with the ones before it in view, step after step.

In: the features of a sequence's verified tokens, and these tokens. Out: a chain of drafts and the distribution each was
drawn from, for the same verification as any draft. Each sequence has keys and values of its own in the head's one layer;
sequences are drafted for one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynamo_lm.backbone.eagle3_layer import DraftCache
from dynamo_lm.decoding.draft_length import AdaptiveDraftLength
from dynamo_lm.decoding.draft_vocabulary import DraftVocabulary
from dynamo_lm.decoding.protocol import MultiHeadLM
from dynamo_lm.decoding.sequence import SequenceState
from dynamo_lm.decoding.verification import Proposal
from dynamo_lm.sampling.algorithm1 import _choose
from dynamo_lm.sampling.drafting import conditional
from dynamo_lm.sampling.top_k import HeadCandidates

LEAST_CONFIDENCE = 0.1  # in all drafts of a chain, where their worth is not measured; less is accepted too seldom (LOG.md)


class SequentialDrafter:
    """The drafting side of a model whose extra heads are steps of one head."""

    def __init__(self, model: MultiHeadLM, listed: DraftVocabulary | None):
        """listed: the tokens that the head drafts where a table weights them; None: all."""
        self.model, self.listed = model, listed
        self.head: Any = model.sequential_head
        self.ids: Tensor | None = self.head.draft_ids
        self.device = model.device  # which walks over all modules

    def draft(
        self,
        sequence: SequenceState,
        features: Tensor,
        following: Sequence[int],
        text: np.ndarray,
        count: int,
        length: AdaptiveDraftLength | None,
    ) -> tuple[list[int], list, float]:
        """Draft up to `count` tokens after the verified ones, if they are not drawn as long as the head is confident.

        Args:
            features: of the positions that were verified in this step, (new, 3 hidden).
            following: the token after each of them; the last one is what the drafts follow.
            text: all verified tokens, (t,), the last one included.
            length: decides whether another draft is worth it, by its time; None: `LEAST_CONFIDENCE` does.

        Returns:
            Tokens, the distribution that each was drawn from, and how many should be accepted.
        """
        if sequence.draft_cache is None:
            sequence.draft_cache = DraftCache()
        cache, drafts = sequence.draft_cache, list[int]()
        state = self.head.advance(self.head.first(features[None]), self._embedded(following), cache)[:, -1:]
        verified = cache.length
        proposals: list[Proposal] = []
        confidence, expected = 1.0, 0.0  # in all drafts so far, and how many should be accepted
        all_are_drafted = sequence.options.sample or sequence.options.synthetic_acceptance is not None

        def worth(probability: float) -> bool:
            """Whether to draft another token; where tokens are drawn their probability says little of their acceptance."""
            if length is not None:
                return length.worth(probability, len(drafts))
            return all_are_drafted or probability >= LEAST_CONFIDENCE

        while len(drafts) < count:
            if drafts:
                if not worth(confidence):
                    break
                state = self.head.advance(state, self._embedded(drafts[-1:]), cache)
            ids, q = self._proposal(sequence, state, text)
            if not worth(confidence * float(q.max())):
                break
            proposals.append((torch.from_numpy(ids), torch.from_numpy(q)))
            chosen = _choose(q, sequence.generator, not sequence.options.sample)
            drafts.append(int(ids[chosen]))
            text = np.append(text, drafts[-1])
            confidence *= float(q[chosen])
            expected += confidence
        cache.length = verified
        return drafts, proposals, expected

    def _proposal(self, sequence: SequenceState, state: Tensor, text: np.ndarray) -> tuple[Any, Any]:
        """Candidates of the next token and their probabilities, (k,) each; state: (1, 1, hidden)."""
        algorithm, temperature = sequence.options.algorithm, sequence.options.temperature
        weighted = self.model.cooccurrence is not None and algorithm.alpha_c != 0
        normed, ids = self.head.norm(state), self.ids
        if ids is not None:
            logits = self.head.lm_head(normed)
        elif self.listed is not None and weighted and algorithm.top_k < len(self.listed.ids):
            logits, ids = self.listed.output(normed), torch.from_numpy(self.listed.ids)
        else:
            logits = self.model.readout(normed, 2)
        top = HeadCandidates.top(logits[0].float().cpu(), min(algorithm.top_k, logits.shape[-1]), temperature)
        if ids is not None:
            top = HeadCandidates(ids.cpu().numpy()[top.ids], top.probs)
        return conditional(top, 0, text, self.model.cooccurrence, algorithm.alpha_c, temperature, None)

    def _embedded(self, tokens: Sequence[int]) -> Tensor:
        """(1, tokens, hidden)."""
        return self.model.get_input_embeddings()(torch.tensor([list(tokens)], device=self.device))
