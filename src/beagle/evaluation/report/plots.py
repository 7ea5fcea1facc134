"""Plots of a side-by-side run."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Any

from beagle.evaluation.figures import resolved
from beagle.evaluation.report.style import COLOURS, FAINT, INK, MARKS, PART_COLOURS, new_figure, save, title
from beagle.evaluation.report.tables import PARTS, heading, over_plain, parts_of, per_pass

OFTEN = 10  # a share of fewer trials is noise


def plots(result: Mapping[str, Any], folder: Path, prefix: str) -> dict[str, str]:
    """Write every plot that the result has figures for; their SVG texts by name."""
    found = {}
    for name, draw in (("speed_up", speed_up), ("step_alpha", step_alpha), ("iteration", iteration)):
        figure = draw(result)
        if figure is not None:
            found[name] = save(figure, folder, f"{prefix}{name}")
    return found


def speed_up(result: Mapping[str, Any]) -> Any:
    """Bars of each mode's speed-up, a panel a set, with spread and the cost model's expectation."""
    parts = parts_of(result)
    modes = [mode for mode in result["modes"] if mode != "plain" and over_plain(result, mode)]
    if not modes:
        return None
    columns = {1: 1, 2: 2, 4: 2}.get(len(parts), 3 if len(parts) <= 6 else 4)
    rows = ceil(len(parts) / columns)
    size = (max(6.5, 3.9 * columns), 1.15 + rows * (0.75 + 0.46 * len(modes)))
    figure, axes = new_figure(columns, rows, size=size, share_y=True)
    ratios = {name: {mode: over_plain(part, mode) for mode in modes} for name, part in parts.items()}
    expectations = {
        (name, mode): part["modes"][mode]["expected_speed_up"]
        for name, part in parts.items()
        for mode in modes
        if "expected_speed_up" in part["modes"].get(mode, {})
    }
    ends = [max(r["high"], r["pooled"]) for few in ratios.values() for r in few.values() if r]
    reach = max([1.0, *ends, *expectations.values()])
    for axis, (name, few) in zip(axes, ratios.items(), strict=False):
        for y, mode in enumerate(modes):
            r = few[mode]
            if not r:
                continue
            sure = resolved(r)
            axis.barh(
                y, r["pooled"], 0.6, color=COLOURS[mode] if sure else "none", edgecolor=COLOURS[mode],
                hatch=None if sure else "////", linewidth=0.8,
            )  # fmt: skip
            axis.plot([r["low"], r["high"]], [y, y], color=INK, linewidth=1.4, solid_capstyle="butt")
            for end in (r["low"], r["high"]):
                axis.plot([end, end], [y - 0.12, y + 0.12], color=INK, linewidth=1.4)
            expected = expectations.get((name, mode))
            if expected:
                axis.plot(expected, y, "D", color="white", markeredgecolor=INK, markersize=5.5, zorder=4)
            text = f"{r['pooled']:.2f}×" if sure else f"not resolved:\n{r['low']:.2f} to {r['high']:.2f}"
            x = max(r["high"], r["pooled"], expected or 0.0)
            axis.annotate(
                text, (x, y), (6, 0), textcoords="offset points", va="center", fontsize=9 if sure else 7.5,
                fontweight="bold" if sure else "normal", color=INK,
            )  # fmt: skip
        axis.axvline(1, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        questions = max(m["questions"] for m in parts[name]["modes"].values())
        axis.set_title(f"{name}, {questions} questions")
        axis.set_yticks(range(len(modes)), modes)
        axis.set_ylim(len(modes) - 0.45, -0.55)
        axis.set_xlim(0, reach * 1.42)
        axis.tick_params(left=False)
    for axis in axes[len(parts) :]:
        axis.set_visible(False)
    for axis in axes[max(0, len(parts) - columns) : len(parts)]:
        axis.set_xlabel("speed over plain decoding (dashed: 1×)", fontsize=9)
    shown = "bar: pooled, line: 10th to 90th percentile of questions, hatched: not resolved"
    if expectations:
        shown += ", ◇ expected by the cost model"
    title(figure, "Speed-up over plain decoding", f"{heading(result)}. {shown.capitalize()}.")
    return figure


def step_alpha(result: Mapping[str, Any]) -> Any:
    """Acceptance by depth, a line a mode, named at its end."""
    lines = {mode: sure for mode, m in result["modes"].items() if mode != "plain" and (sure := well_tried(m))}
    if not lines:
        return None
    figure, (axis,) = new_figure(size=(7.2, 4.6))
    deepest = max(map(len, lines.values()))
    ends = spread_labels({mode: alphas[-1] for mode, alphas in lines.items()}, 0.055)
    for n, (mode, alphas) in enumerate(lines.items()):
        depths = range(1, len(alphas) + 1)
        axis.plot(depths, alphas, color=COLOURS[mode], marker=MARKS[n % len(MARKS)], markersize=6, linewidth=2)
        axis.annotate(
            mode, (len(alphas), alphas[-1]), (deepest + 0.18, ends[mode]), color=COLOURS[mode], fontweight="bold",
            va="center", annotation_clip=False, arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.6, "shrinkB": 6},
        )  # fmt: skip
    axis.set_xlim(0.8, deepest + 0.2 + 0.32 * deepest)
    axis.set_xticks(range(1, deepest + 1))
    axis.set_ylim(0, 1.03)
    axis.grid(axis="y", color=FAINT, alpha=0.25)
    axis.set_xlabel("depth j in the draft")
    axis.set_ylabel("step-α: accepted at depth j, given depth j−1")
    title(figure, "Acceptance by depth", f"{heading(result)}. Depths tried at least {OFTEN} times.")
    return figure


def well_tried(m: Mapping[str, Any]) -> list[float]:
    """The step-α of depths that were tried often enough to show."""
    at = {int(depth): times for depth, times in m["accepted_at_depth"].items()}
    tried = [sum(times for depth, times in at.items() if depth >= j) for j in range(len(m["step_alpha"]))]
    return [alpha for alpha, times in zip(m["step_alpha"][:8], tried, strict=False) if times >= OFTEN]


def spread_labels(at: Mapping[str, float], gap: float) -> dict[str, float]:
    """Heights near the wanted ones, at least ``gap`` apart, for labels that would lie on each other."""
    order = sorted(at, key=lambda name: at[name])
    heights = [at[name] for name in order]
    for _ in range(200):  # push neighbours apart until none touch
        for i in range(1, len(heights)):
            lack = gap - (heights[i] - heights[i - 1])
            if lack > 1e-9:
                heights[i] += lack / 2
                heights[i - 1] -= lack / 2
    return dict(zip(order, heights, strict=True))


def iteration(result: Mapping[str, Any]) -> Any:
    """What one iteration costs, by part, a stacked bar a mode."""
    modes = {mode: parts for mode, m in result["modes"].items() if (parts := per_pass(m))}
    if not modes:
        return None
    figure, (axis,) = new_figure(size=(8.2, 1.75 + 0.58 * len(modes)))
    longest = max(sum(parts.values()) for parts in modes.values())
    labelled = max(modes, key=lambda mode: modes[mode]["draft"])
    for y, (mode, parts) in enumerate(modes.items()):
        left = 0.0
        for part in PARTS:
            width = parts[part]
            axis.barh(y, width, 0.58, left=left, color=PART_COLOURS[part], edgecolor="white", linewidth=0.8)
            if width > 0.06 * longest:
                axis.text(left + width / 2, y, f"{width:.1f}", ha="center", va="center", color="white", fontsize=9)
            left += width
        tau = result["modes"][mode]["tau"]
        axis.annotate(
            f"{left:.1f} ms for {tau:.2f} tokens: {left / tau:.1f} ms a token", (left, y), (6, 0),
            textcoords="offset points", va="center", fontsize=9,
        )  # fmt: skip
    names = spread_labels(
        {part: sum(modes[labelled][p] for p in PARTS[:n]) + modes[labelled][part] / 2 for n, part in enumerate(PARTS)},
        0.115 * longest,
    )
    for part in PARTS:  # named over the bar that shows most of them
        axis.text(
            names[part], list(modes).index(labelled) - 0.31, part, ha="center", va="bottom", fontsize=9,
            fontweight="bold", color=PART_COLOURS[part],
        )  # fmt: skip
    axis.set_yticks(range(len(modes)), list(modes))
    axis.set_ylim(len(modes) - 0.5, -0.72 if labelled == next(iter(modes)) else -0.45)
    axis.set_xlim(0, longest * 1.62)
    axis.tick_params(left=False)
    axis.set_xlabel("milliseconds of an iteration (one pass of the target and what belongs to it)")
    title(figure, "Where an iteration's time goes", heading(result))
    return figure
