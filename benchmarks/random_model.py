"""Models of a real shape with random weights and a synthetic table: what a step costs where no trained weights are at hand.

Time per step depends on shapes, not on what the weights say, with one exception that is imitated here: the mask touches the
tuples that were seen, and their number depends on what the heads propose. Texts and acceptance of such a model mean nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, PreTrainedModel

from dynamo_lm.bench.prompts import Prompt
from dynamo_lm.cli.options import ModelOptions
from dynamo_lm.cooccurrence.counting import count
from dynamo_lm.cooccurrence.table import Cooccurrence
from dynamo_lm.errors import InputError
from dynamo_lm.model.modeling import DynaMoForCausalLM
from dynamo_lm.model.presets import PRESETS, Preset

FREQUENT, HIGHEST = 40, 5.0  # see `_favour`
CONTEXT = 2048  # Pythia's
TOKENS_PER_TRIPLE = 1.2  # of a random text of a few million tokens


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


def open_shape(shape: str, num_heads: int, compute: ModelOptions, table_rows: int, seed: int) -> DynaMoForCausalLM:
    """`random_model` of a named shape in the precision and on the device that a user asks for."""
    dtype = torch.float32 if compute.dtype == "auto" else getattr(torch, compute.dtype)
    return random_model(
        config(shape), num_heads=num_heads, dtype=dtype, device=compute.torch_device(), table_rows=table_rows, seed=seed
    )


def random_model(
    shape: GPTNeoXConfig, *, num_heads: int, dtype: torch.dtype, device: torch.device | str, table_rows: int, seed: int
) -> DynaMoForCausalLM:
    """A DynaMo model with random weights and, if `table_rows` is not 0, about so many random triples in its table.

    No token ends a text, so that every method writes as many tokens.
    """
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_config(shape, dtype=dtype)
    _favour(base)
    model = DynaMoForCausalLM.from_base(base, num_heads=num_heads)
    for part in (model, model.base):
        generation: Any = part.generation_config
        generation.eos_token_id = generation.bos_token_id = None
        generation.pad_token_id = 0
    if table_rows:
        model.cooccurrence = random_table(shape.vocab_size, table_rows, seed=seed)
    return model.to(device=device, dtype=dtype).eval()  # type: ignore[arg-type,call-arg]


def random_table(vocab_size: int, triples: int, *, seed: int) -> Cooccurrence:
    """Tables up to order 3 of a random text with about so many different triples, low ids the frequent ones."""
    stream = random_text(vocab_size, round(TOKENS_PER_TRIPLE * triples) + 2, np.random.default_rng(seed))
    return count([stream], vocab_size=vocab_size, order=3, description="random tokens")


def random_prompts(vocab_size: int, *, count: int, length: int, seed: int) -> list[Prompt]:
    """Prompts of `length` random tokens."""
    draw = np.random.default_rng(seed + 1)
    return [Prompt("random", tuple(random_text(vocab_size, length, draw).tolist())) for _ in range(count)]


def random_text(vocab_size: int, length: int, draw: np.random.Generator) -> np.ndarray:
    """(length,) int64 tokens, as often as real text has them.

    Zipf's law with a bend: proportional to exp(-5 id / V) / (id + 2). In 5.2 million tokens of novels, cut by Pythia's
    tokenizer, those of rank 1, 10, 100, 1,000, 10,000 and 20,000 make up 5.1e-2, 1.1e-2, 1.1e-3, 1.0e-4, 5.6e-6 and 7.7e-7
    of the text, and the first 15,064 are 99 % of it; here 6.1e-2, 1.1e-2, 1.2e-3, 1.1e-4, 4.6e-6, 8.0e-7 and 15,900.
    """
    ids = np.arange(vocab_size)
    cumulative = np.cumsum(np.exp(-5 * ids / vocab_size) / (ids + 2))
    return np.searchsorted(cumulative, draw.random(length) * cumulative[-1]).clip(max=vocab_size - 1)


@torch.no_grad()
def _favour(base: PreTrainedModel) -> None:
    """Makes low ids likely to be among a head's first 50, so that the mask meets as many seen tuples as with a real model.

    Rows of the output embedding are scaled by 1 + HIGHEST / (1 + id / FREQUENT). With five million triples and 50
    candidates a head, some 900 of 2,500 pairs and 3,800 to 5,100 of 125,000 triples are then in the table; with the
    bundled story model, on its own stories, 950 and 2,700.
    """
    weight = base.get_output_embeddings().weight
    ids = torch.arange(weight.shape[0], device=weight.device)
    weight.mul_((1 + HIGHEST / (1 + ids / FREQUENT)).to(weight.dtype)[:, None])
