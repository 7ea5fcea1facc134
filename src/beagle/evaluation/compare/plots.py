"""Plots of a comparison, each as PNG and SVG. The only module that needs matplotlib (extra ``plots``)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from beagle.evaluation.compare.one import ALPHAS
from beagle.evaluation.compare.results import Entry

# Okabe and Ito's palette without its yellow: told apart with every common colour blindness
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")
OURS, THEIRS = PALETTE[:2]
RAMPS = {"beagle": ("#9ecae1", "#08306b"), "eagle": ("#fdae6b", "#7f2704")}  # light to dark
INK, FAINT = "#222222", "#d9d9d9"
STYLE: Any = {
    "font.size": 11,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#ececec",
    "axes.axisbelow": True,
}


def colours(entries: dict[str, Entry], ordered: bool) -> dict[str, str]:
    """One for each variant: a ramp for values of one parameter or where there are many."""
    if not ordered and len(entries) <= len(PALETTE):
        return dict(zip(entries, PALETTE, strict=False))
    out: dict[str, str] = {}
    for kind, (light, dark) in RAMPS.items():
        ramp = matplotlib.colors.LinearSegmentedColormap.from_list(kind, [light, dark])
        names = [name for name in entries if name.split("-")[0] == kind]
        for i, name in enumerate(names):
            out[name] = matplotlib.colors.to_hex(ramp(i / max(1, len(names) - 1)))
    return out


def apart(wanted: list[float], gap: float) -> list[float]:
    """Heights near the wanted ones, in their order, no two nearer than ``gap``."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    places = [wanted[i] for i in order]
    for _ in range(200):
        for i in range(len(places) - 1):
            if (short := gap - (places[i + 1] - places[i])) > 1e-9:
                places[i] -= short / 2
                places[i + 1] += short / 2
    out = [0.0] * len(wanted)
    for i, place in zip(order, places, strict=True):
        out[i] = place
    return out


def label_ends(
    axes: Axes, ends: dict[str, tuple[float, float]], colour: dict[str, str], text: Callable[[str], str] = str
) -> None:
    """Write each line's name at its end, apart from each other, in its colour."""
    low, high = axes.get_ylim()
    size = 10 if len(ends) <= 10 else 8.5
    height = axes.get_window_extent().height * 72 / axes.figure.dpi  # in points
    gap = (high - low) * size * 1.25 / height
    right = axes.get_xlim()[1]
    places = apart([y for _, y in ends.values()], gap)
    for (name, (x, y)), place in zip(ends.items(), places, strict=True):
        axes.annotate(
            text(name), (x, y), (right + 0.03 * (right - axes.get_xlim()[0]), place), color=colour[name], va="center",
            fontsize=size, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour[name], "lw": 0.6, "alpha": 0.5, "shrinkA": 1, "shrinkB": 3},
        )  # fmt: skip


def heading(figure: Figure, title: str, about: str) -> None:
    """Title and what was run, left-aligned, at fixed distances from the top whatever the figure's height."""
    height = figure.get_size_inches()[1]
    figure.text(0.02, 1 - 0.14 / height, title, fontsize=14, fontweight="bold", va="top")
    figure.text(0.02, 1 - 0.46 / height, about, fontsize=9.5, color="#666666", va="top")


def save(figure: Figure, folder: Path, name: str) -> str:
    for kind in ("png", "svg"):
        figure.savefig(folder / f"{name}.{kind}", dpi=160)
    return f"{name}.png"


def memory(entries: dict[str, Entry], about: str, folder: Path) -> str | None:
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
    figure = Figure(figsize=(8, 5))
    axes = figure.add_axes((0.1, 0.12, 0.66, 0.68))
    colour = {"beagle": OURS, "eagle": THEIRS}
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), color=colour[name], lw=2.2, marker="o", ms=6)
    axes.set_ylim(0, 1.12 * max(y for points in lines.values() for _, y in points))
    axes.set_xticks(sorted({x for points in lines.values() for x, _ in points}))
    axes.set_xlabel("simulated steps s")
    axes.set_title("peak MB above the process before training", loc="left", fontsize=10.5, color="#555555")

    def grown(name: str) -> str:
        (first, low), (last, high) = lines[name][0], lines[name][-1]
        label = {"beagle": "Beagle", "eagle": "EAGLE, unrolled"}[name]
        return f"{label}\n{high / low:.2f}× from s = {first} to {last}"

    label_ends(axes, {name: points[-1] for name, points in lines.items()}, colour, grown)
    heading(figure, "Training memory against simulated steps", about)
    return save(figure, folder, "memory")


def step_alpha(entries: dict[str, Entry], about: str, folder: Path, ordered: bool = False) -> str:
    """α by position of the draft; bars are the range over seeds."""
    figure = Figure(figsize=(8, 5))
    axes = figure.add_axes((0.09, 0.12, 0.66, 0.68))
    colour = colours(entries, ordered)
    for name, entry in entries.items():
        columns = list(zip(*(r["step_alpha"] for r in entry.records), strict=True))
        mean = entry.step_alpha
        reach = [
            [m - min(c) for m, c in zip(mean, columns, strict=True)],
            [max(c) - m for m, c in zip(mean, columns, strict=True)],
        ]
        axes.errorbar(
            range(1, ALPHAS + 1), mean, reach if len(entry.records) > 1 else None, color=colour[name], lw=2,
            marker="o", ms=5.5, elinewidth=1.2, capsize=2.5,
        )  # fmt: skip
    axes.set_ylim(0, min(1.0, 1.12 * max(max(e.step_alpha) for e in entries.values())) or 1.0)
    axes.set_xticks(range(1, ALPHAS + 1))
    axes.set_xlabel("position of the drafted token")
    axes.set_title("step-α: accepted, given that the ones before it were", loc="left", fontsize=10.5, color="#555555")
    label_ends(axes, {name: (ALPHAS, e.step_alpha[-1]) for name, e in entries.items()}, colour)
    heading(figure, "Acceptance by position", about)
    return save(figure, folder, "step_alpha")


def curves(entries: dict[str, Entry], about: str, folder: Path, ordered: bool = False) -> str:
    """α_1 and the expected acceptance length against tokens and seconds; thin lines are single seeds."""
    figure = Figure(figsize=(12, 8))
    colour = colours(entries, ordered)
    panels: list[tuple[str, Callable[[dict[str, Any]], float]]] = [
        ("step-α of the first drafted token, α₁", lambda p: p["step_alpha"][0]),
        ("expected acceptance length, 1 + Σ Π α", lambda p: p["expected_length"]),
    ]
    axis_names = [("tokens", 1e6, "million tokens seen"), ("seconds", 60, "minutes of training")]
    for row, (title, value) in enumerate(panels):
        for column, (axis, unit, label) in enumerate(axis_names):
            axes = figure.add_axes((0.06 + 0.4 * column, 0.52 - 0.445 * row, 0.355, 0.345))
            ends = {}
            for name, entry in entries.items():
                runs = [([p[axis] / unit for p in r["curve"]], [value(p) for p in r["curve"]]) for r in entry.records]
                if len(runs) > 1:
                    for xs, ys in runs:
                        axes.plot(xs, ys, color=colour[name], lw=0.8, alpha=0.4)
                count = min(len(xs) for xs, _ in runs)
                mean = [[fmean(r[part][i] for r in runs) for i in range(count)] for part in (0, 1)]
                axes.plot(*mean, color=colour[name], lw=2, marker="o", ms=4)
                if entry.records[0]["curve"]:
                    mark_change(axes, entry, mean, colour[name])
                ends[name] = (mean[0][-1], mean[1][-1])
            axes.set_xlim(0, None)
            axes.set_title(title, loc="left", fontsize=10.5, color="#555555")
            axes.set_xlabel(label)
            if column == 1:
                label_ends(axes, ends, colour)
    figure.text(0.06, 0.012, "◇ first validation of the late stage", fontsize=9.5, color="#666666")
    heading(figure, "Acceptance against tokens seen and time spent", about)
    return save(figure, folder, "curves")


def mark_change(axes: Axes, entry: Entry, mean: list[list[float]], colour: str) -> None:
    """A diamond on the first point of the late stage, where an early one went before."""
    stages = [p["stage"] for p in entry.records[0]["curve"]][: len(mean[0])]
    if "early" in stages and "late" in stages:
        i = stages.index("late")
        axes.plot(mean[0][i], mean[1][i], marker="D", ms=8, mfc="white", mec=colour, mew=1.8, ls="none", zorder=5)


def draw(entries: dict[str, Entry], about: str, folder: Path, ordered: bool = False) -> list[str]:
    """All plots that this comparison has data for; the names of the PNG files."""
    with matplotlib.rc_context(STYLE):
        names = [
            memory(entries, about, folder),
            step_alpha(entries, about, folder, ordered),
            curves(entries, about, folder, ordered),
        ]
    return [name for name in names if name]
