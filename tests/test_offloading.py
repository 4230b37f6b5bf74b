"""Bases that accelerate offloads or dispatches: the text is `base.generate`'s, and heads are what they are elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import EOS, base_of, dynamo_of, random_tokens

from dynamo_lm import DynaMoForCausalLM, InputError
from dynamo_lm.backbone.base_model import fingerprint
from dynamo_lm.model.configuration import MEDUSA

accelerate = pytest.importorskip("accelerate", reason="needs the package accelerate")

CPU = torch.device("cpu")
IDS = random_tokens(3, 7)
MASK = torch.ones_like(IDS)
MASK[0, :3] = 0


def cpu_offload(base, folder: Path) -> None:
    accelerate.cpu_offload(base, execution_device=CPU)


def disk_offload(base, folder: Path) -> None:
    accelerate.disk_offload(base, folder, execution_device=CPU)


def dispatch(base, folder: Path) -> None:
    """Embedding and the first layer on one device, the rest on disk."""
    parts = {name: "disk" for name in ("model.layers.1", "model.layers.2", "model.norm", "model.rotary_emb", "lm_head")}
    accelerate.dispatch_model(
        base, {"model.embed_tokens": "cpu", "model.layers.0": "cpu", **parts}, main_device="cpu", offload_dir=folder
    )


def hooks_alone(base, folder: Path) -> None:
    """Hooks that move nothing, on the whole model."""
    accelerate.dispatch_model(base, {"": "cpu"}, force_hooks=True)


WRAPS = [cpu_offload, disk_offload, dispatch, hooks_alone]
GREEDY = {"attention_mask": MASK, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": EOS}


def assert_decodes_like(model: DynaMoForCausalLM, plain: DynaMoForCausalLM) -> None:
    """The base's own text, in the same steps as without accelerate."""
    expected = model.base.generate(IDS, **GREEDY)
    output, other = (each.generate(IDS, tree=0, return_dict_in_generate=True, **GREEDY) for each in (model, plain))
    assert output.sequences.equal(expected) and other.sequences.equal(expected)
    assert [s.step_sizes for s in output.statistics] == [s.step_sizes for s in other.statistics]


@pytest.mark.parametrize(
    ("name", "wrap"),
    [*(("llama", wrap) for wrap in WRAPS), ("gemma2", dispatch)],  # gemma2: logits are capped after the output embedding
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_base_that_was_wrapped_carries_heads(name, wrap, tmp_path):
    base = base_of(name)
    before = fingerprint(base)
    wrap(base, tmp_path)
    assert fingerprint(base) == before
    model = DynaMoForCausalLM.from_base(base, num_heads=3, init="copy").eval()
    assert not any(parameter.is_meta for parameter in model.heads.parameters())
    assert not any("_hf_hook" in vars(part) or "forward" in vars(part) for part in model.heads.modules())
    plain = dynamo_of(name, init="copy")
    with torch.no_grad():
        torch.testing.assert_close(model.logits(IDS), plain.logits(IDS))
    assert_decodes_like(model, plain)


@pytest.mark.parametrize("wrap", [cpu_offload, hooks_alone], ids=lambda wrap: wrap.__name__)
def test_a_base_that_is_wrapped_later_decodes_as_before(wrap, tmp_path):
    model, plain = dynamo_of("llama", init="copy"), dynamo_of("llama", init="copy")
    model.generate(IDS, **GREEDY)
    wrap(model.base, tmp_path)
    assert_decodes_like(model, plain)
    for verify in ("strict", "off"):
        how = {**GREEDY, "do_sample": True, "seed": 1, "top_k": 8, "verify": verify, "alpha_c": 0.0}
        assert model.generate(IDS, **how).equal(plain.generate(IDS, **how))


@pytest.mark.parametrize("options", [MEDUSA, {"coupling_rank": 4}], ids=["medusa", "a coupling"])
def test_other_heads_on_an_offloaded_base(options):
    torch.manual_seed(0)
    plain = dynamo_of("llama", **options)
    base = base_of("llama")
    cpu_offload(base, Path())
    model = DynaMoForCausalLM.from_base(base, num_heads=3, **options).eval()
    if model.coupling is not None:
        for ups in plain.coupling.ups:
            ups.data.normal_()
        model.coupling.load_state_dict(plain.coupling.state_dict())
    model.heads.load_state_dict(plain.heads.state_dict())
    assert_decodes_like(model, plain)


def test_the_base_is_as_it_was_after_decoding():
    base = base_of("llama")
    cpu_offload(base, Path())
    layers, parts = list(base.model.layers), {name: id(part) for name, part in base.named_modules()}
    DynaMoForCausalLM.from_base(base, num_heads=3).generate(IDS, **GREEDY)
    assert list(base.model.layers) == layers and {name: id(part) for name, part in base.named_modules()} == parts
    assert all(parameter.is_meta for parameter in base.parameters())


PARTS = (
    "model.embed_tokens",
    "model.layers.0",
    "model.layers.1",
    "model.layers.2",
    "model.norm",
    "model.rotary_emb",
    "lm_head",
)


@pytest.mark.parametrize("weights", ["full", "heads"])
def test_from_pretrained_takes_a_device_map(weights, tmp_path):
    base_of("llama").save_pretrained(tmp_path / "base")
    plain = DynaMoForCausalLM.from_base(str(tmp_path / "base"), num_heads=3, init="copy").eval()
    plain.save_pretrained(tmp_path / "model", weights=weights)
    places = {part: "disk" if part.startswith(("model.layers.1", "model.layers.2")) else "cpu" for part in PARTS}
    if weights == "full":
        places = {"heads": "cpu"} | {f"base.{part}": place for part, place in places.items()}
    model = DynaMoForCausalLM.from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "away").eval()
    assert model.last_layer.mlp.up_proj.weight.is_meta
    assert_decodes_like(model, plain)
    model.save_pretrained(tmp_path / "again", weights=weights)
    with torch.no_grad():
        assert torch.equal(DynaMoForCausalLM.from_pretrained(tmp_path / "again").logits(IDS), plain.logits(IDS))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"adapter_rank": 2}, "Adapters share the last layer's weights, which accelerate moves"),
        ({"head": "eagle3"}, "An eagle3 head needs a base that is whole on one device"),
    ],
)
def test_heads_that_need_the_bases_weights_in_place_are_refused(options, reason):
    base = base_of("llama")
    cpu_offload(base, Path())
    with pytest.raises(InputError, match=reason):
        DynaMoForCausalLM.from_base(base, num_heads=3, **options)


@pytest.mark.parametrize("part", ["model", "model.layers.1", "model.layers.2", "model.layers.2.mlp"])
def test_a_forward_that_a_user_put_in_place_of_a_parts_own_is_called(part):
    model = dynamo_of("llama", init="copy")
    module, calls = model.base.get_submodule(part), []
    original = module.forward

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    module.forward = counted
    expected = model.base.generate(IDS, **GREEDY)
    calls.clear()
    assert model.generate(IDS, **GREEDY).equal(expected)
    assert calls


def test_a_forward_in_place_of_the_whole_bases_is_refused():
    model = dynamo_of("llama")
    original = model.base.forward
    model.base.forward = lambda *args, **kwargs: original(*args, **kwargs)
    with pytest.raises(InputError, match="The forward of LlamaForCausalLM was replaced"):
        model.generate(IDS, **GREEDY)
