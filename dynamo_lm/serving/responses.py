"""From the engine's events to OpenAI's objects: whole answers, and the chunks of streamed ones.

In: a request handle of the engine. Out: models of `dynamo_lm.serving.protocol`. A `StreamState` per text turns tokens into
characters and keeps log-probabilities beside the characters they belong to. Completions and chats differ only in how
their objects are put together. Knows no network.
"""

from __future__ import annotations

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
class ScoredToken:
    """A token with its score under the base; None for the first token of all, which nothing precedes."""

    token: int
    score: TokenLogProb | None
    offset: int  # characters of the answer in front of it
    position: int = -1  # where it begins, as its detokenizer counts; -1 in what the answer echoes


class StreamState:
    """One text of an answer while it is written.

    Attributes:
        text: every character that was released, the echoed prompt included.
    """

    def __init__(self, request: GenerationRequest, vocabulary: Vocabulary):
        self.request, self.vocabulary = request, vocabulary
        stop_strings = request.stop_strings
        self.detokenizer = IncrementalDetokenizer(vocabulary.tokenizer, request.prompt, stop_strings, keep_stop=False)
        self.text = request.echo.text
        self.finish: Finish | None = None
        self.timed_out = False
        self.statistics: Statistics | None = None
        self.begun = False
        self._unscored: list[ScoredToken] = []  # tokens that came before their scores
        self._held: list[ScoredToken] = []  # whose characters are not released yet

    def take(self, event: Event) -> tuple[str, list[ScoredToken]]:
        """The characters and scored tokens that this event completes; what the answer echoes comes with the first."""
        new = ""
        if not self.begun:
            self.begun, new = True, self.request.echo.text
            echoed = zip(self.request.prompt, event.prompt_scores, self.request.echo.offsets, strict=False)  # none, or all
            self._held = [ScoredToken(*each) for each in echoed]
        scored = self.request.options.logprobs is not None
        for token in event.tokens:
            released = self.detokenizer.add([token])
            self.text, new = self.text + released, new + released
            if scored:
                offset, position = self.detokenizer.start
                self._unscored.append(ScoredToken(token, None, len(self.request.echo.text) + offset, position))
        for score in event.scores:
            self._held.append(replace(self._unscored.pop(0), score=score))
        if event.finished is not None:
            rest = self.detokenizer.end()
            self.text, new = self.text + rest, new + rest
            self.finish = "stop" if event.finished == "stop" or self.detokenizer.ended else "length"
            self.timed_out, self.statistics = event.timed_out, event.statistics
        return new, self._release()

    def _release(self) -> list[ScoredToken]:
        """Scored tokens whose characters are released; never those of a stop string, the end token once the text ends."""
        everything = self.finish is not None and not self.detokenizer.ended
        count = sum(everything or held.position < self.detokenizer.reach for held in self._held)
        released, self._held = self._held[:count], self._held[count:]
        return released


def _figures(streams: Sequence[StreamState]) -> Figures:
    """What the texts cost together."""
    statistics = [stream.statistics for stream in streams if stream.statistics is not None]
    alone, request = len(statistics) == 1, streams[0].request

    def total(name: str) -> Any:
        return sum(getattr(each, name) for each in statistics)

    forwards, tokens, scored = total("forwards"), total("new_tokens"), total("scored") or 1
    histogram = [sum(sizes) for sizes in zip(*(each.histogram for each in statistics), strict=True)]
    return Figures(
        forwards=forwards,
        new_tokens=tokens,
        tokens_per_step=round(tokens / forwards, 4) if forwards else 0.0,
        ceiling=statistics[0].ceiling,
        histogram=histogram,
        backed_off=sum(histogram[:-1]),
        step_sizes=statistics[0].step_sizes if alone else None,
        mean_log_likelihood=round(total("log_likelihood") / scored, 5),
        mean_regret=round(total("regret") / scored, 5),
        verify=request.options.verify,
        eps_b=request.options.algorithm.eps_b if request.options.off else None,
        seed=request.seed if alone else None,
        seconds=round(max(each.seconds for each in statistics), 4),
        timed_out=any(stream.timed_out for stream in streams),
    )


class Answer:
    """One answer while it is written; `CompletionAnswer` and `ChatAnswer` make its choices."""

    prefix: str
    whole_type: type[BaseModel]
    chunk_type: type[BaseModel]

    def __init__(self, model: str, handle: RequestHandle, vocabulary: Vocabulary):
        self.handle, self.vocabulary = handle, vocabulary
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.streams = [StreamState(sequence.request, vocabulary) for sequence in handle.sequences]
        self.first_seconds: float | None = None  # from acceptance to the first token
        self._accepted = time.monotonic()

    async def whole(self) -> BaseModel | None:
        """The answer in one piece; None if it was cancelled.

        Raises:
            what `RequestHandle.next` raises.
        """
        scored: list[list[ScoredToken]] = [[] for _ in self.streams]
        async for event, stream in self._events():
            scored[stream.request.choice] += stream.take(event)[1]
        if not self._finished:
            return None
        several, choices = len(self.streams) > 1, []
        for stream, tokens in zip(self.streams, scored, strict=True):
            choices.append(self.choice(stream, self._logprobs(stream, tokens), _figures([stream]) if several else None))
        return self.whole_type(**self.head, choices=choices, **self._totals)

    async def chunks(self, *, usage: bool) -> AsyncIterator[BaseModel]:
        """The answer in chunks, one per step of each text; with `usage` the last one counts tokens.

        Raises:
            what `RequestHandle.next` raises.
        """
        async for event, stream in self._events():
            begins = not stream.begun
            text, scored = stream.take(event)
            if begins and (opening := self.opening(stream)) is not None:
                yield self._chunk([opening])
            if text or scored or event.tokens:
                step = Steps(step=[self.vocabulary.text(token) for token in event.tokens])
                yield self._chunk([self.piece(stream, text, logprobs=self._logprobs(stream, scored))], dynamo=step)
            if stream.finish is not None:
                yield self._chunk([self.piece(stream, "", finish_reason=stream.finish)], dynamo=_figures([stream]))
        if usage and self._finished:
            yield self._chunk([], **self._totals)

    def _chunk(self, choices: list[BaseModel], **more: Any) -> BaseModel:
        return self.chunk_type(**self.head, choices=choices, **more)

    async def _events(self) -> AsyncIterator[tuple[Event, StreamState]]:
        while (event := await self.handle.next()) is not None:
            if self.first_seconds is None and event.tokens:
                self.first_seconds = time.monotonic() - self._accepted
            yield event, self.streams[event.sequence.request.choice]

    @property
    def _finished(self) -> bool:
        return all(stream.finish for stream in self.streams)

    @property
    def _totals(self) -> dict[str, Any]:
        return {"usage": self.usage, "dynamo": _figures(self.streams)}

    @property
    def usage(self) -> Usage:
        """Tokens of prompts, each prompt once, and of texts."""
        prompts = sum(len(stream.request.prompt) for stream in self.streams if stream.request.first_of_prompt)
        tokens = sum(stream.statistics.new_tokens for stream in self.streams if stream.statistics is not None)
        return Usage(prompt_tokens=prompts, completion_tokens=tokens, total_tokens=prompts + tokens)

    @property
    def facts(self) -> dict[str, Any]:
        """For the log: counts and times, no text."""
        facts = {"texts": len(self.streams), "first_token_seconds": self.first_seconds, **self.usage.model_dump()}
        if all(stream.statistics is not None for stream in self.streams):
            figures = _figures(self.streams)
            facts |= figures.model_dump(include={"forwards", "tokens_per_step", "verify", "eps_b", "timed_out"})
        return facts | {"finish": [stream.finish for stream in self.streams]}

    def _logprobs(self, stream: StreamState, scored: list[ScoredToken]) -> Any:
        return None if stream.request.options.logprobs is None else self.logprobs(scored)

    def logprobs(self, scored: list[ScoredToken]) -> BaseModel:
        """The scores of these tokens."""
        raise NotImplementedError

    def choice(self, stream: StreamState, logprobs: Any, dynamo: Figures | None) -> BaseModel:
        """A text of the whole answer."""
        raise NotImplementedError

    def opening(self, stream: StreamState) -> BaseModel | None:
        """The first piece of a streamed text, before its characters, if there is one."""
        return None

    def piece(self, stream: StreamState, text: str, **more: Any) -> BaseModel:
        """A piece of a streamed text; `more`: its log-probabilities, or why it ends."""
        raise NotImplementedError


class CompletionAnswer(Answer):
    """Of /v1/completions."""

    prefix, whole_type, chunk_type = "cmpl", Completion, Completion

    def choice(self, stream: StreamState, logprobs: Any, dynamo: Figures | None) -> CompletionChoice:
        return self.piece(stream, stream.text, logprobs=logprobs, finish_reason=stream.finish, dynamo=dynamo)

    def piece(self, stream: StreamState, text: str, **more: Any) -> CompletionChoice:
        return CompletionChoice(index=stream.request.choice, text=text, **more)

    def logprobs(self, scored: list[ScoredToken]) -> CompletionLogprobs:
        return CompletionLogprobs(
            tokens=[self.vocabulary.text(each.token) for each in scored],
            token_logprobs=[each.score.log_prob if each.score else None for each in scored],
            top_logprobs=[self._top(each) for each in scored],
            text_offset=[each.offset for each in scored],
        )

    def _top(self, scored: ScoredToken) -> dict[str, float] | None:
        """The likeliest tokens and the token itself; of tokens that read alike the likeliest."""
        if scored.score is None:
            return None
        top: dict[str, float] = {}
        for token, log_prob in [*scored.score.top, (scored.token, scored.score.log_prob)]:
            top.setdefault(self.vocabulary.text(token), log_prob)
        return top


class ChatAnswer(Answer):
    """Of /v1/chat/completions."""

    prefix, whole_type, chunk_type = "chatcmpl", ChatCompletion, ChatChunk

    def choice(self, stream: StreamState, logprobs: Any, dynamo: Figures | None) -> ChatChoice:
        assert stream.finish is not None
        index, message = stream.request.choice, AssistantMessage(content=stream.text)
        return ChatChoice(index=index, message=message, logprobs=logprobs, finish_reason=stream.finish, dynamo=dynamo)

    def opening(self, stream: StreamState) -> ChatChunkChoice:
        return ChatChunkChoice(index=stream.request.choice, delta=Delta(role="assistant", content=""))

    def piece(self, stream: StreamState, text: str, **more: Any) -> ChatChunkChoice:
        delta = Delta() if "finish_reason" in more else Delta(content=text)
        return ChatChunkChoice(index=stream.request.choice, delta=delta, **more)

    def logprobs(self, scored: list[ScoredToken]) -> ChatLogprobs:
        content = []
        for each in scored:
            assert each.score is not None
            top = [self._logprob(token, log_prob) for token, log_prob in each.score.top]
            own = self._logprob(each.token, each.score.log_prob)
            content.append(TokenLogprob(**own.model_dump(), top_logprobs=top))
        return ChatLogprobs(content=content)

    def _logprob(self, token: int, log_prob: float) -> TopLogprob:
        raw = self.vocabulary.raw(token)
        return TopLogprob(token=self.vocabulary.text(token), logprob=log_prob, bytes=list(raw))
