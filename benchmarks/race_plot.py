"""Races as pictures: `python -m benchmarks.race_plot results/bench-story` draws those of its bench.json.

A bar per method, its spread, what a step at no extra cost would have given, and the baseline at 1.

Plain numbers in, SVG and PNG out. Colour is not the only sign: DynaMo's bars are solid, other programs' are hatched,
lossy methods end in a star. Colours are Okabe and Ito's. Needs matplotlib (extra `bench`).
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

from dynamo_lm.bench.tables import title
from dynamo_lm.files import write_bytes
from dynamo_lm.report import figures

ORDER = {"greedy": 0, "sampled": 1}


def draw(race: dict[str, Any], *, heading: str = "") -> dict[str, bytes]:
    """The picture of one race of a record, as {"svg": ..., "png": ...}."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = sorted(race["methods"], key=lambda row: ORDER[row["kind"]])
    names = [row["name"] + ("" if row["lossless"] else " *") for row in rows]
    settings: Any = {**matplotlib.rcParamsDefault, **figures.RC, "axes.grid": False}
    with matplotlib.rc_context(settings):
        drawing = Figure(figsize=(7.6, 1.5 + 0.27 * (len(rows) + 1)), layout="constrained")
        FigureCanvasAgg(drawing)
        axes = drawing.add_subplot()
        for at, row in enumerate(rows):
            ours = row["engine"] == "dynamo" and not row["one_token"]
            colour = figures.BLUE if ours else figures.RULE if row["one_token"] else figures.ORANGE
            ratio = row["ratio"]
            axes.barh(
                at,
                ratio["median"],
                0.68,
                color=colour,
                edgecolor=figures.INK,
                linewidth=0.5,
                hatch=None if ours or row["one_token"] else "////",
            )
            axes.plot([ratio["min"], ratio["max"]], [at, at], color=figures.INK, linewidth=1.1)
            for end in (ratio["min"], ratio["max"]):
                axes.plot([end, end], [at - 0.16, at + 0.16], color=figures.INK, linewidth=1.1)
            if not row["one_token"]:
                free = row["tokens_per_step"]
                axes.plot([free, free], [at - 0.34, at + 0.34], color=figures.VERMILION, linewidth=1.6)
            axes.annotate(
                f"{ratio['median']:.2f}",
                (0, at),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                bbox={"boxstyle": "square,pad=0.12", "facecolor": figures.CARD, "edgecolor": "none"},
            )
        edge = 1.12 * max(max(row["ratio"]["max"], row["tokens_per_step"]) for row in rows)
        floor = race["floor"]["ratio"]
        far = floor > edge  # the floor of a small model would squeeze all bars
        axes.plot(min(floor, edge), len(rows), marker=">" if far else "D", color=figures.INK, markersize=5, clip_on=False)
        axes.annotate(
            f"{floor:.2f}",
            (min(floor, edge), len(rows)),
            xytext=(-7, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=8,
        )
        axes.axvline(1, color=figures.INK, linewidth=1, linestyle=(0, (3, 2)))
        axes.set_yticks(range(len(rows) + 1), [*names, "memory-bandwidth floor"], fontsize=8.5)
        axes.invert_yaxis()
        axes.set_xlim(0, edge)
        axes.set_xlabel("speed over the strongest one-token method of the same kind", fontsize=9)
        keys: list[Any] = [
            Patch(facecolor=figures.BLUE, edgecolor=figures.INK, label="DynaMo"),
            Patch(facecolor=figures.ORANGE, edgecolor=figures.INK, hatch="////", label="other programs and methods"),
            Patch(facecolor=figures.RULE, edgecolor=figures.INK, label="one token per step"),
            matplotlib.lines.Line2D([], [], color=figures.VERMILION, linewidth=1.6, label="if a step cost nothing extra"),
        ]
        drawing.legend(handles=keys, loc="outside upper left", ncols=2, handlelength=1.6)
        if heading:
            axes.set_title(f"{heading} Whiskers: least and most. *: lossy.", fontsize=8, loc="right")
        files = {}
        for form in ("svg", "png"):
            stream = io.BytesIO()
            metadata = {"Date": None, "Creator": None} if form == "svg" else {"Software": None}
            drawing.savefig(stream, format=form, dpi=150, metadata=metadata)
            files[form] = stream.getvalue()
    return files


def save_all(record: dict[str, Any], folder: Path) -> list[str]:
    """Draw every race of a record into `folder`; the first is bench.svg and bench.png. Returns the names."""
    names = []
    for number, race in enumerate(record["races"]):
        heading = f"{record['model']['name']}, {record['model']['dtype']}, {title(race)}."
        suffix = "" if number == 0 else f"-{race['context']}-batch{race['batch']}"
        for form, data in draw(race, heading=heading).items():
            names.append(f"bench{suffix}.{form}")
            write_bytes(folder / names[-1], data)
    return names


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(*save_all(json.loads(Path(argument, "bench.json").read_text(encoding="utf-8")), Path(argument)))
