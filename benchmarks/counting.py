"""How fast n-grams are counted, and in how much memory: `python -m benchmarks.counting > results/counting.json`.

All of `novels` and `stories` of the folder that DYNAMO_DATA names, with the bundled story tokenizer and with Pythia's.
Every measurement is a process of its own that holds all token ids in memory before the clock starts and ends when the
table can be used; repetitions are interleaved, so that a machine that is slow for a while is slow for all. Tokenizing is
not included and measured beside it. CPU seconds are of all threads together; they tell more than seconds where other
programs share the machine. Peak memory is what the process holds at most beyond what it held before counting, table
included.

`python -m benchmarks.counting --ray results/counting.json` instead counts the novels alone by the threads of one process and
on a Ray of two workers, kills every worker in the middle of each round of a third count, compares the three files byte for
byte and adds the comparison to that file. Seconds include starting Ray; CPU seconds are those of all its processes.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dynamo_lm.assets import bundled
from dynamo_lm.bench.summary import spread
from dynamo_lm.bench.tables import machine
from dynamo_lm.cooccurrence.counting import count
from dynamo_lm.cooccurrence.ray_engine import RayEngine
from dynamo_lm.data.token_store import TokenStore, tokenize
from dynamo_lm.files import write_text
from dynamo_lm.training.provenance import versions

DATA = Path(os.environ.get("DYNAMO_DATA", "../shared/data"))
SAMPLE = 1_000_000  # tokens that the tokenizer's own speed is measured on
VOCABULARY = {"story": 4096, "pythia": 50304}  # of the models, which round the tokenizer's up


def open_tokenizer(name: str) -> Any:
    if name == "story":
        return AutoTokenizer.from_pretrained(bundled())
    file = DATA / "tokenizers" / "pythia" / "20B_tokenizer.json"
    return PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<|endoftext|>")


def resident(field: str) -> int:
    """VmRSS (bytes this process holds now) or VmHWM (at most so far); Linux only."""
    line = next(
        line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith(field)
    )
    return int(line.split()[1]) * 1024


def measure(store: TokenStore, name: str, order: int, threads: int, memory_mb: float) -> dict[str, Any]:
    """One count of the whole store."""
    torch.set_num_threads(threads)
    documents = [document.copy() for document in store]
    before, wall, cpu = resident("VmRSS"), time.perf_counter(), time.process_time()
    table = count(documents, vocab_size=VOCABULARY[name], order=order, memory_mb=memory_mb, threads=threads)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resident("VmHWM") - before
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "table.safetensors"
        table.save(file)
        size = file.stat().st_size
    rows = [table.num_rows(m) for m in range(1, order + 1)]
    return {"seconds": wall, "cpu_seconds": cpu, "peak_bytes": peak, "table_bytes": size, "rows": rows}


def cpu_seconds() -> float:
    """Of this process and all processes below it that live; Linux only."""
    times, parents = {}, {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = file.read_text(encoding="utf-8").rpartition(")")[2].split()
            times[int(file.parent.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            parents[int(file.parent.name)] = int(fields[1])
    family = [os.getpid()]
    for process in family:
        family += [child for child, parent in parents.items() if parent == process]
    return sum(times.get(process, 0.0) for process in family)


class MeasuredRay(RayEngine):
    """Two workers, which may be killed when a round has made some progress."""

    def __init__(self, *, killed: bool = False) -> None:
        super().__init__(2)
        self.killing, self.killed, self.cpu = killed, 0, 0.0

    def __exit__(self, *error: Any) -> None:
        self.cpu = cpu_seconds()
        super().__exit__(*error)

    def _in_order(self, start: Any, items: Any) -> Any:
        for number, result in enumerate(super()._in_order(start, items)):
            if self.killing and number == 1:
                self.killed += kill_workers()
            yield result


def kill_workers() -> int:
    """kill -9 to every worker of a Ray that runs here, which titles them by their tasks; the number killed."""
    titles = tuple(f"ray::{task}".encode() for task in ("IDLE", "_count", "_ranges"))
    workers = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if file.read_bytes().startswith(titles):
                workers.append(int(file.parent.name))
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    return len(workers)


def compare_with_ray(file: Path, folder: Path, name: str, orders: list[int]) -> None:
    """Add a comparison of engines to the results in `file`."""
    store = tokenize([str(DATA / "novels")], open_tokenizer(name), folder / f"{name}-novels")
    documents, rows = [document.copy() for document in store], []
    for order in orders:
        engines = {"threads": None, "ray": MeasuredRay(), "ray, workers killed": MeasuredRay(killed=True)}
        for label, engine in engines.items():
            print(f"{label}, order {order}", file=sys.stderr)
            wall, cpu = time.perf_counter(), cpu_seconds()
            table = count(documents, vocab_size=VOCABULARY[name], order=order, threads=1, engine=engine)
            wall, cpu = time.perf_counter() - wall, (engine.cpu if engine else cpu_seconds()) - cpu
            with tempfile.TemporaryDirectory() as temporary:
                table.save(Path(temporary) / "table.safetensors")
                digest = hashlib.sha256((Path(temporary) / "table.safetensors").read_bytes()).hexdigest()
            row = {"engine": label, "order": order, "seconds": round(wall, 1), "cpu_seconds": round(cpu, 1)}
            rows.append(row | {"workers_killed": engine.killed if engine else 0, "sha256": digest})
    same = all(len({row["sha256"] for row in rows if row["order"] == order}) == 1 for order in orders)
    facts = {"tokenizer": name, "documents": len(store), "tokens": store.num_tokens, "load_average": os.getloadavg()[1]}
    results = json.loads(file.read_text(encoding="utf-8"))
    results["ray"] = {"version": version("ray"), "workers": 2, **facts, "same_files": same, "counts": rows}
    write_text(file, json.dumps(results, indent=1) + "\n")
    if not same:
        sys.exit("The files differ.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=Path, help="folder to keep the tokenized text in; default: a temporary one")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--memory-mb", type=float, default=1024)
    parser.add_argument("--tokenizers", nargs="+", default=list(VOCABULARY), choices=list(VOCABULARY))
    parser.add_argument("--orders", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--ray", type=Path, metavar="RESULTS", help="compare the engines and add that to this file")
    parser.add_argument("--one", nargs=3, metavar=("TOKENIZER", "ORDER", "THREADS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, order, threads = arguments.one
        store = TokenStore(arguments.tokens / name)
        print(json.dumps(measure(store, name, int(order), int(threads), arguments.memory_mb)))
        return

    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.tokens or Path(temporary)
        if arguments.ray:
            compare_with_ray(arguments.ray, folder, arguments.tokenizers[-1], arguments.orders)
            return
        sources = [str(DATA / "novels"), str(DATA / "stories")]
        texts: dict[str, dict[str, Any]] = {}
        for name in arguments.tokenizers:
            tokenizer = open_tokenizer(name)
            began = time.perf_counter()
            tokenize(sources, tokenizer, Path(temporary) / "sample" / name, limit_tokens=SAMPLE)
            rate = SAMPLE / (time.perf_counter() - began)
            store = tokenize(sources, tokenizer, folder / name)
            texts[name] = {"documents": len(store), "tokens": store.num_tokens, "vocab_size": VOCABULARY[name]}
            texts[name] |= {"tokenized_per_second": round(rate)}

        runs_of: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
        settings = list(itertools.product(arguments.tokenizers, arguments.orders, arguments.threads))
        for repetition, setting in itertools.product(range(arguments.repetitions), settings):
            print(f"repetition {repetition + 1}: {setting}", file=sys.stderr)
            command = [sys.executable, "-m", "benchmarks.counting", "--tokens", str(folder), "--one", *map(str, setting)]
            command += ["--memory-mb", str(arguments.memory_mb)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
            runs_of.setdefault(setting, []).append(json.loads(output))

    counts = []
    for (name, order, threads), runs in runs_of.items():
        tokens = texts[name]["tokens"]
        row = {"tokenizer": name, "order": order, "threads": threads}
        row["tokens_per_second"] = _rounded(tokens / run["seconds"] for run in runs)
        row["tokens_per_cpu_second"] = _rounded(tokens / run["cpu_seconds"] for run in runs)
        row["peak_bytes"] = _rounded(run["peak_bytes"] for run in runs)
        counts.append(row | {"rows": runs[0]["rows"], "table_bytes": runs[0]["table_bytes"]})
    facts = {"versions": versions(), "machine": machine(torch.device("cpu")), "load_average": os.getloadavg()[1]}
    facts |= {"repetitions": arguments.repetitions, "memory_mb": arguments.memory_mb, "texts": texts, "counts": counts}
    print(json.dumps(facts, indent=1))


def _rounded(values: Any) -> dict[str, int]:
    return {name: round(value) for name, value in spread(list(values)).items()}


if __name__ == "__main__":
    main()
