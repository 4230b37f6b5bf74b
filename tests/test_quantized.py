"""Weights of 8 and 4 bits: the kernel's products, and texts that are the rounded base's own."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import CONFIGS, base_of, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, LlamaConfig

from dynamo_lm import DynaMoForCausalLM
from dynamo_lm.cli.info import describe
from dynamo_lm.errors import InputError
from dynamo_lm.export import gguf_base
from dynamo_lm.kernels import loader, quantized
from dynamo_lm.kernels.quantized import MOST, QuantizedEmbedding, QuantizedLinear, QuantizedWeight, quantize_modules
from dynamo_lm.model.quantization import quantize

needs_kernel = pytest.mark.skipif(not loader.available(), reason="needs a C++ compiler")
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
BITS = st.sampled_from([8, 4])


def layers(wide: int, tall: int, bits: int, *, bias: bool = True, dtype=torch.float32) -> tuple[nn.Linear, QuantizedLinear]:
    plain = nn.Linear(32 * wide, tall, bias=bias, dtype=dtype)
    layer = copy.deepcopy(plain)
    quantize_modules(layer, bits)
    assert isinstance(layer, QuantizedLinear)
    return plain, layer


def reference(layer: QuantizedLinear, x: torch.Tensor) -> torch.Tensor:
    """The product in float64: entries of both factors, whole, and their scales by groups of 32."""
    entries, scale = layer.weight.entries(torch.arange(layer.out_features))
    groups = x.float().unflatten(-1, (-1, 32))
    most = groups.abs().amax(-1, keepdim=True)
    factor = torch.tensor(float(MOST)) / most  # torch would round MOST / most twice
    whole = (groups * torch.where(most > 0, factor, 0.0)).round()
    sums = torch.einsum("rgk,ogk->rog", whole.double(), entries.double().unflatten(-1, (-1, 32)))
    scales = (most[:, :, 0] / MOST).double()
    product = (sums * scale[..., 0].double() * scales[:, None]).sum(-1)
    if layer.weight.bits == 4:
        product += (whole.double().sum(-1) * scales) @ scale[..., 1].double().T
    return product if layer.bias is None else product + layer.bias.double()


@needs_kernel
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 7), st.integers(1, 50), BITS, st.booleans(), DTYPES)
def test_products_are_sums_of_whole_numbers_by_groups(rows, wide, tall, bits, bias, dtype):
    _, layer = layers(wide, tall, bits, bias=bias, dtype=dtype)
    x = torch.randn(32 * wide, rows, dtype=dtype).t()  # not contiguous
    x[0, :32] = 0
    with torch.inference_mode():
        exact = reference(layer, x)
        torch.testing.assert_close(layer(x).double(), exact, rtol=torch.finfo(dtype).eps / 2 + 1e-5, atol=1e-5)


@needs_kernel
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 11), st.integers(1, 20), st.integers(1, 70), BITS, DTYPES, st.data())
def test_a_row_has_the_same_product_bit_for_bit_whatever_is_beside_it(rows, wide, tall, bits, dtype, data):
    _, layer = layers(wide, tall, bits, dtype=dtype)
    x, start = torch.randn(rows, 32 * wide, dtype=dtype), data.draw(st.integers(0, rows - 1))
    end, threads = data.draw(st.integers(start + 1, rows)), torch.get_num_threads()
    with torch.inference_mode():
        together = layer(x)
        try:
            torch.set_num_threads(1)
            assert torch.equal(layer(x[start:end]), together[start:end])
        finally:
            torch.set_num_threads(threads)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 40), BITS, DTYPES, st.data())
def test_the_rounded_weight_is_near_and_its_rows_can_be_read_and_selected(wide, tall, bits, dtype, data):
    plain, layer = layers(wide, tall, bits, dtype=dtype)
    dense, ids = layer.weight.dense(), torch.tensor(data.draw(st.lists(st.integers(0, tall - 1), min_size=1, max_size=20)))
    largest = plain.weight.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True).expand(-1, -1, 32).flatten(1).float()
    error = (dense - plain.weight).abs().float()
    assert (error <= largest * (0.6 / 127 if bits == 8 else 0.31) + largest * torch.finfo(dtype).eps).all()
    assert torch.equal(layer.weight[ids], dense[ids])
    x = torch.randn(3, 32 * wide, dtype=dtype)
    with torch.inference_mode():
        exact = {"rtol": 0, "atol": 0} if loader.available() else {}  # torch's own product of other rows rounds otherwise
        torch.testing.assert_close(layer.select(ids)(x), layer(x)[:, ids], **exact)


def test_without_a_kernel_the_products_are_torchs(monkeypatch):
    _, layer = layers(2, 20, 4)
    x = torch.randn(3, 64)
    monkeypatch.setattr(loader, "available", lambda: False)
    torch.testing.assert_close(layer(x).double(), reference(layer, x), rtol=1e-4, atol=1e-5)


def test_weights_of_nothing_and_states_that_are_not_finite():
    plain = nn.Linear(64, 3)
    plain.weight.data.zero_()
    quantize_modules(plain, 8)
    x = torch.randn(4, 64)
    x[1, 40], x[2, 3] = float("inf"), float("nan")
    with torch.inference_mode():
        y = plain(x)
    assert torch.equal(y[[0, 3]], plain.bias.expand(2, -1)) and y[1:3].isnan().all()


@pytest.mark.parametrize("kernel", [True, False])
def test_states_too_small_for_float32_are_as_good_as_zeros(kernel, monkeypatch):
    _, layer = layers(2, 20, 8)
    x = torch.zeros(2, 64)
    x[:, 0], x[1, 40] = 1.0, 1e-36
    if not kernel:
        monkeypatch.setattr(loader, "available", lambda: False)
    with torch.inference_mode():
        y = layer(x)
    assert torch.equal(y[0], y[1]) and y.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_states_of_other_types_are_multiplied_in_float32(dtype):
    _, layer = layers(2, 20, 4)
    x = torch.randn(3, 64).to(dtype)
    with torch.inference_mode():
        y = copy.deepcopy(layer).to(dtype)(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), layer(x.float()).float(), rtol=2e-3, atol=2e-3)


def test_tokens_that_an_embedding_lacks_are_an_error():
    embedding = nn.Embedding(20, 64)
    embedding.__class__ = QuantizedEmbedding
    embedding.hold(QuantizedWeight.of(torch.randn(20, 64), 8))
    assert embedding(torch.tensor([[0, 19]])).shape == (1, 2, 64)
    for token in (-1, 20):  # 20 to 31 are there for the kernel, which takes 16 at a time
        with pytest.raises(IndexError, match="the embedding has 20 tokens"):
            embedding(torch.tensor([[token]]))


def test_an_embedding_is_one_graph_when_compiled():
    embedding, ids = nn.Embedding(20, 64), torch.tensor([[0, 7, 19]])
    embedding.__class__ = QuantizedEmbedding
    embedding.hold(QuantizedWeight.of(torch.randn(20, 64), 8))
    assert torch.equal(torch.compile(embedding, fullgraph=True, backend="eager")(ids), embedding(ids))


# ---------------------------------------------------------------- the op


def arguments(bits: int = 8) -> list:
    _, layer = layers(2, 20, bits)
    return [torch.randn(3, 64), layer.packed, layer.scale, layer.bias, 20]


@needs_kernel
@pytest.mark.parametrize("bits", [8, 4])
def test_the_op_is_registered_as_torch_expects(bits):
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.dynamo_lm.quantized_matmul.default, arguments(bits), test_utils=checks)


@needs_kernel
@pytest.mark.parametrize(
    ("place", "change", "words"),
    [
        (0, lambda x: x[:, :32], "last size of x"),
        (0, lambda x: x.double(), "float32 or bfloat16"),
        (0, lambda x: x[0, 0], "no dimension"),
        (1, lambda w: w.half(), "weight must be int8"),
        (1, lambda w: w.transpose(0, 1), "weight must be contiguous"),
        (1, lambda w: w[..., :8, :].contiguous(), "weight must be contiguous"),
        (1, lambda w: w[:1], "block for every 16"),
        (1, lambda w: w[:, :4].contiguous(), "last size of x"),
        (2, lambda s: s[:, :1].contiguous(), "scale must be"),
        (2, lambda s: s.view(torch.float16), "scale must be"),
        (2, lambda s: s.expand(-1, -1, 2, -1), "scale must be"),
        (3, lambda b: b[:5], "bias must have"),
        (3, lambda b: b.bfloat16(), "bias must be"),
        (4, lambda out: 40, "block for every 16"),
        (4, lambda out: 0, "block for every 16"),
    ],
)
def test_a_product_of_what_does_not_fit_is_refused(place, change, words):
    call = arguments()
    call[place] = change(call[place])
    with pytest.raises(RuntimeError, match=words) as refusal, torch.inference_mode():
        torch.ops.dynamo_lm.quantized_matmul(*call)
    with pytest.raises(RuntimeError, match=words) as traced, FakeTensorMode() as mode:
        traced_call = [mode.from_tensor(part) if isinstance(part, torch.Tensor) else part for part in call]
        torch.ops.dynamo_lm.quantized_matmul(*traced_call)
    assert str(traced.value) == str(refusal.value).split("\n")[0]


# ---------------------------------------------------------------- models


def rounded_model(name: str, bits: int, dtype=torch.float32, **options) -> DynaMoForCausalLM:
    """A model of the kind with widths that the kernels take."""
    config = copy.deepcopy(CONFIGS[name])
    config.hidden_size, config.intermediate_size = 64, 96
    if getattr(config, "head_dim", None):
        config.head_dim = 16
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config)
    for parameter in base.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(3)
    model = DynaMoForCausalLM.from_base(base.to(dtype), num_heads=3, **options).eval()
    quantize(model, f"int{bits}")
    return model


@needs_kernel
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("name", "dtype"), [("llama", torch.float32), ("qwen3", torch.bfloat16), ("gemma3", torch.float32)])
def test_strict_text_is_the_rounded_bases_own(name, dtype, bits):
    model = rounded_model(name, bits, dtype)
    prompt = random_tokens(2, 12, seed=3)
    how = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": 10**6}
    own = model.generate(prompt, num_heads=1, **how)
    if name == "llama":  # elsewhere torch's own attention, which transformers calls, may round otherwise
        assert torch.equal(model.base.generate(prompt, **how), own)
    assert torch.equal(model.generate(prompt, **how), own)
    assert torch.equal(model.generate(prompt[:1], tree=7, **how), own[:1])


def test_every_linear_layer_of_base_and_heads_is_rounded_and_a_shared_embedding_with_it():
    model = DynaMoForCausalLM.from_base(
        AutoModelForCausalLM.from_config(
            LlamaConfig(
                vocab_size=97,
                hidden_size=64,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                tie_word_embeddings=True,
            )
        )
    )
    before = model.get_input_embeddings().weight.detach().clone()
    quantize(model, "int8")
    assert not [m for m in model.modules() if type(m) is nn.Linear]
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, QuantizedEmbedding) and embedding.packed is output.packed
    found = embedding(torch.tensor([[3, 96]]))
    torch.testing.assert_close(found, before[None, [3, 96]], atol=before.abs().max().item() / 127, rtol=0)
    assert model.to(torch.bfloat16).get_input_embeddings()(torch.tensor([3])).dtype == torch.bfloat16
    assert embedding.scale.dtype == torch.int16
    with pytest.raises(InputError, match="already"):
        quantize(model, "int4")


def test_an_embedding_that_multiplies_by_a_factor_keeps_it():
    base = base_of("gemma3")
    base.tie_weights()
    ids = torch.tensor([[1, 5, 96]])
    before = base.get_input_embeddings()(ids)
    quantize_modules(base, 8)
    torch.testing.assert_close(base.get_input_embeddings()(ids), before, atol=before.abs().max().item() / 100, rtol=0)


def test_output_embeddings_keep_eight_bits():
    base = base_of("llama")
    quantize_modules(base, 4)
    assert base.get_output_embeddings().weight.bits == 8
    assert {m.weight.bits for m in base.model.modules() if isinstance(m, QuantizedLinear)} == {4}


def test_layers_that_groups_of_32_do_not_fit_stay_as_they_are():
    both = nn.Sequential(nn.Linear(48, 32), nn.Linear(32, 48))
    quantize_modules(both, 4)
    assert [type(layer) for layer in both] == [nn.Linear, QuantizedLinear]


def test_other_formats_are_refused():
    with pytest.raises(InputError, match="give int8 or int4"):
        DynaMoForCausalLM.from_pretrained("story", weights="int3")


def test_scales_of_four_bits_are_searched_for():
    groups = torch.randn(200, 32)
    found = quantized.from_groups(*quantized.round_groups(groups, 4))
    low, step = groups.amin(-1, keepdim=True), (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15
    plain = ((groups - low) / step).round() * step + low
    assert (found - groups).norm() < 0.98 * (plain - groups).norm()


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["Q8_0", "Q4_0", "Q4_1"]), st.integers(0, 2**31))
def test_weights_of_a_gguf_file_come_out_as_they_were(kind, seed):
    """Blocks as llama.cpp makes them: the largest magnitude is at one end, or both ends of the range are taken."""
    torch.manual_seed(seed)
    scale = (torch.randn(50, 1).abs() * 0.01 + 1e-3).half().float()
    if kind == "Q8_0":
        whole = torch.randint(-127, 128, (50, 32)).index_fill(1, torch.tensor([3]), -127)
        groups = whole * scale
    elif kind == "Q4_0":
        whole = torch.randint(1, 15, (50, 32)).index_fill(1, torch.tensor([3]), 0)
        groups = (whole - 8) * scale * torch.where(torch.rand(50, 1) < 0.5, -1.0, 1.0)
    else:
        whole = torch.randint(0, 16, (50, 32)).index_fill(1, torch.tensor([3]), 0).index_fill(1, torch.tensor([9]), 15)
        groups = whole * scale + torch.randn(50, 1).half().float() * 0.125
    found = quantized.from_groups(*quantized.round_groups(groups, 8 if kind == "Q8_0" else 4))
    torch.testing.assert_close(found, groups, rtol=0, atol=1e-7)


@pytest.mark.parametrize("weights", ["full", "heads"])
def test_a_rounded_model_is_saved_and_opened_as_it_is(tmp_path, weights):
    base = base_of("llama")
    base.save_pretrained(tmp_path / "base")
    model = DynaMoForCausalLM.from_base(str(tmp_path / "base"), num_heads=3).eval()
    model.save_pretrained(tmp_path / "float")
    quantize(model, "int4")
    model.save_pretrained(tmp_path / "rounded", weights=weights)
    opened = DynaMoForCausalLM.from_pretrained(str(tmp_path / "rounded"))
    assert opened.config.quantization == "int4" and describe(str(tmp_path / "rounded"))["quantization"] == "int4"
    tokens = random_tokens(1, 9, seed=4)
    with torch.inference_mode():
        expected = model.logits(tokens)
        assert torch.equal(opened.logits(tokens), expected)
        again = DynaMoForCausalLM.from_pretrained(str(tmp_path / "float"), weights="int4")
        assert torch.equal(again.logits(tokens), expected)
    with pytest.raises(InputError, match="int4 weights, not int8"):
        DynaMoForCausalLM.from_pretrained(str(tmp_path / "rounded"), weights="int8")


# ---------------------------------------------------------------- GGUF files as bases


def test_a_gguf_file_is_a_base(tmp_path):
    """Heads open on it; rounded to 8 bits, its weights are those of the file."""
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    config = LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    base = AutoModelForCausalLM.from_config(config)
    file = gguf_base.write(base, tmp_path / "base.gguf", precision="q8_0")
    model = DynaMoForCausalLM.from_base(str(file), 3)
    model.save_pretrained(str(tmp_path / "heads"), weights="heads")
    opened = DynaMoForCausalLM.from_pretrained(str(tmp_path / "heads"), base=str(file), weights="int8")
    dense, layer = model.base.model.layers[1].mlp.up_proj.weight, opened.base.model.layers[1].mlp.up_proj
    assert isinstance(layer, QuantizedLinear) and torch.equal(layer.weight.dense(), dense)
    assert not torch.equal(dense, base.model.layers[1].mlp.up_proj.weight)
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    (tmp_path / "text.gguf").write_text("no model")
    for name, words in [("cut", "could not be opened"), ("text", "could not be opened"), ("none", "no file")]:
        with pytest.raises(InputError, match=words):
            DynaMoForCausalLM.from_pretrained(str(tmp_path / "heads"), base=str(tmp_path / f"{name}.gguf"))
