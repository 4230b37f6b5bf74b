"""What is raced: every method of decoding as one line of data. Knows names and arguments, no model and no clock."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

Kind = Literal["greedy", "sampled"]


@dataclass(frozen=True)
class Method:
    """One method of decoding."""

    name: str
    engine: str  # which of `runners.ENGINES` runs it
    arguments: dict[str, Any] = field(default_factory=dict)  # of that engine
    kind: Kind = "greedy"  # which one-token methods it is compared with
    lossless: bool = True  # the base's own text, or its own distribution
    one_token: bool = False  # one token per step: a candidate for the baseline of its kind
    batched: bool = False  # runs with more than one prompt at a time
    identical_to: str | None = None  # the method whose tokens it must reproduce
    ceiling: int | None = 1  # tokens per step at most; None where the method states none
    model: str = "model"  # which DynaMo model: the one measured, or another on the same base
    draft: bool = False  # needs a draft model

    @property
    def synthetic(self) -> bool:
        """Whether drafts are accepted by chance, so that texts mean nothing."""
        return SYNTHETIC in self.arguments

    @property
    def compiles(self) -> bool:
        """Whether it takes a compiler, and a minute before the first token."""
        return self.engine == "compiled" or bool(self.arguments.get("compile"))


ONE = "one token: own loop"
COMPILED = {"compile": True}
SAMPLED = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}  # from the base's whole distribution
PAPER = {"do_sample": True, "temperature": 0.7, "top_k": 50, "repetition_penalty": 1.1}  # Algorithm 1's own settings
LOOKUP = 10  # tokens that prompt lookup proposes, as transformers' documentation has it
SYNTHETIC = "synthetic_acceptance"
BUDGETS = (0.05, 0.2)  # nats per token, between strict and off


def dynamo(name: str, arguments: dict[str, Any], **about: Any) -> Method:
    """A method of DynaMo's own loop; its kind and ceiling follow from the arguments of `generate`."""
    arguments = {"prompt_lookup_num_tokens": 0, **arguments}  # whatever the model's own configuration says
    ceiling = max(arguments["num_heads"], 1 + arguments["prompt_lookup_num_tokens"])
    about = {"lossless": arguments["verify"] == "strict", "one_token": ceiling == 1, "ceiling": ceiling, **about}
    return Method(name, "dynamo", arguments, "sampled" if arguments.get("do_sample") else "greedy", **about)


def _one_token(prefix: str, kind: Kind, sampling: dict[str, Any]) -> tuple[Method, ...]:
    """One token per step by DynaMo's loop and by transformers, each eager and compiled."""
    own, strict = f"{prefix}: own loop", {"verify": "strict", "num_heads": 1, **sampling}
    batched, same = kind == "greedy", own if kind == "greedy" else None
    theirs: dict[str, Any] = {"kind": kind, "one_token": True, "identical_to": same}
    return (
        dynamo(own, strict, batched=batched),
        Method(f"{prefix}: transformers", "transformers", sampling, batched=batched, **theirs),
        Method(f"{prefix}: transformers compiled", "compiled", sampling, **theirs),
        dynamo(f"{prefix}: own loop compiled", {**strict, **COMPILED}, identical_to=same),
    )


ONE_TOKEN = _one_token("one token", "greedy", {})
ONE_TOKEN_SAMPLED: tuple[Method, ...] = (
    *_one_token("one token, T=1", "sampled", SAMPLED),
    dynamo("one token, T=0.7: own loop", {"verify": "off", "num_heads": 1, "do_sample": True}),
    Method("one token, T=0.7: transformers", "transformers", PAPER, "sampled", lossless=False, one_token=True),
)
LOOKED_UP = 7  # drafts of our own loop from the text itself: eight tokens a forward
PROMPT_LOOKUP = Method(
    "transformers: prompt lookup",
    "transformers",
    {"prompt_lookup_num_tokens": LOOKUP},
    identical_to=ONE,
    ceiling=LOOKUP + 1,
)


def llama_cpp(gguf: Path) -> Method:
    """llama.cpp on the same model as a GGUF file, which may be quantised."""
    return Method(f"llama.cpp: {gguf.stem}", "llama.cpp", {"gguf": str(gguf)}, lossless=False, identical_to=ONE)


def heads(num_heads: int, *, off_heads: int, eps_b: float) -> list[Method]:
    """DynaMo's own modes at every number of heads.

    Args:
        num_heads: n of the model.
        off_heads: the most heads that `verify="off"` can use: what the tables hold, too.
        eps_b: the calibrated threshold, the model's own default; 0 is raced beside it.
    """

    def off(eps_b: float) -> dict[str, Any]:
        return {"verify": "off", "do_sample": True, "eps_b": eps_b}

    strict, sampled = {"verify": "strict"}, {"verify": "strict", **SAMPLED}
    every, last, tabled = range(2, num_heads + 1), (num_heads,), range(2, off_heads + 1)
    rows: list[tuple[str, dict[str, Any], Iterable[int], str, bool]] = [  # .., how many heads, suffix, in batches
        ("strict", strict, every, "", True),
        ("strict", strict | COMPILED, every, ", compiled", False),
        (f"budget {BUDGETS[-1]:g}", {"verify": BUDGETS[-1], **COMPILED}, last, ", compiled", False),
        ("strict sampled", sampled | COMPILED, last, ", compiled", False),
        (f"off, eps_b={eps_b:g}", off(eps_b) | COMPILED, tabled, ", compiled", False),
        ("strict", {**strict, "tree": 0}, last, ", chain", False),
        ("strict", {**strict, "prompt_lookup_num_tokens": LOOKED_UP}, last, ", prompt lookup", False),
        *((f"budget {budget:g}", {"verify": budget}, last, "", True) for budget in BUDGETS),
        ("strict sampled", sampled, every, "", False),
        *((f"off, eps_b={value:g}", off(value), tabled, "", True) for value in sorted({eps_b, 0.0}, reverse=True)),
    ]
    return [
        dynamo(
            f"DynaMo {name}, n={n}{suffix}",
            {**arguments, "num_heads": n},
            batched=batched,
            identical_to=ONE if name == "strict" else None,
        )
        for name, arguments, counts, suffix, batched in rows
        for n in counts
    ]


def synthetic(num_heads: int, probability: float) -> list[Method]:
    """DynaMo's loop whose drafts are accepted by chance: what steps cost, and no text that means anything."""
    rows: list[tuple[dict[str, Any], str, bool]] = [({}, "", True), (COMPILED, ", compiled", False)]
    return [
        dynamo(
            f"synthetic: {probability:g} of drafts accepted, n={n}{suffix}",
            {"verify": "strict", "tree": 0, "num_heads": n, SYNTHETIC: probability, **how},
            batched=batched,
            lossless=False,
        )
        for how, suffix, batched in rows
        for n in range(2, num_heads + 1)
    ]


def choose(methods: Sequence[Method], *, batch: int, sampled: bool = True, only: Iterable[str] = ()) -> list[Method]:
    """The methods that run at this batch size; if `only` has parts of names, those that match and all baselines.

    Sampled baselines stay only where another sampled method does. At more than one prompt at a time texts may differ by
    rounding alone, as shapes change; the counts of identical texts are still taken.
    """
    parts = list(only)
    chosen = [method for method in methods if method.batched or batch == 1]
    if batch > 1 and any(method.kind == "sampled" for method in chosen):  # their baselines
        chosen += [replace(method, batched=True) for method in methods if method.one_token and method.kind == "sampled"]
    if parts:
        chosen = [method for method in chosen if method.one_token or any(part in method.name for part in parts)]
    kinds = {method.kind for method in chosen if not method.one_token} | {"greedy"}
    return [method for method in chosen if method.kind in kinds and (sampled or method.kind == "greedy")]
