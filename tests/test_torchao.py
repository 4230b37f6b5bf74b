"""A base that transformers quantises while it opens it carries heads: they are plain, and texts are the base's own."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, TorchAoConfig

from dynamo_lm import DynaMoForCausalLM
from dynamo_lm.errors import InputError
from dynamo_lm.kernels.linear import unpacked

# Not installed with the tests: transformers imports it wherever it is, which takes seconds in every process.
torchao = pytest.importorskip("torchao.quantization", reason="needs torchao (pip install torchao)")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=8, num_attention_heads=4,
        tie_word_embeddings=False,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "base")
    return tmp_path


def quantised() -> TorchAoConfig:
    return TorchAoConfig(torchao.Int8WeightOnlyConfig())


@pytest.mark.parametrize("head", ["parallel", "eagle3"])
def test_heads_of_the_plain_base_serve_the_quantised_one(folder, head, caplog):
    base = str(folder / "base")
    DynaMoForCausalLM.from_base(base, 3, head=head).save_pretrained(str(folder / "heads"), weights="heads")
    with caplog.at_level(logging.WARNING):
        model = DynaMoForCausalLM.from_pretrained(str(folder / "heads"), base=base, quantization_config=quantised()).eval()
    assert "are used with another" in caplog.text
    weights = [type(parameter) for part in (model.base, model.heads) for parameter in part.parameters()]
    assert not all(kind is torch.nn.Parameter for kind in weights)
    assert all(type(parameter) is torch.nn.Parameter for parameter in model.heads.parameters())
    prompt = torch.tensor([[5, 7, 11, 13]])
    own = model.base.generate(prompt, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
    for heads in (1, 3):
        assert torch.equal(model.generate(prompt, num_heads=heads, max_new_tokens=24, eos_token_id=None), own)


@pytest.mark.parametrize("head", ["parallel", "eagle3"])
def test_heads_are_made_of_a_quantised_base_and_found_again(folder, head):
    base = str(folder / "base")
    loaded = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantised())
    model = DynaMoForCausalLM.from_base(loaded, 2, head=head)
    model.save_pretrained(str(folder / "heads"), weights="heads")
    again = DynaMoForCausalLM.from_pretrained(str(folder / "heads"), base=base, quantization_config=quantised())
    for one, other in zip(model.heads.parameters(), again.heads.parameters(), strict=True):
        assert torch.equal(one, other)


def test_weights_of_an_unknown_kind_are_refused_in_one_sentence():
    class Strange(torch.Tensor):
        pass

    with pytest.raises(InputError, match="of the kind Strange, which heads cannot read"):
        unpacked(torch.zeros(2, 2, dtype=torch.uint8).as_subclass(Strange))
