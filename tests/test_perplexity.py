"""`eval perplexity`: numbers by hand, transformers' own loss, slow references of mask and walk, exact accounting."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from architectures import dynamo_of, markov_dynamo, random_tokens
from commandline import Run, byte_tokenizer, neox, texts
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import log_weight

from dynamo_lm import DynaMoForCausalLM
from dynamo_lm.cooccurrence.counting import count
from dynamo_lm.data.token_store import tokenizer_fingerprint
from dynamo_lm.decoding.settings import algorithm_of
from dynamo_lm.errors import InputError
from dynamo_lm.evaluation.perplexity.dynamic import StepSize
from dynamo_lm.evaluation.perplexity.masked import Mask, coverage
from dynamo_lm.evaluation.perplexity.scoring import Options, Sums, Text, measure, read_text, windows
from dynamo_lm.sampling.algorithm1 import draw
from dynamo_lm.sampling.options import Algorithm1
from dynamo_lm.sampling.top_k import HeadCandidates


def text_of(*documents) -> Text:
    return Text([np.array(document, dtype=np.int64) for document in documents], 100, ["toy"])


def table_of(documents, *, vocab_size: int, order: int = 3):
    return count([np.array(document) for document in documents], vocab_size=vocab_size, order=order)


# Behind 0: token 1 (1/2) or 2 (1/4) ..; two places ahead head 2 says the same whatever came before.
NEXT = torch.tensor(
    [[0.125, 0.5, 0.25, 0.125], [0.25, 0.25, 0.25, 0.25], [0.5, 0.125, 0.25, 0.125], [0.25, 0.5, 0.125, 0.125]]
)
AFTER = torch.tensor([[0.5, 0.25, 0.125, 0.125]] * 4)


def toy(**kwargs) -> Options:
    algorithm = Algorithm1(top_k=4, temperature=1, otsu=False, repetition_penalty=1)
    return Options(num_heads=2, window=16, stride=8, masked=False, algorithm=algorithm, **kwargs)


# --- numbers --------------------------------------------------------------------


def test_perplexities_of_a_chain_are_those_computed_by_hand() -> None:
    model = markov_dynamo(NEXT, AFTER)
    measured = measure(model, text_of([0, 1, 2, 0], [3, 1]), toy())
    # head 1: 0>1 1/2, 1>2 1/4, 2>0 1/2; 3>1 1/2: 5 halvings of 4 tokens
    # head 2: two behind 0 comes 2 (1/8), two behind 1 comes 0 (1/2)
    record = measured.record()
    assert [row["tokens"] for row in record["heads"]] == [4, 2]
    assert [row["ppl"] for row in record["heads"]] == pytest.approx([2 ** (5 / 4), 2 ** (4 / 2)])
    # both heads where both have a target, in the first document at positions 0 and 1: 1/2 * 1/8 and 1/4 * 1/2
    assert record["joint"][0]["ppl"] == pytest.approx(2 ** (5 / 4))
    assert record["joint"][1]["ppl"] == pytest.approx(2 ** ((1 + 3 + 2 + 1) / 4))
    assert record["joint"][1]["masked_ppl"] is None
    assert record["text"] == {"sources": ["toy"], "documents": 2, "tokens": 6, "bytes": 100, "seen": None}
    assert record["base"] == {"ppl": pytest.approx(2 ** (5 / 4)), "bits_per_byte": pytest.approx(5 / 100)}
    assert record["ceiling"] == 2


def test_the_standard_error_is_that_of_a_ratio_over_documents() -> None:
    # mean 5/4; documents deviate by 4 - 3 * 5/4 = 1/4 and 1 - 5/4 = -1/4: variance 2/1 * 2 * (1/4)^2 / 4^2
    sums = Sums(np.array([4.0, 1.0]), np.array([3.0, 1.0]))
    assert sums.mean == 1.25
    assert sums.error == pytest.approx(math.exp(1.25) * 0.5 / 4)
    assert Sums(np.array([4.0]), np.array([3.0])).error is None


@pytest.mark.parametrize("name", ["gpt_neox", "gemma3", "opt"])
def test_ppl_1_is_the_loss_that_transformers_computes(name: str) -> None:
    model = dynamo_of(name, 2)
    ids = random_tokens(1, 40)
    measured = measure(model, text_of(ids[0]), Options(num_heads=2, window=64, stride=32, masked=False))
    with torch.no_grad():
        loss = model.base(ids, labels=ids).loss.item()
    assert measured.heads[0].mean == pytest.approx(loss, rel=1e-5)
    assert measured.heads[0].tokens.sum() == 39


def test_every_head_is_scored_by_its_own_target() -> None:
    model = dynamo_of("llama", 3)
    ids = random_tokens(2, 30)
    measured = measure(model, text_of(*ids), Options(num_heads=3, window=64, stride=32, masked=False))
    with torch.no_grad():
        log_p = model.logits(ids).log_softmax(-1)  # (3, 2, 30, vocabulary)
    picked = [log_p[i, :, : 29 - i].gather(-1, ids[:, i + 1 :, None]).mean().item() for i in range(3)]
    assert [sums.mean for sums in measured.heads] == pytest.approx([-value for value in picked], rel=1e-5)
    whole = sum(log_p[i, :, :27].gather(-1, ids[:, i + 1 : i + 28, None]).sum() for i in range(3)).item()
    assert measured.joint[2].mean == pytest.approx(-whole / (2 * 27 * 3), rel=1e-5)


# --- windows --------------------------------------------------------------------


@given(
    st.lists(st.integers(2, 40), min_size=1, max_size=5),
    st.integers(1, 12).flatmap(lambda w: st.tuples(st.just(w), st.integers(1, w))),
)
def test_every_position_is_scored_once_with_the_context_that_the_stride_leaves(lengths, sizes) -> None:
    window, stride = sizes
    seen: dict[tuple[int, int], int] = {}
    for found in windows(lengths, window, stride):
        assert found.start <= found.fresh < found.end <= lengths[found.document] - 1
        assert found.end - found.start <= window
        for position in range(found.fresh, found.end):
            assert (found.document, position) not in seen
            seen[found.document, position] = position - found.start + 1
            assert position - found.start + 1 >= min(position + 1, window - stride + 1)
    assert sorted(seen) == [(d, p) for d, length in enumerate(lengths) for p in range(length - 1)]


def test_a_long_document_is_read_by_overlapping_windows() -> None:
    model, ids = dynamo_of("gpt_neox", 2), random_tokens(20)
    measured = measure(model, text_of(ids), Options(num_heads=2, window=8, stride=4, masked=False))
    total = [0.0, 0.0]
    for start, fresh, end in ((0, 0, 8), (4, 8, 12), (8, 12, 16), (12, 16, 19)):
        with torch.no_grad():
            log_p = model.logits(ids[None, start:end]).log_softmax(-1)[:, 0]  # (2, window, vocabulary)
        for head in range(2):
            for position in range(fresh, end):
                if position + head + 1 < 20:
                    total[head] -= log_p[head, position - start, ids[position + head + 1]].item()
    assert [sums.nats.sum() for sums in measured.heads] == pytest.approx(total, rel=1e-5)
    assert [sums.tokens.sum() for sums in measured.heads] == [19, 18]


def test_what_is_computed_together_changes_nothing() -> None:
    model = dynamo_of("gemma3", 3)
    model.cooccurrence = table_of(random_tokens(40, 12, seed=5).tolist(), vocab_size=97)
    text = text_of(*[random_tokens(length, seed=length) for length in (33, 2, 17, 9, 50)])
    options = Options.of(model, window=16, eps_b=(0.0, 0.3, 1.0))
    one, many = (measure(model, text, replace(options, batch_size=size)) for size in (1, 7))
    assert one.steps == many.steps
    for name in ("heads", "joint", "masked_joint", "dynamic", "masked_dynamic"):
        for a, b in zip(getattr(one, name), getattr(many, name), strict=True):
            np.testing.assert_allclose(a.nats, b.nats, rtol=1e-5)
            np.testing.assert_array_equal(a.tokens, b.tokens)


# --- the mask -------------------------------------------------------------------


def slow_conditional(log_f, history, target, table, alpha_c, smoothing) -> float:
    """method.md section 3 over the whole vocabulary, one token at a time."""
    f = log_f.astype(float)
    q = np.exp(f)
    for length in range(min(table.order - 1, len(history)), 0, -1):
        seen = list(history[len(history) - length :])
        weights = log_weight(table, torch.tensor([[*seen, x] for x in range(len(f))])).double().numpy()
        scores = np.where(weights > -np.inf, f + alpha_c * np.maximum(weights, -1e30), -np.inf)
        if scores.max() > -np.inf:
            q = np.exp(scores - scores.max())
            q /= q.sum()
            break
    return math.log(smoothing * math.exp(f[target]) + (1 - smoothing) * q[target])


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(2, 4), st.integers(0, 3), st.sampled_from([0.5, 1.0, 2.0]))
def test_the_masked_joint_is_its_definition_written_out(seed, order, behind, alpha_c) -> None:
    random = np.random.default_rng(seed)
    table = table_of(random.integers(0, 6, (3, 5)).tolist(), vocab_size=6, order=order)
    log_f = torch.from_numpy(random.normal(size=(4, 6)) * 3).float().log_softmax(-1).numpy()
    history, targets = random.integers(0, 6, (4, behind)), random.integers(0, 6, 4)
    fast = Mask(table, alpha_c, 0.1)(log_f, history, targets)
    slow = [slow_conditional(log_f[row], history[row], targets[row], table, alpha_c, 0.1) for row in range(4)]
    np.testing.assert_allclose(fast, slow, rtol=1e-5, atol=1e-6)


def test_the_masked_joint_is_a_distribution() -> None:
    table = table_of([[0, 1, 2, 3, 0, 2]], vocab_size=4, order=2)
    log_f = AFTER[:1].log().numpy()
    history, everything = np.zeros((4, 1), dtype=np.int64), np.arange(4)
    q = np.exp(Mask(table, 1.0, 1e-12)(log_f.repeat(4, 0), history, everything))
    assert q.sum() == pytest.approx(1)
    # Behind 0 came 1 and 2, once each; of six tokens 1 stands once, 2 twice: weights 2 : 1 on f = 1/4, 1/8, so 4/5, 1/5
    assert q == pytest.approx([0, 0.8, 0.2, 0], abs=1e-6)


def test_smoothing_1_is_the_product_of_heads() -> None:
    model = dynamo_of("llama", 3)
    model.cooccurrence = table_of(random_tokens(40, 12, seed=5).tolist(), vocab_size=97)
    measured = measure(model, text_of(random_tokens(30)), Options.of(model, window=64, smoothing=1.0))
    assert [s.mean for s in measured.masked_joint] == pytest.approx([s.mean for s in measured.joint], rel=1e-6)


def test_coverage_is_the_share_of_sequences_that_the_table_holds() -> None:
    table = table_of([[0, 1, 2]], vocab_size=4, order=3)
    documents = [np.array([0, 1, 2, 3]), np.array([0, 1])]
    assert coverage(table, documents, 2) == pytest.approx(3 / 4)  # 01 12 23 01
    assert coverage(table, documents, 4) == pytest.approx(1 / 2)  # the table ends at three: 012 123
    assert coverage(table, [np.array([1])], 2) is None


# --- the walk -------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.05, 0.2, 0.35, 0.5, 0.7, 0.9, 1.0]),
    st.sampled_from([0.8, 1.0, 1.1, 2.0]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.5, 2.0, 5.0]),
)
def test_a_step_is_as_long_as_the_generator_makes_it(seed, n, eps_b, penalty, otsu, masked, sharpness) -> None:
    random = np.random.default_rng(seed)
    logits = torch.from_numpy(random.normal(size=(n, 8)) * sharpness)
    context = random.integers(0, 8, random.integers(1, 6))
    table = table_of(random.integers(0, 8, (4, 12)).tolist(), vocab_size=8, order=4) if masked else None
    options = Algorithm1(eps_b=eps_b, top_k=5, otsu=otsu, repetition_penalty=penalty)
    drawn = draw(logits, torch.from_numpy(context), table, options, torch.Generator().manual_seed(0))
    heads = HeadCandidates.top(logits, options.top_k, options.temperature)
    assert StepSize(heads, context, table, replace(options, eps_b=0.5))(eps_b) == len(drawn.tokens)


@pytest.mark.parametrize("masked", [False, True])
def test_the_walk_goes_through_a_text_as_drawing_at_every_stop_would(masked: bool) -> None:
    model, ids = dynamo_of("gpt_neox", 3), random_tokens(40)
    model.cooccurrence = table_of([*random_tokens(60, 20, seed=5).tolist(), ids.tolist()], vocab_size=97)
    values = (0.0, 0.15, 0.3, 0.5, 1.0)
    algorithm = Algorithm1(top_k=8, temperature=0.2)
    options = Options.of(model, window=16, stride=8, eps_b=values, masked=masked, algorithm=algorithm)
    measured = measure(model, text_of(ids), options)
    table = model.cooccurrence if masked else None
    inside = {p: w for w in windows([40], 16, 8) for p in range(w.fresh, w.end)}
    for number, eps_b in enumerate(values):
        at, nats, sizes = 0, 0.0, []
        while at < 39:
            window = inside[at]
            with torch.no_grad():
                logits = model.logits(ids[None, window.start : window.end])[:, 0, at - window.start].float()
            drawn = draw(logits, ids[window.start : at + 1], table, replace(options.algorithm, eps_b=eps_b), None)
            sizes.append(min(len(drawn.tokens), 39 - at))
            for ahead in range(sizes[-1]):
                nats -= logits[ahead].log_softmax(-1)[ids[at + ahead + 1]].item()
            at += sizes[-1]
        assert measured.steps[number] == [sizes.count(size) for size in (1, 2, 3)]
        assert measured.dynamic[number].nats.sum() == pytest.approx(nats, rel=1e-5)
        assert measured.dynamic[number].tokens.sum() == 39
    assert any(
        1 < measured.tokens_per_step(number) < 2.9 for number in range(1, 4)
    )  # a value in between, else this test shows little


def test_eps_b_1_is_ppl_1_and_eps_b_0_the_joint() -> None:
    model, document = markov_dynamo(NEXT, AFTER), [0, 1, 2, 0, 3, 1]
    measured = measure(model, text_of(document), toy(eps_b=(0.0, 1.0)))
    first, last = measured.dynamic
    assert last.mean == pytest.approx(measured.heads[0].mean)
    assert measured.steps == [[1, 2], [5, 0]]
    # steps of two from 0 and 2, and what is left, one token from 3's position: (1/2 1/8) (1/2 1/8) (1/2), in halvings
    assert first.nats.sum() == pytest.approx((1 + 3 + 1 + 3 + 1) * math.log(2))
    assert measured.tokens_per_step(0) == 5 / 3
    rows = measured.record()["dynamic"]
    assert [(row["eps_b"], row["masked"]) for row in rows] == [(0.0, False), (1.0, False)]
    assert rows[0]["shares"] == [1 / 3, 2 / 3]


def test_the_masked_walk_ends_at_ppl_1_too() -> None:
    model = dynamo_of("llama", 3)
    model.cooccurrence = table_of(random_tokens(40, 12, seed=5).tolist(), vocab_size=97)
    measured = measure(model, text_of(random_tokens(30)), Options.of(model, window=64, eps_b=(1.0,)))
    assert measured.masked_dynamic[0].mean == pytest.approx(measured.heads[0].mean)


# --- options and text -----------------------------------------------------------


def test_the_walk_chooses_as_the_model_would_generate() -> None:
    model = dynamo_of("gpt_neox", 2)
    model.generation_config.top_k, model.generation_config.otsu = 7, False
    assert algorithm_of(model, model.generation_config) == Algorithm1(top_k=7, otsu=False)
    assert algorithm_of(model, {"top_k": 9, "otsu": None}, model.generation_config) == Algorithm1(top_k=9, otsu=False)


def test_options_that_cannot_be_are_refused() -> None:
    model = dynamo_of("gpt_neox", 3)
    assert Options.of(model).window == 128  # its context
    for wrong, said in (
        ({"window": 129}, "context is 128"),
        ({"num_heads": 4}, "has 3"),
        ({"stride": 200}, "stride"),
        ({"batch_size": 0}, "batch size"),
        ({"smoothing": 0.0}, "smoothing"),
        ({"eps_b": (2.0,)}, "probability"),
    ):
        with pytest.raises(InputError, match=said):
            Options.of(model, **wrong)
    model.cooccurrence = table_of([[1, 2, 3]], vocab_size=97, order=2)
    with pytest.raises(InputError, match="order 2"):
        Options.of(model)
    with pytest.raises(InputError, match="too few for 3 heads"):
        measure(model, text_of([1, 2, 3]), Options.of(model, masked=False))
    with pytest.raises(InputError, match="vocabulary"):
        measure(model, text_of([1, 2, 3, 97]), Options.of(model, masked=False))


def test_text_is_read_as_for_training_and_cut_to_its_limits(tmp_path) -> None:
    tokenizer, file = byte_tokenizer(), tmp_path / "text.jsonl"
    stories = texts(30)
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in stories))
    encoded = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in stories]

    def read(**kwargs) -> Text:
        return read_text([str(file)], tokenizer, tmp_path / "store", **kwargs)

    whole = read()
    assert [document.tolist() for document in whole.documents] == encoded
    assert whole.sources == ["text.jsonl"]
    first = sum(len(tokenizer.decode(ids[:1])) for ids in encoded)
    assert whole.bytes == sum(map(len, stories)) - first  # all but what the unscored first tokens spell
    two = read(max_documents=2)
    assert [document.tolist() for document in two.documents] == encoded[:2]
    cut = read(max_tokens=len(encoded[0]) + 5)
    assert [document.tolist() for document in cut.documents] == [encoded[0], encoded[1][:5]]
    held_out = read(validation_fraction=0.1, seed=3)
    assert len(held_out.documents) == 3
    assert all(document.tolist() in encoded for document in held_out.documents)
    with pytest.raises(InputError, match="token limit"):
        read(max_tokens=0)


# --- the command ----------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of three heads with tables and a tokenizer, and a text."""
    where = tmp_path_factory.mktemp("made")
    tokenizer = byte_tokenizer()
    model = DynaMoForCausalLM.from_base(neox(), num_heads=3, init="copy")
    tokens = [np.array(tokenizer(text)["input_ids"]) for text in texts()]
    model.cooccurrence = count(tokens, vocab_size=300, order=3, tokenizer=tokenizer_fingerprint(tokenizer))
    model.save_pretrained(where / "model")
    tokenizer.save_pretrained(where / "model")
    (where / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(6, seed=9)))
    return where


@pytest.fixture
def run(capfd):
    return Run(capfd)


def test_the_command_prints_keeps_and_repeats_its_numbers(run, folder, tmp_path) -> None:
    asked = ("eval", "perplexity", folder / "model", "--data", folder / "text.jsonl", "--eps-b", "0,0.5,1", "--window", 64)
    said = run(*asked, "--out", tmp_path / "results")
    assert "Perplexity per token" in said
    assert "tokens/step" in said
    assert "at most 3 tokens per step" in said
    kept = json.loads((tmp_path / "results" / "perplexity.json").read_text())
    again = json.loads(run(*asked, "--json"))
    own = ("text", "window", "stride", "heads", "joint", "dynamic", "base", "ceiling", "settings", "seed", "model")
    assert {key: kept[key] for key in own} == {key: again[key] for key in own}
    assert kept["kind"] == "perplexity"
    assert [row["head"] for row in kept["heads"]] == [1, 2, 3]
    assert kept["dynamic"][0].keys() == {"eps_b", "ppl", "se", "tokens_per_step", "shares", "masked"}
    assert [row["masked"] for row in kept["dynamic"]] == [False, True] * 3
    assert kept["model"].pop("path") == str(folder / "model")  # as it was given, as in the command
    assert str(folder) not in json.dumps({key: kept[key] for key in own})


def test_without_mask_and_eps_b_those_columns_are_not_there(run, folder) -> None:
    data = ("--data", folder / "text.jsonl", "--no-mask", "--eps-b", "none", "--heads", 2, "--json")
    found = json.loads(run("eval", "perplexity", folder / "model", *data))
    assert found["dynamic"] == []
    assert [row["masked_ppl"] for row in found["joint"]] == [None, None]
    assert found["ceiling"] == 2


def test_what_cannot_be_scored_is_one_sentence(run, folder, tmp_path) -> None:
    ask = ("eval", "perplexity", folder / "model")
    (tmp_path / "short.txt").write_text("the fox ran to a red house")
    (tmp_path / "word.txt").write_text("a")
    assert "--data" in run.refused(*ask)
    assert "does not exist" in run.refused(*ask, "--data", tmp_path / "none.txt")
    assert "fewer than the window of 100" in run.refused(*ask, "--data", tmp_path / "short.txt", "--window", 100)
    assert "context is 128" in run.refused(*ask, "--data", tmp_path / "short.txt", "--window", 500)
    assert "too few for 3 heads" in run.refused(*ask, "--data", tmp_path / "word.txt", "--window", 1)
    assert "--eps-b" in run.refused(*ask, "--data", tmp_path / "short.txt", "--eps-b", "fast")
    (tmp_path / "other").mkdir()
    other = {"kind": "nlu", "model": {"name": "other", "identity": "0" * 16}}
    (tmp_path / "other" / "nlu.json").write_text(json.dumps(other))
    assert "another model" in run.refused(*ask, "--data", folder / "text.jsonl", "--out", tmp_path / "other")
    run(*ask, "--data", tmp_path / "short.txt", "--eps-b", "none")  # the default window: said, not refused
    assert "fewer than the window" in run.err
