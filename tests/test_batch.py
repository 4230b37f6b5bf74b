"""Rows that join and leave a running batch, with options of their own, against the same rows decoded alone."""

import gc
import itertools
import weakref

import pytest
import torch
from architectures import dynamo_of, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from test_eagle3 import eagle

from dynamo_lm.cooccurrence.counting import count
from dynamo_lm.decoding.batch import Batch, decode
from dynamo_lm.decoding.draft_length import BatchDraftLength
from dynamo_lm.decoding.options import DecodingOptions
from dynamo_lm.errors import InputError
from dynamo_lm.sampling.options import Algorithm1

ENDS = frozenset([7])
PAPER = Algorithm1(top_k=12, eps_b=0.1)


def model_with_table():
    model = dynamo_of("llama")
    model.cooccurrence = count(random_tokens(40, 30, seed=5).tolist(), vocab_size=97, order=3)
    return model


MODEL = model_with_table()
WAYS = (
    {"verify": "strict"},  # the batch decides how many drafts it carries
    {"verify": "strict", "tree": 0},
    {"verify": "strict", "tree": 5},
    {"verify": "strict", "sample": True},
    {"verify": 0.3, "tree": 0},
    {"verify": "off", "sample": True, "algorithm": PAPER},
    {"verify": "off", "algorithm": PAPER, "logprobs": 2},
    {"verify": "strict", "tree": 0, "logprobs": 3, "prompt_logprobs": True},
)
requests = st.lists(
    st.tuples(
        st.integers(0, 6),  # the step before which it joins
        st.integers(1, 9),  # tokens of its prompt
        st.integers(1, 14),  # new tokens
        st.integers(1, 3),  # heads
        st.sampled_from(WAYS),
        st.none() | st.integers(1, 4),  # the step after which it hangs up
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=40, deadline=None)
@given(requests, st.integers(0, 99))
def test_rows_that_come_and_go_write_what_they_write_alone(asked, seed):
    batch, rows, steps = Batch(MODEL, 3), {}, dict.fromkeys(range(len(asked)), 0)
    made = [
        (
            random_tokens(1, length, seed=seed + r)[0].tolist(),
            DecodingOptions(new, heads, end_tokens=ENDS, **way),
        )
        for r, (_, length, new, heads, way, _) in enumerate(asked)
    ]
    for now in range(40):
        for r, request in enumerate(asked):
            if request[0] == now:
                rows[r] = batch.join(*made[r], seed=seed + r, number=r)
        for row in batch.step():
            steps[row.number] += 1
            if steps[row.number] == asked[row.number][5]:
                batch.leave(row)
    assert batch.running == []
    for r, (prompt, options) in enumerate(made):
        alone = decode(MODEL, [prompt], options, seeds=[seed + r])[0]
        hung_up = asked[r][5] is not None and rows[r].finished is None
        if hung_up:
            assert alone.tokens[: len(rows[r].tokens)] == rows[r].tokens
            continue
        assert rows[r].tokens == alone.tokens
        assert rows[r].finished == alone.finished
        if asked[r][4] != {"verify": "strict"}:
            assert rows[r].statistics.step_sizes == alone.statistics.step_sizes
        for mine, theirs in zip(rows[r].scores, alone.scores, strict=True):
            assert mine.log_prob == pytest.approx(theirs.log_prob, abs=1e-4)


@torch.no_grad()
def base_scores(tokens):
    return MODEL(torch.tensor([tokens])).logits[0].log_softmax(-1)  # (length, vocabulary)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(WAYS), st.integers(1, 12), st.integers(0, 99), st.booleans())
def test_scores_are_the_base_models_own_of_every_token(way, new, seed, prompt_too):
    prompt = random_tokens(1, 5, seed=seed)[0].tolist()
    options = DecodingOptions(new, 3, **{**way, "logprobs": 4, "prompt_logprobs": prompt_too}, end_tokens=ENDS)
    row = decode(MODEL, [prompt], options, seeds=[seed])[0]
    expected = base_scores(row.tokens)
    assert len(row.scores) == len(row.new_tokens)
    scored = [(len(prompt) + at, score) for at, score in enumerate(row.scores)]
    if prompt_too:
        assert row.prompt_scores[0] is None and len(row.prompt_scores) == len(prompt)
        scored += list(enumerate(row.prompt_scores))[1:]
    else:
        assert row.prompt_scores == []
    for at, score in scored:
        line = expected[at - 1]
        assert score.log_prob == pytest.approx(line[row.tokens[at]].item(), abs=1e-4)
        assert [value for _, value in score.top] == pytest.approx(line.topk(4).values.tolist(), abs=1e-4)
        assert [line[token].item() for token, _ in score.top] == pytest.approx([value for _, value in score.top], abs=1e-4)


def test_a_prompt_may_be_scored_and_nothing_written():
    prompt = random_tokens(1, 6)[0].tolist()
    row = decode(MODEL, [prompt], DecodingOptions(0, 3, logprobs=0, prompt_logprobs=True), seeds=[0])[0]
    assert row.tokens == prompt and row.finished == "length" and row.statistics.forwards == 1
    assert len(row.prompt_scores) == 6 and all(score.top == [] for score in row.prompt_scores[1:])


def test_why_a_row_ends():
    prompt = random_tokens(1, 6)[0].tolist()
    row = decode(MODEL, [prompt], DecodingOptions(9, 3, tree=0), seeds=[0])[0]
    assert row.finished == "length" and len(row.new_tokens) == 9
    third = row.new_tokens[2]
    row = decode(MODEL, [prompt], DecodingOptions(9, 3, tree=0, end_tokens=frozenset([third])), seeds=[0])[0]
    assert row.finished == "stop" and row.tokens[-1] == third


def test_a_row_that_is_refused_leaves_the_batch_as_it_was():
    batch = Batch(MODEL, 2)
    row = batch.join([1, 2], DecodingOptions(4, 2), seed=0)
    for prompt, options, said in (
        ([], DecodingOptions(4, 2), "prompt is empty"),
        ([1, 97], DecodingOptions(4, 2), "has token 97"),
        ([1], DecodingOptions(4, 3), "this batch was made for 2"),
        (
            [1],
            DecodingOptions(4, 2, verify="off", logits_processors=(lambda row, tokens, logits: logits,)),
            "Logits processors do not apply",
        ),
    ):
        with pytest.raises(InputError, match=said):
            batch.join(prompt, options, seed=0)
    assert batch.running == [row]
    batch.leave(row)
    assert batch.running == [] and batch.step() == []


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"prompt_logprobs": True}, "goes with logprobs"),
    ],
)
def test_options_that_contradict_themselves_are_refused(wrong, said):
    with pytest.raises(InputError, match=said):
        DecodingOptions(**{"max_new_tokens": 4, "num_heads": 2, **wrong})


def test_keys_and_values_are_given_back_when_a_text_ends_without_waiting_for_the_garbage_collector():
    model = dynamo_of("llama", 3)
    held: list[weakref.ref] = []
    gc.disable()
    try:
        batch = Batch(model, 3)
        for length in (3, 9):
            batch.join(list(range(1, 5)), DecodingOptions(length, 3), seed=0)
        batch.step()
        batch.join(list(range(1, 5)), DecodingOptions(6, 3), seed=0)
        while batch.running:
            batch.step()
            if batch._cache is not None:
                held += [weakref.ref(layer.keys) for layer in batch._cache.layers]
        assert held and not any(each() is not None for each in held)
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["llama", "eagle3"])
def test_a_batch_that_changes_its_number_of_drafts_writes_the_same(kind, monkeypatch):
    model = MODEL if kind == "llama" else eagle()
    if kind == "eagle3":
        model.base.lm_head.weight.data.mul_(20)  # some tokens are likely now, so that the head drafts
    prompts = (random_tokens(3, 6, seed=2) % 60).tolist()
    fixed = decode(model, prompts, DecodingOptions(30, 3, tree=0), seeds=[0, 1, 2])
    wanted = itertools.cycle([2, 0, 1, 1, 0, 2])
    monkeypatch.setattr(BatchDraftLength, "choose", lambda self, sequences: next(wanted))
    changing = decode(model, prompts, DecodingOptions(30, 3, prompt_lookup_num_tokens=2), seeds=[0, 1, 2])
    assert [each.tokens for each in changing] == [each.tokens for each in fixed]
    assert sum(sum(each.statistics.proposed) for each in changing) < sum(sum(each.statistics.proposed) for each in fixed)


def test_a_sampled_text_keeps_its_drafts_beside_texts_that_do_without(monkeypatch):
    monkeypatch.setattr(BatchDraftLength, "choose", lambda self, sequences: 0)
    prompts = random_tokens(3, 6, seed=4).tolist()
    sampled = DecodingOptions(12, 3, sample=True)
    alone = decode(MODEL, prompts[2:], sampled, seeds=[5])[0]
    batch = Batch(MODEL, 3)
    for prompt in prompts[:2]:
        batch.join(prompt, DecodingOptions(20, 3), seed=0)
    for _ in range(3):
        batch.step()
    beside = batch.join(prompts[2], sampled, seed=5)
    while batch.running:
        batch.step()
    assert beside.tokens == alone.tokens and beside.statistics.step_sizes == alone.statistics.step_sizes


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=3, max_size=3), st.lists(st.floats(0.05, 2), min_size=3, max_size=3))
def test_the_number_of_drafts_is_that_with_the_most_tokens_a_second(chances, more):
    """Against the plain maximum; drafts at place i are accepted for a share of the sequences, and cost more each."""
    length, sequences, choices = BatchDraftLength(3), 48, []
    shares = [round(sequences * share) for share in itertools.accumulate(chances, lambda before, chance: before * chance)]
    times = list(itertools.accumulate(more, initial=1.0))
    tokens = [1.0, *(1 + sum(shares[:drafts]) / sequences for drafts in range(1, 4))]
    for _ in range(60):
        choices.append(drafts := length.choose(sequences))
        accepted = [sum(place < share for share in shares[:drafts]) for place in range(sequences)]
        length.record(drafts, times[drafts], [drafts] * sequences, accepted)
    rates = [a / b for a, b in zip(tokens, times, strict=True)]
    assert set(choices[:12]) == {0, 1, 2, 3}  # each is tried
    assert all(rates[drafts] == pytest.approx(max(rates), rel=1e-6) for drafts in choices[12:])
