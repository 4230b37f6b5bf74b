"""vLLM in a process of its own, greedy, on request with a head of the EAGLE-3 form: it keeps its memory until it ends.

Run as a program, this file is that process: one request as JSON on stdin, the answer as the last line of stdout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any


def texts(
    base: str, draft: str | None, draft_tokens: int, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> tuple[list[list[int]], int]:
    """What vLLM writes after each prompt, and the drafts that it accepted.

    Raises:
        RuntimeError: vLLM ends with an error; the last line that it says is quoted.
    """
    request: dict[str, Any] = {"base": base, "draft": draft, "draft_tokens": draft_tokens}
    request |= {"prompts": [list(prompt) for prompt in prompts], "max_tokens": max_new_tokens}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "dynamo_lm.export.vllm_process"]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, encoding="utf-8", env=environment)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["vLLM ended"])[-1])
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    return answer["texts"], answer["accepted"]


def _main() -> None:
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    request = json.loads(sys.stdin.read())
    longest = max(len(prompt) for prompt in request["prompts"]) + request["max_tokens"] + 64
    options: dict[str, Any] = {"max_model_len": longest, "enforce_eager": True, "disable_log_stats": False, "seed": 0}
    if request["draft"]:
        speculation = {"method": "eagle3", "model": request["draft"], "num_speculative_tokens": request["draft_tokens"]}
        options["speculative_config"] = speculation
    engine = LLM(model=request["base"], max_num_seqs=1, **options)
    greedy = SamplingParams(temperature=0, max_tokens=request["max_tokens"], ignore_eos=True)
    answers = engine.generate([{"prompt_token_ids": prompt} for prompt in request["prompts"]], greedy)
    counts = {metric.name: getattr(metric, "value", 0) for metric in engine.get_metrics()}
    accepted = int(counts.get("vllm:spec_decode_num_accepted_tokens", 0))
    print("\n" + json.dumps({"texts": [list(answer.outputs[0].token_ids) for answer in answers], "accepted": accepted}))


if __name__ == "__main__":
    _main()
