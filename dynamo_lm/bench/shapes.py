"""Models of a real shape with random weights and a synthetic table: what a step costs where no trained weights are at hand.

Time per step depends on shapes, not on what the weights say, with one exception that is imitated here: the mask touches the
tuples that were seen, and their number depends on what the heads propose. Texts and acceptance of such a model mean nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, PreTrainedModel

from dynamo_lm.bench.inputs import Prompt
from dynamo_lm.config import PRESETS, Preset
from dynamo_lm.cooccurrence import Cooccurrence
from dynamo_lm.counting import count
from dynamo_lm.errors import InputError
from dynamo_lm.model import DynaMoForCausalLM

FREQUENT, HIGHEST = 20, 12.0  # see `_favour`
CONTEXT = 2048  # Pythia's


def presets() -> dict[str, Preset]:
    """The shapes by name, such as pythia-160m."""
    return {preset.base.rpartition("/")[2]: preset for preset in PRESETS.values()}


def config(shape: str) -> GPTNeoXConfig:
    """Pythia's configuration at a named size.

    Raises:
        InputError: no such shape.
    """
    if shape not in presets():
        raise InputError(f'--shape is "{shape}"; give one of {", ".join(presets())}.')
    return presets()[shape].base_config(CONTEXT)


def random_model(
    shape: GPTNeoXConfig, *, num_heads: int, dtype: torch.dtype, device: torch.device | str, table_rows: int, seed: int
) -> DynaMoForCausalLM:
    """A DynaMo model with random weights and, if `table_rows` is not 0, about so many random triples in its table.

    No token ends a text, so that every way writes as many tokens.
    """
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_config(shape, dtype=dtype)
    _favour(base)
    model = DynaMoForCausalLM.from_base(base, num_heads=num_heads)
    for one in (model, model.base):
        generation: Any = one.generation_config
        generation.eos_token_id = generation.bos_token_id = None
        generation.pad_token_id = 0
    if table_rows:
        model.cooccurrence = random_table(shape.vocab_size, table_rows, seed=seed)
    return model.to(device=device, dtype=dtype).eval()  # type: ignore[arg-type,call-arg]


def random_table(vocab_size: int, triples: int, *, seed: int) -> Cooccurrence:
    """Tables up to order 3 of a random text of so many tokens whose ids follow Zipf's law, low ids the frequent ones."""
    stream = zipf(vocab_size, triples + 2, np.random.default_rng(seed))
    return count([stream], vocab_size=vocab_size, order=3, description="random tokens")


def random_prompts(vocab_size: int, *, count: int, length: int, seed: int) -> list[Prompt]:
    """Prompts of `length` random tokens."""
    draw = np.random.default_rng(seed + 1)
    return [Prompt("random", tuple(zipf(vocab_size, length, draw).tolist())) for _ in range(count)]


def zipf(vocab_size: int, length: int, draw: np.random.Generator) -> np.ndarray:
    """(length,) int64 tokens with frequencies proportional to 1 / (id + 10)."""
    cumulative = np.cumsum(1 / (np.arange(vocab_size) + 10))
    return np.searchsorted(cumulative, draw.random(length) * cumulative[-1]).clip(max=vocab_size - 1)


@torch.no_grad()
def _favour(base: PreTrainedModel) -> None:
    """Makes low ids likely to be among a head's first 50, so that the mask meets as many seen tuples as with a real model.

    Rows of the output embedding are scaled by 1 + HIGHEST / (1 + id / FREQUENT). With five million triples and 50 candidates
    a head, about 1,400 of 2,500 pairs and 2,800 of 125,000 triples are then in the table; with the bundled story model, on
    its own stories, 950 and 2,700.
    """
    weight = base.get_output_embeddings().weight
    ids = torch.arange(weight.shape[0], device=weight.device)
    weight.mul_((1 + HIGHEST / (1 + ids / FREQUENT)).to(weight.dtype)[:, None])
