"""Every interface of torch and transformers that the package uses and that they do not document, in one place.

Checked on torch 2.10.0, 2.13.0 and 2.14.1 and on transformers 5.16.0, 5.23.0 and 5.24.0. The upper bounds in pyproject.toml
exclude what was not run then (torch 2.15, transformers 5.25); raise them after running the tests. torch is imported inside
the functions, because its compiler takes a second to import.

Hooks that transformers' own models override (`_init_weights`, `_tied_weights_keys`, `_supports_sdpa`, ...) stay with the
model's class, and so does `_modules`, which shallow copies of `torch.nn` modules are made with.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.generation.configuration_utils import CompileConfig

# ---------------------------------------------------------------- torch: building C++ and compiled steps


class CompilerError(RuntimeError):
    """The C++ compiler refuses a source."""


def build_library(source: str, flags: Sequence[str]) -> str:
    """Compile C++ for this processor, link it with torch and load it; returns its path. torch keeps it by source and flags.

    Raises:
        CompilerError: the compiler refuses the source.
    """
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.exc import CppCompileError

    try:
        return CppCodeCache.load(source, extra_flags=tuple(flags))._name
    except CppCompileError as error:
        raise CompilerError(str(error)) from error


def build_cache() -> Path:
    """The folder in which torch keeps what it has compiled."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def cpp_compiler() -> str:
    """The C++ compiler that torch calls; raises an exception of torch's where there is none."""
    from torch._inductor import cpp_builder

    return cpp_builder.get_cpp_compiler()


def call_from_compiled_steps(library: str, functions: Mapping[Any, tuple[str, str]]) -> None:
    """Let compiled steps call custom ops by C functions of a library instead of through torch's dispatcher.

    A step's code looks the functions up in the library by name. Loading the library with RTLD_GLOBAL would be shorter, but
    makes torch's own symbols visible to every library loaded later, and some abort (xllamacpp with `std::bad_alloc`).

    Args:
        library: path of a loaded library.
        functions: by op (`torch.ops.NAMESPACE.NAME.default`), the function's name and its arguments in C.
    """
    from torch._inductor import config

    for op, (name, arguments) in functions.items():
        shim = f"aoti_torch_cpu_{op._opname}"  # the name that generated code calls
        names = ", ".join(argument.split()[-1] for argument in arguments.split(","))
        # torch writes "extern <this>;" into the code of each step.
        config.aot_inductor.custom_ops_to_c_shims[op] = [
            f"int {shim}_declared;\n#include <dlfcn.h>\n"
            f"static AOTITorchError {shim}({arguments}) {{\n"
            f'static void* const library = dlopen("{library}", RTLD_LAZY | RTLD_LOCAL);\n'
            f'static const auto call = reinterpret_cast<AOTITorchError (*)({arguments})>(dlsym(library, "{name}"));\n'
            f"return call({names});\n}}"
        ]


def compile_for_cpu(module: Any, example: Any, inner: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Any:
    """torch's compiler for a CPU, as a backend of `torch.compile`.

    The C++ wrapper calls kernels without Python in between; on CPUs that is a third of what compiling saves.

    Args:
        module, example: as a backend of `torch.compile` gets them.
        inner: wraps torch's compiler of one graph. torch's cache of whole callables would bypass it and is left out; the
            cache of compiled code is not.
    """
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    with config.patch(enable_autograd_cache=False):
        patches = {"cpp_wrapper": True, "size_asserts": False}
        return compile_fx(module, example, inner_compile=inner(compile_fx_inner), config_patches=patches)


def allow_recompiles(count: int) -> None:
    """Let torch compile so many shapes of one function; beyond its limit it goes on uncompiled."""
    import torch

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, count)


def compile_in_this_process() -> None:
    """Keep torch's compiler from starting a pool of processes."""
    from torch._inductor import config

    config.compile_threads = 1


def mark_static_address(tensor: Tensor) -> None:
    """Tell torch's compiler that a tensor stays where it is, so that recorded CUDA graphs may write to it."""
    import torch

    torch._dynamo.mark_static_address(tensor)


def multiplies_bfloat16() -> bool:
    """Whether this CPU has units for bfloat16; without them torch's product is slower at any number of rows."""
    import torch

    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def arranged_weight(weight: Tensor, rows: int) -> Tensor | None:
    """A copy of a linear layer's weight as oneDNN wants it for products with about so many rows; None without oneDNN."""
    import torch

    if not torch.backends.mkldnn.is_available():
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


def arranged_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight^T + bias, with an `arranged_weight`."""
    import torch

    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


# ---------------------------------------------------------------- transformers: attention, caches, compiling


def attention_implementation(config: PreTrainedConfig) -> str | None:
    """The name under which a configuration's attention function is registered: "sdpa", "eager", ..."""
    return config._attn_implementation


def with_attention(config: PreTrainedConfig, name: str) -> PreTrainedConfig:
    """A shallow copy of an attention module's configuration with another attention function."""
    twin = copy.copy(config)
    twin._attn_implementation_internal = name  # not by the property, which would change sub-configurations of the original
    return twin


def uses_attention_interface(module: nn.Module) -> bool:
    """Whether a module's code looks its attention function up in transformers' register."""
    return hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS")


def model_from_config(
    base_class: type[PreTrainedModel], config: PreTrainedConfig, attention: str | None, dtype: torch.dtype
) -> PreTrainedModel:
    """A model of this very class with random weights; the public way looks a class up by the configuration."""
    return base_class._from_config(config, attn_implementation=attention, dtype=dtype)


def compute_again_in_backward(layer: nn.Module) -> bool:
    """Let a decoder layer keep no activations in training; returns False where its class cannot."""
    from torch.utils.checkpoint import checkpoint
    from transformers.modeling_layers import GradientCheckpointingLayer

    if not isinstance(layer, GradientCheckpointingLayer):
        return False
    layer.gradient_checkpointing = True
    layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)  # type: ignore[assignment]
    return True


def cache_argument(body: nn.Module) -> str:
    """The argument by which a base's body takes its KV cache: `cache` since transformers 5.24, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(type(body).forward).parameters else "past_key_values"


def compile_everywhere(config: CompileConfig) -> CompileConfig:
    """Have transformers' `generate` compile its steps on a CPU, too; returns the configuration."""
    config._compile_all_devices = True  # type: ignore[assignment]
    return config
