"""Win rates, matched diversity and same-quality speed-ups: small numbers by hand, and lines whose crossing is known."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_lm.evaluation.completion.winrates import (
    LEAST_PROMPTS,
    Points,
    analyse,
    fit,
    interval,
    matched_rungs,
    resamples,
    same_quality,
    speed_up_at_same_quality,
    tally,
    win_rate,
)


def test_ties_are_shared_and_equal_wins_and_losses_are_a_rate_of_one():
    counts = np.array([[3, 4, 3], [6, 0, 2], [5, 0, 0]])
    assert win_rate(counts).tolist() == pytest.approx([1.0, 6.5 / 2.5, 5.5 / 0.5])


def test_a_tally_counts_by_prompt_and_leaves_out_what_was_not_judged():
    verdicts = np.array([[1, 1, -1, np.nan], [0, 0, -1, -1]])
    assert tally(verdicts).tolist() == [[2, 0, 1], [0, 2, 2]]


def test_the_first_resample_is_the_sample_and_all_have_as_many_prompts():
    weights = resamples(7, seed=3, count=50)
    assert weights[0].tolist() == [1] * 7
    assert weights.shape == (51, 7) and (weights.sum(1) == 7).all()
    assert (resamples(7, seed=3, count=50) == weights).all()


def test_too_few_prompts_have_no_interval():
    assert len(resamples(LEAST_PROMPTS - 1, seed=0)) == 1
    assert interval(np.array([1.0])) is None


def test_diversity_is_matched_between_two_rungs_and_at_the_ends():
    ladder = np.array([[0.2, 0.4, 0.8]] * 4)
    below, above, weight = matched_rungs(np.array([0.5, 0.4, 0.1, 0.9]), ladder)
    at = [(b, a, pytest.approx(w)) for b, a, w in zip(below.tolist(), above.tolist(), weight.tolist(), strict=True)]
    assert at[0] == (1, 2, 0.25)  # 0.5 lies a quarter of the way from 0.4 to 0.8
    positions = below + weight * (above - below)
    assert positions.tolist() == pytest.approx([1.25, 1, 0, 2])


@given(
    st.lists(st.floats(0.1, 0.9), min_size=2, max_size=6),
    st.floats(0.0, 1.0),
)
def test_the_matched_position_has_the_candidates_diversity_wherever_the_ladder_reaches_it(ladder, candidate):
    rising = np.maximum.accumulate(np.array([ladder]), axis=1)
    below, above, weight = matched_rungs(np.array([candidate]), np.array([ladder]))
    there = (1 - weight) * rising[0, below] + weight * rising[0, above]
    assert there[0] == pytest.approx(np.clip(candidate, rising[0, 0], rising[0, -1]))


def test_the_line_is_least_squares_of_the_log_rate():
    x = np.array([[1.0, 2.0, 3.0, 4.0]])
    rates = np.exp(np.array([[0.6, 0.2, -0.1, -0.7]]))
    slope, intercept = np.polyfit(x[0], np.log(rates[0]), 1)
    line = fit(x, rates)
    assert [line.slope[0], line.intercept[0]] == pytest.approx([slope, intercept])


@pytest.mark.parametrize(
    ("log_rates", "estimate", "theoretical", "capped"),
    [
        ((0.5, 0.0, -0.5), 2.0, False, False),  # crosses in the middle
        ((0.9, 0.6, 0.3), 4.0, True, True),  # would cross at 4, the ceiling, where nothing was measured
        ((0.5, 0.25, 0.1), 3.4167, True, False),  # crosses behind the last point
        ((-0.1, -0.2, -0.3), 1.0, False, False),  # worse at once
        ((0.1, 0.2, 0.3), 4.0, True, True),  # never falls
        ((-0.5, -0.3, -0.1), 4.0, True, True),  # only better beyond what was measured
    ],
)
def test_the_same_quality_speed_up_is_where_the_line_meets_a_win_rate_of_one(log_rates, estimate, theoretical, capped):
    x, rates = np.array([[1.0, 2.0, 3.0]]), np.exp(np.array([log_rates]))
    found = speed_up_at_same_quality(x, rates, np.array([4.0]))
    assert found["estimate"] == pytest.approx(estimate, abs=1e-3)
    assert (found["theoretical"], found["capped"]) == (theoretical, capped)
    assert found["interval"] is None


@settings(deadline=None)
@given(st.floats(-3, 3), st.floats(-2, 2), st.floats(1.5, 6))
def test_at_the_same_quality_speed_up_the_line_is_at_one_or_an_end_was_reached(intercept, slope, ceiling):
    x = np.array([[1.0, 1.7, 2.2]])
    line = fit(x, np.exp(intercept + slope * x))
    found = same_quality(line, np.array([ceiling]))[0]
    value = line.at(np.array([found]))[0, 0]
    assert 1 <= found <= ceiling
    assert found in (1.0, ceiling) or value == pytest.approx(0, abs=1e-6)
    assert found != ceiling or value >= -1e-6


def points(prompts: int, rng: np.random.Generator) -> Points:
    """Three settings; wins fall with the speed; the candidate is as diverse as the base's first rung."""
    wins = np.stack([rng.binomial(10, share, prompts) for share in (0.6, 0.5, 0.3)])
    plain = np.stack([wins, np.zeros_like(wins), 10 - wins], axis=-1)
    matched = np.stack([plain[:, :, ::-1], plain], axis=1)  # the first rung beats what the second loses to
    forwards = np.full((3, prompts), 60.0)
    return Points(
        tokens=forwards * np.array([[1.0], [2.0], [3.0]]),
        forwards=forwards,
        log_ratio=np.log(np.full((3, prompts), 1.0) * np.array([[1.0], [1.5], [2.0]])),
        plain=plain,
        matched=matched,
        diversity=np.full((3, prompts), 0.5),
        ladder=np.stack([np.full(prompts, 0.5), np.full(prompts, 0.7)]),
        temperatures=(0.3, 0.7),
    )


def test_an_analysis_states_both_win_rates_and_both_speed_ups():
    found = analyse(points(40, np.random.default_rng(0)), 4, seed=0)
    first = found["points"][0]
    assert [point["tokens_per_step"] for point in found["points"]] == pytest.approx([1, 2, 3])
    assert [point["speed_up"]["median"] for point in found["points"]] == pytest.approx([1, 1.5, 2])
    assert first["matched"]["temperature"] == pytest.approx(0.3)
    assert first["plain"]["win_rate"] == pytest.approx(1 / first["matched"]["win_rate"])
    low, high = first["plain"]["interval"]
    assert low < first["plain"]["win_rate"] < high
    quality = found["same_quality"]["plain"]
    assert 1 < quality["tokens_per_step"]["estimate"] < 3 and quality["tokens_per_step"]["interval"][0] >= 1
    assert quality["wall_clock"]["estimate"] < quality["tokens_per_step"]["estimate"]
    assert len(quality["band"]["x"]) == len(quality["band"]["low"]) == 41


def test_wall_clock_is_capped_at_full_steps_of_what_the_fastest_setting_costs():
    given = points(20, np.random.default_rng(0))
    winning = np.stack([np.full((3, 20), 6), np.zeros((3, 20)), np.full((3, 20), 4)], axis=-1)
    found = analyse(replace(given, plain=winning), 4, seed=0)["same_quality"]["plain"]
    assert found["tokens_per_step"]["estimate"] == pytest.approx(4)
    assert found["wall_clock"]["estimate"] == pytest.approx(2 * 4 / 3)  # 2x at 3 tokens a step


def test_an_analysis_of_few_prompts_says_so_and_gives_no_interval():
    found = analyse(points(3, np.random.default_rng(0)), 4, seed=0)
    assert "no interval" in found["same_quality"]["plain"]["note"]
    assert found["points"][0]["plain"]["interval"] is None
    assert found["same_quality"]["plain"]["tokens_per_step"]["interval"] is None


def test_the_bootstrap_covers_a_known_crossing_about_as_often_as_it_says():
    covered = 0
    for seed in range(60):
        found = analyse(points(30, np.random.default_rng(seed)), 4, seed=seed)
        low, high = found["same_quality"]["plain"]["tokens_per_step"]["interval"]
        rates = [np.log(share / (1 - share)) for share in (0.6, 0.5, 0.3)]
        slope, intercept = np.polyfit([1, 2, 3], rates, 1)
        covered += low <= -intercept / slope <= high
    assert covered >= 50  # of 60; 57 expected
