"""The best of a set of conversations by a judge's scores (the paper keeps 9,229 of Alpaca's pairs). Knows no tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dynamo_lm.data.conversations import Messages
from dynamo_lm.errors import InputError
from dynamo_lm.evaluation.judges.judges import Item, Judge


def turns(messages: Messages) -> list[Item]:
    """(all messages before it, the answer) for each answer; a single question stands as it is."""
    items: list[Item] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = messages[:index]
        if len(before) == 1:
            prompt = before[0]["content"]
        else:
            prompt = "\n\n".join(f"{earlier['role'].capitalize()}: {earlier['content']}" for earlier in before)
        items.append((prompt + "\n\n" if prompt else "", message["content"]))
    return items


def scores(
    judge: Judge, conversations: Sequence[Messages], *, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[float | None]:
    """One number for each conversation, the mean over its answers; None if one of them cannot be judged.

    A reference model's is the log-likelihood of an answer in nats per byte, given what precedes it: it knows whether an
    answer reads like one, not whether it is true. Any other judge gives 1 to 10. Comparable between conversations judged by
    one judge.
    """
    items = [turns(messages) for messages in conversations]
    flat = [item for answers in items for item in answers]
    ask = getattr(judge, "log_likelihoods", judge.singles)
    values = iter(ask(flat, progress=lambda done: progress(done, len(flat))))
    means: list[float | None] = []
    for answers in items:
        each = [next(values) for _ in answers]
        judged = [value for value in each if value is not None]
        means.append(sum(judged) / len(judged) if judged and len(judged) == len(each) else None)
    return means


def best(values: Sequence[float | None], keep: int) -> list[int]:
    """The indices of the `keep` highest scores, rising; of equal ones the first.

    Raises:
        InputError: fewer than that have a score.
    """
    if keep < 1:
        raise InputError(f"--keep is {keep}; give 1 or more.")
    judged = [index for index, value in enumerate(values) if value is not None]
    if len(judged) < keep:
        raise InputError(f"--keep is {keep:,}, but only {len(judged):,} of {len(values):,} conversations have a score.")
    return sorted(sorted(judged, key=lambda index: (-(values[index] or 0.0), index))[:keep])
