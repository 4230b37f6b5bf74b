"""What is raced: every way of decoding as one line of data. Adding a way is adding a line.

Knows names and arguments, no model and no clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Engine = Literal["dynamo", "transformers", "compiled", "flashspec", "llama.cpp"]
DYNAMO: Engine = "dynamo"


@dataclass(frozen=True)
class Method:
    """One way of decoding."""

    name: str
    engine: Engine  # who carries it out, see `contenders.open_runner`
    arguments: dict[str, Any] = field(default_factory=dict)  # of that engine
    kind: Literal["greedy", "sampled"] = "greedy"  # which one-token ways it is compared with
    lossless: bool = True  # the base's own text, or its own distribution
    one_token: bool = False  # one token per step: a candidate for the baseline of its kind
    batched: bool = False  # runs with more than one prompt at a time
    identical_to: str | None = None  # the way whose tokens it must reproduce
    ceiling: int | None = 1  # tokens per step at most; None where the way states none
    model: str = "model"  # which DynaMo model: the one measured, or one of --also
    draft: bool = False  # needs a draft model

    @property
    def compiles(self) -> bool:
        """Whether it takes a compiler, and a minute before the first token."""
        return self.engine == "compiled" or bool(self.arguments.get("compile"))


OWN = "one token: own loop"
OWN_SAMPLED = "one token, T=1: own loop"
COMPILED = {"compile": True}
SAMPLED = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}  # from the base's whole distribution
PAPER = {"do_sample": True, "temperature": 0.7, "top_k": 50, "repetition_penalty": 1.1}  # Algorithm 1's own knobs
LOOKUP = 10  # tokens that prompt lookup proposes, as transformers' documentation has it
BUDGETS = (0.05, 0.2)  # nats per token, between strict and off
ENSEMBLE = 0.5  # the target's weight in the ensemble of target and draft model

ONE_TOKEN: tuple[Method, ...] = (
    Method(OWN, "dynamo", {"verify": "strict", "num_heads": 1}, one_token=True, batched=True),
    Method("one token: transformers", "transformers", one_token=True, batched=True, identical_to=OWN),
    Method("one token: transformers compiled", "compiled", one_token=True, batched=True, identical_to=OWN),
    Method(
        "one token: own loop compiled",
        "dynamo",
        {"verify": "strict", "num_heads": 1, **COMPILED},
        one_token=True,
        identical_to=OWN,
    ),
)
ONE_TOKEN_SAMPLED: tuple[Method, ...] = (
    Method(OWN_SAMPLED, "dynamo", {"verify": "strict", "num_heads": 1, **SAMPLED}, "sampled", one_token=True),
    Method("one token, T=1: transformers", "transformers", SAMPLED, "sampled", one_token=True),
    Method("one token, T=1: transformers compiled", "compiled", SAMPLED, "sampled", one_token=True),
    Method(
        "one token, T=1: own loop compiled",
        "dynamo",
        {"verify": "strict", "num_heads": 1, **SAMPLED, **COMPILED},
        "sampled",
        one_token=True,
    ),
    Method(
        "one token, T=0.7: own loop",
        "dynamo",
        {"verify": "off", "num_heads": 1, "do_sample": True},
        "sampled",
        lossless=False,  # tempered, cut and penalised
        one_token=True,
    ),
    Method("one token, T=0.7: transformers", "transformers", PAPER, "sampled", lossless=False, one_token=True),
)
PEERS: tuple[Method, ...] = (
    Method(
        "transformers: prompt lookup",
        "transformers",
        {"prompt_lookup_num_tokens": LOOKUP},
        identical_to=OWN,
        ceiling=LOOKUP + 1,
    ),
    Method("transformers: assisted", "transformers", identical_to=OWN, ceiling=None, draft=True),
    Method(
        f"transformers: assisted, ensemble {ENSEMBLE:g}",
        "transformers",
        {"assistant_ensemble_weight": ENSEMBLE},
        lossless=False,
        ceiling=None,
        draft=True,
    ),
    Method("flashspec: prompt lookup", "flashspec", identical_to=OWN, ceiling=7),
    Method("flashspec: lookup, draft model", "flashspec", identical_to=OWN, ceiling=7, draft=True),
    Method("llama.cpp: one token", "llama.cpp", identical_to=OWN),
)


def dynamo(num_heads: int, *, off_heads: int, eps_b: float) -> list[Method]:
    """DynaMo's own modes at every number of heads.

    Args:
        num_heads: n of the model.
        off_heads: the most heads that `verify="off"` can use: what the tables hold, too.
        eps_b: the calibrated dial, the model's own default; 0 is raced beside it.
    """
    found = [
        Method(
            f"DynaMo strict, n={n}",
            "dynamo",
            {"verify": "strict", "num_heads": n},
            batched=True,
            identical_to=OWN,
            ceiling=n,
        )
        for n in range(2, num_heads + 1)
    ]
    fast: list[tuple[str, dict[str, Any], Literal["greedy", "sampled"], bool]] = [
        ("strict", {"verify": "strict"}, "greedy", True),
        (f"budget {BUDGETS[-1]:g}", {"verify": BUDGETS[-1]}, "greedy", False),
        ("strict sampled", {"verify": "strict", **SAMPLED}, "sampled", True),
        (f"off, eps_b={eps_b:g}", {"verify": "off", "do_sample": True, "eps_b": eps_b}, "sampled", False),
    ]
    for name, arguments, kind, lossless in fast:
        most = off_heads if arguments["verify"] == "off" else num_heads
        same = OWN if kind == "greedy" and lossless else None
        found += [
            Method(
                f"DynaMo {name}, n={n}, compiled",
                "dynamo",
                {**arguments, "num_heads": n, **COMPILED},
                kind,
                lossless,
                identical_to=same,
                ceiling=n,
            )
            for n in range(2, most + 1)
            if n == most or name == "strict" or arguments["verify"] == "off"
        ]
    chain = {"verify": "strict", "num_heads": num_heads, "tree": 0}
    found.append(Method(f"DynaMo strict, n={num_heads}, chain", "dynamo", chain, identical_to=OWN, ceiling=num_heads))
    found += [
        Method(
            f"DynaMo budget {budget:g}, n={num_heads}",
            "dynamo",
            {"verify": budget, "num_heads": num_heads},
            lossless=False,
            batched=True,
            ceiling=num_heads,
        )
        for budget in BUDGETS
    ]
    found += [
        Method(
            f"DynaMo strict sampled, n={n}",
            "dynamo",
            {"verify": "strict", "num_heads": n, **SAMPLED},
            "sampled",
            ceiling=n,
        )
        for n in range(2, num_heads + 1)
    ]
    found += [
        Method(
            f"DynaMo off, eps_b={dial:g}, n={n}",
            "dynamo",
            {"verify": "off", "num_heads": n, "do_sample": True, "eps_b": dial},
            "sampled",
            lossless=False,
            batched=True,
            ceiling=n,
        )
        for dial in sorted({eps_b, 0.0}, reverse=True)
        for n in range(2, off_heads + 1)
    ]
    return found


def also(name: str, num_heads: int) -> Method:
    """Strict greedy decoding by another DynaMo model on the same base."""
    arguments = {"verify": "strict", "num_heads": num_heads}
    strict = f"{name} strict, n={num_heads}"
    return Method(strict, "dynamo", arguments, batched=True, identical_to=OWN, ceiling=num_heads, model=name)


def choose(ways: Sequence[Method], *, batch: int, sampled: bool = True, only: Iterable[str] = ()) -> list[Method]:
    """The ways that run at this batch size, and of these, if `only` names parts of names, those and all baselines.

    Sampled baselines stay only where a sampled way does. At more than one row texts may differ by rounding alone, as
    shapes change; the counts of identical texts are still taken.
    """
    parts = list(only)
    found = [way for way in ways if way.batched or batch == 1]
    if batch > 1 and any(way.kind == "sampled" for way in found):  # their baselines
        found += [replace(way, batched=True) for way in ways if way.one_token and way.kind == "sampled"]
    if parts:
        found = [way for way in found if way.one_token or any(part in way.name for part in parts)]
    kinds = {way.kind for way in found if not way.one_token} | {"greedy"}
    return [way for way in found if way.kind in kinds and (sampled or way.kind == "greedy")]
