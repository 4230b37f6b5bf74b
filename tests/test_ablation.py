"""The matrix of trained variants: equal starts, equal measures, and a run that can be stopped."""

from __future__ import annotations

import json
import math
import signal
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from commandline import Run, byte_tokenizer, neox, texts
from test_training import random_blocks, tiny

from dynamo_lm.data.packing import Blocks
from dynamo_lm.errors import InputError
from dynamo_lm.evaluation import ablation
from dynamo_lm.evaluation.ablation import against, block_losses, build
from dynamo_lm.evaluation.ablation_variants import BASE, VARIANTS, Settings, choose
from dynamo_lm.evaluation.perplexity.scoring import Sums
from dynamo_lm.training.validation import perplexities

SETTINGS = Settings(steps=4, batch_size=4, block_size=12, lr_b=1e-3, lr_m=1e-2, lr_mb=1e-4)


@pytest.fixture(autouse=True)
def short_prompts(monkeypatch):
    monkeypatch.setattr(ablation, "NEW_TOKENS", 6)
    monkeypatch.setattr(ablation, "PROMPTS", 5)


def base_of_tests():
    return tiny(num_heads=1).base


def held_out() -> Blocks:
    blocks = random_blocks(seed=1)
    return Blocks(blocks.store, blocks.documents, 12, seed=1, shuffle=False)


def silent(variant, number, total):
    @contextmanager
    def watch():
        yield lambda progress: None

    return watch()


def begun(folder, **changes):
    facts = {"data": {"fingerprint": "a"}, "settings": {"steps": 4}} | changes
    return ablation.begin_or_continue(folder, {"kind": "ablation", "model": {"identity": "x", "name": "tiny"}, **facts})


def rows_of(folder, names, base=None, watch=silent, **options) -> dict[str, dict]:
    """Rows by key without the time they took."""
    arguments = (base or base_of_tests(), random_blocks(), held_out(), choose(names), SETTINGS)
    results = ablation.run(begun(folder), folder, *arguments, watch=watch, **options)
    return {row["key"]: {key: value for key, value in row.items() if key != "seconds"} for row in results["rows"]}


# --- what the variants are ------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.key)
def test_every_variant_can_be_built_and_leaves_the_base_it_was_given(variant):
    base = base_of_tests()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = build(variant, base, seed=0)
    assert model.num_heads == variant.num_heads
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_extra_parameters_are_those_of_the_table():
    base = base_of_tests()  # 16 wide, 11 tokens: one layer has 4 * 16^2 + 2 * 16 * 32 weights, and biases and norms
    layer = sum(p.numel() for p in base.gpt_neox.layers[-1].parameters())
    found = {variant.key: build(variant, base, 0) for variant in VARIANTS}
    extra = {key: round(model.overhead() * sum(p.numel() for p in base.parameters())) for key, model in found.items()}
    assert extra["t2"] == extra["t2-h"] == extra["t2-copy"] == extra["t2-c"] == extra["t2-np"] == layer
    assert extra["t2-two"] == extra["t3"] == extra["t3-h-copy"] == 2 * layer
    assert extra["t4"] == 3 * layer
    assert extra["t2-own"] == 11 * 16
    assert extra["t2-layer-own"] == layer + 11 * 16
    # an adapter of rank 1 on 16 -> 48, 16 -> 16, 16 -> 32 and 32 -> 16 has as many weights as rows and columns
    assert extra["t2-lora"] == (16 + 48) + (16 + 16) + (16 + 32) + (32 + 16)
    assert extra["t1"] == 0


def test_learning_rates_follow_the_variant():
    rates = {variant.key: variant.options(SETTINGS) for variant in VARIANTS}
    assert (rates["t2"].lr_b, rates["t2"].lr_m, rates["t2"].lr_mb) == (1e-3, 1e-2, 1e-4)
    assert (rates["t2-h"].lr_b, rates["t2-h"].lr_m, rates["t2-h"].lr_mb) == (0, 1e-2, 0)
    assert (rates["t2-c"].lr_b, rates["t2-c"].lr_m, rates["t2-c"].lr_mb) == (1e-3, 1e-3, 1e-4)


# --- measuring ------------------------------------------------------------------


def test_perplexities_are_the_trainers_where_the_model_has_as_many_heads_as_targets_are_needed():
    model, blocks = tiny(num_heads=4), held_out()
    row, kept = ablation.measure(model, blocks, batch_size=4, end_token=None)
    expected = perplexities(model, blocks, batch_size=4, bf16=False, limit=10**6)
    assert [head["ppl"] for head in row["heads"]] == pytest.approx(expected.heads)
    assert [joint["ppl"] for joint in row["joint"]] == pytest.approx(expected.joint)
    assert kept["counts"].sum() == row["positions"]


def test_models_with_fewer_heads_are_scored_at_the_same_positions():
    blocks = held_out()
    four, four_counts = block_losses(tiny(num_heads=4), blocks, batch_size=4)
    one, one_counts = block_losses(build(BASE, tiny(num_heads=4).base, 0), blocks, batch_size=3)
    assert torch.equal(four_counts, one_counts)
    assert one[:, 0] == pytest.approx(four[:, 0], rel=1e-5)


def test_a_ratio_and_its_standard_error():
    # mean 12 / 6 = 2; residuals -1, 1 and 0; variance of the sum 3 / 2 * 2 = 3
    sums = Sums(np.array([1.0, 5, 6]), np.array([1.0, 2, 3]))
    assert (sums.mean, sums.mean_error) == pytest.approx((2.0, math.sqrt(3) / 6))
    alone = Sums(np.array([3.0]), np.array([2.0]))
    assert (alone.mean, alone.mean_error) == (1.5, None)


def test_paired_differences_have_no_error_where_every_block_moved_alike():
    counts = torch.tensor([10.0, 20.0])
    first = torch.tensor([[10.0, 30.0], [60.0, 80.0]])
    second = first - math.log(2) * counts[:, None]
    found = against(first, second, counts)
    assert found["PPL_1"] == {"ratio": pytest.approx(2.0), "se": pytest.approx(0, abs=1e-6)}
    assert found["PPL_1:2"] == {"ratio": pytest.approx(2.0), "se": pytest.approx(0, abs=1e-6)}
    assert list(against(first[:, :1], second, counts)) == ["PPL_1"]


def test_text_without_documents_long_enough_is_refused():
    short = random_blocks()
    short.store.offsets = torch.arange(0, len(short.store.tokens) + 1, 4).numpy()
    short = Blocks(short.store, range(len(short.store.offsets) - 1), 12, seed=0, shuffle=False)
    with pytest.raises(InputError, match="longer texts"):
        block_losses(tiny(num_heads=2), short, batch_size=4)


# --- the matrix -----------------------------------------------------------------


def test_two_runs_with_the_same_seed_have_identical_rows(tmp_path):
    names = ["t2", "t2-lora", "t1"]
    first, second = rows_of(tmp_path / "a", names), rows_of(tmp_path / "b", names)
    assert first == second
    assert list(first) == ["base", "t2", "t2-lora", "t1"]
    assert first["t2"]["tokens"] == 4 * 4 * 12
    assert first["t2"]["strict_tokens_per_step"] >= 1 and first["t1"]["strict_tokens_per_step"] == 1
    assert first["t2"]["heads"] != first["t2-lora"]["heads"]


def test_a_frozen_base_keeps_its_perplexity_and_a_trained_one_does_not(tmp_path):
    rows = rows_of(tmp_path, ["t2-h", "t2-h-copy", "t3-h-copy", "t2"])
    exact = rows["base"]["heads"][0]["ppl"]
    for key in ("t2-h", "t2-h-copy", "t3-h-copy"):
        assert rows[key]["heads"][0]["ppl"] == pytest.approx(exact, rel=1e-6), key
    assert rows["t2"]["heads"][0]["ppl"] != pytest.approx(exact, rel=1e-4)


def test_a_stopped_run_goes_on_to_the_rows_of_an_unbroken_one(tmp_path):
    names = ["t2", "t2-h"]

    def stopping(variant, number, total):
        @contextmanager
        def watch():
            yield lambda progress: signal.raise_signal(signal.SIGINT) if (number, progress.step) == (2, 2) else None

        return watch()

    with pytest.raises(KeyboardInterrupt):
        rows_of(tmp_path / "broken", names, watch=stopping)
    kept = json.loads((tmp_path / "broken" / "ablation.json").read_text())
    assert [row["key"] for row in kept["rows"]] == ["base", "t2"]
    assert (tmp_path / "broken" / "ablation" / "t2-h" / "checkpoints").is_dir()
    steps = []

    def counting(variant, number, total):
        @contextmanager
        def watch():
            yield lambda progress: steps.append((variant.key, progress.step))

        return watch()

    rows = rows_of(tmp_path / "broken", names, watch=counting)
    assert steps == [("t2-h", 3), ("t2-h", 4)]
    assert rows == rows_of(tmp_path / "whole", names)


def test_rows_may_be_added_and_models_are_kept_only_when_asked(tmp_path):
    first = rows_of(tmp_path, ["t2-h"])
    assert "against_t2" not in first["t2-h"]
    assert not (tmp_path / "ablation" / "t2-h" / "checkpoints").exists()
    rows = rows_of(tmp_path, ["t2"], keep=True)
    assert list(rows) == ["base", "t2", "t2-h"]  # in the table's order
    assert rows["t2"]["against_t2"]["PPL_1:2"]["ratio"] == 1
    assert rows["t2-h"]["against_t2"]["PPL_1:2"]["ratio"] == pytest.approx(
        rows["t2-h"]["joint"][1]["ppl"] / rows["t2"]["joint"][1]["ppl"]
    )
    assert (tmp_path / "ablation" / "t2" / "model" / "config.json").is_file()
    assert not (tmp_path / "ablation" / "t2-h" / "model").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [({"data": {"fingerprint": "b"}}, "fingerprint"), ({"settings": {"steps": 5}}, "steps 4, not 5")],
)
def test_a_run_on_other_data_or_with_other_settings_is_refused(tmp_path, change, named):
    rows_of(tmp_path, ["t2"])
    with pytest.raises(InputError, match=named):
        begun(tmp_path, **change)


def test_checkpoints_of_an_unknown_run_are_not_taken_up(tmp_path):
    (tmp_path / "ablation" / "t2" / "checkpoints").mkdir(parents=True)
    with pytest.raises(InputError, match="another --out"):
        begun(tmp_path)


# --- the command ----------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation")
    neox().save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()))
    return folder


def test_the_command_prints_the_table_and_goes_on_where_it_was(made, capfd):
    run = Run(capfd)
    command = ("eval", "ablation", made / "base", "--data", made / "text.jsonl", "--out", made / "out", "--held-out", 0.1)
    short = ("--steps", 2, "--batch-size", 2, "--block-size", 32)
    said = run(*command, *short, "--variants", "t2,t2-h")
    assert "variant 2 of 2: T2-H (frozen base)" in run.err
    for words in ("PPL_1:2 against T2", "T2-H", "18.3 / 112.4 / 45.4", "not built: T2 (CTC)", "tokens/step"):
        assert words in said
    printed = json.loads(run(*command, *short, "--variants", "t2,t2-h", "--json"))
    assert "variant" not in run.err  # nothing is trained twice
    assert [row["variant"] for row in printed["rows"]] == ["base", "T2", "T2-H"]
    assert printed["data"]["sources"] == ["text.jsonl"]
    assert "steps 2, not 3" in run.refused(*command, *short, "--steps", 3)
    again = run.refused(*command, *short, "--held-out", 0.2, "--variants", "t2")
    assert "use the same options to go on with it" in again


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--out", "x"), "--data"),
        (("--data", "TEXT"), "--out"),
        (("--data", "TEXT", "--out", "x", "--variants", "t2,t9"), '"t9" is not a variant'),
        (("--data", "TEXT", "--out", "x", "--variants", ","), "No variant is named"),
        (("--data", "TEXT", "--out", "x", "--steps", "0"), "steps is 0"),
        (("--data", "TEXT", "--out", "x", "--lr-b", "0"), "lr_b is 0"),
        (("--data", "TEXT", "--out", "x", "--block-size", "4"), "block_size is 4"),
        (("--data", "TEXT", "--out", "x", "--block-size", "4096"), "context is 128"),
        (("--data", "TEXT", "--out", "x", "--held-out", "0"), "between 0 and 1"),
        (("--data", "TEXT", "--out", "x", "--threads", "0"), "--threads is 0"),
    ],
)
def test_bad_input_is_one_sentence(made, tmp_path, monkeypatch, capfd, arguments, said):
    monkeypatch.chdir(tmp_path)
    given = [str(made / "text.jsonl") if argument == "TEXT" else argument for argument in arguments]
    assert said in Run(capfd).refused("eval", "ablation", made / "base", *given)
    assert not list(tmp_path.iterdir())
