"""Choosing a model's default `eps_b`: the largest speed-up whose quality is not worse than the base model's.

In: the quality at several values of eps_b, by one of three criteria. Out: a curve, the value chosen from it, and the model
folder's `generation_config.json` with that value. "Speed-up" is tokens per step against one token per step, at most n.

* ppl: PPL_d(eps_b) / PPL_1 on a text is at most `limit` (1.1: each token of the true text costs at most 10 % more).
* regret: regret of sampled text (nats per token below the base's first choice, under the base itself) exceeds that of
  one-token sampling by at most `limit`, by the upper end of its 95 % interval: sampled text is noisy, and the estimate alone
  would choose by luck. It reflects effective temperature too: duller text has less regret.
* win-rate: of a completion benchmark that was run before, points whose 95 % interval of the win rate against the base
  begins at 1 - margin or above (non-inferiority); by default at matched diversity. Points without an interval never pass.

The first compares the estimate with the limit. Intervals take documents or prompts as the units. Of the values that pass,
the one with most tokens per step is chosen, of equal ones the larger eps_b; where none passes it is 1, one token per step,
which is the base model's own sampling.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dynamo_lm.errors import InputError
from dynamo_lm.evaluation.perplexity.scoring import Measured, Sums, standard_error
from dynamo_lm.files import write_text
from dynamo_lm.model.modeling import DynaMoForCausalLM

CRITERIA = {"ppl": 1.1, "regret": 0.0, "win-rate": 0.2}  # and their default limits: ratio, nats, margin
FILE = "generation_config.json"
METHOD = "mask+Otsu+blur"  # of a completion benchmark: what `generate --verify off` does by default
WIDE = 1.96  # standard errors to either side of a 95 % interval


@dataclass(frozen=True)
class Point:
    """One value of eps_b."""

    eps_b: float
    tokens_per_step: float
    value: float  # of the criterion
    low: float | None  # its 95 % interval, if there is enough to give one
    high: float | None
    passes: bool


def choose(curve: Sequence[Point]) -> Point | None:
    """The fastest point that passes, of equally fast ones the largest eps_b; None if none passes."""
    passing = [point for point in curve if point.passes]
    return max(passing, key=lambda point: (point.tokens_per_step, point.eps_b), default=None)


def outcome(criterion: str, limit: float, curve: Sequence[Point], **details: Any) -> dict[str, Any]:
    """The own keys of `calibration.json`."""
    best = choose(curve)
    eps_b, tokens_per_step = (best.eps_b, best.tokens_per_step) if best is not None else (1.0, 1.0)
    return {
        "criterion": {"name": criterion, "limit": limit, **details},
        "curve": [asdict(point) for point in curve],
        "chosen": {"eps_b": eps_b, "tokens_per_step": tokens_per_step, "passes": best is not None},
    }


# --- criteria -------------------------------------------------------------------


def by_perplexity(measured: Measured, limit: float, *, masked: bool = True) -> list[Point]:
    """PPL_d / PPL_1 for each eps_b: of the masked joint, or of the product of heads if not `masked` or without tables. The
    steps are those that generation takes either way."""
    base, points = measured.heads[0], []
    sums = measured.masked_dynamic if masked and measured.masked_dynamic is not None else measured.dynamic
    for number, (eps_b, dynamic) in enumerate(zip(measured.options.eps_b, sums, strict=True)):
        ratio = math.exp(dynamic.mean - base.mean)
        error = standard_error(dynamic.influence - base.influence)  # of the logarithm; the same documents in both
        low, high = (None, None) if error is None else (ratio * math.exp(-WIDE * error), ratio * math.exp(WIDE * error))
        points.append(Point(eps_b, measured.tokens_per_step(number), ratio, low, high, ratio <= limit))
    return points


def by_regret(
    model: DynaMoForCausalLM,
    prompts: Sequence[Sequence[int]],
    values: Sequence[float],
    limit: float,
    *,
    samples: int = 1,
    progress: Callable[[int], None] = lambda texts: None,
    **arguments: Any,
) -> list[Point]:
    """Regret of the text at each eps_b less that of one-token sampling (eps_b = 1) from the same prompts and seeds.

    Args:
        prompts: two or more, each of at least one token id.
        values: of eps_b.
        samples: texts for each prompt; text s of prompt p has the same seed at every eps_b.
        progress: called with the number of finished texts.
        **arguments: of `generate`, such as max_new_tokens and seed.

    Raises:
        InputError: a single prompt, which gives no interval.
    """
    if len(prompts) < 2:
        raise InputError("One prompt gives no interval of the regret; give two or more, better ten.")
    inputs = [list(prompt) for prompt in prompts for _ in range(samples)]
    width = max(map(len, inputs))
    ids = torch.tensor([[0] * (width - len(tokens)) + tokens for tokens in inputs], device=model.device)
    mask = torch.tensor([[0] * (width - len(tokens)) + [1] * len(tokens) for tokens in inputs], device=model.device)
    options = {"verify": "off", "do_sample": True, "return_dict_in_generate": True, "attention_mask": mask} | arguments
    finished = 0

    def sample(eps_b: float) -> tuple[Sums, float]:
        """Regret in nats and the tokens it was taken over, by prompt; and tokens per step."""
        nonlocal finished
        texts = model.generate(ids, eps_b=eps_b, **options).statistics
        finished += len(inputs)
        progress(finished)
        counts = np.array([(text.regret, text.unverified) for text in texts])
        nats, tokens = counts.reshape(len(prompts), samples, 2).sum(1).T
        return Sums(nats, tokens), sum(text.new_tokens for text in texts) / sum(text.forwards for text in texts)

    base, base_speed = sample(1.0)
    points = []
    for eps_b in values:
        sums, tokens_per_step = (base, base_speed) if eps_b == 1 else sample(eps_b)
        error, difference = standard_error(sums.influence - base.influence), sums.mean - base.mean
        assert error is not None
        low, high = difference - WIDE * error, difference + WIDE * error
        points.append(Point(eps_b, tokens_per_step, difference, low, high, high <= limit))
    return points


def by_win_rate(record: dict[str, Any], margin: float, *, matched: bool = True) -> list[Point]:
    """The points of a `completion.json`, from the largest eps_b down.

    Raises:
        InputError: none of the paper's method, a judge that failed its sanity check, or no point with an interval.
    """
    sanity = (record.get("judge") or {}).get("sanity", {})
    if sanity.get("useful") is False:
        reason = sanity.get("reason", "see the report")
        raise InputError(f"The judge of these results is not useful ({reason}); use another.")
    measured = record.get("methods", {}).get(METHOD, {}).get("points", [])
    measured = [point for point in measured if point.get("eps_b") is not None]
    if not measured:
        raise InputError(f'These results have no "{METHOD}" points; run `dynamo-lm eval completion` with that method.')
    points = []
    for point in sorted(measured, key=lambda point: -point["eps_b"]):
        rate = point.get("matched" if matched else "plain") or {}
        low, high = rate.get("interval") or (None, None)
        passes = low is not None and low >= 1 - margin
        points.append(Point(point["eps_b"], point["tokens_per_step"], rate.get("win_rate", 0.0), low, high, passes))
    if all(point.low is None for point in points):
        raise InputError(
            "No win rate of these results has an interval, so none can be trusted; run `dynamo-lm eval completion` with "
            "more prompts or seeds."
        )
    return points


# --- the model folder -----------------------------------------------------------


def check_writable(name: str, folder: Path) -> None:
    """Refuses, before the long part, a model whose default cannot be written.

    Args:
        name: the model as the user named it; folder: what that resolves to.

    Raises:
        InputError: a hub id, the bundled model by its short name, or a folder that is read-only.
    """
    if not folder.is_dir():
        raise InputError(f'"{name}" is not a folder that a default can be written into; download it, or use --dry-run.')
    if not Path(name).is_dir():
        raise InputError(
            f'"{name}" is part of this installation; copy its folder and calibrate the copy, name the folder itself, or use '
            "--dry-run."
        )
    if not os.access(folder, os.W_OK):
        raise InputError(f'"{folder}" is read-only; copy it and calibrate the copy, or use --dry-run.')
    read_defaults(folder)


def read_defaults(folder: Path) -> dict[str, Any] | None:
    """The folder's `generation_config.json`, or None if there is none.

    Raises:
        InputError: it holds no JSON object.
    """
    file = folder / FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f'"{file}" is not valid JSON ({error}); repair it or delete it.') from error
    if not isinstance(content, dict):
        raise InputError(f'"{file}" holds no JSON object; repair it or delete it.')
    return content


def write_default(folder: Path, eps_b: float, model: DynaMoForCausalLM) -> Path:
    """Sets `eps_b` in the folder's `generation_config.json`, whole or not at all; every other value stays as it is.

    Without such a file it is made from `model`'s own generation settings.
    """
    file = folder / FILE
    content = read_defaults(folder)
    if content is None:
        content = json.loads(model.generation_config.to_json_string(use_diff=False))
    content["eps_b"] = eps_b
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n", durable=True)
    return file
