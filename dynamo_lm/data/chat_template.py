"""Chat templates: messages in, the text and tokens that a model is tuned on and prompted with.

A message is {"role": "system" | "user" | "assistant", "content": text}. The template is the tokenizer's own, in the format
of transformers, or `DEFAULT`, which needs no token that a base model does not have. It is set on the tokenizer, whose
`save_pretrained` saves it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from dynamo_lm.errors import InputError, first_line

Message = Mapping[str, str]

DEFAULT = """\
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{{ message['content'] | trim + '\\n\\n' }}
{%- elif message['role'] == 'user' -%}
{{ 'User:\\n' + message['content'] | trim + '\\n\\n' }}
{%- elif message['role'] == 'assistant' -%}
{{ 'Assistant:\\n' + message['content'] | trim + eos_token + '\\n\\n' }}
{%- else -%}
{{ raise_exception('A message has the role "' + message['role'] + '"; give system, user or assistant.') }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ 'Assistant:\\n' }}
{%- endif -%}
"""


def chat_template(tokenizer: Any, template: str | None = None) -> Any:
    """`tokenizer` itself, with a chat template: `template` if given, else its own, else `DEFAULT`.

    Raises:
        InputError: the default is needed, and there is no end-of-text token to end a turn with.
    """
    if template is not None:
        tokenizer.chat_template = template
    elif not tokenizer.chat_template:
        if tokenizer.eos_token is None:
            raise InputError("The tokenizer has neither a chat template nor an end-of-text token; set one of them.")
        text = tokenizer("x").input_ids  # a tokenizer that begins every text with a token of its own begins a chat with it
        begins = tokenizer.bos_token_id is not None and text[0] == tokenizer.bos_token_id
        tokenizer.chat_template = ("{{ bos_token }}" if begins else "") + DEFAULT
    return tokenizer


def render(tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
    """The text of a conversation; with `add_generation_prompt` up to where the assistant's answer begins.

    Raises:
        InputError: the template refuses these messages.
    """
    try:
        return tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (jinja2.TemplateError, TypeError, KeyError, ValueError, IndexError) as error:
        raise InputError(f"The chat template cannot be applied to these messages: {first_line(error)}") from error


def encode_chat(tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
    """The tokens of `render`'s text; the template itself writes the special tokens.

    Raises:
        InputError: the template refuses these messages.
    """
    return tokenizer(render(tokenizer, messages, add_generation_prompt), add_special_tokens=False).input_ids


def special_tokens(tokenizer: Any) -> set[int]:
    """Ids of the special tokens."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def end_of_turn(tokenizer: Any) -> int:
    """The token that ends the assistant's turn: generation stops there, and at the end of text.

    The last special token of a rendered answer; the end-of-text token where the template writes none.
    """
    question = {"role": "user", "content": "a"}
    begin = len(encode_chat(tokenizer, [question]))
    answer = encode_chat(tokenizer, [question, {"role": "assistant", "content": "b"}], add_generation_prompt=False)
    special = special_tokens(tokenizer)
    return next((token for token in reversed(answer[begin:]) if token in special), tokenizer.eos_token_id)
