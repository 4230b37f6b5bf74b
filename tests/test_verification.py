"""Exact verification: kept drafts and what follows them have the base model's own distribution."""

from __future__ import annotations

import itertools
import math
from unittest.mock import patch

import numpy as np
import pytest
import torch
from architectures import base_of, dynamo_of, markov_dynamo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dynamo_lm.decoding.batch
from dynamo_lm.cooccurrence.counting import count
from dynamo_lm.decoding import verification
from dynamo_lm.decoding.verification import accept_greedy, accept_sampled
from dynamo_lm.kernels import loader

TOO_UNLIKELY = 1e-4  # p-value below which a sample is held to come from another distribution
RUNS, ROWS = 4000, 1500  # of a rule and of the loop: right ones are asked as often as wrong ones, which are found out


def p_value(counts: dict, probabilities: dict) -> float:
    """Of a chi-square test that `counts` were drawn from `probabilities`; outcomes below 5 expected are pooled."""
    assert sum(probabilities.values()) == pytest.approx(1, abs=1e-6)
    total = sum(counts.values())
    if set(counts) - {outcome for outcome, p in probabilities.items() if p > 1e-12}:
        return 0.0  # something impossible was drawn
    cells = sorted((total * p, counts.get(outcome, 0)) for outcome, p in probabilities.items())
    pooled, rest = [], [0.0, 0]
    for expected, seen in cells:
        rest = [rest[0] + expected, rest[1] + seen]
        if rest[0] >= 5:
            pooled.append(rest)
            rest = [0.0, 0]
    pooled[-1] = [pooled[-1][0] + rest[0], pooled[-1][1] + rest[1]]
    statistic = sum((seen - expected) ** 2 / expected for expected, seen in pooled)
    half = torch.tensor([(len(pooled) - 1) / 2, statistic / 2], dtype=torch.float64)
    return torch.special.gammaincc(half[0], half[1]).item()


def tally(outcomes) -> dict:
    counts: dict = {}
    for outcome in outcomes:
        counts[outcome] = counts.get(outcome, 0) + 1
    return counts


def test_the_chi_square_test_knows_a_fair_die_from_a_loaded_one():
    assert p_value({0: 5, 1: 15}, {0: 0.5, 1: 0.5}) == pytest.approx(math.erfc(math.sqrt(5 / 2)))  # chi2 = 5, 1 degree
    fair = dict.fromkeys(range(6), 1 / 6)
    generator = np.random.default_rng(0)
    assert p_value(tally(generator.integers(0, 6, 6000).tolist()), fair) > TOO_UNLIKELY
    loaded = generator.choice(6, 6000, p=[0.2, 0.16, 0.16, 0.16, 0.16, 0.16]).tolist()
    assert p_value(tally(loaded), fair) < TOO_UNLIKELY
    assert p_value({6: 1}, fair) == 0


# ---------------------------------------------------------------- greedy, by hand


@pytest.mark.parametrize(
    ("best", "drafts", "expected"),
    [
        ([3], [], (0, 3)),  # nothing drafted: the base's choice
        ([3, 1, 4], [3, 1], (2, 4)),  # all right: one more for free
        ([3, 1, 4], [3, 2], (1, 1)),  # second one wrong: the base's choice in its place
        ([3, 1, 4], [0, 1], (0, 3)),  # a right draft behind a wrong one counts for nothing
    ],
)
def test_greedy_drafts_stay_up_to_the_first_that_is_not_the_bases_choice(best, drafts, expected):
    assert accept_greedy(torch.eye(5)[best], drafts)[:2] == expected


def test_equal_logits_go_to_the_lowest_token_as_argmax_does():
    assert accept_greedy(torch.tensor([[0.0, 2.0, 2.0]]), [])[:2] == (0, 1)


def test_positions_beyond_the_drafts_are_not_looked_at():
    assert accept_greedy(torch.eye(5)[[3, 1, 0, 0]], [3])[:2] == (1, 1)


# ---------------------------------------------------------------- sampled

P = torch.tensor([[0.5, 0.3, 0.15, 0.05, 0.0], [0.1, 0.1, 0.2, 0.2, 0.4], [0.2, 0.2, 0.2, 0.2, 0.2]])
Q = [([1, 0, 3], [0.6, 0.3, 0.1]), ([4, 2], [0.5, 0.5])]  # of two drafts: candidates and their probabilities


def draw_and_accept(rule, runs: int) -> list[tuple[int, ...]]:
    """The first two tokens that stand, where the base has distributions P and drafts come from Q."""
    generator = torch.Generator().manual_seed(0)
    proposals = [(torch.tensor(ids), torch.tensor(probs, dtype=torch.float64)) for ids, probs in Q]
    outcomes = []
    for _ in range(runs):
        drafts = [int(ids[torch.multinomial(probs, 1, generator=generator)]) for ids, probs in proposals]
        kept, token, *_ = rule(P.log(), drafts, proposals, generator)
        stands = [*drafts[:kept], token]
        while len(stands) < 2:  # what the base itself would go on with
            stands.append(int(torch.multinomial(P[1], 1, generator=generator)))
        outcomes.append(tuple(stands[:3]))
    return outcomes


def always_accept(logits, drafts, proposals, generator, regret_budgets=(), **_):
    token = int(torch.multinomial(logits[len(drafts)].softmax(-1), 1, generator=generator))
    return len(drafts), token, [0.0] * len(drafts), list(range(1, len(drafts) + 1))


def redraw_from_p(logits, drafts, proposals, generator):
    """The rejection rule with a frequent mistake: after a refusal it draws from p in place of max(p - q, 0)."""
    for position, (token, (ids, probs)) in enumerate(zip(drafts, proposals, strict=True)):
        p = logits[position].double().softmax(-1)
        q = probs[ids == token]
        if torch.rand((), generator=generator) * q >= p[token]:
            return position, int(torch.multinomial(p, 1, generator=generator))
    return len(drafts), int(torch.multinomial(logits[len(drafts)].softmax(-1), 1, generator=generator))


def test_the_rejection_rule_keeps_the_bases_distribution_whatever_the_draft():
    outcomes = draw_and_accept(accept_sampled, RUNS)
    first = {token: p.item() for token, p in enumerate(P[0])}
    both = {(a, b): (P[0, a] * P[1, b]).item() for a, b in itertools.product(range(5), repeat=2)}
    assert p_value(tally(o[0] for o in outcomes), first) > TOO_UNLIKELY
    assert p_value(tally(o[:2] for o in outcomes), both) > TOO_UNLIKELY
    third = tally(o[2] for o in outcomes if len(o) == 3)  # behind two kept drafts
    assert sum(third.values()) > 500
    assert p_value(third, {token: 0.2 for token in range(5)}) > TOO_UNLIKELY


@pytest.mark.parametrize("wrong", [always_accept, redraw_from_p])
def test_the_test_rejects_wrong_rules(wrong):
    outcomes = draw_and_accept(wrong, RUNS)
    both = {(a, b): (P[0, a] * P[1, b]).item() for a, b in itertools.product(range(5), repeat=2)}
    assert p_value(tally(o[:2] for o in outcomes), both) < TOO_UNLIKELY


def test_acceptance_is_as_likely_as_the_overlap_of_p_and_q():
    # sum over tokens of min(p, q) for the first draft: 0.3 (token 0) + 0.3 (token 1) + 0.05 (token 3) = 0.65
    generator = torch.Generator().manual_seed(0)
    proposals = [(torch.tensor(ids), torch.tensor(probs, dtype=torch.float64)) for ids, probs in Q[:1]]
    kept = []
    for _ in range(RUNS):
        draft = int(proposals[0][0][torch.multinomial(proposals[0][1], 1, generator=generator)])
        kept.append(accept_sampled(P.log(), [draft], proposals, generator)[0])
    assert p_value(tally(kept), {1: 0.65, 0: 0.35}) > TOO_UNLIKELY


def test_a_draft_from_the_bases_own_distribution_always_stays():
    generator = torch.Generator().manual_seed(0)
    proposals = [(torch.arange(5), P[0].double())]
    for token in (0, 1, 2, 3) * 50:
        assert accept_sampled(P[:2].log(), [token], proposals, generator)[0] == 1


def test_a_token_the_base_cannot_say_never_stays():
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        kept, token, *_ = accept_sampled(P.log(), [4], [(torch.tensor([4]), torch.ones(1).double())], generator)
        assert kept == 0
        assert token != 4


# ---------------------------------------------------------------- sampled, by the kernels


needs_kernel = pytest.mark.skipif(not loader.available(), reason="needs a C++ compiler")


@st.composite
def steps(draw):
    """Logits of up to four drafts and one more, some of them -inf, the drafts, and what they were drawn from."""
    count, size = draw(st.integers(0, 4)), draw(st.one_of(st.integers(1, 12), st.integers(13, 2000)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spread, near = draw(st.sampled_from([0.1, 2.0, 60.0])), draw(st.booleans())
    logits = rng.normal(0, spread, (count + 1, size)).astype(np.float32)
    logits[:, 1:][rng.random((count + 1, size - 1)) < draw(st.sampled_from([0.0, 0.5]))] = -math.inf
    drafts, proposals = [], []
    for line in logits[:count]:
        ids = rng.permutation(size)[: draw(st.integers(1, 50))]
        scores = (np.maximum(line[ids], -100) if near else 0) + rng.normal(0, 1, len(ids))
        q = np.exp(scores - scores.max())
        proposals.append((torch.from_numpy(ids), torch.from_numpy(q / q.sum())))
        drafts.append(int(rng.choice(ids, p=q / q.sum())))
    nats = draw(st.sampled_from([[], [0.0], [1.0, 1.5, 3.0, 3.5], [1e308]]))
    return torch.from_numpy(logits), drafts, proposals, (nats * 4)[: count if nats else 0], draw(st.integers(0, 99))


def assert_same_verdict(logits, drafts, proposals, regret_budgets, seed) -> int:
    """By the kernels and by torch, from the same random numbers. Returns how many drafts stay."""
    generator, twin = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    with patch.object(verification, "_Dense", side_effect=AssertionError):
        mine = accept_sampled(logits, drafts, proposals, generator, regret_budgets)
    with patch.object(loader, "_sampler", None):
        theirs = accept_sampled(logits, drafts, proposals, twin, regret_budgets)
    assert (mine.accepted, mine.token, mine.path) == (theirs.accepted, theirs.token, theirs.path)
    assert mine.costs == pytest.approx(theirs.costs, rel=1e-9, abs=1e-6)
    assert torch.equal(generator.get_state(), twin.get_state())
    return mine.accepted


@needs_kernel
@settings(max_examples=400, deadline=None)
@given(steps())
def test_the_kernels_verdict_is_torchs(step):
    assert_same_verdict(*step)


@needs_kernel
def test_the_kernels_verdict_on_a_large_vocabulary_is_torchs():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 50_304, generator=generator) * 3
    best = (logits[:3] + torch.randn(3, 50_304, generator=generator)).topk(50)  # drafts that are often right
    proposals = list(zip(best.indices, best.values.double().softmax(-1), strict=True))
    kept = []
    for seed in range(40):
        drafts = [int(ids[torch.multinomial(q, 1, generator=generator)]) for ids, q in proposals]
        kept.append(assert_same_verdict(logits, drafts, proposals, [], seed))
        assert_same_verdict(logits, drafts, proposals, [2.0, 3.0, 4.0], seed)
    assert len(set(kept)) > 2


@needs_kernel
@pytest.mark.parametrize("strange", [math.nan, math.inf, -math.inf])
def test_the_kernels_do_with_lines_that_are_no_distribution_what_torch_does(strange):
    logits = torch.zeros(2, 1000)
    logits[:, 3 if strange > -math.inf or strange != strange else slice(None)] = strange
    proposals = [(torch.tensor([3, 5]), torch.tensor([0.5, 0.5], dtype=torch.float64))]
    assert_same_verdict(logits, [5], proposals, [], 0)


@needs_kernel
def test_where_the_base_has_nothing_above_the_draft_the_kernels_pick_as_torch_does():
    everything = (torch.tensor([1, 0]), torch.tensor([2.0, 2.0], dtype=torch.float64))  # more than the base, everywhere
    for seed in range(10):
        assert_same_verdict(torch.zeros(2, 2), [0], [everything], [], seed)


# ---------------------------------------------------------------- through the whole loop

SIZE = 8


def random_chain(generator: np.random.Generator, sharpness: float = 1.0) -> Tensor:
    return torch.tensor(generator.dirichlet(np.full(SIZE, sharpness), SIZE), dtype=torch.float32)


@pytest.fixture(scope="module")
def chain():
    """A Markov chain over 8 tokens, heads that are off the mark, and a table counted on something else again."""
    generator = np.random.default_rng(3)
    transition, noise = random_chain(generator), random_chain(generator)
    model = markov_dynamo(transition, 0.6 * transition @ transition + 0.4 * noise, random_chain(generator))
    model.cooccurrence = count([generator.integers(0, SIZE, 300)], vocab_size=SIZE, order=3)
    return model, transition.double()


def warped(p: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Rows of probabilities after temperature, then top-k, then nucleus; written out as the terms are defined."""
    result = []
    for row in p:
        row = row ** (1 / temperature) / (row ** (1 / temperature)).sum()
        order = row.argsort(descending=True)
        kept = torch.zeros_like(row, dtype=torch.bool)
        kept[order[: top_k or len(row)]] = True
        row = row * kept / (row * kept).sum()
        before = row[order].cumsum(0) - row[order]  # mass of what is likelier
        kept = torch.zeros_like(kept)
        kept[order[before < top_p]] = True
        result.append(row * kept / (row * kept).sum())
    return torch.stack(result)


def path_probabilities(p: Tensor, start: int, length: int) -> dict[tuple[int, ...], float]:
    return {
        path: math.prod(p[a, b].item() for a, b in itertools.pairwise((start, *path)))
        for path in itertools.product(range(SIZE), repeat=length)
    }


def sample(model, runs: int, seed: int = 0, **options):
    """Four tokens a run, so that the second and third come from drafts; `paths` then takes the first three."""
    start = torch.full((runs, 1), 2)
    return model.generate(
        start, max_new_tokens=4, do_sample=True, seed=seed, pad_token_id=0, return_dict_in_generate=True, **options
    )


def paths(result) -> list[tuple[int, ...]]:
    return [tuple(row) for row in result.sequences[:, 1:4].tolist()]


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.6}, {"temperature": 1.7}, {"top_k": 3}, {"top_p": 0.7}, {"temperature": 1.5, "top_k": 5}],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()) or "plain",
)
def test_strict_sampling_has_the_bases_distribution(chain, options):
    model, transition = chain
    result = sample(model, ROWS, **({"top_k": 0} | options))
    expected = path_probabilities(warped(transition, **options), 2, 3)
    assert p_value(tally(paths(result)), expected) > TOO_UNLIKELY
    accepted = np.sum([s.accepted for s in result.statistics], axis=0)
    proposed = np.sum([s.proposed for s in result.statistics], axis=0)
    assert (0.05 * proposed < accepted).all()  # drafts do take part,
    assert (accepted < 0.95 * proposed).all()  # and are refused


def test_the_loops_test_rejects_a_loop_that_accepts_everything(chain, monkeypatch):
    model, transition = chain
    monkeypatch.setattr(dynamo_lm.decoding.batch, "accept_sampled", always_accept)
    result = sample(model, ROWS, top_k=0)
    assert p_value(tally(paths(result)), path_probabilities(transition, 2, 3)) < TOO_UNLIKELY


def test_unverified_sampling_is_not_the_bases_distribution(chain):
    model, transition = chain
    options = {"verify": "off", "eps_b": 0.0, "top_k": SIZE, "temperature": 1.0, "repetition_penalty": 1.0}
    result = sample(model, ROWS, **options)
    assert p_value(tally(paths(result)), path_probabilities(transition, 2, 3)) < TOO_UNLIKELY


def test_a_base_with_attention_keeps_its_distribution_too():
    model = dynamo_of("llama", init="copy")
    model.base.lm_head.weight.data[8:] = 0  # leaves tokens 0..7, and the rest together as one outcome
    model.base.lm_head.weight.data.mul_(2)
    base, prompt, others = base_of("llama"), torch.tensor([[5, 3, 9]]), 8
    base.load_state_dict(model.base.state_dict())
    with torch.no_grad():
        one = base(prompt).logits[0, -1].double().softmax(-1)
        next_prompts = torch.cat([prompt.expand(8, -1), torch.arange(8)[:, None]], 1)
        two = base(next_prompts).logits[:, -1].double().softmax(-1)
    expected = {(a, b): (one[a] * two[a, b]).item() for a, b in itertools.product(range(8), repeat=2)}
    expected |= {(a, others): (one[a] * two[a, 8:].sum()).item() for a in range(8)}
    expected[(others, others)] = one[8:].sum().item()

    options = {"max_new_tokens": 4, "do_sample": True, "seed": 0, "top_k": 0, "eos_token_id": None, "pad_token_id": 0}
    pairs = model.generate(prompt.expand(ROWS, -1), **options)[:, 3:5].clamp(max=others).tolist()
    seen = tally((a, others if a == others else b) for a, b in pairs)
    assert p_value(seen, expected) > TOO_UNLIKELY


def test_no_budget_keeps_what_the_base_cannot_say():
    logits = torch.tensor([[0.0, 1.0, -torch.inf], [0.0, 1.0, 2.0]])
    assert accept_greedy(logits, [2], [1e308]).accepted == 0
    certain = (torch.tensor([2]), torch.tensor([1.0], dtype=torch.float64))
    assert accept_sampled(logits, [2], [certain], torch.Generator().manual_seed(0), [1e308]).accepted == 0


# ---------------------------------------------------------------- regret is taken at temperature 1


@pytest.mark.parametrize("kernels", [pytest.param(True, marks=needs_kernel), False], ids=["kernels", "torch"])
@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0])
def test_a_rejected_draft_costs_what_the_base_loses_at_temperature_1(temperature, kernels):
    logits = torch.tensor([[3.0, 1.0, -torch.inf], [0.0, 0.0, 0.0]]) / temperature
    certain = (torch.tensor([1]), torch.tensor([1.0], dtype=torch.float64))

    def accepted(budget: float, draft: int = 1):
        generator = torch.Generator().manual_seed(2)  # its first number is 0.61: the draft is rejected
        with patch.object(loader, "_sampler", loader._sampler if kernels else None):
            return accept_sampled(logits, [draft], [certain], generator, [budget], temperature=temperature)

    assert (accepted(2.01).accepted, accepted(1.99).accepted) == (1, 0)
    assert accepted(2.01).costs == pytest.approx([2.0])


@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0])
def test_generates_regret_is_the_same_unit_at_every_temperature(temperature):
    transition = torch.tensor([[0.9, 0.1], [0.9, 0.1]])  # a draft of token 1 in place of token 0 costs log 9
    model = markov_dynamo(transition, torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    options = {"do_sample": True, "temperature": temperature, "top_k": 0, "seed": 0, "eos_token_id": None}
    output = model.generate(
        torch.zeros(1, 1, dtype=torch.long), verify=1e6, max_new_tokens=60, return_dict_in_generate=True, **options
    )
    statistics = output.statistics[0]
    assert statistics.unverified > 10
    assert statistics.regret == pytest.approx(statistics.unverified * math.log(9), rel=1e-4)


def test_no_budget_keeps_what_top_k_cuts_off_however_likely_the_base_finds_it():
    transition = torch.tensor([[0.6, 0.4], [0.6, 0.4]])
    model = markov_dynamo(transition, torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    options = {"do_sample": True, "temperature": 2.0, "top_k": 1, "seed": 0, "eos_token_id": None}
    text = model.generate(torch.zeros(1, 1, dtype=torch.long), verify=1e6, max_new_tokens=20, **options)
    assert not text.any()
