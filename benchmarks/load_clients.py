"""Clients of the load test, run by locust (see `benchmarks.load`, which starts it and says where things are).

Most ask for strict greedy text, whole or streamed, and compare every character with the offline text. One in ten samples
without verification, one in ten hangs up in the middle. What happened is counted and written as JSON when the test ends.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter
from pathlib import Path

from locust import FastHttpUser, constant, events, task

PLAN = json.loads(
    Path(os.environ["LOAD_PLAN"]).read_text(encoding="utf-8")
)  # {"model", "texts": [{"prompt", "tokens", "text"}, ..]}
counts: Counter[str] = Counter()
wrong: list[dict[str, str]] = []


class Client(FastHttpUser):
    wait_time = constant(0)
    connection_timeout = network_timeout = 180.0
    draw = random.Random(0)

    def ask(self, wanted, *, stream: bool, **options):
        body = {"model": PLAN["model"], "prompt": wanted["prompt"], "max_tokens": wanted["tokens"], "stream": stream}
        return self.client.post(
            "/v1/completions",
            json={"temperature": 0, **body, **options},
            stream=stream,
            catch_response=True,
            name="stream" if stream else "whole",
        )

    def refused(self, answer) -> bool:
        """Whether there is no answer; a refusal in proper form is no failure."""
        if answer.status_code == 200:
            return False
        try:
            proper = answer.status_code in (429, 503) and bool(json.loads(answer.text or "")["error"]["message"])
        except (ValueError, KeyError, TypeError):
            proper = False
        counts[str(answer.status_code or type(answer.error).__name__)] += 1
        if proper:
            answer.success()
            time.sleep(0.2 + 0.3 * self.draw.random())  # Retry-After is longer; these clients are rude
        else:
            answer.failure(f"status {answer.status_code}: {answer.error}")
            time.sleep(0.5)
        return True

    def compare(self, answer, wanted, text: str) -> None:
        counts["200"] += 1
        if text == wanted["text"]:
            counts["right"] += 1
            answer.success()
        else:
            counts["wrong"] += 1
            wrong.append({"prompt": wanted["prompt"], "expected": wanted["text"], "found": text})
            answer.failure("another text than offline")

    @task(5)
    def whole(self):
        wanted = self.draw.choice(PLAN["texts"])
        with self.ask(wanted, stream=False) as answer:
            if not self.refused(answer):
                self.compare(answer, wanted, answer.json()["choices"][0]["text"])

    @task(3)
    def streamed(self):
        wanted = self.draw.choice(PLAN["texts"])
        with self.ask(wanted, stream=True) as answer:
            if self.refused(answer):
                return
            lines = [line for line in answer.text.split("\n\n") if line]
            if lines[-1] != "data: [DONE]":
                counts["cut"] += 1
                answer.failure("the stream has no end")
                return
            chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
            self.compare(answer, wanted, "".join(chunk["choices"][0]["text"] for chunk in chunks))

    @task(1)
    def sampled(self):
        wanted = self.draw.choice(PLAN["texts"])
        with self.ask(wanted, stream=False, temperature=0.7, verify="off") as answer:
            if not self.refused(answer):
                counts["200"] += 1
                counts["sampled"] += 1
                answer.success()

    @task(1)
    def hang_up(self):
        with self.ask(self.draw.choice(PLAN["texts"]), stream=True) as answer:
            if not self.refused(answer):
                answer._response.read(200)
                answer._response.release()
                counts["hung_up"] += 1
                answer.success()


@events.test_stop.add_listener
def report(environment, **kwargs):
    total = environment.stats.total
    latency = {
        name: {
            "requests": entry.num_requests,
            "failures": entry.num_failures,
            "median_ms": entry.median_response_time,
            "p95_ms": entry.get_response_time_percentile(0.95),
            "p99_ms": entry.get_response_time_percentile(0.99),
        }
        for (name, _), entry in environment.stats.entries.items()
    }
    errors = {f"{error.name}: {error.error}": error.occurrences for error in environment.stats.errors.values()}
    report = {"counts": dict(counts), "wrong": wrong[:5], "latency": latency, "errors": errors}
    report["locust"] = {"requests": total.num_requests, "failures": total.num_failures, "per_second": total.total_rps}
    Path(os.environ["LOAD_REPORT"]).write_text(json.dumps(report), encoding="utf-8")
