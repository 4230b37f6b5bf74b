"""The decoding loop: one forward of the trunk per step, several tokens per forward (method.md section 4).

In: a model, prompts as token ids, and how to choose. Out: tokens and statistics, row by row. One loop serves every mode:

* `verify="off"`: Algorithm 1 draws m tokens from the joint of the heads, and they stand.
* `verify="strict"`: the base's own next token, certain, and a draft of the following ones from the masked joint. The next
  forward, which absorbs them, also yields the base's distribution behind each: drafts that pass the exact rejection rule
  stay, the rest is forgotten by not counting it in the cache.
* `verify=B`: the same, but a draft that fails stays while the log-likelihood lost so far is at most B nats per token.
  Under greedy decoding drafts may be a small tree (`dynamo_lm.tree`) in place of a chain, where that pays.
* one head (`num_heads=1`): the base model, one token a step, by the same code.

Knows nothing about text; rows of a batch have their own lengths and do not see each other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dynamo_lm.cache import FixedCache, RowCache, attention_mask
from dynamo_lm.compiling import capacity, compiled
from dynamo_lm.errors import InputError
from dynamo_lm.joint import Heads, Link
from dynamo_lm.model import DynaMoForCausalLM
from dynamo_lm.sampling import Algorithm1, check, check_weighting, draft_from, draw_from
from dynamo_lm.tree import Pace, ancestry, depths, grow
from dynamo_lm.verification import Proposal, accept_greedy, accept_sampled, accept_tree

Warp = Callable[[int, Tensor, Tensor], Tensor]  # row, tokens so far (t,), logits (vocabulary,) -> logits to sample from
Stop = Callable[[Tensor], bool]  # tokens so far (t,), prompt included -> whether the row ends here


@dataclass(frozen=True)
class DecodingOptions:
    """How to choose tokens."""

    max_new_tokens: int
    num_heads: int  # heads used, 1..n: the ceiling on tokens per step
    verify: str | float = "strict"  # or "off", or a budget in nats per token, of which 0 is "strict"
    sample: bool = False  # else the most likely: of the base under "strict", of the joint under "off"
    algorithm: Algorithm1 = field(default_factory=Algorithm1)  # under "off"; its alpha_c and top_k shape drafts, too
    compile: bool = False  # steps of one fixed shape, compiled: one row, a C++ compiler on CPUs, a minute the first time
    tree: int | None = None  # greedy, verified: drafts a forward carries as a tree; 0: a chain; None: measured, if exact
    draft_temperature: float = 1.0  # under "strict" with sampling: near the temperature that the base samples at
    end_tokens: frozenset[int] = frozenset()
    warps: tuple[Warp, ...] = ()  # under "strict": what turns the base's logits into those it samples from
    stops: tuple[Stop, ...] = ()

    def __post_init__(self) -> None:
        check_verify(self.verify)
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}; give 1 or more.")
        if self.tree is not None and not 0 <= self.tree < 64:
            raise InputError(f"tree is {self.tree}; give the number of drafts, up to 63, 0 for a chain.")

    @property
    def budget(self) -> float:
        """Nats per token that drafts may cost."""
        return 0.0 if isinstance(self.verify, str) else float(self.verify)


def check_verify(verify: str | float) -> None:
    """Refuses what is no place on the dial. Raises InputError."""
    if verify in ("strict", "off"):
        return
    if isinstance(verify, (str, bool)) or not 0 <= verify < math.inf:
        raise InputError(
            f'verify is "{verify}"; give "strict" (exact), "off" (the paper\'s Algorithm 1) or a budget in nats per token, '
            "such as 0.1 (0 = exact)."
        )


@dataclass
class Statistics:
    """What one row cost and what it is worth.

    Speed-ups follow from `tokens_per_step`, whose ceiling is `ceiling`, against one token per step (the same loop with one
    head). Log-likelihood and regret are the base's own, at temperature 1, in nats.
    """

    ceiling: int  # n, the most tokens a step can emit
    forwards: int = 0  # of the trunk, the prompt's included
    new_tokens: int = 0
    step_sizes: list[int] = field(default_factory=list)  # tokens emitted by each step, in order
    proposed: list[int] = field(default_factory=list)  # drafts of heads 2..n that were verified, by head
    accepted: list[int] = field(default_factory=list)  # of those, kept
    log_likelihood: float = 0.0  # of the emitted tokens that were scored
    scored: int = 0  # emitted tokens whose base distribution was seen; the last step's drafts never are
    regret: float = 0.0  # what unverified tokens cost: log p(the base's choice) - log p(the token), summed
    unverified: int = 0  # scored tokens that were emitted without verification, or in spite of it (on a budget)
    seconds: float = 0.0  # from the first forward to this row's end; shared by the rows of a batch

    @property
    def tokens_per_step(self) -> float:
        return self.new_tokens / self.forwards if self.forwards else 0.0

    @property
    def histogram(self) -> list[int]:
        """How many steps emitted 1, 2, .. n tokens."""
        return [self.step_sizes.count(size) for size in range(1, self.ceiling + 1)]

    @property
    def acceptance(self) -> list[float]:
        """Share of the drafts of heads 2..n that were kept, where any was verified."""
        return [kept / tried if tried else 0.0 for kept, tried in zip(self.accepted, self.proposed, strict=True)]

    @property
    def mean_log_likelihood(self) -> float:
        """Nats per scored token."""
        return self.log_likelihood / self.scored if self.scored else 0.0

    @property
    def mean_regret(self) -> float:
        """Nats per scored token: what a budget bounds."""
        return self.regret / self.scored if self.scored else 0.0


@dataclass
class Row:
    """One sequence being decoded."""

    number: int  # in the batch that was asked for
    tokens: list[int]  # prompt and everything emitted
    prompt_length: int
    generator: torch.Generator
    statistics: Statistics
    pending: list[int]  # what the next forward absorbs: the prompt, then last step's tokens
    parents: list[int] = field(default_factory=list)  # of a tree: where in pending the token before pending[1:] is
    size: int = 1  # tokens that this step was to carry
    promise: float = 0.0  # how many of the tree's drafts should be kept
    proposals: list[Proposal] = field(default_factory=list)  # the distributions pending[1:] were drafted from
    present: np.ndarray | None = None  # under "off", (vocabulary,) bool: the tokens that are there already
    finished: bool = False

    @property
    def new_tokens(self) -> list[int]:
        return self.tokens[self.prompt_length :]


@torch.inference_mode()
def decode(
    model: DynaMoForCausalLM,
    prompts: Sequence[Sequence[int]],
    options: DecodingOptions,
    *,
    seeds: Sequence[int],
    on_step: Callable[[int, list[int]], None] = lambda row, tokens: None,
) -> list[Row]:
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
    context = _check(model, prompts, options)
    forward: Callable[..., Tensor]
    if options.compile:
        model, forward = compiled(model, options, len(prompts))
    else:
        model = model.for_decoding(options.num_heads)
        forward = model.hidden
    n, off, algorithm = options.num_heads, options.verify == "off", options.algorithm
    base_config, device = model.base.config, model.device
    rows = [
        Row(
            number,
            list(prompt),
            len(prompt),
            torch.Generator().manual_seed(seed),
            Statistics(n, proposed=[0] * (n - 1), accepted=[0] * (n - 1)),
            pending=list(prompt),
            present=_present(prompt, model.config.vocab_size) if off else None,
        )
        for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    ]
    running = list(rows)
    pace = _pace(model, options)
    fixed = 0  # tokens of every forward behind the prompt's, if they are all to have one shape
    if options.compile:
        fixed = pace.sizes[-1] if pace is not None else n
        cache: RowCache = FixedCache(model.cache_entries, capacity(len(prompts[0]) + options.max_new_tokens + fixed))
    else:
        cache = RowCache(model.cache_entries, len(rows))
    began = time.perf_counter()

    while running:
        # 1. Absorb: one forward over what every row emitted (or drafted) last; shorter rows are padded behind their end.
        step_began, size, promised = time.perf_counter(), running[0].size, running[0].promise
        first = running[0].statistics.forwards == 0
        width = max(len(row.pending) for row in running) if first else max(fixed, *(len(row.pending) for row in running))
        positions = cache.begin(width)  # (rows, width)
        tokens = torch.tensor([row.pending + [0] * (width - len(row.pending)) for row in running])
        keys, visible = torch.arange(cache.end)[None], None
        if pace is not None and not first:
            positions, keys, visible = _as_trees(cache, positions, [row.parents for row in running])
        mask = attention_mask(base_config, positions, keys, model.dtype, visible=visible, device=device)
        hidden = (model.hidden if first else forward)(
            tokens.to(device),
            num_heads=n,
            attention_mask=mask,
            position_ids=positions.clamp(max=context - 1).to(device),
            past_key_values=cache,
        )  # (n, rows, width, hidden)
        index = torch.arange(len(running), device=device)
        if first:  # of a prompt only the last position is read
            ends = torch.tensor([len(row.pending) - 1 for row in running], device=device)
            logits = model.readout(hidden[0, index, ends][:, None]).float().cpu()  # (rows, 1, vocabulary)
        else:
            logits = model.readout(hidden[0]).float().cpu()  # (rows, width, vocabulary)
        scores = Scores(logits)

        # 2. Judge: how many of the absorbed tokens stay, and the base's next token behind them.
        emitted: list[list[int]] = []
        costs: list[list[float]] = []  # of the emitted tokens, where they were verified
        last: list[int] = []  # index in `logits` of the last position that stays
        paths: list[list[int]] = []  # indices of the drafts that stay
        for r, row in enumerate(running):
            row.statistics.forwards += 1
            drafts = [] if first else row.pending[1:]
            if off:
                scores.add(row.statistics, r, drafts)
                last.append(len(drafts))
                continue
            warped = _warp(row, logits[r], options) if options.warps else logits[r]
            allowance = _allowance(row, options, len(drafts))
            if options.sample:
                verdict = accept_sampled(warped, drafts, row.proposals, row.generator, allowance)
            elif pace is None:
                verdict = accept_greedy(warped, drafts, allowance)
            else:
                verdict = accept_tree(warped, drafts, row.parents, allowance)
            kept, token, spent, path = verdict
            for position in range(max(depths(row.parents)) if pace is not None else len(drafts)):
                row.statistics.proposed[position] += position <= kept  # after a refusal nothing is looked at
                row.statistics.accepted[position] += position < kept
            emitted.append([*(row.pending[place] for place in path), token])
            costs.append([*spent, 0.0])
            paths.append(path)
            last.append(path[-1] if path else 0)
        if pace is not None:
            cache.gather(paths)
        kept_tokens = [len(drafts) for drafts in emitted] if not off else [at + 1 for at in last]
        cache.keep(torch.tensor([len(row.pending) for row in running] if first else kept_tokens))

        # 3. Choose: from all heads at that position, a draft of the tokens behind the certain one, or m tokens at once.
        at = ends if first else torch.tensor(last, device=device)
        states = hidden[1:, index, at]  # (n-1, rows, hidden)
        ahead = _read_heads(model, states)  # (n-1, rows, vocabulary)
        if off:  # rows that may still emit fewer than n tokens use fewer heads
            candidates = torch.cat([logits[index.cpu(), torch.tensor(last)][None], ahead])  # (n, rows, vocabulary)
            tops = Heads.top(candidates.transpose(0, 1).flatten(0, 1), algorithm.top_k, algorithm.temperature)
        elif n > 1:
            tops = Heads.top(ahead.transpose(0, 1).flatten(0, 1), algorithm.top_k, options.draft_temperature)
        for r, row in enumerate(running):
            link = _link(model, states[:, r]) if n > 1 and model.coupling is not None else None
            if off:
                room = max(1, min(n, _left(row, options), context - int(cache.lengths[r])))
                heads = tops.of(r * n, r * n + room)
                if link is not None and room > 1:
                    heads = heads.coupled(link, algorithm.temperature)
                assert row.present is not None
                drawn = draw_from(
                    heads, row.present, model.cooccurrence, algorithm, row.generator, greedy=not options.sample
                )
                row.pending = list(drawn.tokens)
                scores.add(row.statistics, r, drawn.tokens[:1], behind=[last[r]])
                emitted.append(row.pending)
            else:
                room = min(n, min(context - len(row.tokens), _left(row, options)) - len(emitted[r])) - 1
                row.pending, row.parents, row.proposals, row.promise = [emitted[r][-1]], [], [], 0.0
                if room > 0 and pace is not None:
                    tree = grow(
                        tops.of(r * (n - 1), r * (n - 1) + room),
                        emitted[r][-1],
                        model.cooccurrence,
                        alpha_c=algorithm.alpha_c,
                        temperature=options.draft_temperature,
                        link=link,
                        most=pace.sizes[-1] - 1,
                    )
                    row.size = pace.choose(tree.probabilities)
                    tree = tree.first(row.size - 1)
                    row.pending, row.parents = row.pending + tree.tokens, tree.parents
                    row.promise = sum(tree.probabilities)
                elif room > 0:
                    drafted = draft_from(
                        tops.of(r * (n - 1), r * (n - 1) + room),
                        emitted[r][-1],
                        model.cooccurrence,
                        alpha_c=algorithm.alpha_c,
                        temperature=options.draft_temperature,
                        generator=row.generator,
                        greedy=not options.sample,
                        link=link,
                    )
                    row.pending += drafted.tokens
                    row.proposals = drafted.proposals

        # 4. Emit, as far as no stop rule cuts it short.
        for r, (row, new) in enumerate(zip(running, emitted, strict=True)):
            count = _emit(row, new, options, context)
            if not off:
                scores.add(row.statistics, r, new[:count], behind=[0, *paths[r]], costs=costs[r][:count])
            row.statistics.step_sizes.append(count)
            row.statistics.new_tokens += count
            row.statistics.seconds = time.perf_counter() - began
            on_step(row.number, new[:count])

        if pace is not None and not first and len(running) == 1:
            pace.record(size, time.perf_counter() - step_began, promised, len(emitted[0]) - 1)

        # 5. Rows that ended leave the batch.
        going = [r for r, row in enumerate(running) if not row.finished]
        if len(going) < len(running):
            running = [running[r] for r in going]
            cache.select(torch.tensor(going, dtype=torch.long))
    return rows


class Scores:
    """What the base says of tokens, from its logits behind each absorbed one."""

    def __init__(self, logits: Tensor):
        """logits: (rows, width, vocabulary) float32 on the CPU."""
        self.logits, self.normaliser = logits.numpy(), logits.logsumexp(-1).numpy()

    def add(
        self,
        statistics: Statistics,
        row: int,
        tokens: Sequence[int],
        *,
        behind: Sequence[int] | None = None,
        costs: Sequence[float] | None = None,
    ) -> None:
        """Adds the log-likelihood and the regret of tokens[i] behind absorbed token behind[i] (or i) of a row.

        `costs` are the regrets of tokens that were verified; without them nobody looked, and the regret is against the
        base's first choice.
        """
        for i, token in enumerate(tokens):
            place = i if behind is None else behind[i]
            line = self.logits[row, place]
            statistics.log_likelihood += float(line[token] - self.normaliser[row, place])
            statistics.scored += 1
            regret = float(line.max() - line[token]) if costs is None else costs[i]
            statistics.regret += regret
            statistics.unverified += costs is None or regret > 0


def _check(model: DynaMoForCausalLM, prompts: Sequence[Sequence[int]], options: DecodingOptions) -> int:
    """The preconditions of `decode`; returns the context in tokens."""
    if not 1 <= options.num_heads <= model.num_heads:
        raise InputError(
            f"num_heads is {options.num_heads}, but the model has {model.num_heads}; give 1 to {model.num_heads}."
        )
    context = model.config.max_context or 2**31
    for prompt in prompts:
        if len(prompt) == 0:
            raise InputError("The prompt is empty; give at least one token.")
        if len(prompt) >= context:
            raise InputError(f"The prompt has {len(prompt)} tokens and the model's context is {context}; shorten it.")
        if min(prompt) < 0 or max(prompt) >= model.config.vocab_size:
            stranger = next(token for token in prompt if not 0 <= token < model.config.vocab_size)
            raise InputError(
                f"The prompt has token {stranger}, but the model's vocabulary ends at "
                f"{model.config.vocab_size - 1}; use the model's own tokenizer."
            )
    if options.num_heads > 1:
        check_weighting(options.algorithm.alpha_c, options.algorithm.top_k, options.draft_temperature)
        needed = options.num_heads if options.verify == "off" else 1  # drafts back off to what the tables hold
        check(options.algorithm, needed, model.config.vocab_size, model.cooccurrence)
    return context


def _left(row: Row, options: DecodingOptions) -> int:
    return options.max_new_tokens - len(row.new_tokens)


def _read_heads(model: DynaMoForCausalLM, states: Tensor) -> Tensor:
    """Logits of heads 2..; states: (heads, rows, hidden), result: (heads, rows, vocabulary) float32 on the CPU."""
    if len(states) == 0:
        return torch.empty(0, states.shape[1], model.config.vocab_size)
    if model.config.own_output_embedding:
        return torch.cat([model.readout(state[None], head).float() for head, state in enumerate(states, start=2)]).cpu()
    return model.readout(states).float().cpu()


def _warp(row: Row, logits: Tensor, options: DecodingOptions) -> Tensor:
    """What the base samples from behind each absorbed token; logits and result: (width, vocabulary)."""
    behind = row.tokens + row.pending[1:] if row.statistics.forwards > 1 else row.tokens
    result = []
    for position, line in enumerate(logits[: max(1, len(behind) - len(row.tokens) + 1)]):
        so_far = torch.tensor(behind[: len(row.tokens) + position])
        for warp in options.warps:
            line = warp(row.number, so_far, line)
        result.append(line)
    return torch.stack(result)


def _pace(model: DynaMoForCausalLM, options: DecodingOptions) -> Pace | None:
    """How many drafts a step carries, if they are a tree: for greedy choices of unwarped logits."""
    n = options.num_heads
    if options.sample or options.verify == "off" or options.warps or n == 1 or options.tree == 0:
        return None
    if options.tree is not None:
        return Pace((options.tree + 1,))
    # Sizes that change from run to run change the rounding: harmless in float32, not where close calls are ties.
    if options.budget > 0 or model.dtype != torch.float32 or options.compile:
        return None
    key = (n, torch.get_num_threads())
    return model.paces.setdefault(key, Pace((n, 2 * n, 4 * n)))


def _as_trees(cache: RowCache, positions: Tensor, parents: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of the queries and of the slots, and what each query sees, where the tokens of a forward are trees.

    positions: (rows, width) slots that are written. Returns (rows, width), (rows, slots) and (rows, width, slots) bool.
    """
    rows, width = positions.shape
    depth = torch.zeros(rows, width, dtype=torch.long)
    seen = torch.empty(rows, width, width, dtype=torch.bool)
    for row, each in enumerate(parents):
        depth[row, : len(each) + 1] = torch.tensor(depths(each))
        seen[row] = torch.from_numpy(ancestry(each, width))
    slots = torch.arange(cache.end).expand(rows, -1)
    queries = cache.lengths[:, None] + depth
    keys = slots.scatter(1, positions, queries)
    visible = (slots < cache.lengths[:, None])[:, None].repeat(1, width, 1)
    return queries, keys, visible.scatter(2, positions[:, None].expand(-1, width, -1), seen)


def _allowance(row: Row, options: DecodingOptions, drafts: int) -> list[float]:
    """What the drafts up to each may cost, in nats: the budget of all tokens so far, less what is spent. Empty if exact."""
    if options.budget == 0:
        return []
    emitted = row.statistics.new_tokens
    return [options.budget * (emitted + place) - row.statistics.regret for place in range(1, drafts + 1)]


def _link(model: DynaMoForCausalLM, states: Tensor) -> Link:
    """The learned coupling at one row's position; states: final hidden states of heads 2.., (heads, hidden)."""

    def bonus(head: int, previous: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        before, here = (torch.from_numpy(ids).to(states.device) for ids in (previous, candidates))
        assert model.coupling is not None
        added = model.coupling.bonus(head, states[head - 2], before, here, model.output_weight(head))
        return added.double().cpu().numpy()

    return bonus


def _present(tokens: Sequence[int], vocab_size: int) -> np.ndarray:
    present = np.zeros(vocab_size, bool)
    present[list(tokens)] = True
    return present


def _emit(row: Row, new: Sequence[int], options: DecodingOptions, context: int) -> int:
    """Appends tokens to the row until one ends it; returns how many."""
    for count, token in enumerate(new, start=1):
        row.tokens.append(token)
        if row.present is not None:
            row.present[token] = True
        ended = token in options.end_tokens or _left(row, options) <= 0 or len(row.tokens) >= context
        if ended or (options.stops and any(stop(torch.tensor(row.tokens)) for stop in options.stops)):
            row.finished = True
            return count
    return len(new)
