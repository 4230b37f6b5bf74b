"""The project's compiled kernels: products and attention of few rows on CPUs, and the sampler's work on the host.

Out: whether `torch.ops.dynamo_lm.skinny_matmul` and `.decode_attention` can be called, and the sampler's functions. Where
they cannot, everything works with torch's own operations and NumPy's. A process decides once, when it first asks, and keeps
to it: what it computes never changes because a build in the background has come to its end.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynamo_lm.kernels import build, ops
from dynamo_lm.private_interfaces import call_from_compiled_steps

logger = logging.getLogger(__name__)

MAX_LOGITS = 2**20  # some milliseconds of work
_T = "AtenTensorHandle"
OPS = {  # by op, the arguments in C of dynamo_lm_NAME, which compiled steps call
    "skinny_matmul": f"{_T} x, {_T} weight, {_T}* bias, {_T}* result",
    "quantized_matmul": f"{_T} x, {_T} weight, {_T} scale, {_T}* bias, int64_t out, {_T}* result",
    "decode_attention": f"{_T} query, {_T} key, {_T} value, {_T} mask, double scaling, {_T}* result",
}
_P, _N, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
SAMPLER = {  # functions of arrays on the host: their names in C, result and arguments
    "dynamo_lm_chain": (None, (_P, _N, _F, _P, _P, _N, _N, _P, _N, _F, _P, _P, _P)),
    "dynamo_lm_draw": (_F, (_P, _P, _N, _N, _P, _P, _F, _F, _N, _F, _F, _P)),
    "dynamo_lm_foreground": (None, (_P, _P, _N, _N, _N, _P)),
    "dynamo_lm_highest": (_N, (_P, _N, _N, _N, _P, _P)),
    "dynamo_lm_pick": (_N, (_P, _N, _P, _P, _N, _F, _N, _P)),
    "dynamo_lm_refuses": (_N, (_P, _N, _P, _P, _N, _N, _F)),
    "dynamo_lm_weigh": (None, (_P, _N, _F, _P, _N, _F, _P, _P, _N, _P)),
    "dynamo_lm_children": (_N, (_P, _N, _P, _N, _P, _N, _P, _N, _P, _P, _P)),
}
_sampler: Any = None
_decoder_layers: Any = None
_decided: bool | None = None
_status = "not loaded yet"
_lock = threading.Lock()


def available(*, wait: bool = False) -> bool:
    """Whether this process uses the kernels, which the first call decides and loads.

    If they have not been built for this processor yet, a background process builds them and this one goes without, unless
    it is to wait. `DYNAMO_LM_KERNELS=0` switches the kernels off, `DYNAMO_LM_KERNELS=wait` waits for them.
    """
    global _decided, _status
    with _lock:
        if _decided is None:
            setting = os.environ.get("DYNAMO_LM_KERNELS")
            if setting == "0":
                _decided, _status = False, "switched off by DYNAMO_LM_KERNELS=0"
                return False
            try:
                _load(build.library(wait=wait or setting == "wait"))
                _decided, _status = True, "in use (float32, bfloat16)"
            except Exception as error:  # a torch built otherwise, too
                _decided, _status = False, f"not in use, torch's own operations are: {error}"
                logger.info("The compiled kernels are %s", _status)
        return _decided


def status() -> str:
    """Whether this process uses the kernels, and if not why, as the end of a sentence; decides it like `available`."""
    available()
    return _status


def _load(library: str) -> None:
    """Registers the ops with torch and with its compiler, and finds the sampler's functions."""
    global _sampler, _decoder_layers
    ops.register()
    call_from_compiled_steps(
        library, {getattr(torch.ops.dynamo_lm, name).default: (f"dynamo_lm_{name}", c) for name, c in OPS.items()}
    )
    functions = ctypes.PyDLL(library)  # microseconds, in which no other thread need be let in
    for name, (result, arguments) in SAMPLER.items():
        function = getattr(functions, name)
        function.restype, function.argtypes = result, arguments
    _sampler = functions
    _decoder_layers = ctypes.CDLL(library).dynamo_lm_decoder_layers
    _decoder_layers.restype, _decoder_layers.argtypes = None, (_P, _P, ctypes.c_int64, _P)


def decoder_layers() -> Any:
    """The function of `kernels.decoder_layer`, which lets other threads go on; only where `available`."""
    return _decoder_layers


def sampler() -> Any:
    """The functions of `SAMPLER`, or None if `available` has not loaded them; never starts a build."""
    return _sampler


def sampler_of(logits: Tensor) -> Any:
    """`sampler` for contiguous float32 logits on the CPU, or None.

    Also None for many logits: the functions use one thread and keep the interpreter, while torch shares the work.
    """
    fits = logits.is_cpu and logits.dtype == torch.float32 and logits.is_contiguous() and 0 < logits.numel() <= MAX_LOGITS
    return sampler() if fits else None


def address(array: np.ndarray) -> int:
    """The address of an array's first entry, for `SAMPLER`."""
    return array.__array_interface__["data"][0]
