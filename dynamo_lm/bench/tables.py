"""A benchmark's record as tables and sentences, and facts of the machine. Knows no models and measures nothing."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

UNFAIR = " The fastest one-token loop may be missing, and ratios are then too high."
FLAGS = ("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd")


def machine(device: torch.device) -> dict[str, Any]:
    """What decides how fast this machine is, as far as it can be described without naming it."""
    facts: dict[str, Any] = {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_flags": _flags(),
        "last_level_cache_bytes": _last_level_cache(),
        "device": device.type,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["gpu_memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
    return facts


def table(race: dict[str, Any]) -> Table:
    """One race of a record: one line per method, and the floor as the last.

    Where weights are random, what a step costs stands in place of what the texts are worth.
    """
    methods = race["methods"]
    trained = methods[0]["log_likelihood"] is not None
    table = _table(title(race))
    last = ("log-like-\nlihood", "distinct\npairs", "regret") if trained else ("ms per\nstep", "step\ncost")
    speed = "ratio\n(one run)" if race["repetitions"] == 1 else "ratio\n(spread)"
    for heading in ("tokens\nper s", speed, "tokens\nper step", "effi-\nciency", "same\ntexts", *last):
        table.add_column(heading, justify="right", no_wrap=True)
    kind = methods[0]["kind"]
    for method in methods:
        if method["kind"] != kind:
            table.add_row()
        kind, same = method["kind"], method["identical"]
        baseline = method["name"] == method["baseline"]
        ceiling = f" of {method['ceiling']}" if method["ceiling"] not in (None, 1) else ""
        if trained:
            regret = f"{method['regret']:.3f}" if method["regret"] else ""
            quality: tuple[str, ...] = (f"{method['log_likelihood']:.3f}", f"{method['distinct_bigrams']:.2f}", regret)
        else:
            quality = (f"{method['step_seconds'] * 1000:.2f}", f"{method['step_cost']:.2f}")
        table.add_row(
            method["name"] + ("" if method["lossless"] else " *"),
            f"{method['tokens_per_second']['median']:.1f}",
            "baseline" if baseline else ratio_and_spread(method["ratio"], race["repetitions"]),
            f"{method['tokens_per_step']:.2f}{ceiling}",
            _efficiency(method),
            "" if same is None else f"{same['texts']}/{same['of']}",
            *quality,
            style="bold" if baseline else None,
        )
    floor = race["floor"]
    table.add_row()
    table.add_row(floor["name"], f"{floor['tokens_per_second']:.1f}", f"{floor['ratio']:.2f}", style="dim")
    return table


def ratio_and_spread(ratio: dict[str, float], repetitions: int, unit: str = "") -> str:
    """The median, and least and most where there are several repetitions."""
    return f"{ratio['median']:.2f}{unit}" + (f" ({ratio['min']:.2f}-{ratio['max']:.2f})" if repetitions > 1 else "")


def _above(method: dict[str, Any]) -> bool:
    """Whether the efficiency exceeds its ceiling as it is printed."""
    ceiling = method["efficiency_ceiling"]
    return ceiling is not None and round(method["efficiency"], 2) > round(ceiling, 2)


def _efficiency(method: dict[str, Any]) -> str:
    ceiling = f" of {method['efficiency_ceiling']:.2f}" if method["efficiency_ceiling"] else ""
    return f"{method['efficiency']:.2f}{'^' if _above(method) else ''}{ceiling}"


def notes(race: dict[str, Any]) -> list[str]:
    """What a reader of the table must know, as sentences."""
    floor = race["floor"]
    rates = floor["bytes_per_second"]
    multiples = ", ".join(f"{name} {value:.2f}" for name, value in floor["multiples"].items())
    notes = [
        f"Not raced: {skipped['name']}. {skipped['reason']}" + (UNFAIR if skipped["one_token"] else "")
        for skipped in sorted(race["skipped"], key=lambda s: s["name"])
    ]
    notes += [
        f"Floor: {floor['weight_bytes'] / 1e6:.1f} MB of weights, memory "
        f"{max(rates['read'], rates['copy']) / 1e9:.1f} GB/s; "
        f"a buffer of the weights' size {rates['resident'] / 1e9:.1f} GB/s, which would allow "
        f"{floor['resident_tokens_per_second']:.1f} tokens a second. Times the floor: {multiples}.",
        "ratio: tokens per second over the baseline's of the same kind, median of repetitions (least-most). efficiency: "
        "ratio over tokens per step, of what it could be if reading every weight once were all that a step took. step cost: "
        "seconds per step over the baseline's. *: not the base's own text or distribution. All pay for their prompt.",
    ]
    if any(method.get("synthetic") for method in race["methods"]):
        notes.append(
            "synthetic: drafts were accepted by chance, not because the base agreed, so these texts are not the base's and "
            "say nothing about quality. Heads that reach this acceptance would be about as fast here."
        )
    if any(map(_above, race["methods"])):
        notes.append(
            "^: above its ceiling. Here a step takes more than reading weights, and several tokens share that; or the "
            "baseline was disturbed."
        )
    if race["repetitions"] == 1:
        notes.append("One run, no spread: differences may be noise. --repetitions 5 shows how much.")
    if race["cut_prompts"]:
        notes.append(f"{race['cut_prompts']} prompts were too long for the context; their end was kept.")
    return notes


def title(race: dict[str, Any]) -> str:
    return f"{race['context']} context ({race['floor']['mean_length']:.0f} tokens on average), batch {race['batch']}"


def groups(race: dict[str, Any]) -> Table | None:
    """Ratios and tokens per step by group of prompts, or None if there is one."""
    names = list(race["methods"][0]["groups"])
    if len(names) < 2:
        return None
    table = _table("ratio (tokens per step) by group")
    for name in names:
        table.add_column(name.replace("_", "\n"), justify="right", no_wrap=True)
    for method in race["methods"]:
        own = [method["groups"][name] for name in names]
        table.add_row(method["name"], *(f"{row['ratio']['median']:.2f} ({row['tokens_per_step']:.2f})" for row in own))
    return table


def _table(title: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1), title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    return table


def _flags() -> list[str]:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                own = set(line.split())
                return [flag for flag in FLAGS if flag in own]
    return []


def _last_level_cache() -> int | None:
    sizes = {"K": 2**10, "M": 2**20, "G": 2**30}
    size = None
    for file in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")):
        with contextlib.suppress(OSError, ValueError, KeyError):
            text = file.read_text(encoding="utf-8").strip()
            size = int(text[:-1]) * sizes[text[-1]]
    return size
