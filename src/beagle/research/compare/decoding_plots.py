"""Plots of trained heads at work: τ and speed, and where an iteration's time goes (paper Figures 4, 10, 11)."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from beagle.research.compare.plots import INK, STYLE, colours, heading, save
from beagle.research.compare.report import iteration
from beagle.research.compare.results import Entry

PARTS = {"draft": "#E69F00", "verify": "#0072B2", "other": "#888888"}


def draw(entries: dict[str, Entry], about: str, folder: Path, ordered: bool = False) -> list[str]:
    """Both plots, if something was decoded; the names of the PNG files."""
    if not next(iter(entries.values())).decoding:
        return []
    with matplotlib.rc_context({**STYLE, "axes.grid.axis": "x"}):
        return [speed(entries, about, folder, ordered), times(entries, about, folder)]


def speed(entries: dict[str, Entry], about: str, folder: Path, ordered: bool = False) -> str:
    """τ and speed over plain decoding, a bar a variant and tree; lines are the range over seeds."""
    rows = rows_of(entries)
    figure, panels = _figure(rows)
    colour = colours(entries, ordered)
    for axes, figure_name, title in zip(
        panels, ("tau", "speedup"), ("τ, tokens a pass", "speed over plain decoding"), strict=True
    ):
        widest = max(max(f[figure_name] for f in figures) for _, figures in rows.values())
        for y, (entry, figures) in enumerate(rows.values()):
            values = [f[figure_name] for f in figures]
            axes.barh(y, fmean(values), 0.62, color=colour[entry.name])
            if len(values) > 1:
                axes.plot([min(values), max(values)], [y, y], color=INK, lw=1.4)
            axes.annotate(
                f"{fmean(values):.2f}", (max(values), y), (5, 0), textcoords="offset points", va="center", fontsize=9.5
            )
        axes.axvline(1, color=INK, lw=0.9, ls=(0, (4, 3)))
        axes.set_xlim(0, 1.18 * max(widest, 1.0))
        axes.set_title(title, loc="left", fontsize=10.5, color="#555555")
    heading(figure, "Acceptance and speed", f"{about}\ndashed: plain decoding in the same run")
    return save(figure, folder, "speed")


def times(entries: dict[str, Entry], about: str, folder: Path) -> str:
    """Milliseconds of an iteration by part, a stacked bar a variant and tree."""
    rows = rows_of(entries)
    figure, panels = _figure(rows, 1)
    axes = panels[0]
    for y, (_, figures) in enumerate(rows.values()):
        left = 0.0
        for part, width in iteration(figures).items():
            axes.barh(y, width, 0.62, left=left, color=PARTS[part])
            if y == 0:
                axes.annotate(
                    part, (left + width / 2, -0.45), ha="center", va="bottom", color=PARTS[part], fontweight="bold"
                )
            left += width
        axes.annotate(
            f"{left:.0f} ms" if left >= 10 else f"{left:.1f} ms",
            (left, y),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9.5,
        )
    axes.set_xlim(0, 1.12 * axes.get_xlim()[1])
    heading(figure, "Where an iteration's time goes, ms", about)
    return save(figure, folder, "times")


def rows_of(entries: dict[str, Entry]) -> dict[str, tuple[Entry, list[dict[str, Any]]]]:
    """A variant's figures, by its name, and by that of the tree where there are several."""
    return {
        f"{name}, {tree}" if len(entry.decoding) > 1 else name: (entry, figures)
        for name, entry in entries.items()
        for tree, figures in entry.decoding.items()
    }


def _figure(rows: dict[str, Any], panels: int = 2) -> tuple[Figure, list[Any]]:
    height = 1.75 + 0.4 * len(rows)
    figure = Figure(figsize=(10, height))
    width = 0.7 / panels
    axes = [
        figure.add_axes((0.26 + i * width, 0.4 / height, width - 0.04, 0.4 * len(rows) / height)) for i in range(panels)
    ]
    for i, axis in enumerate(axes):
        axis.set_ylim(len(rows) - 0.45, -0.55)
        axis.set_yticks(range(len(rows)), list(rows) if i == 0 else [""] * len(rows))
        axis.tick_params(left=False)
    return figure, axes
