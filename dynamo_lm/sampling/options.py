"""The options of Algorithm 1 and the checks that they fit a vocabulary and a table (method.md section 4)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from dynamo_lm.cooccurrence.table import Cooccurrence
from dynamo_lm.errors import InputError
from dynamo_lm.sampling.otsu import ROUNDING

MAX_GRID = 2**26  # entries: 0.5 GB


@dataclass(frozen=True)
class Algorithm1:
    """The options of Algorithm 1; the defaults are the paper's. Raises InputError for values out of range."""

    eps_b: float = 0.5  # quality threshold: m tokens need a joint probability above eps_b^(m-1); 0: always n, 1: always one
    alpha_c: float = 1.0  # power of the co-occurrence weight; 0 = off
    otsu: bool = True  # drop background entries by Otsu's threshold ..
    blur: bool = True  # .. found on the Gaussian-blurred grid
    top_k: int = 50  # candidates per head
    temperature: float = 0.7  # divides the logits
    repetition_penalty: float = 1.1  # divides an entry once per token that is already there; 1 = off

    def __post_init__(self) -> None:
        check_numbers(self, whole=("top_k",), real=("eps_b", "alpha_c", "temperature", "repetition_penalty"))
        if not 0 <= self.eps_b <= 1:
            raise InputError(f"eps_b is a probability: choose it from 0 to 1, not {self.eps_b}.")
        check_weighting(self.alpha_c, self.top_k, self.temperature)
        if not 0 < self.repetition_penalty < math.inf:
            raise InputError(f"repetition_penalty must be above 0 (1 = off), not {self.repetition_penalty}.")


def check_numbers(options: Any, *, whole: Sequence[str] = (), real: Sequence[str] = ()) -> None:
    """Refuses fields that are neither None nor a number, or not a whole one. Raises InputError."""
    for names, kind, form in ((whole, Integral, "a whole number"), (real, Real, "a number")):
        for name in names:
            value = getattr(options, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
                raise InputError(f"{name} is {value!r}; give {form}.")


def check(options: Algorithm1, n: int, vocab_size: int, table: Cooccurrence | None) -> None:
    """Refuse options that cannot work for drawing up to n tokens from heads over `vocab_size` tokens; call it once.

    Raises InputError if top_k exceeds the vocabulary, if the table is too short or counts other tokens, or if alpha_c
    and eps_b are 0 and the grid is too large to hold.
    """
    k = options.top_k
    if k > vocab_size:
        raise InputError(f"top_k is {k}, but the vocabulary has {vocab_size} tokens; choose a smaller top_k.")
    if table is None or options.alpha_c == 0:
        if options.eps_b == 0 and k**n > MAX_GRID:
            raise InputError(f"A grid of {k}^{n} entries is too large; choose a smaller top_k or an eps_b above 0.")
        return
    if table.order < n and options.eps_b < 1:
        raise InputError(
            f"The model's table has order {table.order} but {n} tokens are drawn; count with --order {n} or set alpha_c=0."
        )
    if table.vocab_size > vocab_size:
        raise InputError(
            f"The table counts {table.vocab_size} tokens but the model has {vocab_size}; "
            "count one with the model's own tokenizer."
        )


def static_threshold(eps_b: float, m: int) -> float:
    """The static threshold of length m, less rounding."""
    return eps_b ** (m - 1) * (1 - ROUNDING)


def check_weighting(alpha_c: float, top_k: int, temperature: float) -> None:
    """Refuses values out of range with an InputError."""
    if not 0 <= alpha_c < math.inf:
        raise InputError(f"alpha_c must be 0 (no n-grams) or more, not {alpha_c}.")
    if top_k < 1:
        raise InputError(f"top_k must be at least 1 candidate, not {top_k}.")
    if not 0 < temperature < math.inf:
        raise InputError(f"temperature must be above 0, not {temperature}; for the likeliest tokens decode greedily.")
