"""One thread that decodes for everybody: rows join and leave its batches between steps.

In: `GenerationRequest`s, from the event loop that started it. Out: `Event`s, back on that loop, once a step for all rows.
The thread
owns the model: whoever else needs it lends a function to `call`, which runs between two steps. One row's options cannot
stop the others: its rules are guarded, and a step that fails as a whole ends the rows of that batch and no more. Knows no
text and no network.
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

from dynamo_lm.decoding.batch import Batch
from dynamo_lm.decoding.options import LogitsProcessor, StoppingCriterion
from dynamo_lm.decoding.sequence import SequenceState
from dynamo_lm.decoding.statistics import Statistics, TokenLogProb
from dynamo_lm.errors import InputError
from dynamo_lm.model.modeling import DynaMoForCausalLM
from dynamo_lm.serving.logs import log
from dynamo_lm.serving.protocol import APIError
from dynamo_lm.serving.requests import GenerationRequest, Limits

Found = TypeVar("Found")

ABSORBED = 4096  # tokens of prompts, padding included, that one step takes in, unless a single prompt is longer
LONGEST_RETRY = 60  # seconds


class Observer(Protocol):
    """Who counts what the engine does; called in its thread."""

    def stepped(self, rows: Sequence[SequenceState], seconds: float) -> None: ...

    def occupied(self, running: int, waiting: int) -> None: ...


@dataclass(frozen=True)
class Event:
    """What one step meant for one text."""

    seat: Seat
    tokens: list[int]
    scores: list[TokenLogProb] = field(default_factory=list)  # that became known; they may lag behind the tokens
    prompt_scores: list[TokenLogProb | None] = field(default_factory=list)  # with the first event, if asked for
    finished: str | None = None  # "stop" or "length"
    timed_out: bool = False
    statistics: Statistics | None = None  # with the last event; nobody changes them any more
    error: Exception | None = None  # in place of everything else


@dataclass(eq=False)
class Seat:
    """One text in the engine. The thread alone touches what is below the line."""

    ask: GenerationRequest
    ticket: RequestHandle
    # ---
    row: SequenceState | None = None
    batch: Batch | None = None
    told: int = 0  # scores that were handed out
    began: float = 0.0  # the clock when it joined
    broken: Exception | None = None  # what a rule of its own raised


class RequestHandle:
    """One request in the engine: its texts' events, in order, until all are finished or somebody cancels."""

    def __init__(self, engine: Engine, asks: Sequence[GenerationRequest], deadline: float):
        self.engine, self.deadline = engine, deadline
        self.seats = [Seat(ask, self) for ask in asks]
        self.events: asyncio.Queue[Event | None] = asyncio.Queue()
        self.open = len(self.seats)
        self.cancelled = False

    async def next(self) -> Event | None:
        """The next event; None once there are no more.

        Raises:
            Refusal, InputError, ..: what ended the request; its other texts are cancelled.
        """
        if self.cancelled or (not self.open and self.events.empty()):
            return None
        event = await self.events.get()
        if event is not None and event.error is not None:
            self.cancel()
            raise event.error
        return event

    def cancel(self) -> None:
        """Ends what is still running, at the next step; whoever waits in `next` gets None."""
        if not self.cancelled:
            self.cancelled = True
            self.events.put_nowait(None)
            if self.open:
                self.engine.leave(self.seats)

    def put(self, event: Event) -> None:
        if event.finished or event.error is not None:
            self.open -= 1
        self.events.put_nowait(event)


class Engine:
    """Decodes for many requests at once.

    Args:
        num_heads: the ceiling on tokens per step.
    """

    def __init__(self, model: DynaMoForCausalLM, num_heads: int, limits: Limits, observer: Observer):
        self.model, self.limits, self.observer = model, limits, observer
        self._batches = {num_heads: Batch(model, num_heads)}  # by heads, so that nobody pays for more than they asked for
        self._condition = threading.Condition()  # guards the four that follow
        self._waiting: deque[Seat] = deque()
        self._leaving: list[Seat] = []
        self._calls: deque[Callable[[], None]] = deque()
        self._stopping = False
        self._seated: dict[int, Seat] = {}  # in the batches, by the number of their row; the thread's own
        self._numbers = count()
        self._held = 0  # texts accepted and not finished; the loop's own
        self._row_seconds = 1.0  # that a text is in a batch, lately; for Retry-After
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

    def accept(self, asks: Sequence[GenerationRequest]) -> RequestHandle:
        """Takes in the texts of one request, all or none.

        Raises:
            Refusal: 429 where there is no room, 400 where there never will be.
        """
        capacity = self.limits.batch + self.limits.queue
        if len(asks) > capacity:
            raise APIError(
                400, f"The request asks for {len(asks)} texts; this server holds {capacity} (--max-batch and --max-queue)."
            )
        if self._held + len(asks) > capacity:
            raise APIError(
                429,
                f"The queue is full: {self.limits.queue} texts may wait (--max-queue); try again later.",
                kind="requests",
                code="rate_limit_exceeded",
                retry_after=self._wait(),
            )
        ticket = RequestHandle(self, asks, time.monotonic() + self.limits.seconds)
        self._held += len(asks)
        with self._condition:
            self._waiting.extend(ticket.seats)
            self._condition.notify()
        return ticket

    def leave(self, seats: Sequence[Seat]) -> None:
        """Drops texts at the next step boundary; finished ones do not mind."""
        with self._condition:
            self._leaving.extend(seats)
            self._condition.notify()

    async def call(self, function: Callable[[DynaMoForCausalLM], Found]) -> Found:
        """Runs function(model) in the engine's thread between two steps, and returns what it returns.

        Raises:
            Refusal: 429, too many wait for the same.
        """
        assert self._loop is not None
        loop, answer = self._loop, self._loop.create_future()

        def settle(found: Any, error: BaseException | None) -> None:
            if answer.done():  # whoever asked has gone
                return
            if error is None:
                answer.set_result(found)
            else:
                answer.set_exception(error)

        def carry_out() -> None:
            found, failed = None, None
            if not answer.done():
                try:
                    with torch.inference_mode():
                        found = function(self.model)
                except Exception as error:
                    failed = error
            loop.call_soon_threadsafe(settle, found, failed)

        with self._condition:
            if len(self._calls) > self.limits.queue:
                raise APIError(429, "Too many wait for the model; try again later.", kind="requests", retry_after=1)
            self._calls.append(carry_out)
            self._condition.notify()
        return await answer

    def _wait(self) -> int:
        """Seconds until there should be room."""
        rounds = self._held / self.limits.batch
        return max(1, min(LONGEST_RETRY, math.ceil(rounds * self._row_seconds)))

    def _deliver(self, events: list[Event]) -> None:
        for event in events:
            if event.finished or event.error is not None:
                self._held -= 1
            if not event.seat.ticket.cancelled:
                event.seat.ticket.put(event)

    # ------------------------------------------------------------------ in the thread

    def _run(self) -> None:
        while True:
            with self._condition:
                while not (self._waiting or self._leaving or self._calls or self._seated or self._stopping):
                    self._condition.wait()
                if self._stopping and not (self._waiting or self._calls or self._seated):
                    return
                leaving, self._leaving = self._leaving, []
                calls, self._calls = self._calls, deque()
            events: list[Event] = []
            try:
                # 1. Between steps: rows leave, borrowed functions run, rows join.
                self._drop(leaving, events)
                self._drop_late(events)
                for call in calls:
                    call()
                self._seat(events)
                # 2. One step of every batch that has rows.
                for batch in list(self._batches.values()):
                    if batch.running:
                        self._step(batch, events)
                self.observer.occupied(len(self._seated), len(self._waiting))
            except Exception as error:  # nothing may end this thread; whoever is in it learns why they got no answer
                log.exception("engine_failed")
                self._batches.clear()
                self._fail(list(self._seated.values()), error, events)
            if events:
                assert self._loop is not None
                self._loop.call_soon_threadsafe(self._deliver, events)

    def _seat(self, events: list[Event]) -> None:
        """Lets those who wait join, first come first served, as far as there is room."""
        absorbed, widest = 0, 0
        while len(self._seated) < self.limits.batch:
            with self._condition:
                if not self._waiting:
                    return
                seat = self._waiting[0]
                widest = max(widest, len(seat.ask.prompt))
                absorbed += 1
                if absorbed > 1 and absorbed * widest > ABSORBED:
                    return
                self._waiting.popleft()
            options = seat.ask.options
            try:
                batch = self._batches.get(options.num_heads)
                if batch is None:
                    batch = self._batches[options.num_heads] = Batch(self.model, options.num_heads)
                guarded = replace(
                    options,
                    stops=tuple(_guarded_stop(rule, seat) for rule in options.stops),
                    logits_processors=tuple(_guarded_warp(processor, seat) for processor in options.logits_processors),
                )
                number = next(self._numbers)
                seat.row = batch.join(seat.ask.prompt, guarded, seed=seat.ask.seed, number=number)
            except Exception as error:
                events.append(Event(seat, [], error=error))
                continue
            seat.batch, seat.began = batch, time.monotonic()
            self._seated[number] = seat

    def _drop(self, leaving: list[Seat], events: list[Event]) -> None:
        """Takes out those whose client has gone."""
        for seat in leaving:
            if seat.row is not None:
                if self._seated.get(seat.row.number) is seat:
                    self._unseat(seat)
                    events.append(Event(seat, [], finished="stop"))
                continue
            with self._condition:
                waited = seat in self._waiting
                if waited:
                    self._waiting.remove(seat)
            if waited:
                events.append(Event(seat, [], finished="stop"))

    def _drop_late(self, events: list[Event]) -> None:
        """Takes out those whose time is up: with the text they have, or with an error if they have none yet."""
        now = time.monotonic()
        with self._condition:
            late = [seat for seat in self._waiting if seat.ticket.deadline < now]
            for seat in late:
                self._waiting.remove(seat)
        for seat in late:
            message = f"No place became free within {self.limits.seconds:g} seconds (--max-seconds); try again later."
            refusal = APIError(503, message, kind="server_error", code="timeout", retry_after=LONGEST_RETRY)
            events.append(Event(seat, [], error=refusal))
        for seat in list(self._seated.values()):
            if seat.ticket.deadline < now:
                self._unseat(seat)
                assert seat.row is not None
                events.append(Event(seat, [], finished="length", timed_out=True, statistics=seat.row.statistics))

    def _step(self, batch: Batch, events: list[Event]) -> None:
        began = time.perf_counter()
        try:
            rows = batch.step()
        except Exception as error:  # the state of this batch is unknown now: its rows end, and the next begins another
            log.exception("step_failed", rows=len(batch.running))
            del self._batches[batch.num_heads]
            self._fail([seat for seat in self._seated.values() if seat.batch is batch], error, events)
            return
        for row in rows:
            seat = self._seated[row.number]
            if seat.broken is not None:
                if row.finished is None:
                    batch.leave(row)
                self._fail([seat], seat.broken, events)
                continue
            scores = row.scores[seat.told :]
            first = row.statistics.forwards == 1
            seat.told += len(scores)
            if row.finished is not None:
                del self._seated[row.number]
                self._row_seconds += 0.1 * (time.monotonic() - seat.began - self._row_seconds)
            events.append(
                Event(
                    seat,
                    row.emitted,
                    scores,
                    row.prompt_scores if first else [],
                    row.finished,
                    statistics=row.statistics if row.finished is not None else None,
                )
            )
        self.observer.stepped(rows, time.perf_counter() - began)

    def _unseat(self, seat: Seat) -> None:
        assert seat.row is not None and seat.batch is not None
        del self._seated[seat.row.number]
        seat.batch.leave(seat.row)

    def _fail(self, seats: list[Seat], error: Exception, events: list[Event]) -> None:
        for seat in seats:
            assert seat.row is not None
            self._seated.pop(seat.row.number, None)
            events.append(Event(seat, [], error=error))


def _guarded_stop(rule: StoppingCriterion, seat: Seat) -> StoppingCriterion:
    """The rule; should it raise, its own text ends and nobody else's."""

    def guarded(tokens: Tensor) -> bool:
        try:
            return rule(tokens)
        except Exception as error:
            seat.broken = error
            return True

    return guarded


def _guarded_warp(processor: LogitsProcessor, seat: Seat) -> LogitsProcessor:
    """The warp; should it raise or leave nothing to choose from, its own text ends and nobody else's."""

    def guarded(row: int, tokens: Tensor, logits: Tensor) -> Tensor:
        try:
            processed = processor(row, tokens, logits)
            if torch.isfinite(processed.max()):
                return processed
            raise InputError("The sampling options leave no token to choose; take milder ones.")
        except Exception as error:
            seat.broken = error
            return logits

    return guarded
