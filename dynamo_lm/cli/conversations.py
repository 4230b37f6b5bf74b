"""Choosing the conversations that `finetune` learns: the best of them, or with answers of the model's own.

Every step leaves a file of JSON lines in the run folder, and all that was slow is kept beside it, so that the same command
goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dynamo_lm.cli.judge_options import agree
from dynamo_lm.cli.progress import counting
from dynamo_lm.data.conversations import conversations
from dynamo_lm.errors import InputError
from dynamo_lm.evaluation.judges.filter import best, scores, turns
from dynamo_lm.files import write_text
from dynamo_lm.training.self_distill import distill

if TYPE_CHECKING:
    from dynamo_lm.data.conversations import Messages
    from dynamo_lm.evaluation.judges.judges import Judge
    from dynamo_lm.model.modeling import DynaMoForCausalLM


def keep_best(sources: list[str], judge: Judge, keep: int, folder: Path, yes: bool, facts: dict[str, Any]) -> list[str]:
    """The file with the best conversations; every score is in `folder`/scores.jsonl."""
    found = [messages for _, messages in conversations(sources)]
    if hasattr(judge, "estimate"):
        items = [item for messages in found for item in turns(messages)]
        agree(judge.estimate(0, len(items), sum(len(p) + len(a) for p, a in items) / max(1, len(items))), yes)
    with counting() as say:
        values = scores(judge, found, progress=lambda done, total: say("judging", done, total))
    kept = best(values, keep)
    chosen = set(kept)
    _write(folder / "scores.jsonl", ({"number": i, "score": v, "kept": i in chosen} for i, v in enumerate(values)))
    known = [value for value in values if value is not None]
    facts |= {
        "judge": judge.name, "judged": len(found), "without_score": len(found) - len(known), "kept": keep,
        "lowest_score_kept": min(values[index] for index in kept),  # type: ignore[type-var]
    }  # fmt: skip
    typer.echo(f"dynamo-lm: {keep:,} of {len(found):,} conversations kept by {judge.name}. {judge.caveat}", err=True)
    return [_write(folder / "kept.jsonl", ({"messages": found[i], "score": values[i]} for i in kept))]


def distilled(
    sources: list[str],
    model: DynaMoForCausalLM,
    tokenizer: Any,
    folder: Path,
    facts: dict[str, Any],
    **options: Any,
) -> list[str]:
    """The file with the model's own answers; those that did not end are left out."""
    asked = [messages for _, messages in conversations(sources)]
    with counting() as say:
        found = distill(
            model.eval(), tokenizer, asked,
            cache=folder / "answers.jsonl", progress=lambda done, total: say("answering", done, total), **options,
        )  # fmt: skip
    ended: list[Messages] = [messages for messages in found if messages is not None]
    unfinished = len(found) - len(ended)
    facts |= {"distilled": len(ended), "unfinished": unfinished, "distill_temperature": options["temperature"]}
    if not ended:
        raise InputError(
            f"None of the model's {len(found):,} answers ended within {options['max_new_tokens']} tokens, so it has nothing "
            "to learn from itself; tune it on the data's answers first."
        )
    typer.echo(
        f"dynamo-lm: {len(ended):,} of {len(found):,} conversations have answers of the model's own; {unfinished:,} did not "
        "end and are left out.",
        err=True,
    )
    return [_write(folder / "distilled.jsonl", ({"messages": messages} for messages in ended))]


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
            ("cut", f"longer than {longest:,} tokens, cut behind an earlier answer"),
            ("empty", "with an empty answer, left out"),
        )
        if facts[key]
    ]
    what = f"{facts['conversations']:,} conversations, {facts['learned_tokens']:,} tokens of answers"
    return f"{what}; {'; '.join(left_out)}." if left_out else f"{what}."
