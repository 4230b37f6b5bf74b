"""The engine: rows come and go between steps, nobody's options stop the others, and what was accepted is finished."""

from __future__ import annotations

import asyncio
import time

import pytest
import torch
from served import PROMPTS, offline, small

from dynamo_lm.decoding.audit import violations
from dynamo_lm.decoding.batch import Batch
from dynamo_lm.decoding.detokenizer import IncrementalDetokenizer
from dynamo_lm.decoding.options import DecodingOptions
from dynamo_lm.errors import InputError
from dynamo_lm.sampling.options import Algorithm1
from dynamo_lm.serving.engine import MAX_PREFILL, Engine, Observer
from dynamo_lm.serving.limits import Limits
from dynamo_lm.serving.metrics import Metrics
from dynamo_lm.serving.protocol import APIError
from dynamo_lm.serving.requests import GenerationRequest, StopStrings

PATIENCE = 120  # seconds that a test waits, however busy the machine is


def ask(prompt: str = PROMPTS[0], tokens: int = 24, seed: int = 0, **options) -> GenerationRequest:
    ids = small()[1](prompt)["input_ids"]
    algorithm = Algorithm1(alpha_c=0.0, eps_b=0.1)
    return GenerationRequest(
        ids, DecodingOptions(tokens, **{"num_heads": 3, "algorithm": algorithm, "tree": 0} | options), seed
    )


async def tokens_of(handle) -> list[list[int]]:
    """The tokens of each text of a handle."""
    found: list[list[int]] = [[] for _ in handle.sequences]
    while (event := await handle.next()) is not None:
        found[handle.sequences.index(event.sequence)] += event.tokens
    return found


class Recorder(Metrics):
    """Metrics that also keep which texts took part in each step."""

    def __init__(self):
        super().__init__(3)
        self.taken_part: list[set[int]] = []

    def stepped(self, sequences, seconds):
        super().stepped(sequences, seconds)
        self.taken_part.append({sequence.number for sequence in sequences})

    def value(self, name: str) -> float:
        return self.registry.get_sample_value(name)


def with_engine(scenario, limits: Limits = Limits(), observer: Observer | None = None):  # noqa: B008
    """Runs scenario(engine) beside an engine of the small model."""

    async def run():
        engine = Engine(small()[0], 3, limits, observer or Metrics(3))
        engine.start()
        try:
            return await asyncio.wait_for(scenario(engine), PATIENCE)
        finally:
            await asyncio.wait_for(engine.stop(), PATIENCE)
            assert not engine._running and not engine._waiting and engine._unfinished == 0

    return asyncio.run(run())


def test_rows_that_come_while_others_run_are_what_they_are_alone():
    async def scenario(engine):
        tasks = []
        for number in range(12):  # strict, sampled, off and one head, in a batch of four
            options = [{}, {"sample": True}, {"verify": "off", "sample": True}, {"num_heads": 1}][number % 4]
            tasks.append(asyncio.ensure_future(tokens_of(engine.accept([ask(PROMPTS[number % 6], **options)]))))
            await asyncio.sleep(0.005)
        return await asyncio.gather(*tasks)

    found = with_engine(scenario, Limits(max_batch=4))
    for number in (0, 4, 8, 3, 7, 11):
        assert found[number][0] == offline(PROMPTS[number % 6], 24), number


def test_a_rule_that_raises_ends_its_own_text_alone():
    def bad_stop(tokens):
        raise RuntimeError("a stop rule of somebody's")

    def bad_warp(row, tokens, logits):
        raise RuntimeError("a warp of somebody's")

    def empty_warp(row, tokens, logits):
        return torch.full_like(logits, -torch.inf)

    async def scenario(engine):
        good = asyncio.ensure_future(tokens_of(engine.accept([ask(tokens=60)])))
        errors = []
        for options in (
            {"stopping_criteria": (bad_stop,)},
            {"logits_processors": (bad_warp,)},
            {"logits_processors": (empty_warp,), "sample": True},
        ):
            try:
                await tokens_of(engine.accept([ask(**options)]))
            except (RuntimeError, InputError) as error:
                errors.append(str(error))
        return errors, await good, await tokens_of(engine.accept([ask()]))

    errors, good, after = with_engine(scenario)
    assert [error.split()[0] for error in errors] == ["a", "a", "The"]
    assert good[0] == offline(PROMPTS[0], 60) and after[0] == offline(PROMPTS[0], 24)


def test_a_step_that_fails_ends_its_rows_and_the_next_request_is_answered():
    async def scenario(engine):
        weight = small()[0].base.get_input_embeddings().weight
        before = weight.detach().clone()
        running = asyncio.ensure_future(tokens_of(engine.accept([ask(tokens=3000), ask(PROMPTS[1], tokens=3000)])))
        await asyncio.sleep(0.05)
        await engine.call(lambda model: weight.data.fill_(float("nan")))
        with pytest.raises(InputError):
            await running
        await engine.call(lambda model: weight.data.copy_(before))
        return await tokens_of(engine.accept([ask()]))

    assert with_engine(scenario)[0] == offline(PROMPTS[0], 24)


def test_whatever_else_fails_in_the_thread_does_not_end_it():
    class Fails(Metrics):
        failures = 1

        def stepped(self, rows, seconds):
            self.failures -= 1
            if self.failures >= 0:
                raise RuntimeError("no room for numbers")

    async def scenario(engine):
        with pytest.raises(RuntimeError, match="no room"):
            await tokens_of(engine.accept([ask(), ask()]))
        return await tokens_of(engine.accept([ask()]))

    assert with_engine(scenario, observer=Fails(3))[0] == offline(PROMPTS[0], 24)


def test_a_cancelled_text_leaves_within_a_step_and_its_place_is_taken():
    async def scenario(engine):
        long = engine.accept([ask(tokens=4000)])
        await long.next()
        waiting = engine.accept([ask(tokens=8)])
        gone = engine.accept([ask(tokens=8)])
        gone.cancel()
        before = len(recorder.taken_part)
        long.cancel()
        found = await tokens_of(waiting)
        assert await long.next() is None and await gone.next() is None
        return found, recorder.taken_part[before : before + 2]

    recorder = Recorder()
    found, steps = with_engine(scenario, Limits(max_batch=1), recorder)
    assert found[0] == offline(PROMPTS[0], 8)
    assert {1} in steps  # one step may have run while the client went


def test_no_more_is_accepted_than_batch_and_queue_hold():
    async def scenario(engine):
        with pytest.raises(APIError, match="holds 3") as refusal:
            engine.accept([ask()] * 4)
        assert refusal.value.status == 400
        handles = [engine.accept([ask()]) for _ in range(3)]
        with pytest.raises(APIError, match="queue is full") as refusal:
            engine.accept([ask()])
        assert refusal.value.status == 429 and refusal.value.retry_after >= 1
        await asyncio.gather(*(tokens_of(handle) for handle in handles))
        return await tokens_of(engine.accept([ask()]))  # and there is room again

    assert with_engine(scenario, Limits(max_batch=1, max_queue=2))[0] == offline(PROMPTS[0], 24)


def test_time_is_limited_with_the_text_so_far_and_without_any_refused():
    async def scenario(engine):
        asked, events = [ask(tokens=4000), ask(), ask()], []
        running, *waiting = [engine.accept([one]) for one in asked]  # within microseconds
        while (event := await running.next()) is not None:
            events.append(event)
        # Their time ends a moment after that of the first, so one of them may still be running for a step.
        ends = await asyncio.gather(*(tokens_of(handle) for handle in waiting), return_exceptions=True)
        refused = [end for end in ends if isinstance(end, APIError)]
        assert refused and all(refusal.status == 503 and "max-seconds" in refusal.message for refusal in refused)
        return events

    events = with_engine(scenario, Limits(max_batch=1, max_seconds=0.3))
    assert events[-1].finished == "length" and events[-1].timed_out and events[-1].statistics.new_tokens > 3
    written = [token for event in events for token in event.tokens]
    assert written == offline(PROMPTS[0], len(written))


def test_borrowed_functions_run_between_steps_in_the_engines_thread():
    async def scenario(engine):
        text = asyncio.ensure_future(tokens_of(engine.accept([ask(tokens=60)])))
        logits = await engine.call(lambda model: model(torch.tensor([[5, 6]])).logits)
        with pytest.raises(ZeroDivisionError):
            await engine.call(lambda model: 1 / 0)
        ran = []
        forgotten = asyncio.ensure_future(engine.call(lambda model: time.sleep(0.1)))
        cancelled = asyncio.ensure_future(engine.call(lambda model: ran.append(1)))
        await asyncio.sleep(0.02)
        cancelled.cancel()
        await forgotten
        return logits, await text, ran

    logits, text, ran = with_engine(scenario)
    assert logits.shape == (1, 2, 300) and text[0] == offline(PROMPTS[0], 60) and ran == []


def test_long_prompts_join_over_several_steps_and_in_order():
    prompt = "the fox ran to a red house " * 100
    length = len(small()[1](prompt)["input_ids"])
    assert MAX_PREFILL // 4 < length < MAX_PREFILL // 2

    async def scenario(engine):
        handles = [engine.accept([ask(prompt, tokens=4)]) for _ in range(5)]
        order = []

        async def watch(number, handle):
            await handle.next()
            order.append(number)
            return await tokens_of(handle)

        await asyncio.gather(*(watch(number, handle) for number, handle in enumerate(handles)))
        return order

    assert with_engine(scenario) == [0, 1, 2, 3, 4]


def test_what_was_accepted_is_finished_before_the_engine_stops():
    async def scenario(engine):
        handles = [engine.accept([ask(prompt)]) for prompt in PROMPTS]
        await engine.stop()
        return [(await tokens_of(handle))[0] for handle in handles]

    assert with_engine(scenario, Limits(max_batch=2)) == [offline(prompt, 24) for prompt in PROMPTS]


# ---------------------------------------------------------------- bookkeeping


async def audited(recorder: Recorder, times: float) -> None:
    """Waits until the bookkeeping was checked so often."""
    while recorder.value("dynamo_audits_total") < times:
        await asyncio.sleep(0.005)


def test_texts_that_are_cancelled_late_or_stopped_under_load_change_no_other_text():
    recorder = Recorder()

    def stopping(prompt: str) -> GenerationRequest:
        ids = small()[1](prompt)["input_ids"]
        text = small()[1].decode(offline(prompt, 24), skip_special_tokens=True)
        criterion = StopStrings(IncrementalDetokenizer(small()[1], ids, (text[9:12],)), len(ids))
        return ask(prompt, 24, stopping_criteria=(criterion,))

    async def scenario(engine):
        others = [asyncio.ensure_future(tokens_of(engine.accept([ask(prompt, 24)]))) for prompt in PROMPTS[:2]]
        leaver, late = engine.accept([ask(PROMPTS[2], 300)]), engine.accept([ask(PROMPTS[3], 300)])
        stopped = asyncio.ensure_future(tokens_of(engine.accept([stopping(PROMPTS[4])])))
        too_late = engine.accept([ask(PROMPTS[5])])
        others += [asyncio.ensure_future(tokens_of(engine.accept([ask(prompt, 24)]))) for prompt in PROMPTS]
        too_late.deadline = 0.0
        for _ in range(3):
            await leaver.next()
        number, before = leaver.sequences[0].state.number, len(recorder.taken_part)
        leaver.cancel()
        late.deadline = 0.0
        events = []
        while (event := await late.next()) is not None:
            events.append(event)
        with pytest.raises(APIError, match="max-seconds"):
            await too_late.next()
        found = [(await other)[0] for other in others]
        await audited(recorder, 1)
        return number, before, events, (await stopped)[0], found

    number, before, events, stopped, found = with_engine(scenario, Limits(max_batch=4), recorder)
    assert sum(number in step for step in recorder.taken_part[before:]) <= 1  # the step that ran when its client went
    assert not any(number in step for step in recorder.taken_part[before + 1 :])
    assert len(recorder.taken_part[before + 1]) == 4  # its slot is taken by one that waited
    assert events[-1].timed_out and events[-1].finished == "length"
    written = [token for event in events for token in event.tokens]
    assert written == offline(PROMPTS[3], 300)[: len(written)]
    assert stopped == offline(PROMPTS[4], 24)[: len(stopped)] and len(stopped) < 24
    assert found == [offline(prompt, 24) for prompt in [*PROMPTS[:2], *PROMPTS]]
    assert recorder.value("dynamo_audits_total") >= 1 and recorder.value("dynamo_audit_violations_total") == 0


@pytest.mark.parametrize("options", [{}, {"tree": 5}, {"sample": True}, {"verify": "off", "sample": True, "logprobs": 1}])
def test_a_batch_is_sound_between_all_steps(options):
    batch, sequences = Batch(small()[0], 3), []
    for number in range(50):
        if number % 3 == 0 and number < 24:
            request = ask(PROMPTS[number % 6], 4 + number, **options)
            sequences.append(batch.join(request.prompt, request.options, seed=number, number=number))
        if number % 7 == 6 and batch.running:
            batch.leave(batch.running[0])
        assert violations(batch) == []
        batch.step()
        assert violations(batch) == []
    assert not batch.running


def lost_slot(batch: Batch) -> None:
    batch._slots = batch._slots[:-1]


def shared_slot(batch: Batch) -> None:
    batch._slots = [batch._slots[0]] * len(batch._slots)


def wrong_length(batch: Batch) -> None:
    batch._cache.lengths = batch._cache.lengths + 1


def held_after_leaving(batch: Batch) -> None:
    batch._cache.lengths = batch._cache.lengths + 3 * (batch._cache.lengths == 0)


def finished_and_running(batch: Batch) -> None:
    batch._sequences[0].finished = "stop"


def forgotten_cache(batch: Batch) -> None:
    batch.kept = batch._cache
    batch._sequences, batch._slots, batch._cache = [], [], None


def cache_of_nobody(batch: Batch) -> None:
    batch._sequences, batch._slots = [], []


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lost_slot, "have the slots"),
        (shared_slot, "have the slots"),
        (wrong_length, "tokens, not"),
        (held_after_leaving, "holds 3 tokens, not 0"),
        (finished_and_running, "still runs"),
        (forgotten_cache, "no sequence uses"),
        (cache_of_nobody, "has no sequence"),
    ],
)
def test_each_fault_of_a_batch_is_found(spoil, says):
    batch = Batch(small()[0], 3)
    sequences = []
    for number in range(5):
        request = ask(PROMPTS[number], 40)
        sequences.append(batch.join(request.prompt, request.options, seed=0, number=number))
    batch.step()
    batch.leave(sequences[1])
    assert violations(batch) == []
    spoil(batch)
    assert any(says in sentence for sentence in violations(batch))


def test_an_idle_server_counts_what_is_wrong():
    recorder = Recorder()

    async def scenario(engine):
        await tokens_of(engine.accept([ask()]))
        await audited(recorder, 1)
        sound = recorder.value("dynamo_audit_violations_total")
        await engine.call(lambda model: engine._batches[3, False]._slots.append(0))  # a slot of nobody's
        await audited(recorder, 2)
        engine._batches[3, False]._slots.clear()
        stray = recorder.value("dynamo_audit_violations_total")
        engine._unfinished += 1
        await tokens_of(engine.accept([ask()]))
        await audited(recorder, 3)
        engine._unfinished -= 1
        return sound, stray, recorder.value("dynamo_audit_violations_total")

    assert with_engine(scenario, observer=recorder) == (0, 1, 2)


def test_a_step_that_fails_leaves_no_memory_behind():
    async def scenario(engine):
        batch = engine._batches[3, False]
        weight = small()[0].base.get_input_embeddings().weight
        before = weight.detach().clone()
        running = asyncio.ensure_future(tokens_of(engine.accept([ask(tokens=3000), ask(PROMPTS[1], tokens=3000)])))
        await asyncio.sleep(0.05)
        await engine.call(lambda model: weight.data.fill_(float("nan")))
        with pytest.raises(InputError) as failure:  # whose traceback holds the step's variables
            await running
        await engine.call(lambda model: weight.data.copy_(before))
        return [cache for cache in batch.runner.caches if cache.buffers()], failure

    assert with_engine(scenario)[0] == []
