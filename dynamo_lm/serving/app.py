"""The HTTP application: routes, server-sent events, and errors in OpenAI's form.

In: an engine, a tokenizer, settings. Out: an ASGI application, whose lifespan starts and stops the engine. A client that
hangs up cancels its texts. Knows no sockets and no signals: see `dynamo_lm.serving.server`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from dynamo_lm.errors import InputError
from dynamo_lm.model.modeling import DynaMoForCausalLM
from dynamo_lm.serving.engine import Engine, RequestHandle
from dynamo_lm.serving.logs import log
from dynamo_lm.serving.metrics import Metrics
from dynamo_lm.serving.middleware import LimitsMiddleware, refuse
from dynamo_lm.serving.playground import playground
from dynamo_lm.serving.protocol import (
    APIError,
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    ErrorBody,
    Health,
    Model,
    ModelList,
)
from dynamo_lm.serving.requests import GenerationRequest, GenerationSettings, Limits, RequestParser
from dynamo_lm.serving.responses import Answer, ChatAnswer, CompletionAnswer

PROMPT = "it must be a text, a list of texts, a list of token ids, or a list of such lists"
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": what}
    for status, what in {
        400: "The request cannot be carried out; the message says why",
        401: "No key, or a wrong one",
        404: "No such model",
        408: "The body came too slowly",
        413: "The body is too large",
        429: "The queue is full; see Retry-After",
        500: "The server failed",
        503: "The server is stopping, or found no place in time",
    }.items()
}
EVENTS = {"text/event-stream": {"schema": {"description": "With stream: true, chunks as events; the last one is [DONE]."}}}


@dataclass(frozen=True)
class Settings:
    """What one server is told."""

    name: str  # of the model, as clients say it
    dials: GenerationSettings
    limits: Limits
    key: str | None = None
    hosts: tuple[str, ...] | None = None  # that requests may be addressed to; None: any
    log_text: bool = False  # whether prompts and answers go into the log


def create_app(model: DynaMoForCausalLM, tokenizer: Any, settings: Settings) -> FastAPI:
    """The application of one server; `app.state.gate` and `app.state.engine` are its parts."""
    metrics = Metrics(settings.dials.num_heads)
    engine = Engine(model, settings.dials.num_heads, settings.limits, metrics)
    choices = RequestParser(model, tokenizer, settings.dials, settings.limits)
    created = int(time.time())

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await engine.stop()

    app = FastAPI(title="dynamo-lm", version="1", lifespan=lifespan, docs_url=None, redoc_url=None)
    gate = LimitsMiddleware(
        app,
        key=settings.key,
        hosts=settings.hosts,
        most=settings.limits.body,
        metrics=metrics,
        known=("/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions", "/dynamo/joint"),
    )

    def check_model(name: str) -> None:
        if name != settings.name:
            message = f'There is no model "{name}" here; this server has "{settings.name}".'
            raise APIError(404, message, param="model", code="model_not_found")

    async def answer(
        request: Request, kind: type[Answer], asks: list[GenerationRequest], stream: bool, usage: bool
    ) -> Response:
        """Has the texts written, and watches the client meanwhile."""
        ticket = engine.accept(asks)
        found = kind(settings.name, ticket, choices.vocabulary)
        facts: dict[str, Any] = request.state.facts

        def record() -> None:
            ticket.cancel()
            facts.update(found.facts)
            if found.first_seconds is not None:
                metrics.first.observe(found.first_seconds)
            if settings.log_text:
                facts["prompts"] = [tokenizer.decode(text.ask.prompt) for text in found.texts]
                facts["answers"] = [text.said for text in found.texts]

        watch = asyncio.ensure_future(_gone(request, ticket))
        try:
            if stream:
                chunks = found.stream(usage=usage)
                first = await anext(chunks, None)  # errors until here still have a status of their own
                return Events(first, chunks, record)
            whole = await found.whole()
            record()
            return _json(whole) if whole is not None else Response(status_code=499)  # nobody reads it
        except BaseException:
            record()
            raise
        finally:
            watch.cancel()

    both: dict[int | str, dict[str, Any]] = {200: {"content": EVENTS}}

    @app.post("/v1/completions", response_model=Completion, responses=REFUSALS | both)
    async def completions(request: Request, asked: CompletionRequest) -> Response:
        check_model(asked.model)
        asks = choices.of_completion(asked)
        return await answer(request, CompletionAnswer, asks, bool(asked.stream), _wants_usage(asked))

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=REFUSALS | both)
    async def chat(request: Request, asked: ChatRequest) -> Response:
        check_model(asked.model)
        asks = choices.of_chat(asked)
        return await answer(request, ChatAnswer, asks, bool(asked.stream), _wants_usage(asked))

    @app.get("/v1/models", responses={401: REFUSALS[401]})
    async def models() -> ModelList:
        return ModelList(data=[Model(id=settings.name, created=created)])

    @app.get("/v1/models/{name:path}", responses={401: REFUSALS[401], 404: REFUSALS[404]})
    async def one_model(name: str) -> Model:
        check_model(name)
        return Model(id=settings.name, created=created)

    @app.get("/health", responses={503: {"model": Health}})
    async def health(response: Response) -> Health:
        if engine.alive and not gate.stopping:
            return Health(status="ok")
        response.status_code = 503
        return Health(status="stopping" if gate.stopping else "failed")

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}, 401: REFUSALS[401]})
    async def numbers() -> Response:
        return Response(metrics.text, media_type="text/plain; version=0.0.4")

    @app.exception_handler(APIError)
    async def refused(request: Request, error: APIError) -> Response:
        return _Refused(error)

    @app.exception_handler(InputError)
    async def unusable(request: Request, error: InputError) -> Response:
        return _Refused(APIError(400, str(error)))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return _Refused(_explained(error))

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        return _Refused(APIError(error.status_code, f"{error.detail}."), error.headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return _Refused(FAILED)

    app.include_router(playground(model, tokenizer, engine))
    app.state.gate, app.state.engine, app.state.metrics = gate, engine, metrics
    return app


FAILED = APIError(500, "The server failed on this request; its log says more.", kind="server_error")


class Events(StreamingResponse):
    """Chunks as server-sent events; `done` is called in the end, however it comes."""

    def __init__(self, first: BaseModel | None, chunks: AsyncIterator[BaseModel], done: Any):
        super().__init__(self._lines(first, chunks), media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self.done = done

    async def _lines(self, first: BaseModel | None, chunks: AsyncIterator[BaseModel]) -> AsyncIterator[bytes]:
        try:
            if first is not None:
                yield _line(first.model_dump_json())
            async for chunk in chunks:
                yield _line(chunk.model_dump_json())
        except Exception as error:  # the status has been sent; the stream is all that is left to say it in
            refusal = error if isinstance(error, APIError) else FAILED
            yield _line(json.dumps(refusal.body))
            return
        yield _line("[DONE]")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.done()


class _Refused(Response):
    """A refusal as a response."""

    def __init__(self, refusal: APIError, headers: Any = None):
        super().__init__(status_code=refusal.status, headers=headers)
        self.refusal = refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await refuse(self.refusal, send)


def _json(value: BaseModel) -> Response:
    return Response(value.model_dump_json(), media_type="application/json")


def _line(text: str) -> bytes:
    return f"data: {text}\n\n".encode()


def _wants_usage(asked: CompletionRequest | ChatRequest) -> bool:
    return asked.stream_options is not None and bool(asked.stream_options.include_usage)


async def _gone(request: Request, ticket: RequestHandle) -> None:
    """Cancels the ticket when the client hangs up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    log.info("client_gone")
    ticket.cancel()


def _explained(error: RequestValidationError) -> APIError:
    """One sentence about the first thing that is wrong with a body."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return APIError(400, f"The body is not valid JSON: {first['ctx']['error']}.")
    if not place:
        return APIError(400, "The body must be a JSON object, sent with Content-Type: application/json.")
    what = first["msg"].removeprefix("Value error, ")
    if place[0] == "prompt" and first["type"] not in ("missing", "value_error"):
        what = PROMPT  # in place of what is wrong with it as the first of its four forms
    return APIError(400, f"{place[0]}: {what}.", param=place[0])
