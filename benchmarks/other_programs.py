"""Other methods and programs: assisted generation, flashspec, and llama.cpp on a GGUF file that is made of the base.

Both get the very weights of the base: flashspec the module itself, llama.cpp a file in the same precision, cache included.
`add` makes their methods known to `dynamo_lm.bench.runners`.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dynamo_lm.bench import runners
from dynamo_lm.bench.methods import ONE, Method
from dynamo_lm.bench.runners import BenchmarkContext, Output, Runner
from dynamo_lm.export import gguf_base

FLASHSPEC_LOOKUP = 6  # tokens proposed by its lookup, as in its own default strategy
ENSEMBLE = 0.5  # the target's weight in the ensemble of target and draft model
METHODS = (
    Method("transformers: assisted", "transformers", identical_to=ONE, ceiling=None, draft=True),
    Method(
        f"transformers: assisted, ensemble {ENSEMBLE:g}",
        "transformers",
        {"assistant_ensemble_weight": ENSEMBLE},
        lossless=False,
        ceiling=None,
        draft=True,
    ),
    Method("flashspec: prompt lookup", "flashspec", identical_to=ONE, ceiling=7),
    Method("flashspec: lookup, draft model", "flashspec", identical_to=ONE, ceiling=7, draft=True),
    Method("llama.cpp: one token", "llama.cpp, converted", identical_to=ONE),
)


def add() -> tuple[Method, ...]:
    """The methods, once their engines can be opened."""
    runners.ENGINES["flashspec"] = flashspec
    runners.ENGINES["llama.cpp, converted"] = llama_cpp
    return METHODS


def flashspec(method: Method, context: BenchmarkContext) -> Runner:
    """flashspec's engine (0.3.1) around the base: prompt lookup alone, or its default, lookup else a draft model.

    It compiles only on CUDA; on a CPU it runs its eager loop, which its authors say is slower than plain decoding.
    """
    from flashspec import BanditConfig, FlashSpecConfig, SamplingConfig, SpeculativeEngine  # type: ignore[import-not-found]
    from flashspec.engine import HuggingFaceDrafter, NgramDrafter, TargetModel  # type: ignore[import-not-found]

    logging.getLogger("flashspec").setLevel(logging.ERROR)
    model = context.model
    dtype = str(model.dtype).removeprefix("torch.")
    target = TargetModel("base", model.device, model.dtype, model=model.base)
    settings: dict[str, Any] = {"device": str(model.device), "dtype": dtype, "eos_token_ids": context.end_tokens}
    settings["bandit"] = BanditConfig(n_arms=1)
    drafters: list[Any] = [NgramDrafter()]
    if method.draft:
        drafters.insert(0, HuggingFaceDrafter("draft", model.device, model.dtype, model=context.draft))
        settings |= {"drafter_strategy": "composite-g6-f2", "sampling": SamplingConfig(temperature=0.0)}
    else:
        lookup = SamplingConfig(temperature=0.0, gamma=FLASHSPEC_LOOKUP)
        settings |= {"drafter_strategy": "bandit", "sampling": lookup}
    engine = SpeculativeEngine(FlashSpecConfig(**settings), drafters, target)

    def run(prompts: Sequence[Sequence[int]], max_new_tokens: int, seed: int) -> Output:
        ids, _ = context.padded(prompts)
        began = time.perf_counter()
        result = engine.generate(ids, max_new_tokens=max_new_tokens)
        text = [token for token in result.output_ids[0].tolist() if token >= 0]
        seconds = time.perf_counter() - began
        return Output([text], seconds, len(result.arm_steps))

    return run


def llama_cpp(method: Method, context: BenchmarkContext) -> Runner:
    """llama.cpp on the base, converted; see `dynamo_lm.export.llama_cpp`."""
    gguf_base.check(context.model.base)
    folder = tempfile.TemporaryDirectory(prefix="dynamo-gguf-")
    file = gguf_base.write(context.model.base, Path(folder.name) / "base.gguf")
    runner = runners.ENGINES["llama.cpp"](replace(method, arguments={"gguf": str(file)}), context)
    context.close.append(folder.cleanup)
    return runner


def versions() -> dict[str, str]:
    """Of the other programs, of those that are installed."""
    installed = {}
    for package in ("flashspec", "xllamacpp", "gguf"):
        with suppress(PackageNotFoundError):
            installed[package] = version(package)
    return installed
