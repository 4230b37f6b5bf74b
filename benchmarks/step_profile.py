"""Where a step's time goes: stem, heads, output embedding, sampler, statistics, cache and mask, and Python around them.

Functions of the engine are wrapped for the duration of one run and put back afterwards, whatever happens. Time is exclusive:
what a wrapped function spends in another one counts there. On a GPU every boundary waits for the device, so shares are right
and the total is not. `PARTS` is the list to adapt when the engine's functions change; a name that is gone is an error.

Used by `benchmarks.race --profile`.
"""

from __future__ import annotations

import importlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dynamo_lm.bench.methods import Method, choose
from dynamo_lm.bench.options import RaceOptions
from dynamo_lm.bench.prompts import Prompt
from dynamo_lm.bench.runners import BenchmarkContext, Runner, open_runner

REST = "Python and the rest"
PARTS: tuple[tuple[str, str, str], ...] = (  # part, module, name in it; Class.method for a method
    ("stem", "dynamo_lm.model.modeling", "DynaMoForCausalLM.hidden"),  # and the last layer, where it is not a wide one
    ("last layer and heads", "dynamo_lm.backbone.stacked_heads", "StackedHeads.forward"),
    ("last layer and heads", "dynamo_lm.model.heads", "TokenHead.forward"),
    ("output embedding", "dynamo_lm.model.modeling", "DynaMoForCausalLM.readout"),
    ("output embedding", "dynamo_lm.decoding.candidates", "_read_heads"),  # or its part that reads the commonest tokens
    ("sampler", "dynamo_lm.decoding.candidates", "highest"),
    ("sampler", "dynamo_lm.sampling.top_k", "HeadCandidates.ranked"),
    ("sampler", "dynamo_lm.decoding.drafter", "draft_from"),
    ("sampler", "dynamo_lm.decoding.batch", "draw_from"),
    ("sampler", "dynamo_lm.decoding.drafter", "grow"),
    ("sampler", "dynamo_lm.decoding.batch", "accept_greedy"),
    ("sampler", "dynamo_lm.decoding.batch", "accept_tree"),
    ("sampler", "dynamo_lm.decoding.batch", "accept_sampled"),
    ("statistics", "dynamo_lm.decoding.logprobs", "LogProbs.__init__"),
    ("statistics", "dynamo_lm.decoding.logprobs", "LogProbs.add"),
    ("cache and mask", "dynamo_lm.backbone.attention_mask", "AttentionMaskBuilder.mask"),
    ("cache and mask", "dynamo_lm.backbone.attention_mask", "AttentionMaskBuilder.next"),
    ("cache and mask", "dynamo_lm.decoding.kv_cache", "RaggedKVCache.as_trees"),
    ("cache and mask", "dynamo_lm.decoding.kv_cache", "RaggedKVCache.gather"),
    ("cache and mask", "dynamo_lm.decoding.kv_cache", "RaggedKVCache.reserve"),
    ("cache and mask", "dynamo_lm.decoding.kv_cache", "RaggedKVCache.commit"),
    ("cache and mask", "dynamo_lm.decoding.kv_cache", "RaggedKVCache.select"),
    ("cache and mask", "dynamo_lm.decoding.kv_cache", "RaggedKVCache.update"),
    ("arranging the model", "dynamo_lm.model.modeling", "DynaMoForCausalLM.optimize_for_inference"),
)


class Clock:
    """Exclusive seconds by part."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self.stack: list[str] = []
        self.last = 0.0

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def enter(self, part: str) -> None:
        now = self.now()
        if self.stack:
            self.seconds[self.stack[-1]] += now - self.last
        self.stack.append(part)
        self.last = now

    def leave(self) -> None:
        now = self.now()
        self.seconds[self.stack.pop()] += now - self.last
        self.last = now

    def timed(self, part: str, function: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.enter(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()

        return run


def profile(
    runner: Runner, prompts: Sequence[Sequence[Sequence[int]]], *, max_new_tokens: int, seed: int, device: torch.device
) -> dict[str, Any]:
    """Run a method of DynaMo's own once over all prompts, a batch at a time.

    Returns:
        seconds and steps in all, and the share of every part that the engine has; shares sum to 1.
    """
    clock, steps = Clock(device), 0
    with _wrapped(clock):
        clock.enter(REST)
        for batch in prompts:
            steps += runner(batch, max_new_tokens, seed).steps
        clock.leave()
    total = sum(clock.seconds.values())
    parts = [part for part in dict.fromkeys([part for part, _, _ in PARTS] + [REST]) if part in clock.seconds]
    return {
        "seconds": total,
        "steps": steps,
        "step_seconds": total / steps,
        "shares": {part: clock.seconds[part] / total for part in parts},
    }


def profiles(
    context: BenchmarkContext, methods: Sequence[Method], options: RaceOptions, texts: Sequence[Prompt], max_new_tokens: int
) -> dict[str, dict[str, Any]]:
    """The profile of every uncompiled method of the model's own loop, one prompt at a time."""
    chosen = choose(methods, batch=1, sampled=options.sampled, only=options.only)
    return {
        method.name: profile(
            open_runner(method, context),
            [[list(prompt.tokens)] for prompt in texts],
            max_new_tokens=max_new_tokens,
            seed=options.seed,
            device=context.model.device,
        )
        for method in chosen
        # What is compiled has no functions left to time, and wrapping them would compile it anew.
        if method.engine == "dynamo" and method.model == "model" and not method.compiles
    }


def shares(profiles: dict[str, dict[str, Any]]) -> Table:
    """Where a step's time goes, a line per method."""
    parts = list(dict.fromkeys(part for profile in profiles.values() for part in profile["shares"]))
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1), title="share of a step")
    table.add_column("", no_wrap=True)
    for heading in ("ms per\nstep", *(part.replace(" ", "\n") for part in parts)):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, profile in profiles.items():
        own = profile["shares"]
        cells = [f"{own[part]:.1%}" if part in own else "" for part in parts]
        table.add_row(name, f"{profile['step_seconds'] * 1000:.1f}", *cells)
    return table


def show(profiles: dict[str, dict[str, Any]]) -> None:
    console = Console(highlight=False)
    console.width = max(console.width, 128)
    console.print()
    console.print(shares(profiles))


@contextmanager
def _wrapped(clock: Clock) -> Iterator[None]:
    """The engine's functions, timed until the block ends."""
    with ExitStack() as stack:
        for part, module, name in PARTS:
            holder: Any = importlib.import_module(module)
            *outer, last = name.split(".")
            for step in outer:
                holder = getattr(holder, step)  # a name that is gone is an error, else its time would be "the rest"
            before = vars(holder).get(last)  # as it was written: a function, a class method, or None where it is inherited
            stack.callback(_put_back, holder, last, before)
            timed = clock.timed(part, getattr(holder, last))
            setattr(holder, last, staticmethod(timed) if isinstance(before, (classmethod, staticmethod)) else timed)
        yield


def _put_back(holder: Any, name: str, before: Any) -> None:
    if before is None:
        delattr(holder, name)
    else:
        setattr(holder, name, before)
