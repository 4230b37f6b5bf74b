"""Texts for a report: which completions to show, and which tokens of each came from one forward pass.

In: `completion.texts.jsonl` and, to split texts into steps, the tokenizer that wrote them. A split is kept only if its
pieces spell the text exactly.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynamo_lm.errors import InputError
from dynamo_lm.report.document import Step, Text, Texts

PAPER = "mask+Otsu+blur"
PROMPTS = 3  # shown


def read(file: Path, identity: str) -> list[dict[str, Any]]:
    """Every text of a completion run, with its arm's method, eps_b and temperature; none if there is no file.

    The file is JSON lines; a first line with "arms" says what the arms are, and of which model.

    Raises:
        InputError: a damaged line, or texts of another model than `identity`.
    """
    if not file.is_file():
        return []
    arms: dict[str, dict[str, Any]] = {}
    texts = []
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line.decode("utf-8"))
            if "arms" in entry:
                if entry.get("identity", identity) != identity:
                    raise InputError(f'"{file}" has texts of another model; keep one folder per model.')
                arms = {arm["name"]: arm for arm in entry["arms"]}
                continue
            arm = arms.get(entry["arm"], {})
            if not isinstance(entry["text"], str) or sum(entry["step_sizes"]) < 0 or int(entry["prompt"]) < 0:
                raise ValueError("text")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f'"{file}" is damaged in line {number}; delete it and measure again.') from error
        texts.append({key: arm.get(key) for key in ("method", "eps_b", "temperature", "role")} | entry)
    return texts


def choose(texts: Sequence[dict[str, Any]], prompts: int, near: float | None) -> list[list[dict[str, Any]]]:
    """For some prompts, of the lowest seed: the base, strict, and the paper's method at a few eps_b from exact to fast.

    near: an eps_b that must be among them, as far as it was measured.
    """
    measured = sorted({t["eps_b"] for t in texts if t["method"] == PAPER and t["eps_b"] is not None and t["eps_b"] < 1})
    middle = min(measured, key=lambda e: abs(e - (0.5 if near is None else near)), default=None)
    chosen = []
    for prompt in range(min(prompts, PROMPTS)):
        seed = min((t["seed"] for t in texts if t["prompt"] == prompt), default=None)
        arms = [t for t in texts if t["prompt"] == prompt and t["seed"] == seed]
        base = [t for t in arms if t["arm"] == "base"] or [t for t in arms if t["method"] in ("base", None)][:1]
        strict = [t for t in arms if t["method"] == "strict" and max(t["step_sizes"], default=1) > 1][:1]
        wanted = sorted({measured[0], middle, measured[-1]}, reverse=True) if measured else []
        chosen.append(base + strict + [t for e in wanted for t in arms if t["method"] == PAPER and t["eps_b"] == e])
    return [texts for texts in chosen if texts]


def split(text: str, tokens: Sequence[int], step_sizes: Sequence[int], tokenizer: Any) -> list[list[Any]] | None:
    """[text, tokens] of every step, or None if the pieces do not spell `text`.

    A step that ends within a character is joined with the next one.
    """
    pieces: list[list[Any]] = []
    start, at, size = 0, 0, 0
    lead = len(text) - len(_decode(tokenizer, tokens))  # a leading space that some tokenizers drop
    if lead < 0:
        return None
    for step in step_sizes:
        at, size = at + step, size + step
        now = text[:lead] + _decode(tokenizer, tokens[:at])
        if now.endswith("\ufffd") and at < len(tokens):
            continue
        pieces.append([now[start:], size])
        start, size = len(now), 0
    return pieces if "".join(piece for piece, _ in pieces) == text else None


def key(entry: dict[str, Any]) -> str:
    """A text's place in its run."""
    return f"{entry['arm']}|{entry['prompt']}|{entry['seed']}"


def blocks(
    chosen: Sequence[Sequence[dict[str, Any]]], prompts: Sequence[str], pieces: dict[str, list[list[Any]]]
) -> list[Texts]:
    """The chosen texts, split where `pieces` (by `key`) spell them."""
    shown = []
    for texts in chosen:
        completions = []
        for entry in texts:
            parts = pieces.get(key(entry)) or []
            whole = "".join(text for text, _ in parts) == entry["text"]
            steps = [Step(text, size) for text, size in parts] if parts and whole else None
            sizes = entry["step_sizes"]
            rate = f", {sum(sizes) / len(sizes):.2f} a step" if sizes else ""
            completions.append(Text(_name(entry), f"{sum(sizes)} tokens in {len(sizes)} steps{rate}", entry["text"], steps))
        shown.append(Texts(prompts[texts[0]["prompt"]], completions))
    return shown


def _name(entry: dict[str, Any]) -> str:
    if entry["method"] == PAPER and entry["eps_b"] is not None:
        return f"dynamic, eps_b {entry['eps_b']:g}"
    return {"base": "base, one token per step", "strict": "strict (the base's own distribution)"}.get(
        entry["arm"], entry["arm"]
    )


def _decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    return tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
