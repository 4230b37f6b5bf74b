"""The variants of the training ablation and the settings they share (the paper's Table 10; method.md section 7).

Knows no tensors, so that the command line can declare its options from `Settings`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from dynamo_lm.errors import InputError
from dynamo_lm.training.options import TrainingOptions

AHEAD = 4  # targets that a scored position must have: the most heads of any variant


@dataclass(frozen=True)
class Variant:
    """How the heads are built and which learning rates they use."""

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


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all variants share. The learning rates are the paper's for Pythia-70M (method.md section 2)."""

    PANEL: ClassVar[str] = "How they learn"

    steps: Annotated[int, "Training steps of each variant."] = 200
    batch_size: Annotated[int, "Blocks a step."] = 8
    block_size: Annotated[int, "Tokens of a block."] = 256
    lr_b: Annotated[float, "LR_B: learning rate of the base, from its own loss."] = 1e-5
    lr_m: Annotated[float, "LR_M: learning rate of the new heads."] = 1e-3
    lr_mb: Annotated[float, "LR_MB: learning rate of the base, from the new heads' losses."] = 1e-6
    held_out: Annotated[float, "Share of the documents that is only measured on."] = 0.01
    seed: Annotated[int, "Seed of new layers, the order of the text and which documents are held out."] = 0
    warmup: float = 0.05  # share of the steps: 1 % of a short run would be a single one
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        for name in ("lr_b", "lr_m"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}; give a rate above 0 (frozen variants have none anyway).")
        if self.block_size <= AHEAD:
            raise InputError(f"block_size is {self.block_size}; give more than {AHEAD} tokens.")
        if not 0 < self.held_out < 1:
            raise InputError(f"The held-out fraction is {self.held_out}; give one between 0 and 1.")
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
        InputError: an unknown key, or none at all.
    """
    if names is None:
        return VARIANTS
    by_key = {variant.key: variant for variant in VARIANTS}
    for name in names:
        if name not in by_key:
            raise InputError(f'"{name}" is not a variant; choose from {", ".join(by_key)}.')
    if not names:
        raise InputError(f"No variant is named; choose from {', '.join(by_key)}.")
    return tuple(by_key[name] for name in dict.fromkeys(names))
