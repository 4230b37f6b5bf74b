"""Conversations in, a store of tokens out that records which of them are the assistant's, and so are learned.

`encode` is the specification: the rendered text of the whole conversation, tokenized once; a token is learned if it begins
in what the template writes for an assistant's turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dynamo_lm.data.chat_template import render, special_tokens
from dynamo_lm.data.conversations import Messages, conversations
from dynamo_lm.data.token_store import TokenStore, build_store, digest, identities, tokenizer_fingerprint
from dynamo_lm.errors import InputError

Encoded = tuple[list[int], list[bool]]  # ids, and which of them are learned


def encode(messages: Messages, tokenizer: Any) -> list[Encoded]:
    """A conversation as tokens, the last of which ends the last answer.

    Every answer is learned, with the special token that ends it. That is one document, unless the template writes earlier
    answers differently from the last one (Qwen3 leaves their thoughts out): then one for each answer, as in generation.

    Raises:
        InputError: the template refuses the messages, or cannot tell where an answer begins.
    """
    rendered = render(tokenizer, messages)
    spans: list[tuple[str, int, int]] = []  # text up to an answer's end, where the answer begins, where it ends
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        begin = render(tokenizer, messages[:index], add_generation_prompt=True)
        text = render(tokenizer, messages[: index + 1])
        if not text.startswith(begin):
            raise InputError(
                "The chat template's generation prompt is not how it begins an answer; give another --template."
            )
        spans.append((text, len(begin), len(text)))
    if all(rendered.startswith(text) for text, _, _ in spans):
        return [_tokens(rendered, [(begin, end) for _, begin, end in spans], tokenizer)]
    return [_tokens(text, [(begin, end)], tokenizer) for text, begin, end in spans]


def _tokens(text: str, spans: Sequence[tuple[int, int]], tokenizer: Any) -> Encoded:
    special = special_tokens(tokenizer)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, starts = list(encoding["input_ids"]), [start for start, _ in encoding["offset_mapping"]]
    learned = [False] * len(ids)
    for begin, end in spans:
        answer = [position for position, start in enumerate(starts) if begin <= start < end]
        ends = [position for position in answer if ids[position] in special]
        for position in answer:
            # After the token that ends the turn comes at most white space, which generation never reaches.
            learned[position] = not ends or position <= ends[-1]
    length = max((position + 1 for position, flag in enumerate(learned) if flag), default=0)
    ids, learned = ids[:length], learned[:length]
    if ids and ids[-1] not in special:  # a template that ends no turn: the end of text does
        ids, learned = [*ids, tokenizer.eos_token_id], [*learned, True]
    return ids, learned


def tokenize_conversations(
    sources: Sequence[str],
    tokenizer: Any,
    folder: Path,
    *,
    longest: int,
    progress: Callable[[int, int], None] | None = None,
) -> TokenStore:
    """The store in `folder` of all conversations of `sources`; one that was made from the same inputs is reused.

    A conversation of more than `longest` tokens is cut after the last answer that fits, and left out if the first does not.
    No turn is cut. The store's `facts` count the conversations: "conversations" (read), "cut", "too_long" (left out),
    "empty" (an answer without text; left out) and "learned_tokens".

    Raises:
        InputError: a record that is not a conversation, or none that fits.
    """
    if not tokenizer.is_fast:
        raise InputError("The tokenizer does not give the positions of its tokens; use one with a tokenizer.json.")
    inputs = digest(
        {"sources": identities(sources), "tokenizer": tokenizer_fingerprint(tokenizer), "template": tokenizer.chat_template}
        | {"longest": longest, "format": "conversations 1"}
    )
    facts = dict.fromkeys(("conversations", "cut", "too_long", "empty", "learned_tokens"), 0)
    documents = _documents(conversations(sources), tokenizer, longest, facts)
    return build_store(Path(folder), inputs, documents, tokenizer, facts=facts, progress=progress)


def _documents(
    records: Iterable[tuple[str, Messages]], tokenizer: Any, longest: int, facts: dict[str, int]
) -> Iterator[Encoded]:
    for where, messages in records:
        facts["conversations"] += 1
        if any(message["role"] == "assistant" and not message["content"].strip() for message in messages):
            facts["empty"] += 1
            continue
        answers = [index + 1 for index, message in enumerate(messages) if message["role"] == "assistant"]
        try:
            for end in reversed(answers):
                encoded = encode(messages[:end], tokenizer)
                if all(len(ids) <= longest for ids, _ in encoded):
                    facts["cut"] += end != answers[-1]
                    facts["learned_tokens"] += sum(sum(learned) for _, learned in encoded)
                    yield from encoded
                    break
            else:
                facts["too_long"] += 1
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
    if not facts["learned_tokens"]:
        raise InputError(
            f"None of the {facts['conversations']:,} conversations can be used: {facts['too_long']:,} are longer than "
            f"{longest:,} tokens and {facts['empty']:,} have an empty answer; give a larger --block-size or other data."
        )
