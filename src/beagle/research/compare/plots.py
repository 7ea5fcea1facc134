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
from matplotlib.ticker import MaxNLocator

from beagle.research.compare.results import OFTEN, Entry, growth

# Okabe and Ito's palette without its yellow, told apart with every common colour blindness: blue, green
# and grey for ours, reds for the rival's
PALETTES = {"beagle": ("#0072B2", "#56B4E9", "#009E73", "#444444"), "eagle": ("#D55E00", "#E69F00", "#CC79A7")}
RAMPS = {"beagle": ("#74b3d8", "#08306b"), "eagle": ("#f4a261", "#7f2704")}  # light to dark
INK = "#222222"
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
    """One for each variant, by kind of head: a ramp for values of one parameter or where there are many."""
    out: dict[str, str] = {}
    for kind, palette in PALETTES.items():
        names = [name for name in entries if name.split("-")[0] == kind]
        if ordered or len(names) > len(palette):
            ramp = matplotlib.colors.LinearSegmentedColormap.from_list(kind, RAMPS[kind])
            steps = [i / max(1, len(names) - 1) for i in range(len(names))]
            out |= {name: matplotlib.colors.to_hex(ramp(x)) for name, x in zip(names, steps, strict=True)}
        else:
            out |= dict(zip(sorted(names, key=len), palette, strict=False))  # the plainest name, the strongest colour
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
            arrowprops={"arrowstyle": "-", "color": colour[name], "lw": 0.6, "alpha": 0.5, "shrinkA": 2, "shrinkB": 3, "relpos": (0, 0.5)},
        )  # fmt: skip


def heading(figure: Figure, title: str, about: str) -> None:
    """Title and what was run (lines), left-aligned, at fixed distances from the top whatever the figure's height."""
    height = figure.get_size_inches()[1]
    figure.text(0.02, 1 - 0.14 / height, title, fontsize=14, fontweight="bold", va="top")
    figure.text(0.02, 1 - 0.45 / height, about, fontsize=9.5, color="#666666", va="top", linespacing=1.4)


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
    axes = figure.add_axes((0.1, 0.12, 0.66, 0.635))
    colour = {kind: palette[0] for kind, palette in PALETTES.items()}
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), color=colour[name], lw=2.2, marker="o", ms=6)
    axes.set_ylim(0, 1.12 * max(y for points in lines.values() for _, y in points) or 1.0)
    axes.set_xticks(sorted({x for points in lines.values() for x, _ in points}))
    axes.set_xlabel("simulated steps s")
    axes.set_title("peak MB above the process before training", loc="left", fontsize=10.5, color="#555555")

    def grown(name: str) -> str:
        (first, low), (last, high) = lines[name][0], lines[name][-1]
        label = {"beagle": "Beagle", "eagle": "EAGLE, unrolled"}[name]
        return f"{label}\n{growth((low, high)):.2f}× from s = {first} to {last}"

    label_ends(axes, {name: points[-1] for name, points in lines.items()}, colour, grown)
    heading(figure, "Training memory against simulated steps", about)
    return save(figure, folder, "memory")


def step_alpha(entries: dict[str, Entry], about: str, folder: Path, ordered: bool = False) -> str:
    """α by position of the draft; bars are the range over seeds."""
    figure = Figure(figsize=(8, 5))
    axes = figure.add_axes((0.09, 0.12, 0.66, 0.635))
    colour = colours(entries, ordered)
    for name, entry in entries.items():
        columns = list(zip(*(r["step_alpha"] for r in entry.records), strict=True))[: entry.depth]
        mean = entry.step_alpha[: entry.depth]
        reach = [
            [m - min(c) for m, c in zip(mean, columns, strict=True)],
            [max(c) - m for m, c in zip(mean, columns, strict=True)],
        ]
        axes.errorbar(
            range(1, entry.depth + 1), mean, reach if len(entry.records) > 1 else None, color=colour[name], lw=2,
            marker="o", ms=5.5, elinewidth=1.2, capsize=2.5,
        )  # fmt: skip
    axes.set_ylim(0, min(1.0, 1.12 * max(max(e.step_alpha[: e.depth]) for e in entries.values())) or 1.0)
    axes.set_xticks(range(1, max(e.depth for e in entries.values()) + 1))
    axes.set_xlabel("position of the drafted token")
    axes.set_title("step-α: accepted, given that the ones before it were", loc="left", fontsize=10.5, color="#555555")
    label_ends(axes, {name: (e.depth, e.step_alpha[e.depth - 1]) for name, e in entries.items()}, colour)
    heading(figure, "Acceptance by position", f"{about}\npositions with {OFTEN} drafts at least")
    return save(figure, folder, "step_alpha")


def curves(entries: dict[str, Entry], about: str, folder: Path, ordered: bool = False) -> str:
    """α_1 and the expected acceptance length against tokens and seconds; thin lines are single seeds."""
    figure = Figure(figsize=(12, 8.6))
    colour = colours(entries, ordered)
    panels: list[tuple[str, Callable[[dict[str, Any]], float]]] = [
        ("step-α of the first drafted token, α₁", lambda p: p["step_alpha"][0]),
        ("expected acceptance length, 1 + Σ Π α", lambda p: p["expected_length"]),
    ]
    changes = False
    axis_names = [("tokens", 1e6, "million tokens seen"), ("seconds", 60, "minutes of training")]
    for row, (title, value) in enumerate(panels):
        for column, (axis, unit, label) in enumerate(axis_names):
            axes = figure.add_axes((0.06 + 0.4 * column, 0.515 - 0.455 * row, 0.355, 0.325))
            ends = {}
            for name, entry in entries.items():
                runs = [([p[axis] / unit for p in r["curve"]], [value(p) for p in r["curve"]]) for r in entry.records]
                if len(runs) > 1:
                    for xs, ys in runs:
                        axes.plot(xs, ys, color=colour[name], lw=0.8, alpha=0.4)
                count = min(len(xs) for xs, _ in runs)
                mean = [[fmean(r[part][i] for r in runs) for i in range(count)] for part in (0, 1)]
                axes.plot(*mean, color=colour[name], lw=2, marker="o", ms=4)
                changes |= mark_change(axes, entry, mean, colour[name])
                ends[name] = (mean[0][-1], mean[1][-1])
            axes.set_xlim(0, None)
            axes.xaxis.set_major_locator(MaxNLocator(6))
            axes.set_title(title, loc="left", fontsize=10.5, color="#555555")
            axes.set_xlabel(label)
            if column == 1:
                label_ends(axes, ends, colour)
    notes = ["thin: single seeds"] * any(len(e.records) > 1 for e in entries.values())
    notes += ["diamond: first validation of the late stage"] * changes
    heading(figure, "Acceptance against tokens seen and time spent", "\n".join([about, "; ".join(notes)]))
    return save(figure, folder, "curves")


def courses(entries: dict[str, Entry], about: str, folder: Path, ordered: bool = False) -> str | None:
    """Each step-α against tokens seen, a panel a step (paper Figures 3 and 5); None: validated but once."""
    if max(len(r["curve"]) for e in entries.values() for r in e.records) < 2:
        return None
    colour = colours(entries, ordered)
    points = [p for e in entries.values() for r in e.records for p in r["curve"]]
    deepest = min(e.depth for e in entries.values())
    width = max(8.5, 2.8 + 2.24 * deepest)  # inches
    figure = Figure(figsize=(width, 4.6))
    top = max(max(p["step_alpha"][:deepest]) for p in points)
    unit, word = (1e6, "million") if max(p["tokens"] for p in points) >= 1e6 else (1e3, "thousand")
    for step in range(deepest):
        axes = figure.add_axes(((0.63 + 2.24 * step) / width, 0.14, 1.89 / width, 0.54))
        ends = {}
        for name, entry in entries.items():
            count = min(len(r["curve"]) for r in entry.records)
            seen = [fmean(r["curve"][i]["tokens"] / unit for r in entry.records) for i in range(count)]
            alpha = [fmean(r["curve"][i]["step_alpha"][step] for r in entry.records) for i in range(count)]
            axes.plot(seen, alpha, color=colour[name], lw=2, marker="o", ms=4)
            ends[name] = (seen[-1], alpha[-1])
        axes.set_ylim(0, 1.08 * top or 1.0)
        axes.set_xlim(0, None)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_title(f"α{'₁₂₃₄₅'[step]}", loc="left", fontsize=10.5, color="#555555")
        axes.set_xlabel(f"{word} tokens")
        if step:
            axes.set_yticklabels([])
        if step == deepest - 1:
            label_ends(axes, ends, colour)
    told = f"{about}\npositions with {OFTEN} drafts at least at the end"
    heading(figure, "Step-α on held-out answers, in the course of training", told)
    return save(figure, folder, "courses")


def mark_change(axes: Axes, entry: Entry, mean: list[list[float]], colour: str) -> bool:
    """A diamond on the first point of the late stage, where an early one went before; whether there is one."""
    stages = [p["stage"] for p in entry.records[0]["curve"]][: len(mean[0])]
    if "early" not in stages or "late" not in stages:
        return False
    i = stages.index("late")
    axes.plot(mean[0][i], mean[1][i], marker="D", ms=8, mfc="white", mec=colour, mew=1.8, ls="none", zorder=5)
    return True


def draw(
    entries: dict[str, Entry], about: str, folder: Path, *, ordered: bool = False, costs_only: bool = False
) -> list[str]:
    """All plots that this comparison has data for; the names of the PNG files."""
    with matplotlib.rc_context(STYLE):
        names = [memory(entries, about, folder)]
        if not costs_only:
            names += [step_alpha(entries, about, folder, ordered), curves(entries, about, folder, ordered)]
            names += [courses(entries, about, folder, ordered)]
    return [name for name in names if name]
