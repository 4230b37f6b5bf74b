"""Special tokens inside a text: left out of it, but matched by stop strings and counted by nobody's offsets."""

from __future__ import annotations

import pytest
from commandline import END
from hypothesis import example, given
from hypothesis import strategies as st
from served import PROMPTS, offline, serving, small
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dynamo_lm.data.chat_template import chat_template
from dynamo_lm.decoding.detokenizer import IncrementalDetokenizer

LINE_END = 199
MARKS = {51: "<|mark|>", 136: "<|turn|>", 254: "<|tool|>", 276: "<|think|>"}  # ids that the small model often writes


def words() -> PreTrainedTokenizerFast:
    """A token a word, " cb" for 53, but for the marks; every text begins with the end token, which is no part of it."""
    names = [f"Ġ{chr(97 + id % 26)}{chr(97 + id // 26)}" for id in range(300)]
    names[0], names[LINE_END] = END, "Ċ"
    for id, name in MARKS.items():
        names[id] = name
    backend = Tokenizer(models.WordLevel({name: id for id, name in enumerate(names)}, unk_token=END))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END, *MARKS.values()])
    backend.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    extra = list(MARKS.values())
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, bos_token=END, additional_special_tokens=extra)


WORDS = words()
PROMPT = small()[1](PROMPTS[4])["input_ids"]
NEW = offline(PROMPTS[4], 40)  # marks among them
ASKED = {"model": "small", "temperature": 0, "prompt": PROMPT, "max_tokens": 40}


@pytest.fixture(scope="module")
def served():
    with serving(tokenizer=chat_template(words())) as running:
        yield running


def shown(ids: list[int]) -> str:
    return WORDS.decode(ids, skip_special_tokens=True)


def completion(served, stream: bool, **asked):
    """The text of a completion, its finish reason, tokens with offsets and log-probabilities, and how many are new."""
    options = {"stream_options": {"include_usage": True}} if stream else {}
    answer = served.client().completions.create(**{**ASKED, "logprobs": 0, "stream": stream} | options | asked)
    chunks = list(answer) if stream else [answer]
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    scores = [choice.logprobs for choice in choices if choice.logprobs]
    tokens = [pair for each in scores for pair in zip(each.tokens, each.text_offset, strict=True)]
    assert all(len(each.tokens) == len(each.token_logprobs) == len(each.top_logprobs) for each in scores)
    finish = choices[-1].finish_reason
    return "".join(choice.text for choice in choices), finish, tokens, chunks[-1].usage.completion_tokens


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("extra", [{}, {"verify": "off", "eps_b": 0.0}])
def test_offsets_count_the_characters_that_the_text_has(served, stream, extra):
    ids = [51, *PROMPT, 136]
    text, _, tokens, _ = completion(served, stream, prompt=ids, echo=True, seed=1, extra_body=extra)
    everything = [WORDS.convert_tokens_to_ids(token.replace(" ", "Ġ").replace("\n", "Ċ")) for token, _ in tokens]
    assert everything[: len(ids)] == ids and len(everything) == len(ids) + 40
    assert any(token in MARKS for token in everything[len(ids) :])
    assert text == shown(everything)
    assert [offset for _, offset in tokens] == [len(shown(everything[:place])) for place in range(len(everything))]


@pytest.mark.parametrize("stream", [False, True])
def test_offsets_in_an_echoed_text_are_places_in_that_text(served, stream):
    prompt = f" ab{MARKS[51]} cd{MARKS[136]} ef"
    text, _, tokens, _ = completion(served, stream, prompt=prompt, echo=True, max_tokens=3)
    assert text.startswith(prompt) and tokens[0] == (END, 0)
    assert tokens[1:6] == [(" ab", 0), (MARKS[51], 3), (" cd", 11), (MARKS[136], 14), (" ef", 22)]
    assert tokens[6][1] == len(prompt)
    alone = served.client().completions.create(**ASKED | {"prompt": prompt, "echo": True, "max_tokens": 0, "logprobs": 0})
    assert alone.choices[0].logprobs.text_offset == [offset for _, offset in tokens[:6]]


FIRST = next(place for place, token in enumerate(NEW) if token in MARKS)
LATE = next(place for place in range(FIRST + 4, 40) if NEW[place] not in [*MARKS, *NEW[:place]])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "place"),
    [
        (WORDS.decode([NEW[LATE]]), LATE),  # a word after marks
        (MARKS[NEW[FIRST]], FIRST),  # a mark
        (WORDS.decode(NEW[FIRST - 1 : FIRST + 1]), FIRST - 1),  # a word and a mark
        (WORDS.decode(NEW[FIRST : FIRST + 2]), FIRST),
        (WORDS.decode(NEW[FIRST - 1 : FIRST + 2]), FIRST - 1),
        (shown(NEW[FIRST - 1 : FIRST + 2]), FIRST - 1),  # two words that a reader sees beside each other
    ],
)
def test_stop_strings_match_special_tokens_and_the_text_without_them(served, stream, stop, place):
    text, finish, tokens, written = completion(served, stream, stop=["never here", stop])
    assert (text, finish) == (shown(NEW[:place]), "stop")
    assert [token for token, _ in tokens] == [WORDS.decode([token]) for token in NEW[:place]]
    assert [offset for _, offset in tokens] == [len(shown(NEW[:before])) for before in range(place)]
    assert place < written <= place + 3  # no token after the one that completes the stop string


@pytest.mark.parametrize("stop", [WORDS.decode([NEW[LATE]])[2:], MARKS[NEW[FIRST]][2:]])
def test_a_token_that_a_stop_string_cuts_keeps_its_score(served, stop):
    place = next(place for place in range(40) if stop in WORDS.decode(NEW[: place + 1]))
    text, finish, tokens, _ = completion(served, False, stop=[stop])
    assert (text, finish) == (shown(NEW[: place + 1]).partition(stop)[0], "stop")
    assert [token for token, _ in tokens] == [WORDS.decode([token]) for token in NEW[: place + 1]]


@pytest.mark.parametrize("stream", [False, True])
def test_bytes_of_a_chats_tokens_make_its_text(served, stream):
    asked = {"messages": [{"role": "user", "content": " ab cd"}], "max_tokens": 40, "logprobs": True, "top_logprobs": 1}
    answer = served.client().chat.completions.create(model="small", temperature=0, stream=stream, **asked)
    if stream:
        choices = [chunk.choices[0] for chunk in answer]
        text = "".join(choice.delta.content or "" for choice in choices)
    else:
        choices, text = answer.choices, answer.choices[0].message.content
    content = [each for choice in choices if choice.logprobs for each in choice.logprobs.content]
    assert {each.token for each in content} & set(MARKS.values())  # listed, though the text leaves them out
    assert bytes(byte for each in content for byte in each.bytes).decode() == text


# ---------------------------------------------------------------- the detokenizer alone


def slowly(prompt: list[int], new: list[int], stops: list[str], keep_stop: bool) -> tuple[str, bool]:
    """The text and whether a stop string ended it, by trying every place as the end, in the text and with marks in it."""
    characters: list[tuple[str, bool]] = []  # with whether the text has it
    for place, token in enumerate(new):
        before, after = (shown(prompt + new[:end]) for end in (place, place + 1))
        characters += [(character, False) for character in MARKS.get(token, "")]
        characters += [(character, True) for character in after[len(before) :]]
    for end in range(1, len(characters) + 1):
        seen = [at for at in range(end) if characters[at][1]]
        starts = []
        for stop in stops:
            if "".join(character for character, _ in characters[:end]).endswith(stop):
                starts.append(end - len(stop))
            text = "".join(characters[at][0] for at in seen)
            if characters[end - 1][1] and text.endswith(stop):
                starts.append(seen[-len(stop)])
        if starts:
            return "".join(character for character, text in characters[: end if keep_stop else min(starts)] if text), True
    return shown(prompt + new)[len(shown(prompt)) :], False


tokens = st.sampled_from([27, 53, 79, LINE_END, *MARKS])
parts = st.sampled_from([*" bca\n|<>", " bb", " bc", *MARKS.values(), "<|", "|>", "mark"])


@given(
    st.lists(tokens, max_size=3),
    st.lists(tokens, max_size=12),
    st.lists(st.lists(parts, min_size=1, max_size=3).map("".join), max_size=3),
    st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(any),
    st.booleans(),
)
@example([27], [53, 51, 53], [" bc bc"], [1], False)
@example([], [53, 136, 51], ["<|mark|>", "bc<|turn"], [2], False)
def test_a_text_with_special_tokens_ends_where_trying_every_place_says(prompt, new, stops, cuts, keep_stop):
    writer, at, number, said = IncrementalDetokenizer(WORDS, prompt, stops, keep_stop=keep_stop), 0, 0, ""
    while at < len(new):
        size = cuts[number % len(cuts)]
        said += writer.add(new[at : at + size])
        at, number = at + size, number + 1
    said += writer.end()
    assert said == writer.text
    assert (writer.text, writer.ended) == slowly(prompt, new, stops, keep_stop)
