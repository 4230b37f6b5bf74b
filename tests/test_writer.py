"""Characters as they become certain: half characters, stop strings across steps, and the same text as decoding it whole."""

from __future__ import annotations

import pytest
from commandline import END, byte_tokenizer
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from dynamo_lm.decoding.detokenizer import IncrementalDetokenizer

BYTES = byte_tokenizer(258)  # a token a byte
PIECES = byte_tokenizer(300)  # merges: tokens of several characters


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama's: "▁" is a space, one is stripped at the beginning, and bytes stand for what is not in the vocabulary."""
    words = ["▁", "▁a", "b", "▁the", "fox", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend)


LLAMA = sentencepiece()


def steps_of(ids: list[int], cuts: list[int]) -> list[list[int]]:
    """`ids` in steps of these sizes, repeated; a closing step of nothing."""
    steps, at, number = [], 0, 0
    while at < len(ids):
        steps.append(ids[at : at + cuts[number % len(cuts)]])
        at, number = at + cuts[number % len(cuts)], number + 1
    return [*steps, []]


def slowly(tokenizer, prompt, new, stops, keep_stop) -> tuple[str, bool]:
    """The whole text, decoded at once and cut by looking at every place where it could end."""
    text = tokenizer.decode(prompt + new, skip_special_tokens=True)
    text = text[len(tokenizer.decode(prompt, skip_special_tokens=True)) :]
    for end in range(len(text) + 1):
        over = [stop for stop in stops if text[:end].endswith(stop)]
        if over:
            return (text[:end] if keep_stop else text[: end - max(map(len, over))]), True
    return text, False


def test_characters_of_several_tokens_appear_when_they_are_whole():
    ids = BYTES("fox é!")["input_ids"]
    writer = IncrementalDetokenizer(BYTES, ids[:3])
    assert [writer.add([token]) for token in ids[3:]] == [" ", "", "é", "!"]
    assert (writer.end(), writer.text, writer.ended) == ("", " é!", False)


def test_what_stands_before_half_a_character_is_not_held_back():
    ids = BYTES("go é")["input_ids"]
    writer = IncrementalDetokenizer(BYTES, ids[:1])
    assert (writer.add(ids[1:4]), writer.add(ids[4:])) == ("o ", "é")


def test_half_a_character_at_the_end_is_said_as_the_tokenizer_says_it():
    ids = BYTES("a é")["input_ids"]
    writer = IncrementalDetokenizer(BYTES, ids[:1])
    assert (writer.add(ids[1:3]), writer.end(), writer.text) == (" ", "\ufffd", " \ufffd")


def test_a_character_that_the_prompt_began_belongs_to_the_text():
    ids = BYTES("é!")["input_ids"]
    writer = IncrementalDetokenizer(BYTES, ids[:1])
    assert (writer.add(ids[1:2]), writer.add(ids[2:])) == ("é", "!")


def test_a_token_starts_behind_bytes_before_it_that_are_no_character():
    ids = BYTES("aé!?")["input_ids"]
    writer, starts = IncrementalDetokenizer(BYTES, ids[1:2]), []  # half a character, as in the prompt "aé" cut short
    for token in [ids[3], ids[1], ids[2], ids[1], ids[4]]:
        writer.add([token])
        starts.append(writer.start[0])
    assert writer.text == "\ufffd!é\ufffd?" and starts == [1, 2, 2, 3, 4]


def test_special_tokens_are_not_text():
    writer = IncrementalDetokenizer(BYTES, BYTES("fox")["input_ids"])
    assert writer.add([*BYTES("es")["input_ids"], BYTES.convert_tokens_to_ids(END)]) == "es"


@pytest.mark.parametrize(
    ("steps", "stops", "kept", "cut"),
    [
        (["one. two"], ["."], ["one."], ["one"]),
        (["one.", " two"], [". t"], ["one.", " t"], ["one", ""]),  # over two steps: "." is held back
        (["a<", "b", "<end", ">"], ["<end>"], ["a<", "b", "<end", ">"], ["a", "<b", "", ""]),  # a false alarm, then the end
        (["aab", "c"], ["aac", "abc"], ["aab", "c"], ["a", ""]),
        (["xab"], ["ab", "b"], ["xab"], ["x"]),  # both end at the same place: the longer one goes
        (["xabc"], ["abc", "b"], ["xab"], ["xa"]),  # the one that is complete first
        (["x", "", "y"], ["y"], ["x", "", "y"], ["x", "", ""]),
    ],
)
def test_a_stop_string_ends_the_text(steps, stops, kept, cut):
    for keep_stop, expected in ((True, kept), (False, cut)):
        writer = IncrementalDetokenizer(BYTES, BYTES("go ")["input_ids"], stops, keep_stop=keep_stop)
        assert [writer.add(BYTES(step)["input_ids"]) for step in steps] == expected
        assert writer.ended and writer.end() == "" and writer.add(BYTES("more")["input_ids"]) == ""
        assert writer.text == "".join(expected)


def test_the_beginning_of_a_stop_string_is_given_out_when_nothing_follows():
    writer = IncrementalDetokenizer(BYTES, [], ["<end>"], keep_stop=False)
    assert (writer.add(BYTES("so <en")["input_ids"]), writer.end(), writer.ended) == ("so ", "<en", False)


texts = st.text(st.sampled_from("ab .fox thé🦊€<>\n"), max_size=30)


@given(
    st.sampled_from([BYTES, PIECES]),
    texts,
    st.one_of(texts, st.lists(st.integers(1, 255), max_size=20)),  # bytes at random are mostly no UTF-8
    st.lists(st.text(st.sampled_from("ab .fé🦊<"), min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any),  # steps may be empty
    st.booleans(),
)
@example(BYTES, "", [95, 28], ["<"], [1], False)
def test_the_text_is_the_one_that_decoding_it_whole_gives(tokenizer, prompt, text, stops, cuts, keep_stop):
    ids = tokenizer(prompt)["input_ids"]
    new = tokenizer(text)["input_ids"] if isinstance(text, str) else text
    writer = IncrementalDetokenizer(tokenizer, ids, stops, keep_stop=keep_stop)
    said = ""
    for step in steps_of(new, cuts):
        more = writer.add(step)
        said += more
        assert said == writer.text
        assert stops or not more.endswith("\ufffd")  # in front of a stop string it may be certain that a byte is none
    said += writer.end()
    assert (said, writer.ended) == slowly(tokenizer, ids, new, stops, keep_stop)
    assert writer.text == said


@given(
    st.lists(st.sampled_from(["▁", "▁a", "b", "▁the", "fox", "é", "🦊"]), max_size=12),
    st.integers(0, 4),
    st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any),  # steps may be empty
)
def test_spaces_that_a_tokenizer_strips_at_the_beginning_are_not_lost_inside(words, prompted, cuts):
    ids = [[f"<0x{byte:02X}>" for byte in word.encode()] if word in "é🦊" else [word] for word in words]
    tokens = [LLAMA.convert_tokens_to_ids(piece) for group in ids for piece in group]
    prompt = [LLAMA.convert_tokens_to_ids(piece) for group in ids[:prompted] for piece in group]
    writer = IncrementalDetokenizer(LLAMA, prompt)
    for step in steps_of(tokens[len(prompt) :], cuts):
        writer.add(step)
    writer.end()
    assert LLAMA.decode(prompt, skip_special_tokens=True) + writer.text == LLAMA.decode(tokens, skip_special_tokens=True)
