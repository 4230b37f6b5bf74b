"""The command line: whole paths, exit statuses, pipes, resuming, and one sentence for each bad input."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import sys
from dataclasses import fields
from pathlib import Path

import processes
import pytest
import torch
from commandline import SMALL, Run, byte_tokenizer, neox, texts
from transformers import AutoTokenizer, BertConfig, GPTNeoXForCausalLM, T5Config

from dynamo_lm import DynaMoForCausalLM
from dynamo_lm.cli import dry_run
from dynamo_lm.cli.main import BAD_INPUT, BROKEN_PIPE, main
from dynamo_lm.cli.train import train as train_command
from dynamo_lm.cooccurrence.table import Cooccurrence
from dynamo_lm.data.token_store import tokenizer_fingerprint
from dynamo_lm.model import loading
from dynamo_lm.training import log as training_log
from dynamo_lm.training import options


@pytest.fixture
def run(capfd):
    return Run(capfd)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a base, a text, and under run/model what `train`, then `count`, made of them."""
    folder = tmp_path_factory.mktemp("made")
    neox().save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()))
    options = ("--freeze", "--init", "copy", "--lr-m", "1e-2", "--steps", "30", "--out", str(folder / "run"), *SMALL)
    assert main(["train", str(folder / "base"), "--data", str(folder / "text.jsonl"), *options]) == 0
    assert main(["count", str(folder / "run" / "model"), "--data", str(folder / "text.jsonl"), "--order", "3"]) == 0
    return folder


@pytest.fixture(scope="module")
def model(made) -> Path:
    return made / "run" / "model"


def stdin(monkeypatch, data: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))


# --- help -----------------------------------------------------------------------


def test_the_help_names_every_command(run):
    said = run("--help")
    assert run() == said  # nothing at all asks for help
    for verb in ("demo", "generate", "train", "count", "info"):
        assert verb in said


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        ("demo", "--prompt --max-new-tokens --eps-b --heads --seed --delay --json"),
        (
            "generate",
            "--verify --eps-b --alpha-c --heads --tree --otsu --blur --max-new-tokens --sample --temperature --top-k",
        ),
        ("generate", "--top-p --repetition-penalty --seed --stop --dtype --device --stats --json --prompts"),
        ("train", "--data --validation --validation-fraction --heads --layers-per-head --feed --init --adapter-rank"),
        (
            "train",
            "--own-output-embedding --freeze --lr-b --lr-m --lr-mb --block-size --batch-size --accumulation --steps",
        ),
        (
            "train",
            "--epochs --warmup --weight-decay --clip --bf16 --seed --validate-every --checkpoint-every "
            "--checkpoint-minutes --attention",
        ),
        ("train", "--text-field --tables --out --save --dry-run --json"),
        ("count", "--data --tokenizer --order --min-count --max-mb --memory-mb --engine --out --merge --json"),
        ("chat", "--system --verify --eps-b --temperature --max-new-tokens --seed --dtype --device --tokenizer"),
        ("info", "--json"),
    ],
)
def test_the_help_of_a_command_explains_its_options(run, monkeypatch, verb, options):
    monkeypatch.setenv("COLUMNS", "200")
    said = run(verb, "--help")
    for option in options.split():
        line = next(line for line in said.splitlines() if line.startswith("│") and f" {option} " in line)
        assert sum(word.isalpha() for word in line.split()) >= 3, line  # words, not only a type


def test_the_defaults_that_train_shows_are_those_of_the_library():
    import inspect

    library = {field.name: field.default for field in fields(options.TrainingOptions)}
    shown = inspect.signature(train_command).parameters
    for name in ("warmup", "weight_decay", "clip", "seed", "validate_every", "checkpoint_every", "checkpoint_minutes"):
        assert shown[name].default == library[name], name


# --- text that cannot be encoded --------------------------------------------------


def test_an_argument_that_is_no_text_is_refused(run, model):
    said = run.refused("generate", model, "caf\udce9")  # what Python makes of the byte E9 in a UTF-8 locale
    assert "Argument 3 ('caf\\udce9') is not valid UTF-8" in said


def test_an_argument_that_the_locale_cannot_read_is_refused_with_its_encoding(run, model, monkeypatch):
    monkeypatch.setattr("sys.getfilesystemencoding", lambda: "ascii")
    said = run.refused("generate", model, "caf\udcc3\udca9")  # what Python makes of UTF-8 in a locale of ASCII
    assert "Argument 3 ('caf\\udcc3\\udca9') is not ascii, the locale's encoding; set PYTHONUTF8=1" in said


def test_a_hint_begins_a_sentence(run, model):
    said = run.refused("generate", model, "the fox", "--no-such-option")
    assert "No such option: --no-such-option. See `dynamo-lm generate --help`." in said


@pytest.mark.parametrize("options", [(), ("--json", "--stats")], ids=["text", "json"])
def test_a_terminal_without_emoji_gets_a_mark_in_their_place(model, monkeypatch, options):
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="cp1252"))
    assert main(["generate", str(model), "café 😀", "-n", "3", *options]) == 0
    out = written.getvalue().decode("cp1252")
    if options:
        assert json.loads(out)["prompt"] == "café 😀"  # escaped
    else:
        assert out.startswith("café ?")


# --- heads that are too weak ------------------------------------------------------


def test_incoherent_texts_of_weak_heads_get_a_warning(run, tmp_path):
    base = neox()
    with torch.no_grad():
        base.get_output_embeddings().weight *= 40  # a base that is sure of every token, and heads that know nothing
    base.save_pretrained(tmp_path / "base")
    DynaMoForCausalLM.from_base(str(tmp_path / "base"), num_heads=3).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    generate = ("generate", tmp_path / "model", "the fox", "-n", 40, "--seed", 0)
    run(*generate, "--verify", "off", "--eps-b", 0)
    assert "The heads are too weak for this eps_b" in run.err
    run(*generate, "--verify", "off", "--eps-b", 0, "--temperature", 3)  # which costs as much by itself
    assert "weak" not in run.err
    run(*generate)
    assert run.err == ""


# --- train ----------------------------------------------------------------------


def test_train_leaves_a_model_its_tokenizer_and_where_they_come_from(made, model):
    record = json.loads((model / "training.json").read_text())
    assert record["command"].startswith("dynamo-lm train ")
    assert record["versions"].keys() >= {"python", "torch", "transformers", "dynamo-lm"}
    assert record["data"]["sources"] == [str(made / "text.jsonl")]
    assert record["data"]["documents"] == 60
    assert record["data"]["training_tokens"] > record["data"]["validation_tokens"] > 0
    assert record["options"]["lr_b"] == record["options"]["lr_mb"] == 0
    assert record["perplexities"].keys() == {"PPL_1", "PPL_2", "PPL_3", "PPL_1:3"}
    assert record["started"] <= record["finished"]
    assert record["steps"] == 30
    assert (model / "heads.safetensors").is_file() and not (model / "model.safetensors").exists()
    opened = DynaMoForCausalLM.from_pretrained(str(model))
    for mine, base in zip(opened.base.parameters(), neox().parameters(), strict=True):
        assert torch.equal(mine, base)  # frozen


def test_heads_find_their_base_from_any_folder(run, model, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run("generate", model, "the fox", "-n", "3").startswith("the fox")
    shutil.copytree(model.parents[1], tmp_path / "moved")
    assert json.loads((tmp_path / "moved/run/model/config.json").read_text())["base_name_or_path"] == "../../base"


def test_training_further_and_unfrozen_saves_everything(run, made, model, tmp_path):
    run("train", model, "--data", made / "text.jsonl", "--steps", 2, "--out", tmp_path / "further", *SMALL)
    saved = tmp_path / "further" / "model"
    assert "no measurement" not in run("info", saved)
    facts = json.loads(run("info", saved, "--json"))
    assert (facts["weights"], facts["num_heads"], facts["init"]) == ("full", 3, "copy")
    assert "attn" not in (saved / "config.json").read_text()
    assert "more, which cannot" not in run.refused(
        "train", model, "--data", made / "text.jsonl", "--out", tmp_path / "x", "--heads", 4
    )


def test_a_table_can_be_put_into_the_finished_model(run, made, model, tmp_path):
    run("train", made / "base", "--data", made / "text.jsonl", "--freeze", "--steps", 1, "--out", tmp_path, *SMALL,
        "--tables", model, "--json")  # fmt: skip
    assert json.loads(run.out)["model_folder"] == str(tmp_path / "model")
    assert (tmp_path / "model" / "cooccurrence.safetensors").is_file()


def test_dry_run_says_how_large_everything_is_and_trains_nothing(run, made, tmp_path):
    run("train", made / "base", "--data", made / "text.jsonl", "--epochs", 2, "--dry-run", "--json", *SMALL)
    facts = json.loads(run.out)
    count = facts["parameters"]
    assert count["base"] == sum(p.numel() for p in neox().parameters())
    assert count["trained"] == count["base"] + count["heads"]
    assert facts["steps"] == round(2 * (facts["training_tokens"] // 32) / 4)
    memory = facts["memory_bytes_estimate"]
    assert memory["weights"] == 4 * (count["base"] + count["heads"])
    assert memory["total"] == sum(value for key, value in memory.items() if key != "total")
    run("train", made / "base", "--freeze", "--dry-run", "--json", *SMALL)
    frozen = json.loads(run.out)
    assert frozen["parameters"]["trained"] == count["heads"]
    assert frozen["memory_bytes_estimate"]["activations"] < memory["activations"]
    assert facts["seconds_per_step"] > 0 and "seconds_per_step" not in frozen
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_measures_how_long_the_run_takes(run, made, monkeypatch):
    said = run("train", made / "base", "--freeze", "--data", made / "text.jsonl", "--dry-run", *SMALL)
    assert re.search(r"^time +about .+: .+ a step, [\d,]+ tokens a second", said, re.MULTILINE)
    assert "measuring a forward and backward pass of 32 tokens" in run.err
    assert "--data" in run("train", made / "base", "--freeze", "--dry-run", *SMALL)
    monkeypatch.setattr(dry_run, "free_memory", lambda device: 1000)
    assert "not measured" in run("train", made / "base", "--freeze", "--data", made / "text.jsonl", "--dry-run", *SMALL)


def test_a_dry_run_plans_for_other_gpus(run, made):
    plan = ("train", made / "base", "--dry-run", *SMALL, "--plan", "2x0.02", "--plan-tokens", "1e9")
    said = run(*plan)
    assert "split (--shard)" in said and "fits 20.0 MB" in said
    assert re.search(r"^time +about .+ for 1,000,000,000 tokens by arithmetic", said, re.MULTILINE)
    run(*plan, "--json")
    facts = json.loads(run.out)
    assert facts["options"]["bf16"] and facts["options"]["attention"] == "sdpa" and facts["ranks"] == 2
    assert facts["memory_bytes_estimate"]["optimizer"] == 4 * facts["parameters"]["trained"]
    assert facts["plan"]["seconds"] == pytest.approx(1e9 * facts["plan"]["operations_per_token"] / (2 * 400e12))
    said = run(*plan, "--freeze", "--plan", "2x0.001")
    assert "each with all (--no-shard)" in said and "does not fit 1.0 MB" in said
    for wrong in (("--plan", "eight"), ("--plan", "0x80"), ("--plan-tokens", "0"), ("--plan-tflops", "0")):
        run.refused(*plan, *wrong)
    run.refused(*plan[:2], "--plan", "8x80", "--data", made / "text.jsonl", "--out", made / "planned")


def test_a_step_is_split_so_that_activations_stay_below_a_gigabyte(run, made):
    large = ("train", "DynaMo-77M-T3", "--dry-run", "--json")
    run(*large)
    chosen = json.loads(run.out)
    assert chosen["options"]["accumulation"] > 1 and 64 % chosen["options"]["accumulation"] == 0
    run(*large, "--accumulation", 1)
    whole = json.loads(run.out)
    assert whole["options"]["accumulation"] == 1
    activations = [facts["memory_bytes_estimate"]["activations"] for facts in (chosen, whole)]
    assert activations[0] < 10**9 < activations[1] or chosen["options"]["accumulation"] == 64
    run("train", made / "base", "--dry-run", "--json", *SMALL)
    assert json.loads(run.out)["options"]["accumulation"] == 1


def test_a_preset_brings_its_shape_and_rates_without_a_network(run):
    assert "8.95%" in run("train", "DynaMo-77M-T3", "--dry-run")
    run("train", "DynaMo-2.9B-T3", "--dry-run", "--json")
    options = json.loads(run.out)["options"]
    assert (options["lr_b"], options["lr_m"], options["lr_mb"]) == pytest.approx((1.6e-6, 1.6e-4, 1.6e-7))
    assert (options["batch_size"], options["block_size"]) == (64, 2048)


TWELVE = ("--lr-b", "1e-3", "--lr-mb", "1e-4", "--lr-m", "1e-2", "--steps", "12", "--checkpoint-every", "3", *SMALL)


def log(folder: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["losses"], line["gradient_norm"], line.get("ppl")) for line in lines]


def killed_at_step_8(*line: str) -> int:
    write = training_log._Log.write

    def killed(self, progress, factor):
        write(self, progress, factor)
        if progress.step == 8:
            os.kill(os.getpid(), signal.SIGKILL)

    training_log._Log.write = killed
    return main(list(line))


def test_a_run_that_was_killed_or_interrupted_resumes_to_the_same_losses(run, made, tmp_path, monkeypatch):
    arguments = [
        "train",
        str(made / "base"),
        "--data",
        str(made / "text.jsonl"),
        *TWELVE,
        "--validate-every",
        "6",
        "--out",
    ]
    run(*arguments, tmp_path / "whole")
    whole = log(tmp_path / "whole")
    assert [step for step, *_ in whole] == list(range(1, 13))

    # kill -9 while step 8 is logged: the checkpoint of step 6 is the last
    said = tmp_path / "said"
    killed = processes.start(killed_at_step_8, *arguments, str(tmp_path / "killed"), stdout=said, stderr=said)
    killed.join()
    assert killed.exitcode == -signal.SIGKILL, said.read_text()
    assert sorted(path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()) == [
        "step-00000003",
        "step-00000006",
    ]
    assert not (tmp_path / "killed" / "model").exists()
    run(*arguments, tmp_path / "killed")
    assert log(tmp_path / "killed") == whole

    # Ctrl-C, and then SIGTERM (Slurm, systemd, docker stop) in the run that goes on: each finishes its step and keeps it
    write = training_log._Log.write
    for step, number in enumerate((signal.SIGINT, signal.SIGTERM), start=1):

        def interrupted(self, progress, factor, number=number):
            write(self, progress, factor)
            signal.raise_signal(number)

        with monkeypatch.context() as patch:
            patch.setattr(training_log._Log, "write", interrupted)
            run(*arguments, tmp_path / "stopped", status=130)
        said = run.err.strip().splitlines()[-1]
        assert said == f"dynamo-lm: stopped with a checkpoint of step {step}; the same command goes on from there."
    run(*arguments, tmp_path / "stopped")
    assert log(tmp_path / "stopped") == whole

    # A folder from before heads had a residual block or a coupling goes on, but not with a coupling.
    record = json.loads((tmp_path / "stopped" / "training.json").read_text())
    del record["model"]["residual_block"], record["model"]["coupling_rank"]
    (tmp_path / "stopped" / "training.json").write_text(json.dumps(record))
    assert "coupling_rank 0, not 64" in run.refused(*arguments, tmp_path / "stopped", "--coupling", "learned")
    run(*arguments, tmp_path / "stopped")

    # The same folder refuses to go on with other data, another model or other rates.
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"text": " ".join(texts(20, seed=1))}) + "\n" + json.dumps({"text": texts(1)[0] * 9}) + "\n")
    again = (*arguments[3:], tmp_path / "killed")
    assert "other data" in run.refused("train", made / "base", "--data", other, *again[1:], "--validation-fraction", 0)
    assert "other model" in run.refused(*arguments, tmp_path / "killed", "--heads", 4)
    assert "lr_m=0.01" in run.refused(*arguments, tmp_path / "killed", "--lr-m", 0.02)


def test_a_loss_that_is_not_finite_stops_with_the_step(run, made, tmp_path):
    wild = ("--lr-m", "1e30", "--clip", 0, "--steps", 9, "--validation-fraction", 0)
    said = run("train", made / "base", "--data", made / "text.jsonl", *SMALL, *wild, "--out", tmp_path, status=2)
    assert said == "" and "Traceback" not in run.err
    assert "is not finite" in run.err.splitlines()[-1]


# --- count ----------------------------------------------------------------------


def test_tables_counted_separately_merge_to_the_table_of_both(run, made, tmp_path):
    lines = (made / "text.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join(lines[:20]))
    (tmp_path / "b.jsonl").write_text("".join(lines[20:]))
    everything = ("--validation-fraction", 0, "--order", 2)
    for name, source in (("a", tmp_path / "a.jsonl"), ("b", tmp_path / "b.jsonl"), ("c", made / "text.jsonl")):
        run("count", made / "base", "--data", source, "--out", tmp_path / f"{name}.safetensors", *everything)
    run(
        "count",
        "--merge",
        tmp_path / "a.safetensors",
        tmp_path / "b.safetensors",
        "--out",
        tmp_path / "ab.safetensors",
        "--json",
    )
    merged = json.loads(run.out)
    run("count", "--merge", tmp_path / "c.safetensors", tmp_path / "c.safetensors", "--out", tmp_path / "cc.safetensors")
    assert "pairs: " in run.out
    whole = json.loads(run("count", made / "base", "--data", made / "text.jsonl", "--out", tmp_path / "d.safetensors",
                           "--json", *everything))  # fmt: skip
    assert merged["rows"] == whole["rows"] and merged["counted"] == whole["counted"]
    assert merged["tokenizer"] == tokenizer_fingerprint(AutoTokenizer.from_pretrained(made / "base"))


def test_minimum_counts_by_length_prune_and_say_how_much(run, made, tmp_path):
    out = tmp_path / "t.safetensors"
    run("count", made / "base", "--data", made / "text.jsonl", "--out", out, "--min-count", "2:1,3:3", "--json")
    facts = json.loads(run.out)
    assert facts["min_counts"] == [1, 1, 3]
    assert facts["pruned_mass"][1] == 0 < facts["pruned_mass"][2]


def test_a_table_is_pruned_to_a_stated_size_while_counting_as_it_is_afterwards(run, made, tmp_path):
    whole, small, pruned = (tmp_path / f"{name}.safetensors" for name in ("whole", "small", "pruned"))
    run("count", made / "base", "--data", made / "text.jsonl", "--out", whole)
    run("count", made / "base", "--data", made / "text.jsonl", "--out", small, "--max-mb", 0.012, "--json")
    least = json.loads(run.out)["min_counts"][1]
    assert least > 1 and small.stat().st_size <= 12_000
    assert Cooccurrence.load(small) == Cooccurrence.load(whole).prune(least)
    run("count", "--merge", whole, whole, "--out", pruned, "--max-mb", 0.012, "--json")
    assert json.loads(run.out)["min_counts"][1] > 1 and pruned.stat().st_size <= 12_000


def test_an_engine_that_is_missing_is_one_sentence(run, made, tmp_path, monkeypatch):
    command = ("count", made / "base", "--data", made / "text.jsonl", "--out", tmp_path / "t.safetensors", "--engine")
    assert '--engine is "spark"; give threads or ray.' in run.refused(*command, "spark")
    monkeypatch.setitem(sys.modules, "ray", None)  # what an import of it then raises is what a missing package does
    assert "needs the package ray: pip install 'dynamo-lm[ray]'" in run.refused(*command, "ray")


# --- generate -------------------------------------------------------------------


def test_strict_text_is_the_plain_models_own_whatever_the_heads(run, model):
    several = run("generate", model, "the fox ran", "-n", 24, "--stats")
    assert several.startswith("the fox ran") and several.endswith("\n")
    assert "24 tokens in" in run.err
    assert run("generate", model, "the fox ran", "-n", 24, "--heads", 1) == several
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = GPTNeoXForCausalLM.from_pretrained(model.parents[1] / "base")
    ids = tokenizer("the fox ran", return_tensors="pt").input_ids
    own = base.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=0, pad_token_id=0)
    assert several == tokenizer.decode(own[0], skip_special_tokens=True) + "\n"


def test_a_pipe_gives_the_prompt_and_gets_only_the_text(run, model, monkeypatch):
    argument = run("generate", model, "the fox", "-n", 8)
    stdin(monkeypatch, b"the fox\n")
    assert run("generate", model, "-n", 8) == argument
    assert run.err == ""
    stdin(monkeypatch, b"the fox")
    assert run("generate", model, "-", "-n", 8) == argument
    stdin(monkeypatch, b"\xef\xbb\xbfthe fox\r\n")
    assert run("generate", model, "-n", 8) == argument


def test_prompt_lines_end_at_the_line_feed_alone_and_a_byte_order_mark_is_no_prompt(run, model, tmp_path):
    prompts = ["the\u2028fox\x85", "a\x0cb"]
    (tmp_path / "prompts.txt").write_bytes(("\ufeff" + "\r\n".join(prompts)).encode())
    rows = run("generate", model, "--prompts", tmp_path / "prompts.txt", "-n", 1, "--json").split("\n")[:-1]
    assert [json.loads(row)["prompt"] for row in rows] == prompts


def test_a_reader_that_goes_away_is_silent(model, tmp_path):
    pipe, errors = tmp_path / "pipe", tmp_path / "errors"
    os.mkfifo(pipe)
    line = "generate", str(model), "the fox", "-n", "100", "--verify", "off"
    process = processes.start(processes.command, *line, stdout=pipe, stderr=errors)
    with pipe.open("rb", buffering=0) as reader:
        assert reader.read(3) == b"the"
    process.join()
    assert errors.read_text() == ""
    assert process.exitcode == BROKEN_PIPE


def test_standard_streams_may_be_closed(model, monkeypatch):
    for stream in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(f"sys.{stream}", None)
    assert main(["generate", str(model), "the fox", "-n", "3"]) == 0
    assert main(["generate", str(model), "-n", "3"]) == BAD_INPUT  # no prompt to read


def test_json_has_text_and_statistics_for_every_prompt_of_a_file(run, model, tmp_path):
    (tmp_path / "prompts.txt").write_text("the fox\none little bird with big eyes\nsad\n")
    dials = ("--verify", "off", "--eps-b", 0, "--seed", 3, "-n", 9, "--no-otsu")
    rows = [
        json.loads(line)
        for line in run("generate", model, "--prompts", tmp_path / "prompts.txt", *dials, "--json").splitlines()
    ]
    assert [row["prompt"] for row in rows] == ["the fox", "one little bird with big eyes", "sad"]
    for row in rows:
        assert row["text"] == row["prompt"] + row["new_text"]
        assert (
            sum((i + 1) * count for i, count in enumerate(row["statistics"]["histogram"])) == row["statistics"]["new_tokens"]
        )
        assert row["statistics"]["ceiling"] == 3
    assert rows[0]["statistics"]["histogram"][2] == 3  # nine tokens, three a step
    alone = json.loads(run("generate", model, "sad", *dials[:4], "--seed", 5, *dials[6:], "--json"))
    assert alone["text"] == rows[2]["text"]  # the third row's seed, alone


def test_a_seed_repeats_a_text_and_a_stop_string_ends_it(run, model):
    drawn = ("--verify", "off", "-n", 40, "--seed", 1)
    first = run("generate", model, "the fox", *drawn)
    assert run("generate", model, "the fox", *drawn) == first
    letter = first.removeprefix("the fox").strip()[3]
    ended = run(
        "generate",
        model,
        "the fox",
        "--verify",
        "strict",
        "--sample",
        "--seed",
        1,
        "-n",
        40,
        "--stop",
        letter,
        "--stop",
        " ",
    )
    assert ended.removesuffix("\n").removeprefix("the fox")[-1] in (letter, " ")


def test_a_tree_changes_the_steps_and_not_the_text(run, model):
    facts = {}
    for tree in (0, 1, 8):
        facts[tree] = json.loads(run("generate", model, "the fox", "-n", 30, "--tree", tree, "--json"))
    assert facts[0]["text"] == facts[1]["text"] == facts[8]["text"]
    assert facts[1]["statistics"]["histogram"][2] == 0  # one draft: two tokens a step at most
    forwards = [facts[tree]["statistics"]["forwards"] for tree in (1, 0, 8)]
    assert forwards == sorted(forwards, reverse=True)


def test_a_budget_buys_tokens_per_step_for_regret(run, model):
    facts = {}
    for dial in ("strict", "0", "0.5"):
        row = json.loads(run("generate", model, "the fox", "-n", 40, "--verify", dial, "--tree", 0, "--json"))
        facts[dial] = (row["text"], row["statistics"])
    assert facts["0"][0] == facts["strict"][0]
    assert facts["strict"][1]["mean_regret"] == 0 < facts["0.5"][1]["mean_regret"] <= 0.5
    assert facts["0.5"][1]["forwards"] < facts["strict"][1]["forwards"]


# --- info -----------------------------------------------------------------------


def test_info_names_base_heads_tables_and_training(run, made, model):
    said = run("info", model)
    assert str(made / "text.jsonl") in said and "30 steps" in said and "triples" in said and "eps_b 0.5" in said
    facts = json.loads(run("info", model, "--json"))
    assert (facts["num_heads"], facts["weights"], facts["context"]) == (3, "heads", 128)
    assert facts["head_parameters"] == sum(
        p.numel() for p in DynaMoForCausalLM.from_pretrained(str(model)).heads.parameters()
    )
    assert facts["table"]["rows"][0] == 300
    assert facts["training"]["steps"] == 30


def test_info_reads_no_weights_and_knows_a_plain_model(run, made, model, tmp_path):
    shutil.copytree(model, tmp_path / "copy")
    (tmp_path / "copy" / "heads.safetensors").unlink()
    assert json.loads(run("info", tmp_path / "copy", "--json"))["num_heads"] == 3
    assert "no DynaMo heads; add some with `dynamo-lm train" in run("info", made / "base")


# --- bad input ------------------------------------------------------------------


def test_what_is_no_model_is_refused(run, made, tmp_path):
    assert "it has no config.json" in run.refused("info", tmp_path)
    assert "it has no config.json" in run.refused("generate", tmp_path, "hello")
    assert "is a file" in run.refused("info", made / "text.jsonl")
    (tmp_path / "config.json").write_text("{")
    assert "cannot be read" in run.refused("train", tmp_path, "--data", made / "text.jsonl", "--out", tmp_path / "x")
    assert "has no DynaMo heads" in run.refused("generate", made / "base", "hello")


def test_a_hub_that_cannot_be_reached_is_one_sentence(run, made, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("somebody/something", "DynaMo-77M-T3", "nowhere"):
        assert "nor available from the hub" in run.refused(
            "train", name, "--data", made / "text.jsonl", "--out", tmp_path / "x"
        )
    assert "nor available from the hub" in run.refused("generate", "somebody/something", "hello")


@pytest.mark.parametrize("config", [BertConfig, T5Config])
def test_encoders_are_refused(run, made, tmp_path, config):
    config(
        num_hidden_layers=2, num_layers=2, hidden_size=16, d_model=16, num_attention_heads=2, vocab_size=300
    ).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    arguments = ("train", tmp_path, "--data", made / "text.jsonl", *SMALL)
    run.refused(*arguments, "--out", tmp_path / "x")
    run.refused(*arguments, "--dry-run")


def test_heads_for_another_base_are_refused(run, made, model, tmp_path):
    shutil.copytree(made / "base", tmp_path / "base")
    shutil.copytree(model, tmp_path / "run" / "model")
    other = neox()
    torch.nn.init.normal_(other.gpt_neox.layers[-1].mlp.dense_h_to_4h.weight)
    other.save_pretrained(tmp_path / "base")
    config = tmp_path / "run" / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_path": str(tmp_path / "base")}))
    assert "were trained for the base" in run.refused("generate", tmp_path / "run" / "model", "hello")


def test_info_says_where_the_base_is_or_that_it_is_not_there(run, made, model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    assert f"loaded from {made / 'base'}" in run("info", tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    gone = {"base_path": "/nowhere/base", "base_name_or_path": "/nowhere/base"}
    config.write_text(json.dumps(json.loads(config.read_text()) | gone))
    assert "not included and not at /nowhere/base" in run("info", tmp_path / "model")


def test_a_tokenizer_that_does_not_fit_is_refused(run, made, tmp_path):
    neox(vocab_size=280).save_pretrained(tmp_path / "small")
    byte_tokenizer().save_pretrained(tmp_path / "small")
    said = run.refused("train", tmp_path / "small", "--data", made / "text.jsonl", "--out", tmp_path / "x")
    assert "token ids up to 299" in said and "ends at 279" in said
    neox().save_pretrained(tmp_path / "none")
    assert "has no tokenizer" in run.refused(
        "train", tmp_path / "none", "--data", made / "text.jsonl", "--out", tmp_path / "x"
    )


def test_a_table_counted_with_another_tokenizer_is_refused(run, made, model, tmp_path):
    neox(vocab_size=300).save_pretrained(tmp_path / "other")
    byte_tokenizer(290).save_pretrained(tmp_path / "other")
    text, table = made / "text.jsonl", tmp_path / "other.safetensors"
    run("count", tmp_path / "other", "--data", text, "--out", table)
    assert "another tokenizer" in run.refused(
        "train", made / "base", "--data", text, "--tables", table, "--out", tmp_path / "x"
    )
    assert "another tokenizer" in run.refused("count", tmp_path / "other", "--data", text, "--out", model)
    run("count", "--merge", table, table, "--out", tmp_path / "twice.safetensors")
    assert "another tokenizer" in run.refused("count", "--merge", table, table, "--out", model)
    shutil.copytree(made, tmp_path / "made")
    shutil.copy(table, tmp_path / "made" / "run" / "model" / "cooccurrence.safetensors")
    assert "another tokenizer" in run.refused("generate", tmp_path / "made" / "run" / "model", "the fox")


def test_damaged_weights_and_tables_are_refused(run, made, tmp_path):
    shutil.copytree(made, tmp_path / "made")
    folder = tmp_path / "made" / "run" / "model"
    for name in ("heads.safetensors", "cooccurrence.safetensors"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
        run.refused("generate", folder, "the fox")
        (folder / name).write_bytes(whole)
    base = tmp_path / "made" / "base"
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:5000])
    assert "could not be opened" in run.refused("generate", folder, "the fox")
    arguments = ("--data", made / "text.jsonl", "--out", tmp_path / "x", *SMALL)
    assert "could not be opened" in run.refused("train", base, *arguments)
    (base / "tokenizer.json").write_text("nothing")
    assert "could not be opened" in run.refused("train", base, *arguments)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "no document with any text"),
        (b'{"text": "the fox"}\n', "validation fraction"),
        (b'{"text": "the fox"}\n{"text": "a bird"}\n', "fewer than one block of 32"),
        (b'{"text": "the fox"}\n{"text": "\xff"}\n', "not UTF-8: line 2"),
        (b'{"text": "the fox"}\n{"text": \n', "not JSON at line 2"),
        (b'{"title": "the fox", "story": "ran"}\n', "--text-field"),
    ],
)
def test_texts_that_cannot_be_trained_on_are_refused(run, made, tmp_path, content, sentence):
    (tmp_path / "text.jsonl").write_bytes(content)
    assert sentence in run.refused(
        "train", made / "base", "--data", tmp_path / "text.jsonl", "--out", tmp_path / "x", *SMALL
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("hello", "--verify", "off", "--eps-b", "1.5"), "0 to 1"),
        (("hello", "--verify", "off", "--top-k", "400"), "vocabulary has 300"),
        (("hello", "--heads", "4"), "the model has 3"),
        (("",), "The prompt is empty"),
        (("fox " * 200,), "context is 128"),
        (("hello", "--verify", "sometimes"), 'give "strict"'),
        (("hello", "--verify", "-0.1"), "a budget in nats per token"),
        (("hello", "--verify", "nan"), "a budget in nats per token"),
        (("hello", "--eps-b", "0.5"), "belong to --verify off"),
        (("hello", "--verify", "0.1", "--eps-b", "0.5"), "belong to --verify off"),
        (("hello", "--verify", "off", "--tree", "4"), "--tree does not apply to --verify off"),
        (("hello", "--sample", "--tree", "4"), "either --tree or --sample"),
        (("hello", "--tree", "64"), "up to 63"),
        (("hello", "--temperature", "0.5"), "need --sample"),
        (("hello", "--verify", "off", "--top-p", "0.5"), "--top-p"),
        (("hello", "-n", "0"), "greater than 0"),
        (("hello", "--dtype", "float8"), "--dtype"),
        (("hello", "--device", "toaster"), "--device"),
        (("hello", "--prompts", "nowhere.txt"), "not both"),
        (("--prompts", "nowhere.txt"), "cannot be read"),
        (("hello", "--stop", ""), "--stop"),
        (("hello", "--sample", "--temperature", "0"), "temperature"),
        (("hello", "--nonsense"), "--nonsense"),
        (("hello", "--heads", "many"), "--heads"),
    ],
)
def test_options_that_make_no_sense_are_refused(run, model, arguments, sentence):
    assert sentence in run.refused("generate", model, *arguments)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "--data"),
        (("--data", "TEXT"), "--out"),
        (("--data", "nowhere.txt", "--out", "OUT"), "does not exist"),
        (("--data", "TEXT", "--out", "OUT", "--steps", "2", "--epochs", "1"), "not both"),
        (("--data", "TEXT", "--out", "OUT", "--freeze", "--lr-b", "1e-4"), "--freeze"),
        (("--data", "TEXT", "--out", "OUT", "--save", "heads"), "--freeze"),
        (("--data", "TEXT", "--out", "OUT", "--block-size", "4096"), "context is 128"),
        (("--data", "TEXT", "--out", "OUT", "--lr-m", "-1"), "lr_m"),
        (("--data", "TEXT", "--out", "OUT", "--batch-size", "4", "--accumulation", "3"), "divisible"),
        (("--data", "TEXT", "--out", "OUT", "--feed", "sideways"), "feed"),
        (("--data", "TEXT", "--out", "OUT", "--freeze", "--heads", "1"), "nothing to train"),
        (("--data", "TEXT", "--out", "TEXT"), "cannot be written"),
        (("--data", "TEXT", "--out", "OUT", "--tables", "nowhere"), "neither a table"),
    ],
)
def test_training_options_that_make_no_sense_are_refused(run, made, tmp_path, arguments, sentence):
    names = {"TEXT": str(made / "text.jsonl"), "OUT": str(tmp_path / "run")}
    assert sentence in run.refused("train", made / "base", *(names.get(word, word) for word in arguments))


@pytest.mark.parametrize("command", ["train", "finetune", "count"])
def test_threads_are_those_given(run, made, tmp_path, command):
    before = torch.get_num_threads()
    try:
        refused = run.refused(command, made / "base", "--data", made / "text.jsonl", "--out", tmp_path / "x", "--threads", 0)
        assert "--threads is 0; give 1 or more" in refused
        run(command, made / "base", "--out", tmp_path / "x", "--data", "nowhere.txt", "--threads", before + 1, status=2)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("BASE",), "--data"),
        (("BASE", "--data", "TEXT"), "--out"),
        (("BASE", "--data", "TEXT", "--out", "BASE"), "no DynaMo heads"),
        (("BASE", "--data", "TEXT", "--out", "table.bin"), ".safetensors"),
        (("BASE", "--data", "TEXT", "--min-count", "often", "--out", "t.safetensors"), "--min-count"),
        (("BASE", "--data", "TEXT", "--order", "9", "--out", "t.safetensors"), "order"),
        (("--merge", "BASE", "--out", "t.safetensors"), "two or more"),
        (("--merge", "BASE", "TEXT", "--out", "t.safetensors"), "neither a table"),
    ],
)
def test_counting_options_that_make_no_sense_are_refused(run, made, arguments, sentence):
    names = {"TEXT": str(made / "text.jsonl"), "BASE": str(made / "base")}
    assert sentence in run.refused("count", *(names.get(word, word) for word in arguments))


def test_prompts_that_are_no_text_are_refused(run, model, monkeypatch, tmp_path):
    stdin(monkeypatch, b"\xff\n")
    assert "not UTF-8" in run.refused("generate", model)
    stdin(monkeypatch, b"")
    assert "The prompt is empty" in run.refused("generate", model)
    (tmp_path / "prompts").write_text("one\n\ntwo\n")
    assert "line 2" in run.refused("generate", model, "--prompts", tmp_path / "prompts")


def test_a_full_disk_is_one_sentence(run, made, tmp_path, monkeypatch):
    import errno

    def full(*arguments, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dynamo_lm.model.checkpoint.save_file", full)
    run(
        "train",
        made / "base",
        "--data",
        made / "text.jsonl",
        "--freeze",
        "--steps",
        1,
        "--out",
        tmp_path,
        *SMALL,
        status=2,
    )
    assert "is full" in run.err.splitlines()[-1] and "Traceback" not in run.err
    monkeypatch.setattr("dynamo_lm.training.provenance.write", full)
    assert "The disk is full" in run.refused(
        "train", made / "base", "--data", made / "text.jsonl", "--freeze", "--out", tmp_path / "b", *SMALL
    )


def test_a_name_server_that_does_not_answer_means_offline(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)

    def unknown(*arguments):
        raise OSError("Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", unknown)
    assert loading.resolve("somebody/something") == "somebody/something"
    assert constants.HF_HUB_OFFLINE
