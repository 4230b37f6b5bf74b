"""`model.generate(...)` with transformers' signature and objects, carried out by `dynamo_lm.decoding.batch`.

transformers prepares what it always does (configuration, defaults, processors, stopping criteria); this file translates
those into `DecodingOptions`, refuses what a mode does not support, and puts the sequences back into a tensor.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import (
    EosTokenCriteria,
    MaxLengthCriteria,
    RepetitionPenaltyLogitsProcessor,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)
from transformers.utils import ModelOutput

from dynamo_lm.backbone.token_limits import context_limit, token_ids
from dynamo_lm.decoding.batch import decode
from dynamo_lm.decoding.padded_batch import PaddedBatch
from dynamo_lm.decoding.protocol import MultiHeadLM
from dynamo_lm.decoding.sequence import SequenceState
from dynamo_lm.decoding.settings import Settings, resolve
from dynamo_lm.decoding.statistics import Statistics
from dynamo_lm.errors import InputError

logger = logging.getLogger(__name__)
OF_ALGORITHM_1 = (TemperatureLogitsWarper, TopKLogitsWarper, RepetitionPenaltyLogitsProcessor)
REFUSED = {  # what no mode of this loop does, and the value that asks for it
    "num_beams": lambda value: value not in (None, 1),
    "output_scores": bool,
    "output_logits": bool,
    "output_attentions": bool,
    "output_hidden_states": bool,
    "guidance_scale": lambda value: value not in (None, 1.0),
    "max_matching_ngram_size": lambda value: value is not None,
    "penalty_alpha": lambda value: value is not None,
    "dola_layers": lambda value: value is not None,
}


@dataclass
class DynaMoOutput(ModelOutput):
    """What `generate(..., return_dict_in_generate=True)` returns."""

    sequences: Tensor | None = None  # (rows, length): prompts as given, new tokens, padding on the right
    statistics: list[Statistics] | None = None  # one a sequence


def generate(
    model: MultiHeadLM,
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    *,
    streamer: Any = None,
    tokenizer: Any = None,
    verify: str | float | None = None,
    num_heads: int | None = None,
    eps_b: float | None = None,
    alpha_c: float | None = None,
    otsu: bool | None = None,
    blur: bool | None = None,
    tree: int | None = None,
    prompt_lookup_num_tokens: int | None = None,
    compile: bool = False,
    synthetic_acceptance: float | None = None,
    seed: int | Sequence[int] | None = None,
    on_step: Callable[[int, list[int]], None] | None = None,
    **kwargs: Any,
) -> Tensor | DynaMoOutput:
    """Continues prompts, several tokens per forward pass; see `dynamo_lm.DynaMoForCausalLM.generate`."""
    arguments = {
        "verify": verify,
        "num_heads": num_heads,
        "eps_b": eps_b,
        "alpha_c": alpha_c,
        "otsu": otsu,
        "blur": blur,
        "tree": tree,
        "prompt_lookup_num_tokens": prompt_lookup_num_tokens,
        "compile": compile,
    }
    sources = (arguments | kwargs, generation_config, model.generation_config)
    setting = Settings(*sources).get
    off = setting("verify") == "off"
    for name, asks in REFUSED.items():
        if asks(setting(name)):
            raise InputError(f"{name} is not supported by DynaMo decoding; leave it out, or call model.base.generate.")
    for name in ("assistant_model", "past_key_values", "inputs_embeds", "negative_prompt_ids"):
        if kwargs.get(name) is not None:
            raise InputError(f"{name} is not supported by DynaMo decoding; give token ids as inputs.")
    stop_strings = setting("stop_strings")
    kwargs.pop("stop_strings", None)
    criteria = StoppingCriteriaList(stopping_criteria or [])
    if stop_strings is not None:
        if tokenizer is None:
            raise InputError("stop_strings need the tokenizer: pass tokenizer=... to generate.")
        criteria.append(StopStringCriteria(tokenizer, stop_strings))
    ids = inputs if inputs is not None else kwargs.get("input_ids")
    if ids is not None and not (isinstance(ids, Tensor) and ids.ndim == 2):
        form = f"of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else f"a {type(ids).__name__}"
        raise InputError(f"The prompts are {form}; give token ids as a tensor of shape (rows, length).")
    if ids is not None and ids.shape[-1] == 0:
        raise InputError("The prompt is empty; give at least one token.")
    context = context_limit(model.config)
    if ids is not None and kwargs.get("attention_mask") is None and ids.shape[-1] >= context:
        raise InputError(f"The prompt has {ids.shape[-1]} tokens and the model's context is {context}; shorten it.")

    def carry_out(
        self: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor | DynaMoOutput:
        prompts = _prompts(input_ids, model_kwargs.get("attention_mask"))
        ends = token_ids(generation_config.eos_token_id)
        pad = next(iter([*token_ids(generation_config.pad_token_id), *ends]), 0)
        batch = PaddedBatch(input_ids, prompts, pad)
        if off:
            _check_off(logits_processor)
        criteria = [c for c in stopping_criteria if not isinstance(c, (MaxLengthCriteria, EosTokenCriteria))]
        options = resolve(
            model,
            *sources,
            max_new_tokens=generation_config.max_length - input_ids.shape[1],
            sample=bool(generation_config.do_sample),
            end_tokens=ends,
            synthetic_acceptance=synthetic_acceptance,
            logits_processors=() if off else tuple(batch.logits_processor(each) for each in logits_processor),
        )
        by_row = [
            replace(options, stopping_criteria=tuple(batch.stopping_criterion(each, row) for each in criteria))
            for row in range(len(prompts))
        ]

        def stepped(row: int, tokens: list[int]) -> None:
            batch.new_tokens[row] += tokens
            if streamer is not None:
                for token in tokens:  # one at a time: transformers' streamers take one sequence's tokens
                    streamer.put(torch.tensor([token]))
            if on_step is not None:
                on_step(row, tokens)

        decoded = decode(model, prompts, by_row, seeds=_seeds(seed, len(prompts)), on_step=stepped)
        _warn_if_cut(decoded, options.max_new_tokens)
        longest = max(len(each.new_tokens) for each in decoded)
        new = torch.tensor([each.new_tokens + [pad] * (longest - len(each.new_tokens)) for each in decoded])
        sequences = torch.cat([input_ids, new.to(input_ids.device)], dim=1)
        if generation_config.return_dict_in_generate:
            return DynaMoOutput(sequences, [each.statistics for each in decoded])
        return sequences

    return GenerationMixin.generate(  # type: ignore[return-value]
        model,  # type: ignore[arg-type]
        inputs,
        generation_config,
        logits_processor,
        criteria,
        streamer=streamer,
        custom_generate=carry_out,
        **kwargs,
    )


def _check_off(processors: LogitsProcessorList) -> None:
    """Refuses, for verify="off", all processors but those that are options of Algorithm 1. Raises InputError."""
    for processor in processors:
        if not isinstance(processor, OF_ALGORITHM_1):
            raise InputError(
                f'{type(processor).__name__} does not apply to the joint that verify="off" draws from; '
                'use verify="strict", which applies every processor.'
            )


def _warn_if_cut(sequences: Sequence[SequenceState], max_new_tokens: int) -> None:
    """Says that a text ended before its length, where the base's own `generate` would have gone on."""
    cut = [each for each in sequences if each.ending == "length" and len(each.new_tokens) < max_new_tokens]
    if cut:
        logger.warning(
            "A text ends after %d of %d new tokens, at %d tokens in all: beyond them the base has no positions that it was "
            "trained on, or its rotary embedding changes. model.base.generate may go on.",
            len(cut[0].new_tokens),
            max_new_tokens,
            len(cut[0].tokens),
        )


@contextmanager
def ended(streamer: Any) -> Iterator[None]:
    """Ends a streamer, also where generation raises: whoever reads from it would wait for ever."""
    try:
        yield
    finally:
        if streamer is not None:
            streamer.end()


def _prompts(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    """Prompts without their padding, which may be on either side."""
    if attention_mask is None:
        return input_ids.tolist()
    return [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]


def _seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """One seed a sequence: consecutive from `seed`, or as listed, or drawn from torch's global generator."""
    if seed is None:
        return torch.randint(2**62, (count,)).tolist()
    if isinstance(seed, Integral):
        seeds = [int(seed) + number for number in range(count)]
    else:
        seeds = list(seed) if isinstance(seed, Iterable) else [seed]
    if any(not isinstance(each, Integral) or not -(2**63) <= each < 2**64 for each in seeds):
        raise InputError(f"seed is {seed!r}; give a whole number of 64 bits, or one a row.")
    if len(seeds) != count:
        raise InputError(f"{len(seeds)} seeds were given for {count} rows; give one a row, or a single number.")
    return seeds
