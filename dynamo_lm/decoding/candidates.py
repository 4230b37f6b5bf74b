"""What the host gets of one forward's logits: the base's, and every sequence's candidates for the next tokens.

In: final hidden states of all heads at the input tokens. Out: the base's logits at all of them, which decide where a
sequence continues; then its candidates there, and the pairwise correction of a learned coupling. Under "off" a sequence
continues after all its input tokens, and heads are read there together with the base. Otherwise they are read once the last
accepted token is known, which is the least work. But then the host waits a second time, so a device with a memory of its own
reads them at all positions at once and hands over k candidates instead of logits, unless the logits would be too many for
it. A CPU does the same with an output embedding that is read from memory, as long as the states are few: then reading it
twice is the main cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dynamo_lm.backbone.offloading import loaded
from dynamo_lm.decoding.draft_vocabulary import DraftVocabulary
from dynamo_lm.decoding.protocol import MultiHeadLM
from dynamo_lm.decoding.sequence import SequenceState
from dynamo_lm.devices import fetched, sent
from dynamo_lm.kernels.linear import HUGE, SkinnyLinear
from dynamo_lm.sampling.top_k import HOSTS, HeadCandidates, PairwiseCorrection, highest, pairwise_correction

AT_ONCE = 2**25  # logits of heads 2.. that a device holds for all positions; with what sorts them, some 25 bytes each

# States that a huge output embedding reads in less than the time of two readings of a few each (LOG.md).
TOGETHER = {torch.float32: 9, torch.bfloat16: 6}


class _Group(NamedTuple):
    """Sequences with the same settings for candidates."""

    off: bool  # all heads are wanted, not only heads 2..
    draft_vocabulary: DraftVocabulary | None  # the tokens they are among; None: all
    top_k: int
    temperature: float
    members: list[int]


class Candidates:
    """One forward's final hidden states, as far as they are read.

    Attributes:
        logits: the base's, (sequences, width, vocabulary) float32 on the CPU.
    """

    def __init__(
        self,
        model: MultiHeadLM,
        sequences: Sequence[SequenceState],
        hidden: Tensor,
        draft_vocabulary: DraftVocabulary | None,
        embedding: Tensor | None,
    ):
        """hidden: (n, sequences, width, hidden); embedding: the coupling's E, if there is one, on the CPU."""
        count, width = hidden.shape[1:3]
        self.model, self.embedding, self.count = model, embedding, count
        self.groups = _groups(sequences, draft_vocabulary)
        # Under "off" a sequence keeps all its input tokens, so where it continues is known before anything is read.
        ends = (
            [min(len(sequence.input_ids), width) - 1 for sequence in sequences]
            if all(sequence.options.off for sequence in sequences)
            else None
        )
        at = None if ends is None else sent(torch.arange(count) * width + torch.tensor(ends), hidden.device)
        states = hidden.flatten(1, 2)
        # Places where sequences may continue, by sequence; of them the states of heads 2.. and the base's logits.
        self.places = width if at is None else 1
        self.states = states[1:] if at is None else states[1:].index_select(1, at)
        self.lines: Tensor | None = None  # logits of heads 2.. there, (n - 1, places, vocabulary), if read with the base's
        if (
            len(states) > 1
            and any(group.draft_vocabulary is None for group in self.groups)
            and _pays_together(model, states, one_place=at is not None)
        ):
            lines = model.readout(torch.cat([states[0], self.states.flatten(0, 1)])[None])[0]
            self.lines = lines[count * width :].view(*self.states.shape[:2], -1)
            own = lines[: count * width]
        else:
            own = model.readout(states[:1])[0]
        self.own = own if at is None else own.index_select(0, at)
        self.ahead: list[list[Tensor]] = []  # by group, of all its sequences' positions: what `_tops` gives
        logits = own.view(count, width, -1)
        if hidden.device.type not in HOSTS and self._size() <= AT_ONCE:
            tops = [
                self._tops(group, [self._place(r, i) for r in group.members for i in range(self.places)])
                for group in self.groups
            ]
            logits, *parts = fetched(logits, *(part for parts in tops for part in parts))
            arrived = iter(parts)
            self.ahead = [[next(arrived) for _ in parts] for parts in tops]
        self.logits = logits.cpu().float()

    def at(self, last: Sequence[int]) -> list[tuple[HeadCandidates | None, PairwiseCorrection | None]]:
        """By sequence, the candidates at input token `last`: of all heads under "off", else of heads 2.., and their pairwise
        correction; None where the sequence needs none."""
        result: list[tuple[HeadCandidates | None, PairwiseCorrection | None]] = [(None, None)] * self.count
        for number, group in enumerate(self.groups):
            if self.ahead:
                places = torch.tensor([self._place(place, last[r]) for place, r in enumerate(group.members)])
                parts = [part[:, places] for part in self.ahead[number]]
            else:
                parts = fetched(*self._tops(group, [self._place(r, last[r]) for r in group.members]))
            ids, scores = (part.numpy().swapaxes(0, 1).reshape(-1, group.top_k) for part in parts[:2])  # a line per head
            if group.draft_vocabulary is not None:
                ids = group.draft_vocabulary.ids[ids]
            tops, each = HeadCandidates.ranked(ids, scores.astype(np.float64, copy=False), group.temperature), len(parts[0])
            for place, r in enumerate(group.members):
                pairwise = None
                if self.embedding is not None and len(parts) > 2:
                    pairwise = pairwise_correction(self.embedding, *(part[:, place] for part in parts[2:]))
                result[r] = tops.of(place * each, (place + 1) * each), pairwise
        return result

    def _place(self, sequence: int, token: int) -> int:
        """Where the states at a sequence's input token are."""
        return sequence * self.places + (token if self.places > 1 else 0)

    def _size(self) -> int:
        """Logits that candidates are looked for among, at all positions."""
        sizes = [
            len(g.members) * (len(g.draft_vocabulary.ids) if g.draft_vocabulary else self.model.config.vocab_size)
            for g in self.groups
        ]
        return sum(sizes) * self.places * (1 + len(self.states))

    def _tops(self, group: _Group, places: list[int]) -> list[Tensor]:
        """Candidates of the heads that are wanted, and the low-rank factors of a coupling, where the states are.

        Args:
            places: counted through all sequences.

        Returns:
            Ids and logits, (heads, places, k); of a coupling its `low_rank_factors` of heads 2.., (n-1, places, ..).
        """
        states, lines, own = self.states, self.lines, self.own
        if places != list(range(len(own))):
            at = sent(torch.tensor(places), states.device)
            states, own = states.index_select(1, at), own.index_select(0, at)
            lines = None if lines is None else lines.index_select(1, at)
        if lines is None or group.draft_vocabulary is not None:
            lines = _read_heads(self.model, states, group.draft_vocabulary)
        if group.off:
            lines = torch.cat([own[None].float(), lines.float()])
        ids, scores = highest(lines.float(), group.top_k)
        coupling = self.model.coupling
        if coupling is None or len(states) == 0:
            return [ids, scores]
        if group.draft_vocabulary is not None:
            rows = group.draft_vocabulary.rows
            assert rows is not None
            heads = torch.arange(len(states), device=rows.device)[:, None, None]
            return [ids, scores, rows[heads, sent(ids, rows.device)], coupling.gates_of(states)]
        with loaded(self.model.base.get_output_embeddings()):
            weights = [self.model.output_weight(head) for head in range(2, len(states) + 2)]
            return [ids, scores, *coupling.low_rank_factors(states, sent(ids[-len(states) :], states.device), weights)]


def _groups(sequences: Sequence[SequenceState], draft_vocabulary: DraftVocabulary | None) -> list[_Group]:
    """The sequences that want candidates."""
    alike: dict[tuple[bool, DraftVocabulary | None, int, float], list[int]] = {}
    for r, sequence in enumerate(sequences):
        options, algorithm = sequence.options, sequence.options.algorithm
        if not sequence.ending and (options.off or options.num_heads > 1):
            whole = (
                options.off
                or algorithm.alpha_c == 0
                or draft_vocabulary is None
                or algorithm.top_k >= len(draft_vocabulary.ids)
            )
            temperature = algorithm.temperature if options.off else options.temperature
            alike.setdefault((options.off, None if whole else draft_vocabulary, algorithm.top_k, temperature), []).append(r)
    return [_Group(*how, members) for how, members in alike.items()]


def _pays_together(model: MultiHeadLM, states: Tensor, *, one_place: bool) -> bool:
    """Whether one reading of all states is faster than one of the base's and one of some heads'.

    Args:
        states: of all heads, (n, places, hidden).
        one_place: heads 2.. are wanted at one place of every sequence, which is known beforehand, not at all of them.
    """
    if len(states) == 1 or not model.plain_readout or model.config.own_output_embedding:
        return False
    output = model.base.get_output_embeddings()
    few = (
        isinstance(output, SkinnyLinear)
        and output.weight.numel() >= HUGE
        and states[..., 0].numel() <= TOGETHER[states.dtype]
    )
    return one_place or few


def _read_heads(model: MultiHeadLM, states: Tensor, draft_vocabulary: DraftVocabulary | None) -> Tensor:
    """Logits of heads 2..; states: (heads, sequences, hidden), result: (heads, sequences, tokens) float32, of the draft
    vocabulary or of all tokens."""
    if len(states) == 0:
        return torch.empty(0, states.shape[1], model.config.vocab_size, device=states.device)
    if draft_vocabulary is not None:
        return draft_vocabulary.output(states).float()
    if model.config.own_output_embedding:
        return torch.cat([model.readout(state[None], head) for head, state in enumerate(states, start=2)]).float()
    return model.readout(states).float()
