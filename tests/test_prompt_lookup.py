"""Drafts from the text itself: what is drafted, that strict text stays the base's own, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from architectures import VOCABULARY, base_of, cycle, dynamo_of, markov_dynamo, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from test_eagle3 import eagle
from transformers import GenerationConfig

from dynamo_lm import DynaMoForCausalLM, InputError
from dynamo_lm.cli.generate import numbers, sentence
from dynamo_lm.decoding.batch import decode
from dynamo_lm.decoding.options import DecodingOptions
from dynamo_lm.decoding.prompt_lookup import LEAST_MATCH, PromptLookup
from dynamo_lm.decoding.statistics import Statistics
from dynamo_lm.decoding.verification import accept_sampled, certain
from dynamo_lm.kernels.linear import MAX_ROWS

PROMPT = [5, 6, 7, 8, 5, 6, 7, 8, 5, 6, 7]


def slow_drafts(tokens: list[int], most: int) -> list[int]:
    """`PromptLookup.draft` by comparing the end of the text with every earlier place, the latest first."""
    for start in range(len(tokens) - 1, LEAST_MATCH - 1, -1):
        match = 0
        while match < start and tokens[start - 1 - match] == tokens[-1 - match]:
            match += 1
        if match >= LEAST_MATCH:
            text = list(tokens)
            for place in range(start, start + min(match, most)):
                text.append(text[place])
            return text[len(tokens) :]
    return []


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.integers(1, 8), st.lists(st.integers(1, 5), max_size=30))
def test_drafts_follow_the_latest_place_that_matches(tokens, most, steps):
    lookup, length = PromptLookup(), 1
    for step in [*steps, len(tokens)]:  # the text grows, as in decoding
        assert lookup.draft(tokens[:length], most) == slow_drafts(tokens[:length], most)
        length = min(len(tokens), length + step)


@pytest.mark.parametrize("kind", ["parallel", "one head", "eagle3", "coupling"])
@pytest.mark.parametrize("rows", [1, 3])
def test_strict_greedy_is_the_bases_own(kind, rows):
    if kind == "eagle3":
        model = eagle()
    else:
        model = dynamo_of("llama", 1 if kind == "one head" else 3, coupling_rank=4 if kind == "coupling" else 0)
    others = random_tokens(2, len(PROMPT)) % 30 + 3  # within every vocabulary here
    ids = torch.tensor([PROMPT, *others.tolist()][:rows])
    own = model.base.generate(ids, do_sample=False, max_new_tokens=60, attention_mask=torch.ones_like(ids), pad_token_id=0)
    for most in (1, 2, 7):
        mine = model.generate(
            ids, do_sample=False, max_new_tokens=60, prompt_lookup_num_tokens=most, return_dict_in_generate=True
        )
        assert torch.equal(mine.sequences, own)


def test_a_text_that_repeats_takes_several_drafts_of_it_a_step():
    model = markov_dynamo(cycle(8))  # one head: all drafts are the text's own
    prompt = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2]])
    mine = model.generate(
        prompt, do_sample=False, max_new_tokens=41, prompt_lookup_num_tokens=7, return_dict_in_generate=True
    )
    (statistics,) = mine.statistics
    assert mine.sequences[0].tolist() == [place % 8 for place in range(8)] + [place % 8 for place in range(44)]
    assert statistics.ceiling == 8
    assert max(statistics.step_sizes) == 8 == len(statistics.histogram)
    assert statistics.looked_up == statistics.lookup_accepted > 0
    assert statistics.forwards < 12
    assert statistics.proposed == []


def test_drafts_of_the_text_are_not_counted_as_the_heads():
    model = dynamo_of("llama")
    options = DecodingOptions(40, 3, prompt_lookup_num_tokens=5, tree=0)
    (sequence,) = decode(model, [PROMPT], options, seeds=[0])
    (without,) = decode(model, [PROMPT], DecodingOptions(40, 3, tree=0), seeds=[0])
    assert sequence.tokens == without.tokens
    assert sequence.statistics.looked_up > 0
    assert sum(sequence.statistics.proposed) < sum(without.statistics.proposed)
    accepted = sequence.statistics.lookup_accepted + sum(sequence.statistics.accepted)
    assert sequence.statistics.new_tokens == sequence.statistics.forwards + accepted


def test_a_draft_that_was_not_drawn_leaves_the_bases_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0], [0.5, 0.0, 0.0, 1.0]])
    expected = logits.double().softmax(-1)
    generator, draws = torch.Generator().manual_seed(0), 20_000
    first = np.zeros(4)
    second = np.zeros(4)
    for _ in range(draws):
        accepted, token, _, _ = accept_sampled(logits, [1], [certain(1)], generator)
        first[1 if accepted else token] += 1
        if accepted:
            second[token] += 1
    assert first / draws == pytest.approx(expected[0].numpy(), abs=0.02)
    assert second / second.sum() == pytest.approx(expected[1].numpy(), abs=0.03)


@pytest.mark.parametrize("verify", ["strict", 0.2])
def test_sampled_and_budgeted_text_is_of_its_length(verify):
    model = markov_dynamo(0.7 * cycle(8) + 0.3 / 8)  # leaves the circle now and then
    options = {"do_sample": True, "max_new_tokens": 60, "prompt_lookup_num_tokens": 4, "return_dict_in_generate": True}
    mine = model.generate(torch.arange(22)[None] % 8, verify=verify, seed=1, **options)
    assert mine.sequences.shape == (1, 82)
    (statistics,) = mine.statistics
    assert statistics.looked_up > statistics.lookup_accepted > 0
    assert statistics.regret <= (0 if verify == "strict" else verify * statistics.new_tokens)


def test_the_models_own_configuration_may_ask_for_it():
    model = dynamo_of("llama")
    model.generation_config = GenerationConfig(prompt_lookup_num_tokens=4)
    ids = torch.tensor([PROMPT])
    mine = model.generate(ids, do_sample=False, max_new_tokens=20, return_dict_in_generate=True)
    assert mine.statistics[0].looked_up > 0
    none = model.generate(ids, max_new_tokens=20, verify="off", return_dict_in_generate=True, seed=0)
    assert none.statistics[0].looked_up == 0  # under "off" nothing is verified
    assert none.statistics[0].ceiling == 3


@pytest.mark.parametrize("value", [-1, 64, True, 2.5])
def test_other_numbers_are_refused(value):
    with pytest.raises(InputError, match="prompt_lookup_num_tokens is"):
        dynamo_of("llama").generate(torch.tensor([PROMPT]), prompt_lookup_num_tokens=value)


def test_it_does_not_go_with_synthetic_acceptance():
    with pytest.raises(InputError, match="chains of drafts by heads"):
        DecodingOptions(4, 3, prompt_lookup_num_tokens=2, synthetic_acceptance=0.5)


def test_the_base_alone_takes_it():
    model = DynaMoForCausalLM.from_base(base_of("gpt2"), 1).eval()
    ids = torch.tensor([PROMPT])
    mine = model.generate(ids, do_sample=False, max_new_tokens=40, prompt_lookup_num_tokens=6)
    assert torch.equal(mine, model.base.generate(ids, do_sample=False, max_new_tokens=40))
    assert int(mine.max()) < VOCABULARY


def test_statistics_name_drafts_from_the_text():
    found = Statistics(8, looked_up=10, lookup_accepted=7)
    assert sentence(found).endswith("drafts accepted: from the text 70%")
    assert numbers(found)["looked_up"] == 10 and numbers(found)["lookup_accepted"] == 7
    assert "drafts accepted" not in sentence(Statistics(8))


def test_whole_numbers_of_numpy_are_whole_numbers():
    assert DecodingOptions(4, 1, prompt_lookup_num_tokens=np.int64(3)).ceiling == 4


def test_a_step_is_no_wider_than_what_the_kernels_multiply_in_one_order():
    """More rows go to torch's own product, which rounds otherwise."""
    model, ids = markov_dynamo(cycle(16), cycle(16)), torch.tensor([[*range(5, 15)] * 2])
    how = {"max_new_tokens": 100, "eos_token_id": None, "num_heads": 1}
    out = model.generate(ids, prompt_lookup_num_tokens=40, verify="strict", return_dict_in_generate=True, **how)
    assert torch.equal(out.sequences, model.generate(ids, **how))
    assert max(out.statistics[0].step_sizes) == MAX_ROWS
