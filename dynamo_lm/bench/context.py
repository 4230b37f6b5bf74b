"""What every runner is given and gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dynamo_lm.model.modeling import DynaMoForCausalLM


@dataclass
class Output:
    """What one call wrote."""

    texts: list[list[int]]  # new tokens by row
    seconds: float  # prompt included
    steps: int  # forwards of the base, summed over rows; at one row simply forwards
    regret: float = 0.0  # nats that unverified tokens cost, summed
    scored: int = 0  # tokens that the sum looked at


Runner = Callable[[Sequence[Sequence[int]], int, int], Output]  # prompts, new tokens at most, seed


@dataclass
class BenchmarkContext:
    """What contenders are made of: the models in one dtype on one device, and what ends a text."""

    models: dict[str, DynaMoForCausalLM]  # "model" is the one measured
    end_tokens: tuple[int, ...]
    context: int  # tokens
    draft: PreTrainedModel | None = None  # a smaller model for assisted generation
    close: list[Callable[[], None]] = field(default_factory=list)  # what to call when all is done

    @property
    def model(self) -> DynaMoForCausalLM:
        return self.models["model"]


def padded(prompts: Sequence[Sequence[int]], among: BenchmarkContext) -> tuple[Tensor, Tensor]:
    """Prompts as one tensor, padded on the left, and its attention mask; both (rows, longest)."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[_padding(among)] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids.to(among.model.device), mask.to(among.model.device)


def _padding(among: BenchmarkContext) -> int:
    own = among.model.generation_config.pad_token_id
    return own if isinstance(own, int) else (among.end_tokens[0] if among.end_tokens else 0)


def until_end(row: list[int], end_tokens: Sequence[int]) -> list[int]:
    """Up to the first end token, which is kept."""
    end = next((i for i, token in enumerate(row) if token in end_tokens), len(row) - 1)
    return row[: end + 1]
