"""`dynamo-lm eval completion` as a user runs it: results, judges that fail, resuming, and bad input."""

import json
import sys

import processes
import pytest
from commandline import Run, byte_tokenizer, neox
from test_judges import Server, error, serve  # noqa: F401

from dynamo_lm import DynaMoForCausalLM

NAME = "completion-mine"
FEW = ("--seeds", "1", "--max-new-tokens", "4", "--eps-b", "0,1", "--no-strict")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model without tables, and three prompts."""
    made = tmp_path_factory.mktemp("made")
    DynaMoForCausalLM.from_base(neox(), num_heads=2, init="copy").save_pretrained(str(made / "model"))
    byte_tokenizer().save_pretrained(made / "model")
    (made / "mine.txt").write_text("the fox\na red house\none day\n")
    return made


@pytest.fixture
def ask(capfd, folder, tmp_path):
    run = Run(capfd)
    arguments = ("eval", "completion", folder / "model", "--bench", folder / "mine.txt", "--out", tmp_path / "out", *FEW)

    def asked(*more, status=0):
        run(*arguments, *more, status=status)
        return run

    return asked


def test_without_a_judge_there_are_speeds_and_a_second_run_writes_nothing_new(ask, capfd, tmp_path):
    said = ask().out
    assert "No judge was named" in said and "mask+Otsu+blur" in said
    found = json.loads((tmp_path / "out" / "completion-mine.json").read_text())
    assert found["ceiling"] == 2 and found["judge"] is None and len(found["prompts"]) == 3
    slow, fast = found["methods"]["mask+Otsu+blur"]["points"][::-1]
    assert slow["tokens_per_step"] == 1 and fast["tokens_per_step"] > 1.2 and slow["matched"] is None
    texts = (tmp_path / "out" / "completion-mine.texts.jsonl").read_bytes()
    again = json.loads(ask("--json").out)
    assert (tmp_path / "out" / "completion-mine.texts.jsonl").read_bytes() == texts
    assert again["methods"] == found["methods"]
    Run(capfd)("report", tmp_path / "out")
    assert "No judge was used" in (tmp_path / "out" / "report.md").read_text()


def test_ranks_share_the_texts_and_write_those_of_one_process(ask, folder, capfd, tmp_path):
    ask("--seeds", "2", "--threads", "1")
    line = ["eval", "completion", str(folder / "model"), "--bench", str(folder / "mine.txt"), "--out", str(tmp_path / "two")]
    line += [*FEW, "--seeds", "2", "--threads", "1"]
    started = processes.start_ranks(2, processes.command, *line, folder=tmp_path)
    for rank, process in enumerate(started):
        process.join(timeout=300)
        assert process.exitcode == 0, (tmp_path / f"stderr-{rank}").read_text()
    assert "mask+Otsu+blur" in (tmp_path / "stdout-0").read_text() and (tmp_path / "stdout-1").read_text() == ""
    assert sorted(file.name for file in (tmp_path / "two").iterdir()) == sorted(
        file.name for file in (tmp_path / "out").iterdir()
    )
    assert tokens_of(tmp_path / "two") == tokens_of(tmp_path / "out")
    # Parts that a run left which was stopped are read by a run of any number of processes.
    file, part = tmp_path / "two" / f"{NAME}.texts.jsonl", tmp_path / "two" / f"{NAME}.texts.jsonl.part-3"
    head, *texts = file.read_text().splitlines(keepends=True)
    file.write_text("".join([head, *texts[:9]]))
    part.write_text("".join([head, *texts[6:20]]))
    Run(capfd)(*line)
    assert tokens_of(tmp_path / "two") == tokens_of(tmp_path / "out") and not part.exists()


def tokens_of(out) -> dict[tuple, list[int]]:
    """By arm, prompt and seed; each is there once."""
    _, *texts = map(json.loads, (out / f"{NAME}.texts.jsonl").read_text().splitlines())
    found = {(text["arm"], text["prompt"], text["seed"]): text["tokens"] for text in texts}
    assert len(found) == len(texts)
    return found


def test_a_judge_that_answers_garbage_is_reported_as_useless(ask, serve, monkeypatch, capfd, tmp_path):  # noqa: F811
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server = serve(lambda body: "I would rather not say.")
    said = ask("--endpoint", server.url, "--judge-model", "tiny", "--price-in", "1", "--price-out", "2")
    assert "questions at most" in said.err and "at the prices given" in said.err
    assert "useless" in said.out
    found = json.loads((tmp_path / "out" / "completion-mine.json").read_text())
    assert found["judge"]["sanity"]["useful"] is False
    assert found["methods"]["mask+Otsu+blur"]["points"][0]["plain"] is None
    assert "sk-secret" not in json.dumps(found)
    Run(capfd)("report", tmp_path / "out")
    assert "This judge is useless here" in (tmp_path / "out" / "report.md").read_text()


def test_a_judge_without_quota_ends_in_one_sentence_and_keeps_the_texts(ask, serve, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server: Server = serve(lambda body: (429, error("insufficient_quota")))
    said = ask("--endpoint", server.url, "--judge-model", "tiny", status=2)
    assert "Traceback" not in said.err and "quota" in said.err.strip().splitlines()[-1]
    texts = (tmp_path / "out" / "completion-mine.texts.jsonl").read_text().splitlines()
    assert len(texts) == 1 + 3 * (1 + 1 + 8 + 2)
    assert not (tmp_path / "out" / "completion-mine.json").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--eps-b", "0:2:0.5"), "from 0 to 1"),
        (("--eps-b", "many"), "FROM:TO:STEP"),
        (("--seeds", "0"), "--seeds"),
        (("--heads", "9"), "2 to 2"),
        (("--mauve",), "--reference"),
        (("--reference", "a", "--endpoint", "b"), "one judge"),
        (("--endpoint", "http://127.0.0.1:9/v1"), "--judge-model"),
        (("--bench", "nowhere.txt"), "cannot be read"),
        (("--reference", "nowhere/at/all"), "nowhere/at/all"),
    ],
)
def test_bad_input_gets_one_sentence(ask, options, said):
    run = ask(*options, status=2)
    assert said in run.err and len(run.err.strip().splitlines()) == 1, run.err


def test_results_of_another_model_are_not_mixed_in(ask, folder, capfd, tmp_path):
    ask()
    other = folder / "other"
    DynaMoForCausalLM.from_base(neox(), num_heads=2).save_pretrained(str(other))
    byte_tokenizer().save_pretrained(other)
    run = Run(capfd)
    run("eval", "completion", other, "--bench", folder / "mine.txt", "--out", tmp_path / "out", *FEW, status=2)
    assert "another model" in run.err


def test_a_package_that_is_not_installed_is_named_with_the_extra_that_brings_it(ask, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)  # what Python does where it is missing
    run = ask(status=2)
    assert 'pip install "dynamo-lm[eval]"' in run.err
