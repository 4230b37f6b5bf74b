"""Continuous batching: one thread decodes all requests; sequences join and leave its batches between steps.

In: `GenerationRequest`s, from the event loop that started it. Out: `Event`s, back on that loop, once a step for all
sequences. The thread owns the model: other code that needs it passes a function to `call`, which runs between two steps.
One sequence's options cannot stop the others: its callbacks are guarded, and a step that fails as a whole ends the
sequences of that batch alone. Knows no text and no network.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from dynamo_lm.backbone.rope_limits import is_beyond_switch
from dynamo_lm.decoding.audit import violations
from dynamo_lm.decoding.batch import Batch
from dynamo_lm.decoding.options import DecodingOptions, LogitsProcessor, StoppingCriterion
from dynamo_lm.decoding.sequence import SequenceState
from dynamo_lm.decoding.statistics import Statistics, TokenLogProb
from dynamo_lm.errors import InputError
from dynamo_lm.kernels import loader
from dynamo_lm.model.modeling import DynaMoForCausalLM
from dynamo_lm.serving.limits import Limits
from dynamo_lm.serving.logs import log
from dynamo_lm.serving.protocol import APIError
from dynamo_lm.serving.requests import GenerationRequest

Result = TypeVar("Result")

MAX_PREFILL = 4096  # tokens of prompts, padding included, that one step prefills, unless a single prompt is longer
MAX_RETRY_AFTER = 60  # seconds
AUDIT_STEPS = 1000  # after so many steps the bookkeeping is checked even if the server is never idle


class Observer(Protocol):
    """Counts what the engine does; called in its thread, `audited` on the event loop."""

    def stepped(self, sequences: Sequence[SequenceState], seconds: float) -> None: ...

    def occupied(self, running: int, waiting: int) -> None: ...

    def audited(self, violations: int) -> None: ...


@dataclass(frozen=True)
class Event:
    """What one step gave for one sequence."""

    sequence: EngineSequence
    tokens: list[int]
    scores: list[TokenLogProb] = field(default_factory=list)  # new ones; they may lag behind the tokens
    prompt_scores: list[TokenLogProb | None] = field(default_factory=list)  # with the first event, if requested
    finished: str | None = None  # "stop" or "length"
    timed_out: bool = False
    statistics: Statistics | None = None  # with the last event; they no longer change
    error: Exception | None = None  # in place of everything else


@dataclass(eq=False)
class EngineSequence:
    """One text in the engine. Only the thread uses the fields below the line."""

    request: GenerationRequest
    handle: RequestHandle
    # ---
    state: SequenceState | None = None
    batch: Batch | None = None
    scores_sent: int = 0
    joined: float = 0.0  # the clock when it joined its batch
    failure: Exception | None = None  # raised by a callback of its own


class RequestHandle:
    """One request in the engine: its sequences' events, in order, until all are finished or the request is cancelled."""

    def __init__(self, engine: Engine, requests: Sequence[GenerationRequest], deadline: float):
        self.engine, self.deadline = engine, deadline
        self.sequences = [EngineSequence(request, self) for request in requests]
        self.events: asyncio.Queue[Event | None] = asyncio.Queue()
        self.unfinished = len(self.sequences)
        self.cancelled = False

    async def next(self) -> Event | None:
        """The next event; None once there are no more.

        Raises:
            APIError, InputError, ..: what ended the request; its other texts are cancelled.
        """
        if self.cancelled or (not self.unfinished and self.events.empty()):
            return None
        event = await self.events.get()
        if event is not None and event.error is not None:
            self.cancel()
            raise event.error
        return event

    def cancel(self) -> None:
        """Ends what is still running, at the next step; a waiting `next` returns None."""
        if not self.cancelled:
            self.cancelled = True
            self.events.put_nowait(None)
            if self.unfinished:
                self.engine.leave(self.sequences)

    def put(self, event: Event) -> None:
        if event.finished or event.error is not None:
            self.unfinished -= 1
        self.events.put_nowait(event)


class Engine:
    """Decodes for many requests at once.

    Args:
        num_heads: the ceiling on tokens per step.
    """

    def __init__(self, model: DynaMoForCausalLM, num_heads: int, limits: Limits, observer: Observer):
        loader.available(wait=True)  # a server runs for long
        self.model, self.limits, self.observer = model, limits, observer
        # By heads, so that a request for fewer does not pay for more, and by whether LongRoPE's factors are those for long
        # texts, which no batch can mix.
        self._batches = {(num_heads, False): Batch(model, num_heads)}
        self._condition = threading.Condition()  # guards the five that follow
        self._waiting: deque[EngineSequence] = deque()
        self._leaving: list[EngineSequence] = []
        self._calls: deque[Callable[[], None]] = deque()
        self._stopping = False
        self._accepted = 0  # texts, since the start
        self._running: dict[int, EngineSequence] = {}  # in the batches, by number; only the thread uses it
        self._numbers = count()
        self._unfinished = 0  # texts accepted and not finished; only the event loop uses it
        self._sequence_seconds = 1.0  # running mean of a sequence's time in a batch; for Retry-After
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="dynamo-engine", daemon=True)

    # ------------------------------------------------------------------ on the event loop

    def start(self) -> None:
        """Begins to decode for the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Ends the thread once everything that was accepted is finished."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        await asyncio.to_thread(self._thread.join)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def accept(self, requests: Sequence[GenerationRequest]) -> RequestHandle:
        """Queues the texts of one request, all or none.

        Raises:
            APIError: 429 where there is no room, 400 where there never will be.
        """
        limits, count = self.limits, len(requests)
        capacity = limits.max_batch + limits.max_queue
        if count > capacity:
            message = f"The request asks for {count} texts; this server holds {capacity} (--max-batch and --max-queue)."
            raise APIError(400, message)
        if self._unfinished + count > capacity:
            rounds = math.ceil(self._unfinished / limits.max_batch * self._sequence_seconds)
            message = f"The queue is full: {limits.max_queue} texts may wait (--max-queue); try again later."
            retry_after = max(1, min(MAX_RETRY_AFTER, rounds))
            raise APIError(429, message, kind="requests", code="rate_limit_exceeded", retry_after=retry_after)
        handle = RequestHandle(self, requests, time.monotonic() + limits.max_seconds)
        self._unfinished += count
        with self._condition:
            self._accepted += count
            self._waiting.extend(handle.sequences)
            self._condition.notify()
        return handle

    def leave(self, sequences: Sequence[EngineSequence]) -> None:
        """Drops texts at the next step boundary; finished ones are ignored."""
        with self._condition:
            self._leaving.extend(sequences)
            self._condition.notify()

    async def call(self, function: Callable[[DynaMoForCausalLM], Result]) -> Result:
        """Runs function(model) in the engine's thread between two steps, and returns what it returns.

        Raises:
            APIError: 429, too many calls wait.
        """
        assert self._loop is not None
        loop, answer = self._loop, self._loop.create_future()

        def settle(result: Any, error: BaseException | None) -> None:
            if answer.done():  # the caller has gone
                return
            if error is None:
                answer.set_result(result)
            else:
                answer.set_exception(error)

        def carry_out() -> None:
            result, failure = None, None
            if not answer.done():
                try:
                    with torch.inference_mode():
                        result = function(self.model)
                except Exception as error:
                    failure = error
            loop.call_soon_threadsafe(settle, result, failure)

        with self._condition:
            if len(self._calls) > self.limits.max_queue:
                raise APIError(429, "Too many wait for the model; try again later.", kind="requests", retry_after=1)
            self._calls.append(carry_out)
            self._condition.notify()
        return await answer

    def _deliver(self, events: list[Event]) -> None:
        for event in events:
            if event.finished or event.error is not None:
                self._unfinished -= 1
            if not event.sequence.handle.cancelled:
                event.sequence.handle.put(event)

    # ------------------------------------------------------------------ in the thread

    def _run(self) -> None:
        steps = 0  # since the bookkeeping was checked
        while True:
            with self._condition:
                idle = not (self._waiting or self._leaving or self._calls or self._running)
                if idle and not steps and not self._stopping:
                    self._condition.wait()
                    continue
                accepted = self._accepted
                leaving, self._leaving = self._leaving, []
                calls, self._calls = self._calls, deque()
            if (idle and steps) or steps >= AUDIT_STEPS:
                self._audit(accepted if idle else None)
                steps = 0
            if idle:
                if self._stopping:
                    return
                continue
            steps += 1
            events: list[Event] = []
            try:
                # 1. Between steps: sequences leave, functions passed to `call` run, sequences join.
                self._remove_cancelled(leaving, events)
                self._remove_late(events)
                for call in calls:
                    call()
                self._admit(events)
                # 2. One step of every batch that has sequences.
                for batch in list(self._batches.values()):
                    if batch.running:
                        self._step(batch, events)
                self.observer.occupied(len(self._running), len(self._waiting))
            except Exception as error:  # nothing may end this thread; its requests get the error
                log.exception("engine_failed")
                for batch in self._batches.values():
                    batch.runner.release_all()
                self._batches.clear()
                self._fail(list(self._running.values()), error, events)
            if events:
                assert self._loop is not None
                self._loop.call_soon_threadsafe(self._deliver, events)

    def _admit(self, events: list[Event]) -> None:
        """Lets waiting sequences join, first come first served, as far as there is room."""
        joining, widest = 0, 0
        while len(self._running) < self.limits.max_batch:
            with self._condition:
                if not self._waiting:
                    return
                sequence = self._waiting[0]
                widest = max(widest, len(sequence.request.prompt))
                joining += 1
                if joining > 1 and joining * widest > MAX_PREFILL:
                    return
                self._waiting.popleft()
            request, heads, number = sequence.request, sequence.request.options.num_heads, next(self._numbers)
            try:
                key = heads, is_beyond_switch(self.model.config, len(request.prompt))
                batch = self._batches.get(key)
                if batch is None:
                    batch = self._batches[key] = Batch(self.model, heads)
                options = _guarded(request.options, sequence)
                sequence.state = batch.join(request.prompt, options, seed=request.seed, number=number)
            except Exception as error:
                events.append(Event(sequence, [], error=error))
                continue
            sequence.batch, sequence.joined = batch, time.monotonic()
            self._running[number] = sequence

    def _remove_cancelled(self, leaving: list[EngineSequence], events: list[Event]) -> None:
        """Takes out those whose client has gone."""
        for sequence in leaving:
            if sequence.state is not None:
                if self._running.get(sequence.state.number) is sequence:
                    self._remove(sequence)
                    events.append(Event(sequence, [], finished="stop"))
                continue
            with self._condition:
                waited = sequence in self._waiting
                if waited:
                    self._waiting.remove(sequence)
            if waited:
                events.append(Event(sequence, [], finished="stop"))

    def _remove_late(self, events: list[Event]) -> None:
        """Takes out those whose time is up: with the text they have, or with an error if they have none yet."""
        now = time.monotonic()
        with self._condition:
            late = [sequence for sequence in self._waiting if sequence.handle.deadline < now]
            for sequence in late:
                self._waiting.remove(sequence)
        for sequence in late:
            message = f"No place became free within {self.limits.max_seconds:g} seconds (--max-seconds); try again later."
            error = APIError(503, message, kind="server_error", code="timeout", retry_after=MAX_RETRY_AFTER)
            events.append(Event(sequence, [], error=error))
        for sequence in list(self._running.values()):
            if sequence.handle.deadline < now:
                state = self._remove(sequence)
                events.append(Event(sequence, [], finished="length", timed_out=True, statistics=state.statistics))

    def _step(self, batch: Batch, events: list[Event]) -> None:
        began = time.perf_counter()
        try:
            states = batch.step()
        except Exception as error:  # the batch's state is unknown: its sequences end, and the next one gets a new batch
            log.exception("step_failed", rows=len(batch.running))
            batch.runner.release_all()
            self._batches = {key: other for key, other in self._batches.items() if other is not batch}
            self._fail([sequence for sequence in self._running.values() if sequence.batch is batch], error, events)
            return
        for state in states:
            sequence = self._running[state.number]
            if sequence.failure is not None:
                if state.finished is None:
                    batch.leave(state)
                self._fail([sequence], sequence.failure, events)
                continue
            event = Event(
                sequence,
                state.emitted,
                scores=state.scores[sequence.scores_sent :],
                prompt_scores=state.prompt_scores if state.statistics.forwards == 1 else [],
                finished=state.finished,
                statistics=None if state.finished is None else state.statistics,
            )
            sequence.scores_sent += len(event.scores)
            if state.finished is not None:
                del self._running[state.number]
                self._sequence_seconds += 0.1 * (time.monotonic() - sequence.joined - self._sequence_seconds)
            events.append(event)
        self.observer.stepped(states, time.perf_counter() - began)

    def _remove(self, sequence: EngineSequence) -> SequenceState:
        state = sequence.state
        assert state is not None and sequence.batch is not None
        del self._running[state.number]
        sequence.batch.leave(state)
        return state

    def _audit(self, accepted: int | None) -> None:
        """Checks slots, cache lengths, cache memory and running texts; counts and logs what is wrong.

        accepted: texts accepted so far, if all of them should be finished.
        """
        wrong = []
        try:
            for batch in self._batches.values():
                states = {each.state for each in self._running.values() if each.batch is batch}
                if states != set(batch.running):
                    wrong.append(f"a batch has {len(batch.running)} sequences, and {len(states)} texts run in it")
                wrong += violations(batch)
        except Exception as error:  # bookkeeping that cannot even be read
            log.exception("audit_failed")
            wrong.append(str(error))

        def count() -> None:
            if accepted == self._accepted and self._unfinished:  # nothing came since, and all events were delivered
                wrong.append(f"{self._unfinished} texts are finished and still counted")
            if wrong:
                log.error("audit", violations=wrong)
            self.observer.audited(len(wrong))

        assert self._loop is not None
        self._loop.call_soon_threadsafe(count)

    def _fail(self, sequences: list[EngineSequence], error: Exception, events: list[Event]) -> None:
        for sequence in sequences:
            assert sequence.state is not None
            self._running.pop(sequence.state.number, None)
            events.append(Event(sequence, [], error=error))


def _guarded(options: DecodingOptions, sequence: EngineSequence) -> DecodingOptions:
    """The options with callbacks that, should they raise or leave no token to choose from, end their own sequence alone."""

    def stop(criterion: StoppingCriterion) -> StoppingCriterion:
        def guarded(tokens: Tensor) -> bool:
            try:
                return criterion(tokens)
            except Exception as error:
                sequence.failure = error
                return True

        return guarded

    def process(processor: LogitsProcessor) -> LogitsProcessor:
        def guarded(number: int, tokens: Tensor, logits: Tensor) -> Tensor:
            try:
                processed = processor(number, tokens, logits)
                if torch.isfinite(processed.max()):
                    return processed
                raise InputError("The sampling options leave no token to choose; take milder ones.")
            except Exception as error:
                sequence.failure = error
                return logits

        return guarded

    processors = tuple(map(process, options.logits_processors))
    return replace(options, stopping_criteria=tuple(map(stop, options.stopping_criteria)), logits_processors=processors)
