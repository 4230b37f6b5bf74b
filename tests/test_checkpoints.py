"""Stopping and resuming: a run that was cut off anywhere ends like one that was not, and nothing damaged is believed.

Dropout is on in every run, so that the random state matters.
"""

from __future__ import annotations

import errno
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import processes
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file
from test_training import log_of, random_blocks, tiny

from dynamo_lm.errors import InputError
from dynamo_lm.training import checkpoints
from dynamo_lm.training.checkpoints import CheckpointSchedule, latest_checkpoint, load_checkpoint, save_checkpoint
from dynamo_lm.training.options import TrainingOptions
from dynamo_lm.training.step import parameter_groups
from dynamo_lm.training.trainer import train

OPTIONS = TrainingOptions(steps=12, lr_b=1e-3, lr_m=1e-2, lr_mb=2.5e-4, batch_size=4, bf16=False, checkpoint_every=3, keep=2)
TWO_STEPS = replace(OPTIONS, steps=2)
DROPOUT = {"hidden_dropout": 0.2, "attention_dropout": 0.2}


def fresh(seed: int = 0, **kwargs):
    """A model as a new process makes it; only seed 0 starts as the uninterrupted run did."""
    return tiny(seed=seed, base=DROPOUT, **kwargs)


def run(folder: Path, options: TrainingOptions = OPTIONS, *, seed: int = 0, stop_at: int | None = None, **kwargs):
    """Trains a fresh model in `folder`; a Ctrl-C arrives while step `stop_at` is reported."""

    def report(progress):
        if progress.step == stop_at:
            signal.raise_signal(signal.SIGINT)

    model = fresh(seed, **kwargs)
    torch.manual_seed(seed)
    train(model, random_blocks(), None, options, folder, report=report)
    return model


def steps_of(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def losses_of(folder: Path) -> list:
    return [(line["step"], line["losses"], line["gradient_norm"], line["lr_factor"]) for line in log_of(folder)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """12 steps in one go: (log, trained model)."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    model = run(folder)
    assert steps_of(folder) == ["step-00000009", "step-00000012"]  # of 3, 6, 9 and 12, the newest two are kept
    return losses_of(folder), model


def assert_equal_weights(model, other) -> None:
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


# --- resuming -------------------------------------------------------------------


def test_a_run_stopped_by_ctrl_c_resumes_to_the_losses_and_weights_of_one_that_was_not(uninterrupted, tmp_path):
    log, model = uninterrupted
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop_at=5)
    assert steps_of(tmp_path) == ["step-00000003", "step-00000005"] and losses_of(tmp_path) == log[:5]
    resumed = run(tmp_path, seed=1)  # other weights, another random state: all must come from the checkpoint
    assert losses_of(tmp_path) == log
    assert_equal_weights(resumed, model)


@pytest.mark.parametrize(
    "kwargs, options",
    [
        ({}, {"lr_b": 0, "lr_mb": 0}),
        ({"own_output_embedding": True}, {}),
        ({"adapter_rank": 2}, {}),
        ({"init": "copy", "num_heads": 2}, {"accumulation": 2, "bf16": True}),
    ],
    ids=["frozen", "own output embedding", "adapter", "accumulation and bf16"],
)
def test_every_kind_of_run_resumes_exactly(kwargs, options, tmp_path):
    options = replace(OPTIONS, steps=4, **options)
    seed = 0 if options.frozen else 1  # a frozen base is not in the checkpoint
    whole = run(tmp_path / "whole", options, **kwargs)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", options, stop_at=2, **kwargs)
    resumed = run(tmp_path / "cut", options, seed=seed, **kwargs)
    assert losses_of(tmp_path / "cut") == losses_of(tmp_path / "whole")
    assert_equal_weights(resumed, whole)


def test_a_signal_within_a_step_saves_the_steps_before_and_the_step_is_taken_again_exactly(tmp_path):
    options = replace(OPTIONS, accumulation=4, checkpoint_every=100)
    whole = run(tmp_path / "whole", options)
    seen = []

    def report_part(steps):
        seen.append(steps)
        if steps == 3.25:  # the rest of the fourth step takes minutes on a large base, and `docker stop` waits ten seconds
            signal.raise_signal(signal.SIGTERM)

    model = fresh()
    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt):
        train(model, random_blocks(), None, options, tmp_path / "cut", report_part=report_part)
    assert seen[:4] == [0, 0.25, 0.5, 0.75] and seen[-1] == 3.25
    assert steps_of(tmp_path / "cut") == ["step-00000003"]
    resumed = run(tmp_path / "cut", options, seed=1)
    assert losses_of(tmp_path / "cut") == losses_of(tmp_path / "whole")
    assert_equal_weights(resumed, whole)


def test_a_signal_within_the_first_step_leaves_nothing_and_the_same_command_begins_again(tmp_path):
    def report_part(steps):
        if steps == 0.25:
            signal.raise_signal(signal.SIGINT)

    options = replace(TWO_STEPS, accumulation=4)
    with pytest.raises(KeyboardInterrupt):
        train(fresh(), random_blocks(), None, options, tmp_path, report_part=report_part)
    assert latest_checkpoint(tmp_path) is None
    run(tmp_path, options)
    assert steps_of(tmp_path) == ["step-00000002"]


def saved_after(step_seconds: list[float], **options) -> list[int]:
    """The steps after which a checkpoint is written if steps take so long."""
    schedule, now, saved = CheckpointSchedule(replace(OPTIONS, **options), 1000.0), 1000.0, []
    for step, seconds in enumerate(step_seconds, start=1):
        now += seconds
        if schedule.due(step, now):
            saved.append(step)
    return saved


def test_checkpoints_are_written_before_so_many_minutes_are_lost():
    assert saved_after([120.0] * 12, checkpoint_every=500) == [5, 10]  # 10 minutes; the default
    assert saved_after([130.0] * 9, checkpoint_every=500) == [4, 8]  # a fifth step would end after 650 s
    assert saved_after([1.0] * 1300, checkpoint_every=500) == [500, 1000]  # seconds do not come into it
    assert saved_after([1500.0] * 3, checkpoint_every=500) == [1, 2, 3]  # a step longer than that
    assert saved_after([60.0] * 4, checkpoint_every=500, checkpoint_minutes=2) == [2, 4]


@given(
    st.lists(st.floats(1, 200), min_size=1, max_size=60), st.integers(1, 50), st.floats(0.5, 30)
)  # fmt: skip
def test_no_step_ends_later_after_the_last_checkpoint_than_the_longest_before_it_foretold(seconds, every, minutes):
    saved = set(saved_after(seconds, checkpoint_every=every, checkpoint_minutes=minutes))
    lost = longest = 0.0
    for step, length in enumerate(seconds, start=1):
        if step > 1 and lost > 0:
            assert lost + longest <= 60 * minutes + 1e-6  # what a step as long as the longest would lose
        lost, longest = lost + length, max(longest, length)
        if step in saved:
            lost = 0.0
        else:
            assert step % every


def test_a_slow_run_leaves_a_checkpoint_after_every_step(tmp_path):
    run(tmp_path, replace(OPTIONS, steps=3, checkpoint_every=500, checkpoint_minutes=1e-9, keep=9))
    assert steps_of(tmp_path) == ["step-00000001", "step-00000002", "step-00000003"]


def killed_while_writing_step_9(folder: str, threads: int) -> None:
    torch.set_num_threads(threads)
    save_file = checkpoints.save_file

    def killed(tensors, path):
        save_file(tensors, path)
        if str(path).endswith("step-00000009/weights.safetensors"):
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoints.save_file = killed
    run(Path(folder))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_a_run_killed_while_it_wrote_a_checkpoint_resumes_from_the_one_before(uninterrupted, tmp_path):
    log, model = uninterrupted
    tmp_path, said, threads = tmp_path / "run", tmp_path / "said", torch.get_num_threads()
    killed = processes.start(killed_while_writing_step_9, str(tmp_path), threads, stdout=said, stderr=said)
    killed.join()
    assert killed.exitcode == -signal.SIGKILL, said.read_text()
    assert steps_of(tmp_path) == [".writing-step-00000009", "step-00000003", "step-00000006"]
    assert latest_checkpoint(tmp_path).name == "step-00000006"
    assert losses_of(tmp_path) == log[:9]  # also: another process takes the same steps
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 10, "los')  # and the log was cut off in a line
    resumed = run(tmp_path, seed=1)
    assert losses_of(tmp_path) == log
    assert_equal_weights(resumed, model)
    assert steps_of(tmp_path) == ["step-00000009", "step-00000012"]  # nothing half-written is left


def test_a_finished_run_is_left_as_it_is(tmp_path):
    model = run(tmp_path, TWO_STEPS)
    before = (losses_of(tmp_path), steps_of(tmp_path))
    again = run(tmp_path, TWO_STEPS, seed=1)
    assert (losses_of(tmp_path), steps_of(tmp_path)) == before
    assert_equal_weights(again, model)


def test_a_folder_without_checkpoint_starts_a_new_log(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n')  # a run that was stopped before its first checkpoint
    run(tmp_path, replace(OPTIONS, steps=1))
    assert len(log_of(tmp_path)) == 1 and "losses" in log_of(tmp_path)[0]


# --- what a checkpoint is -------------------------------------------------------


def test_a_checkpoint_holds_what_trains_and_the_state_of_adamw(tmp_path):
    options = replace(OPTIONS, steps=2, lr_b=0, lr_mb=0)
    model = run(tmp_path, options)
    path = latest_checkpoint(tmp_path)
    heads = {name for name, _ in model.named_parameters() if name.startswith("heads.")}
    assert load_file(path / "weights.safetensors").keys() == heads
    state = load_file(path / "optimizer.safetensors")
    assert state.keys() == {f"{n}.{key}" for n in heads for key in ("step", "exp_avg", "exp_avg_sq")} | {"rng"} | (
        {"rng.cuda"} if model.device.type == "cuda" else set()
    )
    assert all(value.item() == 2 for name, value in state.items() if name.endswith(".step"))
    about = json.loads((path / "state.json").read_text())
    assert about["step"] == 2 and about["options"]["lr_m"] == 1e-2


@pytest.mark.parametrize("keep, kept", [(1, [4]), (3, [2, 3, 4]), (9, [1, 2, 3, 4])])
def test_only_the_newest_checkpoints_are_kept(keep, kept, tmp_path):
    run(tmp_path, replace(OPTIONS, steps=4, checkpoint_every=1, keep=keep))
    assert steps_of(tmp_path) == [f"step-{step:08d}" for step in kept]


def test_a_folder_with_a_temporary_name_is_no_checkpoint(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    (tmp_path / "checkpoints" / ".writing-step-00000099").mkdir(parents=True)
    assert latest_checkpoint(tmp_path) is None
    run(tmp_path, replace(OPTIONS, steps=1))
    assert steps_of(tmp_path) == ["step-00000001"]


# --- refusals -------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_steps")
    run(folder, TWO_STEPS)
    return latest_checkpoint(folder)


def load(path: Path, options: TrainingOptions = TWO_STEPS, **kwargs):
    model = fresh(1, **kwargs)
    before = [p.clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(parameter_groups(model, options))
    try:
        return load_checkpoint(path, model, optimizer, options)
    except InputError:
        assert all(map(torch.equal, before, model.parameters())) and not optimizer.state  # nothing was half-loaded
        raise


def copy_of(checkpoint: Path, folder: Path) -> Path:
    path = folder / "checkpoints" / checkpoint.name
    path.mkdir(parents=True)
    for file in checkpoint.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


@pytest.mark.parametrize("damage", ["missing", "empty", "cut short", "zeros"])
@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_refused_by_name(name, damage, two_steps, tmp_path):
    path = copy_of(two_steps, tmp_path)
    whole = (path / name).read_bytes()
    if damage == "missing":
        (path / name).unlink()
    else:
        left = {"empty": b"", "cut short": whole[: len(whole) // 2], "zeros": bytes(len(whole))}
        (path / name).write_bytes(left[damage])
    with pytest.raises(InputError, match="damaged") as error:
        load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", ["[]", "{}", '{"step": 2}', '{"step": 2, "options": 3}', "null"])
def test_a_state_of_another_form_is_damage(content, two_steps, tmp_path):
    path = copy_of(two_steps, tmp_path)
    (path / "state.json").write_text(content)
    with pytest.raises(InputError, match="damaged"):
        load(path)


def test_without_the_damaged_checkpoint_the_run_goes_on_from_the_one_before(uninterrupted, tmp_path):
    log, _ = uninterrupted
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop_at=5)
    damaged = latest_checkpoint(tmp_path)
    (damaged / "weights.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"step-00000005.*delete it to go back"):
        run(tmp_path)
    for file in damaged.iterdir():
        file.unlink()
    damaged.rmdir()
    run(tmp_path, seed=1)
    assert losses_of(tmp_path) == log


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 24},
        {"lr_b": 2e-3},
        {"lr_m": 2e-2},
        {"lr_mb": 0.0},
        {"batch_size": 8},
        {"warmup": 0.5},
        {"weight_decay": 0.0},
        {"clip": 0.0},
        {"bf16": True},
        {"seed": 1},
    ],
    ids=str,
)
def test_a_run_with_another_option_is_refused_by_the_options_name(change, two_steps):
    name, value = next(iter(change.items()))
    with pytest.raises(InputError, match=f"{name}={getattr(TWO_STEPS, name)}, not {value}"):
        load(two_steps, replace(TWO_STEPS, **change))


def test_what_alters_no_step_may_change(two_steps):
    free = {"keep": 7, "checkpoint_every": 1, "checkpoint_minutes": 1.0, "validate_every": 1, "accumulation": 2}
    assert load(two_steps, replace(TWO_STEPS, **free)) == 2


@pytest.mark.parametrize("kwargs", [{"num_heads": 2}, {"num_heads": 4}, {"own_output_embedding": True}], ids=str)
def test_a_checkpoint_of_another_model_is_refused(kwargs, two_steps):
    with pytest.raises(InputError, match="another model"):
        load(two_steps, **kwargs)


# --- a full disk ----------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors"])
def test_a_full_disk_leaves_the_earlier_checkpoint_and_no_debris(name, error, uninterrupted, tmp_path, monkeypatch):
    def save_file(tensors, path, real=checkpoints.save_file):
        real(tensors, path)
        if path.parent.name.endswith("step-00000006") and path.name == name:
            path.write_bytes(b"half")
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", save_file)
        with pytest.raises(InputError, match="full; free some space") as raised:
            run(tmp_path)
    assert str(tmp_path) in str(raised.value)
    assert steps_of(tmp_path) == ["step-00000003"]
    run(tmp_path, seed=1)  # "run the same command again"
    assert losses_of(tmp_path) == uninterrupted[0]


def test_another_error_of_the_disk_is_not_called_a_full_one(tmp_path, monkeypatch):
    def save_file(tensors, path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checkpoints, "save_file", save_file)
    with pytest.raises(PermissionError):
        run(tmp_path)
    assert steps_of(tmp_path) == []


def test_weights_are_saved_as_they_are_bit_for_bit(tmp_path):
    model = fresh()
    options = replace(OPTIONS, steps=1)
    optimizer = torch.optim.AdamW(parameter_groups(model, options))
    path = save_checkpoint(tmp_path, 7, model, optimizer, options)  # before any step: AdamW has no state yet
    other = fresh(1)
    assert load_checkpoint(path, other, torch.optim.AdamW(parameter_groups(other, options)), options) == 7
    assert_equal_weights(other, model)
    assert path.name == "step-00000007"
