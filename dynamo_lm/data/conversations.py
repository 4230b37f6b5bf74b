"""Records of instruction data in, lists of messages out.

A record is known by its fields: OpenAI's `messages`, ShareGPT's `conversations`, Alpaca's `instruction`, `input`, `output`,
Dolly's `instruction`, `context`, `response`, or a plain `prompt` with its `response`, `completion` or `output`. Knows no
tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dynamo_lm.data.sources import records, text_of
from dynamo_lm.errors import InputError

ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
}  # fmt: skip
KNOWN = (
    "messages (OpenAI), conversations (ShareGPT), instruction with output (Alpaca) or response (Dolly), prompt with response"
)
# Alpaca's wording around a prompt: a chat template takes its place.
WRAPPED = re.compile(
    r"Below is an instruction.*?### Instruction:\n(?P<text>.*?)(?:\n\n### Input:\n(?P<more>.*?))?\s*### Response:\s*",
    re.DOTALL,
)

Messages = list[dict[str, str]]


def conversations(sources: Sequence[str]) -> Iterator[tuple[str, Messages]]:
    """(where it stands, its messages) for each record of `sources`, as `sources.records` reads them.

    Raises:
        InputError: a record of an unknown shape, or no record at all.
    """
    for source in sources:
        found = False
        for where, record in records(source):
            found = True
            yield where, messages(record, where)
        if not found:
            raise InputError(f"{source} holds no conversation.")


def messages(record: Mapping[str, Any], where: str) -> Messages:
    """One record as messages, at least one of them the assistant's; `where` is for the error.

    What the assistant says before anybody asked is left out: nobody can ask for it again. An empty answer is kept: whoever
    tokenizes leaves it out and counts it.

    Raises:
        InputError: the record has none of the shapes, or something that is no text where text belongs.
    """
    turns = next((record[key] for key in ("messages", "conversations", "conversation") if key in record), None)
    if turns is not None:
        if not isinstance(turns, Sequence) or isinstance(turns, str):
            raise InputError(f"{where}: the messages are no list but {type(turns).__name__}.")
        found = [_turn(turn, where) for turn in turns]
    else:
        asked = next((key for key in ("instruction", "prompt", "question") if key in record), None)
        answered = next((key for key in ("output", "response", "completion", "answer") if key in record), None)
        if asked is None or answered is None:
            raise InputError(f"{where}: fields {', '.join(map(repr, record)) or 'none'}; known are {KNOWN}.")
        more = next((record[key] for key in ("input", "context") if record.get(key)), "")
        prompt = _unwrap(text_of(where, asked, record[asked]))
        more = text_of(where, "input", more)
        user = f"{prompt.strip()}\n\n{more.strip()}" if more.strip() else prompt.strip()
        found = [
            {"role": "user", "content": user},
            {"role": "assistant", "content": text_of(where, answered, record[answered])},
        ]
        if record.get("system"):
            found.insert(0, {"role": "system", "content": text_of(where, "system", record["system"])})
    asked_first = next((index for index, message in enumerate(found) if message["role"] == "user"), len(found))
    found = [m for index, m in enumerate(found) if index > asked_first or m["role"] != "assistant"]
    if not any(message["role"] == "assistant" for message in found):
        raise InputError(f"{where}: no message is an answer of the assistant, so there is nothing to learn.")
    return found


def _turn(turn: Any, where: str) -> dict[str, str]:
    if not isinstance(turn, Mapping):
        raise InputError(f"{where}: a message is no object but {type(turn).__name__}.")
    name = turn.get("role", turn.get("from"))
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise InputError(f"{where}: a message has the role {name!r}; known are {', '.join(ROLES)}.")
    content = turn.get("content", turn.get("value"))
    if isinstance(content, Sequence) and not isinstance(content, str):  # OpenAI's list of parts
        parts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in content]
        if None in parts:
            raise InputError(f"{where}: a message has a part that is no text.")
        content = "".join(text_of(where, "text", part) for part in parts)
    return {"role": role, "content": text_of(where, "content", content)}


def _unwrap(prompt: str) -> str:
    found = WRAPPED.fullmatch(prompt)
    if found is None:
        return prompt
    return f"{found['text']}\n\n{found['more']}" if found["more"] else found["text"]
