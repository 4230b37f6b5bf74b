"""The report's sections on perplexity, calibration, benchmarks, training variants and the joint distribution.

In: records as the `eval` commands write them. Out: sections. `completion.py` does the same for generated text.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from dynamo_lm.decoding.joint_heatmap import HeatMap
from dynamo_lm.report import figures
from dynamo_lm.report.document import DASH, Figure, Gallery, Prose, Section, Source, Table, number, percent, spread

Record = dict[str, Any]
STAGES = (
    ("plain", "Plain product", "heads 1 and 2 as if they were independent"),
    ("masked", "Masked", "times the co-occurrence weight: pairs never seen are gone"),
    ("blurred", "Blurred", "smoothed over neighbouring ranks: what Otsu's threshold judges"),
    ("thresholded", "Thresholded", "the masked entries that Otsu's threshold lets stand"),
)
CRITERIA = {
    "ppl": "PPL_d ratio to one token per step",
    "regret": "regret, nats per token",
    "win-rate": "win rate against the base",
}


def perplexity(record: Record) -> Section:
    """The paper's Table 2 and Fig. 15."""
    blocks: list[Any] = []
    heads, joints = record.get("heads") or [], record.get("joint") or []
    rows = [[f"PPL_{h['head']}", spread(h["ppl"], h.get("se")), DASH, f"{h['tokens']:,}"] for h in heads]
    for joint in joints:
        if joint["heads"] == 1:  # PPL_1 again
            continue
        masked = spread(joint.get("masked_ppl"), joint.get("masked_se"))
        rows.append([f"PPL_1:{joint['heads']}", spread(joint["ppl"], joint.get("se")), masked, ""])
    base = record.get("base") or {}
    if base.get("ppl") is not None:
        rows.append(["PPL_1 of the base model", number(base["ppl"]), DASH, ""])
    if rows:
        note = "± one standard error by document. PPL_i: head i's perplexity i tokens ahead; PPL_1:m: of m tokens jointly."
        blocks.append(
            Table("Multi-token perplexity", ["", "product of heads", "with co-occurrence mask", "tokens"], rows, note)
        )
    dynamic = record.get("dynamic") or []
    if dynamic:
        blocks += _dynamic(dynamic, record["ceiling"])
    text = record["text"]
    facts = [
        ("seed", str(record["seed"])),
        ("text", f"{', '.join(text['sources'])}: {text['documents']:,} documents, {text['tokens']:,} tokens"),
        ("window, stride", f"{record['window']:,}, {record['stride']:,} tokens"),
        ("baseline", "one token per step (PPL_d at eps_b 1 is PPL_1)"),
        ("ceiling", f"{record['ceiling']} tokens per step"),
    ]
    return Section("perplexity", "Perplexity", blocks, Source(record["command"], facts))


def _dynamic(dynamic: list[Record], ceiling: int) -> list[Any]:
    lines: list[Any] = []
    speeds: list[Any] = []
    panels: list[Figure] = []
    for masked, name in ((True, "scored with the mask"), (False, "scored by the product")):  # of the same steps
        rows = sorted((row for row in dynamic if bool(row.get("masked", True)) == masked), key=lambda row: row["eps_b"])
        if not rows:
            continue
        error = [1.96 * (row.get("se") or 0) for row in rows]
        points = [
            figures.Point(row["eps_b"], row["ppl"], row["ppl"] - e, row["ppl"] + e)
            for row, e in zip(rows, error, strict=True)
        ]
        lines.append((name, points))
        if speeds:
            continue
        speeds.append(("", [figures.Point(row["eps_b"], row["tokens_per_step"]) for row in rows]))
        with_shares = [row for row in rows if row.get("shares")]
        if with_shares:
            svg = partial(
                figures.shares, [f"{row['eps_b']:g}" for row in with_shares], [row["shares"] for row in with_shares]
            )
            label = f"Share of steps of 1 to {ceiling} tokens on held-out text, for every eps_b."
            panels.append(Figure("walk-shares", "Steps on held-out text", label, svg))
    ends = f"from {lines[0][1][0].y:.1f} at eps_b {lines[0][1][0].x:g} to {lines[0][1][-1].y:.1f} at {lines[0][1][-1].x:g}"
    pictures = [
        Figure(
            "dynamic-ppl",
            "Dynamic perplexity",
            f"PPL_d over eps_b, {ends}.",
            partial(figures.curves, lines, x_label="eps_b", y_label="PPL_d (lower is better)", log=True),
        ),
        Figure(
            "dynamic-speed",
            "Speed-up",
            f"Tokens per step over eps_b, at most {ceiling}.",
            partial(
                figures.curves, speeds, x_label="eps_b", y_label="tokens per step", level=(ceiling, f"ceiling {ceiling}")
            ),
        ),
    ]
    columns = [
        "eps_b",
        "scored with the mask",
        "PPL_d",
        "tokens per step",
        *(f"{size}-token steps" for size in range(1, ceiling + 1)),
    ]
    cells = []
    for row in sorted(dynamic, key=lambda row: (not row.get("masked", True), row["eps_b"])):
        share = [percent(part) for part in row.get("shares") or [None] * ceiling]
        mask = "with the mask" if row.get("masked", True) else "by the product"
        cells.append([f"{row['eps_b']:g}", mask, spread(row["ppl"], row.get("se")), number(row["tokens_per_step"]), *share])
    caption = (
        "Dynamic perplexity and tokens per step as the dial turns from fastest (0) to one token at a time (1): the text is "
        "walked with the generator's own decisions, and the true tokens of each step are scored by the product of heads or "
        "with the co-occurrence mask. Bars: 95 % intervals."
    )
    made: list[Any] = [Gallery(pictures, caption, Table("Dynamic perplexity", columns, cells, folded=True))]
    if panels:
        made.append(Gallery(panels, "Share of the steps of that walk that covered one token, two, and so on."))
    return made


def calibration(record: Record) -> Section:
    """The curve that `calibrate` chose from, and its choice."""
    criterion, curve = record["criterion"], sorted(record["curve"], key=lambda row: row["eps_b"])
    what = CRITERIA.get(criterion["name"], criterion["name"])
    chosen = record.get("chosen") or {}
    dial = chosen.get("eps_b")
    said = (
        f"By the criterion {criterion['name']} ({what}; limit {criterion['limit']:g}) the choice is eps_b {dial:g}, which "
        f"gives {chosen['tokens_per_step']:.2f} tokens per step."
        if dial is not None
        else f"No eps_b passes the criterion {criterion['name']} (limit {criterion['limit']:g})."
    )
    points = [figures.Point(row["eps_b"], row["value"], row.get("low"), row.get("high")) for row in curve]
    picture = Figure(
        "calibration",
        f"Criterion: {criterion['name']}",
        said,
        partial(
            figures.curves,
            [(criterion["name"], points)],
            x_label="eps_b",
            y_label=what,
            level=(criterion["limit"], f"limit {criterion['limit']:g}"),
            chosen=dial,
        ),
    )
    rows = []
    for row in curve:
        bounds = [row.get("low"), row.get("high")]
        between = DASH if None in bounds else f"{bounds[0]:.3f} to {bounds[1]:.3f}"
        passes = ("yes" if row["passes"] else "no") + (", chosen" if row["eps_b"] == dial else "")
        rows.append([f"{row['eps_b']:g}", number(row["tokens_per_step"]), number(row["value"], 3), between, passes])
    table = Table(
        "The calibration curve", ["eps_b", "tokens per step", "value", "95 % interval", "passes"], rows, folded=len(rows) > 6
    )
    facts = [("seed", str(record["seed"])), ("criterion", f"{criterion['name']}, limit {criterion['limit']:g}")]
    return Section(
        "calibration",
        "The calibrated dial",
        [Prose(said), Gallery([picture], f"{what[0].upper()}{what[1:]} over the dial.", table)],
        Source(record["command"], facts),
    )


def nlu(record: Record) -> Section:
    """Benchmarks, base beside DynaMo."""
    rows = []
    for task, entry in record.get("tasks", {}).items():
        for metric, mine in entry["dynamo"].items():
            base = (entry.get("base") or {}).get(metric) or {"value": None, "stderr": None}  # none: trained with its heads
            change = DASH if mine["value"] is None or base["value"] is None else f"{mine['value'] - base['value']:+.3f}"
            values = [spread(value["value"], value.get("stderr"), 3) for value in (base, mine)]
            rows.append([task, metric, *values, change, f"{entry['samples']:,}" if entry.get("samples") else DASH])
    blocks: list[Any] = []
    if rows:
        note = "± the harness's standard errors. DynaMo answers with head 1."
        columns = ["task", "metric", "base", "DynaMo", "change", "samples"]
        blocks.append(Table("Natural-language understanding", columns, rows, note))
    rows = [
        [
            task,
            run["arm"],
            spread(run["accuracy"], run.get("stderr"), 3),
            number(run.get("tokens_per_step")),
            DASH if run.get("speed_up") is None else f"{run['speed_up']:.2f}x",
            number(run.get("ceiling"), 0),
        ]
        for task, runs in (record.get("generation") or {}).items()
        for run in runs
    ]
    if rows:
        columns = ["task", "arm", "accuracy", "tokens per step", "wall clock", "ceiling"]
        numbers = Table("Answers that are written out", columns, rows, "Against one token per step in the same loop.")
        lines = [(task, _accuracies(runs)) for task, runs in record["generation"].items()]
        svg = partial(figures.curves, lines, x_label="speed-up (wall clock)", y_label="accuracy")
        picture = Figure(
            "accuracy", "Accuracy against speed-up", "Accuracy of every task over the speed-up of its arms.", svg
        )
        blocks.append(Gallery([picture], "Answers that are written out. Bars: 95 % intervals.", numbers))
    return Section("nlu", "Benchmarks", blocks, Source(record["command"], [("seed", str(record["seed"]))]))


def _accuracies(runs: list[Record]) -> list[figures.Point]:
    """One task's arms by rising speed-up; the one-token arm is its own baseline."""
    points = []
    for run in sorted(runs, key=lambda run: run.get("speed_up") or 1.0):
        error = 1.96 * (run.get("stderr") or 0)
        value = run["accuracy"]
        points.append(figures.Point(run.get("speed_up") or 1.0, value, max(0.0, value - error), min(1.0, value + error)))
    return points


def ablation(record: Record) -> Section:
    """The paper's Table 10: variants of heads, trained alike."""
    variants = record["rows"]
    heads = max((len(row["heads"]) for row in variants), default=0)
    columns = ["variant", "extra", *(f"PPL_{i}" for i in range(1, heads + 1)), *(f"PPL_1:{m}" for m in range(2, heads + 1))]
    columns += ["strict tokens/step", "trunk", "tokens", "minutes"]
    rows = []
    for row in variants:
        values = [spread(h["ppl"], h.get("se")) for h in row["heads"]] + [DASH] * (heads - len(row["heads"]))
        joint = {j["heads"]: spread(j["ppl"], j.get("se")) for j in row.get("joint") or []}
        rows.append(
            [
                row["variant"],
                f"{row['overhead']:.1%}",
                *values,
                *[joint.get(m, DASH) for m in range(2, heads + 1)],
                number(row.get("strict_tokens_per_step")),
                "frozen" if row.get("frozen") else "trained",
                f"{row['tokens']:,}",
                number(row["seconds"] / 60, 1) if row.get("seconds") is not None else DASH,
            ]
        )
    data = record.get("data") or {}
    facts = [("seed", str(record["seed"]))]
    facts += [(key.replace("_", " "), _plain(value)) for key, value in data.items()]
    note = "All variants on the same data with the same seed; ± one standard error by held-out block."
    table = Table("Training variants", columns, rows, note)
    return Section("ablation", "Training ablations", [table], Source(record["command"], facts))


def joint(found: HeatMap, record: Record) -> Section:
    """The paper's Fig. 11."""
    shown = len(found.rows)
    rows, columns = [visible(text) for text in found.rows], [visible(text) for text in found.columns]
    inside = (found.chosen[0], found.chosen[1]) if max(found.chosen) < shown and any(map(any, found.masked)) else None
    pair = " ".join(visible(text) for text in found.chosen_text)
    pictures = []
    for stage, title, meaning in STAGES:
        grid = getattr(found, stage)
        top = max(map(max, grid))
        label = f"{title}: {meaning}. Largest entry {top:.3g}; {sum(value > 0 for line in grid for value in line)} above 0."
        svg = partial(figures.heat, grid, rows, columns, chosen=inside, top=top)
        pictures.append(Figure(f"joint-{stage}", f"{title}: {meaning}", label, svg))
    cells = sorted(((i, j) for i in range(shown) for j in range(shown)), key=lambda c: (-found.masked[c[0]][c[1]], c))[:8]
    numbers = Table(
        "The largest entries of the masked joint",
        ["pair", *(title.lower() for _, title, _ in STAGES)],
        [[f"{rows[i]} {columns[j]}", *(f"{getattr(found, stage)[i][j]:.4f}" for stage, _, _ in STAGES)] for i, j in cells],
        folded=True,
    )
    emits = "two tokens would be emitted" if found.emits else "the step would back off to one token"
    caption = (
        f"The next two tokens after “{found.prompt}”: the {shown} likeliest candidates of each head (of {found.top_k}; the "
        f"picture holds {found.shown_mass:.0%} of the masked joint). Colour: square root of the probability, blank is 0, "
        f"each picture on its own scale. The cross marks the likeliest pair, {pair}. {found.survivors} of "
        f"{found.top_k**2:,} pairs stand after Otsu's threshold; at eps_b {found.eps_b:g} {emits}."
    )
    if not found.masked_by_table:
        caption += " This model has no co-occurrence tables, so masked and plain are the same."
    facts = [("prompt", found.prompt), ("eps_b", f"{found.eps_b:g}"), ("top-k", str(found.top_k))]
    return Section(
        "joint", "The joint distribution", [Gallery(pictures, caption, numbers)], Source(record["command"], facts)
    )


def visible(text: str, limit: int = 12) -> str:
    """A token with its spaces and line ends shown, cut to `limit` characters."""
    shown = text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥").replace("\r", "⏎")
    shown = "".join(c if c.isprintable() else "�" for c in shown)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(part)}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
