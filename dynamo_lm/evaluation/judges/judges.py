"""Judges of completions: which of two texts is better, how good a single text is, and whether a judge can tell at all.

A judge is anything with the methods of `Judge`. `ReferenceJudge` needs no network: an independently trained language model
prefers the likelier text. `dynamo_lm.evaluation.judges.endpoint` asks a model at a URL. `sanity` measures whether a judge's
verdicts mean anything on the texts given; what follows from that is up to the caller.
"""

from __future__ import annotations

import base64
import bisect
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dynamo_lm.backbone.base_model import fingerprint, load_base
from dynamo_lm.data.token_store import tokenizer_fingerprint
from dynamo_lm.errors import InputError
from dynamo_lm.evaluation.judges.likelihoods import Reader, Text
from dynamo_lm.jsonl_cache import JsonlCache, key_of
from dynamo_lm.model.loading import DTYPES, choose_device, open_tokenizer, resolve
from dynamo_lm.model.modeling import DynaMoForCausalLM

Verdict = int  # 1: the first is better, 0: tie, -1: the second is better
Item = tuple[str, str]  # a prompt and its completion
Progress = Callable[[int], None]  # called with the number of items done

SHUFFLED_AT_LEAST = 0.8  # the lower bound of the share of texts that must beat their own shuffled words
SAME_WITHIN = 0.1  # how far from one half the base model may be against itself before the judge is called partial
UNUSABLE_AT_MOST = 0.2  # the share of pairs without a verdict


@dataclass(frozen=True)
class Pair:
    """Two completions of one prompt."""

    prompt: str
    first: str
    second: str


class Judge(Protocol):
    """Who compares and scores completions."""

    name: str  # such as "reference:gemma-3-270m" or "endpoint:gpt-4o-mini"
    caveat: str  # what it can and cannot see, printed in every report

    def pairs(self, items: Sequence[Pair], *, progress: Progress = lambda done: None) -> list[Verdict | None]:
        """A verdict for each pair; None: no usable one."""
        ...

    def singles(self, items: Sequence[Item], *, progress: Progress = lambda done: None) -> list[float | None]:
        """A score from 1 to 10 for each (prompt, completion); None: no usable one."""
        ...


# ---------------------------------------------------------------------- can it judge?


def sanity(judge: Judge, base: Sequence[Item], again: Sequence[Item], *, seed: int) -> dict[str, Any]:
    """Two questions whose answers are known: text against its own words shuffled, and the base model against itself.

    A judge that has a pool to score against (`set_pool`) and none yet gets these texts.

    Args:
        base: (prompt, completion) by the base model; texts of fewer than two different words are not shuffled.
        again: an independent sample, `again[i]` for the same prompt as `base[i]`.
        seed: of the shuffling and of which side the real text is shown on.

    Returns:
        {"shuffled": COUNTS, "same": COUNTS, "useful": bool, "reason": one sentence}, COUNTS being wins, ties and losses of
        the real text or of `base`, "unusable" (no verdict), "share" (wins and half the ties over all verdicts) and its 95 %
        Wilson "interval"; both None without verdicts. Useful means: the lower bound of the shuffled share is above 0.8 (so
        16 texts at least), the same share is within 0.1 of one half or its interval holds one half, and at most one pair
        in five is without a verdict.

    Raises:
        InputError: the samples do not answer the same prompts.
    """
    if [prompt for prompt, _ in base] != [prompt for prompt, _ in again]:
        raise InputError("The two samples of the base model answer different prompts; sample the same prompts twice.")
    if hasattr(judge, "set_pool") and not judge.pool:  # type: ignore[attr-defined]
        judge.set_pool([*base, *again])
    rng = random.Random(seed)
    questions, signs = [], []
    for prompt, text in base:
        mixed = shuffle_words(text, rng)
        if mixed is None:
            continue
        signs.append(rng.choice((1, -1)))  # a judge that always says "the first" must not pass
        questions.append(Pair(prompt, text, mixed) if signs[-1] == 1 else Pair(prompt, mixed, text))
    verdicts = judge.pairs(questions)
    shuffled = _counts([None if v is None else v * sign for v, sign in zip(verdicts, signs, strict=True)])
    # The base is always shown first, so that a preference for a side shows.
    same = _counts(judge.pairs([Pair(prompt, a, b) for (prompt, a), (_, b) in zip(base, again, strict=True)]))
    reason = _objection(shuffled, same)
    return {"shuffled": shuffled, "same": same, "useful": reason is None, "reason": reason or _praise(shuffled, same)}


def shuffle_words(text: str, rng: random.Random) -> str | None:
    """The words of `text` in another order, the white space where it was; None if there is no other order."""
    parts = re.split(r"(\s+)", text)
    places = [index for index, part in enumerate(parts) if part and not part.isspace()]
    words = [parts[index] for index in places]
    if len(set(words)) < 2:
        return None
    mixed = words
    while mixed == words:
        mixed = rng.sample(words, len(words))
    for index, word in zip(places, mixed, strict=True):
        parts[index] = word
    return "".join(parts)


def wilson(successes: float, trials: int, z: float = 1.96) -> list[float] | None:
    """The 95 % score interval of a share (Wilson 1927), [low, high]; None without trials. Ties may count as halves."""
    if trials == 0:
        return None
    share, square = successes / trials, z * z / trials
    middle = (share + square / 2) / (1 + square)
    half = z * math.sqrt(share * (1 - share) / trials + square / trials / 4) / (1 + square)
    return [max(0.0, middle - half), min(1.0, middle + half)]


def _counts(verdicts: Sequence[Verdict | None]) -> dict[str, Any]:
    wins, ties, losses = (verdicts.count(value) for value in (1, 0, -1))
    trials = wins + ties + losses
    share = (wins + ties / 2) / trials if trials else None
    counts = {"wins": wins, "ties": ties, "losses": losses, "unusable": len(verdicts) - trials}
    return counts | {"share": share, "interval": wilson(wins + ties / 2, trials)}


def _objection(shuffled: dict[str, Any], same: dict[str, Any]) -> str | None:
    """Why the judge is useless on these texts, in one sentence, or None."""
    for name, counts in (("shuffled words", shuffled), ("two samples of the base model", same)):
        pairs = counts["wins"] + counts["ties"] + counts["losses"] + counts["unusable"]
        if counts["interval"] is None or counts["unusable"] > UNUSABLE_AT_MOST * pairs:
            return f"It gave no usable verdict for {counts['unusable']} of {pairs} pairs of {name}."
    low, high = shuffled["interval"]
    if high <= SHUFFLED_AT_LEAST or shuffled["share"] <= SHUFFLED_AT_LEAST:
        return f"It prefers text over its own shuffled words in {_percent(shuffled)} only."
    if low <= SHUFFLED_AT_LEAST:
        number = shuffled["wins"] + shuffled["ties"] + shuffled["losses"]
        return f"With {number} texts its preference over shuffled words, {_percent(shuffled)}, is too uncertain; take more."
    low, high = same["interval"]
    if not low <= 0.5 <= high and abs(same["share"] - 0.5) > SAME_WITHIN:
        return f"It prefers one of two samples of the same model in {_percent(same)}, so it has a favourite side."
    return None


def _praise(shuffled: dict[str, Any], same: dict[str, Any]) -> str:
    return (
        f"It prefers text over its own shuffled words in {_percent(shuffled)} and one sample of the base model over another "
        f"in {_percent(same)}."
    )


def _percent(counts: dict[str, Any]) -> str:
    low, high = counts["interval"]
    return f"{counts['share']:.0%} ({low:.0%} to {high:.0%})"


# ---------------------------------------------------------------------- a reference language model


class ReferenceJudge:
    """Prefers the completion that a reference language model finds likelier, by mean log-likelihood per byte.

    Per byte and not per token, so that the number does not depend on whose tokenizer cut the text; comparable between texts
    judged by one reference.
    """

    caveat = (
        "A likelihood judge sees whether words, grammar and story run on as text usually does. It cannot see truth, depth, "
        "creativity or whether a question was answered, and it prefers dull, repetitive text: read it beside the diversity, "
        "against the base model at matched diversity."
    )

    def __init__(
        self,
        model_name_or_path: str,
        *,
        name: str | None = None,
        tie: float = 0.02,
        batch_size: int = 16,
        device: str = "auto",
        dtype: str = "float32",
        cache: Path | None = None,
    ):
        """Opens the reference.

        Args:
            model_name_or_path: a causal language model in Hugging Face's format with a fast tokenizer.
            name: what reports call it, by default the last part of its name.
            tie: differences below this are ties, nats per byte.
            batch_size: texts a forward pass.
            dtype: of the weights; "float32" is fastest on most CPUs.
            cache: file of the log-likelihoods (a `JsonlCache`), so that a stopped run resumes.

        Raises:
            InputError: no such model or tokenizer, or one that is not a causal language model; options out of range.
        """
        if not (math.isfinite(tie) and tie >= 0):
            raise InputError(f"The judge's tie is {tie}; give 0 or more nats per byte.")
        if batch_size < 1:
            raise InputError(f"The judge's batch size is {batch_size}; give 1 or more.")
        if dtype not in DTYPES:
            raise InputError(f'The judge\'s dtype is "{dtype}"; give one of {", ".join(DTYPES)}.')
        where = choose_device(device)
        path = resolve(str(model_name_or_path))
        if Path(path).exists() and not (Path(path) / "config.json").is_file():
            raise InputError(f'The judge "{path}" is not a model directory (no config.json).')
        model: Any = load_base(path, dtype=dtype)
        model = model.base if isinstance(model, DynaMoForCausalLM) else model
        model.to(where).eval()
        tokenizer = open_tokenizer(path, vocab_size=len(model.get_input_embeddings().weight))
        if not tokenizer.is_fast:
            raise InputError(f'The tokenizer of the judge "{path}" has no offsets; use a reference with a tokenizer.json.')
        self.name = f"reference:{name or Path(path).name}"
        self.tie, self.batch_size = tie, batch_size
        self.pool: dict[str, list[float]] = {}  # by prompt: the base model's log-likelihoods, rising
        self._tokenizer = tokenizer
        self._reader = Reader(model, path)
        self._cache = JsonlCache(cache)
        self._identity = [_weights(model), str(model.dtype), tokenizer_fingerprint(tokenizer)]

    def pairs(self, items: Sequence[Pair], *, progress: Progress = lambda done: None) -> list[Verdict | None]:
        """The likelier of two wins; less than `tie` apart is a tie; an empty completion has no likelihood, so None."""
        texts = [item for pair in items for item in ((pair.prompt, pair.first), (pair.prompt, pair.second))]
        values = self.log_likelihoods(texts, progress=lambda done: progress(done // 2))
        return [self._compare(first, second) for first, second in zip(values[::2], values[1::2], strict=True)]

    def singles(self, items: Sequence[Item], *, progress: Progress = lambda done: None) -> list[float | None]:
        """1 + 9 x the share of the base model's completions of the same prompt that this one beats, ties counting half.

        The base model's own mean is therefore 5.5. None for an empty completion or a prompt that is not in the pool.
        """
        return [
            self._standing(value, self.pool.get(prompt, []))
            for (prompt, _), value in zip(items, self.log_likelihoods(items, progress=progress), strict=True)
        ]

    def set_pool(self, base: Sequence[Item]) -> None:
        """Makes `base`, completions by the base model, what single completions are scored against."""
        self.pool = {}
        for (prompt, _), value in zip(base, self.log_likelihoods(base), strict=True):
            if value is not None:
                bisect.insort(self.pool.setdefault(prompt, []), value)

    def log_likelihoods(self, items: Sequence[Item], *, progress: Progress = lambda done: None) -> list[float | None]:
        """Mean log-likelihood of each completion given its prompt, nats per UTF-8 byte of the completion.

        Prompt and completion are tokenized as one text; every token that has a character of the completion is scored.
        None: an empty completion, or one longer than the reference's context.
        """
        self._compute(items, progress)
        return [self._cache[self._key(item)] for item in items]

    def features(self, items: Sequence[Item | str], *, progress: Progress = lambda done: None) -> np.ndarray:
        """Mean final hidden state over each completion's tokens, scaled to length 1, (items, hidden) in float32; for MAUVE.

        Free for an item whose log-likelihood was computed; a plain text is a completion of an empty prompt. Zeros where
        `log_likelihoods` has None.
        """
        texts = [("", item) if isinstance(item, str) else item for item in items]
        self._compute(texts, progress)
        features = np.zeros((len(texts), self._reader.width), np.float32)
        for feature, item in zip(features, texts, strict=True):
            stored = self._cache[self._feature_key(item)]
            if stored is not None:
                feature[:] = np.frombuffer(base64.b64decode(stored), np.float16)
        return features

    def _compare(self, first: float | None, second: float | None) -> Verdict | None:
        if first is None or second is None:
            return None
        return 0 if abs(first - second) < self.tie or first == second else 1 if first > second else -1

    def _standing(self, value: float | None, pool: list[float]) -> float | None:
        if value is None or not pool:
            return None
        return 1 + 9 * sum((1 + (self._compare(value, other) or 0)) / 2 for other in pool) / len(pool)

    def _key(self, item: Item) -> str:
        return key_of(*self._identity, "log-likelihood", *item)

    def _feature_key(self, item: Item) -> str:
        return key_of(*self._identity, "feature", *item)

    def _compute(self, items: Sequence[Item], progress: Progress) -> None:
        """Fills the cache for `items`, longest first, so that a batch has little padding and memory fails early."""
        texts: list[tuple[Item, Text]] = []
        for item in dict.fromkeys(items):
            if self._key(item) in self._cache and self._feature_key(item) in self._cache:
                continue
            text = self._tokenize(item)
            if text is None:
                self._cache.put(self._key(item), None)
                self._cache.put(self._feature_key(item), None)
            else:
                texts.append((item, text))
        texts.sort(key=lambda pair: (-len(pair[1].ids), pair[0]))
        for start in range(0, len(texts), self.batch_size):
            progress(len(items) - len(texts) + start)
            batch = texts[start : start + self.batch_size]
            for (item, _), (total, feature) in zip(batch, self._reader.read([text for _, text in batch]), strict=True):
                value = round(
                    total / len(item[1].encode(errors="replace")), 6
                )  # beyond, it depends on the rest of the batch
                packed = base64.b64encode(feature.astype(np.float16).tobytes()).decode()
                self._cache.put(self._key(item), value if math.isfinite(value) else None)
                self._cache.put(self._feature_key(item), packed if np.isfinite(feature).all() else None)
        progress(len(items))

    def _tokenize(self, item: Item) -> Text | None:
        """None if there is nothing to score, or more than the context holds; a long prompt loses its beginning instead."""
        prompt, completion = item
        if not completion:
            return None
        encoded = self._tokenizer(prompt + completion, return_offsets_mapping=True)
        ids = list(encoded["input_ids"])
        scored = [place for place, (_, end) in enumerate(encoded["offset_mapping"]) if end > len(prompt)]
        if scored and scored[0] == 0:  # nothing before it: start as generation from nothing would
            start = self._tokenizer.bos_token_id
            start = self._tokenizer.eos_token_id if start is None else start
            if start is None:
                scored = scored[1:]
            else:
                ids, scored = [start, *ids], [place + 1 for place in scored]
        if not scored:
            return None
        ids = ids[: scored[-1] + 1]
        surplus = max(0, len(ids) - self._reader.context)
        if scored[0] <= surplus:
            return None
        return Text(ids[surplus:], [place - surplus for place in scored])


def _weights(model: Any) -> str:
    """A hash that tells two references apart: shape and last layer, or all shapes and a sum where there are no layers."""
    try:
        return fingerprint(model)
    except InputError:
        return key_of([[name, list(value.shape), float(value.float().sum())] for name, value in model.named_parameters()])
