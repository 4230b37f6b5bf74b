"""The decoding loop: one forward of the trunk per step, several tokens per forward (method.md section 4).

In: a model, prompts as token ids, and how to choose. Out: tokens and statistics, row by row. One loop serves every mode:

* `verify="off"`: Algorithm 1 draws m tokens from the joint of the heads, and they stand.
* `verify="strict"`: the base's own next token, certain, and a draft of the following ones from the masked joint. The next
  forward, which absorbs them, also yields the base's distribution behind each: drafts that pass the exact rejection rule
  stay, the rest is forgotten by not counting it in the cache.
* one head (`num_heads=1`): the base model, one token a step, by the same code.

Knows nothing about text; rows of a batch have their own lengths and do not see each other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dynamo_lm.cache import RowCache, attention_mask
from dynamo_lm.errors import InputError
from dynamo_lm.model import DynaMoForCausalLM, decoder_layers
from dynamo_lm.sampling import Algorithm1, check, draft, draw
from dynamo_lm.verification import Proposal, accept_greedy, accept_sampled

Warp = Callable[[int, Tensor, Tensor], Tensor]  # row, tokens so far (t,), logits (vocabulary,) -> logits to sample from
Stop = Callable[[Tensor], bool]  # tokens so far (t,), prompt included -> whether the row ends here


@dataclass(frozen=True)
class DecodingOptions:
    """How to choose tokens."""

    max_new_tokens: int
    num_heads: int  # heads used, 1..n: the ceiling on tokens per step
    verify: str = "strict"  # or "off"
    sample: bool = False  # else the most likely: of the base under "strict", of the joint under "off"
    algorithm: Algorithm1 = field(default_factory=Algorithm1)  # under "off"; its alpha_c and top_k shape drafts, too
    draft_temperature: float = 1.0  # under "strict" with sampling: near the temperature that the base samples at
    end_tokens: frozenset[int] = frozenset()
    warps: tuple[Warp, ...] = ()  # under "strict": what turns the base's logits into those it samples from
    stops: tuple[Stop, ...] = ()

    def __post_init__(self) -> None:
        if self.verify not in ("strict", "off"):
            raise InputError(f'verify is "{self.verify}"; give "strict" (exact) or "off" (the paper\'s Algorithm 1).')
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}; give 1 or more.")


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
    regret: float = 0.0  # of unverified tokens: log p(the base's first choice) - log p(the token), summed
    unverified: int = 0  # scored tokens that were emitted without verification
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
        """Nats per unverified token."""
        return self.regret / self.unverified if self.unverified else 0.0


@dataclass
class Row:
    """One sequence being decoded."""

    number: int  # in the batch that was asked for
    tokens: list[int]  # prompt and everything emitted
    prompt_length: int
    generator: torch.Generator
    statistics: Statistics
    pending: list[int]  # what the next forward absorbs: the prompt, then last step's tokens
    proposals: list[Proposal] = field(default_factory=list)  # the distributions pending[1:] were drafted from
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
    n, strict = options.num_heads, options.verify == "strict"
    base_config, device = model.base.config, model.device
    rows = [
        Row(
            number,
            list(prompt),
            len(prompt),
            torch.Generator().manual_seed(seed),
            Statistics(n, proposed=[0] * (n - 1), accepted=[0] * (n - 1)),
            pending=list(prompt),
        )
        for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    ]
    running = list(rows)
    layers = len(decoder_layers(model.base)) + (n - 1) * model.config.layers_per_head
    cache = RowCache(layers, len(rows))
    began = time.perf_counter()

    while running:
        # 1. Absorb: one forward over what every row emitted (or drafted) last; shorter rows are padded behind their end.
        first = running[0].statistics.forwards == 0
        width = max(len(row.pending) for row in running)
        positions = cache.begin(width)  # (rows, width)
        tokens = torch.tensor([row.pending + [0] * (width - len(row.pending)) for row in running])
        mask = attention_mask(base_config, positions, torch.arange(cache.end)[None], model.dtype, device=device)
        hidden = model.hidden(
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
        log_p = logits.log_softmax(-1)

        # 2. Judge: how many of the absorbed tokens stay, and the base's next token behind them.
        emitted: list[list[int]] = []
        last: list[int] = []  # index in `logits` of the last position that stays
        for r, row in enumerate(running):
            row.statistics.forwards += 1
            kept = 0 if first else len(row.pending) - 1
            if strict:
                warped = _warp(row, logits[r], options) if options.warps else logits[r]
                drafts = [] if first else row.pending[1:]
                if options.sample:
                    kept, token = accept_sampled(warped, drafts, row.proposals, row.generator)
                else:
                    kept, token = accept_greedy(warped, drafts)
                for position in range(len(drafts)):
                    row.statistics.proposed[position] += position <= kept  # after a refusal nothing is looked at
                    row.statistics.accepted[position] += position < kept
                emitted.append([*drafts[:kept], token])
            elif not first:
                _score(row.statistics, log_p[r], row.pending[1:], verified=False)
            last.append(kept)
        counts = [len(row.pending) if first else at + 1 for row, at in zip(running, last, strict=True)]
        cache.keep(torch.tensor(counts))

        # 3. Choose: from all heads at that position, a draft of the tokens behind the certain one, or m tokens at once.
        at = ends if first else torch.tensor(last, device=device)
        ahead = _read_heads(model, hidden[1:, index, at])  # (n-1, rows, vocabulary)
        for r, row in enumerate(running):
            if strict:
                room = min(n, min(context - len(row.tokens), _left(row, options)) - len(emitted[r])) - 1
                row.pending, row.proposals = [emitted[r][-1]], []
                if room > 0:
                    drafted = draft(
                        ahead[:room, r],
                        emitted[r][-1],
                        model.cooccurrence,
                        alpha_c=options.algorithm.alpha_c,
                        top_k=options.algorithm.top_k,
                        temperature=options.draft_temperature,
                        generator=row.generator,
                        greedy=not options.sample,
                    )
                    row.pending += drafted.tokens
                    row.proposals = drafted.proposals
            else:
                room = max(1, min(n, _left(row, options), context - int(cache.lengths[r])))
                heads = torch.cat([logits[r, last[r]][None], ahead[: room - 1, r]])  # (room, vocabulary)
                drawn = draw(
                    heads,
                    torch.tensor(row.tokens),
                    model.cooccurrence,
                    options.algorithm,
                    row.generator,
                    greedy=not options.sample,
                )
                row.pending = list(drawn.tokens)
                _score(row.statistics, log_p[r, last[r]][None], drawn.tokens[:1], verified=False)
                emitted.append(row.pending)

        # 4. Emit, as far as no stop rule cuts it short.
        for r, (row, new) in enumerate(zip(running, emitted, strict=True)):
            count = _emit(row, new, options, context)
            if strict:
                _score(row.statistics, log_p[r], new[:count], verified=True)
            row.statistics.step_sizes.append(count)
            row.statistics.new_tokens += count
            row.statistics.seconds = time.perf_counter() - began
            on_step(row.number, new[:count])

        # 5. Rows that ended leave the batch.
        going = [r for r, row in enumerate(running) if not row.finished]
        if len(going) < len(running):
            running = [running[r] for r in going]
            cache.select(torch.tensor(going, dtype=torch.long))
    return rows


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


def _score(statistics: Statistics, log_p: Tensor, tokens: Sequence[int], *, verified: bool) -> None:
    """Adds tokens[i] under log_p[i], (width, vocabulary), to the log-likelihood, and its regret if nobody checked it."""
    for line, token in zip(log_p, tokens, strict=False):
        likelihood = line[token].item()
        statistics.log_likelihood += likelihood
        statistics.scored += 1
        if not verified:
            statistics.regret += line.max().item() - likelihood
            statistics.unverified += 1


def _emit(row: Row, new: Sequence[int], options: DecodingOptions, context: int) -> int:
    """Appends tokens to the row until one ends it; returns how many."""
    for count, token in enumerate(new, start=1):
        row.tokens.append(token)
        ended = token in options.end_tokens or _left(row, options) <= 0 or len(row.tokens) >= context
        if ended or (options.stops and any(stop(torch.tensor(row.tokens)) for stop in options.stops)):
            row.finished = True
            return count
    return len(new)
