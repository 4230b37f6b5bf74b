"""Training checkpoints: weights that train, the optimizer's state and the random state, in safetensors or shards.

A checkpoint is a folder `checkpoints/step-N`, written under a temporary name and renamed when it is complete. Of a sharded
model every rank writes its own part (`dynamo_lm.training.shard_files`). Either form is read by any number of ranks.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dynamo_lm.errors import InputError
from dynamo_lm.files import atomic_folder, is_disk_full
from dynamo_lm.model.modeling import DynaMoForCausalLM
from dynamo_lm.training import ranks, shard_files
from dynamo_lm.training.options import TrainingOptions
from dynamo_lm.training.sharding import is_sharded, laid_out

# Options that do not alter what is learned; accumulation but for rounding.
FREE_TO_CHANGE = {"keep", "checkpoint_every", "checkpoint_minutes", "validate_every", "accumulation"}
FREE_TO_CHANGE |= {"shard", "activation_checkpointing"}
SHARDS = "shards"  # the folder of a sharded model's parts, whose names begin with what they are of:
WEIGHTS, OPTIMIZER = "weights.", "optimizer."


class CheckpointSchedule:
    """Says after which steps a checkpoint is due: every `checkpoint_every` steps, and before `checkpoint_minutes` are over.

    A kill during a step loses that step, too. So a checkpoint is due if another step as long as the longest so far would
    end later than `checkpoint_minutes` after the last checkpoint.
    """

    def __init__(self, options: TrainingOptions, now: float):
        """now: seconds, of a clock that does not go back."""
        self.every, self.seconds = options.checkpoint_every, 60 * options.checkpoint_minutes
        self.saved = self.last = now
        self.longest = 0.0  # seconds a step took

    def due(self, step: int, now: float) -> bool:
        """Whether to save after `step` steps. Called once after every step; True counts as a checkpoint."""
        self.longest, self.last = max(self.longest, now - self.last), now
        due = step % self.every == 0 or now + self.longest - self.saved > self.seconds
        if due:
            self.saved = now
        return due


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint under `folder`, or None."""
    return max((folder / "checkpoints").glob("step-*"), default=None)


def step_of(checkpoint: Path) -> int:
    """The steps done when a checkpoint was written."""
    return int(checkpoint.name.removeprefix("step-"))


def save_checkpoint(
    folder: Path, step: int, model: DynaMoForCausalLM, optimizer: torch.optim.Optimizer, options: TrainingOptions
) -> Path:
    """Writes `checkpoints/step-N` and removes older ones beyond `options.keep`; every rank calls it.

    Raises:
        InputError: the disk is full; earlier checkpoints are intact.
    """
    target = folder / "checkpoints" / f"step-{step:08d}"
    shards, first = is_sharded(model), ranks.rank() == 0
    if not shards and not first:
        return target
    for unfinished in target.parent.glob(".writing-*") if first else ():  # of a run that was killed while it wrote
        shutil.rmtree(unfinished, ignore_errors=True)
    names = _trained_names(model, optimizer)
    state = random_state(model.device)
    for parameter, values in optimizer.state.items():
        state |= {f"{names[id(parameter)]}.{key}": value.contiguous() for key, value in values.items()}
    weights = {names[id(p)]: p.detach().contiguous() for group in optimizer.param_groups for p in group["params"]}
    try:
        with atomic_folder(target) if first else contextlib.nullcontext() as temporary:
            if shards:
                both = {WEIGHTS + key: value for key, value in weights.items()}
                both |= {OPTIMIZER + key: value for key, value in state.items()}
                shard_files.write(ranks.of_first(temporary) / SHARDS, both)
            if temporary is not None:
                if not shards:
                    save_file(weights, temporary / "weights.safetensors")
                    save_file(state, temporary / "optimizer.safetensors")
                about = json.dumps({"step": step, "options": asdict(options)}, indent=1)
                (temporary / "state.json").write_text(about, encoding="utf-8")
    except (SafetensorError, *shard_files.ERRORS) as error:
        if is_disk_full(error):
            raise InputError(f'The disk of "{folder}" is full; free some space and run the same command again.') from error
        raise
    for old in sorted(target.parent.glob("step-*"))[: -options.keep] if first else ():
        shutil.rmtree(old, ignore_errors=True)
    return target


def load_checkpoint(path: Path, model: DynaMoForCausalLM, optimizer: torch.optim.Optimizer, options: TrainingOptions) -> int:
    """Restores weights, optimizer and random state; returns the steps done.

    Raises:
        InputError: the checkpoint is damaged, or of a run with other options or another model.
    """
    try:
        saved = json.loads((path / "state.json").read_bytes())
        step, then = saved["step"], dict(saved["options"])
        weights, state = _read(path, _trained(model, optimizer))
        state["rng"]
    except (ValueError, KeyError, TypeError, EOFError, UnpicklingError, SafetensorError, *shard_files.ERRORS) as error:
        raise InputError(f'The checkpoint "{path}" is damaged ({error}); delete it to go back to the one before.') from error
    now = asdict(options)
    older = {"coupling_only": False, "lr_c": options.lr_c, "kl": 0.0, "loss_vocabulary": 1.0}
    then = older | then  # a run from before there were these options
    changed = [key for key in now if key not in FREE_TO_CHANGE and then.get(key) != now[key]]
    if changed:
        key = changed[0]
        raise InputError(
            f'"{path.parent.parent}" holds a run with {key}={then.get(key)}, not {now[key]}; '
            "use the same options to resume it, or another folder for a new run."
        )
    parameters = _trained(model, optimizer)
    if parameters.keys() != weights.keys() or any(parameters[k].shape != weights[k].shape for k in weights):
        raise InputError(f'The checkpoint "{path}" is of another model; use another folder for a new run.')
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(laid_out(weights[name], parameter))
            own = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
            keys = {key: value for key, value in own.items() if "." not in key}
            optimizer.state[parameter] = {
                key: value if key == "step" else laid_out(value, parameter) for key, value in keys.items()
            }
    set_random_state(state, model.device)
    return step


def _read(path: Path, parameters: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights by name, and the optimizer's and the random state; of shards, parts like those of `parameters`."""
    if not (path / SHARDS).is_dir():
        return load_file(path / "weights.safetensors"), load_file(path / "optimizer.safetensors")
    both: dict[str, Tensor] = {}
    for key, shape in shard_files.shapes(path / SHARDS).items():
        part, name = key.split(".", 1)
        like = parameters.get(name if f"{part}." == WEIGHTS else name.rpartition(".")[0])
        if like is not None and tuple(like.shape) == shape:
            both[key] = torch.empty_like(like)
        else:  # a step count or a random state; or a weight of another model, which is refused by its shape
            both[key] = torch.zeros(shape, dtype=torch.uint8 if name.startswith("rng") else torch.float32)
    shard_files.read(path / SHARDS, both)
    parts = ({k.removeprefix(part): v for k, v in both.items() if k.startswith(part)} for part in (WEIGHTS, OPTIMIZER))
    return next(parts), next(parts)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of torch's random numbers, on the CPU and on `device`."""
    state = {"rng": torch.get_rng_state()}
    if device.type == "cuda":
        state["rng.cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Goes back to a state of `random_state`."""
    torch.set_rng_state(state["rng"])
    if "rng.cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["rng.cuda"], device)


def _trained(model: DynaMoForCausalLM, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters that train, by name."""
    names = _trained_names(model, optimizer)
    return {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}


def _trained_names(model: DynaMoForCausalLM, optimizer: torch.optim.Optimizer) -> dict[int, str]:
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {id(p): name for name, p in model.named_parameters() if id(p) in trained}
