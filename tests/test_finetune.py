"""`dynamo-lm finetune` as a user runs it: what it learns and leaves alone, resuming, choosing answers, tables, bad input."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from commandline import END, Run, byte_tokenizer, neox, texts
from transformers import AutoTokenizer, GPTNeoXForCausalLM

from dynamo_lm import DynaMoForCausalLM
from dynamo_lm.cli.main import main
from dynamo_lm.cooccurrence.table import Cooccurrence
from dynamo_lm.data.chat_template import DEFAULT, encode_chat
from dynamo_lm.data.packing import WholeBlocks
from dynamo_lm.data.token_store import TokenStore
from dynamo_lm.training import log as training_log

SMALL = ("--block-size", "128", "--batch-size", "4", "--validation-fraction", "0.1", "--steps", "3")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, a DynaMo model with a table, and sixty conversations in Alpaca's form."""
    folder = tmp_path_factory.mktemp("made")
    tokenizer = byte_tokenizer()
    neox().save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    model = DynaMoForCausalLM.from_base(str(folder / "base"), num_heads=3)
    model.save_pretrained(str(folder / "model"))
    tokenizer.save_pretrained(folder / "model")
    said = texts(120)
    records = [{"instruction": q[:40], "input": "", "output": a[:60]} for q, a in zip(said[::2], said[1::2], strict=True)]
    (folder / "said.json").write_text(json.dumps(records))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in said))
    assert main(["count", str(folder / "model"), "--data", str(folder / "text.jsonl"), "--order", "2"]) == 0
    return folder


@pytest.fixture
def run(capfd):
    return Run(capfd)


def weights(folder) -> dict[str, torch.Tensor]:
    return DynaMoForCausalLM.from_pretrained(str(folder)).state_dict()


def test_a_model_and_its_heads_are_tuned_together_and_know_how_to_chat(run, made, tmp_path):
    said = run("finetune", made / "model", "--data", made / "said.json", *SMALL, "--out", tmp_path)
    assert "60 conversations" in run.err and "PPL_1:3" in said and "dynamo-lm chat" in said
    before, after = weights(made / "model"), weights(tmp_path / "model")
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before if "dense" in name and "weight" in name)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.chat_template == DEFAULT
    model = DynaMoForCausalLM.from_pretrained(str(tmp_path / "model"))
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    ids = torch.tensor([encode_chat(tokenizer, [{"role": "user", "content": "the fox"}])])
    assert model.generate(ids, max_new_tokens=5).shape[1] > ids.shape[1]
    record = json.loads((tmp_path / "model" / "training.json").read_text())
    assert record["data"]["conversations"] == 60 and record["data"]["learned_tokens"] > 0
    # The table: what the model had, and the answers that were trained on.
    own, merged = (Cooccurrence.load(folder / "cooccurrence.safetensors") for folder in (made / "model", tmp_path / "model"))
    learned = TokenStore(tmp_path / "tokens")
    assert merged.order == 2 and own.totals[0] < merged.totals[0] < own.totals[0] + int(learned.responses.sum())


def test_the_loss_is_that_of_the_answers_alone(run, made, tmp_path):
    arguments = ("--batch-size", 2, "--block-size", 128, "--steps", 1, "--validation-fraction", 0, "--seed", 3)
    run("finetune", made / "model", "--data", made / "said.json", *arguments, "--out", tmp_path)
    model = DynaMoForCausalLM.from_pretrained(str(made / "model"))
    store = TokenStore(tmp_path / "tokens")
    batch = WholeBlocks(store, np.arange(len(store)), 128, seed=3).batch(0, 2)
    sums, counts = np.zeros(3), np.zeros(3)
    for row in range(2):
        for segment in range(int(batch["segments"][row].max()) + 1):
            here = batch["segments"][row] == segment
            tokens, said = batch["tokens"][row, here], batch["responses"][row, here]
            logits = model.logits(tokens[None])[:, 0].log_softmax(-1)
            for head in range(3):
                for t in range(len(tokens) - head - 1):
                    if said[t + head + 1]:
                        sums[head] -= logits[head, t, tokens[t + head + 1]].item()
                        counts[head] += 1
    first = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert first["losses"] == pytest.approx((sums / counts).tolist(), rel=1e-4)


def test_a_run_that_was_stopped_ends_as_one_that_was_not(run, made, tmp_path, monkeypatch):
    arguments = ("finetune", made / "model", "--data", made / "said.json", *SMALL, "--checkpoint-every", 1, "--no-count")
    run(*arguments, "--out", tmp_path / "whole")
    write = training_log._Log.write

    def interrupted(self, progress, factor):
        write(self, progress, factor)
        if progress.step == 2:
            import signal

            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(training_log._Log, "write", interrupted)
        run(*arguments, "--out", tmp_path / "stopped", status=130)
        assert "goes on" in run.err
    run(*arguments, "--out", tmp_path / "stopped")
    one, other = weights(tmp_path / "whole" / "model"), weights(tmp_path / "stopped" / "model")
    assert all(torch.equal(one[name], other[name]) for name in one)
    run(*arguments[:5], "96", *arguments[6:], "--out", tmp_path / "stopped", status=2)
    assert "other data (block_size 128, not 96)" in run.err


def test_freezing_leaves_the_base_and_saves_heads_alone(run, made, tmp_path):
    run("finetune", made / "base", "--data", made / "said.json", *SMALL, "--freeze", "--init", "copy", "--out", tmp_path)
    assert (tmp_path / "model" / "heads.safetensors").is_file() and not (tmp_path / "model" / "model.safetensors").exists()
    base = GPTNeoXForCausalLM.from_pretrained(made / "base").state_dict()
    assert all(torch.equal(base[name], value) for name, value in DynaMoForCausalLM.from_pretrained(
        str(tmp_path / "model")).base.state_dict().items())  # fmt: skip


def test_low_rank_tuning_ends_in_a_plain_model(run, made, tmp_path):
    arguments = ("finetune", made / "model", "--data", made / "said.json", *SMALL, "--lora-rank", 2, "--checkpoint-every", 2)
    run(*arguments, "--dry-run", "--json")
    count = json.loads(run.out[run.out.index("{") :])["parameters"]
    assert count["heads"] < count["trained"] < count["heads"] + count["base"] / 2
    run(*arguments, "--out", tmp_path)
    before, after = weights(made / "model"), weights(tmp_path / "model")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("base" in name for name in moved) and any(name.startswith("heads") for name in moved)
    assert all("weight" in name for name in moved if name.startswith("base"))  # biases, norms and embeddings are left alone
    assert not any("embed" in name or "lm_head" in name for name in moved)


@pytest.mark.parametrize("name", ["base", "model"])
def test_one_head_tunes_the_base_alone_and_the_result_is_usable(run, made, tmp_path, name):
    run("finetune", made / name, "--heads", 1, "--data", made / "said.json", *SMALL, "--out", tmp_path)
    model = DynaMoForCausalLM.from_pretrained(str(tmp_path / "model"))
    assert model.num_heads == 1 and len(model.heads) == 0 and model.cooccurrence is None
    assert run("generate", tmp_path / "model", "the fox", "-n", 4)
    assert "--heads 1 has none" in run.refused(
        "finetune", made / name, "--heads", 1, "--count", "--data", made / "said.json", *SMALL, "--out", tmp_path / "x"
    )


def test_a_base_and_a_model_tuned_on_the_same_data_are_compared_on_questions(run, made, tmp_path):
    for name, more in (("chat", ()), ("base", ("--heads", 1))):
        run("finetune", made / "model", *more, "--data", made / "said.json", *SMALL, "--out", tmp_path / name)
    (tmp_path / "q.jsonl").write_text('{"turns": ["the fox ran"]}\n{"turns": ["one day"]}\n')
    arguments = (
        "eval",
        "completion",
        tmp_path / "chat/model",
        "--chat",
        "--bench",
        tmp_path / "q.jsonl",
        "--out",
        tmp_path / "e",
    )
    arguments += ("--eps-b", "0,1", "--no-strict", "--seeds", 1, "-n", 4)
    run(*arguments, "--base", tmp_path / "base/model", "--json")
    found = json.loads(run.out)
    assert found["settings"]["base"]["num_heads"] == 1 and found["settings"]["chat_template"] == DEFAULT
    assert str(tmp_path / "base/model") in found["baseline"]
    assert found["prompts"] == ["the fox ran", "one day"]
    lines = [json.loads(line) for line in (tmp_path / "e" / "completion-q.texts.jsonl").read_text().splitlines()]
    assert {"base", "chat_template"} <= lines[0].keys()
    base, chat = (DynaMoForCausalLM.from_pretrained(str(tmp_path / name / "model")) for name in ("base", "chat"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "chat/model")
    ids = torch.tensor([encode_chat(tokenizer, [{"role": "user", "content": "one day"}])])
    for arm, model, more in (("base", base, {}), ("mask+Otsu+blur, eps_b 1", chat, {"eps_b": 1.0})):
        mine = next(line for line in lines[1:] if line["arm"] == arm and line["prompt"] == 1)
        heads = model.num_heads if more else 1
        heads = min(heads, model.cooccurrence.order) if model.cooccurrence else heads
        text = model.generate(ids, max_new_tokens=4, verify="off", do_sample=True, num_heads=heads, seed=1000, **more)
        assert mine["tokens"] == text[0, ids.shape[1] :].tolist()
    assert "another choice of base" in run.refused(*arguments, "--base", made / "base")


def test_the_best_conversations_are_kept_and_their_scores_are_on_disk(run, made, tmp_path):
    arguments = (
        "finetune",
        made / "model",
        "--data",
        made / "said.json",
        *SMALL,
        "--keep",
        25,
        "--reference",
        made / "base",
    )
    run(*arguments, "--out", tmp_path)
    assert "25 of 60 conversations kept by reference:base" in run.err
    scores = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    kept = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert len(scores) == 60 and len(kept) == 25
    assert min(entry["score"] for entry in kept) >= max(entry["score"] for entry in scores if not entry["kept"])
    assert len(TokenStore(tmp_path / "tokens")) == 25
    asked = (tmp_path / "judge.reference.jsonl").read_bytes()
    run(*arguments, "--out", tmp_path)  # everything is there already
    assert (tmp_path / "judge.reference.jsonl").read_bytes() == asked
    assert json.loads((tmp_path / "training.json").read_text())["data"]["kept"] == 25


def test_self_distillation_trains_on_the_models_own_answers(run, made, tmp_path):
    """The model first learns to answer "sun", so that its own answers are known."""
    records = [{"prompt": text[:30], "response": "sun"} for text in texts(40)]
    (tmp_path / "sun.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    rates = ("--lr-b", "3e-3", "--lr-m", "1e-2", "--lr-mb", "3e-4", *SMALL[:-1], "30")
    run("finetune", made / "base", "--heads", 2, "--data", tmp_path / "sun.jsonl", *rates, "--out", tmp_path / "sun")
    options = ("--self-distill", "--distill-tokens", 8, "--distill-temperature", 0)
    run("finetune", tmp_path / "sun/model", "--data", made / "said.json", *SMALL, *options, "--out", tmp_path / "own")
    found = [json.loads(line)["messages"] for line in (tmp_path / "own" / "distilled.jsonl").read_text().splitlines()]
    assert len(found) > 50 and sum(said[-1]["content"] == "sun" for said in found) > 50
    assert "answers of the model's own" in run.err
    short = ("--block-size", 16)
    refused = run(
        "finetune", made / "model", "--data", made / "said.json", *SMALL, *options, *short, "--out", tmp_path / "x", status=2
    )
    assert refused == "" and "The model answered none of the 60 conversations" in run.err


def test_a_template_of_ones_own_ends_generation_where_it_ends_a_turn(run, made, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    neox(vocab_size=302).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "mine.jinja").write_text(
        "{% for m in messages %}{{ m.role + ' ' + m.content + '<turn>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
    )
    run(
        "finetune", tmp_path / "base", "--template", tmp_path / "mine.jinja", "--data", made / "said.json", *SMALL,
        "--out", tmp_path / "run",
    )  # fmt: skip
    model = DynaMoForCausalLM.from_pretrained(str(tmp_path / "run/model"))
    turn = tokenizer.convert_tokens_to_ids("<turn>")
    assert sorted(model.generation_config.eos_token_id) == sorted([turn, tokenizer.convert_tokens_to_ids(END)])
    store = TokenStore(tmp_path / "run/tokens")
    assert all(document[-1] == turn for document in store)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--keep", 5), "--keep needs a judge"),
        (("--reference", "x"), "--keep"),
        (("--freeze", "--lora-rank", 2), "one of them"),
        (("--lora-rank", 0), "--lora-rank is 0"),
        (("--count-weight", 0), "--count-weight"),
        (("--heads", 5), "num_heads=3"),
        (("--block-size", 999), "context is 128"),
        (("--template", "nowhere.jinja"), "cannot be read"),
        (("--tables", "nowhere"), "neither a table"),
        (("--steps", 0), "steps is 0"),
        (("--keep", 5, "--endpoint", "http://127.0.0.1:9/v1"), "--judge-model"),
    ],
)
def test_bad_input_gets_one_sentence(run, made, tmp_path, options, said):
    assert said in run("finetune", made / "model", "--data", made / "said.json", *SMALL[:-2], *options, "--out", tmp_path,
                       status=2) + run.err  # fmt: skip
    assert "Traceback" not in run.err


def test_text_without_conversations_is_refused_with_the_shapes_that_are_known(run, made, tmp_path):
    said = run.refused("finetune", made / "model", "--data", made / "text.jsonl", *SMALL, "--out", tmp_path)
    assert "line 1" in said and "OpenAI" in said and "Alpaca" in said
