"""Which heads learn best: the paper's Table 10 as a matrix of short trainings (method.md section 7).

In: one base, blocks to learn from and to be measured on. Out: one row a variant. Every variant starts from a copy of one
base, sees the same blocks in the same order under the same seed, and is scored in float32 at the same held-out positions:
those with `AHEAD` more tokens in their document, however many heads the variant has. So the rows differ by what is trained
and by nothing else, and differences between two rows are known more exactly than either row.

Not built of Table 10: see `NOT_BUILT`. Knows nothing about text, tokenizers or the command line.
"""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
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
from dynamo_lm.files import atomic_write
from dynamo_lm.jsonl_cache import JsonlLog
from dynamo_lm.model.modeling import DynaMoForCausalLM
from dynamo_lm.training.log import Progress
from dynamo_lm.training.loss import CHUNK, packed_hidden
from dynamo_lm.training.memory_estimate import parameters
from dynamo_lm.training.options import TrainingOptions
from dynamo_lm.training.trainer import train

KIND = "ablation"
AHEAD = 4  # targets that a scored position must have: the most heads of any variant
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 30, 12, 60  # for strict tokens per step
REFERENCE = "t2"  # the row that others are compared with


@dataclass(frozen=True)
class Variant:
    """One row: how its heads are built and which learning rates it uses."""

    key: str  # what --variants calls it, and its folder
    name: str  # as in Table 10
    meaning: str
    num_heads: int = 2
    heads: Mapping[str, Any] = field(default_factory=dict)  # other arguments of DynaMoConfig
    frozen: bool = False  # LR_B = LR_MB = 0
    slow: bool = False  # its heads learn at LR_B
    adapter: bool = False  # see `configuration`
    paper: Mapping[str, float] = field(default_factory=dict)  # Table 10, on Pythia-70M

    def configuration(self, hidden_size: int) -> dict[str, Any]:
        """Arguments of `DynaMoForCausalLM.from_base`; an adapter has the paper's 32 columns for each 512 of width."""
        rank = {"adapter_rank": min(32, max(1, hidden_size // 16))} if self.adapter else {}
        return {"num_heads": self.num_heads, **self.heads, **rank}

    def options(self, settings: Settings) -> TrainingOptions:
        """How it trains; what is not a learning rate is the same for all variants."""
        return TrainingOptions(
            steps=settings.steps,
            lr_b=0.0 if self.frozen else settings.lr_b,
            lr_m=settings.lr_b if self.slow else settings.lr_m,
            lr_mb=0.0 if self.frozen else settings.lr_mb,
            batch_size=settings.batch_size,
            warmup=settings.warmup,
            weight_decay=settings.weight_decay,
            bf16=False,
            seed=settings.seed,
            checkpoint_every=50,
            keep=1,
        )


@dataclass(frozen=True)
class Settings:
    """What all variants share. The learning rates are the paper's for Pythia-70M (method.md section 2)."""

    steps: int = 200
    batch_size: int = 8  # blocks a step
    block_size: int = 256  # tokens
    lr_b: float = 1e-5  # LR_B
    lr_m: float = 1e-3  # LR_M
    lr_mb: float = 1e-6  # LR_MB
    warmup: float = 0.05  # share of the steps: 1 % of a short run would be a single one
    weight_decay: float = 0.01
    seed: int = 0  # of the heads' first weights, the order of the text and which documents are held out
    validation_fraction: float = 0.01

    def __post_init__(self) -> None:
        for name in ("lr_b", "lr_m"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}; give a rate above 0 (frozen variants have none anyway).")
        if self.block_size <= AHEAD:
            raise InputError(f"block_size is {self.block_size}; give more than {AHEAD} tokens.")
        if not 0 < self.validation_fraction < 1:
            raise InputError(f"The held-out fraction is {self.validation_fraction}; give one between 0 and 1.")
        TrainingOptions(steps=self.steps, lr_b=self.lr_b, lr_mb=self.lr_mb, batch_size=self.batch_size)


def _paper(ppl_1: float, ppl_2: float, joint: float, **more: float) -> dict[str, float]:
    return {"PPL_1": ppl_1, "PPL_2": ppl_2, "PPL_1:2": joint} | more


_COPY, _OWN = {"init": "copy"}, {"own_output_embedding": True}
_ONLY = {"layers_per_head": 0, "feed": "last", **_OWN}  # its embedding reads what head 1's reads
_T3_PAPER = _paper(18.3, 111.4, 45.2, **{"PPL_3": 262.0, "PPL_1:3": 81.2})
VARIANTS = (  # the most telling first
    Variant("t2", "T2", "the method", paper=_paper(18.3, 112.4, 45.4)),
    Variant("t2-h", "T2-H", "frozen base", frozen=True, paper=_paper(20.2, 119.1, 49.0)),
    Variant("t2-copy", "T2 (copy, LR_M)", "copied layer at the full rate; not in the paper", heads=_COPY),
    Variant("t2-h-copy", "T2-H (copy)", "copied layer, frozen base; not in the paper", heads=_COPY, frozen=True),
    Variant("t2-c", "T2 (C)", "copied layer at LR_B", heads=_COPY, slow=True, paper=_paper(18.3, 296.4, 73.7)),
    Variant("t2-np", "T2 (NP)", "fed by the last layer", heads={"feed": "last"}, paper=_paper(18.8, 131.1, 49.0)),
    Variant("t2-own", "T2 (embedding)", "only an own output embedding", heads=_ONLY, paper=_paper(19.9, 252.4, 68.0)),
    Variant(
        "t2-layer-own", "T2 (layer + embedding)", "own output embedding too", heads=_OWN, paper=_paper(18.3, 111.5, 45.2)
    ),
    Variant("t2-lora", "T2 (LoRA)", "adapter on the last layer", adapter=True, paper=_paper(20.2, 1368.1, 161.2)),
    Variant("t2-two", "T2 (two layers)", "two layers a head", heads={"layers_per_head": 2}, paper=_paper(18.3, 86.7, 39.9)),
    Variant("t3", "T3", "the method", num_heads=3, paper=_T3_PAPER),
    Variant("t3-h-copy", "T3-H (copy)", "copied layers, frozen base; not in the paper", 3, heads=_COPY, frozen=True),
    Variant("t4", "T4", "the method", num_heads=4),
    Variant("t1", "T1", "no heads: the base trained on at LR_B, as a control; not in the paper", num_heads=1),
)
BASE = Variant("base", "base", "as it was given", num_heads=1, frozen=True, paper={"PPL_1": 20.2})
NOT_BUILT = {  # of Table 10, and why
    "T1-L2": "one head on labels shifted by 2 needs labels and a readout of its own; no heads' configuration says that",
    "T1-L2-M(-1)R": "a first layer with its mask shifted at random would change the base's own forward",
    "T2 (CTC)": "the trainer has one objective, and this would be another",
}


def choose(names: Sequence[str] | None) -> tuple[Variant, ...]:
    """The variants of these keys in the order given, or all.

    Raises:
        InputError: a key that is no variant, or none at all.
    """
    if names is None:
        return VARIANTS
    known = {variant.key: variant for variant in VARIANTS}
    for name in names:
        if name not in known:
            raise InputError(f'"{name}" is no variant; choose from {", ".join(known)}.')
    if not names:
        raise InputError(f"No variant is named; choose from {', '.join(known)}.")
    return tuple(known[name] for name in dict.fromkeys(names))


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
        rows = [blocks.block(0, index) for index in range(start, min(start + batch_size, total))]
        tokens, segments, positions = (torch.stack([torch.as_tensor(row[i]) for row in rows]).to(device) for i in range(3))
        scored = targets(tokens, segments, ahead) != -100  # (batch, length)
        block = start + scored.nonzero()[:, 0].cpu()  # of each scored position
        counts.index_add_(0, block, torch.ones(len(block), dtype=torch.float64))
        hidden = packed_hidden(model, tokens, segments, positions)
        for head in range(1, n + 1):
            states, labels = hidden[head - 1][scored], targets(tokens, segments, head)[scored]
            for at in range(0, len(labels), CHUNK):
                here = slice(at, at + CHUNK)
                logits = model.readout(states[here][None], head)[0].float()
                losses = F.cross_entropy(logits, labels[here], reduction="none").double().cpu()
                sums[:, head - 1].index_add_(0, block[here], losses)
    if counts.sum() == 0:
        raise InputError(f"No held-out document has more than {ahead} tokens in one block; give longer texts to --data.")
    return sums, counts


def ratio(sums: Tensor, counts: Tensor) -> tuple[float, float | None]:
    """sum(sums) / sum(counts) with its standard error over the groups (blocks, prompts), None for a single one."""
    mean = (sums.sum() / counts.sum()).item()
    if (groups := len(counts)) < 2:
        return mean, None
    spread = (sums - mean * counts).square().sum().item() * groups / (groups - 1)
    return mean, math.sqrt(spread) / counts.sum().item()


def perplexity(sums: Tensor, counts: Tensor) -> dict[str, float | None]:
    """{"ppl", "se"} of losses by group; the error is the mean loss's, carried through exp."""
    mean, error = ratio(sums, counts)
    value = math.exp(mean)
    return {"ppl": value, "se": None if error is None else value * error}


def against(mine: Tensor, other: Tensor, counts: Tensor) -> dict[str, dict[str, float | None]]:
    """Two variants' PPL_1 and PPL_1:2 as ratios with standard errors, from (blocks, heads) losses of the same blocks.

    The errors are those of the paired differences: what makes a block hard is hard for both.
    """
    found = {}
    for m in range(1, min(2, mine.shape[1], other.shape[1]) + 1):
        mean, error = ratio((mine[:, :m] - other[:, :m]).sum(1) / m, counts)
        value = math.exp(mean)
        name = "PPL_1" if m == 1 else "PPL_1:2"
        found[name] = {"ratio": value, "se": None if error is None else value * error}
    return found


def held_out_prompts(validation: Blocks) -> list[list[int]]:
    """The first tokens of held-out documents, spread evenly over them; documents that end there are left out."""
    store = validation.store
    starts = [int(store.offsets[i]) for i in validation.documents if store.offsets[i + 1] - store.offsets[i] > PROMPT_TOKENS]
    chosen = [starts[i * len(starts) // PROMPTS] for i in range(PROMPTS)] if len(starts) > PROMPTS else starts
    return [[int(token) for token in store.tokens[start : start + PROMPT_TOKENS]] for start in chosen]


def strict_tokens_per_step(
    model: DynaMoForCausalLM, prompts: Sequence[Sequence[int]], end_token: int | None
) -> tuple[float, float | None]:
    """Tokens per forward pass under exact greedy decoding without tables, with its standard error over the prompts.

    The text is the base's own greedy text, so a variant that changes the base writes another one; the ceiling is n, and
    one token per step is the baseline.
    """
    length = min(NEW_TOKENS, context_limit(model.config) - PROMPT_TOKENS)
    options = resolve(model, {"alpha_c": 0}, max_new_tokens=length, sample=False, end_tokens=end_token)
    rows = [row.statistics for row in decode(model, prompts, options, seeds=[0] * len(prompts))]
    tokens, forwards = ([getattr(row, name) for row in rows] for name in ("new_tokens", "forwards"))
    return ratio(torch.tensor(tokens, dtype=torch.float64), torch.tensor(forwards, dtype=torch.float64))


def measure(
    model: DynaMoForCausalLM, validation: Blocks, *, batch_size: int, end_token: int | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The measured part of a row, and what `against` needs: {"losses": (blocks, heads), "counts": (blocks,)}."""
    losses, counts = block_losses(model, validation, batch_size=batch_size)
    n, prompts = model.num_heads, held_out_prompts(validation)
    speed = strict_tokens_per_step(model, prompts, end_token) if prompts else (None, None)
    row = {
        "heads": [{"head": i, **perplexity(losses[:, i - 1], counts)} for i in range(1, n + 1)],
        "joint": [{"heads": m, **perplexity(losses[:, :m].sum(1) / m, counts)} for m in range(1, n + 1)],
        "positions": int(counts.sum()),
        "strict_tokens_per_step": speed[0],
        "strict_tokens_per_step_se": speed[1],
    }
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
        order = [BASE.key, *(known.key for known in VARIANTS)]
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
    return asdict(settings) | {"targets_ahead": AHEAD, "strict": prompts}


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
