"""Metrics for Prometheus: the engine's work and the requests' times.

Knows neither texts nor clients; labels are few and fixed.
"""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from dynamo_lm.decoding.sequence import SequenceState

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """One server's, in a registry of its own."""

    def __init__(self, num_heads: int):
        disable_created_metrics()  # a second series of each, which says when it began
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("dynamo_requests", "Requests by path and HTTP status", ["path", "status"], registry=registry)
        self.seconds = Histogram(
            "dynamo_request_seconds", "From a request to the end of its answer", ["path"], buckets=SECONDS, registry=registry
        )
        self.first = Histogram(
            "dynamo_time_to_first_token_seconds", "From acceptance to the first token", buckets=SECONDS, registry=registry
        )
        self.prompt_tokens = Counter("dynamo_prompt_tokens", "Tokens of prompts prefilled", registry=registry)
        self.tokens = Counter("dynamo_tokens", "Tokens written", registry=registry)
        self.steps = Counter("dynamo_steps", "Steps of single texts: one forward pass, 1 or more tokens", registry=registry)
        self.forwards = Counter("dynamo_forwards", "Steps of the whole batch", registry=registry)
        self.per_step = Histogram(
            "dynamo_tokens_per_step",
            "Tokens that one step of a text gave",
            buckets=tuple(range(1, num_heads + 1)),
            registry=registry,
        )
        self.backed_off = Counter(
            "dynamo_back_offs", "Steps that gave fewer tokens than the ceiling, the last of a text aside", registry=registry
        )
        self.step_seconds = Histogram("dynamo_step_seconds", "Of the whole batch", buckets=SECONDS, registry=registry)
        self.running = Gauge("dynamo_running_texts", "Texts in the batch", registry=registry)
        self.waiting = Gauge("dynamo_waiting_texts", "Texts in the queue", registry=registry)
        self.audits = Counter("dynamo_audits", "Checks of the server's own bookkeeping", registry=registry)
        self.violations = Counter("dynamo_audit_violations", "What these checks found wrong", registry=registry)

    def stepped(self, sequences: Sequence[SequenceState], seconds: float) -> None:
        """Counts one step of a batch."""
        tokens = prompts = backed_off = steps = 0
        for sequence in sequences:
            size = len(sequence.emitted)
            if sequence.statistics.forwards == 1:
                prompts += sequence.prompt_length
            if size:
                steps += 1
                self.per_step.observe(size)
                backed_off += size < sequence.statistics.ceiling and sequence.ending is None
                tokens += size
        self.forwards.inc()
        self.step_seconds.observe(seconds)
        self.steps.inc(steps)
        self.tokens.inc(tokens)
        self.prompt_tokens.inc(prompts)
        self.backed_off.inc(backed_off)

    def occupied(self, running: int, waiting: int) -> None:
        self.running.set(running)
        self.waiting.set(waiting)

    def audited(self, violations: int) -> None:
        self.audits.inc()
        self.violations.inc(violations)

    @property
    def text(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self.registry)
