"""Incremental detokenization: tokens into characters as they come, up to a stop string.

In: a tokenizer, the tokens of one prompt, then those of each step. Out: characters, never an incomplete one. Decodes a
window of two steps, not the whole text, so that a step's cost does not grow with the text. Knows no model and no terminal.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

INCOMPLETE = "\ufffd"  # what tokenizers decode the bytes of an incomplete character to


class IncrementalDetokenizer:
    """One text's tokens as characters, as soon as these are complete.

    A text has no special tokens, such as an end-of-turn token. Stop strings may be such a token or hold one: they are looked
    for both in the text and in the text with its special tokens, in whose characters positions are counted.

    Attributes:
        text: everything released.
        ended: whether a stop string was reached.
        reach: the position up to which characters are released.
        start: of the last token, the characters of the text in front of it, and its position.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str] = (), *, keep_stop: bool = True) -> None:
        """
        Args:
            prompt: token ids in front of the text; not part of it, but for a character that they leave incomplete.
            stops: strings that end the text, none of them empty; the one that is complete first counts.
            keep_stop: whether the stop string belongs to the text. If not, what may be its beginning is withheld.
        """
        self.tokenizer, self.stops, self.keep_stop = tokenizer, list(stops), keep_stop
        self.text, self.ended, self.reach, self.start = "", False, 0, (0, 0)
        self._text = ""  # every complete character; begins with `text`
        self._full = ""  # the same with special tokens
        self._shown = [0]  # by position in `_full`, its end included: characters of `_text` in front of it
        self._window = list(prompt)  # decoded together: whatever is needed to know the next characters
        self._before = self._decoded(self._window)
        self._known = len(self._before.rstrip(INCOMPLETE))  # characters of the window that are in `_text`, or the prompt's
        whole = self._known == len(self._before)
        self._whole = len(self._window) if whole else 0  # tokens of it that end with a whole character

    def add(self, new: Sequence[int]) -> str:
        """The characters that these tokens complete."""
        return "".join(self._add(token) for token in new)

    def end(self) -> str:
        """The characters that were withheld while more could come."""
        if self.ended:
            return ""
        return self._release(self._before[self._known :], last=True)

    def _add(self, token: int) -> str:
        self.start = len(self._text), len(self._full)
        if self.ended:
            return ""
        decoded = self._decoded([*self._window, token])
        if decoded == self._before and (special := special_text(self.tokenizer, token)):
            return self._release("", special)
        pending = len(self._before) - self._known
        self._window.append(token)
        self._before = decoded
        complete = decoded.rstrip(INCOMPLETE)
        more = complete[self._known :]
        earlier = min(pending, len(more) - len(more.lstrip(INCOMPLETE)))  # bytes of earlier tokens that are no character
        self.start = len(self._text) + earlier, len(self._full) + earlier
        if more and complete == decoded:  # the next window begins where this token did; it needs some text in front,
            del self._window[: self._whole]  # since tokenizers may strip a space where decoding begins
            self._before = self._decoded(self._window)
            self._known, self._whole = len(self._before), len(self._window)
        else:
            self._known += len(more)
        return self._release(more)

    def _release(self, more: str, special: str = "", *, last: bool = False) -> str:
        """Appends characters, then a special token, and returns what may be released."""
        full, text = len(self._full), len(self._text)
        self._text += more
        self._full += more + special
        self._shown += [*range(text + 1, len(self._text) + 1), *[len(self._text)] * len(special)]
        matches = self._matches(full, text)
        if matches:
            (end, start), self.ended = min(matches), True
            self.reach = end if self.keep_stop else start
        elif self.keep_stop or last:
            self.reach = len(self._full)
        else:
            self.reach = min(
                len(self._full) - _possible_stop(self._full, self.stops),
                self._position(len(self._text) - _possible_stop(self._text, self.stops)),
            )
        released = self._text[len(self.text) : self._shown[self.reach]]
        self.text += released
        return released

    def _matches(self, full: int, text: int) -> list[tuple[int, int]]:
        """(end, start), as positions, of stop strings that are complete now; so many characters were searched before."""
        matches = []
        for stop in self.stops:
            start = self._full.find(stop, max(0, full - len(stop) + 1))
            if start >= 0:
                matches.append((start + len(stop), start))
            start = self._text.find(stop, max(0, text - len(stop) + 1))
            if start >= 0:
                matches.append((self._position(start + len(stop) - 1) + 1, self._position(start)))
        return matches

    def _position(self, character: int) -> int:
        """Where in `_full` a character of `_text` is, or its end."""
        return bisect_right(self._shown, character) - 1

    def _decoded(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def special_text(tokenizer: Any, token: int) -> str:
    """What a special token, which texts leave out, is written as; "" for others."""
    if tokenizer.decode([token], skip_special_tokens=True):
        return ""
    return tokenizer.decode([token], skip_special_tokens=False)


def _possible_stop(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop string."""
    longest = 0
    for stop in stops:
        tail = text[-(len(stop) - 1) :] if len(stop) > 1 else ""
        start = tail.find(stop[0])
        while start >= 0 and not stop.startswith(tail[start:]):
            start = tail.find(stop[0], start + 1)
        longest = max(longest, len(tail) - start if start >= 0 else 0)
    return longest
