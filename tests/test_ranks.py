"""Two ranks train what one process trains: the same losses, the same weights, and checkpoints that either continues.

All runs of two ranks are carried out by two processes, once, because starting them costs seconds.
"""

from __future__ import annotations

import json
import signal

import pytest
from ranks import RUNS, carry_out, start
from test_training import log_of

from dynamo_lm.training.checkpoints import latest_checkpoint


def losses(folder) -> list[list[float]]:
    """By step: losses of the heads, then the coupled ones."""
    return [line["losses"] + line.get("coupled_losses", []) for line in log_of(folder)]


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """The folder with every run, carried out by two ranks; in the last one the second rank is killed."""
    folder = tmp_path_factory.mktemp("two")
    for kind in ("", " shards"):
        with pytest.raises(KeyboardInterrupt):
            carry_out(RUNS["stopped"], folder / f"resumed{kind}")
    processes = start(folder, *RUNS)
    for process in processes:
        process.join(timeout=400)
    assert [process.exitcode for process in processes] == [1, -signal.SIGKILL], (folder / "stderr-0").read_text()
    return folder


@pytest.mark.parametrize("name", [name for name in RUNS if not name.startswith(("stopped", "resumed", "killed"))])
def test_two_ranks_train_what_one_process_trains(name, of_two, tmp_path):
    weights = carry_out(RUNS[name.removesuffix(" shards")], tmp_path)
    found, expected = losses(of_two / name), losses(tmp_path)
    assert len(found) == 20
    for one, two in zip(expected, found, strict=True):
        assert two == pytest.approx(one, abs=1e-5)
    last_of_one, last_of_two = log_of(tmp_path)[-1], log_of(of_two / name)[-1]
    for key in ("gradient_norm", "ppl", "ppl_joint", "top1"):
        assert last_of_two[key] == pytest.approx(last_of_one[key], rel=1e-4), key
    of_first, of_second = (json.loads((of_two / f"{name}-{rank}.json").read_text()) for rank in (0, 1))
    assert of_first == of_second and of_first.keys() == weights.keys()
    for key, values in weights.items():
        assert of_first[key] == pytest.approx(values, abs=1e-3), (
            key
        )  # Adam's steps amplify rounding where a gradient is tiny


def test_a_run_goes_on_with_another_number_of_ranks(of_two, tmp_path):
    carry_out(RUNS["resumed"], tmp_path)
    whole = losses(tmp_path)
    for name in ("stopped", "stopped shards"):
        assert len(losses(of_two / name)) == 7  # a signal to one rank stops both after the same step
        carry_out(RUNS["resumed"], of_two / name)
    for name in ("stopped", "stopped shards", "resumed", "resumed shards"):  # of two ranks by one, and the other way round
        for one, two in zip(whole, losses(of_two / name), strict=True):
            assert two == pytest.approx(one, abs=1e-5)


def test_a_rank_that_is_killed_in_a_checkpoint_ends_the_job_and_leaves_the_one_before(of_two, tmp_path):
    assert "Rank 0 of 2 waited for another rank, which ended" in (of_two / "stderr-0").read_text()
    assert latest_checkpoint(of_two / "killed").name == "step-00000005"
    carry_out(RUNS["killed"], of_two / "killed")
    carry_out(RUNS["killed"], tmp_path)
    for one, two in zip(losses(tmp_path), losses(of_two / "killed"), strict=True):
        assert two == pytest.approx(one, abs=1e-5)
