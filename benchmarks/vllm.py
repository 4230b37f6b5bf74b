"""Exported heads in vLLM's OpenAI server beside this loop: `results/smollm2/vllm.json` and `vllm-parallel.json`.

    dynamo-lm export models/smollm2-135m-instruct-eagle3 --base BASE --to eagle3 --out served
    python -m benchmarks.vllm served BASE ../shared/data results/smollm2 --python ENVIRONMENT/bin/python

For parallel heads export models/smollm2-135m-instruct --to vllm, and give --model models/smollm2-135m-instruct --prompts 16
--dtypes float32 --name vllm-parallel; the environment then has this package, too.

Greedy, chat prompts of MT-bench's first turns, 128 new tokens, one prompt at a time. The server runs twice, without the head
and with it; texts come from its answers, drafts from its /metrics. Here the same heads draft three tokens in every step,
without the stop at low confidence and without a table: once in this loop, whose base then writes the text, and once on the
text that vLLM wrote. --python is that of an environment with vLLM (docs/serving-elsewhere.md).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from dynamo_lm import DynaMoForCausalLM
from dynamo_lm.data.chat_template import encode_chat, end_of_turn
from dynamo_lm.decoding import sequential
from dynamo_lm.errors import first_line
from dynamo_lm.export.check import steps_here
from dynamo_lm.files import write_text
from recipes.smollm2.prompts import json_lines

ROOT = Path(__file__).parent.parent
NEW_TOKENS, DRAFT_TOKENS, CONTEXT = 128, 3, 1024
STARTS_WITHIN = 600  # seconds
COUNTS = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
Counts = dict[str, float]


@contextlib.contextmanager
def server(python: str, base: str, draft: Path | None, dtype: str, log: Path) -> Iterator[str]:
    """The address of a vLLM server that runs as long as the context; draft: the head's folder.

    Raises:
        RuntimeError: it does not come up; its last lines are in `log`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", base, "--served-model-name", "base"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", dtype, "--enforce-eager"]
    command += ["--max-model-len", str(CONTEXT), "--max-num-seqs", "1", "--kv-cache-memory-bytes", str(2**30)]
    if draft is not None:
        speculation = {"method": "eagle3", "model": str(draft), "num_speculative_tokens": DRAFT_TOKENS}
        command += ["--speculative-config", json.dumps(speculation)]
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment = {**environment, "OMP_NUM_THREADS": "1", **os.environ}
    url = f"http://127.0.0.1:{port}"
    with (
        log.open("w", encoding="utf-8") as output,
        subprocess.Popen(command, stdout=output, stderr=output, env=environment) as process,
    ):
        try:
            for _ in range(STARTS_WITHIN):
                if process.poll() is not None:
                    raise RuntimeError(f"vLLM ended; see {log}")
                with contextlib.suppress(urllib.error.URLError, ConnectionError):
                    _get(f"{url}/health")
                    break
                time.sleep(1)
            else:
                raise RuntimeError(f"vLLM did not start within {STARTS_WITHIN} s; see {log}")
            yield url
        finally:
            process.terminate()


def _get(url: str, request: dict[str, Any] | None = None) -> str:
    """The body of the answer; a request is posted as JSON."""
    data = json.dumps(request).encode() if request else None
    asked = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=600) as answer:
        return answer.read().decode()


def drafts_of(metrics: str) -> Counts:
    """The counters of speculative decoding in the text of /metrics: `COUNTS`, and accepted drafts by position."""
    found: Counts = {}
    for line in metrics.splitlines():
        name, _, value = line.rpartition(" ")
        name, _, labels = name.partition("{")
        if name.startswith("vllm:spec_decode_") and name.endswith("_total"):
            key = name.removeprefix("vllm:spec_decode_").removesuffix("_total")
            if "position=" in labels:
                key = f"accepted_at_{labels.partition('position=')[2].split(chr(34))[1]}"
            found[key] = found.get(key, 0) + float(value)
    return found


def ask(url: str, prompts: list[list[int]]) -> tuple[list[list[int]], Counts]:
    """The texts that the server writes after the prompts, and what its counters say afterwards."""
    texts = []
    for number, prompt in enumerate(prompts):
        request = {"model": "base", "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "return_token_ids": True}
        texts.append(json.loads(_get(f"{url}/v1/completions", request))["choices"][0]["token_ids"])
        print(f"{number + 1} of {len(prompts)} prompts", file=sys.stderr, flush=True)
    return texts, drafts_of(_get(f"{url}/metrics"))


def ours(model: DynaMoForCausalLM, prompts: list[list[int]], ends: list[int]) -> dict[str, Any]:
    """Texts and steps of this loop with the same drafts: the head's likeliest three in every step."""
    model.cooccurrence = None
    texts, steps = [], 0
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=0,
            num_heads=DRAFT_TOKENS + 1,
            tree=0,
            verify="strict",
            return_dict_in_generate=True,
        )
        texts.append(out.sequences[0, len(prompt) :].tolist())
        steps += out.statistics[0].forwards
        print(f"{len(texts)} of {len(prompts)} prompts here", file=sys.stderr, flush=True)
    tokens = sum(map(len, texts))
    return {"texts": texts, "tokens": tokens, "steps": steps, "tokens_per_step": round(tokens / steps, 4)}


def row(model: DynaMoForCausalLM, prompts: list[list[int]], ends: list[int], served: dict[str, Any]) -> dict[str, Any]:
    """Everything that is measured in one precision; served: texts alone and drafted, counters."""
    alone, drafted, counts = served["alone"], served["drafted"], served["counts"]
    tokens, steps = sum(map(len, drafted)), int(counts["num_drafts"]) + len(prompts)  # one more reads the prompt
    here = ours(model, prompts, ends)
    on_their_text = sum(steps_here(model, prompt, text, DRAFT_TOKENS) for prompt, text in zip(prompts, drafted, strict=True))
    theirs = tokens / steps
    return {
        "prompts": len(prompts),
        "tokens": tokens,
        "same_text": sum(one == other for one, other in zip(alone, drafted, strict=True)),
        "same_text_as_ours": sum(one == other for one, other in zip(drafted, here.pop("texts"), strict=True)),
        "vllm": {key: int(value) for key, value in sorted(counts.items())}
        | {"steps": steps, "tokens_per_step": round(theirs, 4)}
        | {"accepted_of_drafted": round(counts["num_accepted_tokens"] / counts["num_draft_tokens"], 4)},
        "this_loop": here,
        "the_same_heads_on_vllm_text": {"steps": on_their_text, "tokens_per_step": round(tokens / on_their_text, 4)},
        "difference": round(theirs / here["tokens_per_step"] - 1, 4),
        "difference_on_the_same_text": round(theirs * on_their_text / tokens - 1, 4),
    }


def page(record: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        f"# The heads of {record['model']} in vLLM",
        "",
        f"{record['vllm']}.",
        f"{record['prompts']} first turns of MT-bench, {NEW_TOKENS} new tokens, greedy, {DRAFT_TOKENS} drafts a step.",
        "Tokens per step: of vLLM by its /metrics, of this loop, and of the same heads on the text that vLLM wrote.",
        "",
        "| precision | tokens | vLLM | this loop | on vLLM's text | same text with and without heads | as this loop's |",
        "|---|---|---|---|---|---|---|",
    ]
    for dtype, each in record["precisions"].items():
        per_step = [each[who]["tokens_per_step"] for who in ("vllm", "this_loop", "the_same_heads_on_vllm_text")]
        of = each["prompts"]
        lines.append(
            f"| {dtype} | {each['tokens']:,} | {per_step[0]:.3f} | {per_step[1]:.3f} | {per_step[2]:.3f} "
            f"| {each['same_text']}/{of} | {each['same_text_as_ours']}/{of} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("draft", type=Path, help="the folder that `dynamo-lm export` wrote")
    parser.add_argument("base", help="the base's folder")
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--model", default=str(ROOT / "models/smollm2-135m-instruct-eagle3"), help="the heads in this library"
    )
    parser.add_argument("--python", default=sys.executable, help="of an environment with vLLM")
    parser.add_argument("--name", default="vllm", help="of the results file")
    parser.add_argument("--prompts", type=int, default=80)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    arguments = parser.parse_args()
    sequential.LEAST_CONFIDENCE = 0.0  # vLLM drafts always
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    questions = [record["turns"][0] for record in json_lines(arguments.data / "bench" / "mt_bench.jsonl")]
    chosen = questions[:: len(questions) // arguments.prompts][: arguments.prompts]
    prompts = [encode_chat(tokenizer, [{"role": "user", "content": question}]) for question in chosen]
    ends = [end_of_turn(tokenizer), tokenizer.eos_token_id]
    arguments.out.mkdir(parents=True, exist_ok=True)
    logs = Path(tempfile.mkdtemp(prefix="vllm-"))
    asked = (
        "import vllm, torch as t, transformers as f; "
        "print(f'vLLM {vllm.__version__}, torch {t.__version__}, transformers {f.__version__}')"
    )
    version = subprocess.run([arguments.python, "-c", asked], capture_output=True, encoding="utf-8", check=True).stdout
    record: dict[str, Any] = {"vllm": first_line(version[version.index("vLLM ") :]), "prompts": len(prompts)}
    record |= {"model": Path(arguments.model).name, "new_tokens": NEW_TOKENS, "drafts": DRAFT_TOKENS, "precisions": {}}
    for dtype in arguments.dtypes:
        served: dict[str, Any] = {}
        for name, draft in (("alone", None), ("drafted", arguments.draft)):
            with server(arguments.python, arguments.base, draft, dtype, logs / f"{dtype}-{name}.log") as url:
                served[name], served["counts"] = ask(url, prompts)
        model = DynaMoForCausalLM.from_pretrained(arguments.model, base=arguments.base, dtype=getattr(torch, dtype)).eval()
        record["precisions"][dtype] = row(model, prompts, ends, served)
        write_text(arguments.out / f"{arguments.name}.json", json.dumps(record, indent=1) + "\n")
        write_text(arguments.out / f"{arguments.name}.md", page(record))
    print(page(record))


if __name__ == "__main__":
    main()
