"""Models on another device than the CPU: nothing meets what lies elsewhere, the results are the same, the host seldom waits.

There is no accelerator here, so the device is pretended (`pretend.py`, which says what that cannot show).
"""

from __future__ import annotations

import contextlib
import copy
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from architectures import VOCABULARY, dynamo_of, random_tokens
from pretend import THERE, Device
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from dynamo_lm import DynaMoForCausalLM
from dynamo_lm.cooccurrence.counting import count
from dynamo_lm.data.packing import Blocks
from dynamo_lm.decoding import candidates, draft_vocabulary
from dynamo_lm.decoding.batch import Batch, DecodingOptions, decode
from dynamo_lm.model.configuration import MEDUSA
from dynamo_lm.sampling.options import Algorithm1
from dynamo_lm.sampling.top_k import highest
from dynamo_lm.training.loss import heads_loss
from dynamo_lm.training.options import TrainingOptions
from dynamo_lm.training.trainer import train
from dynamo_lm.training.validation import perplexities

N = 4
PROMPTS = [random_tokens(length, seed=length).tolist() for length in (6, 9, 3, 12, 7)]
LINKED = {"coupling_rank": 4}


@cache
def models(name: str, **options: Any) -> tuple[DynaMoForCausalLM, DynaMoForCausalLM, Device]:
    """The same model on the CPU and on a pretended device, with copied heads, so that drafts are right now and then."""
    model = dynamo_of(name, N, **({"init": "copy"} | options))
    if model.coupling is not None:
        for up in model.coupling.ups:
            torch.nn.init.normal_(up, std=0.3)
    model.cooccurrence = count([np.array(prompt) for prompt in PROMPTS] * 2, vocab_size=VOCABULARY, order=N)
    device = Device()
    return model, device.there(copy.deepcopy(model)), device


def tokens_of(rows: list[Any]) -> list[list[int]]:
    return [row.new_tokens for row in rows]


# ---------------------------------------------------------------- the pretended device itself


def test_the_device_refuses_what_a_gpu_refuses_and_counts_what_makes_the_host_wait():
    device = Device()
    with device:
        there, here = torch.zeros(3, 4, device=THERE), torch.ones(3, 4)
        for mixed in (
            lambda: there + here,
            lambda: torch.cat([there, here]),
            lambda: here @ there.T,
            lambda: here[torch.zeros(1, dtype=torch.long, device=THERE)],
            lambda: there.index_select(0, torch.tensor([0])),
            lambda: there.index_copy_(1, torch.tensor([0]), there[:, :1]),
            lambda: torch.where(here > 0, there, there),
            lambda: torch.nn.functional.embedding(torch.tensor([0]), there),
        ):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        with pytest.raises(RuntimeError, match="numpy"):
            there.numpy()
        assert device.waits == 0
        there[:, 1:] += torch.tensor(2.0) * 3  # a number
        assert device.waits == 0
        assert there[torch.tensor([1])].tolist() == [[0, 6, 6, 6]]
        assert device.counts == {"stalls": 1, "reads": 1}
        assert there.sum().item() == 54 and bool(there.any()) and torch.equal(there, there)
        assert there[there > 0].to(THERE).shape == (9,)
        assert device.counts == {"stalls": 1, "reads": 5}
        torch.tensor([1], device=THERE), here.to(THERE), here.to(THERE, non_blocking=True), torch.ones(2, device=THERE)
        assert device.counts == {"stalls": 3, "reads": 5, "uploads": 1}
        early = (there + 1).to("cpu", non_blocking=True)
        assert early.isnan().all() and device.counts["downloads"] == 1
        there.cpu()
        assert early.tolist() == [[1, 7, 7, 7]] * 3
    with pytest.raises(RuntimeError, match="no pretended device"):
        there + 1


# ---------------------------------------------------------------- decoding

# The host waits once a step, for the base's logits and the other heads' candidates behind all absorbed tokens.
# Tokens, mask and positions go the other way, and where candidates are wanted; in rows of several lengths also where keys
# are written, by row and slot, once for the stem's entries and once for that of all heads. Where a tree branched, what stays
# is moved in each entry.
READS, UPLOADS = 1, 4
ARRANGING = 1  # read when a model is arranged for decoding, and a coupling's table of tokens
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"tree": 0},
    "sampled": {"sample": True},
    "tree": {"tree": 6},
    "budget": {"verify": 0.5, "tree": 0},
    "budget-tree": {"verify": 0.5, "tree": 6},
    "budget-sampled": {"verify": 0.5, "sample": True},
    "one-head": {"num_heads": 1},
    "off": {"verify": "off", "sample": True, "algorithm": Algorithm1(alpha_c=0.0, top_k=10, eps_b=0.1)},
    "off-greedy": {"verify": "off", "algorithm": Algorithm1(alpha_c=1.0, top_k=20, eps_b=0.0), "logprobs": 1},
    "off-one-head": {"verify": "off", "sample": True, "num_heads": 1, "algorithm": Algorithm1(top_k=10)},
    "logprobs": {"tree": 0, "logprobs": 2, "prompt_logprobs": True},
}


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("mode", MODES)
def test_decoding_elsewhere_is_decoding_here_and_the_host_waits_once_a_step(mode, rows):
    model, there, device = models("gpt_neox")
    options = DecodingOptions(**({"max_new_tokens": 10, "num_heads": N} | MODES[mode]))
    expected = decode(model, PROMPTS[:rows], options, seeds=range(rows))
    with device:
        batch = Batch(there, options.num_heads)
        found = [batch.join(prompt, options, seed=seed) for seed, prompt in enumerate(PROMPTS[:rows])]
        batch.step()
        steps = 0
        while batch.running:
            device.counts.clear()
            batch.step()
            assert device.counts["stalls"] == 0
            assert device.counts["reads"] == READS
            if len(batch.running) == rows:  # else the others are moved together, three copies for each of their entries
                steps += 1
                assert device.counts["uploads"] <= UPLOADS + 4 * (rows > 1) + (3 * 3 if options.tree else 0)
        assert steps > 1
    assert tokens_of(found) == tokens_of(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.statistics.log_likelihood == pytest.approx(theirs.statistics.log_likelihood, abs=1e-3)
        assert mine.statistics.accepted == theirs.statistics.accepted
        for score, other in zip(
            [*mine.scores, *mine.prompt_scores[1:]], [*theirs.scores, *theirs.prompt_scores[1:]], strict=True
        ):
            assert score.log_prob == pytest.approx(other.log_prob, abs=1e-4)
            assert [token for token, _ in score.top] == [token for token, _ in other.top]


@pytest.mark.parametrize("mode", ["greedy", "sampled", "off", "off-one-head", "tree"])
def test_a_coupling_elsewhere(mode):
    model, there, device = models("gpt_neox", **LINKED)
    options = DecodingOptions(**({"max_new_tokens": 10, "num_heads": N} | MODES[mode]))
    expected = tokens_of(decode(model, PROMPTS[:1], options, seeds=[0]))
    device.counts.clear()
    with device:
        found = decode(there, PROMPTS[:1], options, seeds=[0])
    assert tokens_of(found) == expected
    assert device.counts["stalls"] == 0
    assert device.counts["reads"] == 2 * ARRANGING + READS * found[0].statistics.forwards


MIXED = [
    {"tree": 0},
    {"tree": 6},
    {"sample": True, "temperature": 0.8},
    {"sample": True, "algorithm": Algorithm1(alpha_c=0.0, top_k=5)},
    {"verify": "off", "sample": True, "algorithm": Algorithm1(top_k=9, eps_b=0.1)},
]


@pytest.mark.parametrize(
    ("options", "at_once"), [({}, 0), (LINKED, candidates.AT_ONCE)], ids=["plain, later", "coupling, at once"]
)
def test_rows_of_all_kinds_elsewhere_alone_and_together(options, at_once, monkeypatch):
    monkeypatch.setattr(candidates, "AT_ONCE", at_once)
    monkeypatch.setattr(draft_vocabulary, "LEAST", 20)
    monkeypatch.setattr(draft_vocabulary, "COVERED", 0.5)

    def together(model: DynaMoForCausalLM) -> list[list[int]]:
        batch, each = Batch(model, N), [DecodingOptions(max_new_tokens=10, num_heads=N, **how) for how in MIXED]
        rows = [batch.join(prompt, how, seed=seed) for seed, (prompt, how) in enumerate(zip(PROMPTS, each, strict=True))]
        while batch.running:
            device.counts.clear()
            batch.step()
            assert model.device == torch.device("cpu") or device.counts["reads"] <= (1 if at_once else 1 + len(MIXED))
        return tokens_of(rows)

    model, there, device = models("gpt_neox", **options)
    for each in (model, there):
        each.runtime.draft_vocabulary = None
    expected = together(model)
    assert model.runtime.draft_vocabulary[-1] is not None
    for seed, (prompt, how) in enumerate(zip(PROMPTS, MIXED, strict=True)):
        chosen = DecodingOptions(max_new_tokens=10, num_heads=N, **how)
        assert tokens_of(decode(model, [prompt], chosen, seeds=[seed])) == [expected[seed]]
        with device:
            assert tokens_of(decode(there, [prompt], chosen, seeds=[seed])) == [expected[seed]]
    with device:
        assert together(there) == expected
    for each in (model, there):
        each.runtime.draft_vocabulary = None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_highest_logits_elsewhere_are_those_here_in_the_same_order(dtype):
    few = torch.randint(-3, 4, (3, 5, 60), generator=torch.Generator().manual_seed(0)) * 0.25  # many are equal
    odd = torch.tensor([0.0, -0.0, -torch.inf, 1e-42, -1e-42, 6e4, -6e4, 0.0, 1.0, -1.0]).repeat(6).expand(1, 5, 60)
    logits, device = torch.cat([few, few * 1e-3, torch.randn(3, 5, 60), odd]).to(dtype), Device()
    for k in (1, 7, 60):
        ids, values = highest(logits, k)
        with device:
            device.counts.clear()
            found = highest(logits.to(THERE, non_blocking=True), k)
            assert device.waits == 0
            assert torch.equal(found[0].cpu(), ids) and torch.equal(found[1].cpu().double(), values)
    logits[0, 0, 7] = torch.nan
    with device:
        assert highest(logits.to(THERE), 1)[0][0, 0].tolist() == [7]  # which `Heads.ranked` refuses


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("gemma3", {}),
        ("gpt2", {"layers_per_head": 2}),
        ("opt", {"feed": "last"}),
        ("llama", {"adapter_rank": 2}),
        ("llama", dict(MEDUSA)),
    ],
    ids=["llama", "sliding", "two-layers", "feed-last", "adapter", "medusa"],
)
def test_all_kinds_of_models_elsewhere(name, options):
    model, there, device = models(name, **options)
    chosen = DecodingOptions(max_new_tokens=6, num_heads=N, tree=4)
    expected = tokens_of(decode(model, PROMPTS[:2], chosen, seeds=[0, 1]))
    with device:
        assert tokens_of(decode(there, PROMPTS[:2], chosen, seeds=[0, 1])) == expected


def test_rows_join_and_leave_elsewhere():
    def story(model: DynaMoForCausalLM) -> list[list[int]]:
        batch, options = Batch(model, N), DecodingOptions(max_new_tokens=12, num_heads=N, tree=0)
        short = DecodingOptions(max_new_tokens=3, num_heads=N, sample=True)
        rows = [batch.join(prompt, options, seed=0) for prompt in PROMPTS[:3]]
        batch.step()
        rows.append(batch.join(PROMPTS[3], short, seed=1))  # behind the others,
        batch.step()
        batch.leave(rows[1])
        rows += [batch.join(PROMPTS[4], options, seed=0), batch.join(PROMPTS[1], short, seed=2)]  # and in an empty seat
        while batch.running:
            batch.step()
        return tokens_of(rows)

    model, there, device = models("gpt_neox")
    expected = story(model)
    device.counts.clear()
    with device:
        assert story(there) == expected
    assert device.counts["stalls"] == 0


def test_a_cache_of_fixed_size_elsewhere(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model, there, device = models("gpt_neox")
    options = DecodingOptions(max_new_tokens=12, num_heads=N, compile=True)
    expected = tokens_of(decode(model, PROMPTS[:1], DecodingOptions(max_new_tokens=12, num_heads=N), seeds=[0]))
    device.counts.clear()
    with device:
        found = decode(there, PROMPTS[:1], options, seeds=[0])
    assert tokens_of(found) == expected
    assert device.counts["stalls"] == 0 and device.counts["reads"] == ARRANGING + READS * found[0].statistics.forwards


class Forbids(LogitsProcessor):
    """A user's own, with a tensor on the model's device."""

    def __init__(self, forbidden: Tensor):
        self.forbidden = forbidden

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(1, self.forbidden, -torch.inf)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "top_k": 5, "top_p": 0.9, "seed": 3},
        {"min_new_tokens": 6, "eos_token_id": list(range(3, 90))},
        {"min_length": 16, "eos_token_id": list(range(3, 90)), "epsilon_cutoff": 0.001, "do_sample": True, "seed": 1},
        {"suppress_tokens": [5, 6], "repetition_penalty": 1.2, "bad_words_ids": [[7], [8, 9]], "max_time": 60.0},
    ],
    ids=lambda options: next(iter(options)),
)
def test_generate_elsewhere(options):
    model, there, device = models("gpt_neox")
    ids = torch.tensor([[0] * (9 - len(prompt)) + prompt for prompt in PROMPTS[:2]])
    mask, common = (ids > 0).long(), {"max_new_tokens": 8, "pad_token_id": 0} | options
    forbidden = torch.tensor([10, 11])
    expected = model.generate(ids, attention_mask=mask, logits_processor=LogitsProcessorList([Forbids(forbidden)]), **common)
    with device:
        more = LogitsProcessorList([Forbids(forbidden.to(THERE))])
        found = there.generate(ids.to(THERE), attention_mask=mask.to(THERE), logits_processor=more, **common)
        assert found.device == THERE and more[0].forbidden.device == THERE
        assert found.tolist() == expected.tolist()


# ---------------------------------------------------------------- training


@pytest.fixture
def no_autocast(monkeypatch):
    """There is none for the pretended device."""
    monkeypatch.setattr(torch, "autocast", lambda *_, enabled: contextlib.nullcontext())


def blocks() -> Blocks:
    class Store:
        tokens, offsets, responses = random_tokens(400).numpy(), np.arange(0, 401, 50), None

    return Blocks(Store(), np.arange(8), 32, seed=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, LINKED, {"own_output_embedding": True}], ids=["plain", "coupling", "own-output"])
def test_losses_and_gradients_elsewhere(options, no_autocast):
    model, there, device = models("gpt_neox", **options)
    batch, chosen = blocks().batch(0, 2), TrainingOptions(steps=1, bf16=False)
    expected = heads_loss(model, **batch, options=chosen, counts=[60] * N)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    device.counts.clear()
    with device:
        moved = {name: value.to(THERE) for name, value in batch.items()}
        device.counts.clear()
        found = heads_loss(there, **moved, options=chosen, counts=[60] * N)
        assert device.counts == {"reads": 1}
        torch.testing.assert_close(found, expected)
        assert gradients
        for name, parameter in there.named_parameters():
            if name in gradients:
                torch.testing.assert_close(parameter.grad.cpu(), gradients[name], msg=name)
        measured = perplexities(there, blocks(), batch_size=2, bf16=False, limit=2).heads
        assert measured == pytest.approx(perplexities(model, blocks(), batch_size=2, bf16=False, limit=2).heads, rel=1e-4)
    model.zero_grad()
    there.zero_grad()


def test_a_training_run_elsewhere(tmp_path, monkeypatch, no_autocast):
    monkeypatch.setattr("dynamo_lm.training.trainer.save_checkpoint", lambda *_: None)
    options = TrainingOptions(steps=2, batch_size=4, accumulation=2, bf16=False, validate_every=2)
    model = dynamo_of("gpt_neox", 2, **LINKED)
    device, losses, waits = Device(), [], []
    there = device.there(copy.deepcopy(model))
    train(model, blocks(), None, options, tmp_path / "here", report=lambda progress: losses.append(progress.losses))

    def report(progress: Any) -> None:
        assert progress.losses == pytest.approx(losses[len(waits)], rel=1e-5)
        waits.append(device.waits)

    with device:
        train(there, blocks(), None, options, tmp_path / "there", report=report)
    assert waits[1] - waits[0] == 7  # tokens, segments, positions; the losses of both halves; the lengths of two gradients
