"""The decoding loop: one forward of the trunk per step, several tokens per forward (method.md section 4).

In: a model, prompts as token ids, and how to choose. Out: tokens and statistics, row by row. One loop serves every mode:

* `verify="off"`: Algorithm 1 draws m tokens from the joint of the heads, and they stand.
* `verify="strict"`: the base's own next token, certain, and a draft of the following ones from the masked joint. The next
  forward, which absorbs them, also yields the base's distribution behind each: drafts that pass the exact rejection rule
  stay, the rest is forgotten by not counting it in the cache.
* `verify=B`: the same, but a draft that fails stays while the log-likelihood lost so far is at most B nats per token.
  Under greedy decoding drafts may be a small tree (`dynamo_lm.decoding.draft_tree`) in place of a chain, where that pays.
* one head (`num_heads=1`): the base model, one token a step, by the same code.

Knows nothing about text. Rows have their own lengths and options and do not see each other; they may join and leave a
running `Batch` between any two steps. `decode` is a batch whose rows all begin together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dynamo_lm.backbone.token_limits import context_limit
from dynamo_lm.decoding.candidates import Candidates
from dynamo_lm.decoding.draft_length import AdaptiveDraftLength
from dynamo_lm.decoding.draft_tree import depths, grow
from dynamo_lm.decoding.draft_vocabulary import draft_vocabulary_of
from dynamo_lm.decoding.kv_cache import RaggedKVCache
from dynamo_lm.decoding.logprobs import LogProbs
from dynamo_lm.decoding.model_runner import ModelRunner
from dynamo_lm.decoding.options import DecodingOptions
from dynamo_lm.decoding.protocol import MultiHeadLM
from dynamo_lm.decoding.sequence import SequenceState
from dynamo_lm.decoding.statistics import Statistics
from dynamo_lm.decoding.verification import accept_greedy, accept_sampled, accept_tree
from dynamo_lm.errors import InputError
from dynamo_lm.sampling.algorithm1 import draw_from
from dynamo_lm.sampling.drafting import draft_from
from dynamo_lm.sampling.options import check, check_weighting
from dynamo_lm.sampling.top_k import HeadCandidates, PairwiseCorrection

CHUNK = 512  # positions of a prompt whose logits exist at one time, where they are asked for


def decode(
    model: MultiHeadLM,
    prompts: Sequence[Sequence[int]],
    options: DecodingOptions,
    *,
    seeds: Sequence[int],
    on_step: Callable[[int, list[int]], None] = lambda row, tokens: None,
) -> list[SequenceState]:
    """Continues every prompt; row by row the same as each alone, up to rounding in the forward.

    Args:
        prompts: token ids, at least one each.
        seeds: of each row's random numbers.
        on_step: called with the row's number and the tokens that a step emitted for it.

    Returns:
        The rows, in the order of the prompts.

    Raises:
        InputError: an empty prompt, a prompt longer than the context, options that do not fit the model.
    """
    if options.compile and len(prompts) > 1:
        raise InputError(
            f"compile=True decodes one prompt at a time, and there are {len(prompts)}; leave it out for batches."
        )
    batch = Batch(model, options.num_heads, compile=options.compile)
    numbered = enumerate(zip(prompts, seeds, strict=True))
    rows = [batch.join(prompt, options, seed=seed, number=number) for number, (prompt, seed) in numbered]
    while batch.running:
        for row in batch.step():
            if row.emitted:
                on_step(row.number, row.emitted)
    return rows


class Batch:
    """Rows that are decoded together.

    Attributes:
        running: rows that are not finished, newcomers included.
    """

    def __init__(self, model: MultiHeadLM, num_heads: int, *, compile: bool = False):
        """Arranges the model for up to `num_heads` tokens a step.

        Args:
            compile: steps of one fixed shape, compiled, for one row at a time.

        Raises:
            InputError: heads that the model does not have; compiling is not possible.
        """
        check_heads(model, num_heads)
        self.num_heads, self.compile = num_heads, compile
        self.runner = ModelRunner(model, num_heads, compile=compile)
        self.model = self.runner.model
        coupling = self.model.coupling  # whose table of tokens the host reads in every step
        self._embedding = None if coupling is None else coupling.tokens.detach().cpu()
        self._listed = draft_vocabulary_of(self.model)
        self._newcomers: list[SequenceState] = []
        self._rows: list[SequenceState] = []
        self._batch_slots: list[int] = []  # of each of them: which of the cache's rows it is; the others are empty
        self._cache: RaggedKVCache | None = None

    @property
    def running(self) -> list[SequenceState]:
        return self._rows + self._newcomers

    def join(self, prompt: Sequence[int], options: DecodingOptions, *, seed: int, number: int = 0) -> SequenceState:
        """Adds a row; its first tokens come with the next step.

        Args:
            prompt: token ids, at least one.
            seed: of the row's random numbers.
            number: what the row is called, and its warps are called with.

        Raises:
            InputError: the row cannot be decoded as asked; the batch is as it was.
        """
        check_row(self.model, prompt, options)
        n = options.num_heads
        if n > self.num_heads:
            raise InputError(f"num_heads is {n}, but this batch was made for {self.num_heads}; give that or less.")
        if self.compile and self.running:
            raise InputError("A compiled batch holds one row at a time, and there is one already.")
        row = SequenceState(
            number,
            list(prompt),
            len(prompt),
            options,
            torch.Generator().manual_seed(seed),
            Statistics(n, proposed=[0] * (n - 1), accepted=[0] * (n - 1)),
            input_ids=list(prompt),
            pace=_pace(self.model, options),
            present=_present(prompt, self.model.config.vocab_size) if options.off else None,
            ending="length" if options.max_new_tokens == 0 else None,
        )
        self._newcomers.append(row)
        return row

    def leave(self, row: SequenceState) -> None:
        """Drops a row that is running, between steps."""
        if row in self._newcomers:
            self._newcomers.remove(row)
        elif row in self._rows:
            with torch.inference_mode():
                self._free({row})
                self._compact()

    def step(self) -> list[SequenceState]:
        """One forward over what every row emitted last, one over the prompts of newcomers, and the tokens that follow.

        Returns:
            The rows that took part. Those that are finished have left the batch.
        """
        stepped = self.running
        with torch.inference_mode():
            if self._rows:
                assert self._cache is not None
                self._advance(self._rows, self._cache, self._batch_slots, first=False)
                self._free({row for row in self._rows if row.finished})
            if self._newcomers:
                newcomers, self._newcomers = self._newcomers, []
                cache = self.runner.new_cache(newcomers)
                self._advance(newcomers, cache, range(len(newcomers)), first=True)
                self._allocate(newcomers, cache)
            self._compact()
        return stepped

    def _free(self, rows: set[SequenceState]) -> None:
        """Takes rows out; their seats stay empty."""
        if not rows:
            return
        assert self._cache is not None
        self._cache.lengths[
            [batch_slot for row, batch_slot in zip(self._rows, self._batch_slots, strict=True) if row in rows]
        ] = 0
        kept = [(row, batch_slot) for row, batch_slot in zip(self._rows, self._batch_slots, strict=True) if row not in rows]
        self._rows, self._batch_slots = [row for row, _ in kept], [batch_slot for _, batch_slot in kept]

    def _allocate(self, newcomers: list[SequenceState], cache: RaggedKVCache) -> None:
        """Takes in those newcomers that are not finished already: in empty seats, or in new ones behind the others."""
        if self._cache is None or not self._rows:
            self._rows, self._batch_slots, self._cache = newcomers, list(range(len(newcomers))), cache
            self._free({row for row in newcomers if row.finished})
            return
        going = [place for place, row in enumerate(newcomers) if not row.finished]
        if not going:
            cache.release()
            return
        if len(going) < len(newcomers):
            cache.select(torch.tensor(going))
        empty = sorted(set(range(self._cache.rows)) - set(self._batch_slots))
        if len(empty) >= len(going):
            batch_slots = empty[: len(going)]
            self._cache.copy_from(cache, torch.arange(len(going)), torch.tensor(batch_slots))
        else:
            batch_slots = list(range(self._cache.rows, self._cache.rows + len(going)))
            self._cache.extend(cache)
        cache.release()
        self._rows = self._rows + [newcomers[place] for place in going]
        self._batch_slots = self._batch_slots + batch_slots

    def _compact(self) -> None:
        """Gives empty seats back, once they are a quarter of all: each costs a step what a row does."""
        if not self._rows:
            if self._cache is not None:
                self.runner.release(self._cache)
            self._cache, self._batch_slots = None, []
        elif self._cache is not None and 4 * len(self._rows) <= 3 * self._cache.rows:
            self._cache.select(torch.tensor(self._batch_slots))
            self._batch_slots = list(range(len(self._rows)))

    def _advance(self, rows: list[SequenceState], cache: RaggedKVCache, batch_slots: Sequence[int], *, first: bool) -> None:
        """One step of rows that are all at their prompt (`first`) or all behind it; seats: theirs in the cache."""
        began = time.perf_counter()
        if first:
            for row in rows:
                row.began = began
        pace, size, promised = rows[0].pace, rows[0].size, rows[0].expected_accepted

        # 1. Absorb: one forward over what every row emitted (or drafted) last.
        read = Candidates(self.model, rows, self._forward(rows, cache, batch_slots, first), self._listed, self._embedding)
        scores = LogProbs(read.logits)

        # 2. Judge: how many of the absorbed tokens stay, and the base's next token behind them.
        verified = [self._verify(r, row, read.logits[r], scores, first) for r, row in enumerate(rows)]
        if not first and any(row.branches for row in rows):
            cache.gather(cache.by_batch_slot(batch_slots, [one.path for one in verified], []))
        kept = [row.prompt_length if first else 1 + len(one.path) for row, one in zip(rows, verified, strict=True)]
        cache.commit(torch.tensor(cache.by_batch_slot(batch_slots, kept, 0)))

        # 3. Choose: from all heads behind the last token that stays, a draft of the tokens behind the certain one, or m
        # tokens at once.
        chosen = read.at([one.last for one in verified])
        for r, (row, one) in enumerate(zip(rows, verified, strict=True)):
            if row.ending:
                continue
            if row.options.off:
                drawn = self._draw(row, *chosen[r], int(cache.lengths[batch_slots[r]]))
                scores.add(row, r, drawn[:1], behind=[one.last])
                one.emitted.extend(drawn)
            else:
                self._draft(row, *chosen[r], one.emitted, alone=len(rows) == 1)

        # 4. Emit, as far as no stop rule cuts it short.
        for r, (row, one) in enumerate(zip(rows, verified, strict=True)):
            row.statistics.forwards += 1
            if row.ending:
                row.emitted, row.finished = [], row.ending
            else:
                count = row.emit(one.emitted, self.runner.context)
                if not row.options.off:
                    scores.add(row, r, row.emitted, behind=[0, *one.path], costs=one.costs[:count])
                if row.ending and row.options.off and row.options.logprobs is not None and count > 1:
                    row.input_ids, row.parents = row.emitted, list(range(count - 1))  # one more forward scores them
                else:
                    row.finished = row.ending
            row.statistics.seconds = time.perf_counter() - row.began
        if len(rows) == 1 and pace is not None and size > 0:
            pace.record(size, time.perf_counter() - began, promised, len(verified[0].emitted) - 1)

    def _forward(self, rows: list[SequenceState], cache: RaggedKVCache, batch_slots: Sequence[int], first: bool) -> Tensor:
        """Final hidden states of the heads, (n, rows, width, hidden), of prompts those at their end alone."""
        if not first:
            return self.runner.decode(rows, cache, batch_slots)
        ends, whole = self.runner.prefill(rows, cache)
        if whole is not None:
            self._score_prompts(rows, whole)
        return ends

    def _verify(self, r: int, row: SequenceState, logits: Tensor, scores: LogProbs, first: bool) -> _Verified:
        """What stays of one row's pending tokens; logits: (width, vocabulary), the base's behind each of them."""
        drafts = [] if first else row.input_ids[1:]
        if row.options.off or row.ending:
            scores.add(row, r, drafts)
            return _Verified([], [], list(range(1, len(drafts) + 1)), len(drafts))
        options = row.options
        processed = _process_logits(row, logits, first) if options.logits_processors else logits
        if options.sample:
            verdict = accept_sampled(processed, drafts, row.proposals, row.generator, row.regret_budgets)
        elif row.pace is None:
            verdict = accept_greedy(processed, drafts, row.regret_budgets)
        else:
            verdict = accept_tree(processed, drafts, row.parents, row.regret_budgets)
        kept, token, spent, path = verdict
        for position in range(max(depths(row.parents)) if row.pace is not None else len(drafts)):
            row.statistics.proposed[position] += position <= kept  # after a refusal nothing is looked at
            row.statistics.accepted[position] += position < kept
        return _Verified([*(row.input_ids[place] for place in path), token], [*spent, 0.0], path, path[-1] if path else 0)

    def _draw(
        self, row: SequenceState, heads: HeadCandidates | None, link: PairwiseCorrection | None, held: int
    ) -> list[int]:
        """The tokens of one step of Algorithm 1, which are the next pending ones; a row near its end uses fewer heads."""
        options, algorithm = row.options, row.options.algorithm
        assert heads is not None and row.present is not None
        room = max(1, min(options.num_heads, row.left, self.runner.context - held))
        heads = heads.of(0, room)
        if link is not None and room > 1:
            heads = heads.coupled(link, algorithm.temperature)
        table = self.model.cooccurrence
        drawn = draw_from(heads, row.present, table, algorithm, row.generator, greedy=not options.sample)
        row.input_ids, row.parents = list(drawn.tokens), list(range(len(drawn.tokens) - 1))
        return list(drawn.tokens)

    def _draft(
        self,
        row: SequenceState,
        heads: HeadCandidates | None,
        link: PairwiseCorrection | None,
        emitted: list[int],
        *,
        alone: bool,
    ) -> None:
        """Sets what the row's next forward absorbs: its last certain token and drafts of those behind it.

        A tree whose size is measured is for a row alone: in a batch a forward is wide already.
        """
        options, verified_token = row.options, emitted[-1]
        row.input_ids, row.parents, row.proposals, row.size = [verified_token], [], [], 0
        room = min(options.num_heads, min(self.runner.context - len(row.tokens), row.left) - len(emitted)) - 1
        if heads is None or room <= 0:
            return
        alpha_c, temperature, table = options.algorithm.alpha_c, options.draft_temperature, self.model.cooccurrence
        how = {"alpha_c": alpha_c, "temperature": temperature}
        if row.pace is not None and (alone or options.tree is not None):
            tree = grow(heads.of(0, room), verified_token, table, **how, link=link, most=row.pace.sizes[-1] - 1)
            row.size = row.pace.choose(tree.probabilities)
            tree = tree.first(row.size - 1)
            row.input_ids, row.parents, row.expected_accepted = (
                [verified_token, *tree.tokens],
                tree.parents,
                sum(tree.probabilities),
            )
            return
        greedy = not options.sample
        drafted = draft_from(
            heads.of(0, room), verified_token, table, **how, generator=row.generator, greedy=greedy, link=link
        )
        row.input_ids, row.proposals = (
            [verified_token, *drafted.tokens],
            [] if greedy else drafted.proposals,
        )  # nobody asks for those
        row.parents = list(range(len(drafted.tokens)))

    def _score_prompts(self, rows: list[SequenceState], hidden: Tensor) -> None:
        """Scores the prompts of the rows that ask for it; hidden: the base's final states, (rows, width, hidden)."""
        for r, row in enumerate(rows):
            if not row.options.prompt_logprobs:
                continue
            row.prompt_scores = [None]
            for start in range(0, row.prompt_length - 1, CHUNK):
                end = min(start + CHUNK, row.prompt_length - 1)
                logits = self.model.readout(hidden[r, start:end][None]).cpu().float()  # (1, chunk, vocabulary)
                scores = LogProbs(logits)
                row.prompt_scores += [scores.of(row, 0, row.tokens[at + 1], at - start) for at in range(start, end)]


class _Verified(NamedTuple):
    """What one step keeps of what a row absorbed."""

    emitted: list[int]  # tokens that are certain now; none under "off", which draws them later
    costs: list[float]  # of each, if it was verified
    path: list[int]  # where the pending tokens that stay are, behind the first
    last: int  # where the last of them is


def check_heads(model: MultiHeadLM, num_heads: int) -> None:
    """Refuses heads that the model does not have. Raises InputError."""
    if not 1 <= num_heads <= model.num_heads:
        raise InputError(f"num_heads is {num_heads}, but the model has {model.num_heads}; give 1 to {model.num_heads}.")


def check_row(model: MultiHeadLM, prompt: Sequence[int], options: DecodingOptions) -> None:
    """The preconditions of one row. Raises InputError."""
    check_heads(model, options.num_heads)
    context = context_limit(model.config)
    if len(prompt) == 0:
        raise InputError("The prompt is empty; give at least one token.")
    if len(prompt) >= context + (options.max_new_tokens == 0):
        raise InputError(f"The prompt has {len(prompt)} tokens and the model's context is {context}; shorten it.")
    if min(prompt) < 0 or max(prompt) >= model.config.vocab_size:
        stranger = next(token for token in prompt if not 0 <= token < model.config.vocab_size)
        raise InputError(
            f"The prompt has token {stranger}, but the model's vocabulary ends at "
            f"{model.config.vocab_size - 1}; use the model's own tokenizer."
        )
    if options.off and options.logits_processors:
        raise InputError(
            'Logits processors do not apply to the joint that verify="off" draws from; set Algorithm 1\'s own knobs.'
        )
    if options.num_heads > 1 or options.off:
        check_weighting(options.algorithm.alpha_c, options.algorithm.top_k, options.draft_temperature)
        needed = options.num_heads if options.off else 1  # drafts back off to what the tables hold
        check(options.algorithm, needed, model.config.vocab_size, model.cooccurrence)


def _process_logits(row: SequenceState, logits: Tensor, first: bool) -> Tensor:
    """What the base samples from behind each absorbed token; logits and result: (width, vocabulary)."""
    behind = row.tokens if first else row.tokens + row.input_ids[1:]
    result = []
    for position, line in enumerate(logits[: len(behind) - len(row.tokens) + 1]):
        so_far = torch.tensor(behind[: len(row.tokens) + position])
        for processor in row.options.logits_processors:
            line = processor(row.number, so_far, line)
        result.append(line)
    return torch.stack(result)


def _pace(model: MultiHeadLM, options: DecodingOptions) -> AdaptiveDraftLength | None:
    """How many drafts a step carries, if they are a tree: for greedy choices of unwarped logits."""
    n = options.num_heads
    if options.sample or options.off or options.logits_processors or n == 1 or options.tree == 0:
        return None
    if options.tree is not None:
        return AdaptiveDraftLength((options.tree + 1,))
    # Sizes that change from run to run change the rounding: harmless in float32, not where close calls are ties.
    if options.budget > 0 or model.dtype != torch.float32 or options.compile:
        return None
    key = (n, torch.get_num_threads(), model.device)
    return model.runtime.draft_lengths.setdefault(key, AdaptiveDraftLength((n, 2 * n, 4 * n)))


def _present(tokens: Sequence[int], vocab_size: int) -> np.ndarray:
    present = np.zeros(vocab_size, bool)
    present[list(tokens)] = True
    return present
