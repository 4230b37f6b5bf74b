"""The best of a set of conversations, as a judge sees them (the paper keeps 9,229 of Alpaca's pairs).

Knows the judges of `dynamo_lm.evaluation` and no tokens. A judge keeps what it said on disk, so that a stopped run goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dynamo_lm.data.conversations import Messages
from dynamo_lm.errors import InputError
from dynamo_lm.evaluation.judges.judges import Item, Judge


def turns(messages: Messages) -> list[Item]:
    """(all that was said before, the answer) for each answer; a single question stands as it is."""
    found: list[Item] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = messages[:index]
        if len(before) == 1:
            prompt = before[0]["content"]
        else:
            prompt = "\n\n".join(f"{said['role'].capitalize()}: {said['content']}" for said in before)
        found.append((prompt + "\n\n" if prompt else "", message["content"]))
    return found


def scores(
    judge: Judge, found: Sequence[Messages], *, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[float | None]:
    """One number for each conversation, the mean over its answers; None if one of them cannot be judged.

    A reference model's is the log-likelihood of an answer in nats per byte, given what was said before: it knows whether an
    answer reads like one, not whether it is true. Any other judge gives 1 to 10. Comparable between conversations judged by
    one judge.
    """
    items = [turns(messages) for messages in found]
    flat = [item for answers in items for item in answers]
    ask = getattr(judge, "log_likelihoods", judge.singles)
    values = iter(ask(flat, progress=lambda done: progress(done, len(flat))))
    means: list[float | None] = []
    for answers in items:
        mine = [next(values) for _ in answers]
        known = [value for value in mine if value is not None]
        means.append(sum(known) / len(known) if known and len(known) == len(mine) else None)
    return means


def best(found: Sequence[float | None], keep: int) -> list[int]:
    """The indices of the `keep` highest scores, rising; of equal ones the first.

    Raises:
        InputError: fewer than that have a score.
    """
    if keep < 1:
        raise InputError(f"--keep is {keep}; give 1 or more.")
    judged = [index for index, value in enumerate(found) if value is not None]
    if len(judged) < keep:
        raise InputError(f"--keep is {keep:,}, but only {len(judged):,} of {len(found):,} conversations have a score.")
    return sorted(sorted(judged, key=lambda index: (-(found[index] or 0.0), index))[:keep])
