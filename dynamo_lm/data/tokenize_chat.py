"""Conversations in, a store of tokens out that knows which of them the assistant said.

`encode` is what the tests believe: the rendered text of the whole conversation, tokenized once, a token being learned if it
begins in what the template writes for an assistant's turn. Nothing here knows models.
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
BATCH = 256  # conversations that are written at once


def encode(messages: Messages, tokenizer: Any) -> list[Encoded]:
    """A conversation as tokens, the last one being the end of the last answer.

    Every answer is learned, with the special token that ends it. That is one document, unless the template writes earlier
    answers differently from the last one (Qwen3 leaves their thoughts out): then one for each answer, as generation meets
    them.

    Raises:
        InputError: the template refuses the messages, or cannot say where an answer begins.
    """
    whole = render(tokenizer, messages)
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
    if all(whole.startswith(text) for text, _, _ in spans):
        return [_tokens(whole, [(begin, end) for _, begin, end in spans], tokenizer)]
    return [_tokens(text, [(begin, end)], tokenizer) for text, begin, end in spans]


def _tokens(text: str, spans: Sequence[tuple[int, int]], tokenizer: Any) -> Encoded:
    special = special_tokens(tokenizer)
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, starts = list(found["input_ids"]), [start for start, _ in found["offset_mapping"]]
    learned = [False] * len(ids)
    for begin, end in spans:
        said = [place for place, start in enumerate(starts) if begin <= start < end]
        ends = [place for place in said if ids[place] in special]
        for place in said:
            # Behind the token that ends the turn comes at most white space, which generation never reaches.
            learned[place] = not ends or place <= ends[-1]
    length = len(ids) - next((behind for behind, flag in enumerate(reversed(learned)) if flag), len(ids))
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
    """The store in `folder` of all conversations of `sources`; what is there is reused if it was made from the same inputs.

    A conversation of more than `longest` tokens is cut behind the last answer that fits, and left out if the first does not.
    Nothing is cut within a turn. How many is in the store's `facts`: "conversations" read, "cut", "too_long" (left out),
    "empty" (an answer without text; left out) and "learned_tokens".

    Raises:
        InputError: a record that is no conversation, or none that fits.
    """
    if not tokenizer.is_fast:
        raise InputError("The tokenizer does not say where its tokens stand in a text; use one with a tokenizer.json.")
    inputs = digest(
        {"sources": identities(sources), "tokenizer": tokenizer_fingerprint(tokenizer), "template": tokenizer.chat_template}
        | {"longest": longest, "format": "conversations 1"}
    )
    facts = dict.fromkeys(("conversations", "cut", "too_long", "empty", "learned_tokens"), 0)
    documents = _documents(conversations(sources), tokenizer, longest, facts)
    return build_store(Path(folder), inputs, _batches(documents, longest, facts), tokenizer, facts=facts, progress=progress)


def _documents(
    found: Iterable[tuple[str, Messages]], tokenizer: Any, longest: int, facts: dict[str, int]
) -> Iterator[Encoded]:
    for where, messages in found:
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
                    yield from encoded
                    break
            else:
                facts["too_long"] += 1
        except InputError as error:
            raise InputError(f"{where}: {error}") from error


def _batches(
    documents: Iterator[Encoded], longest: int, facts: dict[str, int]
) -> Iterator[tuple[list[list[int]], list[list[bool]]]]:
    rows: list[list[int]] = []
    flags: list[list[bool]] = []
    for ids, learned in documents:
        rows.append(ids)
        flags.append(learned)
        facts["learned_tokens"] += sum(learned)
        if len(rows) == BATCH:
            yield rows, flags
            rows, flags = [], []
    if rows:
        yield rows, flags
    if not facts["learned_tokens"]:
        raise InputError(
            f"None of the {facts['conversations']:,} conversations can be used: {facts['too_long']:,} are longer than "
            f"{longest:,} tokens and {facts['empty']:,} have an empty answer; give a larger --block-size or other data."
        )
