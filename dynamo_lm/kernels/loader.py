"""The project's compiled kernels: products and attention of few rows on CPUs, built on the machine that runs them.

torch's own compiler driver (which `torch.compile` uses) builds the C++ beside this file for this very processor the first
time it is wanted, in seconds, and keeps the result on disk. Out: whether `torch.ops.dynamo_lm.few_rows` and `.few_queries`
can be called, and what of the sampler comes with them. Without a C++ compiler they cannot, and everything works with torch's
own operations and NumPy's.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import threading
from collections.abc import Iterator
from importlib import resources
from typing import Any

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# A fused multiplication and addition rounds once; sums keep their order, because results must not depend on the batch.
FLAGS = ("-ffp-contract=fast", "-fno-associative-math", "-Wno-pedantic")
STRIDE = 16  # entries that they take at a time, as in lanes.h: what they sum over is a multiple of it
DTYPES = (torch.float32, torch.bfloat16)
SOURCES = ("lanes.h", "few_rows.cpp", "few_queries.cpp", "sampler.cpp", "drafts.cpp", "draw.cpp")
MOST_LOGITS = 2**20  # some milliseconds
PATIENCE = 2.0  # seconds without a word
_T = "AtenTensorHandle"
SHIMS = {  # what compiled steps call, by its name in C
    "few_rows": f"{_T} x, {_T} weight, {_T}* bias",
    "few_queries": f"{_T} query, {_T} key, {_T} value, {_T} mask, double scaling",
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


@functools.cache
def available() -> bool:
    """Whether the kernels are there; builds them, if need be. `DYNAMO_LM_KERNELS=0` in the environment leaves them out."""
    if os.environ.get("DYNAMO_LM_KERNELS") == "0":
        return False
    try:
        from torch._inductor import config
        from torch._inductor.codecache import CppCodeCache

        source = "".join(resources.files(__package__).joinpath("csrc", name).read_text(encoding="utf-8") for name in SOURCES)
        with _said_if_slow("Building the kernels for this processor, once; that takes some seconds, up to a minute."):
            library = CppCodeCache.load(source, extra_flags=FLAGS)
        torch.library.register_fake("dynamo_lm::few_rows", _of_few_rows)
        torch.library.register_fake("dynamo_lm::few_queries", _of_few_queries)
        ctypes.CDLL(library._name, mode=ctypes.RTLD_GLOBAL)  # compiled steps find its functions by their names
        for name, arguments in SHIMS.items():
            shim = f"AOTITorchError aoti_torch_cpu_{name}({arguments}, {_T}* result)"
            config.aot_inductor.custom_ops_to_c_shims[getattr(torch.ops.dynamo_lm, name).default] = [shim]
        _load_sampler(library._name)
    except Exception as error:  # no compiler, no headers, a torch built otherwise: all of them only cost speed
        logger.info("No kernels for few rows, torch's own operations are used: %s", error)
        return False
    return True


@contextlib.contextmanager
def _said_if_slow(message: str) -> Iterator[None]:
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


def _of_few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _of_few_queries(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    rows, heads, queries, width = query.shape
    return query.new_empty((rows, queries, heads, width))
