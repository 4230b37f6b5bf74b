"""The HTTP application: routes, server-sent events, and errors in OpenAI's form.

In: an engine, a tokenizer, settings. Out: an ASGI application, whose lifespan starts and stops the engine. A client that
hangs up cancels its texts. Knows no sockets and no signals: see `dynamo_lm.serving.server`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
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
    FORMS,
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
from dynamo_lm.serving.requests import GenerationRequest, RequestParser
from dynamo_lm.serving.responses import Answer, ChatAnswer, CompletionAnswer
from dynamo_lm.serving.settings import ServerSettings

REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": what}
    for status, what in {
        400: "The request cannot be carried out; see the message",
        401: "No key, or a wrong one",
        404: "No such model",
        408: "The body came too slowly",
        413: "The body is too large",
        429: "The queue is full; see Retry-After",
        500: "The server failed",
        503: "The server is stopping, or no place became free in time",
    }.items()
}
LONGEST_VALUE = 60  # characters of a value that an error repeats
EVENTS = {"text/event-stream": {"schema": {"description": "With stream: true, chunks as events; the last one is [DONE]."}}}


def create_app(model: DynaMoForCausalLM, tokenizer: Any, settings: ServerSettings) -> FastAPI:
    """The application of one server; `app.state.middleware` and `app.state.engine` are its parts."""
    num_heads = settings.generation.num_heads or model.num_heads
    metrics = Metrics(num_heads)
    engine = Engine(model, num_heads, settings.limits, metrics)
    parser = RequestParser(model, tokenizer, settings)
    created = int(time.time())

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await engine.stop()

    app = FastAPI(title="dynamo-lm", version="1", lifespan=lifespan, docs_url=None, redoc_url=None)
    middleware = LimitsMiddleware(
        app,
        key=settings.key,
        hosts=settings.hosts,
        max_body=settings.limits.max_body,
        metrics=metrics,
        paths=("/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions", "/dynamo/joint"),
    )

    def check_model(name: str) -> None:
        if name != settings.name:
            message = f'There is no model "{name}"; this server has "{settings.name}".'
            raise APIError(404, message, param="model", code="model_not_found")

    async def respond(
        http: Request, kind: type[Answer], texts: list[GenerationRequest], body: CompletionRequest | ChatRequest
    ) -> Response:
        """Has the texts written, and cancels them when the client hangs up."""
        handle = engine.accept(texts)
        answer = kind(settings.name, handle, parser.vocabulary)
        facts: dict[str, Any] = http.state.facts

        def record() -> None:
            handle.cancel()
            facts.update(answer.facts)
            if answer.first_seconds is not None:
                metrics.first.observe(answer.first_seconds)
            if settings.log_text:
                facts["prompts"] = [tokenizer.decode(stream.request.prompt) for stream in answer.streams]
                facts["answers"] = [stream.text for stream in answer.streams]

        watch = asyncio.ensure_future(_cancel_on_disconnect(http, handle))
        try:
            if body.stream:
                usage = body.stream_options is not None and bool(body.stream_options.include_usage)
                chunks = answer.chunks(usage=usage)
                first = await anext(chunks, None)  # an error up to this point still has a status of its own
                return Events(first, chunks, record)
            whole = await answer.whole()
            record()
            if whole is None:
                return Response(status_code=499)  # the client has gone
            return Response(whole.model_dump_json(), media_type="application/json")
        except BaseException:
            record()
            raise
        finally:
            watch.cancel()

    both: dict[int | str, dict[str, Any]] = {200: {"content": EVENTS}}

    @app.post("/v1/completions", response_model=Completion, responses=REFUSALS | both)
    async def completions(http: Request, body: CompletionRequest) -> Response:
        check_model(body.model)
        return await respond(http, CompletionAnswer, parser.completion(body), body)

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=REFUSALS | both)
    async def chat(http: Request, body: ChatRequest) -> Response:
        check_model(body.model)
        return await respond(http, ChatAnswer, parser.chat(body), body)

    @app.get("/v1/models", responses={401: REFUSALS[401]})
    async def models() -> ModelList:
        return ModelList(data=[Model(id=settings.name, created=created)])

    @app.get("/v1/models/{name:path}", responses={401: REFUSALS[401], 404: REFUSALS[404]})
    async def one_model(name: str) -> Model:
        check_model(name)
        return Model(id=settings.name, created=created)

    @app.get("/health", responses={503: {"model": Health}})
    async def health(response: Response) -> Health:
        if engine.alive and not middleware.stopping:
            return Health(status="ok")
        response.status_code = 503
        return Health(status="stopping" if middleware.stopping else "failed")

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}, 401: REFUSALS[401]})
    async def numbers() -> Response:
        return Response(metrics.text, media_type="text/plain; version=0.0.4")

    for kind, as_error in AS_API_ERROR.items():
        app.add_exception_handler(kind, _error_handler(as_error))
    app.include_router(playground(model, tokenizer, engine))
    app.state.middleware, app.state.engine, app.state.metrics = middleware, engine, metrics
    return app


FAILED = APIError(500, "The server failed on this request; see its log.", kind="server_error")


class Events(StreamingResponse):
    """Chunks as server-sent events; `done` is called at the end, also after an error."""

    def __init__(self, first: BaseModel | None, chunks: AsyncIterator[BaseModel], done: Any):
        super().__init__(self._lines(first, chunks), media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self.done = done

    async def _lines(self, first: BaseModel | None, chunks: AsyncIterator[BaseModel]) -> AsyncIterator[bytes]:
        try:
            if first is not None:
                yield _line(first.model_dump_json())
            async for chunk in chunks:
                yield _line(chunk.model_dump_json())
        except Exception as error:  # the status has been sent, so the error goes into the stream
            failure = error if isinstance(error, APIError) else FAILED
            yield _line(json.dumps(failure.body))
            return
        yield _line("[DONE]")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.done()


class ErrorResponse(Response):
    """An error in OpenAI's form as a response."""

    def __init__(self, error: APIError):
        super().__init__(status_code=error.status)
        self.error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await refuse(self.error, send)


def _explained(error: RequestValidationError) -> APIError:
    """One sentence about the first thing that is wrong with a body."""
    first = error.errors()[0]
    place = [part for part in first["loc"] if part != "body" and part not in FORMS]
    if first["type"] == "json_invalid":
        return APIError(400, f"The body is not valid JSON: {first['ctx']['error']}.")
    if not place:
        return APIError(400, "The body must be a JSON object, sent with Content-Type: application/json.")
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")
    if first["type"] in ("model_type", "model_attributes_type", "dict_type"):
        message = "it must be an object"
    else:
        message = first["msg"].removeprefix("Value error, ").replace("Input should be", "it must be", 1)
    return APIError(400, f"{name}{_given(first['input'])}: {message}.", param=str(place[0]))


def _of_starlette(error: HTTPException) -> APIError:
    """What starlette or FastAPI says; of a body that cannot be read they only say that it cannot."""
    cause = error.__cause__
    if isinstance(cause, UnicodeDecodeError):
        return APIError(400, f"The body is not UTF-8: byte {cause.start + 1} is 0x{cause.object[cause.start]:02x}.")
    if isinstance(cause, RecursionError):
        return APIError(400, "The body is nested too deeply.")
    return APIError(error.status_code, f"{error.detail}.")


def _given(value: Any) -> str:
    """ " is VALUE" of a short value."""
    if isinstance(value, (str, int, float)) and len(written := json.dumps(value)) <= LONGEST_VALUE:
        return f" is {written}"
    return ""


AS_API_ERROR: dict[type[Exception], Callable[[Any], APIError]] = {
    APIError: lambda error: error,
    InputError: lambda error: APIError(400, str(error)),
    RequestValidationError: _explained,
    HTTPException: _of_starlette,
    Exception: lambda error: FAILED,
}


def _error_handler(as_error: Callable[[Any], APIError]) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def handle(request: Request, error: Exception) -> Response:
        return ErrorResponse(as_error(error))

    return handle


# Ends of lines to `str.splitlines`, by which some clients (httpx's iter_lines) cut; JSON holds them in strings alone.
SEPARATORS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}


def _line(text: str) -> bytes:
    return f"data: {text.translate(SEPARATORS)}\n\n".encode()


async def _cancel_on_disconnect(request: Request, handle: RequestHandle) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    log.info("client_gone")
    handle.cancel()
