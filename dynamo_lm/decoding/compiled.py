"""Compiled decoding steps: torch.compile over a forward whose shapes never change.

On small models most of a step is Python and the dispatch of small operations; compiled, it is a few calls. In: a model and
how it is to decode. Out: the model arranged for decoding and a forward for its steps, both kept with the model, because
compiling takes a minute (torch keeps the result on disk, too). Every capacity of the cache and every width is compiled anew.
On a CPU what was compiled is called without torch's way to it (`CompiledStep`). On a CUDA device the kernels of a step are
recorded once and replayed as one graph, which holds addresses: a step's result is overwritten by the next one, and caches
are used again (`dynamo_lm.decoding.model_runner`), because every other one is recorded anew.
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

LEAST = 256  # slots of the smallest cache; larger ones double
SHAPES = 64  # compiled steps that one process may hold
AGAIN = 2**27  # bytes of weights, read in the time that it takes to call a forward's operations one by one


def capacity(tokens: int) -> int:
    """Slots of the cache that holds so many tokens."""
    slots = LEAST
    while slots < tokens:
        slots *= 2
    return slots


def compile_steps(model: MultiHeadLM, num_heads: int) -> tuple[MultiHeadLM, Callable[..., Tensor]]:
    """The model arranged for `num_heads` heads, and its `hidden`, compiled.

    Raises:
        InputError: heads that do not run beside the last layer, or no C++ compiler on a CPU.
    """
    n = num_heads
    # torch counts every width, capacity and number of heads against one limit, and would go on uncompiled behind it.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES)
    key = n, model.device, model.dtype
    kept = model.runtime.compiled.get(key)
    if kept is None or any(holder.get(name) is not part for holder, name, part in kept[2]):
        if model.device.type == "cpu":
            check_compiler()
        twin = model.optimize_for_inference(n)
        if n > 1 and not isinstance(twin.last_layer, StackedHeads):
            raise InputError("compile=True needs heads that are one layer beside the base's last one; leave it out.")
        if model.device.type == "cpu":
            step: Callable[..., Tensor] = CompiledStep(twin, n)
        else:
            options: dict[str, Any] = {"guard_filter_fn": _of_inputs}
            graphs = model.device.type == "cuda"
            step = torch.compile(
                twin.hidden, dynamic=False, options=options | ({"triton.cudagraphs": True} if graphs else {})
            )
            step = _marked(step) if graphs else step
        model.runtime.compiled[key] = twin, step, _parts(model)
    twin, forward, _ = model.runtime.compiled[key]
    twin.cooccurrence, twin.coupling = model.cooccurrence, model.coupling  # which may have changed since
    return twin, forward


def _parts(model: MultiHeadLM) -> list[tuple[dict[str, Any], str, Any]]:
    """All modules and tensors that a model consists of: where each is held, and by what name."""
    holders = [held for m in model.modules() for held in (m._parameters, m._buffers, m._modules)]
    return [(held, name, part) for held in holders for name, part in held.items()]


@dataclass(frozen=True, eq=False)
class _Graph:
    """Compiled code, and what it is handed."""

    run: Callable[[list[Any]], Sequence[Tensor]]
    handed: list[Any]  # the model's tensors, and None where the others stand
    given: list[tuple[str, int]]  # the step's inputs, by name, and where they stand among what is handed over
    held: list[tuple[int, str, int]]  # the cache's buffers: entry, "keys" or "values", and where they stand


class CompiledStep:
    """A model's `hidden` for a `StaticKVCache`, compiled for a CPU, which later steps of a shape reach straight away.

    torch's way to compiled code looks every parameter up in its module again, watches it and hands it through several layers
    of Python: a tenth to a fourth of a step of a small model. But it always hands over the same tensors, apart from the
    step's inputs and the cache's buffers. The first step of a shape takes torch's way and shows where they stand. Where
    something else is handed over, or more than one graph is run, all steps take torch's way.
    """

    def __init__(self, model: MultiHeadLM, num_heads: int):
        """model: arranged for so many heads."""
        self.compiled = torch.compile(model.hidden, dynamic=False, backend=self._backend)
        self.own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self.ran: list[tuple[Any, list[Tensor], Any]] | None = None  # in a step that is watched: code, what it got and gave
        self.graphs: dict[tuple[int, int], _Graph | None] = {}  # by width and capacity; None: torch's way
        self.weights = sum(p.numel() * p.element_size() for p in decoder_layers(model.base).parameters())  # in bytes
        self.layout = _layout(model, num_heads)

    def prefills_faster(self, prompt: int, width: int) -> bool:
        """Whether steps of so many tokens take in a prompt sooner than one forward that is not compiled: each reads the
        layers' weights again, but small ones are read in less time than it takes to call all operations one by one."""
        return (-(-prompt // width) - 1) * self.weights <= AGAIN

    def __call__(self, input_ids: Tensor, *, past_key_values: StaticKVCache, **inputs: Any) -> Tensor:
        """As `MultiHeadLM.hidden`."""
        cache = past_key_values
        shape = input_ids.shape[1], cache.capacity
        if shape not in self.graphs:
            return self._watched(shape, cache, input_ids=input_ids, **inputs)
        graph = self.graphs[shape]
        if graph is None:
            return self.compiled(input_ids, past_key_values=cache, **inputs)
        if graph not in cache.handed:
            handed = graph.handed.copy()
            for entry, name, place in graph.held:
                handed[place] = getattr(cache.layers[entry], name)
            cache.handed[graph] = handed
        handed = cache.handed[graph].copy()
        named = _named(cache, input_ids=input_ids, **inputs)
        for name, place in graph.given:
            handed[place] = named[name]
        return graph.run(handed)[0]

    def _backend(self, module: Any, example: Any) -> Any:
        """torch's compiler, with an eye on the code that it makes. Its cache of whole callables is left out, which would
        hide that; the one of compiled code is not."""
        from torch._functorch import config
        from torch._inductor.compile_fx import compile_fx, compile_fx_inner

        def inner(*args: Any, **kwargs: Any) -> Any:
            code = compile_fx_inner(*args, **kwargs)

            def run(handed: list[Tensor]) -> Any:
                copied = handed.copy()  # the code empties the list
                result = code(handed)
                if self.ran is not None:
                    self.ran.append((code, copied, result))
                return result

            run._boxed_call = True  # type: ignore[attr-defined]
            return run

        # The C++ wrapper calls kernels without Python in between; on CPUs that is a third of what compiling saves.
        with config.patch(enable_autograd_cache=False):
            return compile_fx(
                module, example, inner_compile=inner, config_patches={"cpp_wrapper": True, "size_asserts": False}
            )

    def _watched(self, shape: tuple[int, int], cache: StaticKVCache, **inputs: Any) -> Tensor:
        """A step by torch's way."""
        self.ran = []
        try:
            result = self.compiled(past_key_values=cache, **inputs)
            self.graphs[shape] = self._graph(self.ran, cache, inputs, result)
        finally:
            self.ran = None
        return result

    def _graph(
        self, ran: list[tuple[Any, list[Tensor], Any]], cache: StaticKVCache, inputs: dict[str, Any], result: Tensor
    ) -> _Graph | None:
        """What the watched step ran, if that is all that there was to it."""
        if len(ran) != 1:
            return None
        code, handed, (found, *others) = ran[0]
        alike = found.data_ptr() == result.data_ptr() and found.shape == result.shape and found.stride() == result.stride()
        inputs_at = {id(tensor): name for name, tensor in _named(cache, **inputs).items()}
        buffers_at = {
            id(getattr(layer, name)): (entry, name)
            for entry, layer in enumerate(cache.layers[: len(self.layout)])
            for name in ("keys", "values")
        }
        known = self.own | inputs_at.keys() | buffers_at.keys()
        if others or not alike or any(id(tensor) not in known for tensor in handed):
            return None
        given = [(inputs_at[id(tensor)], place) for place, tensor in enumerate(handed) if id(tensor) in inputs_at]
        held = [(*buffers_at[id(tensor)], place) for place, tensor in enumerate(handed) if id(tensor) in buffers_at]
        return _Graph(code, [tensor if id(tensor) in self.own else None for tensor in handed], given, held)


def _layout(model: MultiHeadLM, num_heads: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of no token, as the model's forward puts them in each entry of a cache."""
    cache, form = RaggedKVCache(model.cache_entries, 1), AttentionMaskBuilder.of(model.base.config, model.dtype)
    with torch.inference_mode():
        positions, mask = cache.reserve(1), form.next(0, 1, 1, device=model.device)
        inputs: dict[str, Any] = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        model.hidden(torch.zeros_like(positions), num_heads=num_heads, **inputs)
        return [(keys[:, :, :0].clone(), values[:, :, :0].clone()) for keys, values in cache.buffers()]


def _named(cache: StaticKVCache, *, attention_mask: Any, **inputs: Any) -> dict[str, Tensor]:
    """The tensors among a step's inputs, by name."""
    masks = attention_mask if isinstance(attention_mask, dict) else {"": attention_mask}
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    return tensors | {f"attention_mask {kind}": mask for kind, mask in masks.items()} | {"slots": cache.write_positions}  # type: ignore[dict-item]


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
