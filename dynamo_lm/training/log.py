"""The training log: one JSON line a step, and TensorBoard's event files where it is installed."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from dynamo_lm.files import write_text
from dynamo_lm.training.validation import Acceptance, Perplexities


@dataclass
class Progress:
    """What a step reports."""

    step: int  # steps done
    losses: tuple[float, ...]  # mean nats per target, by head; 0 for a frozen base's head 1
    gradient_norm: float
    tokens_per_second: float
    coupled: tuple[float, ...] = ()  # of heads 2..n given the true token one place before
    validation: Perplexities | None = None
    acceptance: Acceptance | None = None


class _Log:
    """`log.jsonl` (one line a step) and, where tensorboard is installed, its event files."""

    def __init__(self, folder: Path, start: int):
        self.path, self.board = folder / "log.jsonl", None
        if start:
            written = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
            lines = written.split("\n")[:-1]  # a last line without its end was cut off by a crash
            kept = [line for line in lines if json.loads(line)["step"] <= start]
            write_text(self.path, "".join(f"{line}\n" for line in kept))  # later steps will be taken again
        elif self.path.exists() and self.path.stat().st_size:
            self.path.rename(_unused(folder))  # of a run that ended before its first checkpoint: kept, not overwritten
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start)

    def __enter__(self) -> _Log:
        self.file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()

    def write(self, progress: Progress, factor: float) -> None:
        line: dict = {"step": progress.step, "losses": progress.losses, "gradient_norm": progress.gradient_norm}
        line |= {"tokens_per_second": round(progress.tokens_per_second, 1), "lr_factor": factor}
        scalars = {f"loss/head_{i}": loss for i, loss in enumerate(progress.losses, start=1)}
        scalars |= {"train/gradient_norm": progress.gradient_norm, "train/lr_factor": factor}
        if progress.coupled:
            line["coupled_losses"] = progress.coupled
            scalars |= {f"loss/head_{i}_given_{i - 1}": loss for i, loss in enumerate(progress.coupled, start=2)}
        if progress.validation is not None:
            line |= {"ppl": progress.validation.heads, "ppl_joint": progress.validation.joint}
            scalars |= {f"validation/PPL_{i}": p for i, p in enumerate(progress.validation.heads, start=1)}
            scalars |= {f"validation/PPL_1:{i}": p for i, p in enumerate(progress.validation.joint, start=1)}
            line |= {"top1": progress.validation.top1}
            if progress.validation.coupled:
                line |= {"ppl_coupled": progress.validation.coupled, "top1_coupled": progress.validation.coupled_top1}
                scalars |= {f"validation/PPL_{i}|{i - 1}": p for i, p in enumerate(progress.validation.coupled, start=2)}
        if progress.acceptance is not None:
            of = {"greedy": progress.acceptance.greedy, "sampled": progress.acceptance.sampled}
            line |= {"acceptance": of, "tokens_per_step": {k: Acceptance.tokens_per_step(v) for k, v in of.items()}}
            scalars |= {f"acceptance/tokens_per_step_{k}": v for k, v in line["tokens_per_step"].items()}
            scalars |= {f"acceptance/{k}_head_{i}": v for k, of_k in of.items() for i, v in enumerate(of_k, start=2)}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in scalars.items():
                self.board.add_scalar(name, value, progress.step)


def _unused(folder: Path) -> Path:
    """The first of log-1.jsonl, log-2.jsonl, .. that does not exist yet."""
    return next(path for number in count(1) if not (path := folder / f"log-{number}.jsonl").exists())
