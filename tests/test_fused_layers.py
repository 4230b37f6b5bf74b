"""A decoder layer in one call computes what its own code does, and a step of several tokens what as many steps of one do."""

from __future__ import annotations

import copy
import itertools
from collections import deque
from collections.abc import Iterator

import pytest
import torch
from architectures import random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GraniteConfig, LlamaConfig, LlamaModel, Qwen2Config, Qwen3Config

from dynamo_lm import DynaMoForCausalLM
from dynamo_lm.backbone.base_model import captured_inputs, decoder_layers
from dynamo_lm.backbone.eagle3_layer import DraftCache, Eagle3Layer
from dynamo_lm.backbone.stacked_heads import StackedHeads
from dynamo_lm.decoding import fused_body, fused_layers
from dynamo_lm.decoding.draft_length import JUDGED_STEPS, SHORTEST_REST, AdaptiveDraftLength
from dynamo_lm.decoding.fused_body import FusedBody
from dynamo_lm.decoding.fused_layers import FusedDraftLayer, FusedLayer, kernel_of
from dynamo_lm.decoding.kv_cache import RaggedKVCache, StaticKVCache
from dynamo_lm.decoding.model_runner import ModelRunner
from dynamo_lm.kernels import loader
from dynamo_lm.kernels.linear import optimize_modules
from dynamo_lm.kernels.quantized import FORMATS, quantize_modules
from dynamo_lm.model.quantization import quantize

pytestmark = pytest.mark.skipif(not loader.available(), reason="needs a C++ compiler")
KINDS = {
    "llama": (LlamaConfig, {}),
    "llama with biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {}),
}
WEIGHTS = [
    (torch.float32, None),
    (torch.bfloat16, None),
    (torch.float32, "int8"),
    (torch.bfloat16, "int8"),
    (torch.float32, "int4"),
]


def model_of(kind: str, dtype: torch.dtype, weights: str | None, kv_heads: int = 2, **changes) -> DynaMoForCausalLM:
    """Two layers and three heads of such a base, with weights large enough for every part to matter."""
    config_class, extra = KINDS[kind]
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": kv_heads}
    config = config_class(vocab_size=96, **(sizes | {"num_hidden_layers": 2} | extra | changes))
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model = DynaMoForCausalLM.from_base(base, 3).eval()
    if weights:
        quantize(model, weights)
    return model


def steps(layer, kernel, cache: RaggedKVCache, lengths: list[list[int]], wide: int) -> Iterator[torch.Tensor]:
    """States of a layer after steps of `wide` tokens, of which every slot keeps so many; the trees are random."""
    generator = torch.Generator().manual_seed(1)
    slots = len(lengths[0])
    for keep in lengths:
        hidden = torch.randn(slots, wide, kernel.size, generator=generator).to(kernel.dtype)
        angles = torch.randn(slots, wide, kernel.width // 2, generator=generator).repeat(1, 1, 2)
        positions = cache.reserve(wide)
        visible = torch.rand(slots, 1, wide, cache.end, generator=generator) < 0.7
        own = torch.arange(cache.end) == positions[:, None, :, None]
        mask = visible & (torch.arange(cache.end) < positions[:, None, :, None]) | own
        turns = angles.cos().to(kernel.dtype), angles.sin().to(kernel.dtype)
        with torch.inference_mode():
            state = layer(
                hidden, attention_mask=mask, position_embeddings=turns, position_ids=positions, past_key_values=cache
            )
        yield state
        cache.commit(torch.tensor(keep))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(list(KINDS)), st.sampled_from(WEIGHTS), st.sampled_from([1, 2, 4]), st.data())
def test_a_fused_layer_is_the_layer(kind, weights, kv_heads, data):
    slots, wide = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    lengths = data.draw(st.lists(st.lists(st.integers(0, wide), min_size=slots, max_size=slots), min_size=1, max_size=4))
    model = model_of(kind, *weights, kv_heads)
    layer = decoder_layers(model.optimize_for_inference(1, fuse=False).base)[0]
    kernel = kernel_of(layer)
    assert kernel is not None
    caches = [RaggedKVCache(1, slots), RaggedKVCache(1, slots)]
    how = {"rtol": 1e-4, "atol": 1e-4} if weights == (torch.float32, None) else {"rtol": 0.05, "atol": 0.25}
    runs = [
        steps(one, kernel, cache, lengths, wide)
        for one, cache in zip((layer, FusedLayer(layer, [kernel], 0)), caches, strict=True)
    ]
    for own, fused in zip(*runs, strict=True):
        torch.testing.assert_close(fused, own, **how)
    for own, fused in zip(caches[0].buffers()[0], caches[1].buffers()[0], strict=True):
        torch.testing.assert_close(fused[:, :, : caches[0].end], own[:, :, : caches[0].end], **how)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("static", [False, True])
def test_a_step_of_several_tokens_is_as_many_steps_of_one(weights, static):
    """Bit for bit; with a static cache the other step's mask hides the places that follow."""
    twin = model_of("llama", *weights).optimize_for_inference(1)
    tokens, states = random_tokens(1, 12), []
    for width in (1, 4):
        cache = StaticKVCache(twin.cache_entries, 64) if static else RaggedKVCache(twin.cache_entries, 1)
        parts = []
        for start in range(0, 12, width):
            positions = cache.reserve(width)
            mask = torch.arange(cache.end) <= positions[:, None, :, None]
            with torch.inference_mode():
                how = {"attention_mask": mask, "position_ids": positions, "cache": cache}
                parts.append(twin.hidden(tokens[:, start : start + width], num_heads=1, **how))
            cache.commit(torch.tensor([width]))
        states.append(torch.cat(parts, 2))
    assert torch.equal(*states)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_heads_beside_the_last_layer_leave_its_states_as_they_are(weights):
    """Bit for bit, also in a step of a draft tree's many tokens."""
    model, tokens, states = model_of("llama", *weights), random_tokens(1, 12), []
    for num_heads, width in ((1, 1), (3, 12)):
        twin, parts = model.optimize_for_inference(num_heads), []
        cache = RaggedKVCache(twin.cache_entries, 1)
        for start in range(0, 12, width):
            positions = cache.reserve(width)
            mask = torch.arange(cache.end) <= positions[:, None, :, None]
            how = {"attention_mask": mask, "position_ids": positions, "cache": cache}
            with torch.inference_mode():
                parts.append(twin.hidden(tokens[:, start : start + width], num_heads=num_heads, **how)[:1])
            cache.commit(torch.tensor([width]))
        states.append(torch.cat(parts, 2))
    assert torch.equal(*states)


@pytest.mark.parametrize("kind", list(KINDS))
def test_all_layers_and_heads_of_these_forms_are_fused(kind):
    twin = model_of(kind, torch.float32, None).optimize_for_inference(3)
    layers = decoder_layers(twin.base)
    assert [len(layer.kernels) for layer in layers] == [1, 3]
    assert isinstance(twin.last_layer, StackedHeads) and layers[1].layer is twin.last_layer


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(list(KINDS)), st.sampled_from(WEIGHTS), st.sets(st.integers(0, 4)), st.integers(1, 3), st.data())
def test_layers_in_one_call_are_the_layers_one_by_one(kind, weights, watched, num_heads, data):
    """Bit for bit, for sequences of any lengths, whichever inputs are captured, and with hooks that change some."""
    slots, wide = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    kept = data.draw(st.lists(st.lists(st.integers(0, wide), min_size=slots, max_size=slots), min_size=1, max_size=4))
    twin = model_of(kind, *weights, num_hidden_layers=5).optimize_for_inference(num_heads)
    assert isinstance(twin.body, FusedBody)
    plain = copy.copy(twin.body)
    plain.__class__ = type(twin.body).__mro__[2]
    watching = [decoder_layers(twin.base)[i] for i in sorted(watched)]
    for i in data.draw(st.sets(st.integers(0, 4), max_size=2)):
        decoder_layers(twin.base)[i].register_forward_pre_hook(lambda _, args: (args[0] * 2, *args[1:]))
    tokens, runs = random_tokens(slots, wide * len(kept)), []
    for body in (twin.body, plain):
        cache, given = RaggedKVCache(twin.cache_entries, slots), []
        with captured_inputs(watching if body is twin.body else list(decoder_layers(twin.base))) as states:
            for part, keep in zip(tokens.split(wide, 1), kept, strict=True):
                positions = cache.reserve(wide)
                mask = torch.arange(cache.end) <= positions[:, None, :, None]
                with torch.inference_mode():
                    how = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
                    given.append(body(input_ids=part, **how).last_hidden_state)
                cache.commit(torch.tensor(keep))
        runs.append((torch.cat(given, 1), states))
    assert torch.equal(runs[0][0], runs[1][0])
    for some, every in zip(*(states for _, states in runs), strict=bool(watched)):
        assert torch.equal(some, torch.cat([every.split(64, -1)[i] for i in sorted(watched)], -1))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(list(KINDS)), st.sampled_from(WEIGHTS), st.integers(1, 5), st.data())
def test_heads_make_up_for_steps_that_left_them_out(kind, weights, wide, data):
    """Bit for bit: the base's states of every step, and those of the heads where they are computed."""
    steps = data.draw(st.lists(st.tuples(st.booleans(), st.integers(0, wide)), min_size=1, max_size=6))
    twin = model_of(kind, *weights).optimize_for_inference(3)
    tokens = random_tokens(1, wide * (1 + len(steps)))
    caches = [RaggedKVCache(twin.cache_entries, 1) for _ in range(2)]
    for part, (left_out, kept) in zip(tokens.split(wide, 1), [(False, wide), *steps], strict=True):
        given = []
        for cache in caches:
            cache.without_heads = left_out and cache is caches[0]
            assert not cache.without_heads or decoder_layers(twin.base)[-1].skips_heads(1, wide)
            positions = cache.reserve(wide)
            how = {"attention_mask": torch.arange(cache.end) <= positions[:, None, :, None], "position_ids": positions}
            with torch.inference_mode():
                given.append(twin.hidden(part, num_heads=1 if cache.without_heads else 3, cache=cache, **how))
            cache.commit(torch.tensor([kept]))
        assert len(given[0]) == (1 if left_out else 3) and torch.equal(given[0], given[1][: len(given[0])])


def test_text_stays_while_heads_are_left_out_and_when_they_return(monkeypatch):
    model = model_of("llama", torch.float32, None)
    hopeless = AdaptiveDraftLength((1, 2, 3), 3, {size: deque([1.0 + size**3] * 99) for size in range(4)})
    hopeless.recent.extend([(1, 0.0)] * JUDGED_STEPS)
    model.runtime.draft_lengths[False, 3, torch.get_num_threads(), model.device] = hopeless
    returns, read = [], FusedLayer._read_unread
    monkeypatch.setattr(FusedLayer, "_read_unread", lambda *args: returns.append(len(args[1].unread)) or read(*args))
    how = {"max_new_tokens": 3 * SHORTEST_REST + 2 * JUDGED_STEPS, "verify": "strict", "eos_token_id": -1}
    text = model.generate(torch.arange(5)[None], **how)
    assert returns == [SHORTEST_REST + 1, 2 * SHORTEST_REST + 1]
    assert torch.equal(text, model.generate(torch.arange(5)[None], num_heads=1, **how))


def test_a_rest_that_begins_with_a_tree_leaves_its_heads_in(monkeypatch):
    """What heads read later is a chain: the cache moves a tree's accepted tokens together, not their states."""
    model, turns = model_of("llama", torch.float32, None), itertools.cycle([False, True, True])
    run, steps = ModelRunner._run, list[tuple[bool, bool]]()
    monkeypatch.setattr(AdaptiveDraftLength, "rests", lambda self: next(turns))
    monkeypatch.setattr(AdaptiveDraftLength, "choose", lambda self, probabilities: 8)

    def watched(self, forward, input_ids, cache, slots, least, trees=None):
        steps.append((cache.without_heads, trees is not None))
        return run(self, forward, input_ids, cache, slots, least, trees)

    monkeypatch.setattr(ModelRunner, "_run", watched)
    model.generate(torch.arange(5)[None], max_new_tokens=30, verify="strict", eos_token_id=-1)
    assert {(True, False), (False, True)} == set(steps[1:]) - {(False, False)}


class Louder(LlamaModel):
    """A body that computes something between its embedding and its layers."""

    def forward(self, input_ids=None, **kwargs):
        return super().forward(inputs_embeds=2 * self.embed_tokens(input_ids), **kwargs)


def test_a_body_that_computes_more_is_left_alone():
    model = model_of("llama", torch.float32, None)
    model.base.model.__class__ = Louder
    twin = model.optimize_for_inference(3)
    assert not isinstance(twin.body, FusedBody) and isinstance(decoder_layers(twin.base)[0], FusedLayer)


def test_what_computes_otherwise_is_left_alone():
    """A factor on what a layer adds, a width that is no multiple of 16, another attention function, a hook."""
    granite = AutoModelForCausalLM.from_config(
        GraniteConfig(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                      num_key_value_heads=2, residual_multiplier=0.3)
    )  # fmt: skip
    hooked = model_of("llama", torch.float32, None)
    decoder_layers(hooked.base)[0].mlp.register_forward_hook(lambda module, args, output: output * 2)
    eager = model_of("llama", torch.float32, None, attn_implementation="eager")
    models = [DynaMoForCausalLM.from_base(granite, 3), hooked, eager, model_of("llama", torch.float32, None, head_dim=24)]
    for model in models:
        assert not isinstance(decoder_layers(model.optimize_for_inference(1).base)[0], FusedLayer)
    assert isinstance(decoder_layers(hooked.optimize_for_inference(1).base)[1], FusedLayer)


def test_a_long_prompt_and_gradients_go_through_the_layers_own_code(monkeypatch):
    twin = model_of("llama", torch.float32, None).optimize_for_inference(1)
    plain = twin.optimize_for_inference(1, fuse=False)
    monkeypatch.setattr(fused_layers, "run_layers", None)  # the kernel would fail
    monkeypatch.setattr(fused_body, "run_layers", None)
    for tokens in (random_tokens(1, 65), random_tokens(5, 13)):
        cache = RaggedKVCache(twin.cache_entries, len(tokens))
        positions = cache.reserve(tokens.shape[1])
        mask = torch.arange(cache.end) <= positions[:, None, :, None]
        how = {"attention_mask": mask, "position_ids": positions, "cache": cache, "num_heads": 1}
        with torch.inference_mode():
            twin.hidden(tokens, **how)
    twin.base(random_tokens(1, 3)).logits.sum().backward()
    assert plain.base.get_input_embeddings().weight.grad is not None


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(WEIGHTS),
    st.sampled_from([1, 2, 4]),
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 3)), max_size=5),
)
def test_the_layer_of_an_eagle3_head_is_fused(weights, kv_heads, steps):
    """Each step writes so many positions, then forgets so many."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=kv_heads)
    torch.manual_seed(0)
    plain = Eagle3Layer(config, {"dtype": weights[0]})
    if weights[1]:
        quantize_modules(plain, FORMATS[weights[1]])
    layer = optimize_modules(plain)
    fused = FusedDraftLayer.of(layer)
    assert isinstance(fused, FusedDraftLayer)
    caches = DraftCache(), DraftCache()
    how = {"rtol": 1e-4, "atol": 1e-4} if weights == (torch.float32, None) else {"rtol": 0.05, "atol": 0.1}
    for new, forgotten in steps:
        state, embedding = torch.randn(2, 1, new, 64).to(weights[0])
        with torch.inference_mode():
            results = [one.advance(state, embedding, cache) for one, cache in zip((layer, fused), caches, strict=True)]
        torch.testing.assert_close(*results, **how)
        for cache in caches:
            cache.length = max(0, cache.length - forgotten)
