"""Stem states of a frozen base, computed once per block and read from disk in later epochs.

With a frozen base the layers below the heads give the same states in every epoch, and they are nearly all of the arithmetic.
A block's states, (block_size, hidden) in bfloat16, take 2 x hidden bytes a token: 1.2 KB for SmolLM2-135M. Blocks of whole
conversations are packed once, so that a block has a number of its own in every epoch; blocks of running text are cut anew in
every epoch and cannot be kept. Ranks on one machine share the file; each learns at checkpoints what others have kept.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dynamo_lm.backbone.base_model import captured_inputs
from dynamo_lm.data.packing import Blocks, WholeBlocks
from dynamo_lm.errors import InputError
from dynamo_lm.files import write_text
from dynamo_lm.model.above_stem import AboveFeatures, AboveStem
from dynamo_lm.model.modeling import DynaMoForCausalLM
from dynamo_lm.training import ranks
from dynamo_lm.training.loss import packed_mask

TOLERANCE = 0.02  # relative error of bfloat16 states that are continued, against those of one forward


@torch.no_grad()
def stem_states(model: DynaMoForCausalLM, batch: dict[str, Tensor], *, bf16: bool) -> Tensor:
    """The stem's states of a batch of packed blocks, (batch, length, hidden) bfloat16; batch: as `Blocks.rows` gives it.

    Of a model with a sequential head its features and the final states in their place, (batch, length, 4 hidden). Each
    document by itself: attention over a whole block, most of which its mask hides, would be a quarter of the time.
    """
    states: list[Tensor] = []
    for row, document in _documents(batch["segments"]):
        ids, positions = batch["tokens"][row, document][None], batch["positions"][row, document][None]
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            if model.config.sequential:
                of_document = torch.cat(model.features_and_final(ids, position_ids=positions, use_cache=False), -1)
            else:
                with captured_inputs([model.last_layer]) as stems:
                    model.body(input_ids=ids, position_ids=positions, use_cache=False)
                of_document = stems[0]
        states.append(of_document[0].to(torch.bfloat16))
    return torch.cat(states).unflatten(0, batch["tokens"].shape)


def _documents(segments: Tensor) -> Iterator[tuple[int, slice]]:
    """Where the documents of packed blocks lie, row by row; segments: (batch, length)."""
    for row, numbers in enumerate(segments):
        start = 0
        for length in torch.unique_consecutive(numbers, return_counts=True)[1].tolist():
            yield row, slice(start, start + length)
            start += length


class FeatureCache:
    """Stem states by block, in one file that grows to `limit_bytes` at most.

    Blocks beyond the limit are computed anew each time. A file that was cut off keeps what is recorded as finished.
    """

    def __init__(self, folder: Path, model: DynaMoForCausalLM, blocks: Blocks, *, limit_bytes: int, bf16: bool):
        """Opens or creates the cache.

        Args:
            folder: of two files, `states.bin` and `cache.json`.
            model: whose base is frozen.
            limit_bytes: the largest size of the states on disk.

        Raises:
            InputError: blocks that are cut anew in every epoch, a cache of another base or other data, a base whose
                states cannot be continued above its stem, or ranks on several machines.
        """
        if not isinstance(blocks, WholeBlocks):
            raise InputError(
                "The feature cache needs blocks that are the same in every epoch, which conversations are and running "
                "text is not; train without --feature-cache."
            )
        if not ranks.on_one_machine():
            raise InputError("The ranks of one machine share the feature cache; train on one, or without --feature-cache.")
        self.model, self.blocks, self.bf16 = model, blocks, bf16
        self.hidden = model.output_weight().shape[1] * (4 if model.config.sequential else 1)
        size = blocks.block_size * self.hidden * 2
        self.kept = min(blocks.num_blocks(), limit_bytes // size)
        self.record = {
            "base": model.config.base_fingerprint,
            "data": blocks.store.fingerprint,
            "documents": len(blocks.documents),
            "block_size": blocks.block_size,
            "hidden": self.hidden,
        }
        self.path = folder / "cache.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.done = np.zeros(blocks.num_blocks(), dtype=bool)
        if ranks.rank() > 0:
            ranks.meet()  # when the first rank has made the files
        if self.path.exists():
            self.done[self._recorded()] = True
        shape = (max(self.kept, 1), blocks.block_size, self.hidden)
        states = folder / "states.bin"
        mode = "r+" if states.exists() and states.stat().st_size == int(np.prod(shape)) * 2 else "w+"
        if mode == "w+":
            self.done[:] = False
            if shutil.disk_usage(folder).free < self.kept * size:  # a full disk would end the process later, without a word
                raise InputError(
                    f'The feature cache needs {self.kept * size / 1e9:.2f} GB in "{folder}", more than is free; give a '
                    "smaller --feature-cache."
                )
        self.states = np.memmap(states, dtype=np.uint16, mode=mode, shape=shape)  # type: ignore[call-overload]
        if ranks.rank() == 0:
            ranks.meet()
        self.done = ranks.of_first(self.done)
        self.above = AboveFeatures(model) if model.config.sequential else AboveStem(model)
        self._check()

    def states_of(self, numbers: list[int], batch: dict[str, Tensor]) -> Tensor:
        """Stem states of the blocks with these numbers (`Blocks.rows`): (blocks, length, hidden) bfloat16."""
        packed = [self.blocks.packed_number(number) for number in numbers]
        missing = [i for i, block in enumerate(packed) if not self.done[block]]
        fresh = stem_states(self.model, {k: v[missing] for k, v in batch.items()}, bf16=self.bf16) if missing else None
        states = torch.empty(len(packed), self.blocks.block_size, self.hidden, dtype=torch.bfloat16)
        for i, block in enumerate(packed):
            if self.done[block]:
                states[i] = torch.from_numpy(self.states[block]).view(torch.bfloat16)
        if fresh is not None:
            states[missing] = fresh.cpu()
            for place, i in enumerate(missing):
                if packed[i] < self.kept:
                    self.states[packed[i]] = fresh[place].cpu().contiguous().view(torch.uint16).numpy()
                    self.done[packed[i]] = True
        return states.to(self.model.device)

    def save(self) -> None:
        """Records what is finished; called with every checkpoint."""
        self.states.flush()
        self.done = ranks.add_up(torch.from_numpy(self.done.astype(np.int64))).numpy() > 0
        if ranks.rank() == 0:
            write_text(self.path, json.dumps({"of": self.record, "done": np.flatnonzero(self.done).tolist()}))

    def _recorded(self) -> list[int]:
        """The blocks that the record calls finished. Raises InputError: it is damaged, or of another base or other data."""
        folder = self.path.parent
        try:
            record = json.loads(self.path.read_text(encoding="utf-8"))
            of, done = record["of"], [number for number in record["done"] if number < self.kept]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f'The record of the feature cache "{folder}" is damaged; delete that folder.') from error
        if of != self.record:
            raise InputError(f'The feature cache "{folder}" belongs to another base or other data; name another folder.')
        return done

    def _check(self) -> None:
        """Refuses a base whose last states differ when they are continued from its stem."""
        batch = {k: v.to(self.model.device) for k, v in self.blocks.rows([0]).items()}
        rows = {k: v[:, :64] for k, v in batch.items()}
        mask = packed_mask(self.model, rows["segments"])
        with torch.no_grad(), torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16):
            whole = self.model.hidden(rows["tokens"], num_heads=1, attention_mask=mask, position_ids=rows["positions"])
            stem = stem_states(self.model, rows, bf16=self.bf16)
            rest = self.above.hidden(stem, rows["tokens"], num_heads=1, attention_mask=mask, position_ids=rows["positions"])
        error = (whole.float() - rest.float()).norm() / whole.float().norm()
        if not error < TOLERANCE:
            raise InputError(
                f"The states above this base's stem cannot be continued from stored ones (relative error {error:.3f}); "
                "train without --feature-cache."
            )
