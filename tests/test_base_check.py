"""A base's contract: bases whose code ignores masks, positions or the cache are refused, the supported ones pass."""

from __future__ import annotations

import pytest
import torch
from architectures import NAMES, base_of
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    BartConfig,
    BartForCausalLM,
    BloomConfig,
    GPTNeoConfig,
    LlamaConfig,
    MambaConfig,
    MptConfig,
    RoFormerConfig,
    RwkvConfig,
    TrOCRConfig,
)

from dynamo_lm import DynaMoConfig, DynaMoForCausalLM, InputError
from dynamo_lm.backbone.tiny_base import sharpen, tiny_base
from dynamo_lm.model import base_check
from dynamo_lm.model.base_check import can_run_stacked, check_contract, first_fault

BART = {"d_model": 32, "decoder_layers": 3, "encoder_layers": 3, "decoder_ffn_dim": 48, "decoder_attention_heads": 4}
SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
GEMMA3N = {"vocab_size": 512, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
GEMMA3N |= {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "intermediate_size": [96] * 4,
}
GEMMA3N |= {"num_kv_shared_layers": 0, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4}
GEMMA3N |= {"vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 16, "pad_token_id": 0}
REFUSED = {
    "gpt_neo": (
        GPTNeoConfig(vocab_size=97, hidden_size=32, num_layers=4, num_heads=4, attention_types=[[["global", "local"], 2]]),
        "different lengths",
    ),
    "mpt": (MptConfig(vocab_size=97, d_model=32, n_layers=3, n_heads=4), "tree"),
    "roformer": (RoFormerConfig(**SIZES, intermediate_size=48, is_decoder=True), "different lengths"),
    "trocr": (TrOCRConfig(vocab_size=97, **BART), "different lengths"),
    "rwkv": (RwkvConfig(vocab_size=97, hidden_size=32, num_hidden_layers=3, attention_hidden_size=32), "the past"),
    "bloom": (BloomConfig(vocab_size=97, hidden_size=32, n_layer=3, n_head=4), "ready-made mask"),
}


@pytest.fixture(autouse=True)
def nothing_is_remembered(monkeypatch, tmp_path):
    monkeypatch.setattr(base_check, "_results", {})
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("name", REFUSED)
def test_a_base_that_ignores_what_it_is_handed_is_refused_with_the_reason(name):
    config, reason = REFUSED[name]
    base = AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError, match=rf"{type(base).__name__} cannot carry heads: .*{reason}"):
        DynaMoForCausalLM.from_base(base)


def test_a_decoder_that_was_part_of_an_encoder_decoder_is_refused():
    config = BartConfig(vocab_size=97, encoder_ffn_dim=48, encoder_attention_heads=4, max_position_embeddings=64, **BART)
    with pytest.raises(InputError, match="different lengths"):
        DynaMoForCausalLM.from_base(BartForCausalLM(config))


@pytest.mark.parametrize("name", NAMES)
def test_the_supported_architectures_keep_the_contract(name):
    base = base_of(name)
    check_contract(base, DynaMoForCausalLM)
    tiny = tiny_base(type(base), base.config)
    model = DynaMoForCausalLM(DynaMoConfig(tiny.config, 2, init="copy"), tiny)
    assert first_fault(model) == "" and can_run_stacked(model)


def test_layers_that_are_not_attention_are_refused_when_heads_are_added():
    config = LlamaConfig(**SIZES, layer_types=["full_attention", "linear_attention", "full_attention"])
    with pytest.raises(InputError, match='"linear_attention"'):
        DynaMoForCausalLM.from_base(AutoModelForCausalLM.from_config(config))


def test_a_model_with_such_a_base_is_refused_when_it_is_opened(tmp_path, monkeypatch):
    base = AutoModelForCausalLM.from_config(REFUSED["mpt"][0])
    DynaMoForCausalLM(DynaMoConfig(base.config, 2), base).save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="MptForCausalLM cannot carry heads"):
        DynaMoForCausalLM.from_pretrained(tmp_path / "model")


def test_a_base_of_one_configuration_is_checked_once(monkeypatch):
    calls = []
    monkeypatch.setattr(base_check, "first_fault", lambda model: calls.append(model) or "")
    for _ in range(2):
        DynaMoForCausalLM.from_base(base_of("llama"))
    assert len(calls) == 1
    monkeypatch.setattr(base_check, "_results", {})  # as in another process
    DynaMoForCausalLM.from_base(base_of("llama"))
    assert len(calls) == 1
    DynaMoForCausalLM.from_base(base_of("mistral"))
    assert len(calls) == 2


@pytest.mark.parametrize("narrow", [True, False])
def test_a_tiny_base_of_a_large_one_is_small_and_leaves_the_random_numbers_alone(narrow):
    with torch.device("meta"):
        large = AutoModelForCausalLM.from_config(
            LlamaConfig(vocab_size=1000, hidden_size=512, num_attention_heads=8, num_hidden_layers=40)
        )
    state = torch.random.get_rng_state()
    tiny = tiny_base(type(large), large.config, narrow=narrow)
    assert torch.equal(state, torch.random.get_rng_state())
    assert tiny.config.num_hidden_layers == 3
    assert (tiny.num_parameters() < 1e6) == narrow
    assert large.config.num_hidden_layers == 40


def test_a_base_that_cannot_be_made_smaller_is_checked_itself(monkeypatch):
    def refuse(*args, **options):
        raise ValueError("such a configuration makes no sense")

    monkeypatch.setattr(base_check, "tiny_base", refuse)
    DynaMoForCausalLM.from_base(base_of("llama"))
    base = AutoModelForCausalLM.from_config(REFUSED["roformer"][0]).eval()
    sharpen(base)
    with pytest.raises(InputError, match="different lengths"):
        DynaMoForCausalLM.from_base(base)


def test_state_space_models_are_refused_with_a_sentence():
    base = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=3))
    with pytest.raises(InputError, match="linear_attention"):
        DynaMoForCausalLM.from_base(base)


@pytest.mark.parametrize("kind", ["apertus", "llama4_text", "starcoder2", "xglm"])
@torch.no_grad()
def test_further_architectures_that_people_use_carry_heads(kind):
    config = CONFIG_MAPPING[kind](**{"num_local_experts": 4} if kind == "llama4_text" else {})
    base = tiny_base(AutoModelForCausalLM._model_mapping[type(config)], config)
    model = DynaMoForCausalLM.from_base(base, init="copy").eval()
    ids = torch.tensor([[1, 1, 1, 7, 8, 9], [5, 6, 7, 8, 9, 10]])
    inputs = {"inputs": ids, "attention_mask": (ids != 1).long(), "max_new_tokens": 16, "do_sample": False}
    inputs |= {"pad_token_id": 1, "eos_token_id": None}
    assert torch.equal(model.generate(**inputs), base.generate(**inputs))
    # Llama 4's experts get the tokens of all heads in another order; XGLM wants a mask for every row.
    assert model.stack_heads == (kind not in ("llama4_text", "xglm"))


@pytest.mark.parametrize("kind", ["gpt_bigcode", "cpmant", "openai-gpt", "gemma3n_text"])
def test_what_does_not_carry_heads_is_refused_when_they_are_added(kind):
    config = CONFIG_MAPPING[kind](**GEMMA3N if kind == "gemma3n_text" else {})
    base = tiny_base(AutoModelForCausalLM._model_mapping[type(config)], config)
    with pytest.raises(
        InputError, match="4 hidden states of every token" if kind == "gemma3n_text" else "cannot carry heads"
    ):
        DynaMoForCausalLM.from_base(base)
