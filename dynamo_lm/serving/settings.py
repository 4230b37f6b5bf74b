"""Settings of a server or a conversation: how to decode where a request leaves it open, and what clients may do."""

from __future__ import annotations

from dataclasses import dataclass, field

from dynamo_lm.decoding.options import check_prompt_lookup, check_verify
from dynamo_lm.errors import InputError
from dynamo_lm.sampling.options import Algorithm1
from dynamo_lm.serving.limits import Limits


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How texts are written where a request leaves it open. Raises InputError for values out of range."""

    verify: str | float = "strict"  # or "off", or a budget in nats per token
    eps_b: float | None = None  # under "off"; None: the model's own, else the paper's
    num_heads: int | None = None  # the most tokens a step may give, also on request; None: all heads
    prompt_lookup_num_tokens: int | None = None  # drafts from the text itself, at most; None: the model's own, else 0
    temperature: float | None = None  # 0: the likeliest tokens; None: the request's kind decides

    def __post_init__(self) -> None:
        check_verify(self.verify)
        if self.eps_b is not None:
            Algorithm1(eps_b=self.eps_b)
        check_prompt_lookup(self.prompt_lookup_num_tokens or 0)
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise InputError(f"The temperature is {self.temperature}; give 0 (the likeliest tokens) or more.")


@dataclass(frozen=True, kw_only=True)
class ChatSettings(GenerationSettings):
    """How a conversation's answers are written."""

    max_new_tokens: int = 512
    seed: int = 0  # of the first answer; each later one has the next

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}; give 1 or more.")


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings of one server. Raises InputError for settings that do not go together."""

    name: str  # of the model, as clients give it
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    limits: Limits = field(default_factory=Limits)
    strict_only: bool = False  # refuse requests for anything but exact decoding
    key: str | None = None  # that clients must send
    hosts: tuple[str, ...] | None = None  # that requests may be addressed to; None: any
    log_text: bool = False  # whether prompts and answers go into the log

    def __post_init__(self) -> None:
        if self.strict_only and self.generation.verify not in ("strict", 0):
            raise InputError(f"--strict-only refuses --verify {self.generation.verify}; leave out one of them.")
