"""What `train --dry-run` and `finetune --dry-run` print."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
import typer

from dynamo_lm.cli.progress import duration
from dynamo_lm.cli.training_options import RunOptions
from dynamo_lm.cli.training_run import Run
from dynamo_lm.cli.training_text import Text
from dynamo_lm.data.packing import Blocks
from dynamo_lm.devices import free_memory
from dynamo_lm.model.loading import print_json
from dynamo_lm.training.memory_estimate import GPU_SHARE, memory, parameters
from dynamo_lm.training.speed import measured_rows, operations_per_token, seconds_per_step


def describe(run: Run, text: Text | None, output: RunOptions) -> None:
    """Print the facts of a run that does not take place; with a text, measure how long a step takes."""
    model, options = run.model_of(), run.options
    facts: dict[str, Any] = {
        "parameters": parameters(model, frozen=options.frozen, coupling_only=options.coupling_only),
        "ranks": run.ranks,
        "memory_bytes_estimate": memory(model, options, run.block_size, fused=run.fused, ranks=run.ranks),
        "gpu_memory_bytes": run.gpu_memory,
        "tokens_per_step": options.batch_size * run.block_size,
        "options": asdict(options) | {"block_size": run.block_size, "attention": run.attention},
        "steps": run.steps,
    }
    if output.plan_tokens is not None:
        operations = operations_per_token(model, options, run.block_size)
        seconds = output.plan_tokens * operations / (run.ranks * output.plan_tflops * 1e12)
        facts["plan"] = {
            "tokens": output.plan_tokens,
            "operations_per_token": operations,
            "tflops": output.plan_tflops,
            "seconds": seconds,
        }
    if text is not None:
        facts |= {"documents": text.identity["documents"], **text.sizes()}
        if output.plan is None:
            facts["seconds_per_step"] = _measure_step(run, text, facts["memory_bytes_estimate"]["total"])
    if output.json:
        print_json(facts | ({} if text is None else text.facts))
    else:
        _print_description(run.base, facts)


def _measure_step(run: Run, text: Text, needed: int) -> float | None:
    """Seconds of a step with random weights of the model's shape, or None if fewer than `needed` bytes are free."""
    free = free_memory(run.device)
    if free is not None and needed > free:
        return None
    tokens = measured_rows(run.device, run.options) * run.block_size
    typer.echo(f"dynamo-lm: measuring a forward and backward pass of {tokens:,} tokens.", err=True)
    torch.manual_seed(run.options.seed)
    assert isinstance(text.blocks, Blocks)
    return seconds_per_step(run.model_of(run.device), text.blocks, run.options)


def _print_description(base: str, facts: dict[str, Any]) -> None:
    count, memory = facts["parameters"], facts["memory_bytes_estimate"]
    print(f"base        {base}: {count['base']:,} parameters")
    coupling = f", {count['coupling']:,} of them the coupling" if count["coupling"] else ""
    print(f"heads       {count['heads']:,} parameters, {count['overhead']:.2%} of the base{coupling}")
    print(f"trained     {count['trained']:,} parameters")
    parts = ", ".join(f"{name} {_bytes(value)}" for name, value in memory.items() if name != "total")
    of_rank = ""
    if facts["ranks"] > 1:
        how = (
            "weights, gradients and optimizer split (--shard)" if facts["options"]["shard"] else "each with all (--no-shard)"
        )
        print(f"ranks       {facts['ranks']}, {how}")
        of_rank = " a rank"
    print(f"memory      about {_bytes(memory['total'])}{of_rank} (an estimate): {parts}")
    if facts["gpu_memory_bytes"]:
        share = memory["total"] / facts["gpu_memory_bytes"]
        verdict = "fits" if share <= GPU_SHARE else "is tight in" if share <= 1 else "does not fit"
        print(f"            {verdict} {_bytes(facts['gpu_memory_bytes'])}: {share:.0%}")
    passes = facts["options"]["accumulation"]
    less = "; more need less memory" if passes * facts["ranks"] < facts["options"]["batch_size"] else ""
    print(f"            a step is {passes} forward and backward passes{of_rank} (--accumulation){less}")
    if plan := facts.get("plan"):
        print(
            f"time        about {duration(plan['seconds'])} for {plan['tokens']:,.0f} tokens by arithmetic: "
            f"{plan['operations_per_token'] / 1e9:,.1f} billion operations a token, {plan['tflops']:g} TFLOP/s a rank"
        )
    if "training_tokens" not in facts:
        print(
            f"steps       of {facts['tokens_per_step']:,} tokens; name the text with --data to know how many, and how long"
        )
        return
    held_out = f", {facts['validation_tokens']:,} held out"
    print(f"text        {facts['documents']:,} documents, {facts['training_tokens']:,} tokens to train on{held_out}")
    total = facts["steps"] * facts["tokens_per_step"]
    epochs = total / facts["training_tokens"]
    print(f"steps       {facts['steps']:,} of {facts['tokens_per_step']:,} tokens: {total:,} in all, {epochs:.2f} epochs")
    if "seconds_per_step" not in facts:
        return
    seconds = facts["seconds_per_step"]
    if seconds is None:
        print(f"time        not measured: less than {_bytes(memory['total'])} of memory is free here")
        return
    rate = facts["tokens_per_step"] / seconds
    print(
        f"time        about {duration(seconds * facts['steps'])}, without measurements on held-out text: "
        f"{duration(seconds)} a step, {rate:,.0f} tokens a second (measured on this machine)"
    )


def _bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
