"""What the benchmark found, for people and for files: a record of plain numbers, a table, facts of the machine.

A record names no host and no folder. Knows no models beyond the record's head and measures nothing.
"""

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
    """What decides how fast this machine is, as far as it can be told without naming it."""
    found: dict[str, Any] = {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_flags": _flags(),
        "last_level_cache_bytes": _last_level_cache(),
        "device": device.type,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["gpu_memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
    return found


def table(race: dict[str, Any]) -> Table:
    """One race of a record: a row a way, and the floor as the last row.

    Where weights are random, what a step costs stands in place of what the texts are worth.
    """
    rows = race["ways"]
    trained = rows[0]["log_likelihood"] is not None
    found = _table(title(race))
    found.add_column("", no_wrap=True)
    last = ("log-like-\nlihood", "distinct\npairs", "regret") if trained else ("ms per\nstep", "step\ncost")
    for heading in ("tokens\nper s", "ratio\n(spread)", "tokens\nper step", "effi-\nciency", "same\ntexts", *last):
        found.add_column(heading, justify="right", no_wrap=True)
    kind = rows[0]["kind"]
    for row in rows:
        if row["kind"] != kind:
            found.add_row()
        kind = row["kind"]
        ratio, same = row["ratio"], row["identical"]
        baseline = row["name"] == row["baseline"]
        ceiling = f" of {row['ceiling']}" if row["ceiling"] not in (None, 1) else ""
        quality = (
            (
                f"{row['log_likelihood']:.3f}",
                f"{row['distinct_bigrams']:.2f}",
                f"{row['regret']:.3f}" if row["regret"] else "",
            )
            if trained
            else (f"{row['step_seconds'] * 1000:.2f}", f"{row['step_cost']:.2f}")
        )
        found.add_row(
            row["name"] + ("" if row["lossless"] else " *"),
            f"{row['tokens_per_second']['median']:.1f}",
            "baseline" if baseline else f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})",
            f"{row['tokens_per_step']:.2f}{ceiling}",
            f"{row['efficiency']:.2f}" + (f" of {row['efficiency_ceiling']:.2f}" if row["efficiency_ceiling"] else ""),
            "" if same is None else f"{same['texts']}/{same['of']}",
            *quality,
            style="bold" if baseline else None,
        )
    floor = race["floor"]
    found.add_row()
    found.add_row(floor["name"], f"{floor['tokens_per_second']:.1f}", f"{floor['ratio']:.2f}", style="dim")
    return found


def notes(race: dict[str, Any]) -> list[str]:
    """What a reader of the table must know, as sentences."""
    floor = race["floor"]
    rates = floor["bytes_per_second"]
    multiples = ", ".join(f"{name} {value:.2f}" for name, value in floor["multiples"].items())
    found = [
        f"Not raced: {skipped['name']}. {skipped['reason']}" + (UNFAIR if skipped["one_token"] else "")
        for skipped in sorted(race["skipped"], key=lambda s: s["name"])
    ]
    found += [
        f"Floor: {floor['weight_bytes'] / 1e6:.1f} MB of weights, memory "
        f"{max(rates['read'], rates['copy']) / 1e9:.1f} GB/s; "
        f"a buffer of the weights' size {rates['resident'] / 1e9:.1f} GB/s, which would allow "
        f"{floor['resident_tokens_per_second']:.1f} tokens a second. Times the floor: {multiples}.",
        "ratio: tokens per second over the baseline's of the same kind, median of repetitions (least-most). efficiency: "
        "ratio over tokens per step, of what it could be if reading every weight once were all that a step took. step cost: "
        "seconds per step over the baseline's. *: not the base's own text or distribution. Every way pays for its prompt.",
    ]
    if race["cut_prompts"]:
        found.append(f"{race['cut_prompts']} prompts were too long for the context; their end was kept.")
    return found


def title(race: dict[str, Any]) -> str:
    return f"{race['context']} context ({race['floor']['mean_length']:.0f} tokens on average), batch {race['batch']}"


def groups(race: dict[str, Any]) -> Table | None:
    """Ratios and tokens per step by group of prompts, or None if there is one."""
    names = list(race["ways"][0]["groups"])
    if len(names) < 2:
        return None
    found = _table("ratio (tokens per step) by group")
    found.add_column("", no_wrap=True)
    for name in names:
        found.add_column(name.replace("_", "\n"), justify="right", no_wrap=True)
    for row in race["ways"]:
        own = row["groups"]
        found.add_row(
            row["name"], *(f"{own[name]['ratio']['median']:.2f} ({own[name]['tokens_per_step']:.2f})" for name in names)
        )
    return found


def shares(profiles: dict[str, dict[str, Any]]) -> Table:
    """Where a step's time goes, a row a way."""
    parts = list(dict.fromkeys(part for profile in profiles.values() for part in profile["shares"]))
    found = _table("share of a step")
    found.add_column("", no_wrap=True)
    for heading in ("ms per\nstep", *(part.replace(" ", "\n") for part in parts)):
        found.add_column(heading, justify="right", no_wrap=True)
    for name, profile in profiles.items():
        own = profile["shares"]
        cells = [f"{own[part]:.1%}" if part in own else "" for part in parts]
        found.add_row(name, f"{profile['step_seconds'] * 1000:.1f}", *cells)
    return found


def _table(title: str) -> Table:
    return Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1), title=title, title_justify="left")


def _flags() -> list[str]:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                own = set(line.split())
                return [flag for flag in FLAGS if flag in own]
    return []


def _last_level_cache() -> int | None:
    sizes = {"K": 2**10, "M": 2**20, "G": 2**30}
    found = None
    for file in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")):
        with contextlib.suppress(OSError, ValueError, KeyError):
            text = file.read_text().strip()
            found = int(text[:-1]) * sizes[text[-1]]
    return found
