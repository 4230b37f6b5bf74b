"""Processors, criteria and hooks of transformers' users: strict greedy text is that of the base's own `generate`."""

from __future__ import annotations

import functools
import math
import threading

import pytest
import torch
from architectures import EOS, VOCABULARY, dynamo_of
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer
from transformers.generation import MaxTimeCriteria
from transformers.generation.logits_process import (
    AlternatingCodebooksLogitsProcessor,
    BarkEosPrioritizerLogitsProcessor,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitNormalization,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
    WatermarkLogitsProcessor,
)

from dynamo_lm import InputError

IDS = torch.tensor([[0, 0, 0, 7, 8, 9], [5, 6, 7, 8, 9, 10], [0, 0, 11, 7, 12, 7]])
MASK = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
COMMON = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0, "eos_token_id": EOS}


@pytest.fixture(scope="module")
def model():
    return dynamo_of("llama", init="copy")


def same_as_the_base(model, make=dict, **options):
    """Both texts; make: processors and criteria, new ones for each."""
    inputs = {"inputs": IDS, "attention_mask": MASK, **COMMON, **options}
    expected = model.base.generate(**inputs, **make())
    result = model.generate(**inputs, **make())
    assert torch.equal(result, expected)
    return result


def allowed(row, tokens):
    return [[20 + row, 40 + len(tokens) % 3], [30 + row, 50], [60 + int(tokens[-1]) % 5, 70]][row]


SETTINGS = {
    "nothing": {},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.7},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[7], [8, 9]]},
    "sequence_bias": {"sequence_bias": [[[7], 3.0], [[8, 9], -5.0]]},
    "min_length": {"min_length": 9, "eos_token_id": list(range(3, 80))},
    "min_new_tokens": {"min_new_tokens": 4, "eos_token_id": list(range(3, 80))},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": allowed},
    "forced_bos_token_id": {"forced_bos_token_id": 33},
    "forced_eos_token_id": {"forced_eos_token_id": 44},
    "remove_invalid_values": {"remove_invalid_values": True},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (3, 1.5)},
    "suppress_tokens": {"suppress_tokens": [7, 8, 9]},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(5, 60))},
    "renormalize_logits": {"renormalize_logits": True},
    "eos": {"eos_token_id": list(range(3, 20))},
}


@pytest.mark.parametrize("name", SETTINGS)
@torch.no_grad()
def test_every_setting_of_transformers_does_what_the_bases_generate_does(model, name):
    same_as_the_base(model, **SETTINGS[name])


class RowBias(LogitsProcessor):
    """Adds one row of a (batch, vocabulary) tensor to each row."""

    def __init__(self):
        self.bias = 5 * torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(4))

    def __call__(self, ids, scores):
        assert ids.shape[0] == scores.shape[0] == 3
        return scores + self.bias


class Counts(LogitsProcessor):
    """A grammar that goes by how often it was called, and by what came last."""

    def __init__(self):
        self.calls, self.seen = 0, []

    def __call__(self, ids, scores):
        self.calls += 1
        self.seen.append(ids[:, -1].clone())
        bias = torch.zeros_like(scores)
        bias[:, (17 * self.calls) % VOCABULARY] += 6
        for row, total in enumerate(torch.stack(self.seen).sum(0).tolist()):
            bias[row, total % VOCABULARY] += 7
        return scores + bias


def rotated(scores, count):
    """Favours one token, by the number of calls."""
    return scores + 8.0 * (torch.arange(VOCABULARY) == (17 * count) % VOCABULARY)


def in_a_closure():
    count = 0

    def process(ids, scores):
        nonlocal count
        count += 1
        return rotated(scores, count)

    return process


def in_an_attribute():
    def process(ids, scores):
        process.count += 1
        return rotated(scores, process.count)

    process.count = 0
    return process


def in_a_default():
    def process(ids, scores, calls=[]):  # noqa: B006
        calls.append(1)
        return rotated(scores, len(calls))

    return process


class InASlot(LogitsProcessor):
    __slots__ = ("count",)

    def __init__(self):
        self.count = 0

    def process(self, ids, scores):
        self.count += 1
        return rotated(scores, self.count)

    __call__ = process


class Lazy(LogitsProcessor):
    """Has no state before its first call."""

    def __call__(self, ids, scores):
        self.count = getattr(self, "count", 0) + 1
        return rotated(scores, self.count)


def with_calls(calls, ids, scores):
    calls.append(1)
    return rotated(scores, len(calls))


def by_length(ids, scores):
    return scores.roll(ids.shape[1], 1)


PROCESSORS = {
    "per row": RowBias,
    "stateful": Counts,
    "function": lambda: by_length,
    "closure": in_a_closure,
    "attribute of a function": in_an_attribute,
    "default": in_a_default,
    "slot": InASlot,
    "method": lambda: InASlot().process,
    "partial": lambda: functools.partial(with_calls, []),
    "state of the first call": Lazy,
    "synthid": lambda: SynthIDTextWatermarkLogitsProcessor(
        ngram_len=3, keys=[5, 9, 11], sampling_table_size=2**8, sampling_table_seed=0, context_history_size=8, device="cpu"
    ),
    "watermark": lambda: WatermarkLogitsProcessor(vocab_size=VOCABULARY, device="cpu", bias=5.0),
    "top_k": lambda: TopKLogitsWarper(3),
    "top_p": lambda: TopPLogitsWarper(0.5),
    "top_h": lambda: TopHLogitsWarper(0.4),
    "min_p": lambda: MinPLogitsWarper(0.1),
    "typical": lambda: TypicalLogitsWarper(0.5),
    "epsilon": lambda: EpsilonLogitsWarper(0.02),
    "eta": lambda: EtaLogitsWarper(0.02, device="cpu"),
    "normalization": LogitNormalization,
    "alternating codebooks": lambda: AlternatingCodebooksLogitsProcessor(
        input_start_len=4, semantic_vocab_size=10, codebook_size=20
    ),
    "bark": lambda: BarkEosPrioritizerLogitsProcessor(eos_token_id=EOS, min_eos_p=0.01, device="cpu"),
}


@pytest.mark.parametrize("name", PROCESSORS)
@torch.no_grad()
def test_processors_see_what_the_bases_generate_shows_them(model, name):
    same_as_the_base(model, lambda: {"logits_processor": LogitsProcessorList([PROCESSORS[name]()])})


@torch.no_grad()
@pytest.mark.parametrize("sample", [False, True])
def test_logits_that_are_not_numbers_are_refused(model, sample):
    def spoil(ids, scores):
        return scores.masked_fill(torch.arange(scores.shape[1]) == 50, math.nan)

    with pytest.raises(InputError, match="not numbers"):
        model.generate(IDS, logits_processor=LogitsProcessorList([spoil]), **COMMON | {"do_sample": sample})


def test_processors_that_forbid_every_token_are_refused_where_tokens_are_drawn(model):
    def forbid(ids, scores):
        return torch.full_like(scores, -math.inf)

    with pytest.raises(InputError, match="forbid every token"):
        model.generate(IDS, logits_processor=LogitsProcessorList([forbid]), **COMMON | {"do_sample": True})
    same_as_the_base(model, logits_processor=LogitsProcessorList([forbid]))


@pytest.mark.parametrize(("prompts", "says"), [([[5, 6]], "a list"), (torch.tensor([5, 6]), r"shape \(2,\)")])
def test_prompts_that_are_no_rows_of_ids_are_refused(model, prompts, says):
    with pytest.raises(InputError, match=says):
        model.generate(prompts, max_new_tokens=2)


@pytest.mark.parametrize("ignored", [6, torch.tensor([6, 6, 6]), torch.tensor([4, 0, 6])], ids=str)
def test_a_repetition_penalty_ignores_as_much_of_each_row_as_it_was_told(model, ignored):
    def penalty():
        return {"logits_processor": LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.7, ignored)])}

    assert not torch.equal(same_as_the_base(model, penalty), same_as_the_base(model, repetition_penalty=1.7))


def test_a_processor_that_holds_a_model_follows_the_text_that_stays(model):
    def make():
        guidance = UnbatchedClassifierFreeGuidanceLogitsProcessor(2.0, model.base, unconditional_ids=IDS[1:2, -1:])
        return {"logits_processor": LogitsProcessorList([guidance])}

    inputs = {"inputs": IDS[1:2], "attention_mask": MASK[1:2], **COMMON}
    assert torch.equal(model.generate(**inputs, **make()), model.base.generate(**inputs, **make()))


@torch.no_grad()
def test_a_processor_whose_state_cannot_be_copied_is_refused_by_name(model):
    class Locked(LogitsProcessor):
        def __init__(self):
            self.lock = threading.Lock()

        def __call__(self, ids, scores):
            return scores

    with pytest.raises(InputError, match="Locked cannot be copied"):
        model.generate(IDS, attention_mask=MASK, logits_processor=LogitsProcessorList([Locked()]), **COMMON)


class PaddedLength(StoppingCriteria):
    def __call__(self, ids, scores, **kwargs):
        return torch.full((len(ids),), ids.shape[1] >= 10)


class ByRow(StoppingCriteria):
    """Each row at a length of its own."""

    def __call__(self, ids, scores, **kwargs):
        return torch.tensor([ids.shape[1] >= 8 + 2 * row for row in range(len(ids))])


class Calls(StoppingCriteria):
    """Ends all rows at the fifth call; others may end them earlier."""

    def __init__(self):
        self.count, self.stopped = 0, False

    def __call__(self, ids, scores, **kwargs):
        self.count += 1
        return torch.full((len(ids),), self.stopped or self.count >= 5)


class CallsInASlot(StoppingCriteria):
    __slots__ = ("count",)

    def __init__(self):
        self.count = 0

    def __call__(self, ids, scores, **kwargs):
        self.count += 1
        return torch.full((len(ids),), self.count >= 5)


class Event(StoppingCriteria):
    def __init__(self):
        self.event = threading.Event()  # cannot be copied

    def __call__(self, ids, scores, **kwargs):
        return torch.full((len(ids),), self.event.is_set() or ids.shape[1] >= 11)


CRITERIA = {
    "calls": Calls,
    "slot": CallsInASlot,
    "event": Event,
    "padded length": PaddedLength,
    "one verdict a row": ByRow,
    "bool": lambda: lambda ids, scores, **kwargs: ids.shape[1] >= 9,
    "number": lambda: lambda ids, scores, **kwargs: torch.tensor(ids.shape[1] >= 9),
    "time": lambda: MaxTimeCriteria(max_time=1e4),
}


@pytest.mark.parametrize("name", CRITERIA)
@torch.no_grad()
def test_criteria_see_the_padded_batch_and_say_which_rows_end(model, name):
    result = model.generate(IDS, attention_mask=MASK, stopping_criteria=StoppingCriteriaList([CRITERIA[name]()]), **COMMON)
    if name not in ("bool", "number"):  # of which the base makes an error
        same_as_the_base(model, lambda: {"stopping_criteria": StoppingCriteriaList([CRITERIA[name]()])})
    lengths = {"padded length": [10] * 3, "one verdict a row": [8, 10, 12], "time": [20] * 3, "event": [11] * 3}
    lengths |= {"calls": [11] * 3, "slot": [11] * 3, "bool": [9] * 3, "number": [9] * 3}
    assert [int((row[6:] != 0).sum()) + 6 for row in result] == lengths[name]


@torch.no_grad()
def test_what_others_change_in_a_criterion_is_seen(model):
    class Flag(StoppingCriteria):
        def __init__(self):
            self.stop = False

        def __call__(self, ids, scores, **kwargs):
            return torch.full((len(ids),), self.stop)

    flag = Flag()

    def press(row, tokens):
        flag.stop = True

    result = model.generate(
        IDS, attention_mask=MASK, stopping_criteria=StoppingCriteriaList([flag]), on_step=press, **COMMON
    )
    assert result.shape[1] < 6 + COMMON["max_new_tokens"]


HOOKED = {"layer": lambda layer: layer, "attention": lambda layer: layer.self_attn, "mlp": lambda layer: layer.mlp}


@pytest.mark.parametrize("part", HOOKED)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_forward_hooks_on_the_last_layer_steer_the_text_as_they_steer_the_base(name, part):
    model = dynamo_of(name, init="copy")
    layer = model.last_layer
    module = layer.attn if (name, part) == ("gpt2", "attention") else HOOKED[part](layer)
    plain = same_as_the_base(model)
    vector = 3 * torch.randn(32, generator=torch.Generator().manual_seed(3))
    seen = []

    def steer(module, args, output):
        first = output[0] if isinstance(output, tuple) else output
        seen.append(first.shape)
        return (first + vector, *output[1:]) if isinstance(output, tuple) else first + vector

    with module.register_forward_hook(steer):
        steered = same_as_the_base(model)
        with pytest.raises(InputError, match="forward hooks"):
            model.generate(IDS[1:2], attention_mask=MASK[1:2], compile=True, **COMMON)
    assert seen
    assert not torch.equal(steered, plain)
    same_as_the_base(model)


@pytest.mark.parametrize("wrong", [{"num_beams": 2}, {"logits_processor": LogitsProcessorList([lambda ids, scores: 1 / 0])}])
def test_a_streamer_ends_when_generation_raises(model, wrong):
    class Tokenizer:
        def decode(self, tokens, **options):
            return " ".join(map(str, tokens))

    streamer = TextIteratorStreamer(Tokenizer(), timeout=5)
    with pytest.raises((InputError, ZeroDivisionError)):
        model.generate(IDS[1:2], attention_mask=MASK[1:2], streamer=streamer, **COMMON, **wrong)
    list(streamer)  # in time
