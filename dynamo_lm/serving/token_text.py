"""Single tokens as text and as bytes, which is what OpenAI's log-probabilities are listed by.

In: a tokenizer. A token may be part of a character; then only its bytes can be given. Knows byte-level alphabets (GPT-2
and what came after) and byte tokens written as <0x0A> (SentencePiece); any other token is what the tokenizer decodes it
to.
"""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from dynamo_lm.decoding.detokenizer import INCOMPLETE, special_text

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
ALPHABET = {character: byte for byte, character in bytes_to_unicode().items()}


class Vocabulary:
    """Tokens by id. `longest` is the most characters that a token can stand for."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._cache: dict[int, tuple[str, bytes]] = {}

    def text(self, token: int) -> str:
        """The token as text; "bytes:\\xe2\\x96" where it is part of a character."""
        return self._of(token)[0]

    def raw(self, token: int) -> bytes:
        """The bytes that the token adds to a text; none for a special token, which texts leave out."""
        return self._of(token)[1]

    @cached_property
    def longest(self) -> int:
        return max(map(len, self.tokenizer.get_vocab()), default=1)

    @cached_property
    def _anchor(self) -> list[int]:
        """A token in front, since tokenizers may strip a space where decoding begins."""
        return self.tokenizer("a", add_special_tokens=False)["input_ids"][-1:]

    def _of(self, token: int) -> tuple[str, bytes]:
        if token not in self._cache:
            self._cache[token] = self._look_up(token)
        return self._cache[token]

    def _look_up(self, token: int) -> tuple[str, bytes]:
        before = self._decoded(self._anchor)
        text = self._decoded([*self._anchor, token])[len(before) :]
        if special_text(self.tokenizer, token):
            return text, b""
        if INCOMPLETE not in text:
            return text, text.encode()
        piece = self.tokenizer.convert_ids_to_tokens(token) or ""
        byte = BYTE.fullmatch(piece)
        if byte:
            raw = bytes([int(byte[1], 16)])
        elif all(character in ALPHABET for character in piece):
            raw = bytes(ALPHABET[character] for character in piece)
        else:
            return text, text.encode()
        return "bytes:" + "".join(f"\\x{value:02x}" for value in raw), raw

    def _decoded(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
