"""The real model on a CPU, everything in one race: `python -m benchmarks.smollm2_race BASE GGUF ../shared/data OUT`.

BASE is the folder that `recipes.smollm2.base` writes, GGUF the file of 4 bits that it is made from (`--keep`). Chat prompts
of MT-bench, one at a time, greedy: transformers, DynaMo's own loop with weights of 32, 16, 8 and 4 bits, and llama.cpp on
files of 16, 8 and 4 bits, plain, with its n-gram drafts, with our EAGLE-3 head and with both. Methods take turns on every
prompt. Needs the package xllamacpp (extra `bench`). OUT/race.json and race.md hold a race for each number of threads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from dynamo_lm import DynaMoForCausalLM
from dynamo_lm.backbone.token_limits import context_limit, token_ids
from dynamo_lm.bench import summary, tables
from dynamo_lm.bench.methods import COMPILED, Method, dynamo
from dynamo_lm.bench.prompts import Prompt
from dynamo_lm.bench.race import Race, race
from dynamo_lm.bench.roofline import weight_bytes
from dynamo_lm.bench.runners import BenchmarkContext, open_runner
from dynamo_lm.data.chat_template import encode_chat
from dynamo_lm.export import llama_cpp
from dynamo_lm.export.export import BASE_GGUF, DRAFT_GGUF, export
from dynamo_lm.files import write_text
from dynamo_lm.private_interfaces import multiplies_bfloat16
from recipes.smollm2.prompts import json_lines

ROOT = Path(__file__).parents[1]
PARALLEL, SEQUENTIAL = ROOT / "models/smollm2-135m-instruct", ROOT / "models/smollm2-135m-instruct-eagle3"
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "int8": {"weights": "int8", "dtype": torch.float32},
    "int4": {"weights": "int4", "dtype": torch.float32},
}
DRAFTS = 3
LOOKUP, LOOKED_UP, MATCH = "prompt_lookup_num_tokens", 7, 3  # llama.cpp's n-grams have the same sizes, not its 12 and 48
EIGHT, FOUR = "llama.cpp: Q8_0", "llama.cpp: Q4_1"  # what every row is compared with


def models_of(base: str) -> dict[str, DynaMoForCausalLM]:
    """By precision and kind of head; "model" is the one that texts are scored with."""
    opened = {
        f"{name}, {kind}": DynaMoForCausalLM.from_pretrained(str(folder), base=base, **how).eval()
        for name, how in PRECISIONS.items()
        for kind, folder in (("parallel", PARALLEL), ("eagle3", SEQUENTIAL))
    }
    return {"model": opened["float32, parallel"], **opened}


def methods_of(files: dict[str, Path], draft: Path, *, compiled: bool) -> list[Method]:
    """Every row of the table."""
    one = {"verify": "strict", "num_heads": 1}
    strict = {"verify": "strict", "num_heads": DRAFTS + 1}
    fast = "bfloat16" if multiplies_bfloat16() else "float32"  # what transformers is faster in
    theirs = {"model": f"{fast}, parallel"}
    looked_up = {"prompt_lookup_num_tokens": 10}
    rows = [
        Method(f"transformers: one token, {fast}", "transformers", one_token=True, **theirs),
        Method(f"transformers: prompt lookup, {fast}", "transformers", looked_up, ceiling=11, **theirs),
    ]
    for name in PRECISIONS:
        own = f"DynaMo: one token, {name}"
        rows.append(dynamo(own, one, model=f"{name}, eagle3", lossless=name == "float32"))
        for kind in ("eagle3", "parallel") if name != "float32" else ("eagle3",):
            about = {"model": f"{name}, {kind}", "lossless": name == "float32", "identical_to": own}
            rows.append(dynamo(f"DynaMo: strict, n={DRAFTS + 1}, {kind}, {name}", strict, **about))
            both = f"DynaMo: strict, n={DRAFTS + 1}, {kind} + lookup, {name}"
            rows.append(dynamo(both, strict | {LOOKUP: LOOKED_UP}, **about))
        about = {"model": f"{name}, eagle3", "lossless": name == "float32", "identical_to": own}
        rows.append(dynamo(f"DynaMo: strict, lookup alone, {name}", one | {LOOKUP: LOOKED_UP}, **about))
    off = {"num_heads": DRAFTS, "eps_b": 0.3, "do_sample": False}
    for budget in (0.2, "off"):
        rows.append(dynamo(f"DynaMo: {budget}, n={DRAFTS}, int4", {**off, "verify": budget}, model="int4, parallel"))
    if compiled:
        rows.append(Method(f"transformers: one token, {fast}, compiled", "compiled", one_token=True, **theirs))
        for name in ("bfloat16", "int4"):
            rows.append(dynamo(f"DynaMo: one token, {name}, compiled", one | COMPILED, model=f"{name}, parallel"))
    for name, file in files.items():
        about = {"gguf": str(file), "cache_type": "F16"}
        drafted = about | {"draft": str(draft), "draft_tokens": DRAFTS}
        plain = f"llama.cpp: {name}"
        rows.append(Method(plain, "llama.cpp", about, one_token=True, lossless=False))
        how: dict[str, Any] = {"lossless": False, "identical_to": plain}
        lookup = {"lookup": (MATCH, LOOKED_UP)}
        rows.append(Method(f"{plain}, n-grams", "llama.cpp", about | lookup, ceiling=LOOKED_UP + 1, **how))
        if name != "F16":
            rows.append(Method(f"{plain}, EAGLE-3 head", "llama.cpp", drafted, ceiling=DRAFTS + 1, **how))
            both = f"{plain}, EAGLE-3 head and n-grams"
            rows.append(Method(both, "llama.cpp", drafted | lookup, ceiling=LOOKED_UP + 1, **how))
    return rows


def first_token(context: BenchmarkContext, methods: list[Method], prompt: Prompt) -> dict[str, float]:
    """Milliseconds from an open model to the first token, by method: the least of three."""
    times = {}
    for method in methods:
        run = open_runner(method, context)
        times[method.name] = min(run([prompt.tokens], 1, 0).seconds for _ in range(3)) * 1e3
    return times


def row(done: Race, result: Any, context: BenchmarkContext, first: dict[str, float]) -> dict[str, Any]:
    """Plain numbers of one method."""
    method, rates, total = result.method, result.rates(), result.tally()
    ratios = {
        name: summary.spread([own / theirs for own, theirs in zip(rates, other.rates(), strict=True)])
        for name in (EIGHT, FOUR)
        if (other := done.result(name)) is not None
    }
    same = done.result(method.identical_to)
    return {
        "name": method.name,
        "tokens_per_second": summary.spread(rates),
        "ratios": ratios,
        "tokens_per_step": total.tokens / total.steps,
        "step_ms": total.seconds / total.steps * 1e3,
        "ceiling": method.ceiling,
        "identical": None if same is None else summary.agreement(result.texts(), same.texts()),
        "first_token_ms": first.get(method.name),
        "weight_bytes": weight_bytes(context.models[method.model].base) if method.engine != "llama.cpp" else None,
    }


def page(record: dict[str, Any]) -> str:
    """The races as Markdown."""
    lines = ["# SmolLM2-135M-Instruct on a CPU", "", "```sh", record["command"].replace(" --", " \\\n  --", 1), "```", ""]
    lines += [f"{record['prompts']} chat prompts of MT-bench, {record['new_tokens']} new tokens, greedy,"]
    lines += [f"{record['repetitions']} repetitions, prompts paid for. Lookup drafts at most {LOOKED_UP} tokens."]
    lines += ["Ratios of tokens per second: median of the repetitions (least-most)."]
    for done in record["races"]:
        lines += ["", f"## {done['threads']} thread{'s' if done['threads'] > 1 else ''}", ""]
        lines += [f"Memory reads {done['bytes_per_second'] / 1e9:.1f} GB/s.", ""]
        lines += [
            f"| | tokens/s | / {EIGHT} | / {FOUR} | tokens per step | same text | first token |",
            "|---|---|---|---|---|---|---|",
        ]
        for each in done["rows"]:
            ratios = [tables.ratio_and_spread(each["ratios"][name], record["repetitions"]) for name in (EIGHT, FOUR)]
            same = "" if each["identical"] is None else f"{each['identical']['texts']}/{each['identical']['of']}"
            ceiling = f" of {each['ceiling']}" if each["ceiling"] not in (None, 1) else ""
            first = f"{each['first_token_ms']:.0f} ms" if each["first_token_ms"] is not None else ""
            speed = f"{each['tokens_per_second']['median']:.1f}"
            cells = [
                each["name"].removeprefix("DynaMo: "),
                speed,
                *ratios,
                f"{each['tokens_per_step']:.2f}{ceiling}",
                same,
                first,
            ]
            lines.append("| " + " | ".join(cells) + " |")
        lines += [f"\nNot raced: {skipped['name']}. {skipped['reason']}" for skipped in done["skipped"]]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base")
    parser.add_argument("gguf", type=Path, help="the base as a file of 4 bits")
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--compiled", action="store_true", help="compiled loops, too, which take minutes to compile")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    questions = [record["turns"][0] for record in json_lines(arguments.data / "bench" / "mt_bench.jsonl")]
    chosen = questions[:: len(questions) // arguments.prompts][: arguments.prompts]
    prompts = [
        Prompt("mt_bench", tuple(encode_chat(tokenizer, [{"role": "user", "content": question}]))) for question in chosen
    ]
    models = models_of(arguments.base)
    command = (
        f"python -m benchmarks.smollm2_race BASE GGUF ../shared/data results/smollm2 --prompts {arguments.prompts} "
        f"--repetitions {arguments.repetitions} --new-tokens {arguments.new_tokens} --threads "
    ) + " ".join(map(str, arguments.threads))
    record: dict[str, Any] = {"command": command, "prompts": len(prompts), "new_tokens": arguments.new_tokens}
    record |= {"repetitions": arguments.repetitions, "machine": tables.machine(torch.device("cpu")), "races": []}
    record |= {"llama_cpp": llama_cpp.facts()}
    with tempfile.TemporaryDirectory() as folder:
        files = {"Q4_1": arguments.gguf}
        for precision in ("q8_0", "f16"):
            out = Path(folder) / precision
            how: dict[str, Any] = {"base_gguf": arguments.gguf, "with_base": precision, "draft_precision": "q8_0"}
            export(models["float32, eagle3"], SEQUENTIAL.name, tokenizer, "gguf", out, **how)
            files[precision.upper()] = out / BASE_GGUF
        draft = out / DRAFT_GGUF
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            ends = tuple(token_ids(models["model"].generation_config.eos_token_id))
            context = BenchmarkContext(models, ends, min(2048, context_limit(models["model"].config)))
            methods = methods_of(files, draft, compiled=arguments.compiled)
            done = race(
                context, prompts, methods, max_new_tokens=arguments.new_tokens, repetitions=arguments.repetitions,
                progress=lambda what, done, total: print(f"{done}/{total} {what}", flush=True),
            )  # fmt: skip
            raced = [result.method for result in done.results]
            first = first_token(context, raced, prompts[0])
            for close in context.close:
                close()
            record["races"].append(
                {
                    "threads": threads,
                    "bytes_per_second": statistics.median(bandwidth.best for bandwidth in done.bandwidths),
                    "rows": [row(done, result, context, first) for result in done.results],
                    "skipped": done.skipped,
                }
            )
            arguments.out.mkdir(parents=True, exist_ok=True)
            write_text(arguments.out / "race.json", json.dumps(record, indent=1) + "\n")
            write_text(arguments.out / "race.md", page(record))
    print(page(record))


if __name__ == "__main__":
    main()
