"""Compiled decoding steps: torch.compile over a forward whose shapes never change.

Most of a step of a small model is Python and the dispatch of small operations; compiled, it is a few calls. In: a model and
its number of heads. Out: the model arranged for decoding and a compiled forward for its steps, both kept with the model,
because compiling takes a minute (torch also keeps the result on disk). Each capacity of the cache and each width is compiled
separately. On a CPU the compiled code is called directly (`CompiledStep`). On a CUDA device the kernels of a step are
recorded once and replayed as one CUDA graph, which holds addresses: a step overwrites the last one's result, and caches are
used again (`dynamo_lm.decoding.model_runner`), because another one would be recorded anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynamo_lm.backbone.attention_mask import AttentionMaskBuilder
from dynamo_lm.backbone.base_model import decoder_layers
from dynamo_lm.backbone.stacked_heads import StackedHeads
from dynamo_lm.decoding.kv_cache import RaggedKVCache, StaticKVCache
from dynamo_lm.decoding.protocol import MultiHeadLM
from dynamo_lm.errors import InputError
from dynamo_lm.kernels.quantized import stored_weights
from dynamo_lm.private_interfaces import allow_recompiles, compile_for_cpu, cpp_compiler

MIN_CAPACITY = 256  # slots of the smallest cache; larger ones double
MAX_COMPILED_STEPS = 64  # in one process
MAX_REREAD = 2**27  # bytes of weights that are read in the time that calling a forward's operations one by one takes


def capacity(tokens: int) -> int:
    """Slots of the cache that holds this many tokens."""
    slots = MIN_CAPACITY
    while slots < tokens:
        slots *= 2
    return slots


def compile_steps(model: MultiHeadLM, num_heads: int) -> tuple[MultiHeadLM, Callable[..., Tensor]]:
    """The model arranged for `num_heads` heads, and its `hidden`, compiled.

    Raises:
        InputError: heads that do not run beside the last layer, or no C++ compiler on a CPU.
    """
    n = num_heads
    # torch counts every width, capacity and number of heads against one limit, and goes on uncompiled beyond it.
    allow_recompiles(MAX_COMPILED_STEPS)
    key = n, model.device, model.dtype
    kept = model.runtime.compiled.get(key)
    if kept is None or any(holder.get(name) is not part for holder, name, part in kept[2]):
        if model.device.type == "cpu":
            check_compiler()
        twin = model.optimize_for_inference(n, fuse=False)
        if n > 1 and not isinstance(twin.last_layer, StackedHeads):
            raise InputError("compile=True needs heads that are one layer beside the base's last one; leave it out.")
        if model.device.type == "cpu":
            step: Callable[..., Tensor] = CompiledStep(twin, n)
        else:
            options: dict[str, Any] = {"guard_filter_fn": _guards_of_inputs}
            graphs = model.device.type == "cuda"
            step = torch.compile(
                twin.hidden, dynamic=False, options=options | ({"triton.cudagraphs": True} if graphs else {})
            )
            step = _mark_step_begin(step) if graphs else step
        model.runtime.compiled[key] = twin, step, _parts(model)
    twin, forward, _ = model.runtime.compiled[key]
    twin.cooccurrence, twin.coupling = model.cooccurrence, model.coupling  # which may have changed since
    return twin, forward


def _parts(model: MultiHeadLM) -> list[tuple[dict[str, Any], str, Any]]:
    """All modules and tensors of a model: the dictionary that holds each, its name in it, and itself."""
    holders = [holder for m in model.modules() for holder in (m._parameters, m._buffers, m._modules)]
    return [(holder, name, part) for holder in holders for name, part in holder.items()]


@dataclass(frozen=True, eq=False)
class _Graph:
    """Compiled code and its arguments, a list of tensors."""

    run: Callable[[list[Any]], Sequence[Tensor]]
    arguments: list[Any]  # the model's tensors; None in place of the others
    inputs: list[tuple[str, int]]  # the step's inputs: name, index of the argument
    buffers: list[tuple[int, str, int]]  # the cache's buffers: entry, "keys" or "values", index of the argument


@dataclass(frozen=True)
class _Run:
    """One call of compiled code, as torch made it."""

    code: Callable[[list[Any]], Sequence[Tensor]]
    arguments: list[Tensor]
    outputs: Sequence[Tensor]


class CompiledStep:
    """A model's `hidden` for a `StaticKVCache`, compiled for a CPU; repeated shapes call the compiled code directly.

    `torch.compile` looks every parameter up in its module, checks guards and passes the arguments through several layers of
    Python in each call: a tenth to a fourth of a step of a small model. But the arguments are always the same tensors, apart
    from the step's inputs and the cache's buffers. The first step of a shape goes through torch and records the order of the
    arguments. If an argument is none of these, or if there is more than one graph, all steps of the shape go through torch.
    """

    def __init__(self, model: MultiHeadLM, num_heads: int):
        """model: arranged for `num_heads` heads."""
        self.compiled = torch.compile(model.hidden, dynamic=False, backend=self._backend)
        self.weight_ids = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self.runs: list[_Run] | None = None  # of the step that is being recorded
        self.graphs: dict[tuple[int, int], _Graph | None] = {}  # by width and capacity; None: through torch
        self.weight_bytes = sum(tensor.nbytes for tensor in stored_weights(decoder_layers(model.base)))
        self.layout = _layout(model, num_heads)

    def prefills_faster(self, prompt: int, width: int) -> bool:
        """Whether steps of `width` tokens prefill a prompt faster than one forward that is not compiled.

        Each step reads the layers' weights again, but small ones are read in less time than calling all operations takes.
        """
        return (-(-prompt // width) - 1) * self.weight_bytes <= MAX_REREAD

    def __call__(self, input_ids: Tensor, *, cache: StaticKVCache, **inputs: Any) -> Tensor:
        """As `MultiHeadLM.hidden`."""
        shape = input_ids.shape[1], cache.capacity
        if shape not in self.graphs:
            return self._record(shape, cache, input_ids=input_ids, **inputs)
        graph = self.graphs[shape]
        if graph is None:
            return self.compiled(input_ids, cache=cache, **inputs)
        if graph not in cache.arguments:
            arguments = graph.arguments.copy()
            for entry, name, index in graph.buffers:
                arguments[index] = getattr(cache.layers[entry], name)
            cache.arguments[graph] = arguments
        arguments = cache.arguments[graph].copy()  # the code empties the list
        tensors = _tensors_by_name(cache, input_ids=input_ids, **inputs)
        for name, index in graph.inputs:
            arguments[index] = tensors[name]
        return graph.run(arguments)[0]

    def _backend(self, module: Any, example: Any) -> Any:
        """torch's compiler, whose code records its calls while `runs` is a list."""

        def recording(compile_graph: Callable[..., Any]) -> Callable[..., Any]:
            def compile_recorded(*args: Any, **kwargs: Any) -> Any:
                code = compile_graph(*args, **kwargs)

                def run(arguments: list[Tensor]) -> Any:
                    copied = arguments.copy()  # the code empties the list
                    outputs = code(arguments)
                    if self.runs is not None:
                        self.runs.append(_Run(code, copied, outputs))
                    return outputs

                run._boxed_call = True  # type: ignore[attr-defined]
                return run

            return compile_recorded

        return compile_for_cpu(module, example, recording)

    def _record(self, shape: tuple[int, int], cache: StaticKVCache, **inputs: Any) -> Tensor:
        """A step through torch, which keeps the graph of its shape."""
        self.runs = []
        try:
            result = self.compiled(cache=cache, **inputs)
            self.graphs[shape] = self._graph(self.runs, cache, inputs, result)
        finally:
            self.runs = None
        return result

    def _graph(self, runs: list[_Run], cache: StaticKVCache, inputs: dict[str, Any], result: Tensor) -> _Graph | None:
        """The graph of a recorded step; None if calling its code is not all that torch did."""
        if len(runs) != 1:
            return None
        arguments, (output, *more) = runs[0].arguments, runs[0].outputs
        same = output.data_ptr() == result.data_ptr()
        same = same and output.shape == result.shape and output.stride() == result.stride()
        names = {id(tensor): name for name, tensor in _tensors_by_name(cache, **inputs).items()}
        buffers = {
            id(getattr(layer, name)): (entry, name)
            for entry, layer in enumerate(cache.layers[: len(self.layout)])
            for name in ("keys", "values")
        }
        expected = self.weight_ids | names.keys() | buffers.keys()
        if more or not same or any(id(tensor) not in expected for tensor in arguments):
            return None
        return _Graph(
            runs[0].code,
            [tensor if id(tensor) in self.weight_ids else None for tensor in arguments],
            [(names[id(tensor)], index) for index, tensor in enumerate(arguments) if id(tensor) in names],
            [(*buffers[id(tensor)], index) for index, tensor in enumerate(arguments) if id(tensor) in buffers],
        )


def _layout(model: MultiHeadLM, num_heads: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of no token, as the model's forward puts them in each entry of a cache."""
    cache, masks = RaggedKVCache(model.cache_entries, 1), AttentionMaskBuilder.of(model.base.config, model.dtype)
    with torch.inference_mode():
        positions, mask = cache.reserve(1), masks.next(0, 1, 1, device=model.device)
        inputs: dict[str, Any] = {"attention_mask": mask, "position_ids": positions, "cache": cache}
        model.hidden(torch.zeros_like(positions), num_heads=num_heads, **inputs)
        return [(keys[:, :, :0].clone(), values[:, :, :0].clone()) for keys, values in cache.buffers()]


def _tensors_by_name(cache: StaticKVCache, *, attention_mask: Any, **inputs: Any) -> dict[str, Tensor]:
    """The tensors among a step's inputs."""
    masks = attention_mask if isinstance(attention_mask, dict) else {"": attention_mask}
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    return tensors | {f"attention_mask {kind}": mask for kind, mask in masks.items()} | {"slots": cache.write_positions}  # type: ignore[dict-item]


def _mark_step_begin(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A step of recorded CUDA graphs that first tells torch that the last step's result is no longer needed."""

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return step(*args, **kwargs)

    return forward


def _guards_of_inputs(guards: Sequence[Any]) -> list[bool]:
    """Which of torch's guards a step checks: those on its input tensors.

    The others, thousands of them, guard modules and settings that do not change here; checking them took a tenth of a step.
    """
    return [guard.guard_type == "TENSOR_MATCH" and not guard.name.startswith(("self", "G[")) for guard in guards]


def check_compiler() -> None:
    """Raise InputError if torch finds no C++ compiler."""
    try:
        cpp_compiler()
    except Exception as error:
        raise InputError("Compiling for a CPU needs a C++ compiler such as g++, and there is none.") from error
