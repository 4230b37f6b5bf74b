"""Whether a base's own code does what the decoding loop and the trainer ask of it; tried, not looked up by name.

The loop hands a base ready-made masks, position ids and a cache in which every sequence has a length of its own, and relies
on the result being what the base computes from the token ids alone. Some bases ignore one of them: they mask or bias by
slot, count positions by the cache's length, or keep their state somewhere else. In: a base. Out: nothing, or an InputError
with the reason. The check runs on a tiny model of the base's class and configuration (`backbone.tiny_base`), whose extra
head is a copy of its last layer: every head must then give the logits of the token ids alone. It also shows whether the
heads' layers may run as one with the last layer (`backbone.stacked_heads`): not where a layer sorts tokens by expert, as
Llama 4's does, or wants a mask for every row. It takes tenths of a second, and its result is kept for all bases of the same
class and configuration.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from dynamo_lm.backbone.attention_mask import AttentionMaskBuilder
from dynamo_lm.backbone.base_model import captured_inputs, decoder_layers
from dynamo_lm.backbone.offloading import device_of
from dynamo_lm.backbone.tiny_base import tiny_base
from dynamo_lm.decoding.kv_cache import RaggedKVCache, StaticKVCache
from dynamo_lm.decoding.protocol import MultiHeadLM
from dynamo_lm.errors import InputError, first_line
from dynamo_lm.files import write_text
from dynamo_lm.model.configuration import DynaMoConfig
from dynamo_lm.private_interfaces import attention_implementation, build_cache

VERSION = 4  # of this file's checks: results of another version are not believed
EXACT, ROUNDED = 1e-2, 0.1  # largest error that is rounding, of the logits' spread, in float32 and in half precision
LARGEST = 3e8  # parameters of a model that is made only to be checked
PREFIXES = (2, 9, 5)  # tokens of the sequences of a ragged batch; longer and shorter than a tiny base's windows
TREES = ([0, 0, 1, 2], [0, 1, 2, 3], [0, 0, 0, 3])  # by sequence, the place of the token before each but the first
DOCUMENTS = (4, 7, 3)  # tokens of the documents of a packed block

_results: dict[str, tuple[str, bool]] = {}  # by key: why such a base is refused, or "", and whether heads may be stacked


def check_contract(base: PreTrainedModel, model_class: Callable[[DynaMoConfig, PreTrainedModel], MultiHeadLM]) -> bool:
    """Refuses a base that ignores masks, positions or the cache, see above.

    Args:
        base: passes `check_base`.
        model_class: makes a model with heads of a configuration and a base.

    Returns:
        Whether the heads' layers may run as one with the base's last layer.

    Raises:
        InputError: with the reason.
    """
    AttentionMaskBuilder.of(base.config, base.dtype)
    if device_of(base).type == "meta":
        return True
    key = contract_key(base)
    if key not in _results:
        _results[key] = _kept_result(key, lambda: _try(base, model_class))
    refused, stacks = _results[key]
    if refused:
        raise InputError(f"{type(base).__name__} cannot carry heads: {refused}.")
    return stacks


def contract_key(base: PreTrainedModel) -> str:
    """Identity of what is checked: class, configuration and libraries. 16 hexadecimal digits."""
    config = {name: value for name, value in base.config.to_dict().items() if name != "_name_or_path"}
    parts = [VERSION, transformers.__version__, torch.__version__, type(base).__module__, type(base).__qualname__]
    parts += [attention_implementation(base.config), json.dumps(config, sort_keys=True, default=str)]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _kept_result(key: str, compute: Callable[[], tuple[str, bool]]) -> tuple[str, bool]:
    """The result of an earlier process, or a new one, which is kept where torch keeps compiled code."""
    path = build_cache() / "dynamo_lm" / f"base-{key}.json"
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return str(kept["refused"]), bool(kept["stacks"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    result = compute()
    try:
        os.makedirs(path.parent, exist_ok=True)
        write_text(path, json.dumps({"refused": result[0], "stacks": result[1]}))
    except OSError:  # a full or read-only disk: it is computed anew next time
        pass
    return result


def _try(base: PreTrainedModel, model_class: Callable[[DynaMoConfig, PreTrainedModel], MultiHeadLM]) -> tuple[str, bool]:
    """An entry of `_results`, from a tiny model, or from the base itself where no tiny one of its kind can be made."""
    base = _smaller(base) or base
    if (states := _states_of_a_token(base)) != 1:
        return f"its layers pass on {states} hidden states of every token (AltUp), and a head is a layer of one", False
    model = model_class(DynaMoConfig(base.config, 2, init="copy"), base)
    model.stack_heads = can_run_stacked(model)
    return first_fault(model), model.stack_heads


@torch.inference_mode()
def _states_of_a_token(base: PreTrainedModel) -> int:
    """How many hidden states of each token the base's layers take: Gemma 3n's take (states, batch, length, hidden)."""
    with captured_inputs([decoder_layers(base)[-1]]) as captured, contextlib.suppress(Exception):
        base(input_ids=_tokens(base, 3))
    return len(captured[0]) if captured and captured[0].ndim == 4 else 1


def _smaller(base: PreTrainedModel) -> PreTrainedModel | None:
    """A tiny model of the base's class and configuration, if one can be made."""
    for narrow in (True, False):
        try:
            if not narrow and _size(base) > LARGEST:
                continue
            tiny = tiny_base(type(base), base.config, narrow=narrow)
            with torch.inference_mode():
                tiny(input_ids=_tokens(tiny, 3))
        except Exception:  # a configuration that does not make sense to its class when it is smaller
            continue
        return tiny
    return None


def _size(base: PreTrainedModel) -> float:
    """About how many parameters a few layers of a base have."""
    return base.num_parameters() * 4 / base.config.get_text_config().num_hidden_layers


def first_fault(model: MultiHeadLM) -> str:
    """What the first check that fails says, or "". model: its heads 2.. are copies of the base's last layer."""
    for reason, check in CHECKS.items():
        fault = _fault(model, check)
        if fault is not None:
            return reason + fault
    return ""


def can_run_stacked(model: MultiHeadLM) -> bool:
    """Whether a model with its heads' layers and its last layer as one computes the same. model: as above."""
    return _fault(model, _optimized) is None


@torch.inference_mode()
def _fault(model: MultiHeadLM, check: Callable[[MultiHeadLM], Compared]) -> str | None:
    """None if a check passes; the exception in brackets if it raises one, else ""."""
    limit = EXACT if model.dtype == torch.float32 else ROUNDED
    try:
        for logits, expected in check(model):
            error = (logits - expected).abs().max() / expected.std()
            if not error <= limit:
                return ""
    except Exception as error:  # whatever the base's own code raises
        return f" ({type(error).__name__}: {first_line(error)})"
    return None


Compared = Iterator[tuple[Tensor, Tensor]]  # logits of all heads at some tokens, and what they must be


def _whole(model: MultiHeadLM) -> Compared:
    tokens = _tokens(model.base, 12)
    order = torch.arange(12, device=tokens.device)[None]
    mask = AttentionMaskBuilder.of(model.base.config, model.dtype).mask(order, order)
    hidden = model.hidden(tokens, attention_mask=mask, position_ids=order)
    yield _logits(model, hidden)[:, 0], _alone(model, tokens[0].tolist())


def _cached(model: MultiHeadLM) -> Compared:
    texts = [_Text(model, 7, seed=5)]
    cache = RaggedKVCache(model.cache_entries, 1)
    for start, end in ((0, 3), (3, 6), (6, 7)):
        yield from _step(model, cache, texts, [texts[0].tokens[start:end]], [end - start])


def _optimized(model: MultiHeadLM) -> Compared:
    yield from _cached(model.optimize_for_inference(model.num_heads))


def _ragged(model: MultiHeadLM) -> Compared:
    cache = RaggedKVCache(model.cache_entries, len(PREFIXES))
    texts = [_Text(model, 15, seed=row) for row in range(len(PREFIXES))]
    width = max(PREFIXES)
    padded = [text.tokens[:size] + [0] * (width - size) for text, size in zip(texts, PREFIXES, strict=True)]
    yield from _step(model, cache, texts, padded, list(PREFIXES))
    for kept in ([3, 1, 2], [1, 3, 3]):  # what is not kept is overwritten by the next step
        lengths = cache.lengths.tolist()
        yield from _step(model, cache, texts, [t.tokens[n : n + 3] for t, n in zip(texts, lengths, strict=True)], kept)


def _trees(model: MultiHeadLM) -> Compared:
    cache = RaggedKVCache(model.cache_entries, len(PREFIXES))
    texts = [_tokens(model.base, 16, seed=10 + row)[0].tolist() for row in range(len(PREFIXES))]
    width = max(PREFIXES)
    _run(model, cache, [text[:size] + [0] * (width - size) for text, size in zip(texts, PREFIXES, strict=True)], PREFIXES)
    nodes = [text[11:16] for text in texts]
    logits = _logits(model, _run(model, cache, nodes, [0] * len(nodes), TREES))
    for row, (text, size, parents) in enumerate(zip(texts, PREFIXES, TREES, strict=True)):
        for leaf in set(range(len(parents) + 1)) - set(parents):
            path = [leaf]
            while path[0]:
                path.insert(0, parents[path[0] - 1])
            alone = _alone(model, text[:size] + [nodes[row][place] for place in path])
            yield logits[:, row, path], alone[size:]


def _packed(model: MultiHeadLM) -> Compared:
    tokens = _tokens(model.base, sum(DOCUMENTS), seed=20)
    segments = torch.repeat_interleave(torch.arange(len(DOCUMENTS)), torch.tensor(DOCUMENTS))[None].to(tokens.device)
    positions = torch.cat([torch.arange(size) for size in DOCUMENTS])[None].to(tokens.device)
    order = torch.arange(tokens.shape[1], device=tokens.device)[None]
    form = AttentionMaskBuilder.of(model.base.config, model.dtype)
    mask = form.mask(order, order, query_segments=segments, key_segments=segments)
    logits = _logits(model, model.hidden(tokens, attention_mask=mask, position_ids=positions))[:, 0]
    start = 0
    for size in DOCUMENTS:
        yield logits[:, start : start + size], _alone(model, tokens[0, start : start + size].tolist())
        start += size


def _unwritten(model: MultiHeadLM) -> Compared:
    texts = [_Text(model, 6, seed=30)]
    cache = StaticKVCache(model.cache_entries, 24, model.device)
    _run(model, cache, [[0] * 9], [0])  # what an earlier text left: of this one, nothing is written yet
    for start, end in ((0, 4), (4, 6)):
        yield from _step(model, cache, texts, [texts[0].tokens[start:end]], [end - start])


CHECKS: dict[str, Callable[[MultiHeadLM], Compared]] = {
    "with a ready-made mask and position ids it computes other logits than from token ids": _whole,
    "it does not read the past from the cache that it is handed": _cached,
    "with its layers optimized for decoding it computes other logits": _optimized,
    "sequences of different lengths change one another in a batch (positions or masks go by the cache's slots)": _ragged,
    "drafts in a tree change one another (positions or masks go by the cache's slots)": _trees,
    "documents packed into one block change one another": _packed,
    "entries of the cache that were never written change the result": _unwritten,
}


def _tokens(base: PreTrainedModel, length: int, seed: int = 1) -> Tensor:
    """Random ids, (1, length)."""
    size = base.config.get_text_config().vocab_size
    return torch.randint(4, size, (1, length), generator=torch.Generator().manual_seed(seed)).to(base.device)


class _Text:
    """Random tokens, and the base's logits at each of them, (tokens, vocabulary)."""

    def __init__(self, model: MultiHeadLM, length: int, seed: int):
        self.tokens: list[int] = _tokens(model.base, length, seed)[0].tolist()
        self.logits = _alone(model, self.tokens)


def _alone(model: MultiHeadLM, tokens: list[int]) -> Tensor:
    """What the base computes from token ids alone, (tokens, vocabulary), float32."""
    return model.base(input_ids=torch.tensor([tokens], device=model.device), use_cache=False).logits[0].float()


def _logits(model: MultiHeadLM, hidden: Tensor) -> Tensor:
    """Logits of all heads, (heads, rows, width, vocabulary), float32."""
    return torch.stack([model.readout(states, head) for head, states in enumerate(hidden, start=1)]).float()


def _run(
    model: MultiHeadLM,
    cache: RaggedKVCache,
    rows: Sequence[list[int]],
    kept: Sequence[int],
    trees: Sequence[list[int]] | None = None,
) -> Tensor:
    """One forward over equally many tokens of every row, of which so many are kept, as the decoding loop does it."""
    positions = cache.reserve(len(rows[0]))
    keys, visible = torch.arange(cache.end)[None], None
    if trees is not None:
        positions, keys, visible = cache.as_trees(positions, trees)
    form = AttentionMaskBuilder.of(model.base.config, model.dtype)
    hidden = model.hidden(
        torch.tensor(rows, device=model.device),
        attention_mask=form.mask(positions, keys, visible=visible, device=model.device),
        position_ids=positions.to(model.device),
        cache=cache,
    )
    cache.commit(torch.tensor(kept))
    return hidden


def _step(model: MultiHeadLM, cache: RaggedKVCache, texts: list[_Text], rows: list[list[int]], kept: list[int]) -> Compared:
    """One forward over the next tokens of every text, compared with each text alone."""
    lengths = cache.lengths.tolist()
    logits = _logits(model, _run(model, cache, rows, kept))
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        width = len(rows[row]) if length else kept[row]
        yield logits[:, row, :width], text.logits[length : length + width]
