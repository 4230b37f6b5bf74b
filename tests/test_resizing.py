"""A vocabulary that was resized: the heads follow, and what is saved opens; else saving is refused in one sentence."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from architectures import dynamo_of, random_tokens
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dynamo_lm import DynaMoForCausalLM, InputError
from dynamo_lm.cooccurrence.counting import count
from dynamo_lm.kernels.quantized import quantize_modules
from dynamo_lm.model.configuration import MEDUSA

OLD = 97
TOKENS = random_tokens(2, 9) % 80
KINDS = {
    "layers": {},
    "own output embeddings": {"own_output_embedding": True},
    "medusa": MEDUSA,
    "adapters": {"adapter_rank": 2, "own_output_embedding": True},
    "a coupling": {"coupling_rank": 4},
    "eagle3": {"head": "eagle3"},
    "eagle3, draft vocabulary": {"head": "eagle3", "draft_vocab_size": 32},
}


def model_with(kind: str, *, tied: bool = False) -> DynaMoForCausalLM:
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=OLD,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=7 if kind.startswith("eagle3") else 2,
            num_attention_heads=4,
            tie_word_embeddings=tied,
            eos_token_id=None,
        )
    ).eval()
    model = DynaMoForCausalLM.from_base(base, num_heads=3, **KINDS[kind]).eval()
    for parameter in [*model.heads.parameters(), *(model.coupling.parameters() if model.coupling else ())]:
        if id(parameter) not in {id(p) for p in base.parameters()}:
            parameter.data += 0.1 * torch.randn_like(parameter)  # as after training: no head is like the base
    return model


@pytest.mark.parametrize(
    ("kind", "tied", "size"),
    [(kind, tied, size) for kind in KINDS for tied, size in ((True, 103), (False, 85))]
    + [("own output embeddings", False, 103), ("own output embeddings", True, 85)],
)
@torch.no_grad()
def test_a_resized_model_is_saved_and_opens_as_it_was(kind, tied, size, tmp_path):
    model = model_with(kind, tied=tied)
    before = copy.deepcopy(model)
    model.resize_token_embeddings(size)
    model.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)

    assert opened.config.vocab_size == opened.base.get_output_embeddings().weight.shape[0] == size
    assert opened.base.config.tie_word_embeddings == tied
    assert torch.equal(opened.logits(TOKENS), model.logits(TOKENS))
    kept = min(size, OLD)
    torch.testing.assert_close(opened.logits(TOKENS)[..., :kept], before.logits(TOKENS)[..., :kept])
    text = opened.generate(TOKENS[:1], max_new_tokens=4, do_sample=False)
    assert text.equal(opened.base.generate(TOKENS[:1], max_new_tokens=4, do_sample=False))


@torch.no_grad()
def test_a_new_token_is_read_by_own_output_embeddings_as_the_base_reads_it_and_has_no_coupling():
    model = model_with("own output embeddings")
    model.resize_token_embeddings(OLD + 3)
    for head in model.heads:
        assert torch.equal(head.output.weight[OLD:], model.base.lm_head.weight[OLD:])
        assert head.output.weight.requires_grad
    model = model_with("a coupling")
    model.resize_token_embeddings(OLD + 3)
    assert not model.coupling.tokens[OLD:].any()


def test_a_rounded_model_is_not_resized():
    model = dynamo_of("llama", 3)
    quantize_modules(model, 8)
    with pytest.raises(InputError, match="8 or 4 bits and cannot be resized"):
        model.resize_token_embeddings(128)


def test_tables_of_a_smaller_vocabulary_stay_and_of_a_larger_one_are_refused_before_anything_is_resized(tmp_path):
    model = model_with("layers")
    model.cooccurrence = count([np.random.default_rng(0).integers(0, OLD, 500)], vocab_size=OLD, order=3)
    with pytest.raises(InputError, match=f"count {OLD} tokens and cannot be cut to 90"):
        model.resize_token_embeddings(90)
    assert model.config.vocab_size == OLD
    model.resize_token_embeddings(OLD + 8)
    model.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert opened.cooccurrence.vocab_size == OLD
    for how in ({"do_sample": False}, {"verify": "off", "seed": 1, "top_k": 8}):
        assert opened.generate(TOKENS, max_new_tokens=8, **how).equal(model.generate(TOKENS, max_new_tokens=8, **how))


def test_a_draft_vocabulary_beyond_the_new_size_is_refused():
    model = model_with("eagle3, draft vocabulary")
    model.sequential_head.set_draft_vocabulary(torch.arange(OLD - 32, OLD), model.output_weight().detach())
    with pytest.raises(InputError, match="drafts token 96, which a vocabulary of 90 does not have"):
        model.resize_token_embeddings(90)


@pytest.mark.parametrize("kind", ["own output embeddings", "a coupling", "eagle3, draft vocabulary"])
def test_a_base_that_was_resized_alone_is_not_saved_until_the_heads_are(kind, tmp_path):
    model = model_with(kind)
    model.base.resize_token_embeddings(101)
    with pytest.raises(InputError, match=r"resize_token_embeddings\(101\) of the model, not of its base"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    model.resize_token_embeddings(101)
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "model").logits(TOKENS), model.logits(TOKENS))


def test_heads_alone_do_not_fit_a_base_that_was_resized(tmp_path):
    model = model_with("layers")
    model.base.save_pretrained(tmp_path / "base")
    model = DynaMoForCausalLM.from_base(str(tmp_path / "base"), num_heads=3)
    model.resize_token_embeddings(101)
    with pytest.raises(InputError, match=r'changed by training, by resizing its vocabulary.*weights="full"'):
        model.save_pretrained(tmp_path / "model", weights="heads")
