"""Which heads learn best: the paper's Table 10 as a matrix of short trainings (method.md section 7).

In: a base, blocks to learn from and to measure on. Out: a row for each variant. Every variant starts from a copy of the
base, sees the same blocks in the same order under the same seed, and is scored in float32 at the same held-out positions:
those with `AHEAD` more tokens in their document, however many heads the variant has. So the rows differ only by what is
trained, and the difference between two rows has a smaller error than either row.

Knows nothing about text, tokenizers or the command line.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from dynamo_lm.backbone.token_limits import context_limit
from dynamo_lm.data.packing import Blocks, targets
from dynamo_lm.decoding.batch import decode
from dynamo_lm.decoding.settings import resolve
from dynamo_lm.errors import InputError
from dynamo_lm.evaluation import results_file
from dynamo_lm.evaluation.ablation_variants import AHEAD, BASE, NOT_BUILT, VARIANTS, Settings, Variant
from dynamo_lm.evaluation.perplexity.scoring import Sums
from dynamo_lm.files import atomic_write
from dynamo_lm.jsonl_cache import JsonlLog
from dynamo_lm.model.modeling import DynaMoForCausalLM
from dynamo_lm.training.log import Progress
from dynamo_lm.training.loss import CHUNK, packed_hidden
from dynamo_lm.training.memory_estimate import parameters
from dynamo_lm.training.trainer import train

KIND = "ablation"
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 30, 12, 60  # for strict tokens per step
REFERENCE = "t2"  # the variant that others are compared with


# --- measuring ------------------------------------------------------------------


@torch.no_grad()
def block_losses(model: DynaMoForCausalLM, blocks: Blocks, *, batch_size: int, ahead: int = AHEAD) -> tuple[Tensor, Tensor]:
    """Losses of all heads in every block, at the positions that have `ahead` more tokens in their document piece.

    Returns:
        Sums of the negative log-likelihood in nats, (blocks, heads) float64, and positions, (blocks,) float64.

    Raises:
        InputError: there is no such position.
    """
    n, total, device = model.num_heads, blocks.num_blocks(0), model.device
    sums, counts = torch.zeros(total, n, dtype=torch.float64), torch.zeros(total, dtype=torch.float64)
    for start in range(0, total, batch_size):
        batch = blocks.rows(range(start, min(start + batch_size, total)))
        tokens, segments, positions = (batch[name].to(device) for name in ("tokens", "segments", "positions"))
        scored = targets(tokens, segments, ahead) != -100  # (batch, length)
        block = start + scored.nonzero()[:, 0].cpu()  # of each scored position
        counts.index_add_(0, block, torch.ones(len(block), dtype=torch.float64))
        hidden = packed_hidden(model, tokens, segments, positions)
        for head in range(1, n + 1):
            states, labels = hidden[head - 1][scored], targets(tokens, segments, head)[scored]
            for at in range(0, len(labels), CHUNK):
                chunk = slice(at, at + CHUNK)
                logits = model.readout(states[chunk][None], head)[0].float()
                losses = F.cross_entropy(logits, labels[chunk], reduction="none").double().cpu()
                sums[:, head - 1].index_add_(0, block[chunk], losses)
    if counts.sum() == 0:
        raise InputError(f"No held-out document has more than {ahead} tokens in one block; give longer texts to --data.")
    return sums, counts


def against(mine: Tensor, other: Tensor, counts: Tensor) -> dict[str, dict[str, float | None]]:
    """Two variants' PPL_1 and PPL_1:2 as ratios with standard errors, from (blocks, heads) losses of the same blocks.

    The errors are those of the paired differences: what makes a block hard is hard for both.
    """
    ratios = {}
    for m, name in ((1, "PPL_1"), (2, "PPL_1:2")):
        if m <= min(mine.shape[1], other.shape[1]):
            difference = _sums((mine[:, :m] - other[:, :m]).sum(1) / m, counts)
            ratios[name] = {"ratio": difference.perplexity, "se": difference.error}
    return ratios


def _sums(values: Tensor, counts: Tensor) -> Sums:
    """Sums by block or prompt, (groups,), whose ratio is estimated."""
    return Sums(values.double().numpy(), counts.double().numpy())


def held_out_prompts(validation: Blocks) -> list[list[int]]:
    """The first tokens of held-out documents, spread evenly over them; documents that end there are left out."""
    store = validation.store
    starts = [int(store.offsets[i]) for i in validation.documents if store.offsets[i + 1] - store.offsets[i] > PROMPT_TOKENS]
    chosen = [starts[i * len(starts) // PROMPTS] for i in range(PROMPTS)] if len(starts) > PROMPTS else starts
    return [[int(token) for token in store.tokens[start : start + PROMPT_TOKENS]] for start in chosen]


def strict_tokens_per_step(model: DynaMoForCausalLM, prompts: Sequence[Sequence[int]], end_token: int | None) -> Sums:
    """New tokens and forward passes by prompt under exact greedy decoding without tables.

    The text is the base's own greedy text, so a variant that changes the base writes another one; the ceiling is n, and
    one token per step is the baseline.
    """
    length = min(NEW_TOKENS, context_limit(model.config) - PROMPT_TOKENS)
    options = resolve(model, {"alpha_c": 0}, max_new_tokens=length, sample=False, end_tokens=end_token)
    texts = [text.statistics for text in decode(model, prompts, options, seeds=[0] * len(prompts))]
    return _sums(torch.tensor([text.new_tokens for text in texts]), torch.tensor([text.forwards for text in texts]))


def measure(
    model: DynaMoForCausalLM, validation: Blocks, *, batch_size: int, end_token: int | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The measured part of a row, and what `against` needs: {"losses": (blocks, heads), "counts": (blocks,)}."""
    losses, counts = block_losses(model, validation, batch_size=batch_size)
    prompts = held_out_prompts(validation)
    speed = strict_tokens_per_step(model, prompts, end_token) if prompts else None
    row: dict[str, Any] = {"heads": [], "joint": []}
    for m in range(1, model.num_heads + 1):
        head, joint = _sums(losses[:, m - 1], counts), _sums(losses[:, :m].sum(1) / m, counts)
        row["heads"].append({"head": m, "ppl": head.perplexity, "se": head.error})
        row["joint"].append({"heads": m, "ppl": joint.perplexity, "se": joint.error})
    row["positions"] = int(counts.sum())
    row["strict_tokens_per_step"] = speed.mean if speed is not None else None
    row["strict_tokens_per_step_se"] = speed.mean_error if speed is not None else None
    return row, {"losses": losses, "counts": counts}


# --- the matrix -----------------------------------------------------------------

Watch = Callable[[Variant, int, int], AbstractContextManager[Callable[[Progress], None]]]


def begin_or_continue(folder: Path, new: dict[str, Any]) -> dict[str, Any]:
    """The unfinished or finished record in `folder` that `new` goes on with, or `new` itself without rows.

    Raises:
        InputError: the folder has results of another model, on other data or with other settings.
    """
    results_file.check_folder(folder, new["model"])
    before = results_file.load(folder, KIND)
    if before is None:
        if any((folder / KIND).glob("*/checkpoints")):
            raise InputError(
                f'"{folder / KIND}" holds checkpoints of a matrix whose {KIND}.json is gone; use another --out.'
            )
        return new | {"rows": [], "not_built": NOT_BUILT}
    for part in ("data", "settings"):
        then = before.get(part, {})
        for key, value in new[part].items():
            if then.get(key) != value:
                raise InputError(
                    f'"{folder}" holds an ablation with {key} {then.get(key)}, not {value}; '
                    "use the same options to go on with it, or another --out."
                )
    return before


def run(
    results: dict[str, Any],
    folder: Path,
    base: PreTrainedModel,
    blocks: Blocks,
    validation: Blocks,
    variants: Sequence[Variant],
    settings: Settings,
    *,
    watch: Watch,
    end_token: int | None = None,
    keep: bool = False,
) -> dict[str, Any]:
    """Trains and measures what `results` has no row of yet, saving it as `folder/ablation.json` after each.

    Args:
        results: from `begin_or_continue`.
        base: stays as it is.
        variants: in the order in which they are trained.
        watch: called with (variant, number from 1, how many); inside, its callback is given every training step.
        end_token: where strict decoding stops.
        keep: save each trained model as `folder/ablation/KEY/model`; checkpoints of finished variants go in any case.

    Raises:
        InputError: from training: a loss that is not finite, a damaged checkpoint, a full disk.
        KeyboardInterrupt: after a checkpoint; the same call goes on from there.
    """
    ready = {row["key"] for row in results["rows"]}
    for number, variant in enumerate((BASE, *variants)):
        if variant.key in ready:
            continue
        place = folder / KIND / variant.key
        model = build(variant, base, settings.seed)
        options = variant.options(settings)
        if variant is not BASE:
            with watch(variant, number, len(variants)) as report:
                train(model, blocks, None, options, place, report=report)
        trained = options.steps * options.batch_size * blocks.block_size
        rates = {name: getattr(options, name) for name in ("lr_b", "lr_m", "lr_mb")}
        row: dict[str, Any] = {
            "key": variant.key,
            "variant": variant.name,
            "meaning": variant.meaning,
            "configuration": variant.configuration(_width(base)),
            "learning_rates": rates if variant is not BASE else {},
            "frozen": variant.frozen,
            "extra_parameters": parameters(model, frozen=variant.frozen)["heads"],
            "overhead": round(model.overhead(), 5),
            "tokens": trained if variant is not BASE else 0,
            "seconds": _seconds(place, trained // options.steps),
            "paper": dict(variant.paper),
        }
        measured, losses = measure(model, validation, batch_size=settings.batch_size, end_token=end_token)
        _keep_losses(place, losses)
        if keep and variant is not BASE:
            model.save_pretrained(str(place / "model"))
        order = [BASE.key, *(each.key for each in VARIANTS)]
        results["rows"] = sorted([*results["rows"], row | measured], key=lambda row: order.index(row["key"]))
        _compare(results["rows"], folder)
        results_file.save(folder, results)
        shutil.rmtree(place / "checkpoints", ignore_errors=True)
    return results


def build(variant: Variant, base: PreTrainedModel, seed: int) -> DynaMoForCausalLM:
    """The variant before training, on a copy of `base`; its random layers are a function of the seed."""
    torch.manual_seed(seed)
    model = DynaMoForCausalLM.from_base(copy.deepcopy(base), **variant.configuration(_width(base)))
    return model.to(base.device).eval()  # type: ignore[arg-type]


def describe_settings(settings: Settings) -> dict[str, Any]:
    """What a results file says of them, and what a run must agree in with the one that it continues."""
    prompts = {"prompts": PROMPTS, "prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS}
    facts = asdict(settings)
    facts["validation_fraction"] = facts.pop("held_out")
    return facts | {"targets_ahead": AHEAD, "strict": prompts}


def _width(base: PreTrainedModel) -> int:
    return base.config.get_text_config().hidden_size


def _seconds(place: Path, tokens: int) -> float:
    """Spent in training steps of `tokens` each, over all sessions, from the run's log."""
    log = place / "log.jsonl"
    return round(sum(tokens / record["tokens_per_second"] for record in JsonlLog(log).records), 1)


def _keep_losses(place: Path, losses: dict[str, Tensor]) -> None:
    place.mkdir(parents=True, exist_ok=True)
    with atomic_write(place / "losses.safetensors") as temporary:
        save_file(losses, temporary)


def _compare(rows: list[dict[str, Any]], folder: Path) -> None:
    """Fills in `against_t2` of every row, from the losses kept beside it."""
    files = {row["key"]: folder / KIND / row["key"] / "losses.safetensors" for row in rows}
    if REFERENCE not in files or not all(file.is_file() for file in files.values()):
        return
    reference = load_file(files[REFERENCE])
    for row in rows:
        mine = load_file(files[row["key"]])
        row["against_t2"] = against(mine["losses"], reference["losses"], reference["counts"])
