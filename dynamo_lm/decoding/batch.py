"""The decoding loop: one forward of the model per step, several tokens per forward (docs/method.md section 4).

In: a model, prompts as token ids, and how to choose tokens. Out: tokens and statistics of each sequence. One loop serves
every mode:

* `verify="off"`: Algorithm 1 draws m tokens from the joint of the heads, and they are emitted unverified.
* `verify="strict"`: the base's own next token, verified, and a draft of the following ones from the heads and n-grams.
  The next forward, which takes them in, also yields the base's distribution after each: drafts that pass the exact
  rejection rule are accepted, and the others are dropped by not counting them in the cache.
* `verify=B`: the same, but a rejected draft is accepted while the log-likelihood lost so far (at temperature 1) is at most
  B nats per token.
  Under greedy decoding drafts may be a small tree (`dynamo_lm.decoding.draft_tree`) in place of a chain, where that pays.
* one head (`num_heads=1`): the base model, one token a step, by the same code.

Knows nothing about text. Sequences have their own lengths and options and do not see each other; they may join and leave a
running `Batch` between any two steps (continuous batching). `decode` is a batch whose sequences all begin together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dynamo_lm.backbone.base_model import captured_inputs
from dynamo_lm.backbone.rope_limits import length_limit
from dynamo_lm.backbone.token_limits import context_limit
from dynamo_lm.decoding.candidates import Candidates
from dynamo_lm.decoding.draft_length import (
    BatchDraftLength,
    batch_draft_length_of,
    draft_length_of,
    drafts_freely,
)
from dynamo_lm.decoding.draft_tree import depths
from dynamo_lm.decoding.draft_vocabulary import draft_vocabulary_of
from dynamo_lm.decoding.drafter import Drafter
from dynamo_lm.decoding.kv_cache import RaggedKVCache
from dynamo_lm.decoding.logprobs import LogProbs
from dynamo_lm.decoding.model_runner import ModelRunner
from dynamo_lm.decoding.options import DecodingOptions
from dynamo_lm.decoding.preconditions import check_heads, check_sequence, is_sequential
from dynamo_lm.decoding.protocol import MultiHeadLM
from dynamo_lm.decoding.sequence import SequenceState
from dynamo_lm.decoding.statistics import Statistics
from dynamo_lm.decoding.verification import (
    accept_greedy,
    accept_sampled,
    accept_synthetic,
    accept_tree,
    check_logits,
)
from dynamo_lm.errors import InputError
from dynamo_lm.sampling.algorithm1 import draw_from
from dynamo_lm.sampling.top_k import HeadCandidates, PairwiseCorrection

CHUNK = 512  # positions of a prompt whose logits exist at one time, if the prompt is scored


def decode(
    model: MultiHeadLM,
    prompts: Sequence[Sequence[int]],
    options: DecodingOptions | Sequence[DecodingOptions],
    *,
    seeds: Sequence[int],
    on_step: Callable[[int, list[int]], None] = lambda sequence, tokens: None,
) -> list[SequenceState]:
    """Continues every prompt, each as it would be continued alone, up to rounding in the forward.

    Args:
        prompts: token ids, at least one each.
        options: of all sequences, or one each, which differ in their processors and criteria only.
        seeds: of each sequence's random numbers.
        on_step: called with the sequence's number and the tokens that a step emitted for it.

    Returns:
        The sequences, in the order of the prompts.

    Raises:
        InputError: an empty prompt, a prompt longer than the context, options that do not fit the model.
    """
    each = [options] * len(prompts) if isinstance(options, DecodingOptions) else list(options)
    options = each[0]
    if options.compile and len(prompts) > 1:
        raise InputError(
            f"compile=True decodes one prompt at a time, and there are {len(prompts)}; leave it out for batches."
        )
    batch = Batch(model, options.num_heads, compile=options.compile)
    numbered = enumerate(zip(prompts, each, seeds, strict=True))
    sequences = [batch.join(prompt, own, seed=seed, number=number) for number, (prompt, own, seed) in numbered]
    while batch.running:
        for sequence in batch.step():
            if sequence.emitted:
                on_step(sequence.number, sequence.emitted)
    return sequences


class Batch:
    """Sequences that are decoded together.

    Attributes:
        running: sequences that are not finished, newcomers included.
    """

    def __init__(self, model: MultiHeadLM, num_heads: int, *, compile: bool = False):
        """Arranges the model for up to `num_heads` tokens a step.

        Args:
            compile: steps of one fixed shape, compiled, for one sequence at a time.

        Raises:
            InputError: heads that the model does not have; compiling is not possible.
        """
        check_heads(model, num_heads)
        self.num_heads, self.compile = num_heads, compile
        sequential = is_sequential(model)
        if sequential and compile:
            raise InputError("compile=True does not know heads of the eagle3 kind; leave it out.")
        self.runner = ModelRunner(model, 1 if sequential else num_heads, compile=compile)
        self.model = self.runner.model
        coupling = self.model.coupling  # whose token factors the host reads in every step
        self._embedding = None if coupling is None else coupling.tokens.detach().cpu()
        self._draft_vocabulary = draft_vocabulary_of(self.model) if num_heads > 1 else None
        self._drafter = Drafter(self.runner, num_heads, self._draft_vocabulary)
        self._newcomers: list[SequenceState] = []
        self._sequences: list[SequenceState] = []
        self._slots: list[int] = []  # of the cache, by sequence; the others are empty
        self._cache: RaggedKVCache | None = None
        self._device = self.model.device
        self._most: int | None = None  # drafts of a sequence, where the batch decides that

    @property
    def running(self) -> list[SequenceState]:
        return self._sequences + self._newcomers

    def join(self, prompt: Sequence[int], options: DecodingOptions, *, seed: int, number: int = 0) -> SequenceState:
        """Adds a sequence; its first tokens come with the next step.

        Args:
            prompt: token ids, at least one.
            seed: of the sequence's random numbers.
            number: identifies the sequence to the caller and to its logits processors.

        Raises:
            InputError: the sequence cannot be decoded with these options; the batch is as it was.
        """
        check_sequence(self.model, prompt, options)
        n = options.num_heads
        if n > self.num_heads:
            raise InputError(f"num_heads is {n}, but this batch was made for {self.num_heads}; give that or less.")
        if self.compile and self.running:
            raise InputError("A compiled batch holds one sequence at a time, and there is one already.")
        others = [sequence.prompt_length for sequence in self.running]
        self.runner.context = length_limit(
            self.model.config, context_limit(self.model.config), len(prompt), others, compiled=self.compile
        )
        sequence = SequenceState(
            number,
            list(prompt),
            len(prompt),
            options,
            torch.Generator().manual_seed(seed),
            Statistics(options.ceiling, proposed=[0] * (n - 1), accepted=[0] * (n - 1)),
            input_ids=list(prompt),
            draft_length=draft_length_of(self.model, options),
            drafts_freely=drafts_freely(self.model, options),
            present=_present(prompt, self.model.config.vocab_size) if options.off else None,
            ending="length" if options.max_new_tokens == 0 else None,
        )
        self._newcomers.append(sequence)
        return sequence

    def leave(self, sequence: SequenceState) -> None:
        """Drops a running sequence, between steps."""
        if sequence in self._newcomers:
            self._newcomers.remove(sequence)
        elif sequence in self._sequences:
            with torch.inference_mode():
                self._free({sequence})
                self._compact()

    def step(self) -> list[SequenceState]:
        """Decodes with one forward for the running sequences, prefills with another for newcomers, and emits tokens.

        Returns:
            The sequences that took part. Those that are finished have left the batch.
        """
        stepped = self.running
        with torch.inference_mode():
            if self._sequences:
                assert self._cache is not None
                self._decode(self._sequences, self._cache)
                self._free({sequence for sequence in self._sequences if sequence.finished})
            if self._newcomers:
                newcomers, self._newcomers = self._newcomers, []
                cache = self.runner.new_cache(newcomers)
                self._advance(newcomers, cache, range(len(newcomers)), first=True)
                self._allocate(newcomers, cache)
            self._compact()
        return stepped

    def _decode(self, sequences: list[SequenceState], cache: RaggedKVCache) -> None:
        """A step of sequences that are past their prompts, with as many CPU threads as are fastest, if that is asked for."""
        threads = self.model.runtime.threads
        if threads is None or self.compile:  # compiled code is made for one number, and would be compiled anew
            return self._advance(sequences, cache, self._slots, first=False)
        began, usual, tokens = time.perf_counter(), torch.get_num_threads(), sum(len(each.input_ids) for each in sequences)
        count = threads.choose()
        torch.set_num_threads(count)
        try:
            self._advance(sequences, cache, self._slots, first=False)
        finally:
            torch.set_num_threads(usual)
        threads.record(count, time.perf_counter() - began, tokens)

    def _draft_length(self, sequences: list[SequenceState]) -> BatchDraftLength | None:
        """What decides how many drafts the sequences carry, where that changes nothing but the time."""
        free = len(sequences) > 1 and all(sequence.drafts_freely for sequence in sequences)
        return batch_draft_length_of(self.model, self.num_heads, self._device) if free else None

    def _free(self, sequences: set[SequenceState]) -> None:
        """Takes sequences out; their slots stay empty."""
        if not sequences:
            return
        assert self._cache is not None
        pairs = list(zip(self._sequences, self._slots, strict=True))
        self._cache.lengths[[slot for sequence, slot in pairs if sequence in sequences]] = 0
        pairs = [(sequence, slot) for sequence, slot in pairs if sequence not in sequences]
        self._sequences, self._slots = [sequence for sequence, _ in pairs], [slot for _, slot in pairs]

    def _allocate(self, newcomers: list[SequenceState], cache: RaggedKVCache) -> None:
        """Gives the newcomers that are not finished already empty slots, or new ones after the others."""
        if self._cache is None or not self._sequences:
            self._compact()  # gives back the cache of sequences that have all just ended
            self._sequences, self._slots, self._cache = newcomers, list(range(len(newcomers))), cache
            self._free({sequence for sequence in newcomers if sequence.finished})
            return
        going = [place for place, sequence in enumerate(newcomers) if not sequence.finished]
        if not going:
            cache.release()
            return
        if len(going) < len(newcomers):
            cache.select(torch.tensor(going))
        empty = sorted(set(range(self._cache.num_slots)) - set(self._slots))
        if len(empty) >= len(going):
            slots = empty[: len(going)]
            self._cache.copy_from(cache, torch.arange(len(going)), torch.tensor(slots))
        else:
            slots = list(range(self._cache.num_slots, self._cache.num_slots + len(going)))
            self._cache.extend(cache)
        cache.release()
        self._sequences = self._sequences + [newcomers[place] for place in going]
        self._slots = self._slots + slots

    def _compact(self) -> None:
        """Gives empty slots back, once they are a quarter of all: each costs a step what a sequence does."""
        if not self._sequences:
            if self._cache is not None:
                self.runner.release(self._cache)
            self._cache, self._slots = None, []
        elif self._cache is not None and 4 * len(self._sequences) <= 3 * self._cache.num_slots:
            self._cache.select(torch.tensor(self._slots))
            self._slots = list(range(len(self._sequences)))

    def _advance(self, sequences: list[SequenceState], cache: RaggedKVCache, slots: Sequence[int], *, first: bool) -> None:
        """One step of sequences that are all at their prompt (`first`) or all past it; slots: theirs in the cache."""
        began = time.perf_counter()
        if first:
            for sequence in sequences:
                sequence.began = began
        alone, draft_length, drafts = len(sequences) == 1, sequences[0].draft_length, sequences[0].drafts
        rests = alone and not first and draft_length is not None and draft_length.rests()
        goodput, most, carried = self._draft_length(sequences), self._most, [len(each.input_ids) - 1 for each in sequences]
        if not first:  # newcomers join the others, with as many drafts
            self._most = None if goodput is None else goodput.choose(len(sequences))

        # 1. Prefill or decode: one forward over the prompts, or over what every sequence emitted (or drafted) last.
        with captured_inputs(self._drafter.read_layers) as features:
            hidden = self._forward(sequences, cache, slots, first, heads=not rests)
        candidates = Candidates(self.model, sequences, hidden, self._draft_vocabulary, self._embedding)
        scores = LogProbs(candidates.logits)

        # 2. Verify: how many of the input tokens are accepted, and the base's next token after them.
        verified = [self._verify(r, sequence, candidates.logits[r], scores, first) for r, sequence in enumerate(sequences)]
        if not first and any(sequence.branches for sequence in sequences):
            cache.gather(cache.by_slot(slots, [result.path for result in verified], []))
        kept = [
            sequence.prompt_length if first else 1 + len(result.path)
            for sequence, result in zip(sequences, verified, strict=True)
        ]
        cache.commit(torch.tensor(cache.by_slot(slots, kept, 0)))

        # 3. Choose: from all heads at the last accepted token, a draft of the tokens after the verified one, or m tokens at
        # once.
        drafting = time.perf_counter()
        wanted = [
            0 if each.ending else each.options.num_heads if each.options.off
            else self._drafter.begin(
                each, result.emitted, alone=alone, rests=rests, most=self._most if each.drafts_freely else None
            )
            for each, result in zip(sequences, verified, strict=True)
        ]  # fmt: skip
        chosen: list[tuple[Any, Any]] = [(None, None)] * len(sequences)
        if self._drafter.head is None and any(wanted):
            chosen = candidates.at([result.last for result in verified])
        for r, (sequence, result) in enumerate(zip(sequences, verified, strict=True)):
            if sequence.ending:
                continue
            if sequence.options.off:
                drawn = self._draw(sequence, *chosen[r], int(cache.lengths[slots[r]]))
                scores.add(sequence, r, drawn[:1], after=[result.last])
                result.emitted.extend(drawn)
                continue
            if self._drafter.head is not None:
                self._drafter.keep_unread(sequence, features[0][slots[r]], result.emitted, result.path, first=first)
            if wanted[r]:
                self._drafter.draft(sequence, result.emitted, wanted[r], *chosen[r], alone=alone)
        sequences[0].drafts.seconds = time.perf_counter() - drafting

        # 4. Emit, up to the first stopping criterion.
        for r, (sequence, result) in enumerate(zip(sequences, verified, strict=True)):
            sequence.statistics.forwards += 1
            if sequence.ending:
                sequence.emitted, sequence.finished = [], sequence.ending
            else:
                count = sequence.emit(result.emitted, self.runner.context)
                if not sequence.options.off:
                    scores.add(sequence, r, sequence.emitted, after=[0, *result.path], costs=result.costs[:count])
                if sequence.ending and sequence.options.off and sequence.options.logprobs is not None and count > 1:
                    # One more forward scores them.
                    sequence.input_ids, sequence.parents = sequence.emitted, list(range(count - 1))
                else:
                    sequence.finished = sequence.ending
            sequence.statistics.seconds = time.perf_counter() - sequence.began
        seconds = time.perf_counter() - began
        if alone and draft_length is not None and not first:
            if rests and carried == [0]:
                draft_length.record_rest(seconds)
            elif drafts.size and not rests:
                own = seconds - sequences[0].drafts.seconds + drafts.seconds  # of these drafts, not of the next ones
                draft_length.record(drafts.size, own, drafts.expected, len(verified[0].path))
        if goodput is not None and most is not None and self._most == most and not first:
            goodput.record(most, seconds, carried, [len(result.path) for result in verified])

    def _forward(
        self, sequences: list[SequenceState], cache: RaggedKVCache, slots: Sequence[int], first: bool, *, heads: bool
    ) -> Tensor:
        """Final hidden states of the heads, (n, sequences, width, hidden); of prompts those at their end alone.

        heads: whether anything is read from heads 2..
        """
        if not first:
            return self.runner.decode(sequences, cache, slots, heads=heads)
        ends, whole = self.runner.prefill(sequences, cache)
        if whole is not None:
            self._score_prompts(sequences, whole)
        return ends

    def _verify(self, r: int, sequence: SequenceState, logits: Tensor, scores: LogProbs, first: bool) -> _Verified:
        """Which of one sequence's input tokens are accepted; logits: (width, vocabulary), the base's after each of them."""
        drafts = [] if first else sequence.input_ids[1:]
        if sequence.options.off or sequence.ending:
            scores.add(sequence, r, drafts)
            return _Verified([], [], list(range(1, len(drafts) + 1)), len(drafts))
        options = sequence.options
        processed, budgets = sequence.process_logits(logits, first), sequence.regret_budgets
        check_logits(processed[: len(drafts) + 1], sample=options.sample)
        if options.synthetic_acceptance is not None:
            verification = accept_synthetic(processed, drafts, options.synthetic_acceptance, sequence.generator)
        elif options.sample:
            how = sequence.proposals, sequence.generator, budgets
            verification = accept_sampled(processed, drafts, *how, temperature=options.temperature)
        elif sequence.branches:
            verification = accept_tree(processed, drafts, sequence.parents, budgets)
        else:
            verification = accept_greedy(processed, drafts, budgets)
        accepted, token, costs, path = verification
        deepest = max(depths(sequence.parents)) if sequence.branches else len(drafts)
        sequence.statistics.record_drafts(deepest, accepted, looked_up=sequence.looked_up)
        return _Verified(
            [*(sequence.input_ids[place] for place in path), token], [*costs, 0.0], path, path[-1] if path else 0
        )

    def _draw(
        self, sequence: SequenceState, heads: HeadCandidates | None, pairwise: PairwiseCorrection | None, held: int
    ) -> list[int]:
        """The tokens of one step of Algorithm 1, the next input; a sequence near its end uses fewer heads."""
        options, algorithm = sequence.options, sequence.options.algorithm
        assert heads is not None and sequence.present is not None
        room = max(1, min(options.num_heads, sequence.left, self.runner.context - held))
        heads = heads.of(0, room)
        if pairwise is not None and room > 1:
            heads = heads.coupled(pairwise, algorithm.temperature)
        table = self.model.cooccurrence
        drawn = draw_from(heads, sequence.present, table, algorithm, sequence.generator, greedy=not options.sample)
        sequence.input_ids, sequence.parents = list(drawn.tokens), list(range(len(drawn.tokens) - 1))
        return list(drawn.tokens)

    def _score_prompts(self, sequences: list[SequenceState], hidden: Tensor) -> None:
        """Scores the prompts of sequences with `prompt_logprobs`; hidden: the base's, (sequences, width, hidden)."""
        for r, sequence in enumerate(sequences):
            if not sequence.options.prompt_logprobs:
                continue
            sequence.prompt_scores = [None]
            for start in range(0, sequence.prompt_length - 1, CHUNK):
                end = min(start + CHUNK, sequence.prompt_length - 1)
                logits = self.model.readout(hidden[r, start:end][None]).cpu().float()  # (1, chunk, vocabulary)
                scores = LogProbs(logits)
                sequence.prompt_scores += [
                    scores.of(sequence, 0, sequence.tokens[at + 1], at - start) for at in range(start, end)
                ]


class _Verified(NamedTuple):
    """What one step keeps of a sequence's input tokens."""

    emitted: list[int]  # verified tokens; none under "off", which draws them later
    costs: list[float]  # of each, if it was verified
    path: list[int]  # places of the accepted input tokens after the first
    last: int  # place of the last accepted one


def _present(tokens: Sequence[int], vocab_size: int) -> np.ndarray:
    present = np.zeros(vocab_size, bool)
    present[list(tokens)] = True
    return present
