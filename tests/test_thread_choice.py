"""The number of threads that steps use follows their times, and changes no text."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fused_layers import WEIGHTS, model_of

from dynamo_lm.decoding.batch import decode
from dynamo_lm.decoding.options import DecodingOptions
from dynamo_lm.decoding.thread_choice import AGAIN, GAIN, LATEST, READING, SLOWER, TRIALS, WINDOW, AdaptiveThreads


def run(threads: AdaptiveThreads, steps: int, cost: dict[int, float], tokens: int = 1) -> list[int]:
    """The numbers of so many steps, which take `cost` seconds by number and token's width."""
    chosen = []
    for _ in range(steps):
        chosen.append(threads.choose())
        threads.record(chosen[-1], cost[chosen[-1]] * (READING + tokens), tokens)
    return chosen


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 70), st.data())
def test_the_fewest_threads_are_taken_that_none_beats_by_much(most, data):
    threads = AdaptiveThreads(most)
    assert threads.counts[0] == 1 and threads.counts[-1] == most
    cost = {count: data.draw(st.floats(0.1, 10)) for count in threads.counts}
    tried = run(threads, len(threads.counts) * (TRIALS + 1), cost)
    assert tried == [count for count in threads.counts for _ in range(TRIALS + 1)]
    best = threads.counts[0]
    for count in threads.counts[1:]:
        best = count if cost[count] < GAIN * cost[best] else best
    assert set(run(threads, WINDOW, cost)) == {best}


def test_all_numbers_are_tried_again_when_steps_slow_down_and_now_and_then():
    threads, quiet, busy = AdaptiveThreads(2), {1: 1.0, 2: 0.6}, {1: 1.0, 2: 1.3 * SLOWER}
    run(threads, 2 * (TRIALS + 1), quiet)
    assert set(run(threads, WINDOW, quiet)) == {2}
    assert run(threads, WINDOW + 2 * (TRIALS + 1), busy)[-1] == 1
    until = run(threads, AGAIN + AGAIN // 2, quiet)
    assert until[-1] == 2 and until.count(1) <= AGAIN + 2 * (TRIALS + 1)


def test_wider_steps_are_no_sign_of_a_busy_machine():
    threads = AdaptiveThreads(2)
    run(threads, 2 * (TRIALS + 1), {1: 1.0, 2: 0.6})
    run(threads, WINDOW, {1: 1.0, 2: 0.6}, tokens=1)
    assert set(run(threads, 2 * LATEST, {1: 1.0, 2: 0.6}, tokens=8)) == {2}


class Alternating(AdaptiveThreads):
    """One thread, then two, and so on."""

    def choose(self) -> int:
        self.since += 1
        return 1 + self.since % 2

    def record(self, count: int, seconds: float, tokens: int) -> None:
        assert torch.get_num_threads() == self.most


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_threads_change_no_text(weights):
    model, before = model_of("llama", *weights), torch.get_num_threads()
    options = DecodingOptions(24, 3, sample=True)
    prompts, texts = [[1, 2, 3, 4, 5], [7, 8]], []
    for threads in (None, Alternating(before)):
        model.runtime.threads = threads
        texts.append([sequence.tokens for sequence in decode(model, prompts, options, seeds=[0, 1])])
    assert texts[0] == texts[1]
    assert torch.get_num_threads() == before
