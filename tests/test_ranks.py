"""Two and three ranks train what one process trains: the same losses and weights, and checkpoints that either continues.

All runs of two ranks are carried out by two processes, once, because starting them costs seconds; so are those of three.
"""

from __future__ import annotations

import functools
import json
import random
import signal

import pytest
from ranks import RUNS, carry_out, start
from test_training import log_of

from dynamo_lm.training.checkpoints import latest_checkpoint


def losses(folder) -> list[list[float]]:
    """By step: losses of the heads, then the coupled ones."""
    return [line["losses"] + line.get("coupled_losses", []) for line in log_of(folder)]


OF_TWO = [name for name in RUNS if not name.startswith(("any time", "hung"))]
OF_THREE = ["frozen", "full", "full shards", "streamed"]


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """The folder with every run, carried out by two ranks; in the last one the second rank is killed."""
    folder = tmp_path_factory.mktemp("two")
    for kind in ("", " shards"):
        with pytest.raises(KeyboardInterrupt):
            carry_out(RUNS["stopped"], folder / f"resumed{kind}")
    assert ended(start(folder, *OF_TWO)) == [1, -signal.SIGKILL], (folder / "stderr-0").read_text()
    return folder


@pytest.fixture(scope="module")
def of_three(tmp_path_factory):
    """The folder with some runs, carried out by three ranks; in the last one the second rank is killed at some time."""
    folder, draw = tmp_path_factory.mktemp("three"), random.Random(0)
    kill = (1, draw.randint(2, 16), draw.uniform(0, 0.05))
    assert ended(start(folder, *OF_THREE, "any time", count=3, kill=kill)) == [1, -signal.SIGKILL, 1], kill
    return folder


def ended(started) -> list[int]:
    """The exit codes of processes; none waits for ever."""
    for process in started:
        process.join(timeout=600)
    return [process.exitcode for process in started]


@pytest.fixture(scope="module")
def of_one(tmp_path_factory):
    """(folder, weights) of a run that one process carries out, by its name; each once."""
    return functools.cache(lambda name: (folder := tmp_path_factory.mktemp("one"), carry_out(RUNS[name], folder)))


@pytest.mark.parametrize(
    "count, name",
    [(2, name) for name in OF_TWO if not name.startswith(("stopped", "resumed", "killed"))]
    + [(3, name) for name in OF_THREE],
)
def test_ranks_train_what_one_process_trains(count, name, of_two, of_three, of_one):
    several = {2: of_two, 3: of_three}[count]
    alone, weights = of_one(name.removesuffix(" shards"))
    found, expected = losses(several / name), losses(alone)
    assert len(found) == 20
    for one, two in zip(expected, found, strict=True):
        assert two == pytest.approx(one, abs=1e-5)
    last_of_one, last = log_of(alone)[-1], log_of(several / name)[-1]
    for key in ("gradient_norm", "ppl", "ppl_joint", "top1"):
        assert last[key] == pytest.approx(last_of_one[key], rel=1e-4), key
    of_ranks = [json.loads((several / f"{name}-{rank}.json").read_text()) for rank in range(count)]
    assert all(each == of_ranks[0] for each in of_ranks) and of_ranks[0].keys() == weights.keys()
    for key, values in weights.items():
        # Adam's steps amplify rounding where a gradient is tiny.
        assert of_ranks[0][key] == pytest.approx(values, abs=1e-3), key


def test_a_run_goes_on_with_another_number_of_ranks(of_two, of_one):
    whole = losses(of_one("resumed")[0])
    for name in ("stopped", "stopped shards"):
        assert len(losses(of_two / name)) == 7  # a signal to one rank stops both after the same step
        carry_out(RUNS["resumed"], of_two / name)
    for name in ("stopped", "stopped shards", "resumed", "resumed shards"):  # of two ranks by one, and the other way round
        for one, two in zip(whole, losses(of_two / name), strict=True):
            assert two == pytest.approx(one, abs=1e-5)


def test_a_rank_that_is_killed_in_a_checkpoint_ends_the_job_and_leaves_the_one_before(of_two, of_one):
    assert "Rank 0 of 2 waited for another rank, which ended" in (of_two / "stderr-0").read_text()
    assert latest_checkpoint(of_two / "killed").name == "step-00000005"
    carry_out(RUNS["killed"], of_two / "killed")
    for one, two in zip(losses(of_one("killed")[0]), losses(of_two / "killed"), strict=True):
        assert two == pytest.approx(one, abs=1e-5)


def test_a_rank_of_three_that_is_killed_at_some_time_ends_the_job_which_one_process_continues(of_three, of_one):
    for rank in (0, 2):
        assert "waited for another rank, which ended" in (of_three / f"stderr-{rank}").read_text()
    carry_out(RUNS["any time"], of_three / "any time")
    for one, three in zip(losses(of_one("any time")[0]), losses(of_three / "any time"), strict=True):
        assert three == pytest.approx(one, abs=1e-5)


def test_a_rank_that_hangs_ends_the_job_with_a_message(tmp_path):
    first, hung = start(tmp_path, "hung")
    try:
        assert ended([first]) == [1]
    finally:
        hung.kill()
    message = "Rank 0 of 2 waited for another rank, which ended or did not come within 5 minutes (--rank-timeout)"
    assert message in (tmp_path / "stderr-0").read_text()


def test_a_stream_whose_reader_is_killed_at_some_time_goes_on_where_it_stopped(of_one, tmp_path):
    draw = random.Random(1)
    kill = (0, draw.randint(2, 16), draw.uniform(0, 0.05))
    assert ended(start(tmp_path, "any time streamed", kill=kill)) == [-signal.SIGKILL, 1], kill
    carry_out(RUNS["any time streamed"], tmp_path / "any time streamed")
    for one, two in zip(losses(of_one("any time streamed")[0]), losses(tmp_path / "any time streamed"), strict=True):
        assert two == pytest.approx(one, abs=1e-5)
