"""A load test of `dynamo-lm serve`: more clients than the queue takes, strict greedy answers compared with the offline ones.

`nice python -m benchmarks.load --seconds 600 > results/serving/load.json`. locust is the load generator; its clients are
in `benchmarks.load_clients`. Three parts on one server: throughput with one client, then with as many as the batch holds;
then overload, with the server's memory sampled every second; in its last seconds the server gets SIGTERM and must still
finish what it accepted. Its audits of its own bookkeeping must find nothing wrong. Clients and server share the machine, so
throughput is a ratio between two such runs and no more.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.story import PROMPTS
from dynamo_lm.bench.tables import machine
from dynamo_lm.model.loading import open_for_evaluation
from dynamo_lm.training.provenance import now, versions

LENGTHS = (16, 32, 48, 64)  # new tokens of an answer


def plan(model: str) -> dict[str, Any]:
    """Prompts with the model's continuations, one at a time and offline."""
    network, tokenizer = open_for_evaluation(model, tokenizer=None, dtype="float32", device="cpu")
    texts = []
    for number, prompt in enumerate(PROMPTS.read_text(encoding="utf-8").splitlines()):
        tokens = LENGTHS[number % len(LENGTHS)]
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        output = network.generate(ids, max_new_tokens=tokens, num_heads=1)
        text = tokenizer.decode(output[0, ids.shape[1] :].tolist(), skip_special_tokens=True)
        texts.append({"prompt": prompt, "tokens": tokens, "text": text})
    return {"model": model, "texts": texts}


class Server:
    """`dynamo-lm serve` in a process of its own."""

    def __init__(self, arguments: list[str], log: Path):
        command = [sys.executable, "-m", "dynamo_lm.cli.main", "serve", *arguments, "--port", "0"]
        self.log = log
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log.open("wb"), encoding="utf-8")
        assert self.process.stdout is not None
        ready = re.search(r"http://\S+", self.process.stdout.readline())
        if ready is None:
            raise SystemExit(log.read_text(encoding="utf-8"))
        self.url = ready[0]

    def numbers(self) -> dict[str, float]:
        """The server's metrics, labels summed up."""
        totals: dict[str, float] = {}
        with urllib.request.urlopen(f"{self.url}/metrics") as answer:
            for line in answer.read().decode().splitlines():
                if not line.startswith("#"):
                    name, value = line.split()
                    totals[name.partition("{")[0]] = totals.get(name.partition("{")[0], 0.0) + float(value)
        return totals

    def megabytes(self) -> float:
        """Resident memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]

    def requests(self) -> list[dict[str, Any]]:
        """What its log says of requests."""
        return [line for line in self._lines() if line["event"] == "request" and line["path"].startswith("/v1")]

    def violations(self) -> list[str]:
        """What its audits found wrong."""
        return [sentence for line in self._lines() if line["event"] == "audit" for sentence in line["violations"]]

    def _lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text(encoding="utf-8").split("\n") if line]


def clients(server: Server, number: int, seconds: float, folder: Path) -> subprocess.Popen:
    """locust, so many clients for so long."""
    environment = {**os.environ, "LOAD_PLAN": str(folder / "plan.json"), "LOAD_REPORT": str(folder / "report.json")}
    options = f"--headless -u {number} -r {number} -t {seconds:g}s --host {server.url} --only-summary --stop-timeout 120"
    command = [sys.executable, "-m", "locust", "-f", "benchmarks/load_clients.py", *options.split()]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=(folder / "locust.log").open("a", encoding="utf-8"), env=environment
    )


def throughput(server: Server, number: int, seconds: float, folder: Path) -> dict[str, Any]:
    """Tokens a second with so many clients, the first and last tenth of the time left out."""
    running = clients(server, number, seconds, folder)
    while server.numbers().get("dynamo_running_texts", 0) < 1:
        time.sleep(0.1)
    time.sleep(seconds * 0.1)
    before, began = server.numbers(), time.perf_counter()
    time.sleep(seconds * 0.7)
    after, elapsed = server.numbers(), time.perf_counter() - began
    running.wait()
    gained = {key: after[f"dynamo_{key}_total"] - before[f"dynamo_{key}_total"] for key in ("tokens", "steps", "forwards")}
    return {
        "clients": number,
        "seconds": round(elapsed, 1),
        "tokens_per_second": round(gained["tokens"] / elapsed, 1),
        "tokens_per_step": round(gained["tokens"] / gained["steps"], 3),
        "texts_per_forward": round(gained["steps"] / gained["forwards"], 2),
        **json.loads((folder / "report.json").read_text(encoding="utf-8")),
    }


def overload(server: Server, number: int, seconds: float, folder: Path) -> dict[str, Any]:
    """More clients than there is room for, and SIGTERM in the last seconds."""
    samples: list[float] = []
    stopped = threading.Event()

    def sample() -> None:
        while not stopped.wait(1.0) and server.process.poll() is None:
            samples.append(round(server.megabytes(), 1))

    earlier = len(server.requests())
    running = clients(server, number, seconds, folder)
    watch = threading.Thread(target=sample)
    watch.start()
    time.sleep(max(1.0, seconds - 3))
    stopped.set()
    watch.join()
    numbers = server.numbers()
    server.process.terminate()
    status = server.process.wait(180)
    running.wait()
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    logged = server.requests()[earlier:]
    accepted = [line for line in logged if "finish" in line and None not in line["finish"]]
    counts = report["counts"]
    return {
        "clients": number,
        "seconds": seconds,
        **report,
        "server": {
            "exit_status": status,
            "statuses": {str(s): sum(line["status"] == s for line in logged) for s in {line["status"] for line in logged}},
            "finished": len(accepted),  # texts that the engine wrote to their end
            "received": counts.get("200", 0),  # of those, by clients that waited for the end
            "tokens": numbers["dynamo_tokens_total"],
            "audits": numbers["dynamo_audits_total"],
            "audit_violations": len(server.violations()),
        },
        "memory_mb": memory(samples),
    }


def memory(samples: list[float]) -> dict[str, Any]:
    """Resident memory over time; the slope leaves out the first fifth."""
    late = samples[len(samples) // 5 :]
    slope = statistics.linear_regression(range(len(late)), late).slope * 60 if len(late) > 1 else 0.0
    tenth = max(1, len(samples) // 10)
    return {
        "first": statistics.median(samples[:tenth]),
        "last": statistics.median(samples[-tenth:]),
        "most": max(samples),
        "per_minute": round(slope, 2),
        "every_tenth": samples[::tenth],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="story")
    parser.add_argument("--seconds", type=float, default=600, help="of the overload; throughput takes a tenth of it each")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--queue", type=int, default=8)
    parser.add_argument("--clients", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1, help="of the server; its clients need a core, too")
    options = parser.parse_args()
    generator = {"locust": version("locust")}
    limits = ["--max-batch", str(options.batch), "--max-queue", str(options.queue), "--threads", str(options.threads)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "plan.json").write_text(json.dumps(plan(options.model)), encoding="utf-8")
        server = Server([options.model, "--dtype", "float32", *limits], folder / "server.log")
        try:
            short = max(8.0, options.seconds / 10)
            single = throughput(server, 1, short, folder)
            many = throughput(server, options.batch, short, folder)
            rush = overload(server, options.clients, options.seconds, folder)
        finally:
            server.process.kill()
    record = {
        "finished": now(),
        "versions": versions() | generator,
        "machine": machine(torch.device("cpu")),
        "settings": vars(options),
        "throughput": {"one": single, "batch": many},
        "ratio": round(many["tokens_per_second"] / single["tokens_per_second"], 2),
        "overload": rush,
    }
    print(json.dumps(record, indent=1))
    if rush["server"]["audit_violations"]:
        raise SystemExit("The server's audits found its bookkeeping wrong; see its log.")


if __name__ == "__main__":
    main()
