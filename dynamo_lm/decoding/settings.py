"""From what a user asks to `DecodingOptions`: the one place that knows defaults and which setting goes with which mode.

A setting comes from the first of several sources that states it: usually a call's arguments or a request, then a server's
settings, then the model's generation configuration; after these the paper's defaults. Knows no network and no prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from dynamo_lm.backbone.token_limits import token_ids
from dynamo_lm.decoding.options import DecodingOptions, LogitsProcessor
from dynamo_lm.decoding.preconditions import is_sequential
from dynamo_lm.decoding.protocol import MultiHeadLM
from dynamo_lm.sampling.options import Algorithm1

# Power of the n-grams' weight in drafts that are verified, of parallel heads and of a sequential one, which knows the drafts
# before: where most drafts are accepted, as measured (LOG.md). The paper's 1 is for drafts that are not verified.
VERIFIED_ALPHA_C = (0.6, 0.3)
DRAWN_TOP_K = 200  # candidates where drafts are drawn: the base accepts more of what comes from more of a distribution
MIN_TEMPERATURE = 0.01  # below, decoding is greedy


class Settings:
    """Settings by name, from several sources: mappings or objects with attributes; None stands for "not stated"."""

    def __init__(self, *sources: Any):
        self.sources = sources

    def get(self, name: str, default: Any = None) -> Any:
        """The value of the first source that states one, else the default."""
        for source in self.sources:
            value = source.get(name) if isinstance(source, Mapping) else getattr(source, name, None)
            if value is not None:
                return value
        return default


def algorithm_of(model: MultiHeadLM, *sources: Any, verify: str | float = "off", sample: bool = True) -> Algorithm1:
    """Algorithm 1 as decoding with `verify` runs it: what the sources state, else the paper's defaults.

    Verified decoding takes the shape of its drafts from it, and leaves temperature and candidates to logits processors.
    """
    get, paper = Settings(*sources).get, Algorithm1()
    if verify == "off":
        alpha_c, temperature = paper.alpha_c, get("temperature", paper.temperature)
        top_k = get("top_k") or paper.top_k  # transformers' 0 is "all", which no grid can hold
    else:
        alpha_c, temperature = VERIFIED_ALPHA_C[is_sequential(model)], 1.0
        top_k = min(DRAWN_TOP_K if sample else paper.top_k, model.config.vocab_size)
    return Algorithm1(
        eps_b=get("eps_b", paper.eps_b),
        alpha_c=get("alpha_c", alpha_c),
        otsu=get("otsu", paper.otsu),
        blur=get("blur", paper.blur),
        top_k=top_k,
        temperature=temperature,
        repetition_penalty=get("repetition_penalty", paper.repetition_penalty),
    )


def resolve(
    model: MultiHeadLM,
    *sources: Any,
    max_new_tokens: int,
    sample: bool | None = None,
    end_tokens: Any = None,
    logits_processors: tuple[LogitsProcessor, ...] | None = None,
    **options: Any,
) -> DecodingOptions:
    """The options of one text.

    Args:
        sources: of verify, num_heads, tree, prompt_lookup_num_tokens, compile, the fields of `Algorithm1`, and top_p; the
            first that states a setting decides it.
        sample: whether to draw tokens at random; None: unless the temperature is about 0.
        end_tokens: as `token_ids` takes them.
        logits_processors: in verified decoding; None: those that temperature, top_k, top_p and repetition_penalty ask for.
        options: further fields of `DecodingOptions`.

    Raises:
        InputError: a value out of range.
    """
    get = Settings(*sources).get
    verify = get("verify", "strict")
    off = verify == "off"
    temperature = get("temperature", Algorithm1().temperature if off else 1.0)
    if sample is None:
        sample = temperature >= MIN_TEMPERATURE
        if not sample:  # Algorithm 1 divides by its temperature, also where it takes the likeliest tokens
            sources = ({"temperature": Algorithm1().temperature}, *sources)
    if logits_processors is None:
        logits_processors = () if off else _logits_processors(get, temperature if sample else None)
    return DecodingOptions(
        max_new_tokens=max_new_tokens,
        num_heads=get("num_heads", model.num_heads),
        verify=verify,
        sample=sample,
        tree=get("tree"),
        prompt_lookup_num_tokens=0 if off else get("prompt_lookup_num_tokens", 0),
        compile=get("compile", False),
        algorithm=algorithm_of(model, *sources, verify=verify, sample=sample),
        temperature=temperature if sample and not off else 1.0,
        end_tokens=frozenset(token_ids(end_tokens)),
        logits_processors=logits_processors,
        **options,
    )


def _logits_processors(get: Any, temperature: float | None) -> tuple[LogitsProcessor, ...]:
    """transformers' processors, in its order, as functions of one sequence; greedy decoding (None) takes a penalty only."""
    penalty, top_k, top_p = get("repetition_penalty", 1.0), get("top_k", 0), get("top_p", 1.0)
    processors: list[Any] = []
    if penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(penalty))
    if temperature is not None:
        if temperature != 1.0:
            processors.append(TemperatureLogitsWarper(float(temperature)))
        if top_k:
            processors.append(TopKLogitsWarper(top_k))
        if top_p < 1.0:
            processors.append(TopPLogitsWarper(top_p))
    return tuple(as_logits_processor(processor) for processor in processors)


def as_logits_processor(processor: Any) -> LogitsProcessor:
    """A processor of transformers as a function of one sequence's number, tokens (t,) and logits (vocabulary,)."""

    def apply(number: int, tokens: Tensor, logits: Tensor) -> Tensor:
        return torch.as_tensor(processor(tokens[None], logits[None].clone())[0])

    return apply
