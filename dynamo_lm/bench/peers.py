"""Other libraries as contenders: flashspec and llama.cpp (extra `bench`), imported only when they are raced.

Both get the very weights of the base: flashspec the module itself, llama.cpp a GGUF file in the same precision. Token ids go
in and come out; what they cannot run they say in one sentence.
"""

from __future__ import annotations

import logging
import re
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dynamo_lm.bench import gguf_file
from dynamo_lm.bench.context import BenchmarkContext, Output, Runner, padded, until_end
from dynamo_lm.bench.methods import Method
from dynamo_lm.errors import InputError

FLASHSPEC_LOOKUP = 6  # tokens proposed by its lookup, as in its own default strategy


def flashspec(way: Method, among: BenchmarkContext) -> Runner:
    """flashspec's engine (0.3.1) around the base: prompt lookup alone, or its default, lookup else a draft model.

    It compiles only on CUDA; on a CPU it runs its eager loop, which its authors say is slower than plain decoding.
    """
    from flashspec import BanditConfig, FlashSpecConfig, SamplingConfig, SpeculativeEngine  # type: ignore[import-not-found]
    from flashspec.engine import HuggingFaceDrafter, NgramDrafter, TargetModel  # type: ignore[import-not-found]

    logging.getLogger("flashspec").setLevel(logging.ERROR)
    model = among.model
    dtype = str(model.dtype).removeprefix("torch.")
    target = TargetModel("base", model.device, model.dtype, model=model.base)
    settings: dict[str, Any] = {"device": str(model.device), "dtype": dtype, "eos_token_ids": among.end_tokens}
    drafters: list[Any]
    if way.draft:
        drafters = [HuggingFaceDrafter("draft", model.device, model.dtype, model=among.draft), NgramDrafter()]
        settings |= {"drafter_strategy": "composite-g6-f2", "bandit": BanditConfig(n_arms=1)}
        settings["sampling"] = SamplingConfig(temperature=0.0)
    else:
        drafters = [NgramDrafter()]
        settings |= {"drafter_strategy": "bandit", "bandit": BanditConfig(n_arms=1)}
        settings["sampling"] = SamplingConfig(temperature=0.0, gamma=FLASHSPEC_LOOKUP)
    engine = SpeculativeEngine(FlashSpecConfig(**settings), drafters, target)

    def write(prompts: Sequence[Sequence[int]], max_new_tokens: int, seed: int) -> Output:
        ids, _ = padded(prompts, among)
        began = time.perf_counter()
        result = engine.generate(ids, max_new_tokens=max_new_tokens)
        text = [token for token in result.output_ids[0].tolist() if token >= 0]
        seconds = time.perf_counter() - began
        return Output([text], seconds, len(result.arm_steps))

    return write


def llama_cpp(way: Method, among: BenchmarkContext) -> Runner:
    """llama.cpp through `xllamacpp`, on the base converted to GGUF in its own precision, cache included; greedy.

    Its time is what it reports itself, prompt and decoding, so its JSON is not held against it. The CPU wheels on PyPI are
    built for AVX2 without bfloat16 or AVX-512; `facts` says what it runs with.
    """
    gguf_file.check(among.model.base)
    import gguf  # noqa: F401  # which the conversion needs, named where it is missing
    import xllamacpp  # type: ignore[import-not-found]

    if among.model.device.type != "cpu":
        raise InputError("llama.cpp is raced on CPUs only: the wheel on PyPI has no GPU code.")
    folder = tempfile.TemporaryDirectory(prefix="dynamo-gguf-")
    among.close.append(folder.cleanup)
    types = xllamacpp.ggml_type
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(gguf_file.write(among.model.base, Path(folder.name) / "base.gguf"))
    parameters.n_ctx = among.context
    parameters.n_parallel = 1
    parameters.n_gpu_layers = 0
    parameters.cpuparams.n_threads = torch.get_num_threads()
    parameters.cpuparams_batch.n_threads = torch.get_num_threads()
    exact = among.model.dtype == torch.float32
    parameters.cache_type_k = parameters.cache_type_v = types.GGML_TYPE_F32 if exact else types.GGML_TYPE_BF16
    parameters.verbosity = -1
    server = xllamacpp.Server(parameters)

    def write(prompts: Sequence[Sequence[int]], max_new_tokens: int, seed: int) -> Output:
        asked = {
            "prompt": list(prompts[0]),
            "max_tokens": max_new_tokens,
            "temperature": 0,
            "samplers": ["top_k"],
            "top_k": 1,
            "cache_prompt": False,
            "ignore_eos": not among.end_tokens,
        }
        answer = server.handle_completions(asked)
        if "choices" not in answer:
            raise InputError(f"llama.cpp did not answer: {answer}")
        choice, timings = answer["choices"][0], answer["timings"]
        text = [int(found) for found in re.findall(r"t(\d+)", choice["text"])]  # placeholders, see `gguf_file`
        if choice["finish_reason"] == "stop" and among.end_tokens:
            text.append(among.end_tokens[0])
        text = until_end(text, among.end_tokens)
        return Output([text], (timings["prompt_ms"] + timings["predicted_ms"]) / 1000, len(text))

    return write


def llama_cpp_facts() -> str | None:
    """What the installed llama.cpp was built for, or None."""
    try:
        import xllamacpp

        return f"xllamacpp {xllamacpp.__version__}: {xllamacpp.get_system_info()}"
    except ImportError:
        return None


def versions() -> dict[str, str]:
    """Of the other programs, of those that are installed."""
    found = {}
    for package in ("flashspec", "xllamacpp", "gguf"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
