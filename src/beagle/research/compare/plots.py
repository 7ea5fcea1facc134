"""Plots of trainings: acceptance and memory, and the trained heads at work (paper Figures 3, 4, 5, 10, 11)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from beagle.evaluation.report import style
from beagle.evaluation.report.style import DASHED, INK, new_figure
from beagle.research.compare.report import iteration
from beagle.research.compare.results import OFTEN, Entry, growth

# blue, green and grey for Beagle's heads, reds for EAGLE's; light to dark where one parameter changes
PALETTES = {
    "beagle": ("#0072b2", "#56b4e9", "#009e73", "#444444"),
    "eagle": ("#d55e00", "#e69f00", "#cc79a7"),
    "eagle3": ("#7a5195", "#b48ad0"),
}
RAMPS = {"beagle": ("#74b3d8", "#08306b"), "eagle": ("#f4a261", "#7f2704"), "eagle3": ("#c9a6dc", "#3f1d5c")}
Entries = Mapping[str, Entry]
Points = tuple[list[float], list[float]]


def draw(entries: Entries, about: str, folder: Path, *, ordered: bool = False, costs_only: bool = False) -> list[str]:
    """Every plot that the comparison has data for, as PNG and SVG.

    Args:
        entries: by name of the variant.
        about: what was run.
        folder: is there.
        ordered: the variants are values of one parameter.
        costs_only: acceptance says nothing, as in very short trainings.
    Returns:
        The names of the PNG files.
    """
    colour = colours(entries, ordered)
    figures = {"memory": memory(entries)}
    if not costs_only:
        figures |= {"step_alpha": step_alpha(entries, colour), "curves": curves(entries, colour)}
        figures["courses"] = courses(entries, colour)
    if next(iter(entries.values())).decoding:
        figures |= {"speed": speed(entries, colour), "times": times(entries)}
    names = []
    for name, found in figures.items():
        if found is not None:
            figure, title, notes = found
            style.add_heading(figure, title, f"{about}\n{notes}")
            style.save(figure, folder / f"{name}.png", folder / f"{name}.svg")
            names.append(f"{name}.png")
    return names


def colours(entries: Entries, ordered: bool) -> dict[str, str]:
    """One for each variant, by its architecture: a ramp for values of one parameter or where there are many."""
    from matplotlib import colors

    out: dict[str, str] = {}
    for architecture, palette in PALETTES.items():
        names = [name for name in entries if name.split("-")[0] == architecture]
        if ordered or len(names) > len(palette):
            ramp = colors.LinearSegmentedColormap.from_list(architecture, RAMPS[architecture])
            steps = [i / max(1, len(names) - 1) for i in range(len(names))]
            out |= {name: colors.to_hex(ramp(x)) for name, x in zip(names, steps, strict=True)}
        else:
            out |= dict(zip(sorted(names, key=len), palette, strict=False))  # the plainest name, the strongest colour
    return {name: out.get(name, INK) for name in entries}  # a log may have any name


def memory(entries: Entries) -> tuple[Any, str, str] | None:
    """Peak memory of the late stage against simulated steps, a line an architecture; None: too few points."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for entry in entries.values():
        if (peak := entry.stage("late", "memory_mb")) is not None:
            record = entry.records[0]
            lines.setdefault(record["architecture"], []).append((record["steps"], peak))
    # several variants of as many steps (other losses) are no function of the steps
    lines = {k: sorted(v) for k, v in lines.items() if len(v) > 1 and len({s for s, _ in v}) == len(v)}
    if not lines:
        return None
    figure, (axis,) = new_figure(size=(8.5, 4.6))
    for name, points in lines.items():
        (first, low), (last, high) = points[0], points[-1]
        label = f"{name}: {growth((low, high)):.2f}× from s = {first} to {last}"
        axis.plot(*zip(*points, strict=True), color=PALETTES[name][0], linewidth=2, marker="o", label=label)
    axis.set_ylim(0, 1.12 * max(y for points in lines.values() for _, y in points) or 1.0)
    axis.set_xticks(sorted({x for points in lines.values() for x, _ in points}))
    axis.set_xlabel("simulated steps s")
    axis.set_title("peak MB above the process before training")
    axis.grid(axis="y")
    style.add_legend(axis)
    return figure, "Training memory against simulated steps", ""


def step_alpha(entries: Entries, colour: Mapping[str, str]) -> tuple[Any, str, str]:
    """α by position of the draft; bars are the range over seeds."""
    figure, (axis,) = new_figure(size=(8.5, 4.6))
    for name, entry in entries.items():
        mean = entry.step_alpha[: entry.depth]
        columns = list(zip(*(r["step_alpha"] for r in entry.records), strict=True))[: entry.depth]
        below = [m - min(c) for m, c in zip(mean, columns, strict=True)]
        above = [max(c) - m for m, c in zip(mean, columns, strict=True)]
        axis.errorbar(
            range(1, entry.depth + 1), mean, [below, above] if len(entry.records) > 1 else None, color=colour[name],
            linewidth=2, marker="o", elinewidth=1.2, capsize=2.5, label=name,
        )  # fmt: skip
    axis.set_ylim(0, min(1.0, 1.12 * max(max(e.step_alpha[: e.depth]) for e in entries.values())) or 1.0)
    axis.set_xticks(range(1, max(e.depth for e in entries.values()) + 1))
    axis.set_xlabel("position of the drafted token")
    axis.set_title("step-α: accepted, given that the ones before it were")
    axis.grid(axis="y")
    style.add_legend(axis)
    return figure, "Acceptance by position", f"positions with {OFTEN} drafts at least"


def curves(entries: Entries, colour: Mapping[str, str]) -> tuple[Any, str, str]:
    """α_1 and the expected acceptance length against tokens and seconds; thin lines are single seeds."""
    figure, axes = new_figure(2, 2, size=(11.5, 7.6))
    values: list[tuple[str, Callable[[dict[str, Any]], float]]] = [
        ("step-α of the first drafted token, α₁", lambda p: p["step_alpha"][0]),
        ("expected acceptance length, 1 + Σ Π α", lambda p: p["expected_length"]),
    ]
    spent = [("tokens", 1e6, "million tokens seen"), ("seconds", 60, "minutes of training")]
    panels = [(*value, *unit) for value in values for unit in spent]
    changes = False
    for axis, (title, value, key, unit, label) in zip(axes, panels, strict=True):
        for name, entry in entries.items():
            runs = [([p[key] / unit for p in r["curve"]], [value(p) for p in r["curve"]]) for r in entry.records]
            changes |= _line(axis, entry, runs, colour[name], name)
        axis.set_xlim(0, None)
        axis.set_title(title)
        axis.set_xlabel(label)
        axis.grid(axis="y")
    style.add_legend(axes[1])
    notes = ["thin: single seeds"] * any(len(e.records) > 1 for e in entries.values())
    notes += ["diamond: first validation of the late stage"] * changes
    return figure, "Acceptance against tokens seen and time spent", "; ".join(notes)


def courses(entries: Entries, colour: Mapping[str, str]) -> tuple[Any, str, str] | None:
    """Each step-α against tokens seen, a panel a step; None: validated but once."""
    if max(len(r["curve"]) for e in entries.values() for r in e.records) < 2:
        return None
    deepest = min(e.depth for e in entries.values())
    figure, axes = new_figure(deepest, size=(max(8.5, 2.8 + 2.24 * deepest), 4.2), share_y=True)
    for step, axis in enumerate(axes):
        for name, entry in entries.items():
            runs = [
                ([p["tokens"] / 1e6 for p in r["curve"]], [p["step_alpha"][step] for p in r["curve"]])
                for r in entry.records
            ]
            axis.plot(*_mean(runs), color=colour[name], linewidth=2, marker="o", markersize=4, label=name)
        axis.set_xlim(0, None)
        axis.set_title(f"α{'₁₂₃₄₅'[step]}")
        axis.set_xlabel("million tokens")
        axis.grid(axis="y")
    axes[0].set_ylim(0, None)  # of all panels, which share it
    style.add_legend(axes[-1])
    notes = f"positions with {OFTEN} drafts at least at the end"
    return figure, "Step-α on held-out answers, in the course of training", notes


def _mean(runs: list[Points]) -> Points:
    """Of several seeds, as far as all of them come."""
    count = min(len(xs) for xs, _ in runs)
    xs, ys = ([fmean(run[part][i] for run in runs) for i in range(count)] for part in (0, 1))
    return xs, ys


def _line(axis: Any, entry: Entry, runs: list[Points], colour: str, name: str) -> bool:
    """The mean of all seeds and each of them; whether a late stage begins on the way, which gets a diamond."""
    if len(runs) > 1:
        for xs, ys in runs:
            axis.plot(xs, ys, color=colour, linewidth=0.8, alpha=0.4)
    xs, ys = _mean(runs)
    axis.plot(xs, ys, color=colour, linewidth=2, marker="o", markersize=4, label=name)
    stages = [p["stage"] for p in entry.records[0]["curve"]][: len(xs)]
    if "early" not in stages or "late" not in stages:
        return False
    i = stages.index("late")
    axis.plot(xs[i], ys[i], marker="D", markersize=8, color="white", markeredgecolor=colour, markeredgewidth=1.8)
    return True


def speed(entries: Entries, colour: Mapping[str, str]) -> tuple[Any, str, str]:
    """τ and speed over plain decoding, a bar a variant and tree; lines are the range over seeds."""
    rows = _decoded(entries)
    figure, axes = new_figure(2, size=(10, 1.75 + 0.4 * len(rows)), share_y=True)
    panels = (("tau", "τ, tokens a pass"), ("speedup", "speed over plain decoding"))
    for axis, (key, title) in zip(axes, panels, strict=True):
        for y, (entry, figures) in enumerate(rows.values()):
            values = [f[key] for f in figures]
            axis.barh(y, fmean(values), 0.62, color=colour[entry.name])
            if len(values) > 1:
                style.spread_line(axis, y, min(values), max(values))
            style.note(axis, max(values), y, f"{fmean(values):.2f}")
        axis.axvline(1, color=INK, linewidth=0.9, linestyle=DASHED)
        axis.set_xlim(0, 1.18 * max(axis.get_xlim()[1], 1.0))
        axis.set_title(title)
        style.label_rows(axis, list(rows))
        axis.label_outer()
    return figure, "Acceptance and speed", "dashed: plain decoding in the same run"


def times(entries: Entries) -> tuple[Any, str, str]:
    """Milliseconds of an iteration by part, a stacked bar a variant and tree."""
    bars = {name: iteration(figures) for name, (_, figures) in _decoded(entries).items()}
    figure, (axis,) = new_figure(size=(10, 1.95 + 0.4 * len(bars)))
    style.stacked_bars(axis, bars, {name: f"{sum(parts.values()):.1f} ms" for name, parts in bars.items()})
    return figure, "Where an iteration's time goes", ""


def _decoded(entries: Entries) -> dict[str, tuple[Entry, list[dict[str, Any]]]]:
    """A variant's figures, by its name, and by that of the tree where there are several."""
    return {
        f"{name}, {tree}" if len(entry.decoding) > 1 else name: (entry, figures)
        for name, entry in entries.items()
        for tree, figures in entry.decoding.items()
    }
