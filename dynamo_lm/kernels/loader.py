"""The project's compiled kernels: products and attention of few rows on CPUs, built on the machine that runs them.

torch's own compiler driver (which `torch.compile` uses) builds the C++ beside this file for this very processor the first
time it is wanted, in seconds, and keeps the result on disk. Out: whether `torch.ops.dynamo_lm.skinny_matmul` and
`.decode_attention` can be called, and what of the sampler comes with them. Without a C++ compiler they cannot, and
everything works with torch's own operations and NumPy's.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# A fused multiplication and addition rounds once; sums keep their order, because results must not depend on the batch.
FLAGS = ("-ffp-contract=fast", "-fno-associative-math", "-Wno-pedantic")
STRIDE = 16  # entries that they take at a time, as in lanes.h: what they sum over is a multiple of it
DTYPES = (torch.float32, torch.bfloat16)
SOURCES = ("lanes.h", "skinny_matmul.cpp", "decode_attention.cpp", "sampler.cpp", "drafts.cpp", "draw.cpp")
MOST_LOGITS = 2**20  # some milliseconds
PATIENCE = 2.0  # seconds without a word
_T = "AtenTensorHandle"
SHIMS = {  # what compiled steps call, by its name in C
    "skinny_matmul": f"{_T} x, {_T} weight, {_T}* bias",
    "decode_attention": f"{_T} query, {_T} key, {_T} value, {_T} mask, double scaling",
}
_P, _N, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
SAMPLER = {  # what arrays on the host are passed to, by its name in C: its result and its arguments
    "dynamo_lm_chain": (None, (_P, _N, _P, _P, _N, _N, _N, _F, _P, _P, _P)),
    "dynamo_lm_draw": (_F, (_P, _P, _N, _N, _P, _P, _F, _F, _N, _F, _F, _P)),
    "dynamo_lm_foreground": (None, (_P, _P, _N, _N, _N, _P)),
    "dynamo_lm_highest": (_N, (_P, _N, _N, _N, _P, _P)),
    "dynamo_lm_normalisers": (None, (_P, _N, _N, _P)),
    "dynamo_lm_pick": (_N, (_P, _N, _P, _P, _N, _F, _N, _P)),
    "dynamo_lm_refuses": (_N, (_P, _N, _P, _P, _N, _N, _F)),
    "dynamo_lm_seen": (_N, (_P, _N, _P, _N, _P, _N, _P, _N, _P, _P, _P)),
}
_sampler: Any = None
_status = "not loaded yet"


@functools.cache
def available() -> bool:
    """Whether the kernels are loaded; builds them the first time. `DYNAMO_LM_KERNELS=0` switches them off."""
    global _status
    if os.environ.get("DYNAMO_LM_KERNELS") == "0":
        _status = "switched off by DYNAMO_LM_KERNELS=0"
        return False
    try:
        from torch._inductor import config  # here, because it takes a second
        from torch._inductor.codecache import CppCodeCache
        from torch._inductor.exc import CppCompileError

        sources = resources.files(__package__).joinpath("csrc")
        source = "".join(sources.joinpath(name).read_text(encoding="utf-8") for name in SOURCES)
        failed, built = _marker("failed", source), _marker("built", source)
        if failed.is_file():
            raise BuildError(failed.read_text(encoding="utf-8"))
        try:
            building = "Building the kernels for this processor, once; that takes some seconds, up to a minute."
            with contextlib.nullcontext() if _exists(built) else _warn_if_slow(building):
                library = CppCodeCache.load(source, extra_flags=FLAGS)
            _mark(built, library._name)
        except Exception as error:  # no compiler, no headers, a compiler that refuses: all of them only cost speed
            reason = _first_error(error)
            if isinstance(error, CppCompileError):  # not a missing compiler or a full disk, which may be mended
                _mark(failed, reason)
            logger.warning(
                "The compiled kernels could not be built, so decoding is slower and exact only up to rounding: %s %s",
                reason,
                f'Delete "{failed}" to try again.' if failed.is_file() else "The next process tries again.",
            )
            raise BuildError(reason) from error
        _register()
        ctypes.CDLL(library._name, mode=ctypes.RTLD_GLOBAL)  # compiled steps find its functions by their names
        for name, arguments in SHIMS.items():
            shim = f"AOTITorchError aoti_torch_cpu_{name}({arguments}, {_T}* result)"
            config.aot_inductor.custom_ops_to_c_shims[getattr(torch.ops.dynamo_lm, name).default] = [shim]
        _load_sampler(library._name)
    except Exception as error:  # a torch built otherwise
        _status = f"not in use, torch's own operations are: {error}"
        logger.info("The compiled kernels are %s", _status)
        return False
    _status = "in use (float32, bfloat16)"
    return True


class BuildError(RuntimeError):
    """The kernels cannot be built here."""


def status() -> str:
    """Whether the kernels are used, and if not why, as the end of a sentence; builds them like `available`."""
    available()
    return _status


def _marker(outcome: str, source: str) -> Path:
    """Where a build's outcome is remembered, by compiler, flags and source.

    A failed build is not tried again by every process. A kept one loads without a message, also on a busy machine.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    compiler = shutil.which(os.environ.get("CXX") or "g++") or ""
    changed = os.stat(compiler).st_mtime_ns if compiler else 0  # another version of it may do better
    key = "\0".join((compiler, str(changed), torch.__version__, *FLAGS, source))
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    return Path(cache_dir()) / "dynamo_lm" / f"build-{outcome}-{name}.txt"


def _exists(marker: Path) -> bool:
    """Whether the library that a marker names is still there."""
    try:
        return Path(marker.read_text(encoding="utf-8")).is_file()
    except OSError:
        return False


def _mark(marker: Path, text: str) -> None:
    with contextlib.suppress(OSError):
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.write_text(text, encoding="utf-8")


def _first_error(error: Exception) -> str:
    """The compiler's first error, or the exception's first line."""
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    return next(
        (line for line in lines if "error:" in line or "cannot find" in line), lines[0] if lines else type(error).__name__
    )[:300]


def _register() -> None:
    """Shapes for torch's tracers, and a refusal of gradients: the kernels are for decoding."""
    for name, fake in (("skinny_matmul", _fake_skinny_matmul), ("decode_attention", _fake_decode_attention)):
        torch.library.register_fake(f"dynamo_lm::{name}", fake)

        def refuse(context: Any, gradient: Tensor, name: str = name) -> None:
            raise RuntimeError(f"{name} has no gradient; train with torch's own operations.")

        torch.library.register_autograd(f"dynamo_lm::{name}", refuse)


@contextlib.contextmanager
def _warn_if_slow(message: str) -> Iterator[None]:
    """Logs a warning if what is done within takes longer than a kept result takes to load."""
    timer = threading.Timer(PATIENCE, logger.warning, [message])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def sampler() -> Any:
    """The functions of `SAMPLER`, or None before `available` has built them: asking starts no compiler."""
    return _sampler


def sampler_of(logits: Tensor) -> Any:
    """`sampler` for logits that it takes, contiguous float32 on the CPU, and no more than one thread is done with soon: no
    other one gets the interpreter meanwhile, and torch shares more of them out. None for others."""
    few = logits.is_cpu and logits.dtype == torch.float32 and logits.is_contiguous() and 0 < logits.numel() <= MOST_LOGITS
    return sampler() if few else None


def address(array: np.ndarray) -> int:
    """Where an array's entries lie, for `SAMPLER`."""
    return array.__array_interface__["data"][0]


def _load_sampler(path: str) -> None:
    global _sampler
    functions = ctypes.PyDLL(path)  # microseconds, in which no other thread need be let in
    for name, (result, arguments) in SAMPLER.items():
        function = getattr(functions, name)
        function.restype, function.argtypes = result, arguments
    _sampler = functions


def _fake_skinny_matmul(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    torch._check(
        weight.dim() == 2 and x.dim() >= 1 and x.shape[-1] == weight.shape[1], lambda: "skinny_matmul: sizes differ."
    )
    torch._check(x.dtype == weight.dtype, lambda: "skinny_matmul: weight must have the dtype of x.")
    torch._check(weight.shape[1] % STRIDE == 0, lambda: "skinny_matmul: the inner size must be a multiple of 16.")
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_decode_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    torch._check(
        query.dim() == 4 and key.shape == value.shape, lambda: "decode_attention: key and value must have one shape."
    )
    torch._check(mask.dtype == torch.bool, lambda: "decode_attention: mask must be bool.")
    rows, heads, queries, width = query.shape
    torch._check(width == key.shape[3] and width % STRIDE == 0, lambda: "decode_attention: widths differ.")
    return query.new_empty((rows, queries, heads, width))
