"""Where texts end: the base's context, and the length at which LongRoPE changes its factors."""

from __future__ import annotations

import asyncio
import logging

import pytest
import torch
from architectures import base_of, dynamo_of, random_tokens
from transformers import AutoModelForCausalLM, Phi3Config, XLNetConfig

from dynamo_lm import DynaMoConfig, DynaMoForCausalLM, InputError
from dynamo_lm.backbone.base_model import fingerprint
from dynamo_lm.backbone.rope_limits import rope_switch
from dynamo_lm.decoding.options import DecodingOptions
from dynamo_lm.serving.engine import Engine
from dynamo_lm.serving.limits import Limits
from dynamo_lm.serving.metrics import Metrics
from dynamo_lm.serving.requests import GenerationRequest

SWITCH = 16
PLAIN = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module")
def longrope():
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": SWITCH}
    config = Phi3Config(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        original_max_position_embeddings=SWITCH,
        rope_parameters=rope | {"short_factor": [1.0] * 4, "long_factor": [1.0, 3.0, 9.0, 20.0]},
        pad_token_id=0,
    )
    base = AutoModelForCausalLM.from_config(config).eval()
    for parameter in base.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(3)
    return DynaMoForCausalLM.from_base(base, 3, init="copy").eval()


@torch.no_grad()
def test_a_text_ends_where_longrope_changes_its_factors(longrope, caplog):
    ids = random_tokens(1, 8)
    expected = longrope.base.generate(ids, max_new_tokens=12, **PLAIN)
    with caplog.at_level(logging.WARNING):
        result = longrope.generate(ids, max_new_tokens=12, **PLAIN)
    assert result.tolist() == expected[:, :SWITCH].tolist()
    assert "after 8 of 12 new tokens" in caplog.text


@torch.no_grad()
def test_a_prompt_beyond_that_length_is_continued_as_the_base_does(longrope):
    ids = random_tokens(1, SWITCH + 4)
    expected = longrope.base.generate(ids, max_new_tokens=12, **PLAIN)
    assert torch.equal(longrope.generate(ids, max_new_tokens=12, **PLAIN), expected)
    with pytest.raises(InputError, match="compile=True goes with prompts of up to 16 tokens"):
        longrope.generate(ids, max_new_tokens=12, compile=True, **PLAIN)


@torch.no_grad()
def test_short_and_long_prompts_are_not_decoded_in_one_batch(longrope):
    ids = random_tokens(2, SWITCH + 4)
    mask = torch.ones_like(ids)
    mask[0, :12] = 0
    with pytest.raises(InputError, match="LongRoPE"):
        longrope.generate(ids, attention_mask=mask, max_new_tokens=4, **PLAIN)


def test_a_server_decodes_short_and_long_prompts_beside_each_other(longrope):
    prompts = [random_tokens(1, length).tolist()[0] for length in (4, SWITCH + 4, 6)]
    options = DecodingOptions(9, num_heads=3, tree=0)

    async def tokens_of(handle):
        found = []
        while (event := await handle.next()) is not None:
            found += event.tokens
        return found

    async def scenario():
        engine = Engine(longrope, 3, Limits(), Metrics(3))
        engine.start()
        handles = [engine.accept([GenerationRequest(prompt, options, 0)]) for prompt in prompts]
        texts = await asyncio.wait_for(asyncio.gather(*map(tokens_of, handles)), 120)
        await engine.stop()
        return texts

    alone = [longrope.base.generate(torch.tensor([each]), max_new_tokens=9, **PLAIN)[0, len(each) :] for each in prompts]
    assert asyncio.run(scenario()) == [each.tolist() for each in alone]


def test_only_longrope_has_such_a_length(longrope):
    assert rope_switch(longrope.config) == SWITCH
    assert rope_switch(dynamo_of("llama").config) is None


@torch.no_grad()
def test_a_text_that_fills_the_context_says_so(caplog):
    model = dynamo_of("llama")
    with caplog.at_level(logging.WARNING):
        model.generate(random_tokens(1, 125), max_new_tokens=48, **PLAIN)
    assert "after 3 of 48 new tokens" in caplog.text
    caplog.clear()
    model.generate(random_tokens(1, 20), max_new_tokens=4, **PLAIN)
    assert "new tokens" not in caplog.text


def test_a_context_of_minus_one_is_no_limit():
    assert DynaMoConfig(XLNetConfig(), 2).max_context is None


def test_a_base_with_a_parameter_of_no_dimensions_has_a_fingerprint():
    base = base_of("llama")
    before = fingerprint(base)
    base.model.layers[-1].register_parameter("scale", torch.nn.Parameter(torch.tensor(1.0)))
    assert fingerprint(base) != before
