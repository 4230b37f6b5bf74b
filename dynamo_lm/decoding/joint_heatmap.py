"""The joint distribution over a prompt's next two tokens, as each stage of Algorithm 1 sees it (the paper's Fig. 11).

In: a model and a prompt. Out: four grids over head 1's and head 2's likeliest candidates: the heads' plain product, the
masked joint J, J blurred (what Otsu judges), and what Otsu's threshold leaves. Grids are whole k x k arrays here: one
picture, not a decoding loop. Nothing is drawn at random.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dynamo_lm.backbone.token_limits import context_limit
from dynamo_lm.cooccurrence.table import Cooccurrence
from dynamo_lm.decoding.protocol import MultiHeadLM
from dynamo_lm.decoding.settings import Settings
from dynamo_lm.errors import InputError
from dynamo_lm.sampling.algorithm1 import survivors
from dynamo_lm.sampling.joint import Joint, Joints
from dynamo_lm.sampling.options import Algorithm1
from dynamo_lm.sampling.otsu import blurred_grid
from dynamo_lm.sampling.top_k import HeadCandidates

SHOWN = 12  # candidates of each head that the picture shows, the likeliest first
DIGITS = 7  # significant digits that are kept


@dataclass(frozen=True)
class HeatMap:
    """Probabilities over pairs; rows are head 1's candidates, columns head 2's, by decreasing probability."""

    prompt: str
    top_k: int  # candidates of each head; probabilities sum to 1 over all k x k pairs
    eps_b: float  # the threshold at which `emits` was decided
    emits: bool  # whether two tokens would be emitted at that threshold, after penalty; else one
    masked_by_table: bool  # False: the model has no tables, `masked` equals `plain`
    rows: list[str]  # (shown,) candidates of head 1 as text
    columns: list[str]  # (shown,) of head 2
    plain: list[list[float]]  # (shown, shown) f_1 x f_2
    masked: list[list[float]]  # J
    blurred: list[list[float]]  # J smoothed by the 3 x 3 kernel
    thresholded: list[list[float]]  # J where Otsu's threshold lets it stand, else 0
    survivors: int  # entries that stand, of all k x k
    chosen: list[int]  # (row, column) of the pair of largest J, by rank; may lie outside the picture
    chosen_text: list[str]  # that pair as text
    shown_mass: float  # share of J that the picture shows


def grids(
    logits: torch.Tensor, table: Cooccurrence | None, options: Algorithm1, context: Sequence[int]
) -> tuple[HeadCandidates, dict[str, np.ndarray], bool]:
    """The four k x k grids of one row's logits (2 or more heads, V), and whether two tokens would be emitted.

    `blurred` and `thresholded` take Otsu alone, without the static threshold of `options.eps_b`, which decides only
    whether two tokens are emitted. Without any pair that was seen, all but `plain` are 0.
    """
    k = options.top_k
    heads = HeadCandidates.top(logits[:2], k, options.temperature)
    masked = Joints(heads, table, options.alpha_c, least=0.0)[2]
    whole = dense(masked, k)
    none_present = np.zeros(logits.shape[-1], bool)
    otsu = Algorithm1(eps_b=0.0, alpha_c=options.alpha_c, top_k=k, temperature=options.temperature, repetition_penalty=1.0)
    left = survivors(masked, heads, none_present, otsu, 2)
    present = none_present.copy()
    present[list(context)] = True
    emits = options.eps_b < 1 and survivors(masked, heads, present, options, 2).cells.size > 0
    plain = np.multiply.outer(heads.probs[0], heads.probs[1])
    return heads, {"plain": plain, "masked": whole, "blurred": blurred_grid(whole), "thresholded": dense(left, k)}, emits


def dense(joint: Joint, k: int) -> np.ndarray:
    """(k, k): a joint of pairs with its zeros."""
    grid = np.zeros(k * k)
    grid[joint.cells] = joint.values
    return grid.reshape(k, k)


@torch.inference_mode()
def heatmap(model: MultiHeadLM, tokenizer: Any, prompt: str, *, eps_b: float | None = None) -> HeatMap:
    """The grids after `prompt`, with the model's own `eps_b` (else the paper's default) if none is given.

    Raises:
        InputError: an empty or too long prompt, or a model with one head.
    """
    if model.num_heads < 2:
        raise InputError("The model has one head, so there is no joint distribution; leave out --model.")
    ids = tokenizer(prompt, verbose=False)["input_ids"] if prompt else []
    if not ids:
        raise InputError("The prompt is empty; give a few words with --prompt.")
    limit = context_limit(model.config)
    if len(ids) > limit:
        raise InputError(f"The prompt has {len(ids)} tokens and the model's context is {limit}; shorten it.")
    states = model.hidden(torch.tensor([ids], device=model.device), num_heads=2)[:, :, -1:]  # (2, 1, 1, hidden)
    logits = torch.cat([model.readout(state, head)[0] for head, state in enumerate(states, start=1)])  # (2, V)
    eps_b = Settings({"eps_b": eps_b}, model.generation_config).get("eps_b", Algorithm1().eps_b)
    options = Algorithm1(eps_b=eps_b, top_k=min(Algorithm1().top_k, model.config.vocab_size))
    heads, stages, emits = grids(logits.float().cpu(), model.cooccurrence, options, ids)
    shown = min(SHOWN, options.top_k)
    best = np.unravel_index(int(stages["masked"].argmax()), stages["masked"].shape)

    def text(head: int, rank: int) -> str:
        return tokenizer.decode([int(heads.ids[head, rank])])

    return HeatMap(
        prompt=prompt,
        top_k=options.top_k,
        eps_b=options.eps_b,
        emits=bool(emits),
        masked_by_table=model.cooccurrence is not None,
        rows=[text(0, rank) for rank in range(shown)],
        columns=[text(1, rank) for rank in range(shown)],
        survivors=int((stages["thresholded"] > 0).sum()),
        chosen=[int(rank) for rank in best],
        chosen_text=[text(head, int(rank)) for head, rank in enumerate(best)],
        shown_mass=_rounded(stages["masked"][:shown, :shown].sum()),
        **{
            name: [[_rounded(value) for value in row] for row in grid[:shown, :shown].tolist()]
            for name, grid in stages.items()
        },
    )


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
