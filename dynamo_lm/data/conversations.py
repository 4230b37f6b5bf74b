"""Records of instruction data in, lists of messages out.

A record is recognised by its fields: OpenAI's `messages`, ShareGPT's `conversations`, Alpaca's `instruction`, `input`,
`output`, Dolly's `instruction`, `context`, `response`, or a plain `prompt` with its `response`, `completion` or `output`.
Knows no tokens.
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
        where = None
        for where, record in records(source):
            yield where, messages(record, where)
        if where is None:
            raise InputError(f"{source} holds no conversation.")


def messages(record: Mapping[str, Any], where: str) -> Messages:
    """A record as messages, at least one of them the assistant's; `where` is for the error.

    Turns of the assistant before the first of the user are left out: nothing leads to them. An empty answer is kept: the
    tokenizing code leaves it out and counts it.

    Raises:
        InputError: the record has none of the shapes, or something other than text where text belongs.
    """

    def field(*names: str) -> str | None:
        return next((name for name in names if name in record), None)

    def text(name: str) -> str:
        return text_of(where, name, record[name])

    turns = record.get(field("messages", "conversations", "conversation") or "")
    if turns is not None:
        if not isinstance(turns, Sequence) or isinstance(turns, str):
            raise InputError(f"{where}: the messages are {type(turns).__name__}, not a list.")
        result = [_turn(turn, where) for turn in turns]
    else:
        prompt, answer = field("instruction", "prompt", "question"), field("output", "response", "completion", "answer")
        if prompt is None or answer is None:
            raise InputError(f"{where}: fields {', '.join(map(repr, record)) or 'none'}; it takes {KNOWN}.")
        more = next((text(name) for name in ("input", "context") if record.get(name)), "")
        parts = [part.strip() for part in (_unwrap(text(prompt)), more)]
        result = [{"role": "system", "content": text("system")}] if record.get("system") else []
        result.append({"role": "user", "content": "\n\n".join(parts if parts[1] else parts[:1])})
        result.append({"role": "assistant", "content": text(answer)})
    first = next((index for index, message in enumerate(result) if message["role"] == "user"), len(result))
    result = [message for index, message in enumerate(result) if index > first or message["role"] != "assistant"]
    if not any(message["role"] == "assistant" for message in result):
        raise InputError(f"{where}: no message is an answer of the assistant, so there is nothing to learn.")
    return result


def _turn(turn: Any, where: str) -> dict[str, str]:
    if not isinstance(turn, Mapping):
        raise InputError(f"{where}: a message is {type(turn).__name__}, not an object.")
    name = turn.get("role", turn.get("from"))
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise InputError(f"{where}: a message has the role {name!r}; give {', '.join(ROLES)}.")
    content = turn.get("content", turn.get("value"))
    if isinstance(content, Sequence) and not isinstance(content, str):  # OpenAI's list of parts
        parts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in content]
        if None in parts:
            raise InputError(f"{where}: a message has a part other than text.")
        content = "".join(text_of(where, "text", part) for part in parts)
    return {"role": role, "content": text_of(where, "content", content)}


def _unwrap(prompt: str) -> str:
    match = WRAPPED.fullmatch(prompt)
    return "\n\n".join(filter(None, match.groups())) if match else prompt
