"""How methods are run: a runner takes prompts as token ids and gives new token ids and how long they took.

Every runner pays for its prompt. `ENGINES` says who runs what; a benchmark may add an engine of its own. What a machine
cannot run is refused with a reason, and the benchmark goes on without it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.configuration_utils import CompileConfig

from dynamo_lm.backbone.token_limits import token_ids
from dynamo_lm.bench.methods import Method
from dynamo_lm.decoding.compiled import check_compiler
from dynamo_lm.errors import InputError
from dynamo_lm.kernels import loader
from dynamo_lm.model.modeling import DynaMoForCausalLM
from dynamo_lm.private_interfaces import compile_everywhere, compile_in_this_process


@dataclass
class Output:
    """The result of one call."""

    texts: list[list[int]]  # new tokens by prompt
    seconds: float  # prompt included
    steps: int  # forwards of the base, summed over prompts
    regret: float = 0.0  # nats that unverified tokens cost, summed
    scored: int = 0  # tokens that the sum is over
    step_sizes: list[list[int]] = field(default_factory=list)  # tokens of every step, by prompt, where they are known


Runner = Callable[[Sequence[Sequence[int]], int, int], Output]  # prompts, new tokens at most, seed


@dataclass
class BenchmarkContext:
    """What runners are made of: the models in one dtype on one device, and what ends a text."""

    models: dict[str, DynaMoForCausalLM]  # "model" is the one measured
    end_tokens: tuple[int, ...]
    length: int  # of a text at most, in tokens
    draft: PreTrainedModel | None = None  # a smaller model for assisted generation
    close: list[Callable[[], None]] = field(default_factory=list)  # what to call when all is done

    def __post_init__(self) -> None:
        loader.available(wait=True)  # so that what is measured is what later processes do

    @property
    def model(self) -> DynaMoForCausalLM:
        return self.models["model"]

    @property
    def padding(self) -> int:
        return next(iter([*token_ids(self.model.generation_config.pad_token_id), *self.end_tokens]), 0)

    def padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Prompts as one tensor, padded on the left, and its attention mask; both (prompts, longest)."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[self.padding] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        return ids.to(self.model.device), mask.to(self.model.device)

    def until_end(self, tokens: list[int]) -> list[int]:
        """Up to the first end token, which is kept."""
        end = next((i for i, token in enumerate(tokens) if token in self.end_tokens), len(tokens) - 1)
        return tokens[: end + 1]


def open_runner(method: Method, context: BenchmarkContext) -> Runner:
    """The method as a function.

    Raises:
        InputError: this machine, model or installation cannot run it; the sentence is the reason.
        ModuleNotFoundError: a package is missing.
    """
    if method.draft and context.draft is None:
        raise InputError("There is no draft model.")
    if method.engine not in ENGINES:
        raise InputError(f'"{method.engine}" is not an engine; there are {", ".join(ENGINES)}.')
    return ENGINES[method.engine](method, context)


def _dynamo(method: Method, context: BenchmarkContext) -> Runner:
    """DynaMo's own loop."""
    model = context.models[method.model]

    def run(prompts: Sequence[Sequence[int]], max_new_tokens: int, seed: int) -> Output:
        ids, mask = context.padded(prompts)
        began = time.perf_counter()
        output = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            seed=seed,
            return_dict_in_generate=True,
            eos_token_id=list(context.end_tokens) or None,
            **{"do_sample": False, **method.arguments},
        )
        new = output.sequences[:, ids.shape[1] :].tolist()
        seconds = time.perf_counter() - began
        counts = output.statistics
        return Output(
            [tokens[: own.new_tokens] for tokens, own in zip(new, counts, strict=True)],
            seconds,
            sum(own.forwards for own in counts),
            sum(own.regret for own in counts),
            sum(own.scored for own in counts),
            [own.step_sizes for own in counts],
        )

    return run


def _transformers(method: Method, context: BenchmarkContext, **more: Any) -> Runner:
    """`generate` of the base, as its users call it."""
    base: Any = context.models[method.model].base
    arguments = {"do_sample": False, **method.arguments, **more}
    if method.draft:
        arguments["assistant_model"] = context.draft
    if "assistant_ensemble_weight" in arguments and not hasattr(base.generation_config, "assistant_ensemble_weight"):
        raise InputError("This version of transformers has no assistant_ensemble_weight.")

    def run(prompts: Sequence[Sequence[int]], max_new_tokens: int, seed: int) -> Output:
        ids, mask = context.padded(prompts)
        torch.manual_seed(seed)
        forwards = 0

        def count(module: Any, args: Any) -> None:
            nonlocal forwards
            forwards += 1

        hook = None if method.ceiling == 1 else base.register_forward_pre_hook(count)
        try:
            began = time.perf_counter()
            sequences = base.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                eos_token_id=list(context.end_tokens) or None,
                pad_token_id=context.padding,
                **arguments,
            )
            new = sequences[:, ids.shape[1] :].tolist()
            seconds = time.perf_counter() - began
        finally:
            if hook is not None:
                hook.remove()
        texts = [context.until_end(tokens) for tokens in new]
        return Output(texts, seconds, sum(map(len, texts)) if hook is None else forwards)

    return run


def _compiled(method: Method, context: BenchmarkContext) -> Runner:
    """`generate` of the base with a static cache, whose steps transformers compiles with `torch.compile`.

    On a GPU transformers does so by itself; on a CPU a static cache alone compiles nothing, so compiling is requested.
    """
    if context.model.device.type == "cpu":
        check_compiler()
        compile_in_this_process()  # no pool of processes beside what is being measured
        compiling = compile_everywhere(CompileConfig(mode="default"))  # "reduce-overhead" is about CUDA graphs
    else:
        compiling = CompileConfig()
    return _transformers(method, context, cache_implementation="static", compile_config=compiling)


def _llama_cpp(method: Method, context: BenchmarkContext) -> Runner:
    """llama.cpp on the GGUF file of the method's arguments, in a process of its own; they may name how it drafts, too."""
    from dynamo_lm.export.llama_cpp import LlamaCpp

    if context.model.device.type != "cpu":
        raise InputError("llama.cpp is raced on CPUs only: the wheel on PyPI has no GPU code.")
    precision = {torch.float32: "F32", torch.float16: "F16"}.get(context.model.dtype, "BF16")
    arguments = {"cache_type": precision, **method.arguments}
    engine = LlamaCpp(arguments.pop("gguf"), context=context.length, threads=torch.get_num_threads(), **arguments)
    context.close.append(engine.close)

    def run(prompts: Sequence[Sequence[int]], max_new_tokens: int, seed: int) -> Output:
        tokens, seconds = engine.generate(prompts[0], max_new_tokens, context.end_tokens)
        tokens = context.until_end(tokens)
        return Output([tokens], seconds, len(tokens) - engine.accepted)

    return run


ENGINES: dict[str, Callable[[Method, BenchmarkContext], Runner]] = {
    "dynamo": _dynamo,
    "transformers": _transformers,
    "compiled": _compiled,
    "llama.cpp": _llama_cpp,
}
