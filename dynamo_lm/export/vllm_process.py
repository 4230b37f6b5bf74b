"""vLLM in a process of its own, greedy, on request with a head of the EAGLE-3 form: it keeps its memory until it ends.

Run as a program, this file is that process: a request as JSON on stdin, the answer on stdout, what vLLM says on stderr.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

KV_CACHE = 2**30  # bytes; vLLM's own choice is most of the machine's memory, and it ends where that is not free
ERROR = re.compile(r"\b((?:\w+\.)*\w*(?:Error|Exception): .*)")


def texts(
    base: str, draft: str | None, draft_tokens: int, prompts: Sequence[Sequence[int]], max_new_tokens: int, dtype: str
) -> tuple[list[list[int]], int]:
    """What vLLM writes after each prompt, and its forward passes of the base.

    Args:
        dtype: of the base, such as "float32".

    Raises:
        RuntimeError: vLLM ends with an error; the first that it names is quoted, which is the cause of the others.
    """
    request: dict[str, Any] = {"base": base, "draft": draft, "draft_tokens": draft_tokens, "dtype": dtype}
    request |= {"prompts": [list(prompt) for prompt in prompts], "max_tokens": max_new_tokens}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "dynamo_lm.export.vllm_process"]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, encoding="utf-8", env=environment)
    if done.returncode:
        raise RuntimeError(cause(done.stderr))
    answer = json.loads(done.stdout)
    return answer["texts"], answer["steps"]


def cause(said: str) -> str:
    """The first error that is named in what vLLM said before it ended."""
    return next((found[1] for found in map(ERROR.search, said.splitlines()) if found), "vLLM ended without a word")


def _main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # its workers write to stdout, to the very end
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    request = json.loads(sys.stdin.read())
    longest = max(len(prompt) for prompt in request["prompts"]) + request["max_tokens"] + 64
    options: dict[str, Any] = {"max_model_len": longest, "enforce_eager": True, "disable_log_stats": False, "seed": 0}
    options |= {"dtype": request["dtype"], "kv_cache_memory_bytes": KV_CACHE}
    if request["draft"]:
        speculation = {"method": "eagle3", "model": request["draft"], "num_speculative_tokens": request["draft_tokens"]}
        options["speculative_config"] = speculation
    engine = LLM(model=request["base"], max_num_seqs=1, **options)
    greedy = SamplingParams(temperature=0, max_tokens=request["max_tokens"], ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in request["prompts"]], greedy)
    written = [list(output.outputs[0].token_ids) for output in outputs]
    counts = {metric.name: getattr(metric, "value", 0) for metric in engine.get_metrics()}
    drafted = int(counts.get("vllm:spec_decode_num_drafts", 0))  # every pass but the first of each prompt
    steps = len(written) + drafted if request["draft"] else sum(map(len, written))
    print(json.dumps({"texts": written, "steps": steps}), file=answers, flush=True)


if __name__ == "__main__":
    _main()
