"""Logits processors and stopping criteria of transformers, called with what the base's own `generate` calls them with.

The decoding loop knows sequences without padding, each at a place of its own; transformers' objects take the whole padded
batch, (batch, length) and (batch, vocabulary), and may go by a row's number, by the padded length, or by tensors with one
entry a row. In: the padded prompts, and such objects. Out: functions of one sequence for `DecodingOptions`. For each call
the batch is padded again as transformers does it, and the sequence's own row of the result is taken. The other rows hold
their own tokens, as far as they are decoded already.

A processor with state sees one call for every token, in order, as under `generate`: drafts that are rejected leave no trace,
because every call is made on a copy of the processor as the call for the token before left it. A criterion with state sees
one call for every token of its row. State is what an object's attributes or a function's closure, defaults and attributes
hold; what calls change in global variables or on a class cannot follow.
"""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Sequence
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.generation import PrefixConstrainedLogitsProcessor

from dynamo_lm.decoding import options
from dynamo_lm.errors import InputError

STATEFUL = (  # of transformers' own; all others are functions of what they are called with
    "SynthIDTextWatermarkLogitsProcessor",
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    "DiaEOSDelayPatternLogitsProcessor",
    "WhisperNoSpeechDetection",
)


ROW_WISE = frozenset(  # of transformers' own: what they do to a row depends on that row alone
    f"{name}Logits{kind}"
    for kind, names in {
        "Warper": "Temperature TopK TopP MinP TopH Typical Epsilon Eta",
        "Processor": "RepetitionPenalty NoRepeatNGram MinLength MinNewTokensLength NoBadWords SequenceBias ForcedBOSToken "
        "ForcedEOSToken InfNanRemove SuppressTokens SuppressTokensAtBegin",
    }.items()
    for name in names.split()
) | {"ExponentialDecayLengthPenalty", "LogitNormalization"}


class PaddedBatch:
    """The batch as transformers sees it.

    Attributes:
        prompts: (batch, length), padded on the left.
        new_tokens: by row, what was emitted so far.
    """

    def __init__(self, padded: Tensor, prompts: Sequence[list[int]], pad: int):
        """padded: the prompts as they were given, (batch, length); prompts: the same without padding; pad: the token that
        finished rows go on with. Padding on the right moves to the left, where transformers expects it."""
        self.prompt_lengths, self.pad = [len(prompt) for prompt in prompts], pad
        self.padding = padded.shape[1] - torch.tensor(self.prompt_lengths)  # (batch,)
        self.given_padding = self.padding.clone()  # before the first token of each row
        self.prompts = padded.cpu().clone()
        for number, (row, prompt) in enumerate(zip(self.prompts, prompts, strict=True)):
            if row[len(row) - len(prompt) :].tolist() != prompt:
                row[:] = torch.tensor([pad] * (len(row) - len(prompt)) + prompt)
                self.given_padding[number] = 0
        self.new_tokens: list[list[int]] = [[] for _ in prompts]

    def own_ids(self, row: int, tokens: Tensor) -> Tensor:
        """The row of `ids` itself: (1, length)."""
        return torch.cat([self.prompts[row], tokens[self.prompt_lengths[row] :].cpu()])[None]

    def ids(self, row: int, tokens: Tensor) -> Tensor:
        """The batch when this row's sequence is `tokens`, (t,), without padding: (batch, length)."""
        own = tokens[self.prompt_lengths[row] :].cpu()
        if len(self.prompts) == 1:
            return torch.cat([self.prompts, own[None]], 1)
        new = torch.full((len(self.prompts), len(own)), self.pad)
        for other, emitted in enumerate(self.new_tokens):
            count = min(len(emitted), len(own))
            new[other, :count] = torch.tensor(emitted[:count], dtype=torch.long)
        new[row] = own
        return torch.cat([self.prompts, new], 1)

    def logits_processor(self, processor: Any) -> options.LogitsProcessor:
        """A processor of transformers, or a user's own, as a function of one sequence."""
        if type(processor) is PrefixConstrainedLogitsProcessor:  # asks a user's function about every row: of this one alone
            return self._prefix_constrained(processor)
        processor = _on_cpu(processor)
        if _from_transformers(processor) and type(processor).__name__ in ROW_WISE:
            by_row = self._by_row(processor)
            return lambda row, tokens, logits: by_row[row](self.own_ids(row, tokens), logits[None])[0].to(logits)
        if _has_state(processor):
            return _Replayed(self, processor)
        return lambda row, tokens, logits: self.apply(processor, row, tokens, logits)

    def _by_row(self, processor: Any) -> list[Any]:
        """A processor for each row, with the row's own entry of the lengths that a repetition penalty ignores."""
        ignored = getattr(processor, "prompt_ignore_length", None)
        if not isinstance(ignored, Tensor):
            return [processor] * len(self.prompts)
        if torch.equal(ignored, self.given_padding):  # transformers' own, before padding moved to the left
            ignored = self.padding
        each = [copy.copy(processor) for _ in self.prompts]
        for row, own in enumerate(each):
            own.prompt_ignore_length = ignored[row : row + 1]
        return each

    def apply(self, processor: Any, row: int, tokens: Tensor, logits: Tensor) -> Tensor:
        """The row's part of what a processor makes of the batch; logits and result: (vocabulary,)."""
        ids = self.ids(row, tokens)
        result = torch.as_tensor(processor(ids, logits.repeat(len(ids), 1)))
        if result.shape != (len(ids), len(logits)):
            raise InputError(
                f"{_name(processor)} returned logits of shape {tuple(result.shape)} for {len(ids)} rows of {len(logits)}; "
                "return one row of logits for each row."
            )
        return result[row].to(logits)

    def stopping_criterion(self, criterion: Any, row: int) -> options.StoppingCriterion:
        """A criterion of transformers, or a user's own, for one row; its verdict is one bool, or one for each row."""

        state = criterion
        shared = len(self.prompts) == 1 or not _has_state(criterion) or _from_transformers(criterion)

        def is_done(tokens: Tensor) -> bool:
            nonlocal state
            own = state if shared else _own_copy(state)
            verdict = torch.as_tensor(own(self.ids(row, tokens), None)).flatten()
            if own is not state and _contents(own) != _contents(state):  # else what others change in it is seen
                state = own
            return bool(verdict[row if len(verdict) > 1 else 0])

        return is_done

    def _prefix_constrained(self, processor: PrefixConstrainedLogitsProcessor) -> options.LogitsProcessor:
        allowed = processor._prefix_allowed_tokens_fn

        def apply(row: int, tokens: Tensor, logits: Tensor) -> Tensor:
            own = PrefixConstrainedLogitsProcessor(lambda _, sentence: allowed(row, sentence), 1)
            return own(self.ids(row, tokens)[row : row + 1], logits[None].clone())[0]

        return apply


LONGEST = 64  # drafts of a step, at most


class _Replayed:
    """A processor whose calls change it."""

    def __init__(self, batch: PaddedBatch, processor: Any):
        self.batch, self.processor = batch, processor
        self.after: dict[tuple[int, int], tuple[Tensor, Any]] = {}  # by row and length: tokens, and the processor then
        _copied(processor)  # refuse at once

    def __call__(self, row: int, tokens: Tensor, logits: Tensor) -> Tensor:
        before = self.after.get((row, len(tokens) - 1))
        follows = before is not None and torch.equal(before[0], tokens[:-1])
        state = _copied(before[1] if before is not None and follows else self.processor)
        result = self.batch.apply(state, row, tokens, logits)
        self.after[row, len(tokens)] = tokens.clone(), state
        for key in [key for key in self.after if key[0] == row and key[1] < len(tokens) - LONGEST]:
            del self.after[key]
        return result


def _from_transformers(processor: Any) -> bool:
    return type(processor).__module__.startswith("transformers.")


def _has_state(processor: Any) -> bool:
    """Whether calls may change it: of a user's own, all but functions that hold nothing."""
    if _from_transformers(processor):
        return type(processor).__name__ in STATEFUL
    if isinstance(processor, FunctionType):
        return bool(processor.__closure__ or processor.__defaults__ or processor.__kwdefaults__ or vars(processor))
    return True


def _copied(processor: Any) -> Any:
    """A copy with state of its own, which shares models and tokenizers.

    Raises:
        InputError: it cannot be copied.
    """
    try:
        return _deep_copy(processor, {})
    except Exception as error:  # whatever an attribute raises
        raise InputError(
            f"{_name(processor)} cannot be copied ({error}), so its state cannot follow drafts that are rejected; give it a "
            "__deepcopy__, or call model.base.generate."
        ) from error


def _own_copy(criterion: Any) -> Any:
    """A copy with state of its own; the criterion itself where it cannot be copied, as with a `threading.Event`."""
    try:
        return _deep_copy(criterion, {})
    except Exception:  # whatever an attribute raises
        return criterion


def _deep_copy(value: Any, memo: dict[int, Any]) -> Any:
    """`copy.deepcopy` that shares models and tokenizers and copies what functions hold, too."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, (nn.Module, PreTrainedTokenizerBase)) and memo:  # not the processor itself
        return value
    if isinstance(value, MethodType):
        return MethodType(value.__func__, _deep_copy(value.__self__, memo))
    if isinstance(value, functools.partial):
        arguments = [_deep_copy(each, memo) for each in value.args]
        keywords = {name: _deep_copy(each, memo) for name, each in value.keywords.items()}
        return functools.partial(_deep_copy(value.func, memo), *arguments, **keywords)
    if not isinstance(value, FunctionType):
        parts = getattr(value, "__dict__", {}).values()
        memo.update({id(part): part for part in parts if isinstance(part, (nn.Module, PreTrainedTokenizerBase))})
        return copy.deepcopy(value, memo)
    cells = [CellType() for _ in value.__closure__ or ()]
    twin = FunctionType(value.__code__, value.__globals__, value.__name__, None, tuple(cells))
    memo[id(value)] = twin  # before its parts, which may hold it
    for cell, source in zip(cells, value.__closure__ or (), strict=True):
        cell.cell_contents = _deep_copy(source.cell_contents, memo)
    twin.__defaults__ = _deep_copy(value.__defaults__, memo)
    twin.__kwdefaults__ = _deep_copy(value.__kwdefaults__, memo)
    twin.__dict__.update({name: _deep_copy(each, memo) for name, each in vars(value).items()})
    return twin


class _Pickler(pickle.Pickler):
    """Takes models and tokenizers as they are."""

    def persistent_id(self, value: Any) -> int | None:
        return id(value) if isinstance(value, (nn.Module, PreTrainedTokenizerBase)) else None


def _contents(value: Any) -> Any:
    """What a copy of an object is compared by; nothing equals it where it holds what cannot be pickled."""
    try:
        _Pickler(buffer := io.BytesIO()).dump(value.__reduce_ex__(4)[2])
    except Exception:  # whatever an attribute raises
        return object()
    return buffer.getvalue()


def _on_cpu(processor: Any) -> Any:
    """A processor for logits on the CPU: transformers makes them for the model's device."""
    moved = {
        name: value.cpu()
        for name, value in getattr(processor, "__dict__", {}).items()
        if isinstance(value, Tensor) and not value.is_cpu
    }
    if moved:
        processor = copy.copy(processor)
        vars(processor).update(moved)
    return processor


def _name(processor: Any) -> str:
    return getattr(processor, "__name__", type(processor).__name__)
