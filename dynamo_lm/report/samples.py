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
PROMPTS, DIALS = 3, 3  # shown


def read(file: Path, identity: str) -> list[dict[str, Any]]:
    """Every text of a completion run, with its arm's method, dial and temperature; none if there is no file.

    The file is JSON lines; a first line with "arms" says what the arms are, and of which model.

    Raises:
        InputError: a damaged line, or texts of another model than `identity`.
    """
    if not file.is_file():
        return []
    arms: dict[str, dict[str, Any]] = {}
    found = []
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
        found.append({key: arm.get(key) for key in ("method", "eps_b", "temperature", "role")} | entry)
    return found


def choose(texts: Sequence[dict[str, Any]], prompts: int, near: float | None) -> list[list[dict[str, Any]]]:
    """For some prompts, of the lowest seed: the base, the paper's method at a few dials from exact to fast, strict.

    near: a dial that must be among them, as far as it was measured.
    """
    dials = sorted({t["eps_b"] for t in texts if t["method"] == PAPER and t["eps_b"] is not None and t["eps_b"] < 1})
    wanted = sorted(
        {dials[0], min(dials, key=lambda e: abs(e - (0.5 if near is None else near))), dials[-1]} if dials else ()
    )
    chosen = []
    for prompt in range(min(prompts, PROMPTS)):
        mine = [t for t in texts if t["prompt"] == prompt]
        if not mine:
            continue
        seed = min(t["seed"] for t in mine)
        mine = [t for t in mine if t["seed"] == seed]
        base = [t for t in mine if t["arm"] == "base"] or [t for t in mine if t["method"] in ("base", None)][:1]
        strict = [t for t in mine if t["method"] == "strict" and max(t["step_sizes"], default=1) > 1][:1]
        dynamic = [t for e in reversed(wanted) for t in mine if t["method"] == PAPER and t["eps_b"] == e]
        chosen.append(base + strict + dynamic)
    return [texts for texts in chosen if texts]


def split(text: str, tokens: Sequence[int], step_sizes: Sequence[int], tokenizer: Any) -> list[list[Any]] | None:
    """[text, tokens] of every step, or None if the pieces do not spell `text`.

    A step that ends within a character is joined with the next one.
    """
    pieces: list[list[Any]] = []
    said, at, size = 0, 0, 0
    lead = len(text) - len(_decode(tokenizer, tokens))  # a leading space that some tokenizers drop
    if lead < 0:
        return None
    for step in step_sizes:
        at, size = at + step, size + step
        now = text[:lead] + _decode(tokenizer, tokens[:at])
        if now.endswith("\ufffd") and at < len(tokens):
            continue
        pieces.append([now[said:], size])
        said, size = len(now), 0
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
        said = []
        for entry in texts:
            parts = pieces.get(key(entry)) or []
            whole = "".join(text for text, _ in parts) == entry["text"]
            steps = [Step(text, size) for text, size in parts] if parts and whole else None
            sizes = entry["step_sizes"]
            tokens = sum(sizes)
            rate = f", {tokens / len(sizes):.2f} a step" if sizes else ""
            said.append(Text(_name(entry), f"{tokens} tokens in {len(sizes)} steps{rate}", entry["text"], steps))
        shown.append(Texts(prompts[texts[0]["prompt"]], said))
    return shown


def _name(entry: dict[str, Any]) -> str:
    if entry["method"] == PAPER and entry["eps_b"] is not None:
        return f"dynamic, eps_b {entry['eps_b']:g}"
    return {"base": "base, one token per step", "strict": "strict (the base's own distribution)"}.get(
        entry["arm"], entry["arm"]
    )


def _decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    return tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
