"""What a model and a sequence must be for the sequence to be decoded."""

from __future__ import annotations

from collections.abc import Sequence

from dynamo_lm.backbone.token_limits import context_limit
from dynamo_lm.decoding.options import DecodingOptions
from dynamo_lm.decoding.protocol import MultiHeadLM
from dynamo_lm.errors import InputError
from dynamo_lm.sampling.options import check, check_weighting


def is_sequential(model: MultiHeadLM) -> bool:
    """Whether heads 2.. are steps of one head, which predict from each other."""
    return bool(getattr(model.config, "sequential", False))


def check_heads(model: MultiHeadLM, num_heads: int) -> None:
    """Refuses heads that the model does not have. Raises InputError."""
    if not 1 <= num_heads <= model.num_heads:
        raise InputError(f"num_heads is {num_heads}, but the model has {model.num_heads}; give 1 to {model.num_heads}.")


def check_sequence(model: MultiHeadLM, prompt: Sequence[int], options: DecodingOptions) -> None:
    """The preconditions of one sequence. Raises InputError."""
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
    if is_sequential(model) and options.off:
        raise InputError(
            'verify="off" draws from a joint of parallel heads, which a sequential head (eagle3) does not have; '
            'use "strict" or a budget.'
        )
    if is_sequential(model) and options.tree:
        raise InputError(f"tree is {options.tree}, but a sequential head (eagle3) drafts chains; leave it out.")
    if options.off and options.logits_processors:
        raise InputError(
            'Logits processors do not apply to the joint that verify="off" draws from; set Algorithm 1\'s own knobs.'
        )
    if options.num_heads > 1 or options.off:
        check_weighting(options.algorithm.alpha_c, options.algorithm.top_k, options.temperature)
        needed = options.num_heads if options.off else 1  # drafts back off to what the tables hold
        check(options.algorithm, needed, model.config.vocab_size, model.cooccurrence)
