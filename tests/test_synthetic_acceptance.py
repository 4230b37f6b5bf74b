"""Drafts that are accepted by chance: every length of rollback, against a slow loop without any cache."""

from __future__ import annotations

import json

import pytest
import torch
from architectures import base_of, dynamo_of, random_tokens
from commandline import Run, byte_tokenizer, neox
from transformers import LlamaConfig, LlamaForCausalLM

from dynamo_lm import DynaMoForCausalLM, InputError
from dynamo_lm.bench import methods
from dynamo_lm.decoding.batch import Batch, decode
from dynamo_lm.decoding.options import DecodingOptions
from dynamo_lm.decoding.sequence import SequenceState
from dynamo_lm.model.configuration import MEDUSA

N = 4
NEW = 28
PROMPTS = [tokens.tolist() for tokens in random_tokens(3, 9).split(1)]
PROMPTS = [row[:length] for (row,), length in zip(PROMPTS, (9, 4, 6), strict=True)]


def options(probability: float | None, new: int = NEW, **more) -> DecodingOptions:
    return DecodingOptions(new, more.pop("num_heads", N), synthetic_acceptance=probability, **more)


@torch.inference_mode()
def slow(model: DynaMoForCausalLM, prompt: list[int], probability: float, seed: int) -> tuple[list[int], list[int]]:
    """New tokens and step sizes by forwards over the whole text: no cache, nothing to roll back."""
    generator, text, drafts, sizes = torch.Generator().manual_seed(seed), list(prompt), [], []
    while len(text) < len(prompt) + NEW:
        accepted = 0
        while accepted < len(drafts) and torch.rand((), generator=generator, dtype=torch.float64) < probability:
            accepted += 1
        text += drafts[:accepted]
        choices = model.logits(torch.tensor([text]))[:, 0, -1].argmax(-1).tolist()  # of heads 1..n
        text.append(choices[0])
        sizes.append(accepted + 1)
        drafts = choices[1 : len(prompt) + NEW - len(text)]
    return text[len(prompt) :], sizes


def assert_slow(model: DynaMoForCausalLM, sequence: SequenceState, probability: float, seed: int) -> None:
    prompt = sequence.tokens[: sequence.prompt_length]
    assert (sequence.new_tokens, sequence.statistics.step_sizes) == slow(model, prompt, probability, seed)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "falcon"])
def test_every_rollback_leaves_the_cache_as_if_the_drafts_had_never_been(name):
    model = dynamo_of(name, N)
    sequences = decode(model, PROMPTS, options(0.6), seeds=[0, 1, 2])
    sizes = {size for sequence in sequences for size in sequence.statistics.step_sizes}
    assert sizes == {1, 2, 3, 4}  # so from none to all three drafts were rolled back
    for seed, sequence in enumerate(sequences):
        assert_slow(model, sequence, 0.6, seed)
        (alone,) = decode(model, PROMPTS[seed : seed + 1], options(0.6), seeds=[seed])
        assert alone.tokens == sequence.tokens


@pytest.mark.parametrize(
    "kind", [{"layers_per_head": 2}, MEDUSA, {"adapter_rank": 2}], ids=["two layers", "medusa", "adapter"]
)
def test_other_heads_roll_back_too(kind):
    model = dynamo_of("llama", N, **kind)
    for seed, sequence in enumerate(decode(model, PROMPTS, options(0.5), seeds=[0, 1, 2])):
        assert_slow(model, sequence, 0.5, seed)


def test_sequences_that_join_and_leave_roll_back_alone():
    model = dynamo_of("gemma3", N)
    batch = Batch(model, N)
    sequences = [batch.join(PROMPTS[0], options(0.6), seed=0)]
    for seed in (1, 2):
        batch.step()
        batch.step()
        sequences.append(batch.join(PROMPTS[seed], options(0.6), seed=seed))
    while batch.running:
        batch.step()
    for seed, sequence in enumerate(sequences):
        assert_slow(model, sequence, 0.6, seed)


def test_a_cache_of_fixed_size_rolls_back_too(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model = dynamo_of("gpt_neox", N)
    (sequence,) = decode(model, PROMPTS[:1], options(0.6, compile=True), seeds=[0])
    assert_slow(model, sequence, 0.6, 0)


def eagle3() -> DynaMoForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 7, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=97, **sizes, eos_token_id=None)).eval()
    return DynaMoForCausalLM.from_base(base, num_heads=N, head="eagle3").eval()


@pytest.mark.parametrize("make", [lambda: dynamo_of("qwen3", N), eagle3], ids=["parallel heads", "eagle3"])
@torch.inference_mode()
def test_0_is_one_token_at_a_time_and_1_accepts_everything(make):
    model = make()
    one = [sequence.new_tokens for sequence in decode(model, PROMPTS, DecodingOptions(NEW, 1), seeds=[0, 0, 0])]
    for sequence, expected in zip(decode(model, PROMPTS, options(0.0), seeds=[0, 0, 0]), one, strict=True):
        assert sequence.new_tokens == expected
        assert sequence.statistics.step_sizes == [1] * NEW
        assert (sequence.statistics.regret, sequence.statistics.unverified) == (0, 0)
    for sequence in decode(model, PROMPTS, options(1.0), seeds=[0, 0, 0]):
        assert sequence.statistics.step_sizes == [1, *[N] * 6, 3]
        assert sequence.statistics.acceptance == [1.0] * (N - 1)
        ends = [sequence.prompt_length + sum(sequence.statistics.step_sizes[:step]) for step in range(1, 9)]
        for end in ends:  # the last token of a step is the base's own after whatever stands before it
            assert model.base(torch.tensor([sequence.tokens[: end - 1]])).logits[0, -1].argmax() == sequence.tokens[end - 1]
        best = model.base(torch.tensor([sequence.tokens])).logits[0, sequence.prompt_length - 1 : -1].log_softmax(-1)
        lost = best.max(-1).values - best[range(NEW), sequence.new_tokens]
        assert sequence.statistics.regret == pytest.approx(float(lost.sum()), abs=1e-3)


def test_the_seed_decides():
    model, ids = dynamo_of("llama", N), torch.tensor(PROMPTS[:1])
    first, again, other = (
        model.generate(
            ids, do_sample=False, eos_token_id=None, max_new_tokens=NEW, return_dict_in_generate=True, seed=seed,
            synthetic_acceptance=0.5,
        ).statistics[0].step_sizes
        for seed in (3, 3, 4)
    )  # fmt: skip
    assert first == again != other


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"synthetic_acceptance": 1.5}, "synthetic_acceptance is 1.5; give a probability"),
        ({"synthetic_acceptance": 0.5, "do_sample": True}, "goes with greedy decoding"),
        ({"synthetic_acceptance": 0.5, "verify": 0.1}, "goes with greedy decoding"),
        ({"synthetic_acceptance": 0.5, "tree": 4}, "chains of drafts"),
    ],
)
def test_what_it_does_not_go_with_is_refused(more, reason):
    with pytest.raises(InputError, match=reason):
        dynamo_of("llama").generate(torch.tensor(PROMPTS[:1]), max_new_tokens=4, **more)


def test_no_file_of_a_model_can_switch_it_on():
    model = dynamo_of("llama", N)
    model.generation_config.synthetic_acceptance = 1.0
    output = model.generate(
        torch.tensor(PROMPTS[:1]), do_sample=False, max_new_tokens=12, tree=0, return_dict_in_generate=True
    )
    assert output.statistics[0].regret == 0


# ---------------------------------------------------------------- dynamo-lm bench --synthetic-acceptance


@pytest.fixture
def run(capfd) -> Run:
    return Run(capfd)


def test_a_base_without_heads_is_timed_with_random_ones_and_nothing_is_said_of_quality(run, tmp_path):
    neox().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "two.txt").write_text("one\ntwo\n")
    chosen = ("--prompts", tmp_path / "two.txt", "--repetitions", "1", "-n", "40", "--no-compile", "--heads", "3")
    printed = run("bench", tmp_path / "base", *chosen, "--synthetic-acceptance", "0.7", "--out", tmp_path / "out")
    assert "synthetic: 0.7 of drafts accepted, n=3 *" in printed
    assert "drafts were accepted by chance" in printed and "say nothing about quality" in " ".join(printed.split())
    assert "like" not in printed.split("Not raced")[0] and "same\ntexts" not in printed
    (raced,) = json.loads((tmp_path / "out" / "bench.json").read_text())["races"]
    rows = {row["name"]: row for row in raced["methods"]}
    assert [name for name, row in rows.items() if row["synthetic"]] == [
        f"synthetic: 0.7 of drafts accepted, n={n}" for n in (2, 3)
    ]
    assert not any("DynaMo" in name for name in rows)
    for n in (2, 3):
        row = rows[f"synthetic: 0.7 of drafts accepted, n={n}"]
        assert {row[key] for key in ("log_likelihood", "regret", "distinct_bigrams", "identical")} == {None}
        assert not row["lossless"]
        expected = sum(0.7**place for place in range(n))
        assert abs(row["tokens_per_step"] - expected) < 0.35  # two texts of 40 tokens
    assert rows[methods.ONE]["tokens_per_step"] == 1


def test_without_the_option_a_base_without_heads_is_refused(run, tmp_path):
    base_of("llama").save_pretrained(tmp_path / "base")
    assert "has no DynaMo heads" in run.refused("bench", tmp_path / "base")
    assert "--synthetic-acceptance is 2" in run.refused("bench", "story", "--synthetic-acceptance", "2")
