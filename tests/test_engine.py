"""What makes a step fast changes no result: products of few rows, the wide layer, the budget beside the exact rule."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from architectures import CONFIGS, NAMES, dynamo_of, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM

from dynamo_lm import DynaMoForCausalLM
from dynamo_lm.backbone.attention_mask import AttentionMaskBuilder
from dynamo_lm.backbone.stacked_heads import StackedHeads
from dynamo_lm.decoding import candidates
from dynamo_lm.decoding.batch import decode
from dynamo_lm.decoding.kv_cache import RaggedKVCache
from dynamo_lm.decoding.options import DecodingOptions
from dynamo_lm.decoding.verification import accept_greedy
from dynamo_lm.errors import InputError
from dynamo_lm.kernels import linear, loader
from dynamo_lm.kernels.linear import (
    ArrangedLinear,
    SkinnyLinear,
    TransposedLinear,
    arrange_for_batches,
    multiplies_bfloat16,
    optimize_modules,
)
from dynamo_lm.sampling.options import Algorithm1

# ---------------------------------------------------------------- products of few rows


needs_kernel = pytest.mark.skipif(not loader.available(), reason="needs a C++ compiler")
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


@needs_kernel
@pytest.mark.skipif(not multiplies_bfloat16(), reason="this CPU does not multiply bfloat16")
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 80), st.integers(1, 9), st.integers(1, 40), st.booleans())
def test_layers_that_are_arranged_for_batches_multiply_alike(rows, wide, tall, bias):
    plain = nn.Linear(16 * wide, tall, bias=bias, dtype=torch.bfloat16)
    layer, x = optimize_modules(plain), torch.randn(rows, 1, 16 * wide, dtype=torch.bfloat16)
    arrange_for_batches(layer, 64)
    assert isinstance(layer, ArrangedLinear) and not isinstance(plain, ArrangedLinear)
    with torch.inference_mode():
        exact = copy.deepcopy(plain).double()(x.double())
        torch.testing.assert_close(layer(x).double(), exact, rtol=2**-7, atol=2**-7)


@needs_kernel
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 7), st.integers(1, 9), st.integers(1, 40), st.booleans(), DTYPES)
def test_skinny_products_are_those_of_any_linear_layer(batch, length, wide, tall, bias, dtype):
    plain = nn.Linear(16 * wide, tall, bias=bias, dtype=dtype)
    layer, x = optimize_modules(plain), torch.randn(length, batch, 16 * wide, dtype=dtype).transpose(0, 1)  # not contiguous
    assert isinstance(layer, SkinnyLinear)
    layer.max_rows = 2**31  # the kernel at any number of rows: torch's product may round twice
    with torch.inference_mode():  # exact but for one rounding to the type, and what float32 sums lose
        exact = copy.deepcopy(plain).double()(x.double())
        torch.testing.assert_close(layer(x).double(), exact, rtol=torch.finfo(dtype).eps / 2 + 1e-5, atol=1e-5)


@needs_kernel
@settings(max_examples=30, deadline=None)
@given(st.integers(1, 21), st.integers(1, 30), st.integers(1, 20), DTYPES, st.data())
def test_a_row_has_the_same_product_bit_for_bit_whatever_is_beside_it(rows, wide, tall, dtype, data):
    layer = optimize_modules(nn.Linear(16 * wide, tall, dtype=dtype))
    layer.max_rows = 2**31
    x, start = torch.randn(rows, 16 * wide, dtype=dtype), data.draw(st.integers(0, rows - 1))
    end, threads = data.draw(st.integers(start + 1, rows)), torch.get_num_threads()
    with torch.inference_mode():
        together = layer(x)
        try:
            torch.set_num_threads(1)
            assert torch.equal(layer(x[start:end]), together[start:end])
        finally:
            torch.set_num_threads(threads)


@needs_kernel
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 3.3e38, 1e-40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_at_the_edge_come_out_as_torch_has_them(dtype, value):
    plain = nn.Linear(16, 3, dtype=dtype)
    with torch.inference_mode():
        plain.weight.zero_()[0, 5] = 1
        x = torch.zeros(2, 16, dtype=dtype)
        x[1, 5] = value
        torch.testing.assert_close(optimize_modules(plain)(x), plain(x), equal_nan=True)


@needs_kernel
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 17])
def test_results_in_bfloat16_are_rounded_to_the_nearest_and_ties_to_even(rows):
    layer = nn.Linear(16, 11, bias=False, dtype=torch.bfloat16)  # eight outputs are rounded together, and three are left
    x = torch.zeros(rows, 16, dtype=torch.bfloat16)
    x[:, :2] = torch.tensor([1, 2**-8])
    with torch.inference_mode():
        layer.weight.zero_()[:, 0] = 1 + torch.arange(11) * 2**-7  # 1, 1 + 2^-7, ..., and half the way to the one beside it:
        layer.weight[:, 1] = torch.tensor([1, 1, -1, -1, 0.99, 1.01, float("nan"), 1, 1, float("nan"), 1])
        exact = x.float() @ layer.weight.float().t()
        torch.testing.assert_close(optimize_modules(layer)(x), exact.bfloat16(), rtol=0, atol=0, equal_nan=True)


def seen_by(queries: int, slots: int, *, seed: int, how: str) -> torch.Tensor:
    """A mask (1, 1, queries, slots) in which every query sees something: at random, one slot more than the one before it, as
    in a chain of drafts, or as many as the one before it, one slot later, as in a window."""
    if how == "random":
        mask = torch.rand(1, 1, queries, slots, generator=torch.Generator().manual_seed(seed)) < 0.6
        mask[..., seed % slots] = True
        return mask
    order, at = torch.arange(slots), torch.arange(queries)[:, None] + slots - queries
    ends = at.clamp(min=seed % slots)
    begins = ends - seed if how == "window" else torch.full_like(ends, seed % slots)
    return ((order >= begins) & (order <= ends))[None, None]


HOW = st.sampled_from(["random", "chain", "window"])


@needs_kernel
@settings(max_examples=60, deadline=None)
@given(
    *(st.integers(1, most) for most in (3, 3, 3, 9, 40, 6)),
    DTYPES,
    HOW,
)
def test_decode_attention_is_torchs(rows, shared, groups, queries, slots, wide, dtype, how):
    width = 16 * wide
    query = torch.randn(rows, queries, shared * groups, width, dtype=dtype).transpose(1, 2)
    buffer = torch.randn(2, rows, groups, slots + 3, width, dtype=dtype)  # a cache with room behind what is in use
    key, value = buffer[:, :, :, :slots]
    mask = seen_by(queries, slots, seed=wide, how=how).expand(rows, -1, -1, -1)
    found = torch.ops.dynamo_lm.decode_attention(query, key, value, mask, 0.3)
    wider = (each.double().repeat_interleave(shared, 1) for each in (key, value))
    exact = F.scaled_dot_product_attention(query.double(), *wider, attn_mask=mask, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps / 2 + 1e-5, atol=1e-5)


@needs_kernel
@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 40), st.integers(0, 9), DTYPES, HOW, st.data())
def test_a_query_attends_the_same_bit_for_bit_whatever_is_beside_it(rows, queries, slots, hidden, dtype, how, data):
    query = torch.randn(rows, 2, queries, 48, dtype=dtype)
    key, value = torch.randn(2, rows, 1, slots, 48, dtype=dtype)
    mask = seen_by(queries, slots, seed=hidden, how=how)
    together = torch.ops.dynamo_lm.decode_attention(query, key, value, mask, 0.2)
    i, row = data.draw(st.integers(0, queries - 1)), data.draw(st.integers(0, rows - 1))
    more = [torch.cat([each, torch.full((rows, 1, hidden, 48), 9.0, dtype=dtype)], 2)[row, None] for each in (key, value)]
    blind = torch.cat([mask[:, :, i, None], torch.zeros(1, 1, 1, hidden, dtype=torch.bool)], 3)
    alone = torch.ops.dynamo_lm.decode_attention(query[row, None, :, i, None], *more, blind, 0.2)
    assert torch.equal(alone[0, 0], together[row, i])


@needs_kernel
@pytest.mark.parametrize("scores", [[0.0], [-200.0, 0.0], [1e4, 1e4], [88.0, -88.0, 3.0], [float("nan"), 1.0]])
def test_scores_of_any_size_become_weights(scores):
    key = torch.zeros(1, 1, len(scores), 16)
    key[0, 0, :, 0] = torch.tensor(scores)
    value, query = torch.randn(1, 1, len(scores), 16), torch.eye(16)[None, None, :1]
    found = torch.ops.dynamo_lm.decode_attention(query, key, value, torch.ones(1, 1, 1, len(scores), dtype=torch.bool), 1.0)
    weights = torch.tensor(scores).softmax(0)
    torch.testing.assert_close(found[0, 0, 0], weights @ value[0, 0], equal_nan=True)


EXACT = [name for name in NAMES if name not in ("gpt2", "gemma2", "falcon", "qwen3_moe")]  # whose every part is a kernel's


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EXACT)
def test_a_step_of_several_tokens_is_bit_for_bit_as_many_steps_of_one(name, dtype):
    model = wide_enough(name).to(dtype)
    fast = model.optimize_for_inference(3)
    prompt, more = random_tokens(1, 20, seed=1), random_tokens(1, 5, seed=2)
    with torch.inference_mode():
        found = [run(fast, prompt, more.split(size, 1)) for size in ([5], [1] * 5, [2, 3])]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def wide_enough(name: str):
    """A model of the kind whose heads have 16 dimensions, as the kernel wants them."""
    config = copy.deepcopy(CONFIGS[name])
    for key in ("hidden_size", "intermediate_size", "ffn_dim", "word_embed_proj_dim"):
        if hasattr(config, key):
            setattr(config, key, 64)
    if getattr(config, "head_dim", None):
        config.head_dim = 16
    torch.manual_seed(0)
    return DynaMoForCausalLM.from_base(AutoModelForCausalLM.from_config(config), num_heads=3).eval()


def run(model, prompt, parts) -> torch.Tensor:
    """Final states of all heads at the tokens behind a prompt that are absorbed part by part."""
    cache, states = RaggedKVCache(model.cache_entries, 1), []
    for tokens in (prompt, *parts):
        positions = cache.reserve(tokens.shape[1])
        mask = AttentionMaskBuilder.of(model.base.config, model.dtype).mask(positions, torch.arange(cache.end)[None])
        kwargs = {"attention_mask": mask, "position_ids": positions, "cache": cache}
        states.append(model.hidden(tokens, num_heads=3, **kwargs))
        cache.commit(torch.tensor([tokens.shape[1]]))
    return torch.cat(states[1:], 2)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 10), st.integers(1, 5), st.integers(1, 7), st.integers(1, 9), st.booleans(), st.sampled_from([0, 10**9])
)
def test_without_a_kernel_products_of_few_rows_are_transposed(batch, length, wide, tall, bias, huge):
    plain, x = nn.Linear(wide, tall, bias=bias), torch.randn(batch, length, wide)
    with pytest.MonkeyPatch.context() as patched, torch.inference_mode():
        patched.setattr(loader, "available", lambda: False)
        patched.setattr(linear, "LARGE", 0)
        patched.setattr(linear, "HUGE", huge)
        layer = optimize_modules(plain)
        assert isinstance(layer, TransposedLinear)
        torch.testing.assert_close(layer(x), plain(x))


def test_where_gradients_are_wanted_the_layer_is_torchs_own():
    plain = nn.Linear(16, 3)
    x = torch.randn(2, 16, requires_grad=True)
    optimize_modules(plain)(x).sum().backward()
    torch.testing.assert_close(x.grad, plain.weight.detach().sum(0).expand(2, -1))


def test_the_twin_shares_every_tensor_and_leaves_the_model_alone():
    model = dynamo_of("llama")
    twin = model.optimize_for_inference(3)
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    assert {SkinnyLinear, TransposedLinear} & {type(m) for m in twin.modules()}
    assert not any(isinstance(m, StackedHeads) for m in model.modules())
    assert {id(p) for p in twin.parameters()} == {id(p) for p in model.parameters()}


# ---------------------------------------------------------------- the wide layer


def steps(model, num_heads: int):
    """Final states of three forwards over rows that keep different numbers of tokens, and lose a row on the way."""
    cache, states = RaggedKVCache(model.cache_entries, 3), []
    for seed, (keep, stay) in enumerate([([5, 7, 6], [0, 1, 2]), ([1, 2, 2], [0, 2]), ([2, 1], [0, 1])]):
        tokens = random_tokens(len(cache.lengths), max(keep), seed=seed)
        positions = cache.reserve(tokens.shape[1])
        mask = AttentionMaskBuilder.of(model.base.config, model.dtype).mask(positions, torch.arange(cache.end)[None])
        kwargs = {"attention_mask": mask, "position_ids": positions, "cache": cache}
        hidden = model.hidden(tokens, num_heads=num_heads, **kwargs)
        states += [hidden[:, row, :count] for row, count in enumerate(keep)]
        cache.commit(torch.tensor(keep))
        cache.select(torch.tensor(stay))
    return states


@pytest.mark.parametrize(
    ("name", "num_heads"), [*((name, 3) for name in NAMES), *((name, n) for name in ("gpt_neox", "gemma3") for n in (1, 2))]
)
def test_a_model_arranged_for_decoding_has_the_states_of_the_model(name, num_heads):
    model = dynamo_of(name, 3)
    fast = model.optimize_for_inference(num_heads)
    assert isinstance(fast.last_layer, StackedHeads) == (num_heads > 1)
    with torch.inference_mode():
        for mine, theirs in zip(steps(fast, num_heads), steps(model, num_heads), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"layers_per_head": 2}, {"feed": "last"}])
def test_heads_that_are_no_layer_beside_the_last_stay_apart(options):
    model = dynamo_of("gpt_neox", 3, **options)
    fast = model.optimize_for_inference(3)
    assert not isinstance(fast.last_layer, StackedHeads)
    with torch.inference_mode():
        for mine, theirs in zip(steps(fast, 3), steps(model, 3), strict=True):
            torch.testing.assert_close(mine, theirs)


def test_a_layer_that_computes_with_its_number_is_not_made_wide():
    model = dynamo_of("gpt2", 3)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config.scale_attn_by_inverse_layer_idx = True
    assert not isinstance(model.optimize_for_inference(3).last_layer, StackedHeads)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes", [{}, {"sample": True}, {"verify": "off", "sample": True}, {"verify": "off", "num_heads": 1}], ids=str
)
def test_reading_all_heads_together_changes_no_token(changes, dtype, monkeypatch):
    model = dynamo_of("llama", 3).to(dtype)
    how = {"num_heads": 3, "tree": 0, "algorithm": Algorithm1(top_k=5, alpha_c=0.0, eps_b=0.2)} | changes
    prompts = random_tokens(1, 9).tolist()
    texts, widths = [], []
    monkeypatch.setattr(candidates, "HUGE", 0)
    for rule in (lambda *states, one_place: False, candidates._pays_together):
        monkeypatch.setattr(candidates, "_pays_together", rule)
        readout = DynaMoForCausalLM.readout

        def counted(self, hidden, head=1, readout=readout):
            widths.append(hidden[..., 0].numel())
            return readout(self, hidden, head)

        with monkeypatch.context() as patch:
            patch.setattr(DynaMoForCausalLM, "readout", counted)
            texts.append(decode(model, prompts, DecodingOptions(24, **how), seeds=[3])[0].new_tokens)
        widths.append(0)
    assert texts[0] == texts[1]
    apart, together = widths[: widths.index(0)], widths[widths.index(0) + 1 : -1]
    assert len(together) < len(apart) or how["num_heads"] == 1
    assert max(together) <= candidates.TOGETHER[dtype]


# ---------------------------------------------------------------- the budget


def accept_slowly(logits, drafts, regret_budgets):
    """`accept_greedy` in words: go on while a draft is the first choice or all losses so far are allowed."""
    spent, costs = 0.0, []
    for position, draft in enumerate(drafts):
        line = logits[position].tolist()
        loss = max(line) - line[draft]
        first = line.index(max(line)) == draft
        if not first and (not regret_budgets or spent + loss > regret_budgets[position]):
            break
        spent += 0.0 if first else loss
        costs.append(0.0 if first else loss)
    last = logits[len(costs)].tolist()
    return len(costs), last.index(max(last)), costs


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 3), st.lists(st.floats(0, 4), min_size=3, max_size=3) | st.just([]))
def test_a_greedy_budget_is_spent_as_the_slow_rule_spends_it(seed, count, regret_budgets):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, 4, (4, 5), generator=generator).float()
    drafts = torch.randint(0, 5, (count,), generator=generator).tolist()
    assert tuple(accept_greedy(logits, drafts, regret_budgets))[:3] == accept_slowly(logits, drafts, regret_budgets)


@pytest.mark.parametrize("sample", [False, True])
def test_a_budget_of_nothing_is_strict(sample):
    model, prompts = dynamo_of("llama"), random_tokens(3, 6).tolist()
    texts = []
    for verify in ("strict", 0, 0.0):
        rows = decode(model, prompts, DecodingOptions(20, 3, verify=verify, sample=sample), seeds=[1, 2, 3])
        texts.append([row.tokens for row in rows])
    assert texts[0] == texts[1] == texts[2]


@settings(max_examples=15, deadline=None)
@given(st.floats(0.01, 3), st.booleans(), st.integers(0, 99))
def test_the_regret_never_exceeds_the_budget(budget, sample, seed):
    spent = []
    options = DecodingOptions(25, 3, verify=budget, sample=sample)
    for row in decode(MODEL, random_tokens(2, 5, seed=seed).tolist(), options, seeds=[seed, seed + 1]):
        counted = row.statistics
        assert counted.regret <= budget * counted.new_tokens + 1e-9
        spent.append(counted.unverified)
    assert sample or max(spent) > 0 or budget < 0.5  # it is used, too


MODEL = dynamo_of("llama")


def test_under_a_large_budget_every_draft_stays():
    rows = decode(MODEL, random_tokens(2, 5).tolist(), DecodingOptions(24, 3, verify=1e6), seeds=[0, 1])
    assert all(row.statistics.acceptance == [1.0, 1.0] for row in rows)
    assert all(row.statistics.tokens_per_step > 2.6 for row in rows)  # 24 tokens: the prompt's one, then threes


@pytest.mark.parametrize("verify", ["exact", -0.1, float("nan"), float("inf"), True])
def test_what_is_no_place_on_the_dial_is_refused(verify):
    with pytest.raises(InputError, match="verify is"):
        DecodingOptions(5, 2, verify=verify)


def test_a_temperature_that_divides_by_nothing_is_refused():
    options = DecodingOptions(5, 2, sample=True, temperature=0.0)
    with pytest.raises(InputError, match="temperature must be above 0"):
        decode(dynamo_of("llama"), random_tokens(1, 5).tolist(), options, seeds=[0])
