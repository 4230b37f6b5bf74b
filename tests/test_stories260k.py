"""A real model that nobody here trained: karpathy's stories260K, a Llama of 260,032 parameters."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from llama2c import BOS, Pieces, load_model

from dynamo_lm import DynaMoForCausalLM
from dynamo_lm.cooccurrence.counting import count

DATA = Path(os.environ.get("DYNAMO_DATA", Path(__file__).parent.parent / "../shared/data"))
FOLDER, STORIES = DATA / "models/stories260K", DATA / "stories/tinystories.jsonl"

pytestmark = pytest.mark.skipif(
    not (FOLDER.is_dir() and STORIES.is_file()),
    reason=f"{FOLDER} or {STORIES} is missing; DYNAMO_DATA names their folder",
)


@pytest.fixture(scope="module")
def base():
    return load_model(FOLDER / "checkpoint_legacy.bin")


@pytest.fixture(scope="module")
def pieces():
    return Pieces(FOLDER / "tokenizer.bin")


@pytest.fixture(scope="module")
def stories() -> list[str]:
    with STORIES.open() as lines:
        return [json.loads(line)["text"] for line, _ in zip(lines, range(250), strict=False)]


@pytest.fixture(scope="module")
def model(base, pieces, stories):
    """Two copied heads beside the base's own, and a table counted on the stories that are not prompts."""
    model = DynaMoForCausalLM.from_base(base, num_heads=3, init="copy").eval()
    tokens = [np.array(pieces.encode(story[:300])) for story in stories[100:]]
    model.cooccurrence = count(tokens, vocab_size=512, order=3)
    return model


def test_the_tokenizer_merges_and_comes_back(pieces):
    text = "Once upon a time, there was a café."
    tokens = pieces.encode(text)
    assert tokens[0] == BOS
    assert len(tokens) < len(text) / 1.8
    assert pieces.decode(tokens) == text
    assert [pieces.pieces[token] for token in pieces.encode("the")[1:]] == [b" the"]


def test_the_converted_model_knows_its_stories(base, pieces, stories):
    assert sum(p.numel() for p in base.parameters()) == 260_032
    losses = []
    for story in stories[:10]:
        tokens = torch.tensor([pieces.encode(story.strip())[:256]])
        with torch.no_grad():
            losses.append(base(tokens, labels=tokens).loss.item())
    assert np.mean(losses) < 1.6  # nats per token; 6.2 is chance, and a wrong rotary layout gives 3


def test_it_tells_a_story(base, pieces):
    out = base.generate(torch.tensor([[BOS]]), max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert pieces.decode(out[0].tolist()).startswith("Once upon a time, there was a little girl named L")


def test_strict_greedy_is_transformers_own_greedy_for_a_hundred_prompts(base, model, pieces, stories):
    prompts = [pieces.encode(story.strip()[:80])[: 4 + i % 9] for i, story in enumerate(stories[:100])]
    width = max(map(len, prompts))
    ids, mask = torch.zeros(2, len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = torch.tensor(prompt), 1

    ask = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": BOS}
    expected = base.generate(ids, attention_mask=mask, **ask)
    freely = model.generate(ids, attention_mask=mask, **ask)  # a batch of a hundred may do without drafts
    result = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, tree=0, **ask)
    assert torch.equal(result.sequences, expected) and torch.equal(freely, expected)

    steps, tokens = (sum(getattr(s, name) for s in result.statistics) for name in ("forwards", "new_tokens"))
    assert tokens == 2400
    assert tokens / steps > 1.05  # even copied heads find some, with the table's help


def test_strict_greedy_is_the_same_for_a_long_story_alone(base, model, pieces):
    prompt = torch.tensor([pieces.encode("One day, a little dog")])
    ask = {"max_new_tokens": 120, "do_sample": False, "pad_token_id": 0, "eos_token_id": BOS}
    assert torch.equal(model.generate(prompt, **ask), base.generate(prompt, **ask))
