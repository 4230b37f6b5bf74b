"""Folders: what is saved comes back, and what is damaged or belongs elsewhere is refused in one sentence."""

from __future__ import annotations

import ast
import errno
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import NAMES, VOCABULARY, base_of, dynamo_of, markov_dynamo, random_tokens
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import dynamo_lm.model.checkpoint
from dynamo_lm import DynaMoForCausalLM, InputError
from dynamo_lm.backbone.base_model import decoder_layers
from dynamo_lm.cooccurrence.counting import count
from dynamo_lm.model.configuration import MEDUSA
from dynamo_lm.model.loading import open_model

TOKENS = random_tokens(2, 12)
WEIGHTS = {"full": "model.safetensors", "heads": "heads.safetensors"}


def table(seed: int = 0):
    return count([np.random.default_rng(seed).integers(0, VOCABULARY, 500)], vocab_size=VOCABULARY, order=3)


def model_on_disk(folder: Path, name: str = "llama", **options) -> DynaMoForCausalLM:
    """A model whose base lies in `folder`/base."""
    base_of(name).save_pretrained(folder / "base")
    return DynaMoForCausalLM.from_base(str(folder / "base"), num_heads=3, **options).eval()


def saved(folder: Path, weights: str) -> tuple[DynaMoForCausalLM, Path]:
    model = model_on_disk(folder)
    model.save_pretrained(folder / "model", weights=weights)
    return model, folder / "model"


def assert_same(one: DynaMoForCausalLM, other: DynaMoForCausalLM) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def refused(folder: Path) -> str:
    """The one sentence with which opening the folder is refused."""
    with pytest.raises(InputError) as caught:
        AutoModelForCausalLM.from_pretrained(folder) if (folder / "config.json").exists() else None
        DynaMoForCausalLM.from_pretrained(str(folder))
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize("weights", ["full", "heads"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_saved_model_opens_as_it_was(tmp_path, name, weights):
    model = model_on_disk(tmp_path, name)
    model.cooccurrence = table()
    model.save_pretrained(tmp_path / "model", weights=weights)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "model")

    assert type(opened) is DynaMoForCausalLM
    assert not opened.training
    assert_same(opened, model)
    assert torch.equal(opened.logits(TOKENS), model.logits(TOKENS))
    assert all(torch.equal(a, b) for a, b in zip(opened.cooccurrence.keys, model.cooccurrence.keys, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(opened.cooccurrence.counts, model.cooccurrence.counts, strict=True))


@pytest.mark.parametrize("weights", ["full", "heads"])
@pytest.mark.parametrize(
    "options",
    [
        {"layers_per_head": 2},
        {"feed": "last", "init": "copy"},
        {"own_output_embedding": True},
        {"layers_per_head": 0, "own_output_embedding": True, "feed": "last"},
        MEDUSA,
        {"adapter_rank": 2},
    ],
    ids=lambda options: "-".join(options),
)
@torch.no_grad()
def test_every_kind_of_head_survives(tmp_path, options, weights):
    model = model_on_disk(tmp_path, **options)
    for parameter in model.heads.parameters():
        if id(parameter) not in {id(p) for p in model.base.parameters()}:
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "model", weights=weights)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(opened.logits(TOKENS), model.logits(TOKENS))
    assert {name: getattr(opened.config, name) for name in options} == options
    assert opened.overhead() == model.overhead()


def test_heads_only_folders_hold_no_base_weights(tmp_path):
    model, folder = saved(tmp_path, "heads")
    assert {file.name for file in folder.glob("*.safetensors")} == {"heads.safetensors"}
    weights = load_file(folder / "heads.safetensors")
    assert sum(tensor.numel() for tensor in weights.values()) == sum(p.numel() for p in model.heads.parameters())


def test_auto_config_opens_the_configuration(tmp_path):
    _, folder = saved(tmp_path, "heads")
    config = AutoConfig.from_pretrained(folder)
    assert (config.num_heads, config.vocab_size, config.base_config.model_type) == (3, VOCABULARY, "llama")


@torch.no_grad()
def test_a_saved_model_opens_in_another_precision(tmp_path):
    for weights in ("full", "heads"):
        _, folder = saved(tmp_path / weights, weights)
        opened = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        assert {p.dtype for p in opened.parameters()} == {torch.bfloat16}


def test_the_model_card_names_the_heads_the_base_and_the_tables(tmp_path):
    model = model_on_disk(tmp_path)
    model.cooccurrence = table()
    model.save_pretrained(tmp_path / "model", weights="heads")
    card = (tmp_path / "model" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: dynamo-lm\n")
    assert "T3 DynaMo model" in card
    assert "# DynaMo heads for base\n" in card and str(tmp_path) not in card
    assert "up to order 3" in card
    assert "heads beside the last" in card and "coupling" not in card and "Medusa" not in card


def test_the_model_card_names_a_coupling_and_heads_of_the_medusa_kind(tmp_path):
    model_on_disk(tmp_path, **MEDUSA, coupling_rank=4).save_pretrained(tmp_path / "model", weights="heads")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "2 extra token heads of the Medusa kind, after the last" in card
    assert "a learned coupling of rank 4 (" in card


@pytest.mark.parametrize("weights", ["full", "heads"])
def test_the_generation_config_keeps_dynamos_own_settings_and_generate_heeds_them(tmp_path, weights):
    model = model_on_disk(tmp_path)
    model.generation_config.eps_b = 0.3
    model.save_pretrained(tmp_path / "model", weights=weights)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").generation_config.eps_b == 0.3

    # A joint of 1/4 * 1/4 for the best pair: two tokens need a joint above eps_b.
    quarter = torch.full((4, 4), 0.25)
    chain = markov_dynamo(quarter, quarter)
    ask = {"verify": "off", "top_k": 4, "temperature": 1.0, "seed": 0, "max_new_tokens": 8, "do_sample": True}
    for eps_b, size in [(0.03, 2), (0.3, 1)]:
        chain.generation_config.eps_b = eps_b
        chain.save_pretrained(tmp_path / f"chain{eps_b}")
        opened = AutoModelForCausalLM.from_pretrained(tmp_path / f"chain{eps_b}")
        result = opened.generate(torch.tensor([[1]]), **ask, otsu=False, return_dict_in_generate=True)
        assert result.statistics[0].step_sizes == [size] * (8 // size)


# ---------------------------------------------------------------- bases and heads that do not belong together


def test_heads_refuse_another_base_of_the_same_shape(tmp_path):
    _, folder = saved(tmp_path, "heads")
    other = base_of("llama")
    decoder_layers(other)[-1].self_attn.q_proj.weight.data.mul_(1.1)
    with pytest.raises(InputError, match=r"were trained for the base .* but .* open them with that base"):
        DynaMoForCausalLM.from_pretrained(str(folder), base=other)
    other.save_pretrained(tmp_path / "base")  # the base was replaced where it lies
    assert "were trained for the base" in refused(folder)


def test_heads_open_with_the_right_base_from_anywhere(tmp_path):
    model, folder = saved(tmp_path, "heads")
    assert_same(DynaMoForCausalLM.from_pretrained(str(folder), base=base_of("llama")), model)
    (tmp_path / "base").rename(tmp_path / "moved")
    assert_same(DynaMoForCausalLM.from_pretrained(str(folder), base=str(tmp_path / "moved")), model)
    assert "could not be opened" in refused(folder)


def test_heads_record_where_their_base_is_and_find_it_beside_them_or_where_it_was(tmp_path):
    model, folder = saved(tmp_path / "one", "heads")
    config = json.loads((folder / "config.json").read_text())
    assert config["base_path"] == str(tmp_path / "one/base") and config["base_fingerprint"] and config["base_hub_id"] is None
    (folder / "config.json").write_text(json.dumps(config | {"base_name_or_path": "../base"}))
    shutil.move(folder, tmp_path / "alone")  # to where "../base" is not
    assert_same(DynaMoForCausalLM.from_pretrained(str(tmp_path / "alone")), model)
    shutil.move(tmp_path / "one", tmp_path / "two")
    message = refused(tmp_path / "alone")
    assert f'"base" (fingerprint {config["base_fingerprint"]}) is not at "{tmp_path / "one/base"}"' in message
    assert "--base" in message
    shutil.move(tmp_path / "two/base", tmp_path / "base")
    opened = DynaMoForCausalLM.from_pretrained(str(tmp_path / "alone"))
    assert_same(opened, model)
    opened.save_pretrained(str(tmp_path / "far/away"), weights="heads")
    assert_same(DynaMoForCausalLM.from_pretrained(str(tmp_path / "far/away")), model)


def test_a_base_beside_the_heads_that_is_another_one_is_passed_over(tmp_path):
    model, folder = saved(tmp_path / "one", "heads")
    shutil.copytree(folder, tmp_path / "two/model")
    slightly_other(tmp_path / "two/base")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "two/model/config.json").write_text(json.dumps(config | {"base_name_or_path": "../base"}))
    assert_same(DynaMoForCausalLM.from_pretrained(str(tmp_path / "two/model")), model)


def test_a_base_from_the_hub_is_known_by_its_id(tmp_path, monkeypatch):
    cached = tmp_path / "models--org--tiny-llama/snapshots/0123"
    base_of("llama").save_pretrained(cached)
    model = DynaMoForCausalLM.from_base(str(cached), num_heads=3)
    model.save_pretrained(tmp_path / "model", weights="heads")
    card = (tmp_path / "model/README.md").read_text()
    assert "\nbase_model: org/tiny-llama\n" in card and "# DynaMo heads for org/tiny-llama\n" in card
    shutil.rmtree(tmp_path / "models--org--tiny-llama")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refused(tmp_path / "model")
    assert '"org/tiny-llama" could not be opened' in message and "--base" in message


def slightly_other(folder: Path) -> str:
    other = base_of("llama")
    decoder_layers(other)[-1].self_attn.q_proj.weight.data.mul_(1.05)
    other.save_pretrained(folder)
    return str(folder)


def test_a_base_of_other_weights_is_taken_with_a_warning_and_of_another_shape_never(tmp_path, caplog):
    model, folder = saved(tmp_path, "heads")
    other = slightly_other(tmp_path / "other")
    with pytest.raises(InputError, match="another quantisation of it, with --allow-base-mismatch"):
        open_model(str(folder), base=other)
    opened = open_model(str(folder), base=other, allow_base_mismatch=True)
    assert "were trained for the base" in caplog.text and "more steps" in caplog.text
    assert torch.equal(opened.heads[0].layers[0].mlp.up_proj.weight, model.heads[0].layers[0].mlp.up_proj.weight)
    base = AutoModelForCausalLM.from_pretrained(other)
    expected = base.generate(TOKENS[:1], max_new_tokens=8, do_sample=False)
    assert torch.equal(opened.generate(TOKENS[:1], max_new_tokens=8, do_sample=False, verify="strict"), expected)
    base_of("gpt_neox").save_pretrained(tmp_path / "neox")
    with pytest.raises(InputError, match="another shape"):
        open_model(str(folder), base=str(tmp_path / "neox"), allow_base_mismatch=True)


def with_small_weights(folder: Path) -> DynaMoForCausalLM:
    """Heads of a base in `folder`/base whose weights float16 cannot hold all."""
    base = base_of("llama")
    decoder_layers(base)[-1].mlp.up_proj.weight.data[0] = 1.2345e-9
    base.save_pretrained(folder / "base")
    return DynaMoForCausalLM.from_base(str(folder / "base"), num_heads=3).eval()


def test_a_base_opened_in_float16_is_still_the_base_of_its_heads(tmp_path):
    with_small_weights(tmp_path).save_pretrained(tmp_path / "heads", weights="heads")
    half = open_model(str(tmp_path / "heads"), dtype="float16")
    assert half.dtype == torch.float16
    half.save_pretrained(tmp_path / "again", weights="heads")
    half.save_pretrained(tmp_path / "full")
    open_model(str(tmp_path / "full"), dtype="float16").save_pretrained(tmp_path / "third", weights="heads")
    assert open_model(str(tmp_path / "again")).dtype == open_model(str(tmp_path / "third")).dtype == torch.float32
    decoder_layers(half.base)[-1].mlp.up_proj.weight.data.add_(1)
    with pytest.raises(InputError, match="base was changed by training"):
        half.save_pretrained(tmp_path / "trained", weights="heads")


def test_heads_that_were_added_to_a_base_in_float16_open_with_its_files(tmp_path):
    with_small_weights(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float16)
    for place, given in enumerate((base, str(tmp_path / "base"))):
        options = {"dtype": torch.float16} if isinstance(given, str) else {}
        DynaMoForCausalLM.from_base(given, num_heads=3, **options).save_pretrained(tmp_path / str(place), weights="heads")
        for dtype in ("float16", "float32"):
            model = open_model(str(tmp_path / str(place)), dtype=dtype)
            model.save_pretrained(tmp_path / "again", weights="heads")


def test_a_folder_that_holds_its_base_takes_no_other(tmp_path):
    _, folder = saved(tmp_path, "full")
    with pytest.raises(InputError, match="holds its own base"):
        open_model(str(folder), base=str(tmp_path / "base"))


def test_a_trained_base_cannot_be_saved_as_heads_alone(tmp_path):
    model = model_on_disk(tmp_path)
    model.last_layer.mlp.up_proj.weight.data.add_(1)
    with pytest.raises(InputError, match=r'base was changed by training.*weights="full"'):
        model.save_pretrained(tmp_path / "model", weights="heads")
    model.save_pretrained(tmp_path / "model")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), model)


def test_a_base_without_a_name_cannot_be_saved_as_heads_alone(tmp_path):
    with pytest.raises(InputError, match="no name or path"):
        dynamo_of("llama").save_pretrained(tmp_path / "model", weights="heads")


def test_only_full_and_heads_can_be_saved(tmp_path):
    with pytest.raises(InputError, match='weights is "half"'):
        dynamo_of("llama").save_pretrained(tmp_path / "model", weights="half")


def test_tables_of_another_vocabulary_are_refused(tmp_path):
    _, folder = saved(tmp_path, "full")
    count([np.arange(5)], vocab_size=VOCABULARY + 1, order=2).save(folder / "cooccurrence.safetensors")
    assert f"vocabulary of {VOCABULARY + 1}, the model has {VOCABULARY}" in refused(folder)


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("weights", ["full", "heads"])
def test_truncated_weights_are_refused(tmp_path, weights):
    _, folder = saved(tmp_path, weights)
    file = folder / WEIGHTS[weights]
    content = file.read_bytes()
    for checksums in (True, False):
        if not checksums:
            (folder / "checksums.json").unlink()
        for keep in (0, 4, 100, len(content) // 2, -1):
            file.write_bytes(content[:keep])
            assert "truncated or altered" in refused(folder), (keep, checksums)


@pytest.mark.parametrize("weights", ["full", "heads"])
def test_a_single_flipped_bit_in_the_weights_is_noticed(tmp_path, weights):
    _, folder = saved(tmp_path, weights)
    file = folder / WEIGHTS[weights]
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)
    assert "truncated or altered" in refused(folder)


@pytest.mark.parametrize("weights", ["full", "heads"])
def test_a_damaged_header_is_refused_even_without_checksums(tmp_path, weights):
    _, folder = saved(tmp_path, weights)
    (folder / "checksums.json").unlink()
    file = folder / WEIGHTS[weights]
    file.write_bytes(file.read_bytes().replace(b'"dtype"', b'"dtyqe"', 1))
    assert "truncated or altered" in refused(folder)


@pytest.mark.parametrize("weights", ["full", "heads"])
@pytest.mark.parametrize("change", ["missing", "shape"])
def test_weights_that_do_not_fit_the_configuration_are_refused(tmp_path, weights, change):
    _, folder = saved(tmp_path, weights)
    (folder / "checksums.json").unlink()
    tensors = load_file(folder / WEIGHTS[weights])
    name = next(name for name in tensors if "up_proj" in name and (weights == "heads" or name.startswith("heads")))
    if change == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name][1:].clone()
    save_file(tensors, folder / WEIGHTS[weights], metadata={"format": "pt"})
    assert "not hold" in refused(folder) or "missing" in refused(folder)


@pytest.mark.parametrize("checksums", [True, False], ids=["checksums", "no checksums"])
@pytest.mark.parametrize("weights", ["full", "heads"])
def test_missing_weights_are_refused(tmp_path, weights, checksums):
    _, folder = saved(tmp_path, weights)
    (folder / WEIGHTS[weights]).unlink()
    if not checksums:
        (folder / "checksums.json").unlink()
    assert str(folder) in refused(folder)


def test_a_damaged_table_is_refused(tmp_path):
    model = model_on_disk(tmp_path)
    model.cooccurrence = table()
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "cooccurrence.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "cooccurrence.safetensors" in refused(tmp_path / "model")


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    assert "is not a model folder: it has no config.json" in refused(tmp_path)
    assert "is not a model folder" in refused(tmp_path / "nothing")


def test_a_model_of_another_type_is_refused(tmp_path):
    base_of("llama").save_pretrained(tmp_path)
    with pytest.raises(InputError, match='model of type "llama" without heads'):
        DynaMoForCausalLM.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("content", ["{", "", "[1, 2]", '"text"'])
def test_a_config_that_is_no_json_object_is_refused(tmp_path, content):
    _, folder = saved(tmp_path, "full")
    (folder / "config.json").write_text(content)
    with pytest.raises(InputError) as caught:
        DynaMoForCausalLM.from_pretrained(str(folder))
    assert "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_dynamo_config_without_a_base_is_refused(tmp_path):
    _, folder = saved(tmp_path, "full")
    config = json.loads((folder / "config.json").read_text())
    del config["base_config"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "names no base model" in refused(folder)


@pytest.mark.parametrize("weights", ["full", "heads"])
def test_pickles_are_never_read(tmp_path, weights):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    model, folder = saved(tmp_path, weights)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    assert_same(AutoModelForCausalLM.from_pretrained(folder), model)
    (folder / WEIGHTS[weights]).unlink()
    assert refused(folder)
    (folder / "checksums.json").unlink()
    assert refused(folder)
    assert not (tmp_path / "sprung").exists()


def test_a_base_in_a_pickle_is_refused(tmp_path):
    base = base_of("llama")
    base.config.save_pretrained(tmp_path)
    torch.save(base.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="could not be opened"):
        DynaMoForCausalLM.from_base(str(tmp_path))


# ---------------------------------------------------------------- saving over an existing folder


@pytest.mark.parametrize("weights", ["full", "heads"])
@pytest.mark.parametrize("failure", ["OSError", "during the table", "SafetensorError"])
def test_a_full_disk_leaves_the_old_folder_as_it_was(tmp_path, monkeypatch, weights, failure):
    model, folder = saved(tmp_path, weights)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full_disk(*args, **kwargs):
        if failure == "SafetensorError":
            raise dynamo_lm.model.checkpoint.SafetensorError("Error while serializing: I/O error: No space left on device")
        raise OSError(errno.ENOSPC, "No space left on device")

    changed = DynaMoForCausalLM.from_base(str(tmp_path / "base"), num_heads=3)
    if failure == "during the table":
        changed.cooccurrence = table()
        monkeypatch.setattr(type(changed.cooccurrence), "save", full_disk)
    else:
        monkeypatch.setattr(dynamo_lm.model.checkpoint, "save_file", full_disk)
        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full_disk)
    with pytest.raises(InputError, match=r"disk .*full") as caught:
        changed.save_pretrained(folder, weights=weights)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert_same(AutoModelForCausalLM.from_pretrained(folder), model)


def test_a_failure_of_another_kind_is_not_called_a_full_disk(tmp_path, monkeypatch):
    def denied(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", denied)
    with pytest.raises(PermissionError):
        dynamo_of("llama").save_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"weights": "full"}, {"weights": "heads"}),
        ({"weights": "heads"}, {"weights": "full"}),
        ({"weights": "full"}, {"weights": "full", "max_shard_size": "20KB"}),
        ({"weights": "full", "max_shard_size": "20KB"}, {"weights": "full"}),
    ],
    ids=["full-heads", "heads-full", "whole-shards", "shards-whole"],
)
def test_saving_over_an_older_model_leaves_nothing_of_it(tmp_path, first, second):
    old = model_on_disk(tmp_path)
    old.save_pretrained(tmp_path / "model", **first)
    new = DynaMoForCausalLM.from_base(str(tmp_path / "base"), num_heads=2)
    new.save_pretrained(tmp_path / "model", **second)
    new.save_pretrained(tmp_path / "fresh", **second)
    assert {f.name for f in (tmp_path / "model").iterdir()} == {f.name for f in (tmp_path / "fresh").iterdir()}
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), new)


def test_saving_again_keeps_the_files_of_others(tmp_path):
    model, folder = saved(tmp_path, "full")
    (folder / "tokenizer.json").write_text("{}")
    model.save_pretrained(folder)
    assert (folder / "tokenizer.json").read_text() == "{}"


def without_encoding(source: str) -> list[str]:
    """The calls in Python code that open text in whatever encoding the machine has."""
    calls = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(keyword.arg in ("encoding", None) for keyword in node.keywords):
            continue
        method = isinstance(node.func, ast.Attribute)
        name = node.func.attr if method else getattr(node.func, "id", "")
        words = [each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
        mode = next((word for word in words if set(word) <= set("rwaxbt+")), None)
        opens = name in ("open", "fdopen") and (mode is not None or not node.args) and "b" not in (mode or "")
        starts = name in ("run", "Popen", "check_output") and any(keyword.arg == "text" for keyword in node.keywords)
        if opens or starts or (method and name in ("read_text", "write_text")):
            calls.append(ast.unparse(node))
    return calls


def test_text_without_an_encoding_is_found():
    found = without_encoding(
        "open('a', 'w'); p.open('rb'); p.open(); p.read_text(); p.read_text(encoding='utf-8'); os.open(p, 1)"
    )
    assert found == ["open('a', 'w')", "p.open()", "p.read_text()"]


@pytest.mark.parametrize("folder", ["dynamo_lm", "benchmarks", "recipes"])
def test_every_text_file_is_opened_with_its_encoding(folder):
    files = (Path(__file__).parents[1] / folder).rglob("*.py")
    assert {str(file): calls for file in files if (calls := without_encoding(file.read_text(encoding="utf-8")))} == {}
