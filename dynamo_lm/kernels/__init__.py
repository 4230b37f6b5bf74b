"""The project's one compiled kernel: products of few rows on CPUs, built on the machine that runs them.

torch's own compiler driver (which `torch.compile` uses) builds `few_rows.cpp` for this very processor the first time it is
wanted, in seconds, and keeps the result on disk. Out: whether `torch.ops.dynamo_lm.few_rows` can be called. Without a C++
compiler it cannot, and everything works with torch's own products.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from importlib import resources

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# A fused multiplication and addition rounds once; sums keep their order, because results must not depend on the batch.
FLAGS = ("-ffp-contract=fast", "-fno-associative-math", "-Wno-pedantic")
SHIM = """AOTITorchError aoti_torch_cpu_few_rows(
    AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias, AtenTensorHandle* result)"""


@functools.cache
def available() -> bool:
    """Whether the kernel is there; builds it, if need be. `DYNAMO_LM_KERNELS=0` in the environment leaves it out."""
    if os.environ.get("DYNAMO_LM_KERNELS") == "0":
        return False
    try:
        from torch._inductor import config
        from torch._inductor.codecache import CppCodeCache

        source = resources.files(__package__).joinpath("few_rows.cpp").read_text(encoding="utf-8")
        library = CppCodeCache.load(source, extra_flags=FLAGS)
        torch.library.register_fake("dynamo_lm::few_rows", _shape)
        # Compiled steps call the function in the library itself, by its name in C, which has to be visible to them.
        ctypes.CDLL(library._name, mode=ctypes.RTLD_GLOBAL)
        config.aot_inductor.custom_ops_to_c_shims[torch.ops.dynamo_lm.few_rows.default] = [SHIM]
    except Exception as error:  # no compiler, no headers, a torch built otherwise: all of them only cost speed
        logger.info("No kernel for products of few rows, torch's own are used: %s", error)
        return False
    return True


def _shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
