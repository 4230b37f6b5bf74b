"""llama.cpp through the package `xllamacpp` (extra `bench`), greedy, in a process of its own.

`xllamacpp` cannot be imported into every process: a library that is loaded with RTLD_GLOBAL and has C++ symbols of its own
takes the place of its. Run as a program, this file is that process: it reads requests as JSON lines and writes answers.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

CONTEXT = 32768  # tokens at most: llama.cpp allocates its whole cache at once


class LlamaCpp:
    """A model in a GGUF file, on request with a head of the EAGLE-3 form that drafts for it.

    Its time is what it reports itself, prompt and decoding, so neither its JSON nor the pipe is held against it. The CPU
    wheels on PyPI are built for AVX2 without bfloat16 or AVX-512; `facts` says what it runs with.

    Raises:
        ModuleNotFoundError: `xllamacpp` is not installed.
        RuntimeError: llama.cpp cannot load the file.
    """

    accepted = 0  # drafts in the last text
    drafted = 0

    def __init__(
        self,
        gguf: str,
        *,
        context: int,
        threads: int,
        cache_type: str,
        draft: str | None = None,
        draft_tokens: int = 0,
        lookup: tuple[int, int] | None = None,
    ):
        """draft: the head's file; draft_tokens: tokens drafted a step; lookup: n-grams of the text draft before the head, or
        alone: how many tokens have to match, and how many are drafted.
        """
        if importlib.util.find_spec("xllamacpp") is None:
            raise ModuleNotFoundError("No module named 'xllamacpp'", name="xllamacpp")
        self._texts: dict[tuple, list[int]] = {}
        self._process = _start()
        about = {"gguf": gguf, "context": min(context, CONTEXT), "threads": threads, "cache_type": cache_type}
        self._ask({**about, "draft": draft, "draft_tokens": draft_tokens, "lookup": lookup})

    def generate(
        self, prompt: Sequence[int] | str, max_new_tokens: int, end_tokens: Sequence[int]
    ) -> tuple[list[int], float]:
        """The new tokens and the seconds that they took; a prompt that is a text is cut into tokens by llama.cpp."""
        request = {
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "max_tokens": max_new_tokens,
            "ignore_eos": not end_tokens,
        }
        answer = self._ask(request)
        seconds = (answer["timings"]["prompt_ms"] + answer["timings"]["predicted_ms"]) / 1000
        self.accepted, self.drafted = (answer["timings"].get(key, 0) for key in ("draft_n_accepted", "draft_n"))
        key = (*prompt, max_new_tokens)
        if key not in self._texts:  # ids come with log-probabilities, which take time; greedy text is the same again
            answer = self._ask({**request, "logprobs": 1})
            choice = answer["choices"][0]
            if choice["logprobs"] is None:  # it says nothing of tokens that end within a character
                raise RuntimeError("llama.cpp wrote a text that is not valid UTF-8")
            tokens = [entry["id"] for entry in choice["logprobs"]["content"]]
            ended = choice["finish_reason"] == "stop" and end_tokens and tokens[-1:] != [end_tokens[0]]
            self._texts[key] = [*tokens, end_tokens[0]] if ended else tokens
        return self._texts[key], seconds

    def close(self) -> None:
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        return _ask(self._process, request)


def facts() -> str | None:
    """The version of the installed llama.cpp and what it was built for, or None."""
    if importlib.util.find_spec("xllamacpp") is None:
        return None
    with contextlib.suppress(RuntimeError, OSError):
        process = _start()
        try:
            return _ask(process, {"facts": True})["facts"]
        finally:
            process.stdin.close()  # type: ignore[union-attr]
            process.wait()
    return None


def _start() -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dynamo_lm.export.llama_cpp"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8", env=environment
    )


def _ask(process: subprocess.Popen[str], request: dict[str, Any]) -> dict[str, Any]:
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps(request), file=process.stdin, flush=True)
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"llama.cpp ended with exit status {process.wait()}")
    answer = json.loads(line)
    if "error" in answer:
        raise RuntimeError(f"llama.cpp says: {str(answer['error'])[:200]}")
    return answer


def _set_drafts(kinds: Any, drafting: Any, request: dict[str, Any]) -> None:
    """llama.cpp drafts in the first of these ways that has a draft."""
    types = []
    if request["lookup"]:
        types.append(kinds.COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE)
        drafting.ngram_simple.size_n, drafting.ngram_simple.size_m = request["lookup"]
    if request["draft"]:
        types.append(kinds.COMMON_SPECULATIVE_TYPE_DRAFT_EAGLE3)
        drafting.draft.mparams.path, drafting.draft.n_max = request["draft"], request["draft_tokens"]
    drafting.types = types


def _serve() -> None:
    """The other process: JSON lines from stdin to stdout, which llama.cpp's own messages do not reach."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    server: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            import xllamacpp  # type: ignore[import-not-found]

            if "facts" in request:
                answer = {"facts": f"xllamacpp {xllamacpp.__version__}: {xllamacpp.get_system_info()}"}
            elif "gguf" in request:
                parameters = xllamacpp.CommonParams()
                parameters.model.path = request["gguf"]
                parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers = request["context"], 1, 0
                parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = request["threads"]
                cache_type = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{request['cache_type']}")
                parameters.cache_type_k = parameters.cache_type_v = cache_type
                parameters.verbosity = -1
                if request["draft"] or request["lookup"]:
                    _set_drafts(xllamacpp.common_speculative_type, parameters.speculative, request)
                server, answer = xllamacpp.Server(parameters), {}
            else:
                greedy = {"temperature": 0, "samplers": ["top_k"], "top_k": 1, "cache_prompt": False}
                answer = server.handle_completions({**greedy, **request})
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
