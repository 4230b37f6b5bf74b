"""The training log: one JSON line a step, and TensorBoard's event files where it is installed."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

from dynamo_lm.training.loss import Perplexities


@dataclass
class Progress:
    """What a step reports."""

    step: int  # steps done
    losses: tuple[float, ...]  # mean nats per target, by head; 0 for a frozen base's head 1
    gradient_norm: float
    tokens_per_second: float
    coupled: tuple[float, ...] = ()  # of heads 2..n given the true token one place before
    validation: Perplexities | None = None


class _Log:
    """`log.jsonl` (one line a step) and, where tensorboard is installed, its event files."""

    def __init__(self, folder: Path, start: int):
        self.path, self.board = folder / "log.jsonl", None
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() and start else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= start]
        self.path.write_text("".join(kept))  # steps after the checkpoint will be taken again
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start)

    def __enter__(self) -> _Log:
        self.file = self.path.open("a")
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
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in scalars.items():
                self.board.add_scalar(name, value, progress.step)
