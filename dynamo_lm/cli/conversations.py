"""Choosing the conversations that `finetune` learns: the best of them, or with answers of the model's own.

Every step leaves a file of JSON lines in the run folder, and all that was slow is kept beside it, so that the same command
goes on where it stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import typer

from dynamo_lm.cli.judge_options import agree
from dynamo_lm.cli.progress import counting
from dynamo_lm.data.conversations import conversations
from dynamo_lm.errors import InputError
from dynamo_lm.evaluation.judges.filter import best, scores, turns
from dynamo_lm.files import write_text
from dynamo_lm.training.self_distill import Answerer, distill

if TYPE_CHECKING:
    from dynamo_lm.evaluation.judges.judges import Judge


def keep_best(sources: list[str], judge: Judge, keep: int, folder: Path, yes: bool, facts: dict[str, Any]) -> list[str]:
    """The file with the best conversations; every score is in `folder`/scores.jsonl."""
    records = [messages for _, messages in conversations(sources)]
    if hasattr(judge, "estimate"):
        items = [item for messages in records for item in turns(messages)]
        agree(judge.estimate(0, len(items), sum(len(p) + len(a) for p, a in items) / max(1, len(items))), yes)
    with counting() as say:
        values = scores(judge, records, progress=lambda done, total: say("judging", done, total))
    kept = best(values, keep)
    chosen = set(kept)
    _write(folder / "scores.jsonl", ({"number": i, "score": v, "kept": i in chosen} for i, v in enumerate(values)))
    scored = [value for value in values if value is not None]
    facts |= {
        "judge": judge.name, "judged": len(records), "without_score": len(records) - len(scored), "kept": keep,
        "lowest_score_kept": min(values[index] for index in kept),  # type: ignore[type-var]
    }  # fmt: skip
    typer.echo(f"dynamo-lm: {keep:,} of {len(records):,} conversations kept by {judge.name}. {judge.caveat}", err=True)
    return [_write(folder / "kept.jsonl", ({"messages": records[i], "score": values[i]} for i in kept))]


def distilled(
    sources: list[str],
    answerer: Answerer,
    tokenizer: Any,
    folder: Path,
    facts: dict[str, Any],
    *,
    share: float = 1.0,
    seed: int = 0,
    **options: Any,
) -> list[str]:
    """The file with the model's own answers; conversations whose answer is empty or has no room are left out.

    Args:
        share: of the conversations that are answered anew, chosen by the seed; the others keep the data's answers.
        options: of `distill`: longest and max_new_tokens.

    Raises:
        InputError: not one conversation has an answer.
    """
    given = [messages for _, messages in conversations(sources)]
    chosen = np.random.default_rng(seed).random(len(given)) < share
    questions = [messages for messages, anew in zip(given, chosen, strict=True) if anew]
    began = time.monotonic()
    with counting() as say:

        def progress(done: int, total: int, tokens: int) -> None:
            rate = tokens / max(time.monotonic() - began, 1e-9)
            left = f", about {_duration((time.monotonic() - began) * (total - done) / done)} left" if tokens else ""
            say("answering", done, total, f", {rate:,.0f} tokens/s{left}")

        answered = distill(
            answerer, tokenizer, questions, seed=seed, cache=folder / "answers.jsonl", progress=progress, **options
        )
    ended = [messages for messages in answered if messages is not None]
    facts |= {"distilled": len(ended), "left_out": len(answered) - len(ended), "distilled_by": answerer.name}
    if not ended:
        raise InputError(
            f"The model answered none of the {len(answered):,} conversations within {options['longest']} tokens, so it has "
            "nothing to learn from itself; give a larger --block-size, or tune it on the data's answers first."
        )
    typer.echo(
        f"dynamo-lm: {len(ended):,} of {len(given):,} conversations have answers of the model's own; "
        f"{len(answered) - len(ended):,} have none or no room and are left out.",
        err=True,
    )
    kept = [messages for messages, anew in zip(given, chosen, strict=True) if not anew]
    return [_write(folder / "distilled.jsonl", ({"messages": messages} for messages in [*ended, *kept]))]


def _duration(seconds: float) -> str:
    """Hours and minutes."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def _write(file: Path, records: Iterable[dict[str, Any]]) -> str:
    """Writes JSON lines, whole or not at all; a file that says the same already is left alone, times included."""
    content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    if not file.is_file() or file.read_text(encoding="utf-8") != content:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, content)
    return str(file)


def account(facts: dict[str, Any], longest: int) -> str:
    """What became of the conversations, in one sentence."""
    left_out = [
        f"{facts[key]:,} {why}"
        for key, why in (
            ("too_long", f"longer than {longest:,} tokens, left out"),
            ("cut", f"longer than {longest:,} tokens, cut after an earlier answer"),
            ("empty", "with an empty answer, left out"),
        )
        if facts[key]
    ]
    what = f"{facts['conversations']:,} conversations, {facts['learned_tokens']:,} tokens of answers"
    return f"{what}; {'; '.join(left_out)}." if left_out else f"{what}."
