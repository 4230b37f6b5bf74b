"""Drafts from the commonest tokens of the counted text: what is on the list, and that it changes no verified text."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from architectures import VOCABULARY, dynamo_of, random_tokens

from dynamo_lm.cooccurrence.counting import count
from dynamo_lm.decoding import draft_vocabulary
from dynamo_lm.decoding.batch import Batch, decode
from dynamo_lm.decoding.draft_vocabulary import draft_vocabulary_of
from dynamo_lm.decoding.options import DecodingOptions
from dynamo_lm.sampling.options import Algorithm1

K = 3  # candidates


@pytest.fixture
def model(monkeypatch):
    """Counted text in which the lower third of the vocabulary is most of all tokens; lists of 4 tokens and up."""
    monkeypatch.setattr(draft_vocabulary, "LEAST", 4)
    monkeypatch.setattr(draft_vocabulary, "COVERED", 0.9)
    made = dynamo_of("llama", 3)
    draw = np.random.default_rng(0)
    text = np.where(draw.random(4000) < 0.95, draw.integers(0, VOCABULARY // 3, 4000), draw.integers(0, VOCABULARY, 4000))
    made.cooccurrence = count([text], vocab_size=VOCABULARY, order=3, description="skewed")
    yield made
    made.cooccurrence = None
    made.runtime.draft_vocabulary = None


def options(**changes) -> DecodingOptions:
    return DecodingOptions(20, 3, algorithm=Algorithm1(top_k=K, alpha_c=changes.pop("alpha_c", 0.5)), **changes)


def test_a_list_covers_what_it_should_and_reads_what_the_model_reads(model):
    twin = model.optimize_for_inference(3)
    listed = draft_vocabulary_of(twin)
    counts = model.cooccurrence.counts[0].numpy()
    assert (np.diff(listed.ids) > 0).all()
    others = np.setdiff1d(np.arange(VOCABULARY), listed.ids)
    assert counts[listed.ids].sum() >= 0.9 * counts.sum() and counts[listed.ids].min() >= counts[others].max()
    assert counts[listed.ids].sum() - counts[listed.ids].min() < 0.9 * counts.sum()  # none too many
    states = torch.randn(2, 3, 32)
    with torch.inference_mode():
        torch.testing.assert_close(listed.output(states), twin.readout(states)[..., listed.ids])


def test_rows_of_a_coupling_are_those_that_it_computes(model):
    coupled = dynamo_of("llama", 3, coupling_rank=4)
    coupled.cooccurrence = model.cooccurrence
    with torch.no_grad():
        for up in coupled.coupling.ups:
            up.normal_()
    twin = coupled.optimize_for_inference(3)
    listed = draft_vocabulary_of(twin)
    assert draft_vocabulary_of(coupled.optimize_for_inference(2)) is listed
    hidden, weights = torch.randn(2, 5, 32), [twin.output_weight(head) for head in (2, 3)]
    ids = torch.from_numpy(listed.ids)
    rows, gates = twin.coupling.low_rank_factors(hidden, ids.expand(2, 5, -1), weights)
    torch.testing.assert_close(listed.rows.float(), rows[:, 0], rtol=2**-7, atol=1e-6)
    assert torch.equal(twin.coupling.gates_of(hidden), gates)
    with torch.no_grad():
        coupled.coupling.ups[1].mul_(2)
    again = draft_vocabulary_of(coupled.optimize_for_inference(3))
    assert torch.equal(again.rows[0], listed.rows[0]) and torch.equal(again.rows[1], 2 * listed.rows[1])


def test_it_is_made_once_and_again_when_weights_or_table_change(model):
    first = draft_vocabulary_of(model.optimize_for_inference(3))
    assert draft_vocabulary_of(model.optimize_for_inference(2)) is first
    weight = model.base.get_output_embeddings().weight
    with torch.no_grad():
        weight.mul_(1.0)
    second = draft_vocabulary_of(model.optimize_for_inference(3))
    assert second is not first and torch.equal(second.output.weight, weight[second.ids])
    model.cooccurrence = count([np.arange(VOCABULARY)], vocab_size=VOCABULARY, order=2)
    assert draft_vocabulary_of(model.optimize_for_inference(3)) is None  # half of the vocabulary would not cover it


@pytest.mark.parametrize("how", [{"tree": 0}, {"tree": 7}, {}])
def test_greedy_text_is_the_bases(model, how):
    prompts = random_tokens(4, 6, seed=3).tolist()
    alone = [decode(model, [prompt], DecodingOptions(20, 1), seeds=[0])[0].tokens for prompt in prompts]
    model.runtime.draft_vocabulary = None
    assert [row.tokens for row in decode(model, prompts, options(**how), seeds=range(4))] == alone
    assert model.runtime.draft_vocabulary[-1] is not None


def test_a_sampled_row_is_the_same_alone_and_beside_rows_that_need_all_tokens(model):
    prompts = random_tokens(3, 6, seed=5).tolist()
    ways = [options(sample=True), options(sample=True, verify="off"), options(sample=True, alpha_c=0.0)]
    batch = Batch(model, 3)
    rows = [batch.join(prompt, way, seed=seed) for seed, (prompt, way) in enumerate(zip(prompts, ways, strict=True))]
    while batch.running:
        batch.step()
    for seed, (prompt, way, row) in enumerate(zip(prompts, ways, rows, strict=True)):
        assert decode(model, [prompt], way, seeds=[seed])[0].tokens == row.tokens


def test_more_candidates_than_the_list_has_are_taken_from_all_tokens(model):
    prompt = random_tokens(1, 6).tolist()
    wide = DecodingOptions(10, 3, algorithm=Algorithm1(top_k=60, alpha_c=0.5))
    assert len(draft_vocabulary_of(model.optimize_for_inference(3)).ids) < 60
    assert (
        decode(model, prompt, wide, seeds=[0])[0].tokens
        == decode(model, prompt, DecodingOptions(10, 1), seeds=[0])[0].tokens
    )
