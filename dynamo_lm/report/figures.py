"""The report's figures: plain numbers in, one SVG out, the same bytes for the same numbers.

No figure states anything by colour alone: methods have their own markers and line styles, shares go from light to dark and
carry their names. Colours are Okabe and Ito's, which colour-blind readers can tell apart. Knows no files and no results.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

INK, RULE, CARD = "#1c2127", "#d4d8dd", "#fffffe"  # rare values: `inline` turns them into the page's own colours
BLUE, ORANGE, GREEN, PINK, VERMILION, SKY = "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9"
PAGE = {INK: "currentColor", RULE: "var(--rule)", CARD: "var(--card)", BLUE: "var(--blue)"}
STYLES: dict[str, tuple[str, str, Any]] = {  # method: colour, marker, line
    "mask+Otsu+blur": (BLUE, "o", "-"),
    "mask+Otsu": (ORANGE, "s", "--"),
    "mask": (GREEN, "^", "-."),
    "mask^0.5+Otsu+blur": (PINK, "D", ":"),
    "Otsu+blur": (VERMILION, "v", (0, (6, 1.5, 1, 1.5))),
    "strict": (SKY, "h", "-"),
}
SHARES = LinearSegmentedColormap.from_list("shares", ["#d8e6f2", "#8fc0e3", "#2f86c5", "#0b4a80"])
HEAT = LinearSegmentedColormap.from_list("heat", ["#f8ebbd", "#f6cf65", "#e08a1e", "#a63c0f", "#4a0f0a"])
NARROW, SMALL = (4.4, 3.2), (3.3, 2.5)  # inches; a column of the page, a small multiple
RATIOS = {1 / 16: "1:16", 1 / 8: "1:8", 1 / 4: "1:4", 1 / 2: "1:2", 1: "1:1", 2: "2:1", 4: "4:1", 8: "8:1", 16: "16:1"}


@dataclass(frozen=True)
class Point:
    """A measured point with its interval, if there is one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    label: str = ""


def win_rate(
    points: Sequence[Point],
    band: Sequence[Point],
    crossing: float | None,
    *,
    method: str,
    ceiling: float,
    small: bool = False,
) -> str:
    """The paper's Fig. 3: win rate (wins to losses, logarithmic) against tokens per step.

    band: the regression with its confidence band, or nothing; crossing: the same-quality speed-up, if there is one; ceiling:
    n, the most tokens that a step can give.
    """
    colour, marker, line = style(method)
    with _canvas(SMALL if small else NARROW) as (axes, svg):
        shown = [p for p in points if p.y > 0]
        if band:
            xs, ys, lows, highs = np.maximum(
                np.array([(p.x, p.y, p.low, p.high) for p in band], float), 1e-3
            ).T  # the axis is logarithmic
            axes.fill_between(xs, lows, highs, color=colour, alpha=0.16, linewidth=0)
            axes.plot(xs, ys, color=colour, linestyle=line, linewidth=1.6)
        _intervals(axes, shown, colour)
        _markers(axes, shown, marker, color=colour, markersize=6 if small else 7, zorder=4)
        axes.axhline(1, color=INK, linewidth=0.9)
        extent = [v for p in shown for v in (p.y, p.low, p.high) if v is not None and v > 0] + [0.5, 2]
        low, high = max(min(extent) / 1.25, 1 / 24), min(max(extent) * 1.25, 24)
        axes.set_yscale("log", base=2)
        axes.set_ylim(low, high)
        ticks = [ratio for ratio in RATIOS if low <= ratio <= high]
        axes.set_yticks(ticks, [RATIOS[ratio] for ratio in ticks])
        axes.yaxis.set_minor_locator(NullLocator())
        left = min([1.0, *(p.x for p in shown)])
        axes.set_xlim(left - 0.08, max([ceiling, *(p.x for p in shown)]) + 0.15)
        axes.axvline(ceiling, color=RULE, linewidth=1.2)
        if crossing is not None:
            size = 9 if small else 11
            _flag(axes, crossing, f"{crossing:.2f}", middle=(left + ceiling) / 2, at=0.03, fontsize=size)
        if not small:
            axes.set_ylabel("wins : losses against the base")
            for p in shown[:: max(1, len(shown) // 6)]:
                axes.annotate(p.label, (p.x, p.y), xytext=(7, 5), textcoords="offset points", fontsize=8.5)
        axes.set_xlabel("tokens per step")
    return svg()


def shares(labels: Sequence[str], rows: Sequence[Sequence[float]]) -> str:
    """The paper's Figs 5 and 12: for every eps_b (`labels`) the share of steps that gave 1, 2, .. n tokens."""
    table = np.array(rows, float)  # (points, n)
    colours = SHARES(np.linspace(0, 1, table.shape[1]))
    with _canvas(NARROW) as (axes, svg):
        at, base = np.arange(len(labels)), np.zeros(len(labels))
        for size, colour in enumerate(colours, start=1):
            share = table[:, size - 1]
            axes.bar(at, share, 0.86, bottom=base, color=colour, edgecolor=CARD, linewidth=0.8)
            if len(labels) <= 12:
                ink = "#ffffff" if size > table.shape[1] / 2 else "#10161c"
                for x in np.flatnonzero(share >= 0.09):
                    axes.text(x, base[x] + share[x] / 2, f"{size}", ha="center", va="center", color=ink, fontsize=8)
            base = base + share
        for size, colour in enumerate(colours, start=1):
            axes.bar([0], [0], color=colour, edgecolor=INK, linewidth=0.4, label=f"{size} token{'s' * (size > 1)}")
        every = max(1, -(-len(labels) // 11))
        axes.set_xticks(at[::every], list(labels)[::every])
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.0%}"))
        axes.set_xlabel("eps_b")
        axes.set_ylabel("share of steps")
        axes.grid(visible=False)
        _legend(axes, columns=min(4, table.shape[1]))
    return svg()


def curves(
    lines: Sequence[tuple[str, Sequence[Point]]],
    *,
    x_label: str,
    y_label: str,
    level: tuple[float, str] | None = None,
    chosen: float | None = None,
    log: bool = False,
) -> str:
    """Lines with intervals over eps_b; `level` is a horizontal line with its name, `chosen` a marked eps_b.

    A line named as a method is drawn in that method's style.
    """
    with _canvas(NARROW) as (axes, svg):
        for number, (name, points) in enumerate(lines):
            colour, marker, line = style(name, number)
            _markers(axes, points, marker, color=colour, linestyle=line, linewidth=1.5, markersize=6, label=name)
            _intervals(axes, points, colour)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            axes.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            axes.yaxis.set_minor_locator(MaxNLocator(4))
        if level is not None:
            axes.axhline(level[0], color=INK, linewidth=0.9, linestyle=(0, (4, 2)))
            place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "xytext": (0, 3), "textcoords": "offset points"}
            axes.annotate(level[1], (0.99, level[0]), **place, ha="right", fontsize=8)
        if chosen is not None:
            middle = float(np.mean(axes.get_xlim()))
            _flag(axes, chosen, f"chosen {chosen:g}", middle=middle, at=0.96, fontsize=9, va="top")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if len(lines) > 1:
            _legend(axes, columns=2)
    return svg()


def frontier(ladder: Sequence[Point], methods: Sequence[tuple[str, Sequence[Point]]], *, x_label: str, y_label: str) -> str:
    """Likelihood against diversity: the base at several temperatures as a labelled path, every method as points."""
    with _canvas((NARROW[0], 4.1)) as (axes, svg):
        if ladder:
            xs, ys = [p.x for p in ladder], [p.y for p in ladder]
            axes.plot(xs, ys, color=INK, linewidth=1.2, marker=".", markersize=7, label="base, by temperature")
            for p in ladder:
                axes.annotate(p.label, (p.x, p.y), xytext=(4, 5), textcoords="offset points", fontsize=8.5, zorder=9)
        for number, (name, points) in enumerate(methods):
            colour, marker, _ = style(name, number)
            _markers(axes, points, marker, color=colour, markersize=6, label=name)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        _legend(axes, columns=2)
    return svg()


def heat(
    grid: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    chosen: tuple[int, int] | None,
    top: float,
) -> str:
    """A joint distribution over pairs: colour by square root of the probability, `top` the darkest; 0 stays blank."""
    values = np.ma.masked_less_equal(np.array(grid, float), 0)
    with _canvas((4.4, 4.3)) as (axes, svg):
        norm = PowerNorm(0.5, vmin=0, vmax=top or 1)
        axes.pcolormesh(values, cmap=HEAT, norm=norm, edgecolor=CARD, linewidth=0.8, snap=True)
        axes.set_aspect("equal")
        axes.invert_yaxis()
        axes.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
        axes.set_yticks(np.arange(len(rows)) + 0.5, rows, fontsize=8)
        axes.tick_params(length=0)
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set(visible=True, color=RULE)
        if chosen is not None:
            row, column = chosen
            frame: dict[str, Any] = {"fill": False, "edgecolor": BLUE, "linewidth": 2.4, "zorder": 5}
            axes.add_patch(matplotlib.patches.Rectangle((column, row), 1, 1, **frame))
            axes.plot(column + 0.5, row + 0.5, marker="x", color=CARD, markersize=7, markeredgewidth=2, zorder=6)
        axes.set_xlabel("second token (head 2)")
        axes.set_ylabel("first token (head 1)")
    return svg()


def style(name: str, number: int = 0) -> tuple[str, str, Any]:
    """Colour, marker and line of a method, or of the `number`-th line that is none."""
    return STYLES.get(name) or list(STYLES.values())[number % len(STYLES)]


def inline(svg: str, name: str) -> str:
    """An SVG for a page: its colours follow the page's, its ids are its own, it scales with its column."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"(?:<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>)\s*", "", svg, flags=re.S)
    for colour, variable in PAGE.items():
        svg = svg.replace(colour, variable)
    return svg.strip()


@contextmanager
def _canvas(size: tuple[float, float]) -> Iterator[tuple[Any, Callable[[], str]]]:
    """Axes of `size` inches in the report's style, and what gives their SVG after the block."""
    drawn: list[str] = []
    settings: Any = {**matplotlib.rcParamsDefault, **RC}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that matplotlib's own font lacks; the reader's has them
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        yield figure.add_subplot(), lambda: drawn[0]
        stream = io.BytesIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        text = re.sub(r"'DejaVu Sans'(?:, [^;\"]*)?", FONTS, stream.getvalue().decode("utf-8"))
        drawn.append("\n".join(line.rstrip() for line in text.rstrip().split("\n")) + "\n")


FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', sans-serif"
RC: dict[str, Any] = {
    "backend": "svg",
    "svg.fonttype": "none",
    "svg.hashsalt": "dynamo-lm",
    "font.family": "DejaVu Sans",  # comes with matplotlib, and is wider than the reader's own: nothing overlaps
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.facecolor": CARD,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": CARD,
    "savefig.facecolor": CARD,
    "legend.frameon": False,
    "lines.markeredgewidth": 0.6,
    "legend.fontsize": 9,
    "lines.solid_capstyle": "round",
}


def _legend(axes: Any, *, columns: int) -> None:
    axes.figure.legend(loc="outside upper left", ncols=columns, handlelength=2.2, columnspacing=1.2)


def _markers(axes: Any, points: Sequence[Point], marker: str, **options: Any) -> None:
    """Points as outlined markers, without a line unless `linestyle` says so."""
    axes.plot([p.x for p in points], [p.y for p in points], **{"linestyle": "none", "marker": marker, **options})
    axes.lines[-1].set_markeredgecolor(CARD)


def _intervals(axes: Any, points: Sequence[Point], colour: str) -> None:
    for p in points:
        if p.low is not None and p.high is not None:
            axes.plot([p.x, p.x], [p.low, p.high], color=colour, linewidth=1, alpha=0.75)


def _flag(axes: Any, x: float, text: str, *, middle: float, at: float, **options: Any) -> None:
    """A dotted vertical line named at the height `at` (0 to 1), on the side of it that has more room."""
    axes.axvline(x, color=INK, linewidth=0.9, linestyle=(0, (2, 2)))
    offset, side = (-4, "right") if x > middle else (4, "left")
    place: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "xytext": (offset, 0), "textcoords": "offset points"}
    axes.annotate(text, (x, at), **place, ha=side, fontweight="bold", **options)
