"""The completion protocol: what is written, how it resumes, and who is compared with whom."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import cycle, markov_dynamo
from commandline import END, byte_tokenizer

from dynamo_lm.errors import InputError
from dynamo_lm.evaluation.completion import prompts as benches
from dynamo_lm.evaluation.completion.compare import Completions, compare, duels
from dynamo_lm.evaluation.completion.generate import PAPER, Arm, Text, _resume, arms, write_texts
from dynamo_lm.evaluation.judges.judges import Pair
from dynamo_lm.jsonl_cache import JsonlLog

PROMPTS = ["the fox", "a red house", "night"]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    chance = torch.full((300, 300), 1 / 300)
    network = markov_dynamo(0.05 * cycle(300) + 0.95 * chance, 0.05 * cycle(300, 2) + 0.95 * chance)
    network.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(END)
    return network


def chosen() -> list[Arm]:
    return arms(2, [PAPER], [0.0, 1.0], strict=True, ladder=(0.7,))


def write(model, tokenizer, file: Path, *, seeds: int = 2, **change) -> list[Text]:
    options = {"identity": "me", "seeds": seeds, "seed": 0, "max_new_tokens": 6} | change
    return write_texts(model, tokenizer, PROMPTS, chosen(), file, **options)


@pytest.fixture(scope="module")
def written(model, tokenizer, tmp_path_factory) -> list[Text]:
    return write(model, tokenizer, tmp_path_factory.mktemp("texts") / "texts.jsonl")


def same(texts: list[Text]) -> dict:
    return {(text.arm, text.prompt, text.seed): (text.tokens, text.step_sizes, text.text) for text in texts}


# --- texts ----------------------------------------------------------------------


def test_every_prompt_is_continued_by_every_arm_and_seed(written):
    assert len(written) == len(PROMPTS) * 2 * len(chosen()) == len(same(written))
    for text in written:
        assert sum(text.step_sizes) == len(text.tokens) <= 6 and text.forwards == len(text.step_sizes)


def test_at_eps_b_1_the_method_is_the_base_and_at_0_it_takes_two_tokens_a_step(written):
    found = same(written)
    for (arm, prompt, seed), (tokens, steps, _) in found.items():
        if arm == f"{PAPER}, eps_b 1":
            assert tokens == found["base", prompt, seed][0]
        if arm == f"{PAPER}, eps_b 0":
            assert max(steps) == 2


def test_the_second_sample_of_the_base_is_another_one(written):
    found = same(written)
    differ = [found["base", p, s] != found["base again", p, s] for p in range(len(PROMPTS)) for s in range(2)]
    assert sum(differ) > len(differ) / 2


def test_a_run_that_was_stopped_goes_on_to_the_same_texts(model, tokenizer, written, tmp_path):
    file = tmp_path / "texts.jsonl"
    calls = 0

    def stop(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(model, tokenizer, file, progress=stop)
    with file.open("a") as stream:
        stream.write('{"arm": "base", "pro')  # torn by a power cut
    assert same(write(model, tokenizer, file)) == same(written)
    lines = file.read_text().splitlines()
    assert len(lines) == 1 + len(written) and all(json.loads(line) for line in lines)


@pytest.mark.parametrize(("change", "named"), [({"identity": "other"}, "model"), ({"max_new_tokens": 5}, "max new tokens")])
def test_texts_of_another_run_are_not_mixed_in(model, tokenizer, tmp_path, change, named):
    file = tmp_path / "texts.jsonl"
    write(model, tokenizer, file, seeds=1)
    with pytest.raises(InputError, match=f"another choice of {named}"):
        write(model, tokenizer, file, seeds=1, **change)


def test_more_seeds_keep_the_texts_of_the_first(model, tokenizer, written, tmp_path):
    file = tmp_path / "texts.jsonl"
    write(model, tokenizer, file, seeds=1)
    assert same(write(model, tokenizer, file, seeds=2)) == same(written)


# --- prompts --------------------------------------------------------------------


def test_the_papers_ten_prompts_are_the_default():
    name, prompts = benches.read(None)
    assert name == "paper" and len(prompts) == 10 and prompts[0] == "I am a student at the"


def test_prompts_come_from_plain_lines_and_from_json_lines(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text('Once upon\n\n{"question": "Why?"}\n{"turns": ["First.", "Second."]}\n')
    assert benches.read(str(file)) == ("mine", ["Once upon", "Why?", "First."])


@pytest.mark.parametrize(
    ("content", "said"),
    [("", "has no prompts"), ('{"answer": 1}', "has no prompt; give it as"), ('{"prompt": ', "not valid JSON")],
)
def test_prompts_that_cannot_be_used_are_named(tmp_path, content, said):
    file = tmp_path / "mine.txt"
    file.write_text(content)
    with pytest.raises(InputError, match=said):
        benches.read(str(file))


def test_question_sets_that_are_not_there_are_asked_for(tmp_path):
    with pytest.raises(InputError, match="--data"):
        benches.read("vicuna", tmp_path)


# --- comparison -----------------------------------------------------------------


class LikesLong:
    """A judge of which all is known: the completion with more characters wins."""

    name, caveat = "length", "It sees only length."

    def pairs(self, items, *, progress=None):
        return [int(np.sign(len(item.first) - len(item.second))) for item in items]

    def singles(self, items, *, progress=None):
        return [min(10.0, 1 + len(completion) / 10) for _, completion in items]


class LikesOrder(LikesLong):
    """It knows shuffled words when it sees them, and otherwise the longer text."""

    def pairs(self, items, *, progress=None):
        longer = super().pairs(items)
        orders = [[[int(word[1:]) for word in text.split()] for text in (item.first, item.second)] for item in items]
        return [
            (first == sorted(first)) - (second == sorted(second)) if sorted(first) == sorted(second) else verdict
            for (first, second), verdict in zip(orders, longer, strict=True)
        ]


def text(arm: Arm, prompt: int, seed: int, words: int, seconds: float, forwards: int) -> Text:
    """`words` different words in `forwards` steps."""
    said = " ".join(f"w{1000 * prompt + 100 * seed + i}" for i in range(words))
    steps = [words // forwards] * (forwards - 1)
    return Text(arm.name, prompt, seed, said, list(range(words)), [*steps, words - sum(steps)], forwards, seconds, 0.0, 0)


def completions(prompts: int = 12, seeds: int = 3) -> Completions:
    """The base writes 8 to 11 words at one a step and second; eps_b 0.5 two words more at two a step and second."""
    found, rng = [], np.random.default_rng(0)
    options = arms(2, [PAPER], [0.0, 0.5, 1.0], strict=False, ladder=(0.3, 0.7))
    for prompt in range(prompts):
        for seed in range(seeds):
            for arm in options:
                words = int(rng.integers(8, 12)) + (2 if arm.eps_b == 0.5 else 0)
                forwards = words if arm.eps_b in (None, 1.0) else (words + 1) // 2
                found.append(text(arm, prompt, seed, words, float(forwards), forwards))
    return Completions.gather(found, options, [f"prompt {p}" for p in range(prompts)], seeds)


def quiet(*_: object) -> None:
    pass


def test_a_comparison_counts_wins_losses_speed_and_steps():
    texts = completions()
    found = compare(texts, LikesOrder(), ceiling=2, seed=0, progress=quiet)
    assert found["judge"]["sanity"]["useful"], found["judge"]
    slow, half, one = reversed(found["methods"][PAPER]["points"])
    assert [point["eps_b"] for point in (slow, half, one)] == [1.0, 0.5, 0.0]
    pairs = texts.pairs(f"{PAPER}, eps_b 0.5", "base")
    assert half["plain"]["wins"] == sum(len(pair.first) > len(pair.second) for pair in pairs)
    assert half["plain"]["wins"] + half["plain"]["ties"] + half["plain"]["losses"] == 36
    assert half["plain"]["interval"][0] > 1  # it writes longer texts
    assert slow["speed_up"]["median"] == pytest.approx(1) and slow["shares"] == [1.0, 0.0]
    assert one["tokens_per_step"] == pytest.approx(half["tokens_per_step"], rel=0.1) and one["tokens_per_step"] > 1.8
    assert one["speed_up"]["median"] == pytest.approx(one["tokens_per_step"], rel=0.05)
    assert found["ladder"][0]["temperature"] == 0.3 and found["ladder"][1]["temperature"] == 0.7


def test_a_judge_that_fails_its_check_judges_nothing():
    found = compare(
        completions(), LikesLong(), ceiling=2, seed=0, progress=quiet
    )  # shuffling keeps the length: always a tie
    assert not found["judge"]["sanity"]["useful"] and found["judge"]["sanity"]["reason"]
    assert all(point["plain"] is None and point["matched"] is None for point in found["methods"][PAPER]["points"])
    assert found["methods"][PAPER]["same_quality"] is None


def test_without_a_judge_there_are_speeds_and_diversity():
    found = compare(completions(), None, ceiling=2, seed=0, progress=quiet)
    assert found["judge"] is None
    assert found["methods"][PAPER]["points"][1]["diversity"]["pooled_distinct_2"] > 0


def test_a_judge_that_costs_money_is_asked_for_the_two_temperatures_around_the_match():
    texts = completions()
    every, few = duels(texts, every_rung=True), duels(texts, every_rung=False)
    assert set(few) <= set(every) and len(every) == 3 * 2
    assert all((arm.name, "base") in few for arm in texts.role("candidate"))


def test_pairs_are_two_completions_of_one_prompt():
    texts = completions(prompts=2, seeds=1)
    first = texts.pairs(f"{PAPER}, eps_b 0", "base")[1]
    assert first == Pair("prompt 1", texts.texts[f"{PAPER}, eps_b 0"][1][0].text, texts.texts["base"][1][0].text)


def test_lines_of_prompts_end_at_line_feeds_alone_and_a_byte_order_mark_is_no_part_of_one(tmp_path):
    file = tmp_path / "own.txt"
    file.write_bytes("\ufeffone\u2028still one\r\ntwo\u0085\x0cstill two\n".encode())
    assert benches.read(str(file)) == ("own", ["one\u2028still one", "two\u0085\x0cstill two"])


def test_a_run_whose_texts_hold_line_separators_goes_on(tmp_path):
    file, head = tmp_path / "texts.jsonl", {"seed": 1}
    assert _resume(JsonlLog(file), head) == []
    text = Text("arm", 0, 0, "a\u2028b\u0085c", [1, 2], [2], 1, 1.0, 0.0, 0)
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(vars(text), ensure_ascii=False) + "\n")
    assert _resume(JsonlLog(file), head) == [text]
