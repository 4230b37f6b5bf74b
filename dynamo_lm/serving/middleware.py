"""Checks on every request before the application gets it: host, key, a stopping server, size and time of the body.

An ASGI middleware. Refuses in OpenAI's error form, counts and logs every request when its answer has ended, and knows how
many are under way. Knows no model.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import Iterable
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dynamo_lm.serving.logs import log
from dynamo_lm.serving.metrics import Metrics
from dynamo_lm.serving.protocol import APIError

OPEN = ("/", "/health")  # paths that need no key
BODY_SECONDS = 30.0  # that a client may take to send a request


class LimitsMiddleware:
    """
    Args:
        key: that a client must send as "Authorization: Bearer KEY"; None: no key.
        hosts: names that a request may be addressed to, so that no foreign page reaches a local server by a name of its own
            that it lets point here; None: any.
        max_body: bytes of a body.
        paths: that metrics are kept by; all others count as "other".
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        key: str | None,
        hosts: Iterable[str] | None,
        max_body: int,
        metrics: Metrics,
        paths: Iterable[str],
    ):
        self.app, self.max_body, self.metrics, self.paths = app, max_body, metrics, frozenset(paths)
        self.key = None if key is None else key.encode()
        self.hosts = None if hosts is None else frozenset(host.lower() for host in hosts)
        self.stopping = False
        self.under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status, name = time.monotonic(), 0, uuid.uuid4().hex
        facts: dict[str, Any] = {}
        scope.setdefault("state", {})["facts"] = facts

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", name.encode())]
            await send(message)

        self.under_way += 1
        try:
            try:
                self._check(scope)
                body = await self._read(scope, receive)
            except APIError as refusal:
                await refuse(refusal, sending, close=True)
            else:
                await self.app(scope, _again(body, receive), sending)
        finally:
            self.under_way -= 1
            path = scope["path"] if scope["path"] in self.paths else "other"
            seconds = time.monotonic() - began
            self.metrics.requests.labels(path, str(status or "gone")).inc()
            self.metrics.seconds.labels(path).observe(seconds)
            method = scope["method"]
            log.info("request", id=name, method=method, path=path, status=status, seconds=round(seconds, 4), **facts)

    def _check(self, scope: Scope) -> None:
        """Raises APIError for requests that this server does not answer."""
        headers = Headers(scope=scope)
        if self.hosts is not None and _host(headers.get("host", "")) not in self.hosts:
            raise APIError(400, "The request is addressed to a host that this server does not answer for (--allow-host).")
        if self.key is not None and scope["path"] not in OPEN:
            sent = headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(sent, b"Bearer " + self.key):
                message = "The API key is missing or wrong; send it as `Authorization: Bearer KEY`."
                raise APIError(401, message, kind="authentication_error", code="invalid_api_key")
        if self.stopping and scope["method"] == "POST":
            raise APIError(503, "The server is stopping; try another, or again later.", kind="server_error", retry_after=5)

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        """The body, if it is small enough and comes soon enough."""
        length = Headers(scope=scope).get("content-length", "0")
        too_large = APIError(413, f"The request is larger than {self.max_body} bytes (--max-body).")
        if length.isdecimal() and int(length[:20]) > self.max_body:
            raise too_large
        try:
            return await asyncio.wait_for(_whole(receive, self.max_body, too_large), BODY_SECONDS)
        except asyncio.TimeoutError:
            raise APIError(408, f"The request did not come within {BODY_SECONDS:g} seconds.") from None


async def _whole(receive: Receive, most: int, too_large: APIError) -> bytes:
    """The body, or what came of it before the client went away."""
    parts, size = [], 0
    while (message := await receive())["type"] == "http.request":
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            raise too_large
        if not message.get("more_body", False):
            break
    return b"".join(parts)


async def refuse(refusal: APIError, send: Send, *, close: bool = False) -> None:
    """Answers with the refusal; `close` also ends the connection, whose request may not have been read."""
    body = json.dumps(refusal.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **refusal.headers}
    if close:
        headers["connection"] = "close"
    if refusal.status == 401:
        headers["www-authenticate"] = "Bearer"
    encoded = [(key.encode(), value.encode()) for key, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})


def _again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that begins with a body that was read already."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _host(header: str) -> str:
    """The name in a Host header, without its port."""
    name, _, port = header.lower().rpartition(":")
    return name if name and port.isdecimal() else header.lower()
