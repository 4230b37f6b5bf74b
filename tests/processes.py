"""Processes of their own, forked from one that has imported torch and transformers, which takes seconds each time.

What runs in one may be killed, stop at a signal, or lose its standard output; it has imported nothing of the package.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import socket
import sys
import termios
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

IMPORTED = ["torch", "transformers", "transformers.generation.logits_process", "transformers.models.auto.modeling_auto"]
IMPORTED += [f"transformers.models.{name}.modeling_{name}" for name in ("llama", "gpt_neox")] + ["fastapi", "uvicorn"]


def start(
    function: Callable[..., Any],
    *arguments: Any,
    stdout: Path,
    stderr: Path,
    stdin: Path | str = os.devnull,
    environment: Mapping[str, str] | None = None,
    terminal: bool = False,
) -> ForkServerProcess:
    """Runs a function of a module; what it returns is the exit status.

    Args:
        stdin, stdout, stderr: files, named pipes or terminals.
        terminal: whether they are a terminal that is to be the process's own, which Ctrl-C reaches.
    """
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload(IMPORTED)
    files = [os.fspath(file) for file in (stdin, stdout, stderr)]
    process = forking.Process(target=_run, args=(function, arguments, files, dict(environment or {}), terminal), daemon=True)
    process.start()
    return process


def start_ranks(
    count: int, function: Callable[..., Any], *arguments: Any, folder: Path, environment: Mapping[str, str] | None = None
) -> list[ForkServerProcess]:
    """Runs a function on so many ranks, as torchrun would; `folder` gets their stdout-0, stderr-0, stdout-1 .."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    where |= environment or {}
    return [
        start(
            function, *arguments, stdout=folder / f"stdout-{rank}", stderr=folder / f"stderr-{rank}",
            environment=where | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]  # fmt: skip


def command(*line: str) -> int:
    """A command line of the package."""
    from dynamo_lm.cli.main import main

    return main([*line])


def kernels() -> None:
    """Whether the kernels are used."""
    from torch._inductor import config

    config.cpp.cxx = None, os.environ["CXX"]  # which torch read when it was imported
    from dynamo_lm.kernels import loader

    print(loader.status())


def _run(
    function: Callable[..., Any], arguments: Any, files: list[str], environment: dict[str, str], terminal: bool
) -> None:
    os.environ.update(environment)
    os.environ.pop("NO_COLOR", None)
    if terminal:
        os.setsid()
    for number, file in enumerate(files):
        opened = os.open(file, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_NOCTTY, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    if terminal:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
    sys.exit(function(*arguments))
