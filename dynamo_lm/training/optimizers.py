"""AdamW for everything, or Muon for the matrices of the heads' layers and AdamW for the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BETAS, EPS = (0.9, 0.95), 1e-8


class MuonAdamW:
    """Two optimizers that look like one: groups marked `muon` are Muon's, the others AdamW's.

    Source: Muon, arXiv 2502.16982; its update is scaled to AdamW's, so that one learning rate fits both.
    """

    def __init__(self, groups: list[dict[str, Any]]):
        matrices = [group for group in groups if group.get("muon")]
        others = [group for group in groups if not group.get("muon")]
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw"))
        if others:
            self.parts.append(torch.optim.AdamW(others, betas=BETAS, eps=EPS))
        self.state: dict[Tensor, Any] = self.parts[0].state
        for part in self.parts[1:]:
            part.state = self.state  # type: ignore[assignment]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)


def make_optimizer(name: str, groups: list[dict[str, Any]]) -> Any:
    """ "adamw" or "muon"; groups: of parameters, those of the heads' matrices marked `muon`."""
    if name == "muon":
        return MuonAdamW(groups)
    plain = [{key: value for key, value in group.items() if key != "muon"} for group in groups]
    return torch.optim.AdamW(plain, betas=BETAS, eps=EPS)
