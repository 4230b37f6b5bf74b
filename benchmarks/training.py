"""Heads-only training against the arithmetic it needs: `python -m benchmarks.training > results/training.json`.

The bundled story model with a frozen base, n = 2, 3, 4, on packed stories, in float32 or, with --bf16, under the trainer's
autocast (very slow on processors that do not multiply bf16 themselves). Nothing is assumed: each part
of the arithmetic is timed alone, on the same batch and with the same autocast, in the same repetition as the step:

  trunk    the base's own forward, without heads, head 1's readout or gradients (embedding, all layers, final norm)
  heads    forward and backward of the layers of heads 2..n and the final norm above them, from a stored state below
           the last layer and a stored gradient
  loss     for heads 2..n, output embedding and cross-entropy forward, gradient of the states backward, on stored states;
           written as plainly as can be: one product, one cross-entropy, as many positions at a time as the trainer takes
  products of `loss`, the two matrix products alone

share = (trunk + heads + loss) / step, where a step is `heads_loss`: everything between a batch and its gradients. Where
other programs slow parts at random it scatters, beyond 1 too; `share_of_least`, of each part's and the step's fastest
repetition, is the one to believe there. The optimizer (clipping, AdamW, clearing) and the making of a batch are timed
beside it; `share_of_all` counts them, too.

Memory: bytes of live tensors, calls at every operation (workspace inside one is not), parameters not counted.
`vocabulary_wide` is what has one entry per token of the vocabulary: logits, log-softmax, their gradients. `loss` is the
peak while losses are taken on stored hidden states, without those states and their gradients. `all_logits` is what the
float32 logits of all heads and positions alone would take. Here the base learns, so that head 1 has a loss.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoTokenizer

from dynamo_lm import DynaMoForCausalLM
from dynamo_lm.assets import bundled
from dynamo_lm.backbone.attention_mask import AttentionMaskBuilder
from dynamo_lm.bench.summary import spread
from dynamo_lm.bench.tables import machine
from dynamo_lm.data.packing import Blocks, targets
from dynamo_lm.data.token_store import tokenize
from dynamo_lm.training import trainer
from dynamo_lm.training.loss import CHUNK, heads_loss
from dynamo_lm.training.options import TrainingOptions
from dynamo_lm.training.provenance import versions
from dynamo_lm.training.step import parameter_groups

DATA = Path(os.environ.get("DYNAMO_DATA", "../shared/data"))
Batch = dict[str, Tensor]


def open_model(num_heads: int) -> DynaMoForCausalLM:
    model = DynaMoForCausalLM.from_pretrained(bundled(), dtype=torch.float32)
    model.config.num_heads = num_heads
    model.heads = model.heads[: num_heads - 1]
    return model


class Step:
    """One training step of a frozen base and its parts, each a function without arguments."""

    def __init__(self, num_heads: int, blocks: Blocks, batch_size: int, bf16: bool):
        self.model, self.blocks, self.batch_size = open_model(num_heads).freeze_base().train(), blocks, batch_size
        self.model.base.eval()
        self.options = TrainingOptions(steps=1, lr_b=0.0, lr_mb=0.0, batch_size=batch_size, bf16=bf16)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, self.options), betas=(0.9, 0.95), eps=1e-8)
        self.batch = blocks.batch(0, batch_size)
        order = torch.arange(blocks.block_size)[None]
        segments = self.batch["segments"]
        self.inputs = {  # of the base's body, as `packed_hidden` gives them
            "input_ids": self.batch["tokens"],
            "attention_mask": AttentionMaskBuilder.of(self.model.base.config, self.model.dtype).mask(
                order, order, query_segments=segments, key_segments=segments
            ),
            "position_ids": self.batch["positions"],
            "use_cache": False,
        }
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
        self._store()

    def _store(self) -> None:
        """What the parts start from: the last layer's inputs, the heads' final states, a gradient for them."""
        calls: list[tuple[tuple, dict]] = []
        hook = self.model.last_layer.register_forward_hook(
            lambda module, args, kwargs, output: calls.append((args, kwargs)), with_kwargs=True
        )
        with torch.no_grad(), self.autocast:
            self.model.body(**self.inputs)
            hook.remove()
            self.states = self.model.hidden(**self.inputs)[1:]  # (n - 1, batch, length, hidden)
        (self.args, self.kwargs), *_ = calls
        self.gradient = torch.randn_like(self.states) * 1e-3
        self.labels = [targets(self.batch["tokens"], self.batch["segments"], i + 2) for i in range(len(self.states))]

    def step(self) -> None:
        heads_loss(self.model, **self.batch, options=self.options)

    def optimize(self) -> None:
        torch.nn.utils.clip_grad_norm_([p for group in self.optimizer.param_groups for p in group["params"]], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def make_batch(self) -> None:
        self.blocks.batch(1, self.batch_size)

    def trunk(self) -> None:
        with torch.no_grad(), self.autocast:
            self.model.body(**self.inputs)

    def heads(self) -> None:
        feed = self.args[0] if self.args else self.kwargs["hidden_states"]
        with self.autocast:
            states = [head(feed, self.args, self.kwargs) for head in self.model.heads]
            final = self.model.body.final_layer_norm(torch.cat(states)).unflatten(0, (len(states), -1))
        final.backward(self.gradient)

    def loss(self) -> None:
        weight = self.model.base.get_output_embeddings().weight.detach()
        with self.autocast:
            for states, labels in zip(self.states, self.labels, strict=True):
                for rows, wanted in zip(states.flatten(0, 1).split(CHUNK), labels.flatten().split(CHUNK), strict=True):
                    chunk = rows.detach().requires_grad_()
                    F.cross_entropy(F.linear(chunk, weight).float(), wanted, reduction="sum").backward()

    def products(self) -> None:
        weight = self.model.base.get_output_embeddings().weight.detach()
        dtype = torch.bfloat16 if self.options.bf16 else torch.float32
        weight = weight.to(dtype)
        for states in self.states.to(dtype):
            for chunk in states.flatten(0, 1).split(CHUNK):
                F.linear(chunk, weight) @ weight


PARTS: dict[str, Callable[[Step], None]] = {
    "step": Step.step,
    "optimizer": Step.optimize,  # after a step, whose gradients it uses
    "batch": Step.make_batch,
    "trunk": Step.trunk,
    "heads": Step.heads,
    "loss": Step.loss,
    "products": Step.products,
}


NEEDED = ("trunk", "heads", "loss")


def speed(blocks: Blocks, batch_size: int, repetitions: int, bf16: bool) -> list[dict[str, Any]]:
    steps = {n: Step(n, blocks, batch_size, bf16) for n in (2, 3, 4)}
    seconds: dict[int, dict[str, list[float]]] = {n: {part: [] for part in PARTS} for n in steps}
    for repetition in range(repetitions + 1):  # the first warms up
        print(f"repetition {repetition} of {repetitions}", file=sys.stderr)
        for n, step in steps.items():
            for part, run in PARTS.items():
                began = time.perf_counter()
                run(step)
                if repetition:
                    seconds[n][part].append(time.perf_counter() - began)
    rows = []
    for n, parts in seconds.items():
        needed = [sum(times) for times in zip(*(parts[part] for part in NEEDED), strict=True)]
        whole = [sum(times) for times in zip(parts["step"], parts["optimizer"], parts["batch"], strict=True)]
        rows.append(
            {
                "n": n,
                "share": _rounded(need / step for need, step in zip(needed, parts["step"], strict=True)),
                "share_of_least": float(f"{sum(min(parts[p]) for p in NEEDED) / min(parts['step']):.4g}"),
                "share_of_all": _rounded(need / all for need, all in zip(needed, whole, strict=True)),
                "tokens_per_second": _rounded(batch_size * blocks.block_size / all for all in whole),
                "seconds": {part: _rounded(times) for part, times in parts.items()},
            }
        )
    return rows


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors made while it is active, those `existing` before not counted; the peaks."""

    def __init__(self, vocab_size: int, hidden_size: int, existing: Iterator[Tensor]):
        super().__init__()
        self.width, self.weight = vocab_size, vocab_size * hidden_size
        self.existing = {tensor.untyped_storage()._cdata for tensor in existing}
        self.live: dict[int, tuple[StorageWeakRef, int, bool]] = {}
        self.peak = self.wide_peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.existing and storage._cdata not in self.live:
                    wide = tensor.ndim > 1 and tensor.shape[-1] == self.width and tensor.numel() != self.weight
                    self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes(), wide
        self.peak = max(self.peak, sum(size for _, size, _ in self.live.values()))
        self.wide_peak = max(self.wide_peak, sum(size for _, size, wide in self.live.values() if wide))
        return output


@contextmanager
def stored_hidden(hidden: Tensor) -> Iterator[None]:
    """`heads_loss` takes losses only: the hidden states are there already."""
    with patch.object(trainer, "packed_hidden", lambda *args, **kwargs: hidden):
        yield


def memory(blocks: Blocks, batch_size: int, bf16: bool) -> list[dict[str, Any]]:
    rows = []
    for n in (1, 2, 3, 4):
        model, batch = open_model(n).train(), blocks.batch(0, batch_size)
        options = TrainingOptions(steps=1, lr_b=1e-3, lr_mb=1e-4, batch_size=batch_size, bf16=bf16)
        vocab_size, hidden_size = model.get_output_embeddings().weight.shape
        heads_loss(model, **batch, options=options)  # the parameters' gradients stay

        def existing(model: DynaMoForCausalLM = model, *more: Tensor) -> Iterator[Tensor]:
            for parameter in model.parameters():
                yield from (parameter, parameter.grad) if parameter.grad is not None else (parameter,)
            yield from more

        with LiveBytes(vocab_size, hidden_size, existing()) as whole:
            heads_loss(model, **batch, options=options)
        hidden = torch.randn(n, *batch["tokens"].shape, hidden_size, requires_grad=True)
        hidden.grad = torch.zeros_like(hidden)
        with stored_hidden(hidden), LiveBytes(vocab_size, hidden_size, existing(model, hidden, hidden.grad)) as part:
            heads_loss(model, **batch, options=options)
        rows.append(
            {
                "n": n,
                "vocabulary_wide_bytes": whole.wide_peak,
                "loss_bytes": part.peak - hidden.nbytes,  # without the gradient that it fills in
                "hidden_bytes": hidden.nbytes,
                "peak_bytes": whole.peak,
                "all_logits_bytes": 4 * n * batch["tokens"].numel() * vocab_size,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--block-size", type=int, default=256)
    parser.add_argument("--bf16", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = AutoTokenizer.from_pretrained(bundled())
        store = tokenize([str(DATA / "stories" / "tinystories.jsonl")], tokenizer, folder, limit_tokens=200_000)
        blocks = Blocks(store, store.split(0.0, 0)[0], arguments.block_size, seed=0)
        facts = {
            "versions": versions(),
            "machine": machine(torch.device("cpu")),
            "batch_size": arguments.batch_size,
            "block_size": arguments.block_size,
            "precision": "bf16 autocast" if arguments.bf16 else "float32",
            "positions_at_a_time": CHUNK,
            "repetitions": arguments.repetitions,
            "memory": memory(blocks, arguments.batch_size, arguments.bf16),
            "speed": speed(blocks, arguments.batch_size, arguments.repetitions, arguments.bf16),
            "load_average": round(os.getloadavg()[1], 2),
        }
    print(json.dumps(facts, indent=1))


def _rounded(values: Any) -> dict[str, float]:
    return {name: float(f"{value:.4g}") for name, value in spread(list(values)).items()}


if __name__ == "__main__":
    main()
