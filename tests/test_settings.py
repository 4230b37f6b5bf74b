"""What a user asks becomes `DecodingOptions` by one set of rules; token ids and context limits are read in one place."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from architectures import VOCABULARY, dynamo_of
from transformers import GenerationConfig

from dynamo_lm.backbone.token_limits import UNLIMITED, context_limit, end_tokens, stated_context, token_ids
from dynamo_lm.decoding.settings import VERIFIED_ALPHA_C, algorithm_of, resolve
from dynamo_lm.errors import InputError
from dynamo_lm.sampling.options import Algorithm1

# --- settings -------------------------------------------------------------------


def test_the_first_source_that_states_a_setting_decides_it() -> None:
    model = dynamo_of("gpt_neox", 3)
    request, server = {"eps_b": 0.2, "num_heads": None}, SimpleNamespace(eps_b=0.9, num_heads=2, verify="off")
    own = GenerationConfig(eps_b=0.7, top_k=7)
    options = resolve(model, request, server, own, max_new_tokens=5)
    assert (options.verify, options.num_heads) == ("off", 2)
    assert (options.algorithm.eps_b, options.algorithm.top_k) == (0.2, 7)
    assert resolve(model, max_new_tokens=5).num_heads == 3


def test_without_a_word_off_is_the_papers_algorithm_and_strict_shapes_its_drafts() -> None:
    model = dynamo_of("gpt_neox", 3)
    off = resolve(model, {"verify": "off"}, max_new_tokens=5)
    assert off.algorithm == algorithm_of(model) == Algorithm1()
    assert off.sample and off.logits_processors == ()
    strict = resolve(model, max_new_tokens=5)
    assert strict.algorithm == Algorithm1(alpha_c=VERIFIED_ALPHA_C[0], top_k=VOCABULARY, temperature=1.0)
    assert resolve(model, max_new_tokens=5, sample=False).algorithm.top_k == 50
    assert strict.sample and strict.temperature == 1.0 and strict.logits_processors == ()


@pytest.mark.parametrize("verify", ["strict", 0.1, "off"])
def test_a_temperature_near_zero_is_greedy_and_leaves_the_rest_out(verify: str | float) -> None:
    options = resolve(
        dynamo_of("gpt_neox", 3), {"verify": verify, "temperature": 0.001, "top_k": 3, "top_p": 0.5}, max_new_tokens=5
    )
    assert not options.sample
    assert options.logits_processors == () and options.temperature == 1.0
    assert options.algorithm.temperature == (0.7 if verify == "off" else 1.0)


def test_verified_sampling_takes_the_processors_that_the_settings_ask_for() -> None:
    model = dynamo_of("gpt_neox", 3)
    asked = {"temperature": 0.5, "top_k": 2, "top_p": 1.0, "repetition_penalty": 4.0}
    options = resolve(model, asked, max_new_tokens=5)
    assert options.temperature == 0.5
    logits = torch.tensor([4.0, 3.0, 2.0, 1.0])
    for processor in options.logits_processors:
        logits = processor(0, torch.tensor([0]), logits)
    assert logits.tolist() == [-torch.inf, 6.0, 4.0, -torch.inf]  # 4 / penalty 4, all / 0.5, the two largest


# --- token ids ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "ids"),
    [
        (None, []),
        (7, [7]),
        (np.int64(7), [7]),
        (torch.tensor(7), [7]),
        (torch.tensor([7, 0, 7]), [7, 0]),
        (np.array([7, 0]), [7, 0]),
        ([np.int64(7), torch.tensor(0), None], [7, 0]),
        ((7, 0), [7, 0]),
    ],
)
def test_token_ids_of_every_form_that_transformers_takes(value: object, ids: list[int]) -> None:
    assert token_ids(value) == ids
    assert all(type(token) is int for token in token_ids(value))


@pytest.mark.parametrize("value", ["7", 1.5, [True], torch.tensor([[7]]), torch.tensor(1.5)])
def test_what_is_no_token_id_is_refused(value: object) -> None:
    with pytest.raises(InputError, match="token ids are"):
        token_ids(value)


def test_end_tokens_are_the_models_else_the_tokenizers() -> None:
    tokenizer = SimpleNamespace(eos_token_id=5)
    assert end_tokens(GenerationConfig(eos_token_id=[3, 4]), tokenizer) == [3, 4]
    assert end_tokens(GenerationConfig(), tokenizer) == [5]
    assert end_tokens(GenerationConfig(), SimpleNamespace(eos_token_id=None)) == []


@pytest.mark.parametrize("in_config", [True, False])
@pytest.mark.parametrize("form", [np.int64, torch.tensor, lambda token: torch.tensor([token, 96]), lambda token: [token]])
def test_generate_ends_at_an_end_token_of_every_form(form, in_config) -> None:
    model, prompt = dynamo_of("gpt_neox", 3), torch.tensor([[1, 2, 3]])
    common = {"max_new_tokens": 12, "do_sample": False}
    free = model.generate(prompt, **common, eos_token_id=None)[0].tolist()
    end = free[6]
    ids = {"eos_token_id": form(end), "pad_token_id": np.int64(0), "bos_token_id": torch.tensor(1)}
    given = {"generation_config": GenerationConfig(**common, **ids)} if in_config else common | ids
    assert model.generate(prompt, **given)[0].tolist() == free[: free.index(end, 3) + 1]


# --- context --------------------------------------------------------------------


def test_the_context_is_what_the_configuration_states_else_unlimited() -> None:
    config = dynamo_of("gpt_neox", 2).config
    assert context_limit(config) == stated_context(config) == config.max_context == 128
    silent = SimpleNamespace(get_text_config=lambda: SimpleNamespace())
    assert stated_context(silent) is None
    assert context_limit(silent) == UNLIMITED
