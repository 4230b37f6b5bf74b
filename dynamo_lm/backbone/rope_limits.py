"""Where a base's rotary embedding changes with the length of the text, so that cached keys no longer fit.

LongRoPE has one set of factors for texts up to `original_max_position_embeddings` and another for longer ones, and chooses
by the largest position of a forward, drafts and other sequences of the batch included. transformers computes the whole
cache again at that point; the decoding loop does not, so texts end there, unless their prompt is longer already. (Dynamic
NTK changes beyond `max_position_embeddings`, where texts end anyway.)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dynamo_lm.errors import InputError


def rope_switch(config: Any) -> int | None:
    """The longest text in tokens that LongRoPE's factors for short texts serve, or None where nothing changes."""
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    sets = [parameters, *(each for each in parameters.values() if isinstance(each, dict))]
    limits = [
        each.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
        for each in sets
        if each.get("rope_type") == "longrope"
    ]
    return min((limit for limit in limits if limit), default=None)


def is_beyond_switch(config: Any, prompt: int) -> bool:
    """Whether a prompt of so many tokens is decoded with the factors for long texts; both kinds do not go in one batch."""
    switch = rope_switch(config)
    return switch is not None and prompt > switch


def length_limit(config: Any, context: int, prompt: int, others: Iterable[int], *, compiled: bool) -> int:
    """Tokens that a text may have.

    Args:
        context: what the model has positions for.
        prompt: tokens of the text's prompt.
        others: tokens of the prompts that are decoded beside it.
        compiled: whether its steps are compiled, and its prompt is taken in by parts.

    Raises:
        InputError: texts on both sides of the switch in one batch, or a long one with compiled steps.
    """
    switch = rope_switch(config)
    if switch is None or switch >= context:
        return context
    if any((other > switch) != (prompt > switch) for other in others):
        raise InputError(
            f"The prompt has {prompt} tokens and another one is on the other side of {switch}, where this model's LongRoPE "
            "changes; decode short and long prompts in batches of their own."
        )
    if prompt > switch and compiled:
        raise InputError(f"compile=True goes with prompts of up to {switch} tokens for this model's LongRoPE; leave it out.")
    return context if prompt > switch else switch
