"""The model (method.md sections 1 and 7): the base stays what it is, and the heads stand where the method puts them."""

from __future__ import annotations

import pytest
import torch
from architectures import CONFIGS, NAMES, VOCABULARY, base_of, dynamo_of, random_tokens
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    BigBirdConfig,
    FalconConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MllamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

from dynamo_lm import PRESETS, DynaMoConfig, DynaMoForCausalLM, InputError
from dynamo_lm.backbone.attention_mask import AttentionMaskBuilder
from dynamo_lm.backbone.base_model import check_base, decoder_layers, fingerprint
from dynamo_lm.model.configuration import MEDUSA

TOKENS = random_tokens(2, 20)  # longer than the sliding windows


def inputs_and_outputs(modules: dict, run) -> dict:
    """{name: (input, output)} hidden states of layers during `run()`."""
    seen = {}

    def recorder(name):
        def record(module, args, kwargs, output):
            state = args[0] if args else kwargs["hidden_states"]
            seen[name] = (state, output[0] if isinstance(output, tuple) else output)

        return record

    hooks = [module.register_forward_hook(recorder(name), with_kwargs=True) for name, module in modules.items()]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_base_is_untouched_and_head_1_is_the_base(name):
    expected = base_of(name)(TOKENS).logits
    model = dynamo_of(name)

    assert torch.equal(model(TOKENS).logits, expected)
    logits = model.logits(TOKENS)
    assert logits.shape == (3, 2, 20, VOCABULARY)
    assert torch.equal(logits[0], expected)  # soft-caps and logit scales included
    assert torch.equal(model.base(TOKENS).logits, expected)  # no hook stays behind


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_random_heads_are_new_layers_of_the_last_layers_class(name):
    model = dynamo_of(name)
    last = decoder_layers(model.base)[-1]
    layers = [head.layers[0] for head in model.heads]

    assert len(layers) == 2
    assert all(type(layer) is type(last) for layer in layers)
    mine = {p.data_ptr() for p in last.parameters()}
    assert not any(p.data_ptr() in mine for layer in layers for p in layer.parameters())
    one, two, three = model.logits(TOKENS)
    assert all(not torch.allclose(a, b) for a, b in [(one, two), (one, three), (two, three)])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_copied_head_starts_as_head_1_exactly(name):
    one, two, three = dynamo_of(name, init="copy").logits(TOKENS)
    assert torch.equal(one, two)
    assert torch.equal(one, three)


@pytest.mark.parametrize("feed", ["stem", "last"])
@pytest.mark.parametrize("name", NAMES)
def test_heads_are_fed_by_the_layer_that_was_asked_for(name, feed):
    model = dynamo_of(name, feed=feed)
    layers = decoder_layers(model.base)
    modules = {"penultimate": layers[-2], "last": layers[-1]}
    modules |= {f"head {i}": head.layers[0] for i, head in enumerate(model.heads, start=2)}
    seen = inputs_and_outputs(modules, lambda: model.logits(TOKENS))

    source = seen["penultimate" if feed == "stem" else "last"][1]
    assert source.shape == (2, 20, 32)
    assert torch.equal(seen["head 2"][0], source)
    assert torch.equal(seen["head 3"][0], source)


@pytest.mark.parametrize("name", NAMES)
def test_a_head_of_two_layers_runs_one_after_the_other(name):
    model = dynamo_of(name, layers_per_head=2)
    modules = {f"{h}.{l}": layer for h, head in enumerate(model.heads) for l, layer in enumerate(head.layers)}
    assert len(modules) == 4
    seen = inputs_and_outputs(modules, lambda: model.logits(TOKENS))
    for head in (0, 1):
        assert torch.equal(seen[f"{head}.1"][0], seen[f"{head}.0"][1])
    assert model.overhead() == pytest.approx(2 * dynamo_of(name).overhead())


def test_every_head_layer_has_a_cache_entry_of_its_own():
    model = dynamo_of("llama", layers_per_head=2)  # three base layers
    assert [layer.self_attn.layer_idx for head in model.heads for layer in head.layers] == [3, 4, 5, 6]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_an_own_output_embedding_starts_as_the_bases_and_serves_one_head_only(name):
    model = dynamo_of(name, init="copy", own_output_embedding=True)
    one, two, three = model.logits(TOKENS)
    assert torch.equal(one, two)
    assert torch.equal(one, three)

    model.heads[0].output.weight.zero_()
    changed = model.logits(TOKENS)
    assert torch.equal(changed[0], one)
    assert torch.equal(changed[1], torch.zeros_like(one))
    assert torch.equal(changed[2], one)


@torch.no_grad()
def test_a_head_may_be_an_output_embedding_and_nothing_else():  # "T2, new output embedding only", method.md section 7
    model = dynamo_of("gpt_neox", 2, layers_per_head=0, own_output_embedding=True, feed="last")
    assert sum(p.numel() for p in model.heads.parameters()) == VOCABULARY * 32
    one, two = model.logits(TOKENS)
    assert torch.equal(one, two)
    model.heads[0].output.weight.mul_(2)
    assert torch.equal(model.logits(TOKENS)[1], 2 * one)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_heads_of_the_medusa_kind_are_a_residual_block_and_an_output_embedding_on_the_last_normed_state(name):
    model = dynamo_of(name, **MEDUSA)
    one, two, three = model.logits(TOKENS)
    assert torch.equal(one, two) and torch.equal(one, three)  # at the start they say what head 1 says
    width = model.get_output_embeddings().weight.shape[1]
    assert sum(p.numel() for p in model.heads[0].parameters()) == VOCABULARY * width + width * (width + 1)

    block, output = model.heads[1].block, model.heads[1].output
    block.weight.normal_(), block.bias.normal_(), output.weight.mul_(1.5)
    hidden = model.hidden(TOKENS)
    x = hidden[0]  # head 1's
    assert torch.equal(hidden[2], x)
    y = x + torch.nn.functional.silu(x @ block.weight.T + block.bias)
    model.base.get_output_embeddings().weight = output.weight  # so that the base's own readout does the rest
    torch.testing.assert_close(model.readout(hidden[2], 3), model.readout(y, 1), rtol=1e-4, atol=1e-4)
    assert torch.equal(model.logits(TOKENS)[2], model.readout(hidden[2], 3))


@pytest.mark.parametrize("name", ["gpt_neox", "gemma3", "opt", "falcon", "qwen3_moe"])
def test_strict_decoding_with_heads_of_the_medusa_kind_is_the_bases_own(name):
    base, model = base_of(name), dynamo_of(name, 4, **MEDUSA)
    with torch.no_grad():
        for head in model.heads:  # so that drafts are not all alike
            head.block.weight.normal_(std=0.1)
            head.output.weight.add_(torch.randn_like(head.output.weight) * 0.02)
    prompt = random_tokens(1, 9)
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    expected = base.generate(prompt, eos_token_id=None, **options)
    result = model.generate(prompt, eos_token_id=None, alpha_c=0, return_dict_in_generate=True, **options)
    assert torch.equal(result.sequences, expected)
    assert result.statistics[0].proposed[0] > 0


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_starts_as_head_1_shares_its_weights_and_alone_gets_gradients(name):
    model = dynamo_of(name, adapter_rank=2)
    with torch.no_grad():
        one, two, _ = model.logits(TOKENS)
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)

    base = {id(p) for p in model.base.parameters()}
    own = [p for p in model.heads.parameters() if id(p) not in base]
    matrices = [p for p in decoder_layers(model.base)[-1].parameters() if p.ndim == 2]
    assert sum(p.numel() for p in own) == 2 * sum(2 * sum(p.shape) for p in matrices)  # 2 heads; A and B of rank 2
    assert model.overhead() == sum(p.numel() for p in own) / sum(p.numel() for p in model.base.parameters())

    model.freeze_base()
    model.readout(model.hidden(TOKENS)[1]).sum().backward()
    assert all(p.grad is None for p in model.base.parameters())
    assert all(p.grad is not None for n, p in model.heads[0].named_parameters() if n.endswith(".b"))


def test_a_head_of_an_adapter_follows_its_base():
    model = dynamo_of("llama", 2, adapter_rank=2)
    with torch.no_grad():
        decoder_layers(model.base)[-1].mlp.up_proj.weight.mul_(0.5)
        one, two = model.logits(TOKENS)
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_a_frozen_base_gets_no_gradients_and_the_heads_do():
    model = dynamo_of("gpt_neox").freeze_base()
    model.readout(model.hidden(TOKENS)[2]).logsumexp(-1).sum().backward()
    assert all(p.grad is None for p in model.base.parameters())
    assert all(p.grad is not None for p in model.heads[1].parameters())
    assert not any(p.grad.any() for p in model.heads[0].parameters())  # head 2 is no part of head 3


@torch.no_grad()
def test_fewer_heads_can_be_asked_for_but_not_more():
    model = dynamo_of("llama")
    assert torch.equal(model.hidden(TOKENS, num_heads=2), model.hidden(TOKENS)[:2])
    assert model.hidden(TOKENS, num_heads=1).shape == (1, 2, 20, 32)
    for wrong in (0, 4):
        with pytest.raises(InputError, match=f"{wrong} heads were requested of a model that has 3"):
            model.hidden(TOKENS, num_heads=wrong)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_ready_made_masks_say_what_transformers_own_masks_say(name):
    model = dynamo_of(name)
    positions = torch.arange(20)[None]
    mask = AttentionMaskBuilder.of(model.base.config, torch.float32).mask(positions, positions)
    masked = model.hidden(TOKENS, attention_mask=mask, position_ids=positions.expand(2, -1))
    torch.testing.assert_close(masked, model.hidden(TOKENS), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- the paper's suite


@pytest.mark.parametrize(
    ("name", "overhead", "lr_b", "lr_m", "lr_mb"),  # method.md sections 1 and 2
    [
        ("DynaMo-77M-T3", "8.95", 1e-5, 1e-3, 1e-6),
        ("DynaMo-180M-T3", "8.73", 6e-6, 6e-4, 6e-7),
        ("DynaMo-430M-T3", "6.22", 3e-6, 3e-4, 3e-7),
        ("DynaMo-1.1B-T3", "9.95", 2e-6, 2e-4, 2e-7),
        ("DynaMo-1.5B-T3", "7.12", 2e-6, 2e-4, 2e-7),
        ("DynaMo-2.9B-T3", "5.67", 1.6e-6, 1.6e-4, 1.6e-7),
        ("DynaMo-7.3B-T3", "5.87", 1.2e-6, 1.2e-4, 1.2e-7),
    ],
)
def test_pythia_presets_have_the_papers_overheads_and_learning_rates(name, overhead, lr_b, lr_m, lr_mb):
    preset = PRESETS[name]
    config = GPTNeoXConfig(
        vocab_size=preset.vocab_size,
        hidden_size=preset.hidden,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.attention_heads,
        intermediate_size=4 * preset.hidden,
    )
    with torch.device("meta"):
        model = DynaMoForCausalLM.from_base(AutoModelForCausalLM.from_config(config), num_heads=3)
    assert f"{100 * model.overhead():.2f}" == overhead
    assert (preset.lr_b, preset.lr_m, preset.lr_mb) == pytest.approx((lr_b, lr_m, lr_mb), rel=1e-9)


def test_there_are_seven_presets_named_after_their_pythia_base():
    assert [preset.base for preset in PRESETS.values()] == [
        f"EleutherAI/pythia-{size}" for size in ("70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b")
    ]


# ---------------------------------------------------------------- what cannot be a DynaMo model

_bert = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def test_an_encoder_decoder_is_refused():
    base = T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2))
    with pytest.raises(InputError, match="T5ForConditionalGeneration is an encoder-decoder"):
        DynaMoForCausalLM.from_base(base)


@pytest.mark.parametrize("kind", [BertModel, BertLMHeadModel])
def test_an_encoder_is_refused(kind):
    with pytest.raises(InputError, match=f"{kind.__name__} is (an encoder|not a causal language model)"):
        DynaMoForCausalLM.from_base(kind(BertConfig(**_bert)))


def test_a_single_layer_is_refused():
    base = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(InputError, match="single decoder layer"):
        DynaMoForCausalLM.from_base(base)


def test_alibi_is_refused():
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    with pytest.raises(InputError, match="ALiBi"):
        DynaMoForCausalLM.from_base(AutoModelForCausalLM.from_config(FalconConfig(**sizes, alibi=True)))


def test_block_sparse_attention_is_refused():
    config = BigBirdConfig(**_bert, is_decoder=True)
    with pytest.raises(InputError, match="block-sparse attention"):
        DynaMoForCausalLM.from_base(AutoModelForCausalLM.from_config(config))
    config.attention_type = "original_full"
    check_base(AutoModelForCausalLM.from_config(config))


def test_a_base_whose_configuration_opens_no_model_is_refused():
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = MllamaTextConfig(**sizes, num_key_value_heads=2, cross_attention_layers=[], pad_token_id=0)
    with pytest.raises(InputError, match="does not open MllamaForCausalLM by its configuration, MllamaTextConfig"):
        DynaMoForCausalLM.from_base(MllamaForCausalLM(config))


def test_a_dynamo_model_is_no_base():
    with pytest.raises(InputError, match="already is a DynaMo model"):
        DynaMoForCausalLM.from_base(dynamo_of("llama"))


def test_a_name_that_leads_nowhere_is_refused(tmp_path):
    with pytest.raises(InputError, match="could not be opened as a causal language model"):
        DynaMoForCausalLM.from_base(str(tmp_path / "nothing"))


@pytest.mark.parametrize("name", NAMES)
def test_all_architectures_pass_the_check(name):
    check_base(base_of(name))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_heads": 0}, "num_heads is 0"),
        ({"num_heads": 2.5}, "num_heads is 2.5"),
        ({"layers_per_head": 3}, "layers_per_head is 3"),
        ({"layers_per_head": 0}, "needs own_output_embedding"),
        ({"residual_block": True}, "residual_block goes with own_output_embedding"),
        ({"feed": "first"}, 'feed is "first"'),
        ({"init": "zero"}, 'init is "zero"'),
        ({"adapter_rank": -1}, "adapter_rank"),
        ({"adapter_rank": 4, "layers_per_head": 2}, "adapter_rank"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(options, reason):
    with pytest.raises(InputError, match=reason):
        DynaMoConfig(CONFIGS["llama"], **options)


def test_one_head_is_the_base_and_nothing_more():
    model = dynamo_of("llama", num_heads=1)
    assert len(model.heads) == 0
    assert model.overhead() == 0


def test_a_fingerprint_knows_the_weights_and_not_the_precision():
    base = base_of("llama")
    assert fingerprint(base) == fingerprint(base_of("llama"))
    assert fingerprint(base.to(torch.bfloat16)) == fingerprint(base_of("llama"))
    other = base_of("llama")
    decoder_layers(other)[-1].mlp.up_proj.weight.data[0, 0] += 1
    assert fingerprint(other) != fingerprint(base_of("llama"))


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3"])
@torch.no_grad()
def test_sliding_windows_are_short_enough_here_to_matter(name):
    base, wide = base_of(name), base_of(name)
    for config in (wide.config, *(module.config for module in wide.modules() if hasattr(module, "config"))):
        config.sliding_window = 64
    assert torch.equal(base(TOKENS[:, :8]).logits, wide(TOKENS[:, :8]).logits)
    assert not torch.allclose(base(TOKENS).logits, wide(TOKENS).logits)
