"""Incremental detokenization: tokens into characters as they come, up to a stop string.

In: a tokenizer, the tokens of one prompt, then those of each step. Out: characters, never an incomplete one. Decodes a
window of two steps, not the whole text, so that a step's cost does not grow with the text. Knows no model and no terminal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

INCOMPLETE = "\ufffd"  # what tokenizers decode the bytes of an incomplete character to


class IncrementalDetokenizer:
    """One text's tokens as characters, as soon as these are complete."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str] = (), *, keep_stop: bool = True) -> None:
        """
        Args:
            prompt: token ids in front of the text; not part of it, but for a character that they leave incomplete.
            stops: strings that end the text, none of them empty; the one that is complete first counts.
            keep_stop: whether the stop string belongs to the text. If not, what may be its beginning is withheld.
        """
        self.tokenizer, self.stops, self.keep_stop = tokenizer, list(stops), keep_stop
        self.text = ""  # everything released
        self.ended = False  # whether a stop string was reached
        self._text = ""  # every complete character; begins with `text`
        self._window = list(prompt)  # decoded together: whatever is needed to know the next characters
        before = self._decoded(self._window)
        self._known = len(before.rstrip(INCOMPLETE))  # characters of the window that are in `_text`, or the prompt's
        self._whole = len(self._window) if self._known == len(before) else 0  # tokens of it that end with a whole character

    def add(self, new: Sequence[int]) -> str:
        """The characters that these tokens complete."""
        if self.ended:
            return ""
        self._window += new
        decoded = self._decoded(self._window)
        complete = decoded.rstrip(INCOMPLETE)
        more = complete[self._known :]
        if more and complete == decoded:  # the next window begins where this step's tokens did; it needs some text in front,
            del self._window[: self._whole]  # since tokenizers may strip a space where decoding begins
            self._known, self._whole = len(self._decoded(self._window)), len(self._window)
        else:
            self._known += len(more)
        return self._release(more, last=False)

    def end(self) -> str:
        """The characters that were withheld while more could come."""
        if self.ended:
            return ""
        return self._release(self._decoded(self._window)[self._known :], last=True)

    def _release(self, more: str, *, last: bool) -> str:
        seen, self._text = len(self._text), self._text + more
        reach = len(self._text)
        matches = []
        for stop in self.stops:
            start = self._text.find(stop, max(0, seen - len(stop) + 1))
            if start >= 0:
                matches.append((start + len(stop), start))
        if matches:
            (end, start), self.ended = min(matches), True
            reach = end if self.keep_stop else start
        elif not self.keep_stop and not last:
            reach -= _possible_stop(self._text, self.stops)
        released = self._text[len(self.text) : reach]
        self.text += released
        return released

    def _decoded(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _possible_stop(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop string."""
    longest = max(map(len, stops), default=0)
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
