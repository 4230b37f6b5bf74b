"""The process around the application: a socket, uvicorn, and a shutdown that loses nothing that was accepted.

SIGTERM (or Ctrl-C) stops taking requests, which get status 503 while the rest is finished; then the process ends. A
second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from dynamo_lm.errors import InputError
from dynamo_lm.serving.logs import log
from dynamo_lm.serving.middleware import LimitsMiddleware

BACKLOG = 2048  # connections that may wait to be accepted; uvicorn's own default
GRACE = 5.0  # seconds that clients may take to read their answers after the last token
LOCAL = ("localhost", "127.0.0.1", "[::1]")


def bind(host: str, port: int) -> socket.socket:
    """A listening socket for the server, made before the model is loaded.

    It listens at once: two sockets that do not listen yet may be bound to one port, and the later of two servers would only
    fail after it had loaded its model. Clients that connect meanwhile wait.

    Raises:
        InputError: the address cannot be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        taken = getattr(error, "errno", None) == errno.EADDRINUSE
        reason = "the port is in use; choose another with --port" if taken else getattr(error, "strerror", None) or error
        raise InputError(f"The server cannot listen at {host} port {port}: {reason}.") from error
    return bound


def is_local(host: str) -> bool:
    """Whether only this machine can reach it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(app: FastAPI, bound: socket.socket, seconds: float) -> None:
    """Serves until a signal.

    Args:
        seconds: the most that an accepted request may take.
    """
    Server(app.state.middleware, seconds).run(sockets=[bound])


class Server(uvicorn.Server):
    """uvicorn, with a shutdown that goes on listening, to refuse, until what was accepted is finished."""

    def __init__(self, middleware: LimitsMiddleware, seconds: float):
        config = uvicorn.Config(
            middleware,
            log_config=None,
            access_log=False,
            server_header=False,
            http="h11",
            ws="none",
            lifespan="on",
            timeout_keep_alive=5,
            timeout_graceful_shutdown=int(GRACE),
        )
        super().__init__(config)
        self.middleware, self.seconds = middleware, seconds
        self._draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.middleware.stopping or not self.started:
            self.force_exit = self.should_exit = True
            return
        self.middleware.stopping = True  # main_loop, which looks ten times a second, sees it

    async def on_tick(self, counter: int) -> bool:
        if self.middleware.stopping and self._draining is None:
            log.info("stopping", under_way=self.middleware.under_way)
            self._draining = asyncio.ensure_future(self._drain())
        return await super().on_tick(counter)

    async def _drain(self) -> None:
        end = asyncio.get_running_loop().time() + self.seconds + GRACE
        while self.middleware.under_way and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.02)
        self.should_exit = True


def key_from_environment() -> str | None:
    """The API key, from DYNAMO_API_KEY.

    Raises:
        InputError: it is there and empty, which would look like protection and be none.
    """
    key = os.environ.get("DYNAMO_API_KEY")
    if key is not None and not key.strip():
        raise InputError("DYNAMO_API_KEY is empty; give it a value, or unset it to serve without a key.")
    return key
