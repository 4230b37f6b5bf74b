"""Self-distillation: the questions of a set of conversations, with answers by the model that is to be tuned.

Heads that learn to predict what their base says, and not what somebody else said, agree with it more often (Medusa,
arXiv 2401.10774, section 2.3). Answers are decoded strictly, so they are the base model's own, and each is on disk as soon
as it ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dynamo_lm.backbone.token_limits import token_ids
from dynamo_lm.data.chat_template import encode_chat, end_of_turn
from dynamo_lm.data.conversations import Messages
from dynamo_lm.decoding.batch import Batch
from dynamo_lm.decoding.settings import resolve
from dynamo_lm.errors import InputError
from dynamo_lm.jsonl_cache import JsonlCache, key_of
from dynamo_lm.model.checkpoint import identity
from dynamo_lm.model.modeling import DynaMoForCausalLM


def distill(
    model: DynaMoForCausalLM,
    tokenizer: Any,
    found: Sequence[Messages],
    *,
    longest: int,
    max_new_tokens: int,
    temperature: float = 0.7,
    seed: int = 0,
    batch_size: int = 16,
    cache: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Messages | None]:
    """The conversations with every answer replaced by the model's: a later question follows the model's own answers.

    Args:
        longest: tokens of a conversation, answer included.
        max_new_tokens: of an answer.
        temperature: 0 for the likeliest token.
        seed: of all random numbers; an answer depends on it and on its prompt, not on the batch.
        cache: file of the answers (a `JsonlCache`), so that a stopped run resumes.
        progress: is told how many answers there are, of how many.

    Returns:
        None where an answer was empty, did not end within its limit or had no room.

    Raises:
        InputError: a temperature below 0.
    """
    if temperature < 0:
        raise InputError(f"--distill-temperature is {temperature}; give 0 or more.")
    answers = JsonlCache(cache)
    who = identity(model)
    ends = token_ids([end_of_turn(tokenizer), tokenizer.eos_token_id])
    widest = model.num_heads if model.cooccurrence is None else min(model.num_heads, model.cooccurrence.order)
    results: list[Messages | None] = [[] for _ in found]
    total = sum(message["role"] == "assistant" for messages in found for message in messages)
    done = 0
    waiting = deque(range(len(found)))
    batch = Batch(model, widest)
    keys: dict[int, str] = {}  # by conversation that is in the batch

    def advance(index: int) -> None:
        """Adds to a conversation what is known, up to an answer that must be decoded."""
        nonlocal done
        while (said := results[index]) is not None and len(said) < len(found[index]):
            message = found[index][len(said)]
            if message["role"] != "assistant":
                said.append(message)
                continue
            prompt = encode_chat(tokenizer, said)
            room = min(max_new_tokens, longest - len(prompt))
            key = key_of(who, prompt, room, temperature, seed)
            if room >= 1 and key not in answers:
                how = {"num_heads": widest, "temperature": temperature}
                options = resolve(model, how, max_new_tokens=room, sample=temperature > 0, end_tokens=ends)
                batch.join(prompt, options, seed=int(key[:12], 16), number=index)
                keys[index] = key
                return
            text = answers[key] if room >= 1 else None
            remaining = sum(later["role"] == "assistant" for later in found[index][len(said) :])
            done += 1 if text else remaining
            progress(done, total)
            if text:
                said.append({"role": "assistant", "content": text})
            else:
                results[index] = None

    while waiting or batch.running:
        while waiting and len(batch.running) < batch_size:
            advance(waiting.popleft())
        for row in batch.step() if batch.running else []:
            if row.finished is None:
                continue
            text = tokenizer.decode(row.new_tokens, skip_special_tokens=True).strip()
            answers.put(keys.pop(row.number), text if row.finished == "stop" and text else None)
            advance(row.number)
    return results
