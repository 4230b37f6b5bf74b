"""Parallel heads in a folder for vLLM, and what they draft there."""
# ruff: noqa: F811

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_export import TOKENS, base_folder, eagle, tokenizer  # noqa: F401
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from dynamo_lm import DynaMoForCausalLM
from dynamo_lm.cli.main import main
from dynamo_lm.errors import InputError
from dynamo_lm.export import check as export_check
from dynamo_lm.export.check import OPENINGS, check_export, steps_here
from dynamo_lm.export.export import export


@pytest.fixture(autouse=True)
def short_texts(monkeypatch):
    monkeypatch.setattr(export_check, "TOKENS", TOKENS)


@pytest.fixture(scope="module")
def texts(base_folder, tokenizer):
    """What the base writes behind the openings of the check, (4, tokens), each after the end of its opening."""
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    ids = tokenizer(list(OPENINGS)).input_ids
    greedy = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    length = min(map(len, ids)) + TOKENS
    return torch.cat([base.generate(torch.tensor([prompt]), **greedy)[:, -length:] for prompt in ids])


def heads(base_folder, num_heads=4, rank=0, texts=None):
    """A model with parallel heads; texts: which they learn."""
    torch.manual_seed(1)
    model = DynaMoForCausalLM.from_base(str(base_folder), num_heads, init="copy", coupling_rank=rank).eval()
    model.freeze_base()
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(learned, lr=4e-3)
    for _ in range(40 if texts is not None else 0):
        for head, state in enumerate(model.hidden(texts)[1:, :, :-1], start=2):
            known = state[:, : texts.shape[1] - head]
            if model.coupling is not None:
                known = known + model.coupling.hidden_correction(head, known, texts[:, head - 1 : -1])
            F.cross_entropy(model.readout(known, head).flatten(0, 1), texts[:, head:].flatten()).backward(retain_graph=True)
        optimizer.step()
        optimizer.zero_grad()
    return model.requires_grad_(False)


@pytest.mark.parametrize(("num_heads", "rank"), [(4, 5), (2, 0)])
def test_the_folder_holds_the_layers_and_packed_states_are_wide_enough(num_heads, rank, base_folder, tokenizer, tmp_path):
    model = heads(base_folder, num_heads, rank)
    commands = export(model, "heads", tokenizer, "vllm", tmp_path / "out")
    assert "--enforce-eager" in commands["vLLM"] and f'"num_speculative_tokens": {num_heads - 1}' in commands["vLLM"]
    assert commands["vLLM"] in (card := (tmp_path / "out/README.md").read_text()) and "# Parallel heads for" in card
    config = json.loads((tmp_path / "out/config.json").read_text())
    keys = ("architectures", "model_type", "num_hidden_layers", "stem_size", "hidden_size", "head_dim", "coupling_rank")
    assert [config[key] for key in keys] == [
        ["DynaMoForCausalLMEagle3"], "llama", num_heads - 1, 32, max(1, num_heads - 2) * 32, 32, rank,
    ]  # fmt: skip
    assert config["eagle_aux_hidden_state_layer_ids"] == [7]  # whose input is the stem's state
    assert config["rope_parameters"]["rope_type"] == "llama3"
    weights = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(weights["norm.weight"], model.base.model.norm.weight)
    for place, head in enumerate(model.heads):
        for name, tensor in head.layers[0].state_dict().items():
            assert torch.equal(weights.pop(f"layers.{place}.{name}"), tensor)
    coupling = {name.removeprefix("coupling.") for name in weights if name != "norm.weight"}
    assert coupling == (set(model.coupling.state_dict()) if rank else set())


@pytest.mark.parametrize(("num_heads", "rank"), [(4, 0), (4, 5), (3, 5)])
def test_the_steps_that_a_check_expects_are_those_of_this_loop(num_heads, rank, texts, base_folder, tokenizer):
    model = heads(base_folder, num_heads, rank, texts)
    found = []
    for opening in OPENINGS:
        prompt = tokenizer(opening).input_ids
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0, tree=0,
            num_heads=num_heads, verify="strict", return_dict_in_generate=True,
        )  # fmt: skip
        text = out.sequences[0, len(prompt) :].tolist()
        found.append(out.statistics[0].forwards)
        assert steps_here(model, prompt, text, num_heads - 1) == found[-1]
    assert sum(found) < 0.9 * 4 * TOKENS  # drafts are accepted


def test_what_vllm_does_not_read_says_so(base_folder, tokenizer, tmp_path, capsys):
    out = tmp_path / "out"
    with pytest.raises(InputError, match='"mine" has a sequential head, which vLLM reads by itself; give --to eagle3'):
        export(eagle(base_folder), "mine", tokenizer, "vllm", out)
    with pytest.raises(InputError, match="has only the base's own head"):
        export(DynaMoForCausalLM.from_base(str(base_folder), 1), "mine", tokenizer, "vllm", out)
    for options in ({"layers_per_head": 2}, {"feed": "last"}, {"adapter_rank": 2}, {"own_output_embedding": True}):
        with pytest.raises(InputError, match="of another kind than vLLM reads"):
            export(DynaMoForCausalLM.from_base(str(base_folder), 3, **options), "mine", tokenizer, "vllm", out)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    neox = AutoModelForCausalLM.from_config(GPTNeoXConfig(vocab_size=300, **sizes))
    with pytest.raises(InputError, match="cannot draft for a base of the architecture gpt_neox"):
        export(DynaMoForCausalLM.from_base(neox, 3), "mine", tokenizer, "vllm", out)
    assert not out.exists()
    heads(base_folder).save_pretrained(str(tmp_path / "heads"), weights="heads")
    tokenizer.save_pretrained(tmp_path / "heads")
    other = AutoModelForCausalLM.from_pretrained(base_folder)
    other.model.layers[-1].mlp.up_proj.weight.data.mul_(2)
    other.save_pretrained(tmp_path / "other")
    command = ["export", str(tmp_path / "heads"), "--to", "vllm", "--out", str(out)]
    assert main([*command, "--base", str(tmp_path / "other")]) == 2
    assert "were trained for the base" in capsys.readouterr().err
    assert main(command) == 0
    assert f"vllm serve {base_folder} --enforce-eager" in capsys.readouterr().out


@pytest.mark.parametrize(("num_heads", "rank"), [(4, 5), (3, 0)])
def test_vllm_writes_the_same_text_with_the_heads_and_accepts_what_we_do(
    num_heads, rank, texts, base_folder, tokenizer, tmp_path
):
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
    model = heads(base_folder, num_heads, rank, texts)
    export(model, "heads", tokenizer, "vllm", tmp_path / "out")
    check = check_export(model, tokenizer, "vllm", tmp_path / "out", None)
    assert check.passed and check.tokens_per_step == check.expected > 1.1
