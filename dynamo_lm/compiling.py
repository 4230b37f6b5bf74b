"""Compiled decoding steps: torch.compile over a forward whose shapes never change.

On small models most of a step is Python and the dispatch of small operations; compiled, it is a few calls. In: a model and
how it is to decode. Out: the model arranged for decoding and a forward for its steps, both kept with the model, because
compiling takes a minute (torch keeps the result on disk, too). Every capacity of the cache and every width is compiled anew.
On a CUDA device the kernels of a step are recorded once and replayed as one graph, which holds addresses: a step's result is
overwritten by the next one, and caches are used again (`Batch`), because every other one is recorded anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dynamo_lm.errors import InputError
from dynamo_lm.wide import WideLayer

if TYPE_CHECKING:
    from dynamo_lm.model import DynaMoForCausalLM

LEAST = 256  # slots of the smallest cache; larger ones double
SHAPES = 64  # compiled steps that one process may hold


def capacity(tokens: int) -> int:
    """Slots of the cache that holds so many tokens."""
    slots = LEAST
    while slots < tokens:
        slots *= 2
    return slots


def compiled(model: DynaMoForCausalLM, num_heads: int) -> tuple[DynaMoForCausalLM, Callable[..., Tensor]]:
    """The model arranged for `num_heads` heads, and its `hidden`, compiled.

    Raises:
        InputError: heads that do not run beside the last layer, or no C++ compiler on a CPU.
    """
    n = num_heads
    # torch counts every width, capacity and number of heads against one limit, and would go on uncompiled behind it.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES)
    if (n, model.device) not in model.arranged:
        if model.device.type == "cpu":
            check_compiler()
        twin = model.for_decoding(n)
        if n > 1 and not isinstance(twin.last_layer, WideLayer):
            raise InputError("compile=True needs heads that are one layer beside the base's last one; leave it out.")
        options: dict[str, Any] = {"guard_filter_fn": _of_inputs}
        if model.device.type == "cpu":
            # The C++ wrapper calls kernels without Python in between; on CPUs that is a third of what compiling saves.
            options |= {"cpp_wrapper": True, "size_asserts": False}
        graphs = model.device.type == "cuda"
        step = torch.compile(twin.hidden, dynamic=False, options=options | ({"triton.cudagraphs": True} if graphs else {}))
        model.arranged[n, model.device] = twin, _marked(step) if graphs else step
    twin, forward = model.arranged[n, model.device]
    twin.cooccurrence, twin.coupling = model.cooccurrence, model.coupling  # which may have changed since
    return twin, forward


def _marked(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A recorded step that says beforehand that nobody reads the result of the last one any more."""

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return step(*args, **kwargs)

    return forward


def _of_inputs(guards: Sequence[Any]) -> list[bool]:
    """Which of torch's guards a step checks: those on the tensors that it is handed.

    The others, thousands of them, watch modules and settings that are ours and do not change; checking them took a tenth of
    a step.
    """
    return [guard.guard_type == "TENSOR_MATCH" and not guard.name.startswith(("self", "G[")) for guard in guards]


def check_compiler() -> None:
    """Refuses where torch's CPU compiler has no C++ compiler to call. Raises InputError."""
    from torch._inductor import cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except Exception as error:
        raise InputError("Compiling for a CPU needs a C++ compiler such as g++, and there is none.") from error
