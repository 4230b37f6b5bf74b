"""A sequential head in the files of other programs, and training it by the command line."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, PreTrainedTokenizerFast

from dynamo_lm import DynaMoForCausalLM
from dynamo_lm.cli.main import main
from dynamo_lm.data.draft_tokens import draft_tokens, needed_tokens
from dynamo_lm.errors import InputError
from dynamo_lm.export.export import export

VOCABULARY = 300
LAYER = {  # names of formats.md, with the shapes of the model below
    "input_layernorm": (32,),
    "hidden_norm": (32,),
    "self_attn.q_proj": (32, 64),
    "self_attn.k_proj": (16, 64),
    "self_attn.v_proj": (16, 64),
    "self_attn.o_proj": (32, 32),
    "post_attention_layernorm": (32,),
    "mlp.gate_proj": (48, 32),
    "mlp.up_proj": (48, 32),
    "mlp.down_proj": (32, 48),
}


@pytest.fixture(scope="module")
def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {letter: place for place, letter in enumerate(alphabet, start=3)}
    vocabulary |= {f"word{place}": place for place in range(len(vocabulary), VOCABULARY)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory, tokenizer):
    """A Llama of eight layers with untied embeddings and grouped heads."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).eval()
    for parameter in base.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(3)
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
    assert [layer[key] for key in sizes] == [1, 32, 4, 2, 8, VOCABULARY]
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
    assert '"num_speculative_tokens": 3' in commands[0] and commands[0] in (tmp_path / "out/README.md").read_text()


def test_what_cannot_be_exported_says_so(base_folder, tokenizer, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(InputError, match='"mine" has parallel heads, which no other program reads'):
        export(DynaMoForCausalLM.from_base(str(base_folder)), "mine", tokenizer, "eagle3", out)
    with pytest.raises(InputError, match='--to is "onnx"; give eagle3, speculators, gguf'):
        export(eagle(base_folder), "mine", tokenizer, "onnx", out)
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


def test_the_gguf_file_has_the_keys_that_llama_cpp_reads(base_folder, tokenizer, tmp_path):
    gguf = pytest.importorskip("gguf")
    ids = torch.tensor([*range(259), 270, 299])
    model = eagle(base_folder, ids)
    export(model, "heads", tokenizer, "gguf", tmp_path / "out")
    read = gguf.GGUFReader(tmp_path / "out/draft.gguf")
    value = {name: field.contents() for name, field in read.fields.items()}
    assert value["general.architecture"] == "eagle3"
    assert value["eagle3.target_layers"] == [2, 4, 5]
    assert value["eagle3.target_hidden_size"] == 32
    assert value["eagle3.attention.head_count_kv"] == 2
    assert value["tokenizer.ggml.tokens"][:4] == tokenizer.convert_ids_to_tokens([0, 1, 2, 3])
    found = {tensor.name: tensor.data for tensor in read.tensors}
    assert found["d2t"].tolist() == ids.tolist() and found["d2t"].dtype == np.int64
    # Rotary pairs lie side by side: row 1 of a head of size 8 is its row 4 here.
    theirs, ours = found["blk.0.attn_q.weight"], model.sequential_head.midlayer.self_attn["q_proj"].weight
    assert np.array_equal(theirs[1], ours[4].detach().numpy())
    # The tokens of the base's file in place of the tokenizer's.
    export(eagle(base_folder), "heads", tokenizer, "gguf", tmp_path / "again", base_gguf=tmp_path / "out/draft.gguf")
    copied = gguf.GGUFReader(tmp_path / "again/draft.gguf").fields["tokenizer.ggml.tokens"].contents()
    assert copied == value["tokenizer.ggml.tokens"]
    broken = tmp_path / "broken.gguf"
    broken.write_bytes((tmp_path / "out/draft.gguf").read_bytes()[:100])
    with pytest.raises(InputError, match="is not a GGUF file"):
        export(eagle(base_folder), "heads", tokenizer, "gguf", tmp_path / "third", base_gguf=broken)


def test_the_command_line_trains_a_head_and_exports_it(base_folder, tmp_path, capsys):
    text = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": f"the cat {number} sat on the mat and " * 4}) for number in range(60)]
    text.write_text("\n".join(lines))
    run = tmp_path / "run"
    arguments = ["train", str(base_folder), "--head", "eagle3", "--draft-vocabulary", "270", "--data", str(text)]
    arguments += ["--block-size", "64", "--batch-size", "2", "--steps", "4", "--out", str(run)]
    assert main(arguments) == 0
    assert main(["export", str(run / "model"), "--to", "eagle3", "--out", str(tmp_path / "draft")]) == 0
    assert "vllm serve" in capsys.readouterr().out
    weights = load_file(tmp_path / "draft/model.safetensors")
    assert weights["lm_head.weight"].shape == (270, 32) and weights["t2d"].sum() == 270
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert len(lines[-1]["losses"]) == 4 and lines[-1]["losses"][0] == 0 and "acceptance" in lines[-1]
    assert main(["info", str(run / "model")]) == 0
    assert "of the kind eagle3, which drafts 3 tokens" in capsys.readouterr().out


LLAMA = """
import json, sys
import xllamacpp as x
base, draft = sys.argv[1:]
p = x.CommonParams()
p.model.path, p.n_ctx, p.n_parallel, p.n_gpu_layers, p.verbosity = base, 256, 1, 0, -1
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1
p.cache_type_k = p.cache_type_v = x.ggml_type.GGML_TYPE_F32
if draft != "-":
    p.speculative.types = [x.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_EAGLE3]
    p.speculative.draft.mparams.path, p.speculative.draft.n_max = draft, 3
how = {"max_tokens": 30, "temperature": 0, "samplers": ["top_k"], "top_k": 1, "ignore_eos": True, "logprobs": 1}
answer = x.Server(p).handle_completions({"prompt": [5, 9, 17, 40], "cache_prompt": False, **how})
tokens = [entry["id"] for entry in answer["choices"][0]["logprobs"]["content"]]
print("ANSWER", json.dumps([tokens, answer["timings"].get("draft_n_accepted", 0)]))
"""


@pytest.mark.parametrize("short", [False, True])
def test_llama_cpp_writes_the_same_text_with_the_draft_and_accepts_what_we_do(short, base_folder, tokenizer, tmp_path):
    pytest.importorskip("gguf")
    probe = [sys.executable, "-c", "import xllamacpp"]
    if subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("xllamacpp is not installed")
    from benchmarks.gguf_file import write

    model = eagle(base_folder, torch.tensor([*range(259), *range(270, 290)]) if short else None)
    with torch.no_grad():  # a head that agrees now and then: features as they are, nothing added
        model.sequential_head.fc.weight.zero_()
        model.sequential_head.fc.weight[:, 64:] = torch.eye(32)
        model.sequential_head.midlayer.mlp["down_proj"].weight.mul_(3)
    base_gguf = write(model.base, tmp_path / "base.gguf")
    export(model, "heads", tokenizer, "gguf", tmp_path / "out", base_gguf=base_gguf)

    def answer(draft: str) -> tuple[list[int], int]:
        command = [sys.executable, "-c", LLAMA, str(base_gguf), draft]
        out = subprocess.run(command, capture_output=True, text=True, timeout=300)
        line = next(line for line in out.stdout.splitlines() if line.startswith("ANSWER"))
        return tuple(json.loads(line.removeprefix("ANSWER ")))

    alone, drafted = answer("-"), answer(str(tmp_path / "out/draft.gguf"))
    assert drafted[0] == alone[0]
    how = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    ours = model.generate(torch.tensor([[5, 9, 17, 40]]), **how)
    assert ours.sequences[0, 4:].tolist() == alone[0]
    assert abs(sum(ours.statistics[0].accepted) - drafted[1]) <= 2
