"""Chooses what a sequence's next forward takes in: its last verified token, and drafts of those after it.

Drafts come from the text itself where it repeats and that is asked for, elsewhere from the heads: a chain or a tree of
parallel heads, a chain of a sequential one. The drafts of one sequence do not depend on the others in its batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dynamo_lm.backbone.feature_layers import read_layers
from dynamo_lm.decoding.draft_length import Drafts
from dynamo_lm.decoding.draft_tree import grow
from dynamo_lm.decoding.draft_vocabulary import DraftVocabulary
from dynamo_lm.decoding.model_runner import ModelRunner
from dynamo_lm.decoding.preconditions import is_sequential
from dynamo_lm.decoding.sequence import SequenceState
from dynamo_lm.decoding.sequential import SequentialDrafter
from dynamo_lm.decoding.verification import certain
from dynamo_lm.kernels.linear import MAX_ROWS
from dynamo_lm.kernels.quantized import is_quantized
from dynamo_lm.sampling.drafting import draft_from
from dynamo_lm.sampling.top_k import HeadCandidates, PairwiseCorrection

LONGEST_HISTORY = 3  # tokens before the last one of a table's longest n-grams


class Drafter:
    """The drafts of all sequences of a batch.

    Attributes:
        head: the drafting side of a sequential head; None: heads are parallel, or not in use.
        read_layers: the base's layers whose inputs such a head reads.
    """

    def __init__(self, runner: ModelRunner, num_heads: int, listed: DraftVocabulary | None):
        """listed: the tokens that the heads draft where a table weights them; None: all."""
        self.runner, self.model = runner, runner.model
        sequential = is_sequential(self.model) and num_heads > 1
        self.head = SequentialDrafter(self.model, listed) if sequential else None
        self.read_layers = read_layers(self.model.base) if sequential else []
        whole = is_quantized(self.model.base) or self.model.device.type != "cpu"
        self.widest = None if whole else MAX_ROWS - 1  # drafts of a step, beyond which products round in another order

    def keep_unread(
        self, sequence: SequenceState, features: Tensor, emitted: list[int], path: list[int], first: bool
    ) -> None:
        """Keeps what a sequential head reads before it drafts.

        Args:
            features: of the input tokens, (width, 3 hidden).
            emitted: the verified tokens of this step.
            path: where the accepted input tokens after the first are.
            first: whether the input tokens are the prompt.
        """
        after = sequence.tokens[1:] + emitted if first else emitted  # each verified input token
        sequence.unread.append((features[: len(after)] if first else features[[0, *path]], after))

    def begin(
        self, sequence: SequenceState, emitted: list[int], *, alone: bool, rests: bool = False, most: int | None = None
    ) -> int:
        """Sets the sequence's next input, with drafts from the text itself if it repeats.

        Args:
            emitted: the verified tokens of this step.
            alone: whether it is the only sequence: in a batch a forward is wide already.
            rests: whether the heads make no drafts in this step.
            most: drafts, if the batch decides that.

        Returns:
            How many drafts of the heads are wanted.
        """
        self._set(sequence, emitted, [])
        heads = sequence.options.num_heads - 1
        by_heads = heads if most is None else min(heads, most)
        # A wider forward is wider for all sequences, or is not compiled.
        wide = sequence.options.prompt_lookup_num_tokens if alone and not self.runner.compile else by_heads
        wide = wide if self.widest is None else min(wide, self.widest)
        sequence.looked_up = self._look_up(sequence, emitted, wide)
        room = self._room(sequence, emitted, by_heads)
        return 0 if sequence.looked_up or rests else max(0, room)

    def draft(
        self,
        sequence: SequenceState,
        emitted: list[int],
        wanted: int,
        heads: HeadCandidates | None,
        pairwise: PairwiseCorrection | None,
        *,
        alone: bool,
    ) -> None:
        """Adds drafts of the heads to the sequence's next input.

        Args:
            emitted: the verified tokens of this step.
            wanted: how many drafts, as `begin` gave it.
            heads: candidates of parallel heads 2..n, and with a coupling `pairwise`.
            alone: whether it is the only sequence.
        """
        if self.head is not None:
            self._draft_in_steps(sequence, emitted, self.head, wanted, alone=alone)
        elif heads is not None:
            self._draft_from_heads(sequence, emitted, heads.of(0, wanted), pairwise, alone=alone)

    def _look_up(self, sequence: SequenceState, emitted: list[int], most: int) -> bool:
        """Drafts from the text itself, if its latest tokens stood there before. Returns whether they did."""
        room = self._room(sequence, emitted, min(most, sequence.options.prompt_lookup_num_tokens))
        drafts = sequence.prompt_lookup.draft(sequence.tokens + emitted, room) if room > 0 else []
        if drafts:
            self._set(sequence, emitted, drafts)
            sequence.proposals = [certain(token) for token in drafts]
        return bool(drafts)

    def _draft_from_heads(
        self,
        sequence: SequenceState,
        emitted: list[int],
        heads: HeadCandidates,
        pairwise: PairwiseCorrection | None,
        *,
        alone: bool,
    ) -> None:
        """Drafts of parallel heads: a tree whose size is measured where the sequence is alone, else a chain."""
        options, text = sequence.options, _text(sequence, emitted)
        alpha_c, temperature, table = options.algorithm.alpha_c, options.temperature, self.model.cooccurrence
        how = {"alpha_c": alpha_c, "temperature": temperature}
        if sequence.draft_length is not None and (alone or options.tree is not None):
            tree = grow(heads, text, table, **how, pairwise=pairwise, most=sequence.draft_length.sizes[-1] - 1)
            size = sequence.draft_length.choose(tree.probabilities)
            tree = tree.first(size - 1)
            sequence.input_ids, sequence.parents = [emitted[-1], *tree.tokens], tree.parents
            sequence.drafts = Drafts(size, sum(tree.probabilities))
            return
        greedy = not options.sample
        drafted = draft_from(heads, text, table, **how, generator=sequence.generator, greedy=greedy, pairwise=pairwise)
        self._set(sequence, emitted, drafted.tokens)
        sequence.proposals = [] if greedy else drafted.proposals  # greedy verification does not read them

    def _draft_in_steps(
        self, sequence: SequenceState, emitted: list[int], head: SequentialDrafter, room: int, *, alone: bool
    ) -> None:
        """Drafts of a sequential head, as long as they are worth it where the sequence is alone."""
        features, after = torch.cat([part for part, _ in sequence.unread]), [t for _, part in sequence.unread for t in part]
        sequence.unread.clear()
        length = sequence.draft_length if alone else None
        drafts, proposals, expected = head.draft(sequence, features, after, _text(sequence, emitted), room, length)
        self._set(sequence, emitted, drafts)
        sequence.drafts = Drafts(1 + len(drafts), expected)
        sequence.proposals = proposals if sequence.options.sample else []

    def _set(self, sequence: SequenceState, emitted: list[int], drafts: Sequence[int]) -> None:
        """A chain of drafts as the sequence's next input."""
        sequence.input_ids, sequence.parents = [emitted[-1], *drafts], list(range(len(drafts)))
        sequence.proposals, sequence.drafts = [], Drafts()

    def _room(self, sequence: SequenceState, emitted: list[int], most: int) -> int:
        """How many drafts, at most `most`, are of use after the tokens that this step emits."""
        left = min(self.runner.context - len(sequence.tokens), sequence.left) - len(emitted)
        return min(most, left - 1)


def _text(sequence: SequenceState, emitted: list[int]) -> np.ndarray:
    """The verified tokens that weight drafts, (t,): all, or under a budget those that tables look at.

    A budget keeps drafts that the base would not write, and drafts that copy the text would make it repeat itself (LOG.md).
    """
    text = sequence.text.of(sequence.tokens + emitted)
    return text if sequence.options.budget == 0 else text[-LONGEST_HISTORY:]
