"""The learned coupling: its two forms against the definition, what it leaves alone, and how it learns."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import NAMES, VOCABULARY, base_of, cycle, dynamo_of, markov_base, random_tokens
from commandline import SMALL, Run, byte_tokenizer, neox, texts
from hypothesis import given
from hypothesis import strategies as st
from test_training import FROZEN, PLAIN, ROWS, gradients, log_of, pack, random_blocks, store_of, tiny
from torch import Tensor

from dynamo_lm import DynaMoConfig, DynaMoForCausalLM, InputError
from dynamo_lm.cli.main import main
from dynamo_lm.data.packing import Blocks
from dynamo_lm.model.coupling import Coupling, add_coupling
from dynamo_lm.training import loss, provenance
from dynamo_lm.training.checkpoints import latest_checkpoint
from dynamo_lm.training.loss import coupled_logits, heads_loss, target_counts
from dynamo_lm.training.memory_estimate import memory, parameters
from dynamo_lm.training.step import parameter_groups
from dynamo_lm.training.trainer import train
from dynamo_lm.training.validation import perplexities

TOKENS = random_tokens(2, 12)
PLAIN, FROZEN = replace(PLAIN, lr_c=0.02), replace(FROZEN, lr_c=0.02)
ALONE = replace(FROZEN, coupling_only=True)


def shaken(coupling: Coupling, seed: int = 0) -> Coupling:
    """With weights that change something."""
    with torch.no_grad():
        for parameter in coupling.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
            seed += 1
    return coupling


def coupled_tiny(seed: int = 0, **kwargs) -> DynaMoForCausalLM:
    model = tiny(seed=seed, **kwargs)
    shaken(add_coupling(model, 4))
    return model


def slow_correction(coupling: Coupling, head: int, hidden: Tensor, x: int, c: int, output_weight: Tensor) -> float:
    """<B (E[x] * sigmoid(G h + b)), W[c]>, a number at a time."""
    gate, bias, up = coupling.gates[head - 2], coupling.biases[head - 2], coupling.ups[head - 2]
    total = 0.0
    for r in range(coupling.rank):
        a = sum(gate[r, j].item() * hidden[j].item() for j in range(len(hidden))) + bias[r].item()
        z = coupling.tokens[x, r].item() / (1 + math.exp(-a))
        total += z * sum(up[j, r].item() * output_weight[c, j].item() for j in range(len(hidden)))
    return total


@given(
    sizes=st.tuples(*[st.integers(1, 5)] * 3), p=st.integers(1, 4), k=st.integers(1, 4), head=st.integers(2, 4),
    seed=st.integers(0, 2**16),
)  # fmt: skip
@torch.no_grad()
def test_both_corrections_are_the_definition(sizes, p, k, head, seed):
    vocabulary, size, rank = sizes
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocabulary, size, generator=generator)
    coupling = shaken(Coupling(4, rank, weight), seed)
    hidden = torch.randn(size, generator=generator)
    previous = torch.randint(vocabulary, (p,), generator=generator)
    candidates = torch.randint(vocabulary, (k,), generator=generator)
    expected = torch.tensor(
        [[slow_correction(coupling, head, hidden, x, c, weight) for c in candidates.tolist()] for x in previous.tolist()]
    )
    tolerance = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(coupling.correction(head, hidden, previous, candidates, weight), expected, **tolerance)
    correction = coupling.hidden_correction(head, hidden.expand(p, size), previous)  # (p, hidden)
    torch.testing.assert_close(correction @ weight[candidates].T, expected, **tolerance)


@torch.no_grad()
def test_the_correction_takes_several_positions_at_once():
    weight = torch.randn(7, 5)
    coupling = shaken(Coupling(3, 4, weight))
    hidden, previous, candidates = torch.randn(2, 3, 5), torch.randint(7, (2, 3, 4)), torch.randint(7, (2, 3, 6))
    found = coupling.correction(3, hidden, previous, candidates, weight)
    assert found.shape == (2, 3, 4, 6)
    for i in range(2):
        for j in range(3):
            one = coupling.correction(3, hidden[i, j], previous[i, j], candidates[i, j], weight)
            torch.testing.assert_close(found[i, j], one)


@pytest.mark.parametrize("options", [{}, {"own_output_embedding": True}], ids=["shared", "own"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_every_architecture_can_be_coupled(name, options):
    plain, model = dynamo_of(name, **options), dynamo_of(name, coupling_rank=4, **options)
    model.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(model.logits(TOKENS), plain.logits(TOKENS))  # heads alone are what they were
    states, before = model.hidden(TOKENS)[1].flatten(0, 1), TOKENS.flatten()
    logits = model.readout(states[None], 2)[0]
    assert torch.equal(coupled_logits(model, 2, states, before, logits), logits)  # untrained, it changes nothing

    shaken(model.coupling)
    corrected = coupled_logits(model, 2, states, before, logits)
    weight = model.output_weight(2)
    assert weight.shape == (VOCABULARY, states.shape[1])
    for position in (0, 5, 23):
        row = model.coupling.correction(
            2, states[position], before[position : position + 1], torch.arange(VOCABULARY), weight
        )
        torch.testing.assert_close(corrected[position] - logits[position], row[0], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_heads_with_their_own_output_embedding_are_corrected_through_it():
    model = dynamo_of("llama", own_output_embedding=True, coupling_rank=4)
    assert model.output_weight(1) is model.get_output_embeddings().weight
    assert model.output_weight(3) is model.heads[1].output.weight


def test_a_coupling_counts_as_overhead_and_not_as_base():
    model = dynamo_of("llama")
    before, heads = model.overhead(), [p.clone() for p in model.parameters()]
    coupling = add_coupling(model, 4)
    base = sum(p.numel() for p in model.base.parameters())
    size = VOCABULARY * 4 + 2 * (4 * 32 + 4 + 32 * 4)  # E, then G, b and B of two heads
    assert sum(p.numel() for p in coupling.parameters()) == size
    assert model.overhead() == pytest.approx(before + size / base)
    assert all(torch.equal(a, b) for a, b in zip(heads, model.parameters(), strict=False))
    assert model.config.coupling_rank == coupling.rank == 4
    count = parameters(model, frozen=True, coupling_only=True)
    assert count["coupling"] == count["trained"] == size


@pytest.mark.parametrize(
    ("model", "rank", "reason"),
    [
        ({"coupling_rank": 4}, 4, "already has a coupling of rank 4"),
        ({"num_heads": 1}, 4, "only the base's own"),
        ({}, 0, "rank of a coupling is 0"),
    ],
)
def test_couplings_without_meaning_are_refused(model, rank, reason):
    with pytest.raises(InputError, match=reason):
        add_coupling(dynamo_of("llama", **model), rank)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"coupling_rank": -1}, "coupling_rank is -1"),
        ({"coupling_rank": 0.5}, "coupling_rank is 0.5"),
        ({"coupling_rank": 4, "num_heads": 1}, "needs num_heads of 2 or more"),
    ],
)
def test_configurations_without_meaning_are_refused(options, reason):
    with pytest.raises(InputError, match=reason):
        DynaMoConfig(base_of("llama").config, **options)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["gpt_neox", "gemma3", "opt", "qwen3_moe"])
@torch.no_grad()
def test_a_coupling_is_saved_with_the_heads(tmp_path, name):
    base_of(name).save_pretrained(tmp_path / "base")
    model = DynaMoForCausalLM.from_base(str(tmp_path / "base"), num_heads=3).eval()
    shaken(add_coupling(model, 4))
    for weights in ("full", "heads"):
        model.save_pretrained(tmp_path / weights, weights=weights)
        opened = DynaMoForCausalLM.from_pretrained(str(tmp_path / weights))
        first, second = model.state_dict(), opened.state_dict()
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
        assert opened.coupling.rank == 4 and opened.overhead() == model.overhead()
        half = DynaMoForCausalLM.from_pretrained(str(tmp_path / weights), dtype=torch.bfloat16)
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


# ---------------------------------------------------------------- training


def naive_losses(model, rows) -> list[Tensor]:
    """Sums of -log p(x[t+i] | x[1:t], x[t+i-1]) for i = 2..n: each document alone, a position at a time."""
    sums = [torch.zeros(()) for _ in range(model.num_heads - 1)]
    for document in (document for row in rows for document in row):
        with torch.no_grad():
            hidden, logits = model.hidden(torch.tensor([document]))[:, 0], model.logits(torch.tensor([document]))[:, 0]
        for i in range(2, model.num_heads + 1):
            for t in range(len(document) - i):
                shift = model.coupling.hidden_correction(i, hidden[i - 1, t], torch.tensor(document[t + i - 1]))
                corrected = logits[i - 1, t] + model.output_weight(i).detach() @ shift
                sums[i - 2] = sums[i - 2] - torch.log_softmax(corrected, -1)[document[t + i]]
    return sums


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("options", [PLAIN, FROZEN, ALONE], ids=["jointly", "frozen base", "alone"])
@pytest.mark.parametrize("chunk", [5, 512])
@pytest.mark.parametrize("kwargs", [{}, {"own_output_embedding": True}], ids=str)
def test_losses_and_gradients_are_those_of_a_loop_over_positions(options, chunk, kwargs, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", chunk)
    model = coupled_tiny(**kwargs)
    if options.frozen:
        model.freeze_base()
    batch = pack(*ROWS)
    counts = target_counts(batch["tokens"], batch["segments"], 3)
    expected = naive_losses(model, ROWS)
    mean = sum(loss / count for loss, count in zip(expected, counts[1:], strict=True))
    names, parts = zip(*model.coupling.named_parameters(), strict=True)
    slow = dict(zip(names, torch.autograd.grad(mean, parts), strict=True))
    sums = heads_loss(model, **batch, options=options)
    assert sums.shape == (5,)
    assert sums[3:].tolist() == pytest.approx([loss.item() for loss in expected], rel=1e-5)
    found = gradients(model)
    assert_close({name: found[f"coupling.{name}"] for name in names}, slow)
    if options.coupling_only:
        assert not any(value.any() for name, value in found.items() if not name.startswith("coupling."))


@pytest.mark.parametrize("options", [PLAIN, FROZEN], ids=["three rates", "frozen"])
def test_heads_and_base_learn_exactly_as_without_a_coupling(options, tmp_path):
    options = replace(options, clip=0.1)  # shorter than the gradients are
    models = tiny(), coupled_tiny()
    for number, model in enumerate(models):
        train(model, random_blocks(), random_blocks(seed=1), options, tmp_path / str(number))
    one, other = (model.state_dict() for model in models)
    assert all(torch.equal(one[name], other[name]) for name in one)
    logs = [log_of(tmp_path / str(number)) for number in (0, 1)]
    assert [line["losses"] for line in logs[0]] == [line["losses"] for line in logs[1]]
    assert logs[0][-1]["ppl"] == logs[1][-1]["ppl"]


def test_alone_a_coupling_learns_and_nothing_else_moves(tmp_path):
    model = coupled_tiny()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    modes = []

    def report(progress):
        modes.append((model.base.training, model.heads.training, model.coupling.training))

    train(model, random_blocks(), random_blocks(seed=1), replace(ALONE, validate_every=2), tmp_path, report=report)
    assert modes == [(False, False, True)] * 4
    for name, p in model.state_dict().items():
        assert torch.equal(p, before[name]) != name.startswith("coupling."), name
    lines = log_of(tmp_path)
    assert all(len(line["coupled_losses"]) == 2 and line["losses"][0] == 0 for line in lines)
    assert [len(line["ppl_coupled"]) for line in lines if "ppl" in line] == [2, 2]


def test_a_coupling_learns_at_a_rate_of_its_own():
    rates = {}
    for group in parameter_groups(model := coupled_tiny(), PLAIN):
        rates |= {id(p): (group["lr"], group["weight_decay"]) for p in group["params"]}
    for name, p in model.named_parameters():
        rate = 1e-3 if name.startswith("base.") else 1e-2 if name.startswith("heads.") else 0.02
        assert rates[id(p)] == (rate, 0.01 if p.ndim == 2 else 0), name


def test_a_coupling_learns_what_the_heads_cannot_know(tmp_path):
    """Pairs of a random token and its successor: head 2 sees the token two places before, which says little."""
    size = 8
    generator = np.random.default_rng(0)
    text = np.stack([first := generator.integers(0, size, 600), (first + 1) % size], 1).flatten()
    model = DynaMoForCausalLM.from_base(markov_base(cycle(size)), 2, init="copy")
    add_coupling(model, 8)
    blocks = Blocks(store_of(text), np.arange(1), 40, seed=0)
    options = replace(ALONE, steps=80, lr_c=0.05)
    found = train(model, blocks, blocks, options, tmp_path)
    # Every second token follows from the one before it for certain, the others (log 8 = 2.08 nats) from nothing.
    assert math.log(found.coupled[0]) < 1.5 < 2.08 < math.log(found.heads[1])
    assert found.coupled_top1[0] > 0.45 > 0.2 > found.top1[1]


def test_coupled_perplexities_are_those_of_a_loop_over_the_positions_that_have_all_targets():
    model, blocks = coupled_tiny(), random_blocks()
    nlls, hits = [], []
    for tokens, segments, _ in (blocks.block(0, index) for index in range(7)):
        for piece in range(segments.max() + 1):
            document = torch.from_numpy(tokens[segments == piece])
            hidden, logits = model.hidden(document[None])[:, 0], model.logits(document[None])[:, 0]
            for t in range(len(document) - 3):
                lines = [logits[0, t]]
                for i in (2, 3):
                    states, before = hidden[i - 1, t : t + 1], document[t + i - 1 : t + i]
                    lines.append(coupled_logits(model, i, states, before, logits[i - 1, t : t + 1])[0])
                nlls.append([-line.log_softmax(-1)[document[t + i]].item() for i, line in enumerate(lines, start=1)])
                hits.append([line.argmax().item() == document[t + i].item() for i, line in enumerate(lines, start=1)])
    means, shares = np.mean(nlls, 0), np.mean(hits, 0)
    found = perplexities(model, blocks, batch_size=3, bf16=False, limit=7)
    assert (found.heads[0], *found.coupled) == pytest.approx(np.exp(means), rel=1e-5)
    assert (found.top1[0], *found.coupled_top1) == pytest.approx(shares)
    assert found.coupled_joint == pytest.approx(math.exp(means.mean()), rel=1e-5)
    assert "PPL_2|1" in str(found) and "PPL_3|2" in str(found)


def test_a_stopped_run_resumes_to_the_weights_of_one_that_was_not(tmp_path):
    options = replace(ALONE, checkpoint_every=2)
    whole = coupled_tiny()
    train(whole, random_blocks(), None, options, tmp_path / "whole")

    class StoppingCriterion(Exception):
        pass

    def stop(progress):
        if progress.step == 3:
            raise StoppingCriterion

    with pytest.raises(StoppingCriterion):
        train(coupled_tiny(), random_blocks(), None, options, tmp_path / "cut", report=stop)
    assert latest_checkpoint(tmp_path / "cut").name == "step-00000002"
    again = coupled_tiny()
    train(again, random_blocks(), None, options, tmp_path / "cut")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    assert log_of(tmp_path / "cut") != [] and [line["step"] for line in log_of(tmp_path / "cut")] == [1, 2, 3, 4]

    with pytest.raises(InputError, match="coupling_only=True, not False"):
        train(coupled_tiny(), random_blocks(), None, replace(options, coupling_only=False), tmp_path / "cut")
    other = tiny()
    add_coupling(other, 5)
    with pytest.raises(InputError, match="of another model"):
        train(other, random_blocks(), None, options, tmp_path / "cut")


def test_training_a_coupling_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match="no coupling to train"):
        train(tiny(), random_blocks(), None, ALONE, tmp_path)
    with pytest.raises(InputError, match="coupling_only leaves the base"):
        replace(PLAIN, coupling_only=True)


def test_alone_training_keeps_no_activations_of_the_model():
    model = dynamo_of("llama", coupling_rank=4).to("meta")
    jointly, alone = (memory(model, options, 16, fused=False) for options in (FROZEN, ALONE))
    assert alone["activations"] < jointly["activations"] and alone["gradients"] < jointly["gradients"]


# ---------------------------------------------------------------- the command line


@pytest.fixture
def run(capfd):
    return Run(capfd)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a base, a text, and under run/model finished heads."""
    folder = tmp_path_factory.mktemp("made")
    neox().save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()))
    options = ("--freeze", "--init", "copy", "--steps", "2", "--out", str(folder / "run"), *SMALL)
    assert main(["train", str(folder / "base"), "--data", str(folder / "text.jsonl"), *options]) == 0
    return folder


def test_train_couples_finished_heads_and_then_trains_them_further(run, made, tmp_path):
    heads, text = made / "run" / "model", ("--data", made / "text.jsonl", "--steps", 3, *SMALL)
    said = run("train", heads, *text, "--coupling-only", "--coupling-rank", 4, "--out", tmp_path / "a")
    assert "PPL_2|1 " in said and "PPL_3|2 " in said
    before, after = (DynaMoForCausalLM.from_pretrained(str(f)) for f in (heads, tmp_path / "a" / "model"))
    assert after.config.weights == "heads" and after.coupling.rank == 4 and after.coupling.ups[0].any()
    assert all(torch.equal(p, after.state_dict()[name]) for name, p in before.state_dict().items())
    losses = run.err.split("step 3/3")[1]
    two = r"heads 2-3: \d\.\d+ \d\.\d+"
    assert re.search(rf"loss in nats of {two} \(the base is frozen\)  coupled: {two}  [\d,]+ tok/s", losses)
    record = json.loads((tmp_path / "a" / "model" / "training.json").read_text())
    assert record["model"]["coupling_rank"] == 4 and record["options"]["coupling_only"]

    run("train", tmp_path / "a" / "model", *text, "--freeze", "--out", tmp_path / "b")  # a coupling goes on learning
    facts = json.loads(run("info", tmp_path / "b" / "model", "--json"))
    count = sum(p.numel() for p in after.coupling.parameters())
    assert (facts["coupling_rank"], facts["coupling_parameters"]) == (4, count)
    assert f"learned, of rank 4: {count:,} of the heads' parameters" in run("info", tmp_path / "b" / "model")
    assert "coupling" not in run("info", heads) and "Medusa" not in run("info", heads)
    further = DynaMoForCausalLM.from_pretrained(str(tmp_path / "b" / "model"))
    assert not torch.equal(further.coupling.ups[0], after.coupling.ups[0])
    refusal = run.refused("train", tmp_path / "a" / "model", *text, "--coupling", "learned", "--coupling-rank", 5,
                          "--out", tmp_path / "c")  # fmt: skip
    assert "coupling_rank=4, which cannot become 5" in refusal


def test_train_makes_heads_with_a_coupling_or_of_the_medusa_kind(run, made, tmp_path):
    text = ("--data", made / "text.jsonl", "--steps", 2, "--freeze", *SMALL)
    run("train", made / "base", *text, "--coupling", "learned", "--out", tmp_path / "a")
    assert DynaMoForCausalLM.from_pretrained(str(tmp_path / "a" / "model")).coupling.rank == 64
    run("train", made / "base", *text, "--head", "medusa", "--heads", 4, "--out", tmp_path / "b")
    model = DynaMoForCausalLM.from_pretrained(str(tmp_path / "b" / "model"))
    assert len(model.heads) == 3 and all(head.block.weight.any() and not head.layers for head in model.heads)
    assert "3 more, of the Medusa kind" in run("info", tmp_path / "b" / "model")
    facts = json.loads(run("info", tmp_path / "b" / "model", "--json"))
    assert facts["residual_block"] and facts["coupling_rank"] == facts["coupling_parameters"] == 0


@pytest.mark.parametrize(("key", "value"), [("residual_block", True), ("coupling_rank", 4)])
def test_a_run_resumes_with_its_own_kind_of_heads_and_coupling_only(tmp_path, key, value):
    record = {part: dict.fromkeys(keys) for part, keys in provenance.IDENTITY.items()}
    record["model"] |= {"residual_block": False, "coupling_rank": 0}
    old = {name: record["model"][name] for name in record["model"] if name not in ("residual_block", "coupling_rank")}
    provenance.write(tmp_path, record | {"model": old, "started": "then"})  # from before there were these
    assert provenance.check_same_run(tmp_path, record) == "then"
    other = record | {"model": record["model"] | {key: value}}
    with pytest.raises(InputError, match=rf"other model \({key} (False|0), not {value}\)"):
        provenance.check_same_run(tmp_path, other)
    provenance.write(tmp_path, other | {"started": "now"})
    assert provenance.check_same_run(tmp_path, other) == "now"


def test_a_dry_run_counts_the_coupling(run, made):
    run("train", made / "run" / "model", "--coupling-only", "--coupling-rank", 4, "--dry-run", "--json", *SMALL)
    count = json.loads(run.out)["parameters"]
    assert count["trained"] == count["coupling"] == 300 * 4 + 2 * (4 * 32 + 4 + 32 * 4) < count["heads"]
    assert "of them the coupling" in run("train", made / "base", "--coupling", "learned", "--dry-run", *SMALL)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--coupling", "counted"), '--coupling is "counted"'),
        (("--coupling-rank", 4), "goes with --coupling learned"),
        (("--coupling", "learned", "--coupling-rank", 0), "--coupling-rank is 0"),
        (("--coupling-only",), "needs a model with finished heads"),
        (("--head", "tail"), '--head is "tail"'),
        (("--head", "medusa", "--layers-per-head", 1), "leave --layers-per-head out"),
        (("--coupling", "learned", "--heads", 1), "coupling_rank joins heads"),
    ],
)
def test_options_without_meaning_are_refused(run, made, tmp_path, options, reason):
    said = run.refused("train", made / "base", "--data", made / "text.jsonl", *options, "--out", tmp_path / "x", *SMALL)
    assert reason in said
    assert not (tmp_path / "x" / "checkpoints").exists()
