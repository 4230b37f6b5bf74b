"""What decoding learns of a model while it runs. Every model holds one, and shares it with its optimised copies."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dynamo_lm.decoding.thread_choice import AdaptiveThreads


@dataclass
class Runtime:
    """Caches of one model. They hold nothing that changes a result."""

    compiled: dict[Any, Any] = field(default_factory=dict)  # compiled steps and their caches, see `compiled.py`
    draft_lengths: dict[Any, Any] = field(default_factory=dict)  # by kind and number of heads, threads and device
    threads: AdaptiveThreads | None = None  # how many CPU threads steps use; None: torch's own number
    draft_vocabulary: Any = None  # the last one made, with what it was made of, see `draft_vocabulary.py`
