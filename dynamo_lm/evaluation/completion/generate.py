"""The sentence-completion protocol, first half: every prompt continued by every arm (method.md section 5).

An arm is a way of decoding. The arms of a prompt and seed run one after another in random order, so that their seconds can
be compared, and every text is written to a file at once, so that a stopped run continues. Knows no judge.
"""

from __future__ import annotations

import glob
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dynamo_lm.backbone.token_limits import end_tokens
from dynamo_lm.data.chat_template import encode_chat
from dynamo_lm.errors import InputError
from dynamo_lm.evaluation import results_file
from dynamo_lm.jsonl_cache import JsonlLog
from dynamo_lm.model.modeling import DynaMoForCausalLM

PAPER = "mask+Otsu+blur"
METHODS: dict[str, dict[str, Any]] = {  # Algorithm 1 and the paper's Table 9
    PAPER: {},
    "mask+Otsu": {"blur": False},
    "mask": {"otsu": False, "blur": False},
    "mask^0.5+Otsu+blur": {"alpha_c": 0.5},
    "Otsu+blur": {"alpha_c": 0.0},
}
STRICT = "strict"
TEMPERATURE, TOP_K, PENALTY = 0.7, 50, 1.1  # the paper's sampling, of the baseline, too
LADDER = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0)  # temperatures of the base that are tried for matched diversity
BASELINE = "one token per step, sampled as Algorithm 1 does at m = 1 (top-k 50, temperature 0.7, repetition penalty 1.1)"
COMPARED_WITH = ("base", "again", "ladder")  # roles of the arms that candidates meet
APART = 500_000  # added to the seed of the second, independent samples of the base


@dataclass(frozen=True)
class Arm:
    """A way of decoding."""

    name: str
    role: str  # "base", "again" (independent samples of the base), "ladder", "candidate", "own base" (of strict decoding)
    method: str  # of METHODS, or STRICT, or "base"
    arguments: dict[str, Any]  # of `generate`
    eps_b: float | None = None
    temperature: float | None = None


@dataclass(frozen=True)
class Text:
    """One completion and what it cost."""

    arm: str
    prompt: int  # index
    seed: int  # 0 .. seeds - 1
    text: str  # what is new
    tokens: list[int]
    step_sizes: list[int]
    forwards: int
    seconds: float
    regret: float  # nats, summed over `unverified` tokens
    unverified: int


def arms(
    num_heads: int, methods: Sequence[str], grid: Sequence[float], *, strict: bool, ladder: Sequence[float] = LADDER
) -> list[Arm]:
    """The base, its second sample, its ladder of temperatures, every method at every eps_b, and strict decoding."""
    single = {"verify": "off", "do_sample": True, "num_heads": 1}
    result = [
        Arm("base", "base", "base", single, temperature=TEMPERATURE),
        Arm("base again", "again", "base", single, temperature=TEMPERATURE),
    ]
    for temperature in ladder:
        if temperature != TEMPERATURE:
            arguments = single | {"temperature": temperature}
            result.append(Arm(f"base, temperature {temperature:g}", "ladder", "base", arguments, temperature=temperature))
    for method in methods:
        for eps_b in grid:
            arguments = {"verify": "off", "do_sample": True, "num_heads": num_heads, "eps_b": eps_b} | METHODS[method]
            result.append(Arm(f"{method}, eps_b {eps_b:g}", "candidate", method, arguments, eps_b=eps_b))
    if strict:  # its own baseline: transformers' repetition penalty works on logits, Algorithm 1's on probabilities
        drawn = {"verify": "strict", "do_sample": True, "temperature": TEMPERATURE, "top_k": TOP_K}
        drawn |= {"repetition_penalty": PENALTY}
        result.append(Arm("strict, one token", "own base", STRICT, drawn | {"num_heads": 1}, temperature=TEMPERATURE))
        result.append(Arm("strict", "candidate", STRICT, drawn | {"num_heads": num_heads}, temperature=TEMPERATURE))
    return result


def write_texts(
    model: DynaMoForCausalLM,
    tokenizer: Any,
    prompts: Sequence[str],
    chosen: Sequence[Arm],
    file: Path,
    *,
    identity: str,
    seeds: int,
    seed: int,
    max_new_tokens: int,
    base: DynaMoForCausalLM | None = None,
    chat: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    part: int = 0,
    parts: int = 1,
) -> list[Text]:
    """Continues every prompt `seeds` times with every arm, one text at a time; texts that `file` holds already are kept.

    Several processes share the work: each continues its part of the prompts and seeds, with all arms, and the parts but the
    first go into files beside `file`. A call without parts moves those texts into `file`.

    Args:
        file: JSON lines: a first one that describes the run, then a text each.
        identity: of the model (`results_file.describe`).
        base: the model of the arms that candidates are compared with, if it is not `model` at one token per step.
        chat: ask each prompt as a user's message, through the tokenizer's chat template.
        progress: called with the number of finished texts and of all of this part.
        part, parts: which part of how many to write.

    Raises:
        InputError: the file belongs to a run with another model, prompts or options; a prompt that cannot be continued.
    """
    head = {
        "identity": identity,
        "prompts": list(prompts),
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "arms": [asdict(arm) for arm in chosen],
    }
    if base is not None:
        head["base"] = results_file.identity(base)
    if chat:
        head["chat_template"] = tokenizer.chat_template
    log = JsonlLog(_part_file(file, part))
    done = {(text.arm, text.prompt, text.seed): text for text in _resume(log, head)}
    for other in [file, *sorted(file.parent.glob(f"{glob.escape(file.name)}.part-*"))]:
        others = JsonlLog(other)
        if other == log.file or not others.records:  # that of a process that just begins
            continue
        new = [text for text in _resume(others, head) if (text.arm, text.prompt, text.seed) not in done]
        done |= {(text.arm, text.prompt, text.seed): text for text in new}
        if parts == 1:
            for text in new:
                log.append(asdict(text))
            other.unlink()
    encoded = [_encode(tokenizer, prompt, chat).to(model.device) for prompt in prompts]
    writers = {arm.name: base if base is not None and arm.role in COMPARED_WITH else model for arm in chosen}
    if any(ids.shape[1] == 0 for ids in encoded):
        raise InputError("A prompt is empty; give a few words to begin with.")
    # For all arms, whichever model writes.
    ends = {"eos_token_id": end_tokens(model.generation_config, tokenizer) or None}
    pairs = [(number, prompt) for number in range(seeds) for prompt in range(len(prompts))][part::parts]
    pending = sum((arm.name, prompt, number) not in done for number, prompt in pairs for arm in chosen)
    total, fresh = len(pairs) * len(chosen), True
    for number, prompt in pairs:
        ids, order = encoded[prompt], list(chosen)
        random.Random(f"{seed} {number} {prompt}").shuffle(order)
        for arm in order:
            if (arm.name, prompt, number) in done:
                continue
            if fresh:  # first calls pay for what is set up once
                for each in chosen:
                    writers[each.name].generate(ids, max_new_tokens=4, seed=0, **each.arguments, **ends)
                fresh = False
            options = {"max_new_tokens": max_new_tokens, **ends}
            text = _complete(writers[arm.name], tokenizer, ids, arm, prompt, number, seed, **options)
            done[arm.name, prompt, number] = text
            log.append(asdict(text))
            pending -= 1
            progress(total - pending, total)
    return list(done.values())


def _part_file(file: Path, part: int) -> Path:
    return file if part == 0 else file.with_name(f"{file.name}.part-{part}")


def _encode(tokenizer: Any, prompt: str, chat: bool) -> torch.Tensor:
    """(1, tokens)"""
    if chat:
        return torch.tensor([encode_chat(tokenizer, [{"role": "user", "content": prompt}])])
    return tokenizer(prompt, return_tensors="pt").input_ids


def _complete(
    model: DynaMoForCausalLM,
    tokenizer: Any,
    ids: torch.Tensor,
    arm: Arm,
    prompt: int,
    number: int,
    seed: int,
    **options: Any,
) -> Text:
    """One text. Arms share their random numbers, so that what differs is the arm; the base's second sample has its own."""
    seed = seed + 1000 * prompt + number + (APART if arm.role == "again" else 0)
    began = time.perf_counter()
    output = model.generate(ids, seed=seed, return_dict_in_generate=True, **arm.arguments, **options)
    seconds = time.perf_counter() - began
    counted, tokens = output.statistics[0], output.sequences[0, ids.shape[1] :].tolist()
    before, whole = (tokenizer.decode(sequence[0], skip_special_tokens=True) for sequence in (ids, output.sequences))
    return Text(
        arm=arm.name,
        prompt=prompt,
        seed=number,
        text=whole[len(before) :],
        tokens=tokens,
        step_sizes=counted.step_sizes,
        forwards=counted.forwards,
        seconds=seconds,
        regret=counted.regret,
        unverified=counted.unverified,
    )


def _resume(log: JsonlLog, head: dict[str, Any]) -> list[Text]:
    """The texts that `log` holds of the run that `head` describes; begins the log if it is empty."""
    if not log.records and not log.damaged:
        log.append(head)
        return []
    try:
        if log.damaged:
            raise ValueError("a line is not JSON")
        before, texts = log.records[0], [Text(**record) for record in log.records[1:]]
    except (ValueError, TypeError) as error:
        raise InputError(f'"{log.file}" is damaged; delete it to begin again.') from error
    different = next((key for key in head if before.get(key) != head[key]), "" if before == head else "settings")
    if different:
        what = "model" if different == "identity" else different.replace("_", " ")
        raise InputError(f'"{log.file}" holds a run with another choice of {what}; repeat its options or use another --out.')
    return texts
