"""`calibrate`: the curve by each criterion, the choice, and what becomes of the model's folder."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import dynamo_of, random_tokens
from commandline import Run, byte_tokenizer, neox, texts

from dynamo_lm import DynaMoForCausalLM
from dynamo_lm.cooccurrence.counting import count
from dynamo_lm.data.token_store import tokenizer_fingerprint
from dynamo_lm.errors import InputError
from dynamo_lm.evaluation import calibration, results_file
from dynamo_lm.evaluation.calibration import Point, by_perplexity, by_regret, by_win_rate, choose, outcome, write_default
from dynamo_lm.evaluation.perplexity.scoring import Measured, Options, Sums, Text


def point(eps_b: float, tokens_per_step: float, passes: bool) -> Point:
    return Point(eps_b, tokens_per_step, 0.0, None, None, passes)


# --- the choice -----------------------------------------------------------------


def test_the_fastest_point_that_passes_is_chosen_and_of_equal_ones_the_largest_eps_b() -> None:
    curve = [point(0.0, 3.0, False), point(0.2, 2.5, True), point(0.3, 2.5, True), point(1.0, 1.0, True)]
    assert choose(curve) == curve[2]
    assert outcome("ppl", 1.1, curve)["chosen"] == {"eps_b": 0.3, "tokens_per_step": 2.5, "passes": True}


def test_where_nothing_passes_one_token_per_step_is_chosen() -> None:
    found = outcome("ppl", 1.1, [point(0.5, 2.0, False)])
    assert found["chosen"] == {"eps_b": 1.0, "tokens_per_step": 1.0, "passes": False}


# --- criteria -------------------------------------------------------------------


def measured(masked: bool) -> Measured:
    """Two documents of 4 and 6 tokens; PPL_1 = 4, and PPL_d = 16 and 5 (product) or 8 and 4.2 (masked)."""
    tokens = np.array([4.0, 6.0])
    options = Options(num_heads=2, window=8, stride=8, eps_b=(0.0, 0.5))
    text = Text([np.zeros(5, np.int64), np.zeros(7, np.int64)], 10, ["toy"])

    def sums(perplexity: float) -> Sums:
        return Sums(tokens * math.log(perplexity), tokens)

    plain, other = [sums(16), sums(5)], [sums(8), sums(4.2)]
    steps = [[0, 5], [6, 2]]
    return Measured(options, text, [sums(4)], [sums(4)], None, plain, other if masked else None, steps, None)


def test_the_perplexity_criterion_is_the_ratio_to_the_base() -> None:
    curve = by_perplexity(measured(masked=False), 1.3)
    assert [(p.eps_b, p.tokens_per_step, p.passes) for p in curve] == [(0.0, 2.0, False), (0.5, 1.25, True)]
    assert [p.value for p in curve] == pytest.approx([4.0, 1.25])
    assert curve[0].low == pytest.approx(4.0)  # documents that agree leave no doubt
    assert [p.value for p in by_perplexity(measured(masked=True), 1.3)] == pytest.approx([2.0, 1.05])
    assert [p.value for p in by_perplexity(measured(masked=True), 1.3, masked=False)] == pytest.approx([4.0, 1.25])


def test_the_interval_of_the_ratio_is_that_of_paired_documents() -> None:
    base = measured(masked=False)
    nats = np.array([4 * math.log(5) + 1, 6 * math.log(5) - 1])  # the mean stays, documents deviate by +1 and -1
    dynamic = [base.dynamic[0], Sums(nats, np.array([4.0, 6.0]))]
    changed = Measured(**{**vars(base), "dynamic": dynamic})
    found = by_perplexity(changed, 1.3)[1]
    error = math.sqrt(2 * 2 * 0.1**2)  # 2/1 * ((1/10)^2 + (1/10)^2)
    assert found.value == pytest.approx(1.25)
    assert (found.low, found.high) == pytest.approx((1.25 * math.exp(-1.96 * error), 1.25 * math.exp(1.96 * error)))


def test_the_regret_criterion_compares_with_one_token_sampling_of_the_same_seeds() -> None:
    model = dynamo_of("gpt_neox", 2)
    model.cooccurrence = count(list(random_tokens(60, 20, seed=5).numpy()), vocab_size=97, order=2)
    prompts = [[5, 6, 7], [8, 9]]
    done: list[int] = []
    options = {"max_new_tokens": 12, "samples": 2, "seed": 3}
    curve = by_regret(model, prompts, [0.0, 0.5, 1.0], 0.0, progress=done.append, **options)
    assert done == [4, 8, 12]  # one-token sampling is not run twice
    assert [p.eps_b for p in curve] == [0.0, 0.5, 1.0]
    assert curve[2] == Point(1.0, 1.0, 0.0, 0.0, 0.0, True)
    totals = {}
    for eps_b in (0.0, 1.0):
        rows = []
        for number, prompt in enumerate(prompts):
            for sample in range(2):
                output = model.generate(
                    torch.tensor([prompt]), verify="off", do_sample=True, eps_b=eps_b, max_new_tokens=12,
                    seed=3 + 2 * number + sample, return_dict_in_generate=True,
                )  # fmt: skip
                rows.append(output.statistics[0])
        totals[eps_b] = sum(row.regret for row in rows) / sum(row.unverified for row in rows)
        if eps_b == 0:
            assert curve[0].tokens_per_step == sum(row.new_tokens for row in rows) / sum(row.forwards for row in rows)
    assert curve[0].value == pytest.approx(totals[0.0] - totals[1.0], abs=1e-4)
    assert curve[0].passes == (curve[0].high <= 0)
    with pytest.raises(InputError, match="One prompt"):
        by_regret(model, prompts[:1], [0.0], 0.0, **options)
    assert by_regret(model, prompts, [0.0], 0.0, **options) == curve[:1]


def completion(*points: tuple[float, float, float, list[float] | None], **more) -> dict:
    rows = [
        {
            "eps_b": eps_b,
            "tokens_per_step": speed,
            "plain": {"win_rate": 9.0, "interval": [8.0, 10.0]},
            "matched": {"win_rate": rate, "interval": interval},
        }
        for eps_b, speed, rate, interval in points
    ]
    return {"kind": "completion", "judge": {"name": "toy", "sanity": {"useful": True}}, **more} | {
        "methods": {"mask+Otsu+blur": {"points": rows}}
    }


def test_a_win_rate_passes_if_its_interval_begins_within_the_margin() -> None:
    found = completion(
        (0.3, 3.0, 0.9, [0.7, 1.2]), (0.5, 2.5, 0.95, [0.8, 1.2]), (0.6, 2.2, 1.3, None), (0.8, 1.5, 1.1, [0.9, 1.3])
    )
    curve = by_win_rate(found, 0.2)
    assert [(p.eps_b, p.passes) for p in curve] == [(0.8, True), (0.6, False), (0.5, True), (0.3, False)]
    assert choose(curve).eps_b == 0.5
    assert choose(by_win_rate(found, 0.1)).eps_b == 0.8
    assert choose(by_win_rate(found, 0.2, matched=False)).eps_b == 0.3


def test_win_rates_that_cannot_be_trusted_are_refused() -> None:
    with pytest.raises(InputError, match="interval"):
        by_win_rate(completion((0.5, 2.0, 1.0, None)), 0.2)
    with pytest.raises(InputError, match="not useful"):
        by_win_rate(completion((0.5, 2.0, 1.0, [0.9, 1.1]), judge={"sanity": {"useful": False, "reason": "a coin"}}), 0.2)
    with pytest.raises(InputError, match=r"no .* points"):
        by_win_rate({"methods": {}}, 0.2)


# --- the folder -----------------------------------------------------------------


def test_the_default_is_written_beside_what_was_there(tmp_path: Path) -> None:
    model = dynamo_of("gpt_neox", 2)
    before = {
        "eos_token_id": [3, 4],
        "temperature": 0.30000000000000004,
        "note": "déjà",
        "eps_b": 0.9,
        "nested": {"a": None},
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(before))
    write_default(tmp_path, 0.35, model)
    after = json.loads((tmp_path / "generation_config.json").read_text())
    assert after == before | {"eps_b": 0.35}
    assert list(after) == list(before)
    assert [file.name for file in tmp_path.iterdir()] == ["generation_config.json"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "generation_config.json").write_text('{"eps_b": 0.9}')

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(calibration.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_default(tmp_path, 0.35, dynamo_of("gpt_neox", 2))
    assert (tmp_path / "generation_config.json").read_text() == '{"eps_b": 0.9}'
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_without_settings_gets_the_models_own(tmp_path: Path) -> None:
    model = dynamo_of("gpt_neox", 2)
    model.generation_config.eos_token_id = 7
    write_default(tmp_path, 0.35, model)
    after = json.loads((tmp_path / "generation_config.json").read_text())
    assert (after["eps_b"], after["eos_token_id"]) == (0.35, 7)


# --- the command ----------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("made")
    tokenizer = byte_tokenizer()
    model = DynaMoForCausalLM.from_base(neox(), num_heads=3, init="copy")
    tokens = [np.array(tokenizer(text)["input_ids"]) for text in texts()]
    model.cooccurrence = count(tokens, vocab_size=300, order=3, tokenizer=tokenizer_fingerprint(tokenizer))
    model.save_pretrained(where / "model")
    tokenizer.save_pretrained(where / "model")
    (where / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(4, seed=9)))
    (where / "prompts.txt").write_text("the fox\na red house\n")
    return where


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "model", tmp_path / "model"))


@pytest.fixture
def run(capfd):
    return Run(capfd)


def settings_of(folder: Path) -> dict:
    return json.loads((folder / "generation_config.json").read_text())


def test_generate_uses_what_calibrate_chose(run, made, folder, tmp_path) -> None:
    ask = ("--data", made / "text.jsonl", "--eps-b", "0,0.1,0.2,0.5", "--limit", 1000)
    before = settings_of(folder)
    said = run("calibrate", folder, *ask, "--out", tmp_path / "results")
    assert "Chosen: eps_b" in said
    kept = json.loads((tmp_path / "results" / "calibration.json").read_text())
    assert kept["criterion"] == {"name": "ppl", "limit": 1000, "joint": "masked", "base": kept["criterion"]["base"]}
    assert [row["eps_b"] for row in kept["curve"]] == [0.0, 0.1, 0.2, 0.5]
    assert kept["curve"][0].keys() == {"eps_b", "tokens_per_step", "value", "low", "high", "passes"}
    chosen = kept["chosen"]["eps_b"]
    assert settings_of(folder) == before | {"eps_b": chosen}
    assert chosen != 0.5  # else the default of old would do the same
    text = ("generate", folder, "the fox ran", "--verify", "off", "--seed", 0, "-n", 24, "--json")
    by_default, explicit, other = run(*text), run(*text, "--eps-b", chosen), run(*text, "--eps-b", 1)
    assert json.loads(by_default)["new_text"] == json.loads(explicit)["new_text"]
    counted = [json.loads(output)["statistics"]["forwards"] for output in (by_default, explicit, other)]
    assert counted[0] == counted[1] < counted[2]


def test_a_dry_run_writes_nothing_and_heads_that_are_too_weak_are_named(run, made, folder) -> None:
    before = (folder / "generation_config.json").read_bytes()
    ask = ("calibrate", folder, "--data", made / "text.jsonl", "--eps-b", "0,0.5", "--limit", 0.0001)
    said = run(*ask, "--dry-run")
    assert "No eps_b passes" in said and "The heads are too weak" in run.err
    assert (folder / "generation_config.json").read_bytes() == before
    assert json.loads(run(*ask, "--json"))["chosen"] == {"eps_b": 1.0, "tokens_per_step": 1.0, "passes": False}
    assert settings_of(folder)["eps_b"] == 1.0 and "The heads are too weak" in run.err
    said = run(*ask[:-3], "1", "--dry-run")  # its limit is the default, and one token at a time passes it
    assert "Chosen: eps_b 1, 1.00 tokens per step" in said and "1.00 of 3 tokens per step" in run.err


def test_the_same_seed_gives_the_same_curve(run, made, folder) -> None:
    ask = ("--criterion", "regret", "--prompts", made / "prompts.txt", "--eps-b", "0,1", "--samples", 2, "-n", 8)
    first, second = (json.loads(run("calibrate", folder, *ask, "--dry-run", "--json", "--seed", 5)) for _ in range(2))
    assert first["curve"] == second["curve"]
    assert first["curve"][1] == {"eps_b": 1.0, "tokens_per_step": 1.0, "value": 0.0, "low": 0.0, "high": 0.0, "passes": True}


def test_win_rates_come_from_a_finished_benchmark_of_the_same_model(run, folder, tmp_path) -> None:
    model = DynaMoForCausalLM.from_pretrained(str(folder))
    results = completion((0.4, 2.4, 1.0, [0.85, 1.2]), (0.9, 1.1, 1.0, [0.9, 1.1]))
    results_file.save(tmp_path / "results", results | {"model": results_file.describe(model, "mine")})
    run("calibrate", folder, "--criterion", "win-rate", "--results", tmp_path / "results", "--out", tmp_path / "results")
    assert settings_of(folder)["eps_b"] == 0.4
    kept = json.loads((tmp_path / "results" / "calibration.json").read_text())
    assert kept["criterion"] == {"name": "win-rate", "limit": 0.2, "rate": "matched", "judge": "toy"}
    results_file.save(tmp_path / "other", results | {"model": results_file.describe(model, "mine") | {"identity": "0" * 16}})
    said = run.refused("calibrate", folder, "--criterion", "win-rate", "--results", tmp_path / "other")
    assert "another model" in said


def test_what_cannot_be_calibrated_is_one_sentence(run, made, folder, tmp_path) -> None:
    data = ("--data", made / "text.jsonl")
    assert "part of this installation" in run.refused("calibrate", "story", *data)
    assert "not a folder" in run.refused("calibrate", "someone/model", *data)
    assert "--data" in run.refused("calibrate", folder)
    assert "--prompts" in run.refused("calibrate", folder, "--criterion", "regret")
    assert "--results" in run.refused("calibrate", folder, "--criterion", "win-rate")
    assert "give one of" in run.refused("calibrate", folder, "--criterion", "beauty", *data)
    assert "--margin" in run.refused("calibrate", folder, *data, "--margin", 0.1)
    assert "ratio above 0" in run.refused("calibrate", folder, *data, "--limit", 0)
    assert "0 to 1" in run.refused("calibrate", folder, *data, "--eps-b", "0,2")
    assert "completion.json" in run.refused("calibrate", folder, "--criterion", "win-rate", "--results", tmp_path)
    (folder / "generation_config.json").write_text("[]")
    assert "no JSON object" in run.refused("calibrate", folder, *data)
