"""The decoding loop and `generate`: the base itself under "strict", the method's invariants under "off", statistics."""

from __future__ import annotations

import threading
from functools import cache

import numpy as np
import pytest
import torch
from architectures import CONTEXT, EOS, NAMES, VOCABULARY, base_of, cycle, dynamo_of, markov_dynamo, random_tokens
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)

from dynamo_lm import DynaMoForCausalLM, InputError
from dynamo_lm.backbone.attention_mask import AttentionMaskBuilder
from dynamo_lm.cooccurrence.counting import count
from dynamo_lm.decoding import drafter
from dynamo_lm.decoding.kv_cache import GROWTH, RaggedKVCache
from dynamo_lm.sampling.drafting import draft_from

LENGTHS = [5, 9, 3, 12, 7]
PLAIN = {"pad_token_id": 0, "eos_token_id": EOS, "return_dict_in_generate": True}


def padded(rows: list[list[int]], side: str = "left") -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for r, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[r, place], mask[r, place] = torch.tensor(row), 1
    return {"inputs": ids, "attention_mask": mask}


PROMPTS = [row[:length] for row, length in zip(random_tokens(5, 12).tolist(), LENGTHS, strict=True)]
BATCH = padded(PROMPTS)
WIDTH = BATCH["inputs"].shape[1]


@cache
def greedy_base(name: str) -> Tensor:
    """What transformers' own greedy generation makes of the batch, 48 tokens."""
    return base_of(name).generate(**BATCH, max_new_tokens=48, do_sample=False, pad_token_id=0, eos_token_id=EOS)


@cache
def copied(name: str) -> DynaMoForCausalLM:
    """Four copied heads and a table counted on what the base says, so that drafts are right now and then."""
    model = dynamo_of(name, num_heads=4, init="copy")
    texts = [row.numpy() for row in greedy_base(name)]
    model.cooccurrence = count(texts, vocab_size=VOCABULARY, order=3)
    return model


def assert_equal_or_tied(base: PreTrainedModel, got: list[int], expected: list[int]) -> None:
    """The same tokens; or where they part, the base's two logits are within 1e-4 of each other."""
    if got == expected:
        return
    at = next((i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), None)
    assert at is not None, f"lengths {len(got)} and {len(expected)}"
    with torch.no_grad():
        logits = base(torch.tensor([expected[:at]])).logits[0, -1]
    gap = (logits[got[at]] - logits[expected[at]]).abs().item()
    assert gap < 1e-4, f"token {at}: {got[at]} instead of {expected[at]}, {gap:.2g} apart"


def run(model: DynaMoForCausalLM, rows: list[list[int]], **options):
    """Rows of one length; with a mask, since transformers takes token 0 for padding where there is none."""
    ids = torch.tensor(rows)
    return model.generate(ids, attention_mask=torch.ones_like(ids), **(PLAIN | {"eos_token_id": None} | options))


def without_padding(row: Tensor, mask: Tensor, new_from: int) -> list[int]:
    return row[:new_from][mask.bool()].tolist() + row[new_from:].tolist()


# ---------------------------------------------------------------- strict: the base's own tokens


@pytest.mark.parametrize("name", NAMES)
def test_strict_greedy_is_the_bases_own_greedy(name):
    base, model = base_of(name), copied(name)
    expected = greedy_base(name)
    result = model.generate(**BATCH, max_new_tokens=48, do_sample=False, **PLAIN)
    assert result.sequences.shape == expected.shape
    for row, reference, mask in zip(result.sequences, expected, BATCH["attention_mask"], strict=True):
        assert_equal_or_tied(base, without_padding(row, mask, WIDTH), without_padding(reference, mask, WIDTH))
    assert max(s.tokens_per_step for s in result.statistics) > 1.2  # drafts were accepted,
    assert max(size for s in result.statistics for size in s.step_sizes) == 4  # all of them at times,
    assert min(size for s in result.statistics for size in s.step_sizes) == 1  # and refused

    alone = torch.tensor([PROMPTS[3]])
    expected = base.generate(alone, max_new_tokens=48, do_sample=False, pad_token_id=0, eos_token_id=EOS)[0]
    got = model.generate(alone, max_new_tokens=48, do_sample=False, pad_token_id=0, eos_token_id=EOS)[0]
    assert_equal_or_tied(base, got.tolist(), expected.tolist())


def test_the_tie_helper_tells_a_tie_from_an_error():
    base = base_of("llama")
    best = greedy_base("llama")[3].tolist()
    assert_equal_or_tied(base, best, best)
    with pytest.raises(AssertionError, match="token 20"):
        assert_equal_or_tied(base, [*best[:20], (best[20] + 1) % EOS], best)
    with pytest.raises(AssertionError, match="lengths"):
        assert_equal_or_tied(base, best[:-1], best)


@pytest.mark.parametrize(
    "options",
    [
        {"num_heads": 1},
        {"num_heads": 2},
        {"num_heads": 3},
        {"alpha_c": 0.0},
        {"alpha_c": 0.5},
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 20},
        {"min_length": 25},
        {"bad_words_ids": [[5], [7, 8], [40]]},
        {"suppress_tokens": [3, 4, 5]},
        {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "min_new_tokens": 5},
    ],
    ids=lambda options: "-".join(options),
)
def test_strict_heeds_processors_as_transformers_does(options):
    theirs = {key: value for key, value in options.items() if key not in ("num_heads", "alpha_c")}
    base, model = base_of("llama"), copied("llama")
    eos = greedy_base("llama")[3, WIDTH + 3].item()  # the base wants to end after four tokens
    for prompt in PROMPTS[2:4]:
        common = {"max_new_tokens": 32, "do_sample": False, "pad_token_id": 0, "eos_token_id": eos}
        expected = base.generate(torch.tensor([prompt]), **common, **theirs)
        got = model.generate(torch.tensor([prompt]), **common, **options)
        assert got.tolist() == expected.tolist()


def test_rows_with_processors_are_what_they_are_alone():
    model = copied("llama")
    eos = greedy_base("llama")[3, WIDTH + 3].item()
    options = {"min_new_tokens": 9, "repetition_penalty": 1.2, "max_new_tokens": 24, "do_sample": False}
    options |= {"pad_token_id": 0, "eos_token_id": eos}
    for side in ("left", "right"):
        together = model.generate(**padded(PROMPTS, side), **options)[:, WIDTH:]
        for prompt, row in zip(PROMPTS, together.tolist(), strict=True):
            alone = model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :]
            assert row == alone.tolist() + [0] * (24 - len(alone))


def test_a_processor_of_ones_own_is_heeded():
    class Only(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([7, input_ids.shape[1] % 90]), 0.0)

    model = copied("llama")
    out = model.generate(
        torch.tensor([[5, 6, 4]]), logits_processor=LogitsProcessorList([Only()]), max_new_tokens=9, do_sample=False
    )
    assert out[0, 3:].tolist() == [3, 4, 5, 6, 7, 7, 7, 7, 7]  # ties of 7 and the length go to the lower id


# ---------------------------------------------------------------- rows

MODES = {
    "off": {"verify": "off", "num_heads": 3, "do_sample": True, "eps_b": 0.9},
    "off greedy": {"verify": "off", "num_heads": 3, "do_sample": False, "eps_b": 0.8},
    "strict": {"do_sample": True, "temperature": 0.8},
    "strict top-k": {"do_sample": True, "top_k": 10, "top_p": 0.9},
    "one head": {"do_sample": True, "num_heads": 1},
}


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *(("gemma3", mode) for mode in MODES),
        *(("gpt2", mode) for mode in ("off", "strict top-k")),
        *(("gpt_neox", mode) for mode in ("off greedy", "strict")),
        ("qwen3_moe", "strict"),
    ],
)
def test_a_row_of_a_batch_is_what_it_is_alone(name, mode):
    model, options = copied(name), MODES[mode] | PLAIN | {"max_new_tokens": 24}
    together = model.generate(**BATCH, seed=[11, 12, 13, 14, 15], **options)
    rows = together.sequences[:, WIDTH:].tolist()
    sizes = set()
    for row, prompt in enumerate(PROMPTS):
        alone = model.generate(torch.tensor([prompt]), seed=11 + row, **options)
        new = alone.sequences[0, len(prompt) :].tolist()
        assert rows[row] == new + [0] * (len(rows[row]) - len(new))
        assert together.statistics[row].step_sizes == alone.statistics[0].step_sizes
        sizes.update(alone.statistics[0].step_sizes)
    assert len(sizes) > 1 or mode in ("one head", "off greedy")  # rows do move at their own pace


@pytest.mark.parametrize("mode", MODES)
def test_padding_may_be_on_either_side(mode):
    model, options = copied("gemma3"), MODES[mode] | PLAIN | {"max_new_tokens": 16, "seed": 1}
    left = model.generate(**padded(PROMPTS, "left"), **options).sequences[:, WIDTH:]
    right = model.generate(**padded(PROMPTS, "right"), **options).sequences[:, WIDTH:]
    assert torch.equal(left, right)


def test_sequences_start_with_the_prompts_as_given_and_end_padded():
    model = markov_dynamo(cycle(10), cycle(10, 2), cycle(10, 3))
    rows = padded([[1], [1, 2, 3, 4]])
    out = model.generate(**rows, max_new_tokens=20, do_sample=False, eos_token_id=7, pad_token_id=9)
    assert out.tolist() == [[0, 0, 0, 1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7, 9, 9, 9]]


# ---------------------------------------------------------------- seeds


@pytest.mark.parametrize("mode", ["off", "strict"])
def test_seeds_reproduce(mode):
    model, options = copied("llama"), MODES[mode] | {"max_new_tokens": 16, "pad_token_id": 0, "eos_token_id": EOS}
    one = model.generate(**BATCH, seed=5, **options)
    assert torch.equal(one, model.generate(**BATCH, seed=5, **options))
    assert torch.equal(one, model.generate(**BATCH, seed=[5, 6, 7, 8, 9], **options))
    assert not torch.equal(one, model.generate(**BATCH, seed=6, **options))
    torch.manual_seed(3)
    two = model.generate(**BATCH, **options)
    three = model.generate(**BATCH, **options)
    torch.manual_seed(3)
    assert torch.equal(two, model.generate(**BATCH, **options))
    assert not torch.equal(two, three)


def test_there_must_be_a_seed_for_every_row():
    with pytest.raises(InputError, match="2 seeds were given for 5 rows"):
        copied("llama").generate(**BATCH, seed=[1, 2], max_new_tokens=4)


def test_return_sequences_differ():
    prompt = torch.tensor([PROMPTS[0]])
    out = copied("llama").generate(prompt, num_return_sequences=3, do_sample=True, max_new_tokens=12, seed=0)
    assert out.shape[0] == 3
    assert len({tuple(row) for row in out.tolist()}) == 3


# ---------------------------------------------------------------- the method's invariants


@pytest.mark.parametrize("sample", [True, False])
def test_eps_b_0_always_emits_n_tokens_and_eps_b_1_always_one(sample):
    model = copied("gpt_neox")
    common = PLAIN | {"verify": "off", "num_heads": 3, "do_sample": sample, "max_new_tokens": 24, "eos_token_id": None}
    for mask in (1.0, 0.0):
        if mask == 0:  # with the mask on, tuples that were never seen may leave nothing to emit
            always = model.generate(**BATCH, **common, eps_b=0.0, alpha_c=mask, seed=1)
            assert all(s.step_sizes == [3] * 8 for s in always.statistics)
        never = model.generate(**BATCH, **common, eps_b=1.0, alpha_c=mask, seed=1)
        assert all(s.step_sizes == [1] * 24 for s in never.statistics)


def test_eps_b_0_with_a_table_of_everything_emits_n_tokens():
    model = markov_dynamo(cycle(6), cycle(6, 2), cycle(6, 3))
    everything = np.random.default_rng(0).integers(0, 6, 5000)
    model.cooccurrence = count([everything], vocab_size=6, order=3)
    out = run(model, [[1]], verify="off", eps_b=0.0, top_k=6, max_new_tokens=30, do_sample=True, seed=0)
    assert out.statistics[0].step_sizes == [3] * 10


def test_off_with_one_head_and_no_knobs_is_ordinary_sampling_of_the_base():
    model = copied("llama")
    options = PLAIN | {"num_heads": 1, "do_sample": True, "max_new_tokens": 24, "seed": 4}
    knobs = {"top_k": VOCABULARY, "temperature": 0.9, "repetition_penalty": 1.0}
    off = model.generate(**BATCH, verify="off", **options, **knobs)
    strict = model.generate(**BATCH, **options, top_k=0, temperature=0.9)  # inverse CDFs in different orders
    assert all(s.step_sizes == [1] * s.new_tokens for s in [*off.statistics, *strict.statistics])
    greedy = model.generate(**BATCH, verify="off", **(options | {"do_sample": False}), repetition_penalty=1.0)
    expected = greedy_base("llama")[:, : WIDTH + 24]
    assert torch.equal(greedy.sequences[:, :], expected)


def test_perfect_heads_give_the_ceiling():
    model = markov_dynamo(cycle(10), cycle(10, 2), cycle(10, 3))
    out = run(model, [[0]], max_new_tokens=13, do_sample=False)
    assert out.sequences[0].tolist() == [i % 10 for i in range(14)]
    statistics = out.statistics[0]
    assert statistics.step_sizes == [1, 3, 3, 3, 3]  # the prompt's forward has no drafts to judge
    assert statistics.histogram == [1, 0, 4]
    assert statistics.acceptance == [1.0, 1.0]
    assert statistics.ceiling == 3


def test_wrong_heads_cost_nothing_but_speed():
    model = markov_dynamo(cycle(10), cycle(10, 5), cycle(10, 3))
    out = run(model, [[0]], max_new_tokens=13, do_sample=False, tree=0)
    assert out.sequences[0].tolist() == [i % 10 for i in range(14)]
    assert out.statistics[0].step_sizes == [1] * 13
    assert out.statistics[0].acceptance == [0.0, 0.0]
    assert out.statistics[0].proposed == [11, 0]  # behind a refusal nothing is looked at; the last step drafts nothing


# ---------------------------------------------------------------- where a row ends

PERFECT = {
    "strict": {"do_sample": False},
    "off": {"verify": "off", "eps_b": 0.0, "top_k": 4, "do_sample": False, "repetition_penalty": 1.0},
}


def perfect() -> DynaMoForCausalLM:
    return markov_dynamo(cycle(12), cycle(12, 2), cycle(12, 3), cycle(12, 4))


@pytest.mark.parametrize("mode", PERFECT)
@pytest.mark.parametrize("eos", range(1, 10))
def test_an_end_token_inside_a_step_ends_the_row_there(mode, eos):
    out = run(perfect(), [[0]], max_new_tokens=20, eos_token_id=[eos, 11], **PERFECT[mode])
    assert out.sequences[0].tolist() == list(range(eos + 1))
    assert out.statistics[0].new_tokens == sum(out.statistics[0].step_sizes) == eos


@pytest.mark.parametrize("mode", PERFECT)
@pytest.mark.parametrize("limit", range(1, 10))
def test_max_new_tokens_is_exact(mode, limit):
    out = run(perfect(), [[0, 1], [3, 4]], max_new_tokens=limit, **PERFECT[mode])
    assert out.sequences.shape == (2, 2 + limit)
    assert [s.new_tokens for s in out.statistics] == [limit, limit]
    by_length = run(perfect(), [[0, 1], [3, 4]], max_length=2 + limit, **PERFECT[mode])
    assert torch.equal(by_length.sequences, out.sequences)


@pytest.mark.parametrize("mode", PERFECT)
@pytest.mark.parametrize("length", range(7, 16))
def test_generation_stops_where_the_context_ends(mode, length):
    model = markov_dynamo(cycle(12), cycle(12, 2), cycle(12, 3), cycle(12, 4), context=16)
    rows = [[(i + start) % 12 for i in range(length)] for start in (0, 5)]
    out = run(model, rows, max_new_tokens=40, **PERFECT[mode])
    assert out.sequences[0].tolist() == [i % 12 for i in range(16)]
    assert [s.new_tokens for s in out.statistics] == [16 - length] * 2


@pytest.mark.parametrize("name", ["gpt_neox", "gpt2", "opt", "gemma3"])
def test_positions_at_the_contexts_end_are_right_with_real_layers(name):
    base, model = base_of(name), copied(name)
    long = random_tokens(1, CONTEXT - 10)
    rows = padded([long[0].tolist(), PROMPTS[0]])
    expected = base.generate(long, max_new_tokens=10, do_sample=False, pad_token_id=0, eos_token_id=EOS)[0]
    out = model.generate(**rows, max_new_tokens=48, do_sample=False, **PLAIN)
    assert_equal_or_tied(base, out.sequences[0, :CONTEXT].tolist(), expected.tolist())
    assert out.statistics[0].new_tokens == 10
    assert out.statistics[1].new_tokens == 48


def tokenizer() -> PreTrainedTokenizerFast:
    """Token i is the i-th letter."""
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate("abcdefghijkl")}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


@pytest.mark.parametrize("mode", PERFECT)
def test_stop_strings_end_a_row_at_the_token_that_completes_them(mode):
    ask = {"max_new_tokens": 11, **PERFECT[mode]}
    out = run(perfect(), [[0], [4]], tokenizer=tokenizer(), stop_strings=["gh", "zz"], **ask)
    assert out.sequences.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7], [4, 5, 6, 7, 0, 0, 0, 0]]
    with pytest.raises(InputError, match="stop_strings need the tokenizer"):
        run(perfect(), [[0]], stop_strings=["gh"], **ask)


@pytest.mark.parametrize("mode", PERFECT)
def test_a_stopping_criterion_of_ones_own_is_heeded_per_row(mode):
    class Six(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids[:, -1] == 6

    criteria = StoppingCriteriaList([Six()])
    out = run(perfect(), [[0], [9]], stopping_criteria=criteria, max_new_tokens=40, **PERFECT[mode])
    assert [s.new_tokens for s in out.statistics] == [6, 9]
    assert out.sequences[0, :7].tolist() == [0, 1, 2, 3, 4, 5, 6]


# ---------------------------------------------------------------- streaming


@pytest.mark.parametrize("mode", PERFECT)
def test_streamers_receive_the_text(mode):
    class Collect(TextStreamer):
        text = ""

        def on_finalized_text(self, text: str, stream_end: bool = False):
            self.text += text

    letters, options = tokenizer(), {"max_new_tokens": 9, **PERFECT[mode]}
    for skip in (True, False):
        streamer = Collect(letters, skip_prompt=skip)
        run(perfect(), [[0, 1, 2]], streamer=streamer, **options)
        assert streamer.text == ("defghijkl" if skip else "abcdefghijkl")

    streamer = TextIteratorStreamer(letters, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=run, args=(perfect(), [[0, 1, 2]]), kwargs={"streamer": streamer, **options})
    thread.start()
    assert "".join(streamer) == "defghijkl"
    thread.join()


def test_on_step_tells_every_step_of_every_row():
    steps: list[tuple[int, list[int]]] = []
    out = copied("llama").generate(
        **BATCH, max_new_tokens=16, do_sample=False, on_step=lambda row, tokens: steps.append((row, tokens)), **PLAIN
    )
    for row, statistics in enumerate(out.statistics):
        mine = [tokens for number, tokens in steps if number == row]
        assert [len(tokens) for tokens in mine] == statistics.step_sizes
        assert [token for tokens in mine for token in tokens] == out.sequences[
            row, WIDTH : WIDTH + statistics.new_tokens
        ].tolist()


# ---------------------------------------------------------------- what is refused


def test_processors_that_the_joint_cannot_heed_are_refused_by_name():
    model, common = copied("llama"), {"verify": "off", "num_heads": 3, "max_new_tokens": 8} | PLAIN
    for options, name in [
        ({"no_repeat_ngram_size": 2}, "NoRepeatNGramLogitsProcessor"),
        ({"min_new_tokens": 3}, "MinNewTokensLengthLogitsProcessor"),
        ({"bad_words_ids": [[5]]}, "NoBadWordsLogitsProcessor"),
        ({"do_sample": True, "top_p": 0.5}, "TopPLogitsWarper"),
    ]:
        with pytest.raises(InputError, match=f"{name} does not apply|MinLength") as caught:
            model.generate(**BATCH, **common, **options)
        assert "strict" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"num_beams": 3}, "num_beams"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
        ({"output_logits": True, "return_dict_in_generate": True}, "output_logits"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"max_matching_ngram_size": 3}, "max_matching_ngram_size"),
        ({"generation_config": GenerationConfig(num_beams=2)}, "num_beams"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_the_loop_cannot_do_is_refused_by_name(options, name):
    with pytest.raises(InputError, match=f"^{name} is not supported"):
        copied("llama").generate(torch.tensor([[5]]), max_new_tokens=4, **options)


def test_an_assistant_a_cache_and_embeddings_are_refused():
    model = copied("llama")
    for options in ({"assistant_model": model.base}, {"past_key_values": RaggedKVCache(3, 1)}):
        with pytest.raises(InputError, match=f"{next(iter(options))} is not supported"):
            model.generate(torch.tensor([[5]]), max_new_tokens=4, **options)
    with pytest.raises(InputError, match="inputs_embeds is not supported"):
        model.generate(inputs_embeds=torch.zeros(1, 3, 32), max_new_tokens=4)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"eps_b": -0.1}, "eps_b"),
        ({"eps_b": 1.1}, "eps_b"),
        ({"eps_b": float("nan")}, "eps_b"),
        ({"alpha_c": -1.0}, "alpha_c"),
        ({"verify": "loose"}, 'verify is "loose"'),
        ({"num_heads": 5}, "num_heads is 5, but the model has 4"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"verify": "off", "top_k": VOCABULARY + 1}, f"top_k is {VOCABULARY + 1}"),
        ({"verify": "off", "num_heads": 1, "top_k": VOCABULARY + 1}, "top_k"),
        ({"verify": "off", "num_heads": 4}, "table has order 3 but 4 tokens"),
        ({"num_heads": "2"}, "num_heads is '2'; give a whole number"),
        ({"num_heads": 2.5}, "num_heads is 2.5; give a whole number"),
        ({"num_heads": True}, "num_heads is True"),
        ({"tree": 2.5}, "tree is 2.5; give a whole number"),
        ({"eps_b": "x"}, "eps_b is 'x'; give a number"),
        ({"alpha_c": "x"}, "alpha_c is 'x'; give a number"),
        ({"synthetic_acceptance": "x"}, "synthetic_acceptance is 'x'; give a number"),
        ({"verify": [0.1]}, "verify is "),
        ({"seed": "a"}, "seed is 'a'; give a whole number"),
        ({"seed": 1.5}, "seed is 1.5; give a whole number"),
        ({"seed": 2**70}, "seed is "),
        ({"seed": [1.5]}, "seed is "),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options, reason):
    with pytest.raises(InputError, match=reason):
        copied("llama").generate(torch.tensor([[5, 6]]), max_new_tokens=4, **options)


@pytest.mark.parametrize("mode", PERFECT)
def test_unusable_prompts_are_refused(mode):
    model, options = perfect(), {"max_new_tokens": 4, "pad_token_id": 0, **PERFECT[mode]}
    ones = torch.ones(1, CONTEXT + 1, dtype=torch.long)
    cases = [
        ({"inputs": torch.empty(1, 0, dtype=torch.long)}, "prompt is empty"),
        (
            {"inputs": ones[:, :2].expand(2, 2), "attention_mask": torch.tensor([[0, 0], [1, 1]])},
            "prompt is empty",
        ),
        ({"inputs": ones}, f"{CONTEXT + 1} tokens and the model's context is {CONTEXT}"),
        ({"inputs": ones[:, :CONTEXT]}, f"{CONTEXT} tokens and the model's context is {CONTEXT}"),
        ({"inputs": ones, "attention_mask": ones}, f"{CONTEXT + 1} tokens and the model's context is {CONTEXT}"),
        ({"inputs": torch.tensor([[1, 12]])}, "token 12, but the model's vocabulary ends at 11"),
        ({"inputs": torch.tensor([[1, -1]])}, "token -1, but"),
    ]
    for prompt, reason in cases:
        with pytest.raises(InputError, match=reason):
            model.generate(**prompt, **options)


# ---------------------------------------------------------------- statistics


@pytest.mark.parametrize("mode", MODES)
def test_statistics_add_up(mode):
    model = copied("gpt_neox")
    forwards = []
    hook = model.body.register_forward_hook(lambda *_: forwards.append(1))
    out = model.generate(**BATCH, max_new_tokens=24, seed=2, **MODES[mode], **PLAIN)
    hook.remove()

    assert max(s.forwards for s in out.statistics) == len(forwards)  # one forward of the trunk per step
    for row, s in enumerate(out.statistics):
        prompt, new = PROMPTS[row], out.sequences[row, WIDTH:][: s.new_tokens].tolist()
        assert len(new) == s.new_tokens == sum(s.step_sizes) <= 24
        assert s.forwards == len(s.step_sizes)
        assert s.tokens_per_step == s.new_tokens / s.forwards
        assert sum(s.histogram) == s.forwards
        assert sum(size * times for size, times in enumerate(s.histogram, start=1)) == s.new_tokens
        assert s.seconds > 0

        # the base's own word on the text, by an independent forward
        with torch.no_grad():
            log_p = model.base(torch.tensor([prompt + new])).logits[0].float().log_softmax(-1)
        log_p = log_p[len(prompt) - 1 : -1]
        likelihoods = log_p.gather(1, torch.tensor(new)[:, None])[:, 0]
        regrets = log_p.max(-1).values - likelihoods
        if MODES[mode].get("verify") == "off":  # of the last step only the first token was scored
            assert s.scored == s.new_tokens - s.step_sizes[-1] + 1 == s.unverified
            assert s.regret == pytest.approx(regrets[: s.scored].sum().item(), abs=1e-3)
            assert s.mean_regret == pytest.approx(s.regret / s.scored)
        else:
            assert s.scored == s.new_tokens
            assert (s.regret, s.unverified) == (0, 0)
            assert sum(s.accepted) >= s.new_tokens - s.forwards  # the rest of each step is accepted drafts
        assert s.log_likelihood == pytest.approx(likelihoods[: s.scored].sum().item(), abs=1e-3)
        assert s.mean_log_likelihood == pytest.approx(s.log_likelihood / s.scored)


@pytest.mark.parametrize("eos", range(1, 8))
def test_tokens_behind_the_end_are_not_scored(eos):
    out = run(perfect(), [[0]], max_new_tokens=20, do_sample=False, eos_token_id=eos)
    step = torch.tensor(0.9 + 0.1 / 12).log().item()
    assert out.statistics[0].scored == eos
    assert out.statistics[0].log_likelihood == pytest.approx(eos * step, abs=1e-5)


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("name", ["gpt_neox", "gemma2", "qwen3_moe"])
@pytest.mark.parametrize("mode", ["off", "strict"])
def test_bfloat16_runs(name, mode):
    model = dynamo_of(name).to(torch.bfloat16)
    out = model.generate(**BATCH, max_new_tokens=12, seed=0, **MODES[mode], **PLAIN)
    assert all(s.new_tokens == 12 or EOS in out.sequences[row] for row, s in enumerate(out.statistics))


# ---------------------------------------------------------------- the cache


def fill(cache: RaggedKVCache, layer: int, values: Tensor) -> Tensor:
    """values: (rows, new); keys and values of width 1 in one head."""
    keys, same = cache.update(values[:, None, :, None].float(), values[:, None, :, None].float(), layer)
    assert torch.equal(keys, same)
    return keys[:, 0, :, 0]


def test_rows_of_a_cache_have_lengths_of_their_own():
    cache = RaggedKVCache(num_layers=1, num_slots=2)
    assert cache.reserve(3).tolist() == [[0, 1, 2], [0, 1, 2]]
    assert fill(cache, 0, torch.tensor([[1, 2, 3], [4, 5, 9]])).tolist() == [[1, 2, 3], [4, 5, 9]]
    cache.commit(torch.tensor([3, 2]))  # of the second row, the last is forgotten
    assert cache.lengths.tolist() == [3, 2]
    assert cache.get_seq_length() == 3

    assert cache.reserve(2).tolist() == [[3, 4], [2, 3]]
    seen = fill(cache, 0, torch.tensor([[6, 7], [8, 8]]))
    assert seen.shape == (2, 5)
    assert seen[0].tolist() == [1, 2, 3, 6, 7]
    assert seen[1, :4].tolist() == [4, 5, 8, 8]  # written over what was forgotten
    cache.commit(torch.tensor([1, 2]))
    assert cache.lengths.tolist() == [4, 4]


def test_a_cache_keeps_the_rows_selected():
    cache = RaggedKVCache(num_layers=2, num_slots=3)
    cache.reserve(2)
    for layer in (0, 1):
        fill(cache, layer, torch.tensor([[1, 2], [3, 4], [5, 6]]) + 10 * layer)
    cache.commit(torch.tensor([2, 1, 2]))
    cache.select(torch.tensor([0, 2]))
    assert cache.lengths.tolist() == [2, 2]
    cache.reserve(1)
    assert fill(cache, 0, torch.tensor([[7], [8]])).tolist() == [[1, 2, 7], [5, 6, 8]]
    assert fill(cache, 1, torch.tensor([[7], [8]])).tolist() == [[11, 12, 7], [15, 16, 8]]


def test_a_cache_grows_beyond_its_buffer_and_forgets_nothing():
    cache, rows = RaggedKVCache(num_layers=1, num_slots=2), torch.arange(2)[:, None]
    expected: list[list[int]] = [[], []]
    for step in range(3 * GROWTH // 4):
        new = torch.arange(4) + 4 * step + 10_000 * rows
        cache.reserve(4)
        seen = fill(cache, 0, new)
        keep = torch.tensor([4, step % 3])
        for row in (0, 1):
            assert seen[row, : len(expected[row])].tolist() == expected[row] if step % 50 == 0 else True
            expected[row] += new[row, : keep[row]].tolist()
        cache.commit(keep)
    assert cache.lengths.tolist() == [len(row) for row in expected]


def test_masks_show_each_row_its_own_past():
    config = base_of("llama").config
    mask = AttentionMaskBuilder.of(config, torch.float32).mask(torch.tensor([[2, 3], [0, 1]]), torch.arange(4)[None])
    assert mask.dtype == torch.bool
    assert mask[:, 0].int().tolist() == [[[1, 1, 1, 0], [1, 1, 1, 1]], [[1, 0, 0, 0], [1, 1, 0, 0]]]


def test_masks_show_nothing_across_documents():
    segments, positions = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 1, 2, 3]])
    config = base_of("llama").config
    mask = AttentionMaskBuilder.of(config, torch.float32).mask(
        positions, positions, query_segments=segments, key_segments=segments
    )
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


def test_masks_slide_by_layer_type_and_add_where_the_implementation_adds():
    config = base_of("gemma2").config  # eager
    positions = torch.arange(10)[None]
    masks = AttentionMaskBuilder.of(config, torch.float32).mask(positions, positions)
    assert set(masks) == {"full_attention", "sliding_attention"}
    assert masks["full_attention"][0, 0, 9].eq(0).int().tolist() == [1] * 10
    assert masks["sliding_attention"][0, 0, 9].eq(0).int().tolist() == [0, 0] + [1] * 8  # a window of 8
    assert masks["full_attention"].unique().tolist() == [torch.finfo(torch.float32).min, 0]


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "mistral"])
@pytest.mark.parametrize(("start", "width", "slots"), [(0, 1, 1), (9, 3, 12), (9, 4, 32)])
def test_the_mask_of_the_next_tokens_is_the_general_one(name, start, width, slots):
    form = AttentionMaskBuilder.of(base_of(name).config, torch.float32)
    expected = form.mask(torch.arange(start, start + width)[None], torch.arange(slots)[None])
    found = form.next(start, width, slots, device=torch.device("cpu"))
    kinds = expected if isinstance(expected, dict) else {"": expected}
    for kind, mask in kinds.items():
        assert torch.equal(found[kind] if isinstance(found, dict) else found, mask)


def test_layers_that_are_no_attention_over_the_past_are_refused():
    config = base_of("qwen3").config
    config.layer_types = ["linear_attention", "full_attention", "full_attention"]
    with pytest.raises(InputError, match='"linear_attention" are not supported'):
        AttentionMaskBuilder.of(config, torch.float32).mask(torch.arange(2)[None], torch.arange(2)[None])


def test_drafts_follow_the_whole_text_unless_a_budget_may_keep_them(monkeypatch):
    lengths: list[int] = []

    def watched(heads, text, *rest, **how):
        lengths.append(text.size)
        return draft_from(heads, text, *rest, **how)

    monkeypatch.setattr(drafter, "draft_from", watched)
    how = {"do_sample": False, "tree": 0, "max_new_tokens": 20, "eos_token_id": None}
    dynamo_of("llama", 3).generate(torch.tensor([[4, 8, 15, 16, 23, 42]]), **how)
    assert lengths[0] == 7 and max(lengths) > 20
    lengths.clear()
    dynamo_of("llama", 3).generate(torch.tensor([[4, 8, 15, 16, 23, 42]]), verify=0.2, **how)
    assert set(lengths) == {3}
