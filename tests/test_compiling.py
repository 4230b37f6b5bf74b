"""Compiled steps write the same text; what cannot be compiled is refused in a sentence."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from architectures import CONFIGS, dynamo_of, random_tokens
from transformers import AutoModelForCausalLM

from dynamo_lm import DynaMoForCausalLM
from dynamo_lm.backbone.attention_mask import AttentionMaskBuilder
from dynamo_lm.cooccurrence.counting import count
from dynamo_lm.decoding import compiled
from dynamo_lm.decoding.batch import Batch, decode
from dynamo_lm.decoding.compiled import MIN_CAPACITY, CompiledStep, capacity, check_compiler, compile_steps
from dynamo_lm.decoding.kv_cache import StaticKVCache
from dynamo_lm.decoding.options import DecodingOptions
from dynamo_lm.decoding.thread_choice import AdaptiveThreads
from dynamo_lm.errors import InputError


def has_compiler() -> bool:
    try:
        check_compiler()
    except InputError:
        return False
    return True


def shallow(name: str, num_heads: int) -> DynaMoForCausalLM:
    """Two layers: compiling takes time by the layer."""
    config = copy.deepcopy(CONFIGS[name])
    config.num_hidden_layers = 2
    if hasattr(config, "layer_types"):
        config.layer_types = ["sliding_attention", "full_attention"]
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).eval()
    for parameter in base.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(3)
    return DynaMoForCausalLM.from_base(base, num_heads=num_heads).eval()


@pytest.fixture(scope="module")
def neox() -> DynaMoForCausalLM:
    """Compiled once for each number of heads."""
    return shallow("gpt_neox", 3)


def test_capacities_double_so_that_few_shapes_are_compiled():
    assert [capacity(tokens) for tokens in (1, 256, 257, 1000)] == [256, 256, 512, 1024]


@pytest.mark.parametrize("name", ["gpt_neox", "mistral", "gemma3"])
def test_a_cache_of_fixed_shape_gives_the_same_states(name):
    model = dynamo_of(name).optimize_for_inference(3)
    cache, tokens = StaticKVCache(model.cache_entries, 32), random_tokens(1, 12)
    states = []
    with torch.inference_mode():
        whole = model.hidden(tokens, num_heads=3)
        for start, width, keep in ((0, 5, 5), (5, 3, 2), (7, 3, 1), (8, 3, 3)):
            positions = cache.reserve(width)
            mask = AttentionMaskBuilder.of(model.base.config, model.dtype).mask(positions, torch.arange(cache.end)[None])
            kwargs = {"attention_mask": mask, "position_ids": positions, "cache": cache}
            hidden = model.hidden(tokens[:, start : start + width], num_heads=3, **kwargs)
            states.append(hidden[:, :, :keep])
            cache.commit(torch.tensor([keep]))
            assert cache.layers[0].keys.shape[2] == 32
    torch.testing.assert_close(torch.cat(states, 2), whole[:, :, :11], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")
def test_compiled_steps_write_the_same_text(neox):
    prompt = random_tokens(1, 6).tolist()
    plain = decode(neox, prompt, DecodingOptions(12, 2), seeds=[0])
    fast = decode(neox, prompt, DecodingOptions(12, 2, compile=True), seeds=[0])
    assert fast[0].tokens == plain[0].tokens
    neox.runtime.threads = AdaptiveThreads(2)
    decode(neox, prompt, DecodingOptions(12, 2, compile=True), seeds=[0])
    assert not neox.runtime.threads.seconds  # compiled code is for one number of threads
    neox.runtime.threads = None
    kept = neox.runtime.compiled[2, neox.device, neox.dtype][1]
    decode(neox, random_tokens(1, 9).tolist(), DecodingOptions(5, 2, compile=True), seeds=[0])
    assert neox.runtime.compiled[2, neox.device, neox.dtype][1] is kept


@pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")
@pytest.mark.parametrize("name", ["gpt_neox", "gemma3"])
def test_later_steps_reach_compiled_code_straight_away_with_the_same_result(name, neox):
    model = neox if name == "gpt_neox" else shallow(name, 2)
    with torch.inference_mode():
        tokens = random_tokens(1, 9)
    twin, step = compile_steps(model, 2)
    assert isinstance(step, CompiledStep)
    form, results = AttentionMaskBuilder.of(model.base.config, model.dtype), []

    def steps(forward, prompt: int) -> None:
        cache = StaticKVCache(twin.cache_entries, MIN_CAPACITY)
        for start, width in ((0, prompt), (prompt, 2), (prompt + 2, 2)):
            positions = cache.reserve(width)
            mask = form.mask(positions, torch.arange(cache.end)[None])
            kwargs = {"attention_mask": mask, "position_ids": positions, "cache": cache, "num_heads": 2}
            call = twin.hidden if start == 0 else forward
            results.append(call(tokens[0, start : start + width][None], **kwargs))
            cache.commit(torch.tensor([width]))
        cache.release()
        assert not cache.arguments

    with torch.inference_mode():
        for prompt in (3, 5):
            for forward in (step, step.compiled):
                steps(forward, prompt)
    assert list(step.graphs) == [(2, MIN_CAPACITY)] and step.graphs[2, MIN_CAPACITY] is not None
    kept = [tensor for tensor in step.graphs[2, MIN_CAPACITY].arguments if tensor is not None]
    assert all(tensor.shape[-2] != MIN_CAPACITY for tensor in kept if tensor.ndim > 1)  # no buffer of a cache
    for start in (0, 6):
        for straight, way in zip(results[start : start + 3], results[start + 3 : start + 6], strict=True):
            assert torch.equal(straight, way)


@pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")
def test_short_prompts_are_absorbed_in_compiled_steps(neox, monkeypatch):
    options = DecodingOptions(8, 2, compile=True, logprobs=0)
    decode(neox, [[1]], options, seeds=[0])
    for length in (1, 2, 5, 6):
        prompt = random_tokens(1, length).tolist()
        expected = decode(neox, prompt, DecodingOptions(8, 2, tree=0), seeds=[0])[0]
        with monkeypatch.context() as patch:
            batch = Batch(neox, 2, compile=True)
            patch.setattr(batch.model, "hidden", None)  # what would absorb it in one forward
            row = batch.join(prompt[0], options, seed=0)
            while batch.running:
                batch.step()
        assert row.tokens == expected.tokens and row.statistics.step_sizes == expected.statistics.step_sizes
        scored = decode(neox, prompt, replace(options, prompt_logprobs=True), seeds=[0])[0]
        assert scored.tokens == expected.tokens and len(scored.prompt_scores) == length
    monkeypatch.setattr(compiled, "MAX_REREAD", 0)
    assert decode(neox, prompt, options, seeds=[0])[0].tokens == expected.tokens


@pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")
@pytest.mark.parametrize("heads", [1, 2])
def test_compiled_steps_may_use_fewer_heads_than_there_are(heads, neox):
    prompt = random_tokens(1, 5).tolist()
    expected = decode(neox, prompt, DecodingOptions(8, heads, tree=0), seeds=[0])[0].tokens
    for _ in range(2):
        assert decode(neox, prompt, DecodingOptions(8, heads, compile=True), seeds=[0])[0].tokens == expected
    step = neox.runtime.compiled[heads, neox.device, neox.dtype][1]
    assert set(step.graphs) == {(heads, MIN_CAPACITY)} and None not in step.graphs.values()


@pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")
def test_a_model_whose_weights_were_exchanged_is_compiled_anew(neox):
    prompt, options = random_tokens(1, 6).tolist(), DecodingOptions(6, 2)
    before = decode(neox, prompt, replace(options, compile=True), seeds=[0])[0].tokens
    first = neox.runtime.compiled[2, neox.device, neox.dtype][1]
    layer, output = neox.last_layer.mlp.dense_h_to_4h, neox.get_output_embeddings().weight
    weight = layer.weight
    layer.weight = torch.nn.Parameter(3 * torch.randn_like(weight))
    output.data.mul_(-1)  # in place: nothing to compile
    after = decode(neox, prompt, options, seeds=[0])[0].tokens
    assert decode(neox, prompt, replace(options, compile=True), seeds=[0])[0].tokens == after != before
    assert neox.runtime.compiled[2, neox.device, neox.dtype][1] is not first
    layer.weight = weight
    output.data.mul_(-1)


@pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")
def test_a_table_that_was_exchanged_since_compiling_is_the_one_that_is_read():
    model = dynamo_of("gpt_neox", 2)
    first, _ = compile_steps(model, 2)
    assert first.cooccurrence is None
    model.cooccurrence = count([[3, 4, 5]], vocab_size=97, order=2)
    again, _ = compile_steps(model, 2)
    assert again is first and again.cooccurrence is model.cooccurrence


def test_batches_are_not_compiled():
    with pytest.raises(InputError, match="one prompt at a time, and there are 2"):
        decode(dynamo_of("gpt_neox"), random_tokens(2, 6).tolist(), DecodingOptions(5, 2, compile=True), seeds=[0, 1])


@pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")
def test_a_compiled_batch_holds_one_sequence():
    batch = Batch(dynamo_of("gpt_neox", 2), 2, compile=True)
    batch.join([1], DecodingOptions(4, 2), seed=0)
    with pytest.raises(InputError, match="one sequence at a time"):
        batch.join([1], DecodingOptions(4, 2), seed=0)
