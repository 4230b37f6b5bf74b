"""From the engine's events to OpenAI's objects: whole answers, and the chunks of streamed ones.

In: a ticket of the engine. Out: models of `dynamo_lm.serving.protocol`. Every text has a `Text`, which turns tokens into
characters and keeps log-probabilities beside the characters they belong to. Completions and chats differ only in how
their objects are put together. Knows no network.
"""

from __future__ import annotations

import codecs
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel

from dynamo_lm.decoding.detokenizer import IncrementalDetokenizer
from dynamo_lm.decoding.statistics import Statistics, TokenLogProb
from dynamo_lm.serving.engine import Event, RequestHandle
from dynamo_lm.serving.protocol import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Delta,
    Figures,
    Finish,
    Steps,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from dynamo_lm.serving.requests import GenerationRequest
from dynamo_lm.serving.token_text import Vocabulary


@dataclass(frozen=True)
class Scored:
    """A token with what the base says of it; None of the first token of all, which nothing precedes."""

    token: int
    score: TokenLogProb | None
    offset: int  # characters of the text in front of it


class StreamState:
    """One text of an answer while it is written."""

    def __init__(self, ask: GenerationRequest, vocabulary: Vocabulary):
        self.ask, self.vocabulary = ask, vocabulary
        self.writer = IncrementalDetokenizer(vocabulary.tokenizer, ask.prompt, ask.stops, keep_stop=False)
        self.said = ask.echo  # everything given out
        self.finish: Finish | None = None
        self.timed_out = False
        self.statistics: Statistics | None = None
        self.begun = False
        self._unscored: list[int] = []  # tokens that came before their scores
        self._held: list[Scored] = []  # whose characters were not given out yet
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = 0  # characters of the tokens so far

    def take(self, event: Event) -> tuple[str, list[Scored]]:
        """The characters and scored tokens that this event makes certain; what the answer echoes comes with the first."""
        more = ""
        if not self.begun:
            self.begun, more = True, self.ask.echo
            for token, score in zip(self.ask.prompt, event.prompt_scores, strict=False):  # none, or all
                self._held.append(self._place(token, score))
            last = max(0, len(more) - 1)  # a token that begins every text is no part of what is echoed
            self._held = [replace(each, offset=min(each.offset, last)) for each in self._held]
            self._length = len(more)
        if self.ask.options.logprobs is not None:
            self._unscored += event.tokens
        for score in event.scores:
            self._held.append(self._place(self._unscored.pop(0), score))
        new = self.writer.add(event.tokens)
        if event.finished is not None:
            new += self.writer.end()
            self.finish = "stop" if event.finished == "stop" or self.writer.ended else "length"
            self.timed_out, self.statistics = event.timed_out, event.statistics
        self.said += new
        return more + new, self._release()

    def _place(self, token: int, score: TokenLogProb | None) -> Scored:
        placed = Scored(token, score, self._length)
        self._length += len(self._decoder.decode(self.vocabulary.raw(token)))
        return placed

    def _release(self) -> list[Scored]:
        """Scored tokens whose characters are out; those of a stop string never are, the end token is, once it is the end."""
        everything = self.finish is not None and not self.writer.ended
        count = sum(everything or each.offset < len(self.said) for each in self._held)
        released, self._held = self._held[:count], self._held[count:]
        return released


def _figures(texts: Sequence[StreamState]) -> Figures:
    """What the texts cost together."""
    found = [text.statistics for text in texts if text.statistics is not None]
    alone, options = len(found) == 1, texts[0].ask.options
    forwards, tokens = sum(each.forwards for each in found), sum(each.new_tokens for each in found)
    scored = sum(each.scored for each in found) or 1
    histogram = [sum(sizes) for sizes in zip(*(each.histogram for each in found), strict=True)]
    return Figures(
        forwards=forwards,
        new_tokens=tokens,
        tokens_per_step=round(tokens / forwards, 4) if forwards else 0.0,
        ceiling=found[0].ceiling,
        histogram=histogram,
        backed_off=sum(histogram[:-1]),
        step_sizes=found[0].step_sizes if alone else None,
        mean_log_likelihood=round(sum(each.log_likelihood for each in found) / scored, 5),
        mean_regret=round(sum(each.regret for each in found) / scored, 5),
        verify=options.verify,
        eps_b=options.algorithm.eps_b if options.off else None,
        seed=texts[0].ask.seed if alone else None,
        seconds=round(max(each.seconds for each in found), 4),
        timed_out=any(text.timed_out for text in texts),
    )


class Answer:
    """One answer while it is written; `CompletionAnswer` and `ChatAnswer` say what its objects look like."""

    prefix = ""

    def __init__(self, model: str, ticket: RequestHandle, vocabulary: Vocabulary):
        self.ticket, self.vocabulary = ticket, vocabulary
        self.head: dict[str, Any] = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self.texts = [StreamState(seat.ask, vocabulary) for seat in ticket.seats]
        self.first_seconds: float | None = None  # from acceptance to the first token
        self._accepted = time.monotonic()

    async def whole(self) -> BaseModel | None:
        """The answer in one piece; None if it was cancelled.

        Raises:
            what `Ticket.next` raises.
        """
        scored: list[list[Scored]] = [[] for _ in self.texts]
        async for event, text in self._events():
            scored[text.ask.choice] += text.take(event)[1]
        return self.complete(scored) if all(text.finish for text in self.texts) else None

    async def stream(self, *, usage: bool) -> AsyncIterator[BaseModel]:
        """The answer in chunks, one a step of each text; with `usage` the last counts tokens.

        Raises:
            what `Ticket.next` raises.
        """
        async for event, text in self._events():
            begins = not text.begun
            more, scored = text.take(event)
            if begins and (opening := self.opening(text)) is not None:
                yield opening
            if more or scored or event.tokens:
                step = Steps(step=[self.vocabulary.text(token) for token in event.tokens])
                yield self.piece(text, more, scored, step)
            if text.finish is not None:
                yield self.closing(text)
        if usage and all(text.finish for text in self.texts):
            yield self.counted()

    async def _events(self) -> AsyncIterator[tuple[Event, StreamState]]:
        while (event := await self.ticket.next()) is not None:
            if self.first_seconds is None and event.tokens:
                self.first_seconds = time.monotonic() - self._accepted
            yield event, self.texts[event.seat.ask.choice]

    @property
    def usage(self) -> Usage:
        """Tokens of prompts, each prompt once, and of texts."""
        prompts = sum(len(text.ask.prompt) for text in self.texts if text.ask.opens)
        tokens = sum(text.statistics.new_tokens for text in self.texts if text.statistics is not None)
        return Usage(prompt_tokens=prompts, completion_tokens=tokens, total_tokens=prompts + tokens)

    @property
    def facts(self) -> dict[str, Any]:
        """For the log: counts and times, no text."""
        found = {"texts": len(self.texts), "first_token_seconds": self.first_seconds, **self.usage.model_dump()}
        if all(text.statistics is not None for text in self.texts):
            figures = _figures(self.texts)
            found |= figures.model_dump(include={"forwards", "tokens_per_step", "verify", "eps_b", "timed_out"})
        return found | {"finish": [text.finish for text in self.texts]}

    def _each(self, text: StreamState) -> Figures | None:
        """What one of several texts cost."""
        return _figures([text]) if len(self.texts) > 1 else None

    def complete(self, scored: list[list[Scored]]) -> BaseModel:
        """The whole answer; scored tokens by text."""
        raise NotImplementedError

    def opening(self, text: StreamState) -> BaseModel | None:
        """The chunk in front of a text, if there is one."""
        return None

    def piece(self, text: StreamState, more: str, scored: list[Scored], step: Steps) -> BaseModel:
        """The chunk of one step."""
        raise NotImplementedError

    def closing(self, text: StreamState) -> BaseModel:
        """The chunk behind a text."""
        raise NotImplementedError

    def counted(self) -> BaseModel:
        """The chunk behind all texts."""
        raise NotImplementedError


class CompletionAnswer(Answer):
    """Of /v1/completions."""

    prefix = "cmpl"

    def complete(self, scored: list[list[Scored]]) -> Completion:
        choices = [
            CompletionChoice(
                index=text.ask.choice,
                text=text.said,
                logprobs=self._logprobs(text, each),
                finish_reason=text.finish,
                dynamo=self._each(text),
            )
            for text, each in zip(self.texts, scored, strict=True)
        ]
        return Completion(**self.head, choices=choices, usage=self.usage, dynamo=_figures(self.texts))

    def piece(self, text: StreamState, more: str, scored: list[Scored], step: Steps) -> Completion:
        choice = CompletionChoice(index=text.ask.choice, text=more, logprobs=self._logprobs(text, scored))
        return Completion(**self.head, choices=[choice], dynamo=step)

    def closing(self, text: StreamState) -> Completion:
        choice = CompletionChoice(index=text.ask.choice, text="", finish_reason=text.finish)
        return Completion(**self.head, choices=[choice], dynamo=_figures([text]))

    def counted(self) -> Completion:
        return Completion(**self.head, choices=[], usage=self.usage, dynamo=_figures(self.texts))

    def _logprobs(self, text: StreamState, scored: list[Scored]) -> CompletionLogprobs | None:
        if text.ask.options.logprobs is None:
            return None
        return CompletionLogprobs(
            tokens=[self.vocabulary.text(each.token) for each in scored],
            token_logprobs=[each.score.log_prob if each.score else None for each in scored],
            top_logprobs=[self._top(each) for each in scored],
            text_offset=[each.offset for each in scored],
        )

    def _top(self, scored: Scored) -> dict[str, float] | None:
        """The likeliest tokens and the token itself; of tokens that read alike the likeliest."""
        if scored.score is None:
            return None
        top: dict[str, float] = {}
        for token, log_prob in [*scored.score.top, (scored.token, scored.score.log_prob)]:
            top.setdefault(self.vocabulary.text(token), log_prob)
        return top


class ChatAnswer(Answer):
    """Of /v1/chat/completions."""

    prefix = "chatcmpl"

    def complete(self, scored: list[list[Scored]]) -> ChatCompletion:
        choices = []
        for text, each in zip(self.texts, scored, strict=True):
            assert text.finish is not None
            choices.append(
                ChatChoice(
                    index=text.ask.choice,
                    message=AssistantMessage(content=text.said),
                    logprobs=self._logprobs(text, each),
                    finish_reason=text.finish,
                    dynamo=self._each(text),
                )
            )
        return ChatCompletion(**self.head, choices=choices, usage=self.usage, dynamo=_figures(self.texts))

    def opening(self, text: StreamState) -> ChatChunk:
        return self._chunk(text, Delta(role="assistant", content=""))

    def piece(self, text: StreamState, more: str, scored: list[Scored], step: Steps) -> ChatChunk:
        return self._chunk(text, Delta(content=more), dynamo=step, logprobs=self._logprobs(text, scored))

    def closing(self, text: StreamState) -> ChatChunk:
        return self._chunk(text, Delta(), dynamo=_figures([text]), finish=text.finish)

    def counted(self) -> ChatChunk:
        return ChatChunk(**self.head, choices=[], usage=self.usage, dynamo=_figures(self.texts))

    def _chunk(
        self,
        text: StreamState,
        delta: Delta,
        *,
        dynamo: Steps | Figures | None = None,
        logprobs: ChatLogprobs | None = None,
        finish: Finish | None = None,
    ) -> ChatChunk:
        choice = ChatChunkChoice(index=text.ask.choice, delta=delta, logprobs=logprobs, finish_reason=finish)
        return ChatChunk(**self.head, choices=[choice], dynamo=dynamo)

    def _logprobs(self, text: StreamState, scored: list[Scored]) -> ChatLogprobs | None:
        if text.ask.options.logprobs is None:
            return None
        content = []
        for each in scored:
            assert each.score is not None
            top = [self._one(token, log_prob) for token, log_prob in each.score.top]
            own = self._one(each.token, each.score.log_prob)
            content.append(TokenLogprob(**own.model_dump(), top_logprobs=top))
        return ChatLogprobs(content=content)

    def _one(self, token: int, log_prob: float) -> TopLogprob:
        raw = self.vocabulary.raw(token)
        return TopLogprob(token=self.vocabulary.text(token), logprob=log_prob, bytes=list(raw))
