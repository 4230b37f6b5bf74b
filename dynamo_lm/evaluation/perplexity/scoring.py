"""Multi-token perplexities of a text (method.md section 5): each head alone, the heads together, and the dynamic PPL_d.

In: a DynaMo model and documents of token ids. Out: sums by document, and the numbers of `perplexity.json` with standard
errors. Every document is scored on its own. A target counts where a token precedes it: the first token of a document is
scored only if the tokenizer puts a token in front of every text; the end-of-text token after a document is a target.

A document longer than the window is read by windows that start every `stride` tokens. A position is scored in the first
window that holds it, so every target counts once per head and sees at least window - stride tokens (or all there are).

The joint of m tokens is the product of heads, and beside it the masked joint of `evaluation.perplexity.masked`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynamo_lm.backbone.attention_mask import AttentionMaskBuilder
from dynamo_lm.backbone.token_limits import context_limit, stated_context
from dynamo_lm.data.token_store import tokenize
from dynamo_lm.decoding.settings import algorithm_of
from dynamo_lm.errors import InputError
from dynamo_lm.evaluation.perplexity.dynamic import Walk
from dynamo_lm.evaluation.perplexity.masked import SMOOTHING, Mask, coverage
from dynamo_lm.model.modeling import DynaMoForCausalLM
from dynamo_lm.sampling.options import Algorithm1, check
from dynamo_lm.sampling.top_k import HeadCandidates

WINDOW = 1024  # tokens, or the model's context if that is shorter
LOGITS = 2**21  # entries of one chunk's logits: 8 MB, so that they stay near the processor


@dataclass(frozen=True)
class Text:
    """Documents to score."""

    documents: list[np.ndarray]  # each (length,) int64, two tokens at least
    bytes: int  # UTF-8, of the scored tokens: of everything after each document's first token
    sources: list[str]  # names without their folders

    @property
    def tokens(self) -> int:
        return sum(map(len, self.documents))


@dataclass(frozen=True)
class Options:
    """How to score; `Options.of` fills in what a model decides."""

    num_heads: int  # heads used, 1..n
    window: int  # tokens a forward sees at most
    stride: int  # tokens from one window's start to the next
    batch_size: int = 8  # windows a forward
    eps_b: tuple[float, ...] = ()  # values for PPL_d, none to leave it out
    algorithm: Algorithm1 = field(default_factory=Algorithm1)  # how the walk chooses m; its alpha_c is the mask's, too
    masked: bool = True  # whether the tables are used: by the walk, and in the masked joint
    smoothing: float = SMOOTHING  # share of the product of heads in the masked joint

    def __post_init__(self) -> None:
        if self.window < 1 or not 1 <= self.stride <= self.window:
            raise InputError(f"A window of {self.window} tokens and a stride of {self.stride}: give 1 <= stride <= window.")
        if self.batch_size < 1:
            raise InputError(f"The batch size is {self.batch_size}; give 1 or more.")
        if not 0 < self.smoothing <= 1:
            raise InputError(f"The smoothing is {self.smoothing}; give a share above 0 (a perplexity needs it) up to 1.")
        for eps_b in self.eps_b:
            replace(self.algorithm, eps_b=eps_b)  # refuses what is not a probability

    @classmethod
    def of(
        cls,
        model: DynaMoForCausalLM,
        *,
        num_heads: int | None = None,
        window: int | None = None,
        stride: int | None = None,
        masked: bool = True,
        **kwargs: Any,
    ) -> Options:
        """The options for `model`: all heads, a window of min(1024, context), half a window of stride.

        Raises:
            InputError: more heads than the model has, a window beyond its context, tables that do not reach.
        """
        n, context = num_heads or model.num_heads, stated_context(model.config) or WINDOW
        if not 1 <= n <= model.num_heads or num_heads == 0:
            raise InputError(f"num_heads is {num_heads}, but the model has {model.num_heads}; give 1 to that many.")
        if window is not None and window > context_limit(model.config):
            raise InputError(f"The window is {window} tokens, but the model's context is {context}; give a smaller window.")
        window = min(WINDOW, context) if window is None else window
        algorithm = kwargs.setdefault("algorithm", algorithm_of(model, model.generation_config))
        masked = masked and model.cooccurrence is not None and algorithm.alpha_c > 0
        options = cls(n, window, max(1, window // 2) if stride is None else stride, masked=masked, **kwargs)
        table = model.cooccurrence if masked else None
        if n > 1:
            check(replace(algorithm, eps_b=0.5), n, model.config.vocab_size, table)
        return options

    def settings(self) -> dict[str, Any]:
        """The options as a results file lists them: without the values of eps_b, which have entries of their own there."""
        options, algorithm = asdict(self), asdict(self.algorithm)
        left_out = {"window", "stride", "eps_b", "algorithm"}
        return {name: value for name, value in (options | algorithm).items() if name not in left_out}


def read_text(
    sources: Sequence[str],
    tokenizer: Any,
    folder: Path,
    *,
    text_field: str | None = None,
    validation_fraction: float = 0.0,
    seed: int = 0,
    max_documents: int | None = None,
    max_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Text:
    """The documents of `sources` (as `data.documents` reads them), tokenized into `folder`, cut to the limits.

    Args:
        validation_fraction: above 0, only the documents that `train` with this fraction and `seed` holds out of these
            sources.
        max_documents, max_tokens: the first so many; the last document is cut at the token limit.

    Raises:
        InputError: as `data.tokenize`, limits below 1, or no document of two tokens.
    """
    for name, limit in (("document", max_documents), ("token", max_tokens)):
        if limit is not None and limit < 1:
            raise InputError(f"The {name} limit is {limit}; give 1 or more.")
    early = max_tokens if validation_fraction == 0 else None
    store = tokenize(sources, tokenizer, folder, text_field=text_field, limit_tokens=early, progress=progress)
    chosen = store.split(validation_fraction, seed)[1] if validation_fraction else np.arange(len(store))
    documents, left = [], max_tokens if max_tokens is not None else store.num_tokens
    for index in chosen[:max_documents].tolist():
        document = store.document(index)[:left].astype(np.int64)
        left -= len(document)
        if len(document) > 1:
            documents.append(document)
    if not documents:
        raise InputError("The text has no document of two tokens or more, so there is nothing to predict; give more text.")
    size = 0
    for document in documents:
        scored = tokenizer.decode(document[1:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        size += len(scored.encode())
    return Text(documents, size, [Path(source).name or source for source in sources])


# --- scoring --------------------------------------------------------------------


@dataclass(frozen=True)
class Sums:
    """A mean in the making: nats and tokens by document, (documents,) each."""

    nats: np.ndarray
    tokens: np.ndarray

    @property
    def mean(self) -> float:
        """Nats per token."""
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def influence(self) -> np.ndarray:
        """How far each document moves the mean, (documents,): its deviation from the ratio, over all tokens."""
        return (self.nats - self.mean * self.tokens) / self.tokens.sum()

    @property
    def mean_error(self) -> float | None:
        """Standard error of the mean (documents are independent, tokens within are not); None for one document."""
        return standard_error(self.influence)

    @property
    def perplexity(self) -> float:
        return math.exp(self.mean)

    @property
    def error(self) -> float | None:
        """Standard error of the perplexity; None for one document."""
        return None if self.mean_error is None else self.perplexity * self.mean_error


def standard_error(influence: np.ndarray) -> float | None:
    """Of a ratio of sums over independent documents (linearised); None for fewer than two."""
    count = len(influence)
    return None if count < 2 else math.sqrt(count / (count - 1) * float((influence**2).sum()))


@dataclass(frozen=True)
class Measured:
    """Everything that was summed; lists are by head (or by number of heads in the joint), dynamic ones by eps_b."""

    options: Options
    text: Text
    heads: list[Sums]
    joint: list[Sums]
    masked_joint: list[Sums] | None
    dynamic: list[Sums]
    masked_dynamic: list[Sums] | None
    steps: list[list[int]]  # by eps_b: how many steps took 1, 2, .. n tokens
    seen: float | None  # share of the text's longest n-grams that the tables hold; near 1: they were counted on this text

    def record(self) -> dict[str, Any]:
        """The own keys of `perplexity.json`. PPL_1 is the base's: head 1 is its own last layer."""
        first, text, options = self.heads[0], self.text, self.options
        masked_joint: Sequence[Sums | None] = self.masked_joint or [None] * len(self.joint)
        return {
            "text": {
                "sources": text.sources,
                "documents": len(text.documents),
                "tokens": text.tokens,
                "bytes": text.bytes,
                "seen": self.seen,
            },
            "window": options.window,
            "stride": options.stride,
            "heads": [
                {"head": i, "ppl": s.perplexity, "se": s.error, "nll": s.mean, "tokens": int(s.tokens.sum())}
                for i, s in enumerate(self.heads, start=1)
            ],
            "joint": [
                {
                    "heads": m,
                    "ppl": plain.perplexity,
                    "se": plain.error,
                    "masked_ppl": masked and masked.perplexity,
                    "masked_se": masked and masked.error,
                }
                for m, (plain, masked) in enumerate(zip(self.joint, masked_joint, strict=True), start=1)
            ],
            "dynamic": [entry for number in range(len(options.eps_b)) for entry in self._dynamic(number)],
            "base": {
                "ppl": first.perplexity,
                "bits_per_byte": float(first.nats.sum()) / math.log(2) / text.bytes if text.bytes else None,
            },
            "ceiling": options.num_heads,
        }

    def tokens_per_step(self, number: int) -> float:
        """At the `number`-th eps_b; a step cut short by the end of a document counts as one."""
        return float(self.dynamic[number].tokens.sum()) / sum(self.steps[number])

    def _dynamic(self, number: int) -> Iterator[dict[str, Any]]:
        shares = [count / sum(self.steps[number]) for count in self.steps[number]]
        for masked, sums in ((False, self.dynamic), (True, self.masked_dynamic)):
            if sums is not None:
                yield {
                    "eps_b": self.options.eps_b[number],
                    "ppl": sums[number].perplexity,
                    "se": sums[number].error,
                    "tokens_per_step": self.tokens_per_step(number),
                    "shares": shares,
                    "masked": masked,
                }


@dataclass(frozen=True)
class Window:
    """Tokens start .. end of a document, of whose positions those from `fresh` on are scored."""

    document: int
    start: int
    fresh: int
    end: int


def windows(lengths: Sequence[int], window: int, stride: int) -> list[Window]:
    """All windows, short documents first (so that a batch needs little padding), each document's in order.

    The last token is read only by heads of other positions, so a window never begins at it.
    """
    result = []
    for document in sorted(range(len(lengths)), key=lambda index: (min(lengths[index], window), index)):
        last = lengths[document] - 1  # positions 0 .. last - 1 have a target
        start = fresh = 0
        while fresh < last:
            end = min(start + window, last)
            result.append(Window(document, start, fresh, end))
            start, fresh = start + stride, end
    return result


def check_text(model: DynaMoForCausalLM, text: Text, options: Options) -> None:
    """Raise InputError if no document is longer than the number of heads, or if one has tokens that the model lacks."""
    n, lengths = options.num_heads, [len(document) for document in text.documents]
    if max(lengths) <= n:
        raise InputError(
            f"The longest document has {max(lengths)} tokens, too few for {n} heads; give longer text or fewer heads."
        )
    if max(int(document.max()) for document in text.documents) >= model.config.vocab_size:
        raise InputError("The text has tokens beyond the model's vocabulary; use the model's own tokenizer.")


@torch.inference_mode()
def measure(
    model: DynaMoForCausalLM, text: Text, options: Options, *, progress: Callable[[int], None] = lambda tokens: None
) -> Measured:
    """Scores the text; `progress` is called with the number of positions done.

    Raises:
        InputError: see `check_text`.
    """
    check_text(model, text, options)
    n, lengths = options.num_heads, [len(document) for document in text.documents]
    table = model.cooccurrence.to("cpu") if options.masked and model.cooccurrence is not None else None
    mask = Mask(table, options.algorithm.alpha_c, options.smoothing) if table is not None else None
    # Per document (n, length): log-probability of head i's target after each position; NaN where there is none.
    plain = [np.full((n, length), np.nan) for length in lengths]
    masked = [np.full((n, length), np.nan) for length in lengths] if mask else plain
    walk = Walk(text.documents, plain, masked, options.eps_b, options.algorithm, table)
    done = 0
    order = windows(lengths, options.window, options.stride)
    for at in range(0, len(order), options.batch_size):
        batch = order[at : at + options.batch_size]
        hidden = _hidden(model, text.documents, batch, n)
        for row, window in enumerate(batch):
            heads = _score(
                model,
                hidden[:, row, window.fresh - window.start : window.end - window.start],
                text.documents[window.document],
                window,
                options,
                mask,
                plain[window.document],
                masked[window.document],
            )
            walk.advance(window.document, heads, window.start, window.fresh, window.end)
            done += window.end - window.fresh
            progress(done)
    if not all(np.isfinite(document[0, :-1]).all() for document in plain):
        raise InputError("The model gives a token of this text no probability at all; check its weights.")
    every = range(n)
    return Measured(
        options,
        text,
        [_sums(plain, head, head + 1) for head in every],
        [_sums(plain, 0, head + 1) for head in every],
        [_sums(masked, 0, head + 1) for head in every] if mask else None,
        [Sums(-walk.plain[:, e], walk.tokens[:, e]) for e in range(len(options.eps_b))],
        [Sums(-walk.masked[:, e], walk.tokens[:, e]) for e in range(len(options.eps_b))] if mask else None,
        walk.sizes.tolist(),
        coverage(table, text.documents, n) if table is not None else None,
    )


def _sums(log_p: Sequence[np.ndarray], first: int, end: int) -> Sums:
    """Of heads first .. end - 1 over the positions where all of them have a target."""
    nats, tokens = [], []
    for document in log_p:  # (n, length)
        scored = document[first:end, : max(0, document.shape[1] - end)]  # head index i predicts i + 1 ahead
        nats.append(-scored.sum())
        tokens.append(scored.size)
    return Sums(np.array(nats), np.array(tokens, dtype=float))


def _hidden(model: DynaMoForCausalLM, documents: Sequence[np.ndarray], batch: Sequence[Window], num_heads: int) -> Tensor:
    """One forward pass of a batch of windows: (heads, batch, width, hidden)."""
    width, device = max(window.end - window.start for window in batch), model.device
    tokens = torch.zeros(len(batch), width, dtype=torch.long)
    for row, window in enumerate(batch):
        tokens[row, : window.end - window.start] = torch.from_numpy(documents[window.document][window.start : window.end])
    order = torch.arange(width)[None]
    # Causal alone: padding follows every query.
    mask = AttentionMaskBuilder.of(model.base.config, model.dtype).mask(order, order, device=device)
    positions = order.expand(len(batch), -1).to(device)
    return model.hidden(tokens.to(device), num_heads=num_heads, attention_mask=mask, position_ids=positions)


def _score(
    model: DynaMoForCausalLM,
    states: Tensor,
    document: np.ndarray,
    window: Window,
    options: Options,
    mask: Mask | None,
    plain: np.ndarray,
    masked: np.ndarray,
) -> list[HeadCandidates]:
    """Fills in the log-probabilities of a window's fresh positions and returns their candidates by head, for the walk.

    states (heads, positions, hidden); plain, masked (heads, length) of the document.
    """
    algorithm, chunk = options.algorithm, max(1, LOGITS // model.config.vocab_size)
    candidates = []
    for head in range(1, options.num_heads + 1):
        tops = []
        for begin in range(0, window.end - window.fresh, chunk):
            logits = model.readout(states[head - 1, None, begin : begin + chunk], head)[0].float()  # (chunk, vocabulary)
            if options.eps_b:
                tops.append(HeadCandidates.top(logits, algorithm.top_k, algorithm.temperature))
            first = window.fresh + begin
            positions = np.arange(first, min(first + len(logits), len(document) - head))  # those with a target
            if not len(positions):
                continue
            log_f = logits[: len(positions)].log_softmax(-1).cpu().numpy()  # float32
            targets = document[positions + head]
            plain[head - 1, positions] = log_f[np.arange(len(positions)), targets]
            if mask is not None:
                history = document[positions[:, None] + np.arange(1, head)]  # (positions, head - 1)
                masked[head - 1, positions] = mask(log_f, history, targets)
        if tops:
            ids, probs = (np.concatenate([getattr(top, name) for top in tops]) for name in ("ids", "probs"))
            candidates.append(HeadCandidates(ids, probs))  # an entry per position
    return candidates
