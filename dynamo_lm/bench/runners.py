"""How the ways are carried out by DynaMo's own loop and by transformers' `generate`.

A contender takes prompts as token ids and gives new token ids and how long they took; every contender pays for its prompt.
Other libraries are in `peers`. What a machine cannot run is refused with a reason, and the benchmark goes on without it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation.configuration_utils import CompileConfig

from dynamo_lm.bench import peers
from dynamo_lm.bench.context import BenchmarkContext, Output, Runner, _padding, padded, until_end
from dynamo_lm.bench.methods import Method
from dynamo_lm.decoding.compiled import check_compiler
from dynamo_lm.errors import InputError


def open_runner(way: Method, among: BenchmarkContext) -> Runner:
    """The way as a function.

    Raises:
        InputError: this machine, model or installation cannot run it; the sentence is the reason.
        ModuleNotFoundError: a package is missing.
    """
    if way.draft and among.draft is None:
        raise InputError("No draft model was given with --draft.")
    if way.engine == "dynamo":
        return _own(way, among)
    if way.engine == "transformers":
        return _transformers(way, among)
    if way.engine == "compiled":
        return _compiled(way, among)
    if way.engine == "flashspec":
        return peers.flashspec(way, among)
    return peers.llama_cpp(way, among)


def _own(way: Method, among: BenchmarkContext) -> Runner:
    """DynaMo's own loop."""
    model = among.models[way.model]

    def write(prompts: Sequence[Sequence[int]], max_new_tokens: int, seed: int) -> Output:
        ids, mask = padded(prompts, among)
        began = time.perf_counter()
        output = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            seed=seed,
            return_dict_in_generate=True,
            eos_token_id=list(among.end_tokens) or None,
            **{"do_sample": False, **way.arguments},
        )
        new = output.sequences[:, ids.shape[1] :].tolist()
        seconds = time.perf_counter() - began
        counted = output.statistics
        texts = [row[: own.new_tokens] for row, own in zip(new, counted, strict=True)]
        return Output(
            texts,
            seconds,
            sum(own.forwards for own in counted),
            sum(own.regret for own in counted),
            sum(own.scored for own in counted),
        )

    return write


def _transformers(way: Method, among: BenchmarkContext, **more: Any) -> Runner:
    """`generate` of the base, as its users call it."""
    base: Any = among.model.base
    arguments = {"do_sample": False, **way.arguments, **more}
    if way.draft:
        assert among.draft is not None
        arguments["assistant_model"] = among.draft
    if "assistant_ensemble_weight" in arguments and not hasattr(base.generation_config, "assistant_ensemble_weight"):
        raise InputError("This version of transformers has no assistant_ensemble_weight.")
    assisted = way.ceiling != 1

    def write(prompts: Sequence[Sequence[int]], max_new_tokens: int, seed: int) -> Output:
        ids, mask = padded(prompts, among)
        torch.manual_seed(seed)
        with _Forwards(base if assisted else None) as forwards:
            began = time.perf_counter()
            sequences = base.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                eos_token_id=list(among.end_tokens) or None,
                pad_token_id=_padding(among),
                **arguments,
            )
            new = sequences[:, ids.shape[1] :].tolist()
            seconds = time.perf_counter() - began
        texts = [until_end(row, among.end_tokens) for row in new]
        return Output(texts, seconds, forwards.count if assisted else sum(map(len, texts)))

    return write


def _compiled(way: Method, among: BenchmarkContext) -> Runner:
    """`generate` of the base with a static cache, whose steps transformers compiles with `torch.compile`.

    On a GPU transformers does so by itself; on a CPU a static cache alone compiles nothing, so it is told to.
    """
    if among.model.device.type == "cpu":
        from torch._inductor import config

        check_compiler()
        config.compile_threads = 1  # no pool of processes beside what is being measured
        compiling = CompileConfig(mode="default")  # "reduce-overhead" is about CUDA graphs
        compiling._compile_all_devices = True  # type: ignore[assignment]
    else:
        compiling = CompileConfig()
    return _transformers(way, among, cache_implementation="static", compile_config=compiling)


class _Forwards:
    """Counts calls of a model within a block."""

    def __init__(self, model: PreTrainedModel | None):
        self.model, self.count = model, 0

    def __enter__(self) -> _Forwards:
        self.hook = self.model.register_forward_pre_hook(self._seen) if self.model is not None else None
        return self

    def __exit__(self, *error: object) -> None:
        if self.hook is not None:
            self.hook.remove()

    def _seen(self, module: Any, args: Any) -> None:
        self.count += 1
