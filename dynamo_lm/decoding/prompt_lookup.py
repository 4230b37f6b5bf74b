"""Drafts from the text itself (prompt lookup): what followed the last time its latest tokens stood there.

Summaries, code, lists and the loops of small models repeat what was written before, and such drafts cost nothing to make.
In: the tokens of one sequence. Out: a chain of drafts. Knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

LEAST_MATCH = 3  # tokens; shorter matches are continued as before too seldom (LOG.md)


@dataclass
class PromptLookup:
    """Where the n-grams of one growing sequence ended last."""

    ends: dict[tuple[int, ...], int] = field(default_factory=dict)  # by LEAST_MATCH tokens, the place after them
    indexed: int = LEAST_MATCH  # the n-grams that end before this place are there

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        """Drafts after `tokens`, at most `most` and no more than tokens match; none where the latest are new.

        Args:
            tokens: of the sequence so far, a continuation of the last call's.

        Returns:
            What followed the latest earlier place of the last LEAST_MATCH tokens. A copy that reaches the end of the text
            goes on with itself.
        """
        length = len(tokens)
        for end in range(self.indexed, length):
            self.ends[tuple(tokens[end - LEAST_MATCH : end])] = end
        self.indexed = max(self.indexed, length)
        start = self.ends.get(tuple(tokens[-LEAST_MATCH:]))
        if start is None:
            return []
        match = LEAST_MATCH
        while match < min(most, start) and tokens[start - match - 1] == tokens[length - match - 1]:
            match += 1
        drafts: list[int] = []
        for place in range(start, start + min(match, most)):
            drafts.append(tokens[place] if place < length else drafts[place - length])
        return drafts
