"""How tokens are chosen: the options of one sequence, checked when they are made. Knows no model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Integral, Real

from torch import Tensor

from dynamo_lm.errors import InputError
from dynamo_lm.sampling.options import Algorithm1, check_numbers

LogitsProcessor = Callable[
    [int, Tensor, Tensor], Tensor
]  # sequence's number, tokens so far (t,), logits (vocabulary,) -> logits to sample from


StoppingCriterion = Callable[[Tensor], bool]  # tokens so far (t,), prompt included -> whether the sequence ends here


@dataclass(frozen=True)
class DecodingOptions:
    """How to choose tokens."""

    max_new_tokens: int
    num_heads: int  # heads used, 1..n: the ceiling on tokens per step
    verify: str | float = "strict"  # or "off", or a budget in nats per token at temperature 1; 0 is "strict"
    sample: bool = False  # else the most likely: of the base under "strict", of the joint under "off"
    algorithm: Algorithm1 = field(default_factory=Algorithm1)  # under "off"; its alpha_c and top_k shape drafts, too
    compile: bool = (
        False  # steps of one fixed shape, compiled: one sequence, a C++ compiler on CPUs, a minute the first time
    )
    tree: int | None = None  # greedy, verified: drafts a forward carries as a tree; 0: a chain; None: measured, if exact
    prompt_lookup_num_tokens: int = 0  # verified: drafts from the text itself where it repeats, at most so many; 0: none
    temperature: float = 1.0  # verified, with sampling: what logits_processors divide by, and drafts are drawn at
    end_tokens: frozenset[int] = frozenset()
    logits_processors: tuple[
        LogitsProcessor, ...
    ] = ()  # under "strict": what turns the base's logits into those it samples from
    stopping_criteria: tuple[StoppingCriterion, ...] = ()
    logprobs: int | None = None  # score every new token, with so many alternatives beside it; None: no scores
    prompt_logprobs: bool = False  # with logprobs: score the prompt's tokens, too
    synthetic_acceptance: float | None = None  # accept each draft by chance, with this probability; for tests and benchmarks

    def __post_init__(self) -> None:
        check_numbers(
            self,
            whole=("max_new_tokens", "num_heads", "tree", "logprobs"),
            real=("temperature", "synthetic_acceptance"),
        )
        check_verify(self.verify)
        least = 0 if self.prompt_logprobs else 1
        if self.max_new_tokens < least:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}; give {least} or more.")
        if self.logprobs is not None and self.logprobs < 0:
            raise InputError(f"logprobs is {self.logprobs}; give the number of alternatives, 0 or more.")
        if self.prompt_logprobs and self.logprobs is None:
            raise InputError("prompt_logprobs scores the prompt as well; it goes with logprobs.")
        if self.tree is not None and not 0 <= self.tree < 64:
            raise InputError(f"tree is {self.tree}; give the number of drafts, up to 63, 0 for a chain.")
        check_prompt_lookup(self.prompt_lookup_num_tokens)
        chance = self.synthetic_acceptance
        if chance is not None and not 0 <= chance <= 1:
            raise InputError(f"synthetic_acceptance is {chance}; give a probability, 0 to 1.")
        if chance is not None and (self.sample or self.off or self.budget or self.tree or self.prompt_lookup_num_tokens):
            raise InputError(
                'synthetic_acceptance goes with greedy decoding, verify="strict" and chains of drafts by heads.'
            )

    @property
    def ceiling(self) -> int:
        """The most tokens that a step can emit."""
        return max(self.num_heads, 1 + self.prompt_lookup_num_tokens)

    @property
    def off(self) -> bool:
        """Whether Algorithm 1 decides, without verification."""
        return self.verify == "off"

    @property
    def budget(self) -> float:
        """Nats per token that drafts may cost."""
        return 0.0 if isinstance(self.verify, str) else float(self.verify)


def check_verify(verify: str | float) -> None:
    """Refuses other values of `verify`. Raises InputError."""
    if verify in ("strict", "off"):
        return
    if isinstance(verify, bool) or not isinstance(verify, Real) or not 0 <= verify < math.inf:
        raise InputError(
            f'verify is "{verify}"; give "strict" (exact), "off" (the paper\'s Algorithm 1) or a budget in nats per token, '
            "such as 0.1 (0 = exact)."
        )


def check_prompt_lookup(prompt_lookup_num_tokens: int) -> None:
    """Refuses other values of `prompt_lookup_num_tokens`. Raises InputError."""
    given = prompt_lookup_num_tokens
    if isinstance(given, bool) or not isinstance(given, Integral) or not 0 <= given < 64:
        raise InputError(f"prompt_lookup_num_tokens is {given}; give the number of drafts, up to 63, 0 for none.")
