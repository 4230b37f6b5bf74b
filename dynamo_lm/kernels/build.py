"""Builds the library of compiled kernels for this very processor, once, and remembers how that went.

torch's own compiler driver (which `torch.compile` uses) builds the C++ beside this file in some seconds up to a minute and
keeps the result on disk. Unless it is to wait, a process that finds no library starts another one that builds it, and
goes without. A failed build is logged once, as a warning, and is not tried again by every process.

`python -m dynamo_lm.kernels.build` builds it now.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import torch

from dynamo_lm.private_interfaces import build_cache, build_library, cpp_compiler

logger = logging.getLogger(__name__)

# A fused multiplication and addition rounds once; sums keep their order, because results must not depend on the batch.
FLAGS = ("-ffp-contract=fast", "-fno-associative-math", "-Wno-pedantic")
SOURCES = (
    "lanes.h",
    "skinny_matmul.cpp",
    "quantized_matmul.cpp",
    "decode_attention.cpp",
    "decoder_layer.cpp",
    "sampler.cpp",
    "drafts.cpp",
    "draw.cpp",
)
SLOW = 2.0  # seconds that loading a library may take before a message says that one is being built


class BuildError(RuntimeError):
    """The kernels cannot be built here, or have not been built yet."""


def library(*, wait: bool, report: bool = True) -> str:
    """The path of the library, which is loaded.

    Args:
        wait: build it now if it is not there; else a background process builds it, for the processes after this one.
        report: log a warning about a failed build, if no process has done so.

    Raises:
        BuildError: it is not there, with the reason as the end of a sentence.
    """
    folder = resources.files(__package__).joinpath("csrc")
    source = "".join(folder.joinpath(name).read_text(encoding="utf-8") for name in SOURCES)
    built, failed, reported = (_marker(outcome, source) for outcome in ("built", "failed", "reported"))
    if not failed.is_file():
        exists = _names_a_file(built)
        try:
            if wait or exists:
                with contextlib.nullcontext() if exists else _warn_if_slow():
                    path = build_library(source, FLAGS)
                _write(built, path)
                return path
            cpp_compiler()
        except Exception as error:  # no compiler, no headers, a compiler that refuses: all of them only cost speed
            _write(failed, _first_error(error))
        else:
            _start_building()
            raise BuildError("they are being built in the background, for the next process")
    reason = failed.read_text(encoding="utf-8") if failed.is_file() else "the build's outcome cannot be written to disk"
    if report and not reported.is_file():
        _write(reported, "")
        logger.warning(
            "The compiled kernels could not be built, so decoding is slower and exact only up to rounding: %s "
            'Delete "%s" to try again.',
            reason,
            failed,
        )
    raise BuildError(reason)


def _start_building() -> None:
    """Start a process that builds the library, and outlives this one."""
    logger.warning(
        "The compiled kernels are being built in the background, once, which takes up to a minute. This process decodes "
        "with torch's own operations, later ones with the kernels; DYNAMO_LM_KERNELS=wait waits for them instead."
    )
    subprocess.Popen(
        [sys.executable, "-m", __name__],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _marker(outcome: str, source: str) -> Path:
    """The file that remembers a build's outcome, by compiler, flags and source."""
    compiler = shutil.which(os.environ.get("CXX") or "g++") or ""
    changed = os.stat(compiler).st_mtime_ns if compiler else 0  # another version of it may do better
    key = "\0".join((compiler, str(changed), torch.__version__, *FLAGS, source))
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    return build_cache() / "dynamo_lm" / f"build-{outcome}-{name}.txt"


def _names_a_file(marker: Path) -> bool:
    """Whether the library that a marker names is still there."""
    try:
        return Path(marker.read_text(encoding="utf-8")).is_file()
    except OSError:
        return False


def _write(marker: Path, text: str) -> None:
    with contextlib.suppress(OSError):
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.write_text(text, encoding="utf-8")


def _first_error(error: Exception) -> str:
    """The compiler's first error, or the exception's first line."""
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    first = lines[0] if lines else type(error).__name__
    return next((line for line in lines if "error:" in line or "cannot find" in line), first)[:300]


@contextlib.contextmanager
def _warn_if_slow() -> Iterator[None]:
    """Logs a warning if what is done within takes longer than a kept result takes to load."""
    message = "Building the kernels for this processor, once; that takes some seconds, up to a minute."
    timer = threading.Timer(SLOW, logger.warning, [message])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


if __name__ == "__main__":
    os.nice(10)
    library(wait=True, report=False)  # its log goes nowhere
